"""What is supervised: by content, and against the reference's own rule with the reference's own tokenizer."""

import json
import random

import pytest
from transformers import AutoTokenizer

from minift.encode import (
    UNSUPERVISED,
    Example,
    Report,
    encode_rows,
    likely_cause,
    prompt_ids_and_reference,
    split_row,
)
from minift.errors import UserError
from minift.prompts import TEMPLATES, load_template, render
from minift.tokenizer import Special, load_tokenizer

COURSE = TEMPLATES["course"]
ROWS = [
    {"instruction": "Add two numbers.", "input": "", "output": "def add(first, second):\n    return first + second"},
    {"instruction": "Sum.", "input": "1, 2", "output": "3"},
    {"instruction": "Indent.", "input": "", "output": "\n    x\n"},
    {"instruction": "", "input": "", "output": " \n\n"},
    {"instruction": "Smile.", "input": "", "output": "👩\u200d👩\u200d👧 é"},
    {"instruction": "Nothing.", "input": "", "output": ""},
]


def supervised_ids(example: Example) -> list[int]:
    assert all(label in (UNSUPERVISED, token) for token, label in zip(*example, strict=True))
    return [label for label in example.labels if label != UNSUPERVISED]


def as_text_row(row: dict, template=COURSE) -> dict:
    prompt, completion = render(row, template, "</s>", "</s>")
    return {"text": "".join(prompt + completion)}


def reference_labels(reference, row: dict, template, max_length: int) -> tuple[list[int], list[int]]:
    """trl 1.16, SFTTrainer._prepare_dataset: add the EOS, tokenise twice, keep the common prefix out, then truncate."""
    prompt, completion = ("".join(part) for part in render(row, template, reference.eos_token, reference.bos_token))
    if not completion.endswith(reference.eos_token):
        completion += reference.eos_token
    prompt_ids, ids = reference(prompt).input_ids, reference(prompt + completion).input_ids
    shared = 0
    while shared < min(len(prompt_ids), len(ids)) and prompt_ids[shared] == ids[shared]:
        shared += 1
    labels = [-100] * shared + ids[shared:]
    return ids[:max_length], labels[:max_length]


def test_a_row_by_hand(real_data):
    """The example in encode_completion's docstring, with OPT's tokenizer: [48134, 19121, 35, 50118] is the template."""
    opt = load_tokenizer(real_data / "opt_tokenizer")
    row = {"prompt": "### Response:\n", "completion": "Hi"}
    examples, kept, _ = encode_rows([row], opt, COURSE, max_length=None)
    ids = [2, 48134, 19121, 35, 50118, 30086, 2]
    assert examples == [Example(ids, [-100] * 5 + [30086, 2])] and kept == [0]


@pytest.mark.parametrize("template", ["course", "alpaca"])
def test_supervised_ids_are_the_completion_and_its_end(tokenizer, template):
    rows = [row for row in ROWS if not row["output"].startswith(("\n", " "))]
    examples, kept, report = encode_rows(rows, tokenizer, TEMPLATES[template], max_length=None)
    assert kept == list(range(len(rows)))
    for row, example in zip(rows, examples, strict=True):
        ids = supervised_ids(example)
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[:-1], skip_special_tokens=False) == row["output"]
        prompt = example.input_ids[1 : len(example.input_ids) - len(ids)]
        assert tokenizer.decode(prompt) == "".join(render(row, TEMPLATES[template], "</s>", "</s>")[0])
    assert befell(report, "with an empty") == ["row 4"] and report.kept == 4
    assert report.supervised_tokens == sum(len(supervised_ids(example)) for example in examples)


def befell(report: Report, beginning: str) -> list[str]:
    return [place for what, places in report.befell.items() if what.startswith(beginning) for place in places]


def random_rows(count: int) -> list[dict]:
    rng = random.Random(1)
    bits = ["a", " ", "\n", "\n    ", "return", " x", ":", "é", "😀", "{", "'", "##", "</s>"]
    # No `</s>` but at an output's end: elsewhere the reference takes it for the token, and minift, on purpose, doesn't.
    text = lambda: "".join(rng.choices(bits[:-1], k=rng.randrange(9)))  # noqa: E731
    return [
        {"instruction": text(), "input": rng.choice(["", text()]), "output": text() + rng.choice(["", "", "</s>"])}
        for _ in range(count)
    ]


@pytest.mark.parametrize("template", TEMPLATES)
def test_equal_to_the_reference_s_ids_and_labels(tokenizer_directory, gpt2_tokenizer_directory, template):
    for directory in (tokenizer_directory, gpt2_tokenizer_directory):
        reference, ours = AutoTokenizer.from_pretrained(directory), load_tokenizer(directory)
        rows = [*ROWS, *random_rows(150)]
        if ours.eos_token != "</s>":
            rows = [{**row, "output": row["output"].replace("</s>", ours.eos_token)} for row in rows]
        expected = [reference_labels(reference, row, TEMPLATES[template], 1024) for row in rows]
        examples, kept, _ = encode_rows(rows, ours, TEMPLATES[template], max_length=None)
        assert examples == [expected[index] for index in kept]
        # With GPT-2 and the template "none", a row without any text is its end token alone: nothing to predict.
        assert all(len(expected[index][0]) == 1 for index in range(len(rows)) if index not in kept)

        median = sorted(len(ids) for ids, _ in expected)[len(rows) // 2]
        expected = [(ids[:median], labels[:median]) for ids, labels in expected]
        examples, kept, report = encode_rows(rows, ours, TEMPLATES[template], max_length=median)
        assert examples == [expected[index] for index in kept]
        # trl drops what truncation leaves without a label; a label on the first token alone is no use either.
        dropped = [index for index in range(len(rows)) if index not in kept]
        assert all(set(expected[index][1][1:]) <= {-100} for index in dropped)
        assert befell(report, "cut at") and len(befell(report, "dropped: no")) == len(dropped)


def test_equal_to_the_reference_on_code_alpaca(real_data):
    reference = AutoTokenizer.from_pretrained(real_data / "opt_tokenizer")
    opt = load_tokenizer(real_data / "opt_tokenizer")
    rows = json.loads((real_data / "code_alpaca_2k.json").read_text())[:300]
    examples, kept, _ = encode_rows(rows, opt, COURSE, max_length=1024)
    assert examples == [reference_labels(reference, rows[index], COURSE, 1024) for index in kept]


def token_search_labels(reference, text: str, response_template: str) -> list[int]:
    """trl 0.11's DataCollatorForCompletionOnlyLM: the last run of ids equal to the template's own, if there is one."""
    ids = reference(text).input_ids
    wanted = reference(response_template, add_special_tokens=False).input_ids
    starts = [place for place in range(len(ids)) if ids[place : place + len(wanted)] == wanted]
    if not starts:
        return [-100] * len(ids)
    start = starts[-1] + len(wanted)
    return [-100] * start + ids[start:]


def test_text_rows_agree_with_the_token_search_where_that_works(tokenizer_directory, tokenizer):
    reference = AutoTokenizer.from_pretrained(tokenizer_directory)
    rows = [as_text_row(row) for row in ROWS[:2]]
    rows.append({"text": rows[0]["text"] + "\n" + rows[1]["text"]})  # two turns: the last one counts
    examples, _, _ = encode_rows(rows, tokenizer, COURSE, max_length=None)
    for row, example in zip(rows, examples, strict=True):
        assert example.labels == token_search_labels(reference, row["text"] + "</s>", "### Response:\n")
    assert tokenizer.decode(supervised_ids(examples[2])) == "3"


@pytest.mark.parametrize(
    ("text", "response_template", "supervised"),
    [
        # BPE joins the template's last line end to the response's first: "\n\n" or "\n   " is one token.
        ("### Response:\n\n    return x", "### Response:\n", "return x"),
        ("### Response:\n\n\n    x", "### Response:\n", "x"),
        # The template's last space goes to the response's first word: " A" is one token.
        ("Assistant: A list", "Assistant: ", "A list"),
        # A response template that ends inside a word.
        ("Say: prefixvalue", "prefixval", "ue"),
    ],
)
def test_text_rows_are_found_where_the_token_search_fails(
    tokenizer_directory, tokenizer, text, response_template, supervised
):
    """REFERENCE.md: "Where the token search of the old collator fails". All labels were -100 there, the loss NaN."""
    reference = AutoTokenizer.from_pretrained(tokenizer_directory)
    assert set(token_search_labels(reference, text, response_template)) == {-100}
    (example,), _, report = encode_rows(
        [{"text": text}], tokenizer, COURSE, max_length=None, response_template=response_template
    )
    ids = supervised_ids(example)
    assert ids[-1] == 2
    shown, start = tokenizer.decode(ids[:-1]), text.rfind(response_template) + len(response_template)
    assert shown.endswith(text[start:]) and shown.strip().endswith(supervised)
    # Not a token more than holds the response: without the first one, some of the response would be missing.
    assert not tokenizer.decode(ids[1:-1]).endswith(text[start:])


def test_merged_rows_are_reported(tokenizer):
    rows = [ROWS[0], ROWS[2]]
    for made in (rows, [as_text_row(row) for row in rows]):
        _, _, report = encode_rows(made, tokenizer, COURSE, max_length=None)
        assert befell(report, "where one token joins") == ["row 2"]


def test_end_token_is_supervised_although_it_pads_too(gpt2_tokenizer_directory):
    """The old collator's other failure: pad = eos turned the EOS label into -100, and models never stopped."""
    gpt2 = load_tokenizer(gpt2_tokenizer_directory)
    assert gpt2.pad_token_id == gpt2.eos_token_id
    examples, _, _ = encode_rows(ROWS[:2], gpt2, COURSE, max_length=None)
    assert [example.labels[-1] for example in examples] == [gpt2.eos_token_id] * 2


@pytest.mark.parametrize(
    "make",
    [lambda text: {"prompt": "a", "completion": text}, lambda text: as_text_row({"instruction": "a", "output": text})],
)
def test_end_token_is_there_once_and_never_from_within(tokenizer, make):
    for text, reference in (("x", "x"), ("x</s>", "x"), ("x</s>y", "x</s>y"), ("x</s></s>", "x</s>"), ("", "")):
        (example,), _, report = encode_rows([make(text)], tokenizer, COURSE, max_length=None)
        assert example.input_ids.count(2) == 2 and (example.input_ids[0], example.input_ids[-1]) == (2, 2)
        assert tokenizer.decode(supervised_ids(example)[:-1], skip_special_tokens=False) == reference
        assert befell(report, "that spell a special") == (["row 1"] if "</s>" in reference else [])
        assert befell(report, "with an empty") == (["row 1"] if not reference else [])


def test_a_template_s_eos_counts_as_the_end(tokenizer, tmp_path):
    (tmp_path / "t.txt").write_text("{instruction}\n{response}{eos}")
    template = load_template(str(tmp_path / "t.txt"))
    for output in ("x", "x</s>"):
        pieces = split_row({"instruction": "a", "output": output}, tokenizer, template, "")
        assert pieces == (["a", "\n"], ["x", "</s>"]) and isinstance(pieces[1][1], Special)


def test_all_tokens_supervised_but_the_first(tokenizer):
    rows = [ROWS[1], {"text": "any text </s>"}]
    examples, _, _ = encode_rows(rows, tokenizer, COURSE, max_length=None, supervise="all")
    for example in examples:
        assert example.labels == [-100, *example.input_ids[1:]] and example.input_ids[-1] == 2
    completions, _, _ = encode_rows(rows[:1], tokenizer, COURSE, max_length=None)
    assert completions[0].input_ids == examples[0].input_ids


def test_report_counts_and_names_rows(tokenizer):
    rows = [
        *ROWS,
        {"prompt": "long " * 50, "completion": "x"},
        {"text": "### Response:\nx"},
        {"text": "### RESPONSE:\n"},
    ]
    long = len(encode_rows(rows[:1], tokenizer, COURSE, max_length=None)[0][0].input_ids)
    examples, kept, report = encode_rows(rows, tokenizer, COURSE, max_length=long - 1, source="data.jsonl")
    assert kept == [0, 1, 2, 3, 4, 5, 7]
    assert len(examples[0].input_ids) == long - 1 and examples[0].input_ids[-1] != 2
    assert report.tokens == sum(len(example.input_ids) for example in examples)
    lines = report.lines()
    assert lines[0].startswith("data.jsonl: 7 of 9 rows kept, ")
    assert f"  2 rows cut at {long - 1} tokens, end token lost (row 1, row 5)" in lines
    assert f"  1 row dropped: no supervised token within the first {long - 1} tokens (row 7)" in lines
    assert "  1 row dropped: the response template is not in the text (row 9)" in lines
    assert "    row 9: '### RESPONSE:\\n': it differs in upper and lower case" in lines[-1]


def test_a_label_on_the_first_token_alone_is_nothing_to_learn(gpt2_tokenizer_directory):
    """Without a BOS an empty row is its end token alone, supervised by trl's rule although nothing predicts it."""
    rows = [{"prompt": "", "completion": ""}, {"prompt": "", "completion": "x"}]
    gpt2 = load_tokenizer(gpt2_tokenizer_directory)
    examples, kept, report = encode_rows(rows, gpt2, COURSE, max_length=None)
    assert kept == [1] and befell(report, "dropped: no") == ["row 1"]
    assert "  1 row dropped: no supervised token after its first (row 1)" in report.lines()
    assert examples[0].labels == examples[0].input_ids


def test_report_names_no_more_than_a_few(tokenizer):
    rows = [{"prompt": "a", "completion": ""}] * 1200
    _, _, report = encode_rows(rows, tokenizer, COURSE, max_length=None)
    assert (
        "  1,200 rows with an empty completion: only the end token is supervised (row 1, row 2, row 3, row 4, row 5, …)"
        in (report.lines())
    )


def test_refusals_name_the_row(tokenizer):
    with pytest.raises(UserError, match="none of its 6 rows has a supervised token: 6 rows dropped: .* first 2 tokens"):
        encode_rows(ROWS, tokenizer, COURSE, max_length=2)
    with pytest.raises(UserError, match="data: row 2: 1[0-9]{2} tokens, more than the model's 64 positions"):
        rows = [ROWS[1], {"prompt": "q" * 120, "completion": "x"}]
        encode_rows(rows, tokenizer, COURSE, max_length=None, positions=64, source="data")
    with pytest.raises(UserError, match="--max-length 65: more than the model's 64 positions"):
        encode_rows(ROWS, tokenizer, COURSE, max_length=65, positions=64)
    with pytest.raises(UserError, match=r"data: row 1: lone surrogate U\+D800"):
        encode_rows([{"prompt": "\ud800", "completion": ""}], tokenizer, COURSE, max_length=None, source="data")
    with pytest.raises(UserError, match="--response-template: rows of text need one"):
        encode_rows([{"text": "x"}], tokenizer, TEMPLATES["none"], max_length=None)
    with pytest.raises(UserError, match="the response template is not in the text .*row 1: 'x'"):
        encode_rows([{"text": "x"}], tokenizer, COURSE, max_length=None)


@pytest.mark.parametrize(
    ("text", "response_template", "cause"),
    [
        ("a\n### response:\nb", "### Response:\n", "upper and lower case: the row has '\\n### response:\\nb'"),
        ("a\n### Response: b", "### Response:\n", "spaces or line ends: the row has '\\n### Response: '"),
        ("a\n### Response:\r\nb", "### Response:\n", "spaces or line ends"),
        ("a\n###Response:\nb", "### Response:\n", "spaces or line ends"),
        ("a\n### response: b", "### Response:\n", "case and in spaces"),
        ("a\n### Response\nb", "### Response:\n", "punctuation: the row has"),
        ("a\n### Response:\nb", "### Response:\\n", "a backslash and a letter"),
        ("a\n### Reponse:\nb", "### Response:\n", "the nearest line is '### Reponse:'"),
        ("nothing of the kind", "### Response:\n", "no line of it is like"),
        ("", "### Response:\n", "no line of it is like"),
        ("a", ">>>", "no line of it is like"),
    ],
)
def test_likely_causes(text, response_template, cause):
    found = likely_cause(text, response_template)
    assert cause in found and "\n" not in found


def test_prompt_and_reference_for_generation(tokenizer):
    for row in ROWS:
        prompt, reference = prompt_ids_and_reference(row, tokenizer, COURSE)
        assert tokenizer.decode(prompt).endswith("### Response:\n") and prompt[0] == 2 and prompt[-1] != 2
        assert reference == row["output"]
        assert prompt_ids_and_reference(as_text_row(row), tokenizer, COURSE) == (prompt, reference)
    with pytest.raises(UserError, match="--response-template"):
        prompt_ids_and_reference({"text": "x"}, tokenizer, COURSE)
