"""Which tokens are supervised: by content, and against trl's SFTTrainer with transformers' tokenizer."""

import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from minift.encode import (
    IGNORE_INDEX,
    Example,
    encode_prompt,
    encode_rows,
    split_row,
)
from minift.errors import UserError
from minift.files.templates import load_template
from minift.files.tokenizer import load_tokenizer
from minift.prompts import TEMPLATES, Template, end_with_eos, render
from minift.remarks import MAX_CATEGORIES, Encoded, by_category, category_of
from minift.run.exam import prompt_and_reference
from minift.tokenizer import Special
from tests.compare import Setting
from tests.compare.masks import compare_rows

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
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(*example, strict=True))
    return [label for label in example.labels if label != IGNORE_INDEX]


def locations(encoded: Encoded, beginning: str) -> list[str]:
    """Return the rows to which the remarks that begin so apply."""
    return [row for remark, rows in encoded.remarks.items() if remark.startswith(beginning) for row in rows]


def as_text_row(row: dict) -> dict:
    prompt, completion = render(row, COURSE, SimpleNamespace(eos_token="</s>", bos_token="</s>"))
    return {"text": "".join(prompt + completion)}


def assert_equal_to_trl(directory: Path, rows: list[dict], template: Template, scratch: Path, length: int) -> str:
    """Assert that ids, labels and dropped rows are trl's; return the check's count of rows and tokens."""
    setting = Setting(directory, scratch, scratch, True, scratch, print, {})
    tokenizers = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    check = compare_rows(setting, rows, template, length, *tokenizers)
    assert check.agrees, check
    return check.on


@pytest.mark.parametrize("template", ["course", "alpaca"])
def test_supervised_ids_are_the_completion_and_its_end(tokenizer, template):
    rows = [row for row in ROWS if not row["output"].startswith(("\n", " "))]
    encoded = encode_rows(rows, tokenizer, TEMPLATES[template], max_length=None)
    assert encoded.indices == list(range(4)) and encoded.rows == rows
    for row, example in zip(rows, encoded.examples, strict=True):
        ids = supervised_ids(example)
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[:-1], skip_special_tokens=False) == row["output"]
        prompt = example.input_ids[1 : len(example.input_ids) - len(ids)]
        assert tokenizer.decode(prompt) == "".join(render(row, TEMPLATES[template], tokenizer)[0])
    assert locations(encoded, "with an empty") == ["row 4"]
    assert encoded.supervised_tokens == sum(len(supervised_ids(example)) for example in encoded.examples)


def random_rows(count: int) -> list[dict]:
    rng = random.Random(1)
    bits = ["a", " ", "\n", "\n    ", "return", " x", ":", "é", "😀", "{", "'", "##"]
    # `</s>` only at an output's end: elsewhere it is the end token for the reference, and text for minift.
    text = lambda: "".join(rng.choices(bits, k=rng.randrange(9)))  # noqa: E731
    return [
        {"instruction": text(), "input": rng.choice(["", text()]), "output": text() + rng.choice(["", "", "</s>"])}
        for _ in range(count)
    ]


@pytest.mark.parametrize("template", TEMPLATES)
def test_ids_and_labels_of_difficult_rows_are_trl_s(tokenizer_directory, gpt2_tokenizer_directory, tmp_path, template):
    for directory in (tokenizer_directory, gpt2_tokenizer_directory):
        ours = load_tokenizer(directory)
        rows = [*ROWS, *random_rows(150)]
        rows = [{**row, "output": row["output"].replace("</s>", ours.eos_token)} for row in rows]
        on = assert_equal_to_trl(directory, rows, TEMPLATES[template], tmp_path, 1024)
        # With GPT-2 and the template "none", a row without text is its end token alone: nothing to predict.
        is_empty = template == "none" and ours.bos_token_id is None
        assert on.startswith("156 rows, ") and on.partition("; ")[2] == ("0 rows cut, 1 dropped" if is_empty else "")

        examples = encode_rows(rows, ours, TEMPLATES[template], max_length=None).examples
        median = sorted(len(ids) for ids, _ in examples)[len(examples) // 2]
        on = assert_equal_to_trl(directory, rows, TEMPLATES[template], tmp_path, median)
        assert re.search(r"; [1-9]\d* rows cut, [1-9]\d* dropped", on)


def test_real_rows_with_opt_s_tokenizer(real_data, tmp_path):
    opt = load_tokenizer(real_data / "opt_tokenizer")
    by_hand = [{"prompt": "### Response:\n", "completion": "Hi"}]  # [48134, 19121, 35, 50118] is the template
    expected = Example([2, 48134, 19121, 35, 50118, 30086, 2], [IGNORE_INDEX] * 5 + [30086, 2])
    assert encode_rows(by_hand, opt, COURSE, max_length=None).examples == [expected]
    rows = json.loads((real_data / "code_alpaca_2k.json").read_text())[:300]
    assert_equal_to_trl(real_data / "opt_tokenizer", rows, COURSE, tmp_path, 1024)


@pytest.mark.parametrize(
    ("text", "response_template", "supervised"),
    [
        # BPE joins the template's last line end to the response's first: "\n\n" or "\n   " is one token.
        ("### Response:\n\n    return x", "### Response:\n", "return x"),
        ("### Response:\n\n\n    x", "### Response:\n", "x"),
        # The template's last space is in the token of the response's first word, " A".
        ("Assistant: A list", "Assistant: ", "A list"),
        # The response template ends inside a word.
        ("Say: prefixvalue", "prefixval", "ue"),
    ],
)
def test_text_rows_whose_response_begins_inside_a_token(tokenizer, text, response_template, supervised):
    """Find the response where a search for the template's ids, as in trl 0.11's collator, fails."""
    encoded = encode_rows([{"text": text}], tokenizer, COURSE, max_length=None, response_template=response_template)
    ids = supervised_ids(encoded.examples[0])
    assert ids[-1] == 2
    shown, start = tokenizer.decode(ids[:-1]), text.rfind(response_template) + len(response_template)
    assert shown.endswith(text[start:]) and shown.strip().endswith(supervised)
    # No token too many: without the first one, some of the response would be missing.
    assert not tokenizer.decode(ids[1:-1]).endswith(text[start:])


def test_joined_rows_are_reported(tokenizer):
    rows = [ROWS[0], ROWS[2]]
    for schema in (rows, [as_text_row(row) for row in rows]):
        encoded = encode_rows(schema, tokenizer, COURSE, max_length=None)
        assert locations(encoded, "where one token spans") == ["row 2"]
    blank = {"prompt": "Assistant: ", "completion": "A list"}
    assert "answers get worse" in encode_rows([blank], tokenizer, COURSE, max_length=None).summary
    moved = {"prompt": "Assistant:", "completion": " A list"}  # what the remark asks for
    assert not encode_rows([moved], tokenizer, COURSE, max_length=None).remarks


def test_end_token_is_supervised_although_it_is_also_the_pad(gpt2_tokenizer_directory):
    """Supervise the EOS: trl 0.11's collator masked the pad id, so models never stopped."""
    gpt2 = load_tokenizer(gpt2_tokenizer_directory)
    assert gpt2.pad_token_id == gpt2.eos_token_id
    examples = encode_rows(ROWS[:2], gpt2, COURSE, max_length=None).examples
    assert [example.labels[-1] for example in examples] == [gpt2.eos_token_id] * 2


@pytest.mark.parametrize(
    "make_row",
    [lambda text: {"prompt": "a", "completion": text}, lambda text: as_text_row({"instruction": "a", "output": text})],
)
def test_end_token_is_there_once_and_never_inside(tokenizer, make_row):
    for text, reference in (("x", "x"), ("x</s>", "x"), ("x</s>y", "x</s>y"), ("x</s></s>", "x</s>"), ("", "")):
        encoded = encode_rows([make_row(text)], tokenizer, COURSE, max_length=None)
        [example] = encoded.examples
        assert example.input_ids.count(2) == 2 and (example.input_ids[0], example.input_ids[-1]) == (2, 2)
        assert tokenizer.decode(supervised_ids(example)[:-1], skip_special_tokens=False) == reference
        assert locations(encoded, "whose text has the name of a special") == (["row 1"] if "</s>" in reference else [])
        assert locations(encoded, "with an empty") == (["row 1"] if not reference else [])


def test_a_template_s_eos_counts_as_the_end(tokenizer, tmp_path):
    (tmp_path / "t.txt").write_text("{instruction}\n{response}{eos}")
    template = load_template(str(tmp_path / "t.txt"))
    for output in ("x", "x</s>"):
        pieces = split_row({"instruction": "a", "output": output}, tokenizer, template, "")
        assert pieces == (["a", "\n"], ["x", "</s>"]) and isinstance(pieces[1][1], Special)
    # A {bos} at the end became plain text.
    assert [type(piece) for piece in end_with_eos(["x</s>", Special("<s>")], tokenizer)] == [str, Special, Special]


def test_all_tokens_supervised_but_the_first(tokenizer):
    rows = [ROWS[1], {"text": "any text </s>"}]
    examples = encode_rows(rows, tokenizer, COURSE, max_length=None, supervise="all").examples
    for example in examples:
        assert example.labels == [IGNORE_INDEX, *example.input_ids[1:]] and example.input_ids[-1] == 2
    [completion] = encode_rows(rows[:1], tokenizer, COURSE, max_length=None).examples
    assert completion.input_ids == examples[0].input_ids


def test_summary_counts_and_names_rows(tokenizer):
    rows = [
        *ROWS,
        {"prompt": "long " * 50, "completion": "x"},
        {"text": "### Response:\nx"},
        {"text": "### RESPONSE:\n"},
    ]
    long = len(encode_rows(rows[:1], tokenizer, COURSE, max_length=None).examples[0].input_ids)
    encoded = encode_rows(rows, tokenizer, COURSE, max_length=long - 1, source="data.jsonl")
    assert encoded.indices == [0, 1, 2, 3, 4, 5, 7] and encoded.rows == [rows[number] for number in encoded.indices]
    assert len(encoded.examples[0].input_ids) == long - 1 and encoded.examples[0].input_ids[-1] != 2
    tokens = sum(len(example.input_ids) for example in encoded.examples)
    supervised = sum(len(supervised_ids(example)) for example in encoded.examples)
    totals, *lines = encoded.summary.split("\n")
    assert totals == (
        f"data.jsonl: 7 of 9 rows kept, {tokens} tokens, {supervised} of them supervised ({supervised / tokens:.0%})"
    )
    assert f"  2 rows cut at {long - 1} tokens, end token lost (row 1, row 5)" in lines
    assert f"  1 row dropped: no supervised token within the first {long - 1} tokens (row 7)" in lines
    assert "  1 row dropped: the response template is not in the text (row 9)" in lines
    assert "    row 9: '### RESPONSE:\\n': it differs in upper and lower case" in lines[-1]


def test_a_label_on_the_first_token_alone_is_not_enough(gpt2_tokenizer_directory):
    """Drop an empty row without a BOS: nothing predicts its only token, though trl's rule supervises it."""
    rows = [{"prompt": "", "completion": ""}, {"prompt": "", "completion": "x"}]
    encoded = encode_rows(rows, load_tokenizer(gpt2_tokenizer_directory), COURSE, max_length=None)
    assert encoded.indices == [1]
    assert "  1 row dropped: no supervised token after the first one (row 1)" in encoded.summary.split("\n")
    assert encoded.examples[0].labels == encoded.examples[0].input_ids


def test_summary_names_only_the_first_rows(tokenizer):
    rows = [{"prompt": "a", "completion": ""}] * 1200
    [_, line] = encode_rows(rows, tokenizer, COURSE, max_length=None).summary.split("\n")
    assert line == (
        "  1,200 rows with an empty completion: only the end token is supervised (row 1, row 2, row 3, row 4, row 5, …)"
    )


def test_errors_name_the_row(tokenizer):
    with pytest.raises(UserError, match="none of its 6 rows has a supervised token: 6 rows dropped: .* first 2 tokens"):
        encode_rows(ROWS, tokenizer, COURSE, max_length=2)
    with pytest.raises(UserError, match=r"data: row 1: lone surrogate U\+D800"):
        encode_rows([{"prompt": "\ud800", "completion": ""}], tokenizer, COURSE, max_length=None, source="data")
    with pytest.raises(UserError, match="--response-template: `text` rows need one"):
        encode_rows([{"text": "x"}], tokenizer, TEMPLATES["none"], max_length=None)
    with pytest.raises(UserError, match="the response template is not in the text .*row 1: 'x'"):
        encode_rows([{"text": "x"}], tokenizer, COURSE, max_length=None)


def test_an_error_about_text_rows_is_short(tokenizer):
    rows = [{"text": f"### Antwort {number}: " + "lang " * 200} for number in range(20)]
    for row in rows:
        row["text"] += "\n### RESPONSE:\nx"
    with pytest.raises(UserError, match="; name another one with --response-template$") as caught:
        encode_rows(rows, tokenizer, COURSE, max_length=None, source="data.jsonl")
    assert "the row has '\\n### RESPONSE:\\nx'" in str(caught.value) and len(str(caught.value)) < 400


def test_a_first_token_is_not_counted_because_nothing_predicts_it(gpt2_tokenizer_directory):
    """Without BOS and prompt, the completion's first token is the row's."""
    ours = load_tokenizer(gpt2_tokenizer_directory)
    rows = [{"prompt": "", "completion": "a"}, {"prompt": "", "completion": "abc def"}]
    encoded = encode_rows(rows, ours, COURSE, max_length=None)
    assert encoded.supervised_tokens == sum(len(ids) - 1 for ids, _ in encoded.examples)
    assert len(encoded.examples) == 2 and not encoded.remarks


def test_prompt_and_reference_for_generation(tokenizer):
    for row in ROWS:
        prompt = encode_prompt(row, tokenizer, COURSE)
        assert tokenizer.decode(prompt).endswith("### Response:\n") and prompt[0] == 2 and prompt[-1] != 2
        assert prompt_and_reference(row, tokenizer, COURSE) == (prompt, "", row["output"])
        assert encode_prompt({**row, "output": "another"}, tokenizer, COURSE) == prompt
        assert prompt_and_reference(as_text_row(row), tokenizer, COURSE) == (prompt, "", row["output"])
    with pytest.raises(UserError, match="--response-template"):
        prompt_and_reference({"text": "x"}, tokenizer, COURSE)


def test_groups_by_category():
    names = [f"{number:02}" for number in range(MAX_CATEGORIES)]
    assert [category_of({"kind": kind}) for kind in ("a", ["a"], None, 3)] == ["a", None, None, None]
    assert category_of({}) is None
    assert list(by_category([1, 2, 3], ["b", "a", "b"]).items()) == [("all", [1, 2, 3]), ("a", [2]), ("b", [1, 3])]
    assert by_category([1, 2], ["all", "all"]) == {"all": [1, 2]} == by_category([1, 2], [None, None])
    assert by_category([], []) == {"all": []}
    assert list(by_category(names, names[::-1])) == ["all", *names]
    assert by_category([*names, "x"], [*names, "x"]) == {"all": [*names, "x"]}  # too many for categories


def test_turns_and_fields_that_are_not_supervised_or_read_are_counted(tokenizer):
    turns = "### Instruction:\nA\n\n### Response:\nB\n\n### Instruction:\nC\n\n### Response:\nD"
    encoded = encode_rows([{"text": turns}, {"text": turns[:36], "context": "x"}], tokenizer, COURSE, max_length=None)
    assert encoded.remark_lines == ["  1 row with several responses, of which only the last is supervised (row 1)"]
    rows = [
        {"instruction": "Human: A\n\nAssistant:", "output": "B"},
        {"instruction": turns, "output": "B"},
        {"instruction": "A", "context": "x", "system": "", "query": 3, "output": "B"},
        {"prompt": "Human: A\n\nAssistant:", "input": "x", "completion": "B"},
        {"instruction": "A", "input": "x", "output": "### Response:\n"},
    ]
    lines = [line.strip() for line in encode_rows(rows, tokenizer, COURSE, max_length=None).remark_lines]
    assert [line.split(": the")[0] for line in lines] == [
        "1 row whose question is a prompt already (Human: … Assistant:)",
        "1 row whose question is a prompt already (### Response:)",
        "1 row whose 'context' is not read (row 3)",
        "1 row whose 'query' is not read (row 3)",
        "1 row whose 'input' is not read (row 4)",
    ]
    everything = encode_rows([{"text": turns}], tokenizer, COURSE, max_length=None, supervise="all")
    assert everything.remark_lines == []
