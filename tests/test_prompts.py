"""Templates and the pieces they turn rows into; template files."""

import json
from types import SimpleNamespace

import pytest

from minift.encode import IGNORE_INDEX, encode_prompt, encode_rows
from minift.errors import UserError
from minift.files.templates import load_template, save_template, template_of
from minift.files.tokenizer import load_tokenizer
from minift.prompts import TEMPLATES, Template, blanks_of, render, render_prompt
from minift.remarks import likely_cause
from minift.run.exam import prompt_and_reference
from minift.tokenizer import Special

ROW = {"instruction": "Add them.", "input": "1, 2", "output": "3"}
BARE = {"instruction": "Say hi.", "input": "", "output": "hi"}
# The part of a tokenizer that templates use.
NAMES = SimpleNamespace(eos_token="</s>", bos_token="</s>")
WITHOUT_BOS = SimpleNamespace(eos_token="</s>", bos_token=None)


def joined(row: dict, name: str) -> tuple[str, str]:
    prompt, completion = render(row, load_template(name), NAMES)
    return "".join(prompt), "".join(completion)


def test_course_is_the_lab_s_text():
    assert joined(BARE, "course") == ("### Instruction:\nSay hi.\n\n### Response:\n", "hi")
    assert joined(ROW, "course") == ("### Instruction:\nAdd them.\n\n### Input:\n1, 2\n\n### Response:\n", "3")


def test_alpaca_is_stanford_s_text():
    assert joined(ROW, "alpaca")[0] == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd them.\n\n### Input:\n1, 2\n\n"
        "### Response:"
    )
    assert joined(BARE, "alpaca")[0] == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay hi.\n\n### Response:"
    )


def test_dialogue_and_none():
    assert joined(BARE, "dialogue") == ("\n\nHuman: Say hi.\n\nAssistant:", " hi")
    assert joined(ROW, "dialogue") == ("\n\nHuman: Add them.\n\n1, 2\n\nAssistant:", " 3")
    assert joined(BARE, "none") == ("Say hi.", "hi")


def test_response_templates():
    found = {name: template.marker for name, template in TEMPLATES.items()}
    assert found == {"course": "### Response:\n", "alpaca": "### Response:", "dialogue": "Assistant: ", "none": ""}


@pytest.mark.parametrize(
    ("end", "blanks"),
    [("A: ", " "), ("A:\t", "\t"), ("A:  ", "  "), ("A:\n\n", "\n\n"), ("A: \n", " \n"), ("A:\n ", "\n "),
     ("A:\n", ""), ("A:", ""), ("{eos} ", " ")],
)  # fmt: skip
def test_blanks_that_end_a_template_begin_the_completion(tokenizer, tmp_path, end, blanks):
    """`dialogue` ends in a blank: generation started from ids that no training row begins with."""
    path = tmp_path / "template.txt"
    path.write_text("Q: {instruction}\n" + end + "{response}{eos}")
    row, template = {"instruction": "Add.", "output": "def name(text):"}, load_template(str(path))
    text_row = {"text": f"Q: Add.\n{end}def name(text):"}
    rows = [(row, None), *([] if "{" in end else [(text_row, end)])]
    for given, marker in rows:
        start, *found = prompt_and_reference(given, tokenizer, template, marker)
        encoded = encode_rows([given], tokenizer, template, max_length=None, response_template=marker)
        (example,) = encoded.examples
        assert example.input_ids[: len(start)] == start and not encoded.remarks
        supervised = [label for label in example.labels if label != IGNORE_INDEX]
        assert start + supervised == example.input_ids
        assert tokenizer.decode(supervised) == blanks + "def name(text):"
        assert found == [blanks, "def name(text):"]
    assert blanks_of(row, template) == blanks and encode_prompt(row, tokenizer, template) == start


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_built_in_template_starts_generation_from_trained_ids(tokenizer, name):
    for row in (ROW, BARE):
        start = encode_prompt(row, tokenizer, TEMPLATES[name])
        (example,) = encode_rows([row], tokenizer, TEMPLATES[name], max_length=None).examples
        assert example.input_ids[: len(start)] == start


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_rows_are_used_as_they_are(name):
    row = {"prompt": "{instruction} </s>", "completion": "{x}"}
    assert render(row, TEMPLATES[name], WITHOUT_BOS) == (["{instruction} </s>"], ["{x}"])


def test_a_prompt_is_rendered_without_a_response():
    assert "".join(render_prompt({"instruction": "Go."}, TEMPLATES["course"], WITHOUT_BOS)).endswith("### Response:\n")
    assert render_prompt({"prompt": "Go."}, TEMPLATES["course"], WITHOUT_BOS) == ["Go."]


def test_braces_are_text_in_rows_and_in_templates(tmp_path):
    """Code is full of braces: str.format would raise KeyError on these, or fill in placeholders in a row's text."""
    path = tmp_path / "template.txt"
    path.write_text("{{x}} {0} {instruction} {output} {}: {response} }\n")
    row = {"instruction": "f'{response} {input}' % {instruction}", "input": "", "output": "{bos} {'a': 1}"}
    prompt, completion = render(row, load_template(str(path)), NAMES)
    assert "".join(prompt) == "{{x}} {0} f'{response} {input}' % {instruction} {output} {}:"
    assert "".join(completion) == " {bos} {'a': 1} }"
    assert not any(isinstance(piece, Special) for piece in prompt + completion)


def test_a_template_file_carries_over_to_another_tokenizer(tmp_path, tokenizer_directory, gpt2_tokenizer_directory):
    path = tmp_path / "template.txt"
    path.write_text("{bos}Q: {instruction} {input}{eos}A: {response}{eos}\n")
    template = load_template(str(path))
    for directory in (tokenizer_directory, gpt2_tokenizer_directory):
        tokenizer = load_tokenizer(directory)
        prompt, completion = render(ROW, template, tokenizer)
        ids = tokenizer.encode(prompt + completion)
        eos = tokenizer.eos_token_id
        assert [index for index, token in enumerate(ids) if token == eos] == [0, ids.index(eos, 1), len(ids) - 1]
        assert tokenizer.decode(ids) == "Q: Add them. 1, 2A: 3"
    with pytest.raises(UserError, match="this tokenizer has no BOS token"):
        render(ROW, template, WITHOUT_BOS)


def test_json_template_has_both_forms(tmp_path):
    path = tmp_path / "template.json"
    path.write_text(
        json.dumps({"with_input": "{instruction}|{input}|{response}", "without_input": "{instruction}>{response}"})
    )
    assert joined(ROW, str(path)) == ("Add them.|1, 2|", "3")
    assert joined(BARE, str(path)) == ("Say hi.>", "hi")
    assert load_template(str(path)).marker == ">"


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("Q: {instruction} {input}\nA:{response}", "Q: Say hi.\nA:"),  # was "Say hi. \nA:"
        ("{input}\n\n{instruction}\n>{response}", "Say hi.\n>"),
        (TEMPLATES["dialogue"].with_input, "\n\nHuman: Say hi.\n\nAssistant:"),
        (TEMPLATES["none"].with_input, "Say hi."),
    ],
)
def test_a_text_file_leaves_no_blanks_where_a_row_has_no_input(tmp_path, text, prompt):
    path = tmp_path / "template.txt"
    path.write_text(text)
    for row in (BARE, {"instruction": "Say hi.", "output": "hi"}):
        assert joined(row, str(path))[0] == prompt
    assert "1, 2" in joined(ROW, str(path))[0] and load_template(str(path)).with_input == text


def test_plain_template_file_loses_its_last_line_end_only(tmp_path):
    path = tmp_path / "template.txt"
    path.write_bytes(b"{instruction}\r\n>\r\n{response}\n\r\n")
    assert joined(BARE, str(path)) == ("Say hi.\n>\n", "hi\n")


def test_an_input_is_never_dropped_without_an_error(tmp_path):
    path = tmp_path / "template.txt"
    path.write_text("{instruction}{response}")
    assert joined(BARE, str(path)) == ("Say hi.", "hi")
    with pytest.raises(UserError, match="--no-input-only"):
        joined(ROW, str(path))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("coarse", None, "no such file, expected one of course, alpaca, dialogue, none, or a file"),
        ("a.txt", "{instruction}", "expected {response} once, found it 0 times"),
        ("a.txt", "{instruction}{response}{response}", "found it 2 times"),
        ("a.txt", "{response}", "expected {instruction} and any {input} before {response}"),
        ("a.txt", "{response}{instruction}", "before {response}, not after it"),
        ("a.txt", "{instruction}{response}{input}", "before {response}, not after it"),
        ("a.txt", b"\xff\xfe{", "not UTF-8"),
        ("a.json", "{", "a.json:1:2: malformed JSON"),
        ("a.json", "[]", "expected a JSON object"),
        ("a.json", '{"with_input": "{instruction}{input}{response}"}', "two strings"),
        ("a.json", '{"with_input": 1, "without_input": 2}', "two strings"),
        (
            "a.json",
            '{"with_input": "{instruction}{response}", "without_input": "{instruction}: {response}"}',
            "has no {input}",
        ),
    ],
)
def test_bad_templates_end_in_one_line(tmp_path, name, content, expected):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        load_template(str(path))
    message = str(caught.value)
    assert expected in message and message.startswith(f"--template {path}") and "\n" not in message


def test_a_directory_is_not_a_template(tmp_path):
    with pytest.raises(UserError, match="a directory, expected one of"):
        load_template(str(tmp_path))


def test_copies_of_an_instruction_under_other_names_are_not_used():
    row = {"instruction": "Add.", "output": "3", "prompt": "rendered", "text": "rendered"}
    prompt, completion = render(row, TEMPLATES["course"], NAMES)
    assert "".join(prompt) == "### Instruction:\nAdd.\n\n### Response:\n" and completion == ["3"]
    row = {"instruction": "Add.", "prompt": "rendered", "completion": "3"}
    assert render(row, TEMPLATES["course"], NAMES) == (["rendered"], ["3"])


@pytest.mark.parametrize(
    "text",
    [
        "{instruction}{response}",  # one form, without {input}
        "{bos}Q: {instruction} {input}{eos}A: {response}{eos}",
        '{"with_input": "{instruction}|{input}|{response}\\n", "without_input": "{instruction}\u2028é>{response}"}',
        *TEMPLATES,
    ],
)
def test_a_saved_template_is_read_back_equal(tmp_path, text):
    source = tmp_path / ("t.json" if text.startswith('{"') else "t.txt")
    source.write_text(text, encoding="utf-8")
    template = TEMPLATES.get(text) or load_template(str(source))
    save_template(template, tmp_path)
    read = template_of(None, tmp_path, "none")
    assert (read.with_input, read.without_input) == (template.with_input, template.without_input)
    # The file is also one that --template takes.
    assert load_template(str(tmp_path / "template.json")) == read
    if "{input}" not in template.with_input:
        with pytest.raises(UserError, match="--no-input-only"):
            render_prompt(ROW, read, NAMES)


def test_a_template_that_is_too_long_for_any_row(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("x" * 10_000_000 + "{instruction}{response}")
    with pytest.raises(UserError, match="t.txt: 10,000,023 characters, expected a prompt format of at most 100,000"):
        load_template(str(path))


def test_a_model_s_template_is_the_default(tmp_path):
    assert template_of(None, tmp_path, "course") is TEMPLATES["course"]
    save_template(Template("gone.txt", "{input}>{instruction}{response}", "{instruction}{response}"), tmp_path)
    assert template_of(None, tmp_path, "course").with_input == "{input}>{instruction}{response}"
    assert template_of("none", tmp_path, "course") is TEMPLATES["none"]
    with pytest.raises(UserError, match="--judge-template gone.txt: no such file"):
        template_of("gone.txt", tmp_path, "course", "--judge-template")
    path = tmp_path / "template.json"
    for damaged in ("{", "{}", "3", '{"with_input": "", "without_input": ""}'):
        path.write_text(damaged)
        with pytest.raises(UserError, match=f"^{path}:"):
            template_of(None, tmp_path, "course")


def test_a_run_without_a_template_json_says_which_template_is_used(tmp_path, capsys):
    """As runs of earlier versions are."""
    (tmp_path / "run.json").write_text("{}")
    assert template_of(None, tmp_path, "dialogue", "--judge-template") is TEMPLATES["dialogue"]
    remark = capsys.readouterr().err
    assert remark.startswith(f"{tmp_path}: no template.json, so the template is dialogue: if it was ")
    assert remark.endswith(" --judge-template\n") and remark.count("\n") == 1
    template_of("dialogue", tmp_path, "course")
    save_template(TEMPLATES["none"], tmp_path)
    template_of(None, tmp_path, "course")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "marker", "cause"),
    [
        ("a\n### response:\nb", "### Response:\n", "upper and lower case: the row has '\\n### response:\\nb'"),
        ("a\n### Response: b", "### Response:\n", "spaces or line ends: the row has '\\n### Response: '"),
        ("a\n### Response:\r\nb", "### Response:\n", "spaces or line ends"),
        ("a\n###Response:\nb", "### Response:\n", "spaces or line ends"),
        ("a\n### response: b", "### Response:\n", "case and in spaces"),
        ("a\n### Response\nb", "### Response:\n", "punctuation: the row has"),
        ("a\n### Response:\nb", "### Response:\\n", "a backslash and a letter"),
        ("a\n### Reponse:\nb", "### Response:\n", "the nearest line is '### Reponse:'"),
        ("something else", "### Response:\n", "none of its lines is like"),
        ("", "### Response:\n", "none of its lines is like"),
        ("a", ">>>", "none of its lines is like"),
    ],
)
def test_likely_causes(text, marker, cause):
    found = likely_cause(text, marker)
    assert cause in found and "\n" not in found
