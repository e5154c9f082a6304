"""Rows as other data sets have them: conversations, their mask by turn, and fields under other names."""

import json

import pytest
from transformers import AutoTokenizer

import minift
from minift.commands import generate
from minift.config import Config
from minift.encode import IGNORE_INDEX, encode_prompt, encode_rows, split_row
from minift.errors import UserError
from minift.files.datasets import PAIR_SCHEMAS, PROMPT_SCHEMAS, SCORE_SCHEMAS, TRAINING_SCHEMAS, load_rows
from minift.files.tokenizer import load_tokenizer
from minift.pairs import encode_rankings
from minift.prompts import TEMPLATES, Template, question_of
from minift.remarks import JOINED
from minift.run.exam import held_out_prompts, prompt_and_reference, ranking_sample
from tests.runs import SHIPPED, read_lines, user_error, write_lines

SYSTEM, QUESTION, ANSWER = "Be brief.", "Add 1 and 2.", " 3"


def says(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    """Return messages: what the system says, then what user and assistant say in turn."""
    start = [] if system is None else [{"role": "system", "content": system}]
    return start + [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def load(path, rows, schemas=TRAINING_SCHEMAS):
    return load_rows(write_lines(path / "rows.jsonl", rows), schemas)


def encode(rows, tokenizer, template="course", **options):
    return encode_rows(rows, tokenizer, TEMPLATES[template], **{"max_length": None, **options}).examples


# ------------------------------------------------------------------------------------------------------- conversations


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("supervise", ["completion", "all"])
def test_one_turn_is_the_row_of_an_instruction(tmp_path, tokenizer, template, supervise):
    conversations = [{"messages": says(QUESTION, ANSWER)}, {"messages": says(QUESTION, ANSWER, system=SYSTEM)}]
    rows = [{"instruction": text, "output": ANSWER} for text in (QUESTION, f"{SYSTEM}\n\n{QUESTION}")]
    loaded = load(tmp_path, [*conversations, {"messages": says(QUESTION, ANSWER, system=" \n")}])
    assert loaded == [*rows, rows[0]]
    assert encode(loaded[:2], tokenizer, template, supervise=supervise) == encode(
        rows, tokenizer, template, supervise=supervise
    )


def test_every_answer_and_its_end_token_are_supervised(tmp_path, tokenizer):
    messages = says("Hi", "Yo </s>", "Add.", "", "</s>?", "a + b</s>", system=SYSTEM)
    [row] = load(tmp_path, [{"messages": messages, "kind": "chat"}])
    assert row == {
        "instruction": "</s>?", "output": "a + b</s>", "history": [["Be brief.\n\nHi", "Yo </s>"], ["Add.", ""]],
        "kind": "chat",
    }  # fmt: skip
    [example] = encode([row], tokenizer)
    prompt = "### Instruction:\n{}\n\n### Response:\n"
    parts = [
        (prompt.format("Be brief.\n\nHi"), "Yo "), (prompt.format("Add."), ""), (prompt.format("</s>?"), "a + b")
    ]  # fmt: skip
    ids, labels = [2], [IGNORE_INDEX]
    for question, answer in parts:  # worked out by hand: each text alone, </s> between two turns
        asked, answered = (tokenizer.encode(text)[1:] for text in (question, answer))
        ids += [*asked, *answered, 2]
        labels += [IGNORE_INDEX] * len(asked) + [*answered, 2]
    assert (example.input_ids, example.labels) == (ids, labels)


@pytest.mark.parametrize("form", ["{bos}Q: {instruction} A:{response}", "Q: {instruction}\nA: {response}{eos}\n"])
def test_the_turns_are_those_of_the_whole_text(tmp_path, tokenizer, gpt2_tokenizer_directory, form):
    """Encoded one by one, and as one text; for a tokenizer that adds a BOS and one that adds none."""
    [row] = load(tmp_path, [{"messages": says("Hi", "Yo", " Add.", "", "x\n", "\n def name(text):")}])
    template = Template("file", form, form)
    for reader in (tokenizer, load_tokenizer(gpt2_tokenizer_directory)):
        pieces = split_row(row, reader, template, "")
        [example] = encode_rows([row], reader, template, max_length=None).examples
        assert example.input_ids == reader.encode([*pieces[0], *pieces[1]])
        assert sum(label != IGNORE_INDEX for label in example.labels) > 6


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_begins_with_the_shorter_one(tmp_path, tokenizer, name):
    """So that generation after any turn starts from ids that were trained on, and its answers have the same labels."""
    texts = ["Hi", "Yo", "Add.", "def name(text):", "Bye", "\nBye"]
    [whole] = encode(load(tmp_path, [{"messages": says(*texts)}]), tokenizer, name)
    for count in (2, 4):
        [part] = encode(load(tmp_path, [{"messages": says(*texts[:count])}]), tokenizer, name)
        assert part.input_ids == whole.input_ids[: len(part.input_ids)]
        assert part.labels == whole.labels[: len(part.labels)]
        [asked] = load(tmp_path, [{"messages": says(*texts[: count + 1])}], PROMPT_SCHEMAS)
        start = encode_prompt(asked, tokenizer, TEMPLATES[name])
        assert start == whole.input_ids[: len(start)] and len(start) > len(part.input_ids)
        assert whole.labels[len(start) - 1] == IGNORE_INDEX != whole.labels[len(start)]


@pytest.mark.parametrize("texts", [("Hi", "\n  Yo", "Bye", "Bye"), ("Hi", "Yo", "Bye", "\n  Bye")])
def test_a_token_that_spans_a_question_and_its_answer_is_remarked_in_any_turn(tmp_path, tokenizer, texts):
    rows = load(tmp_path, [{"messages": says(*texts)}, {"messages": says("Hi", "Yo", "Bye", "Bye")}])
    assert encode_rows(rows, tokenizer, TEMPLATES["course"], max_length=None).remarks == {JOINED: ["line 1"]}


@pytest.mark.parametrize("template", ["course", "dialogue"])
def test_ids_and_mask_are_trl_s_with_assistant_only_loss(tmp_path, tokenizer, tokenizer_directory, template):
    """trl asks transformers for the mask, by the {% generation %} of a chat template; OPT's tokenizer has none."""
    reference = AutoTokenizer.from_pretrained(tokenizer_directory)
    before, blank = {
        "course": ("### Instruction:\n{{ message.content }}\n\n### Response:\n", ""),
        "dialogue": ("{{ '\n\nHuman: ' + message.content + '\n\nAssistant:' }}", " "),
    }[template]
    chat = (
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}" + before + "{% else %}"
        "{% generation %}" + blank + "{{ message.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    for texts in (["Hi", "Yo"], ["Hi", "Yo", "Add.", "def add(first, second):\n    return 1", "x", "y\n"]):
        expected = reference.apply_chat_template(
            says(*texts), chat_template=chat, return_dict=True, return_assistant_tokens_mask=True
        )
        [example] = encode(load(tmp_path, [{"messages": says(*texts)}]), tokenizer, template)
        assert example.input_ids == expected["input_ids"]
        assert [int(label != IGNORE_INDEX) for label in example.labels] == expected["assistant_masks"]


def test_the_exam_asks_for_the_last_answer(tmp_path, tokenizer):
    [row] = load(tmp_path, [{"messages": says("Hi", "Yo", "Add.", ANSWER)}])
    template = TEMPLATES["dialogue"]
    prompt, blanks, reference = prompt_and_reference(row, tokenizer, template)
    assert (blanks, reference) == (" ", ANSWER)
    text = "</s>\n\nHuman: Hi\n\nAssistant: Yo</s>\n\nHuman: Add.\n\nAssistant:"
    assert tokenizer.decode(prompt, skip_special_tokens=False) == text
    [question] = held_out_prompts([row], tokenizer, template, Config(), 64)
    assert (question.prompt_ids, question.prompt, question.reference) == (prompt, text, ANSWER)


def test_sharegpt_s_names(tmp_path, capsys):
    turns = [{"from": "system", "value": SYSTEM}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
    rows = [{"conversations": turns}, {"conversations": turns[1:]}, {"conversations": [*turns, turns[1]], "id": 3}]
    expected = [{"instruction": text, "output": "Yo"} for text in (f"{SYSTEM}\n\nHi", "Hi", f"{SYSTEM}\n\nHi")]
    assert load(tmp_path, rows) == [*expected[:2], expected[2] | {"id": 3}]
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path / 'rows.jsonl'}:",
        "  3 rows whose 'conversations' is read as 'messages' (line 1, line 2, line 3)",
        "  1 row whose last message is the user's: it is left out (line 3)",
    ]


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "field 'messages' is [], expected a list of {"),
        ("Hi", "field 'messages' is \"Hi\", expected a list of {"),
        (["Hi"], "message 1 of 'messages' is \"Hi\", expected {"),
        ([{"role": "tool", "content": "a"}], "message 1 of 'messages': 'role' is \"tool\", expected system, user or"),
        ([{"content": "a"}], "message 1 of 'messages': 'role' is null, expected system, user or assistant"),
        ([{"role": ["user"], "content": "a"}], "message 1 of 'messages': 'role' is [\"user\"], expected"),
        ([{"role": "user", "content": None}], "message 1 of 'messages': 'content' is null, expected a string"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 1 of 'messages': 'content' is [{"),
        ([{"from": "human", "content": "a"}], "message 1 of 'messages': 'value' is null, expected a string"),
        ([{"role": "user", "content": "\ud800"}], "message 1 of 'messages': field 'content' has a lone surrogate"),
        (says("Hi", "Yo")[1:], "message 1 of 'messages': 'role' is \"assistant\", expected system or user: a system"),
        ([*says("Hi"), *says("Hi", "Yo")], "message 2 of 'messages': 'role' is \"user\", expected assistant: a system"),
        ([*says("Hi", "Yo"), *says("a", "b")[1:]], "message 3 of 'messages': 'role' is \"assistant\", expected user"),
        ([*says("Hi", "Yo"), *says(system=SYSTEM)], "message 3 of 'messages': 'role' is \"system\", expected user"),
        (says(system=SYSTEM), "field 'messages' has no message of the user"),
        (says("Hi"), "field 'messages' has no answer of the assistant"),
        (says("Hi", system=SYSTEM), "field 'messages' has no answer of the assistant"),
    ],
    ids=str,
)
def test_a_conversation_that_is_not_one_is_named(tmp_path, messages, problem):
    path = write_lines(tmp_path / "rows.jsonl", [{"messages": says("Hi", "Yo")}, {"messages": messages}])
    assert user_error(load_rows, path).startswith(f"{path}:2: {problem}")


def test_what_is_not_read_is_said(tmp_path, capsys):
    messages = [{"role": "user", "content": "Hi", "name": "Ann"}, {"role": "assistant", "content": "Yo", "weight": 0}]
    load(tmp_path, [{"messages": messages}])
    assert "  1 row whose messages have fields that are not read: 'name', 'weight' (line 1)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "schemas", "expected"),
    [
        ({"prompt": "Hi", "text": "x", "messages": says("Hi", "Yo")}, TRAINING_SCHEMAS,
         {"instruction": "Hi", "output": "Yo"}),  # ultrachat_200k
        ({"instruction": "a", "output": "b", "messages": 3}, TRAINING_SCHEMAS, None),
        ({"prompt": "a", "completion": "b", "messages": 3}, TRAINING_SCHEMAS, None),
        ({"prompt": "a", "messages": 3}, PROMPT_SCHEMAS, None),
        ({"messages": says("Hi", "Yo")}, SCORE_SCHEMAS, {"instruction": "Hi", "response": "Yo"}),
        ({"messages": says("Hi"), "response": "Yo"}, SCORE_SCHEMAS, {"instruction": "Hi", "response": "Yo"}),
        ({"messages": says("Hi"), "chosen": "a", "rejected": "b"}, PAIR_SCHEMAS,
         {"instruction": "Hi", "chosen": "a", "rejected": "b"}),
    ],
    ids=str,
)  # fmt: skip
def test_which_field_is_read(tmp_path, row, schemas, expected):
    assert load(tmp_path, [row], schemas) == [row if expected is None else expected]


def test_pairs_of_conversations_share_their_question(tmp_path, tokenizer):
    start = says("Hi", "Yo", "Add.", system=SYSTEM)
    good, bad = ([*start, {"role": "assistant", "content": text}] for text in ("a + b", "a"))
    whole = {"prompt": "Hi", "chosen": good, "rejected": bad}
    parts = {"prompt": start, "chosen": good[-1:], "rejected": bad[-1:]}
    loaded = load(tmp_path, [whole, parts], PAIR_SCHEMAS)
    expected = {"instruction": "Add.", "history": [[f"{SYSTEM}\n\nHi", "Yo"]], "chosen": "a + b", "rejected": "a"}
    assert loaded == [expected, expected]
    encoded = encode_rankings(loaded, tokenizer, TEMPLATES["dialogue"], max_length=99)
    start = "\n\nHuman: Be brief.\n\nHi\n\nAssistant: Yo</s>\n\nHuman: Add.\n\nAssistant:"
    assert [tokenizer.decode(ids[1:], skip_special_tokens=False) for ids in encoded.examples[0].responses] == [
        f"{start} a + b</s>", f"{start} a</s>",
    ]  # fmt: skip
    assert not encoded.remarks
    assert ranking_sample(loaded[0], [1, 0], [1, 0])["prompt"] == "Be brief.\n\nHi\n\nYo\n\nAdd."
    for changes, problem in (
        (
            {"rejected": says("Bye", "a", system=SYSTEM)},
            "'chosen' and 'rejected' differ in more than their last messages",
        ),
        ({"rejected": says("Hi")}, "the last message of 'rejected' is the user's, expected an answer"),
        ({"chosen": []}, "field 'chosen' is [], expected a list of {"),
    ):
        path = write_lines(tmp_path / "bad.jsonl", [{"chosen": good, "rejected": bad} | changes])
        assert problem in user_error(load_rows, path, PAIR_SCHEMAS)


@pytest.mark.parametrize("history", ["Hi", [["Hi"]], [["Hi", 3]], [{"Hi": "Yo"}], [["Hi", "Yo", "no"]]])
def test_a_history_is_a_list_of_questions_and_answers(tmp_path, history):
    row = {"instruction": "a", "output": "b"}
    assert load(tmp_path, [row | {"history": []}, row | {"history": [["Hi", "Yo"]]}])
    path = write_lines(tmp_path / "rows.jsonl", [row | {"history": history}])
    assert user_error(load_rows, path).startswith(f"{path}:1: field 'history' is ")


def test_a_conversation_in_the_library():
    lm = minift.load(SHIPPED)
    row = {"messages": says("Hi", "Yo", "Add.", "3")}
    assert lm.show(row).count("⟦") == len(tokenized := lm.encode(row).labels) - tokenized.count(IGNORE_INDEX)
    with pytest.raises(UserError, match="the row: field 'messages' has no answer"):
        lm.show({"messages": says("Hi")})


# -------------------------------------------------------------------------------------------------------- other names

DOLLY = {"instruction": "a", "context": "b", "response": "c", "category": "open_qa"}
ORCA = {"system": "S", "question": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "schemas", "expected", "remark"),
    [
        (DOLLY, TRAINING_SCHEMAS, {"instruction": "a", "input": "b", "output": "c", "kind": "open_qa"},
         "'context' is read as 'input', 'response' is read as 'output', 'category' is read as 'kind'"),
        (DOLLY, SCORE_SCHEMAS, {"instruction": "a", "input": "b", "response": "c", "kind": "open_qa"},
         "'context' is read as 'input', 'category' is read as 'kind'"),
        (DOLLY | {"kind": "x"}, PROMPT_SCHEMAS,
         {"instruction": "a", "input": "b", "output": "c", "category": "open_qa", "kind": "x"},
         "'context' is read as 'input', 'response' is read as 'output'"),
        ({"instruction": "a", "input": "b", "response": "c"}, TRAINING_SCHEMAS,
         {"instruction": "a", "input": "b", "output": "c"}, "'response' is read as 'output'"),  # GPTeacher
        ({"instruction": "a", "response": "c"}, SCORE_SCHEMAS, {"instruction": "a", "response": "c"}, None),
        (ORCA, PAIR_SCHEMAS, {"instruction": "S\n\nq", "chosen": "a", "rejected": "b"},
         "'question' is read as 'instruction', with 'system' before it"),
        (ORCA | {"system": ""}, SCORE_SCHEMAS, {"instruction": "q", "chosen": "a", "rejected": "b"},
         "'question' is read as 'instruction', with 'system' before it"),
        ({"id": "1", "system_prompt": "S", "question": "q", "response": "a"}, TRAINING_SCHEMAS,
         {"id": "1", "instruction": "S\n\nq", "output": "a"},
         "'question' is read as 'instruction', 'response' is read as 'output', with 'system_prompt' before it"),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, PAIR_SCHEMAS,
         {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, None),  # hh-rlhf
    ],
    ids=str,
)  # fmt: skip
def test_names_of_other_data_sets(tmp_path, row, schemas, expected, remark, capsys):
    rows = load(tmp_path, [row, row], schemas)
    assert rows == [expected] * 2 and [*rows[0]] == [*expected] and rows[0].given == row
    printed = f"{tmp_path / 'rows.jsonl'}:\n  2 rows whose {remark} (line 1, line 2)\n" if remark else ""
    assert capsys.readouterr() == ("", printed)


def test_the_shared_beginning_of_hh_rlhf_s_dialogues_is_the_prompt(tmp_path, tokenizer):
    sides = {name: f"\n\nHuman: Hi\n\nAssistant: {text}" for name, text in (("chosen", "Yo"), ("rejected", "No"))}
    [row] = load(tmp_path, [sides], PAIR_SCHEMAS)
    assert question_of(row) is None
    asked = {"instruction": "Hi", "chosen": "Yo", "rejected": "No"}
    pairs = [encode_rankings([pair], tokenizer, TEMPLATES["dialogue"], max_length=99) for pair in (row, asked)]
    assert pairs[0].examples == pairs[1].examples and not pairs[0].remarks


def test_commands_write_the_rows_as_they_were(tmp_path, capsys):
    rows = [DOLLY, {"messages": says("Hi", "Yo", "Bye"), "id": 1}, {"instruction": "a"}]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "out.jsonl"
    flags = ["--model", SHIPPED, "--prompts", path, "--max-new-tokens", 1, "--device", "cpu", "--out", out]
    generate.main([*map(str, flags)])
    written = read_lines(out)
    assert [{name: line[name] for name in row} for row, line in zip(rows, written, strict=True)] == rows
    added = [line.keys() - row.keys() for row, line in zip(rows, written, strict=True)]
    assert added == [{"completion", "token_ids"}] * 3
    assert json.dumps(written[0]).startswith(json.dumps(DOLLY)[:-1])
