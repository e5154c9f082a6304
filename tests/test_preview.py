"""`minift preview`: supervised stretches are marked, and the file has what the loss gets."""

import io
import json
import re
import subprocess
import sys

import pytest

from minift.commands.preview import main
from minift.commands.terminal import mark, show_labels
from minift.encode import IGNORE_INDEX, Example, encode_rows
from minift.errors import UserError
from minift.files.templates import save_template
from minift.files.tokenizer import save_tokenizer
from minift.pairs import encode_rankings
from minift.prompts import TEMPLATES
from tests.runs import read_lines, write_lines

ROWS = [
    {"instruction": "Add.", "input": "1, 2", "output": "print('</s>')\n\x1b[2J\t😀"},
    {"instruction": "Long. " * 30, "input": "", "output": "x"},
    {"instruction": "Nothing.", "input": "", "output": ""},
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def data(tmp_path):
    return write_lines(tmp_path / "data.jsonl", ROWS)


@pytest.fixture
def examples(tokenizer):
    return encode_rows(ROWS, tokenizer, TEMPLATES["course"], max_length=None).examples


def test_plain_marks(tokenizer, examples):
    """Text that spells the end token looks different from the token; an escape in a row doesn't reach the terminal."""
    assert mark(examples[0], tokenizer, colour=False) == (
        "⟨</s>⟩### Instruction:↵\nAdd.↵\n↵\n### Input:↵\n1, 2↵\n↵\n### Response:↵\n⟦print('</s>')↵\n\\x1b[2J\t😀⟨</s>⟩⟧"
    )


def test_colours_mark_the_same_tokens(tokenizer):
    for example in encode_rows(ROWS, tokenizer, TEMPLATES["dialogue"], max_length=None).examples:
        coloured = mark(example, tokenizer, colour=True)
        as_plain = re.sub("\x1b\\[32m(.*?)\x1b\\[0m", r"⟦\1⟧", coloured, flags=re.DOTALL)
        as_plain = re.sub("\x1b\\[90m(.*?)\x1b\\[0m", r"\1", as_plain, flags=re.DOTALL)
        assert "\x1b" not in as_plain and as_plain == mark(example, tokenizer, colour=False)


def test_several_supervised_stretches(tokenizer):
    ids = tokenizer.encode("return a")
    labels = [token if index % 2 else IGNORE_INDEX for index, token in enumerate(ids)]
    assert mark(Example(ids, labels), tokenizer, colour=False).count("⟦") == len(ids) // 2


def test_colour_is_for_terminals_unless_no_color(tokenizer, examples, monkeypatch):
    for stream, no_color, coloured in ((Terminal(), "", True), (Terminal(), "1", False), (io.StringIO(), "", False)):
        monkeypatch.setenv("NO_COLOR", no_color)
        show_labels(examples, tokenizer, 2, stream)
        text = stream.getvalue()
        assert ("\x1b[32m" in text) == coloured and ("between ⟦ and ⟧" in text) != coloured
        assert "example 2 of 3: " in text and "example 3" not in text


def test_out_has_every_kept_row(tokenizer_directory, tokenizer, data, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    arguments = ["--model", str(tokenizer_directory), "--data", str(data), "--max-length", "100", "--rows", "1"]
    main([*arguments, "--out", str(out)])
    encoded = encode_rows(ROWS, tokenizer, TEMPLATES["course"], max_length=100)
    assert encoded.indices == [0, 2]
    assert [(line["row"], line["input_ids"], line["labels"]) for line in read_lines(out)] == [
        (number, *example) for number, example in zip(encoded.indices, encoded.examples, strict=True)
    ]
    shown = capsys.readouterr().out
    assert "example 1 of 2" in shown and "example 2" not in shown
    assert "2 of 3 rows kept" in shown and "first 100 tokens (line 2)" in shown and "(line 3)" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "out.jsonl"]


def test_flags_change_what_is_supervised(tokenizer_directory, tmp_path, capsys):
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"text": "Q: a\nA: b"}]))
    arguments = ["--model", str(tokenizer_directory), "--data", str(data)]
    main([*arguments, "--response-template", "A:"])
    assert "Q: a↵\nA:⟦ b⟨</s>⟩⟧" in capsys.readouterr().out
    main([*arguments, "--supervise", "all"])
    assert "⟨</s>⟩⟦Q: a↵\nA: b⟨</s>⟩⟧" in capsys.readouterr().out


def test_the_template_is_that_of_the_model_unless_named(tokenizer, data, tmp_path, capsys):
    save_tokenizer(tokenizer, tmp_path)
    save_template(TEMPLATES["dialogue"], tmp_path)
    for flags, prompt in (([], "Human: Nothing.↵\n"), (["--template", "course"], "### Instruction:↵\nNothing.↵\n")):
        main(["--model", str(tmp_path), "--data", str(data), *flags])
        assert prompt in capsys.readouterr().out


def test_pairs_and_rankings_are_what_a_reward_model_reads(tokenizer_directory, tokenizer, tmp_path, capsys):
    pairs = [
        {"prompt": "Add.", "chosen": "a + b", "rejected": "a - b"},
        {"instruction": "Long.", "input": "x " * 300, "chosen": "a", "rejected": "b"},
        {"messages": [], "prompt": "Go.", "chosen": "run", "rejected": "walk"},
    ]
    rankings = [{"prompt": "Go.", "responses": ["run", "walk", "stop"]}]
    for rows, noun, kept in ((pairs, "pair", 2), (rankings, "ranking", 1)):
        data, out = write_lines(tmp_path / "data.jsonl", rows), tmp_path / "out.jsonl"
        flags = ["--model", str(tokenizer_directory), "--data", str(data), "--out", str(out)]
        main([*flags, "--max-length", "100", "--rows", "1"])
        expected = encode_rankings(rows, tokenizer, TEMPLATES["dialogue"], max_length=100)
        lines = zip(expected.indices, expected.examples, strict=True)
        assert read_lines(out) == [{"row": row, "responses": ranking.responses} for row, ranking in lines]
        shown = capsys.readouterr().out
        assert f"{noun} 1 of {kept}: " in shown and f"{noun} 2" not in shown
        assert f"{kept} of {len(rows)} {noun}s kept" in shown
    assert "Human: Go.\n\nAssistant:\n" in shown
    main([*flags, "--template", "course"])
    assert "### Instruction:\nGo." in capsys.readouterr().out


def test_bad_input_ends_in_one_line(tokenizer, data, tmp_path):
    model = tmp_path / "model"
    save_tokenizer(tokenizer, model)
    out = tmp_path / "out.jsonl"
    good = {"--model": str(model), "--data": str(data), "--out": str(out)}
    for change, config, expected in (
        ({"--model": str(tmp_path)}, None, "no tokenizer here"),
        ({"--data": str(tmp_path)}, None, "a directory"),
        ({"--template": "coarse"}, None, "--template coarse: no such file, expected one of"),
        ({"--max-length": "0"}, None, "--max-length: '0': expected a whole number of at least 1"),
        ({"--max-length": "9" * 5000}, None, "expected a whole number of at least 1, of 9 digits at most"),
        ({"--rows": "-1"}, None, "--rows"),
        ({"--supervise": "some"}, None, "--supervise"),
        ({"--max": "5"}, None, "unrecognized arguments"),
        ({"--max-length": "3"}, None, "none of its 3 rows has a supervised token"),
        ({}, {"max_position_embeddings": 64}, "data.jsonl: line 2: "),
        (
            {},
            {"max_position_embeddings": 64},
            "tokens, more than the model's 64 positions; cut such rows with --max-len",
        ),
        (
            {"--max-length": "65"},
            {"max_position_embeddings": 64},
            "--max-length 65: more than the model's 64 positions",
        ),
        ({}, {"vocab_size": 100}, "doesn't fit"),
        ({}, {"vocab_size": "many"}, "config.json: vocab_size is 'many', expected a whole number"),
        ({}, {"model_type": "gpt2"}, "config.json: model_type is 'gpt2', expected 'opt'"),
        ({"--out": str(tmp_path / "nowhere" / "out.jsonl")}, None, "expected a file name in an existing directory"),
        ({"--out": str(data)}, None, "this is the file that --data names"),
    ):
        (model / "config.json").write_text(json.dumps(config or {}))
        with pytest.raises(UserError) as caught:
            main([word for pair in (good | change).items() for word in pair])
        assert expected in str(caught.value) and "\n" not in str(caught.value)
        assert not out.exists()


def test_as_a_command(tokenizer_directory, data, tmp_path):
    command = [sys.executable, "-m", "minift", "preview", "--model", str(tokenizer_directory), "--data"]
    done = subprocess.run([*command, str(data)], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 and done.stderr == "" and "⟦print('</s>')" in done.stdout
    done = subprocess.run([*command, str(tmp_path / "none.json")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path / 'none.json'}: no such file, expected a .json, .jsonl, .csv or")
