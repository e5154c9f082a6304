"""`minift chat`, and `minift generate` with --prompt and standard input: through pipes and pseudo-terminals."""

import fcntl
import io
import json
import os
import shlex
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from minift.commands import chat, generate
from minift.commands import terminal as terminal_output
from minift.files import language_model
from minift.files.pretrained import load_judge
from minift.generate import Options
from minift.model import RewardModel
from tests.runs import ROOT, mistake, saved, user_error, write_lines

HINT = "Type an instruction, and its input after /input; an empty line ends both. Ctrl-D leaves.\n"
PROMPT = "### Instruction:\n{}\n\n### Response:\n"


@pytest.fixture
def asked(monkeypatch, tokenizer) -> list[str]:
    """Return the prompts that the model is asked so far; its samples are A, the prompt's last but one line, and C."""
    found: list[str] = []

    def answers(_, prompts, options, *__) -> list:
        found.extend(tokenizer.decode(ids) for ids in prompts)
        texts = [["A", text.split("\n")[-4], "C"][: options.num_samples] for text in found[-len(prompts) :]]
        return [[tokenizer.encode(text)[1:] for text in its] for its in texts]

    monkeypatch.setattr(language_model, "generate", answers)
    return found


def pipe(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


@pytest.fixture
def terminal(monkeypatch) -> Iterator[int]:
    """Let standard input be a terminal; return the end that types."""
    typing, typed = os.openpty()
    with os.fdopen(typed) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        yield typing
    os.close(typing)


def ask(model: Path, *flags: object) -> None:
    chat.main([*map(str, ["--model", model, "--max-new-tokens", 4, *flags])])


# ---------------------------------------------------------------------------------------------------------------- chat


@pytest.mark.parametrize(
    ("data", "instructions"),
    [
        ("One\n\nTwo,\nmore\n \t\n\n\nThree", ["One", "Two,\nmore", "Three"]),
        ("One\r\nmore\r\n\r\nTwo\r\n", ["One\nmore", "Two"]),
        ("  é [1]\n", ["  é [1]"]),
        ("\n\n", []),
        ("", []),
    ],
)
def test_an_empty_line_or_the_end_ends_an_instruction(data, instructions, model, asked, monkeypatch, capsys):
    pipe(monkeypatch, data.encode())
    ask(model)
    assert asked == [PROMPT.format(instruction) for instruction in instructions]
    assert capsys.readouterr() == ("A\n\n" * len(instructions), "")  # no hint in a pipe


@pytest.mark.parametrize(
    ("data", "row"),
    [
        ("Sort it.\n/input\na = 1\n  b\n", {"instruction": "Sort it.", "input": "a = 1\n  b"}),
        ("Sort\nit. \n /input  [3, 1]\n/input\n", {"instruction": "Sort\nit. ", "input": "[3, 1]\n/input"}),
        ("Sort it.\n/input \nb\n", {"instruction": "Sort it.", "input": "b"}),
        ("Sort it.\n/input\n", {"instruction": "Sort it."}),
        ("Explain `/input`.\n/inputs\n", {"instruction": "Explain `/input`.\n/inputs"}),
    ],
)
def test_what_follows_input_is_the_input(data, row, model, judge, asked, monkeypatch, capsys):
    pipe(monkeypatch, data.encode())
    ask(model, "--judge", judge)
    form = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n" if "input" in row else None
    assert asked == [form.format(**row) if form else PROMPT.format(row["instruction"])]
    assert capsys.readouterr().out == f"A\n── reward {load_judge(judge).score(row, 'A'):.2f}\n\n"


def test_an_input_without_an_instruction_is_named(model, asked, terminal, capsys):
    os.write(terminal, b"\n/input\n3\n\nAdd.\n\n\x04")
    ask(model)
    printed = capsys.readouterr()
    assert printed.err == f"{HINT}error: standard input: line 2: expected an instruction before /input\n\n"
    assert printed.out == "A\n\n"  # and it went on


def test_a_terminal_is_told_how_to_type(model, asked, terminal, capsys):
    os.write(terminal, b"One\nmore\n\n" + b"word " * 200 + b"\n\nTwo\n\n\x04")  # Ctrl-D
    ask(model)
    printed = capsys.readouterr()
    assert printed.out == "A\n\n" * 2 and asked == [PROMPT.format("One\nmore"), PROMPT.format("Two")]
    hint, error = printed.err.splitlines(keepends=True)[:2]
    assert hint == HINT and error.startswith("error: standard input: line 4: the prompt has ")  # and it went on


def test_the_judge_chooses_among_samples(model, judge, asked, monkeypatch, capsys):
    reader, chosen = load_judge(judge), set()
    for instruction, samples in (("B", 1), ("B", 3), ("a list of words", 3), ("def add", 3), ("Hi!", 3)):
        pipe(monkeypatch, instruction.encode())
        ask(model, "--judge", judge, "--samples", samples)
        texts = ["A", instruction, "C"][:samples]
        best = reader.best_of(instruction, texts)
        chosen.add(best)
        note = ", chosen of 3" if samples > 1 else ""
        reward = reader.score(instruction, texts[best])
        assert capsys.readouterr().out == f"{texts[best]}\n── reward {reward:.2f}{note}\n\n"
    assert len(chosen) > 1


def test_the_choice_is_the_judges_vote(model, judge, monkeypatch, capsys):
    monkeypatch.setattr(chat, "rewards_of", lambda *_: [[0.5, 0.0, 0.0]])
    monkeypatch.setattr(chat.LanguageModel, "complete", lambda *_: [[[], [], []]])
    texts = iter(["A", "B", "B"])
    monkeypatch.setattr(chat.LanguageModel, "text_of", lambda *_: next(texts))
    pipe(monkeypatch, b"Hi")
    ask(model, "--judge", judge, "--samples", 3)
    assert capsys.readouterr().out == "B\n── reward 0.00, chosen of 3\n\n"  # e^0 + e^0 > e^0.5


@pytest.mark.parametrize(
    ("flags", "temperature"),
    [([], 0), (["--samples", 3], 0.7), (["--temperature", 0.2], 0.2), (["--samples", 3, "--temperature", 1], 1.0)],
)
def test_several_samples_differ(flags, temperature):
    options = chat._options(chat._parser().parse_args([*map(str, ["--model", "m", "--judge", "j", *flags])]))
    assert options == Options(128, temperature=temperature, num_samples=3 if "--samples" in flags else 1)


@pytest.mark.parametrize(
    ("data", "flags", "message"),
    [
        (b"", ["--samples", 2], "--samples 2: a reward model chooses among them: name one with --judge"),
        (b"", ["--temperature", -1], "--temperature is -1.0, expected 0"),
        (b"", ["--judge", "j", "--samples", 2, "--temperature", 0], "--temperature 0.0: expected a number of at least"),
        (b"", ["--judge", "j", "--samples", 2, "--temperature", "nan"], "--temperature nan: expected a number"),
        (b"", ["--judge", "nowhere"], "nowhere"),
        (b"", ["--seed", -1], "--seed: '-1': expected a whole number"),
        (b"\n\n" + b"word " * 300, [], "standard input: line 3: the prompt has "),
        (b"/input 3", [], "standard input: line 1: expected an instruction before /input"),
        (b"a\n\xff\n", [], "standard input: line 1: lone surrogate U+DCFF at character"),
        (b"a", ["--max-new-tokens", 400], "standard input: line 1: the prompt has "),
    ],
    ids=str,
)
def test_a_wrong_chat_is_one_line(data, flags, message, model, monkeypatch, capsys):
    pipe(monkeypatch, data)
    assert message in mistake(chat.main, [*map(str, ["--model", model, *flags])], capsys)


def test_an_answer_that_is_too_long_for_the_judge(model, tmp_path, tokenizer, asked, monkeypatch, capsys):
    judge = saved(RewardModel, tmp_path / "judge", 0, tokenizer, max_position_embeddings=8)
    pipe(monkeypatch, b"B\n")
    assert "--judge: it can read none of the answers" in user_error(ask, model, "--judge", judge)


def test_a_closed_standard_input_has_no_instructions(model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    ask(model)
    assert capsys.readouterr().out == ""
    assert "standard input: no rows in it" in user_error(
        generate.main, ["--model", str(model), "--prompts", "-", "--max-new-tokens", "2"]
    )


def test_ctrl_c_ends_a_chat(model):
    typing, typed = os.openpty()

    def own_the_terminal() -> None:
        os.setsid()
        fcntl.ioctl(typed, termios.TIOCSCTTY, 0)

    words = [sys.executable, "-m", "minift", "chat", "--model", str(model), "--max-new-tokens", "4"]
    process = subprocess.Popen(
        words, cwd=ROOT, stdin=typed, stdout=typed, stderr=typed, preexec_fn=own_the_terminal,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    os.close(typed)
    printed = b""
    while HINT.strip().encode() not in printed:
        printed += os.read(typing, 1000)
    os.write(typing, b"unfinished\n\x03")
    assert process.wait(timeout=300) == 130
    while not printed.endswith(b"interrupted\r\n"):
        printed += os.read(typing, 1000)
    assert b"Traceback" not in printed
    os.close(typing)


def test_the_next_command_is_quoted(monkeypatch, capsys):
    monkeypatch.setattr(sys, "orig_argv", ["/a b/python", "train_sft.py"])
    terminal_output.print_chat(Path("runs/it's mine"))
    command = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(command) == ["/a b/python", "-m", "minift", "chat", "--model", "runs/it's mine"]


# ------------------------------------------------------------------------------------------------------------ generate


def complete(model: Path, *flags: object) -> None:
    generate.main([*map(str, ["--model", model, "--max-new-tokens", 4, *flags])])


def test_prompts_of_the_command_line(model, asked, tokenizer, capsys):
    complete(model, "--prompt", "One", "--prompt", "Two", "--input", "x")
    with_input = "### Instruction:\n{}\n\n### Input:\nx\n\n### Response:\n"
    assert asked == [with_input.format("One"), with_input.format("Two")]
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    ids = tokenizer.encode("A")[1:]
    added = {"input": "x", "completion": "A", "token_ids": ids}
    assert lines == [{"instruction": "One", **added}, {"instruction": "Two", **added}]


def test_prompts_of_standard_input(model, asked, monkeypatch, tmp_path, capsys):
    rows = [{"prompt": "a\n\n\n\nb"}, {"instruction": "One", "id": 1}]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    complete(model, "--prompts", path)
    expected = capsys.readouterr().out
    for data in (path.read_bytes(), json.dumps(rows, indent=1).encode()):
        pipe(monkeypatch, data)
        complete(model, "--prompts", "-")
        assert capsys.readouterr().out == expected and expected.count("\n") == 2
    assert len(asked) == 6
    for flags in (["--prompts", path], ["--prompts", "-"]):
        pipe(monkeypatch, path.read_bytes())
        complete(model, *flags, "--limit", 1)
        assert capsys.readouterr().out == expected.splitlines(keepends=True)[0]
    assert len(asked) == 8


@pytest.mark.parametrize("flags", [["--prompt", "B"], ["--prompts", "-"]])
def test_a_terminal_shows_only_the_text(flags, model, asked, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    pipe(monkeypatch, b'{"instruction": "B"}\n')
    complete(model, *flags)
    assert capsys.readouterr().out == "A\n"
    complete(
        model,
        *flags[:1],
        *(["C"] if flags[0] == "--prompt" else [write_lines(tmp_path / "r.jsonl", [{"instruction": "C"}])]),
        "--num-samples",
        2,
    )
    title = "'C'" if flags[0] == "--prompt" else "line 1"
    assert capsys.readouterr().out == f"── {title}, sample 0\nA\n\n── {title}, sample 1\nC\n\n"
    out = tmp_path / "out.jsonl"
    complete(model, "--prompt", "B", "--out", out)
    assert capsys.readouterr().out == "" and json.loads(out.read_text())["completion"] == "A"


@pytest.mark.parametrize(
    ("data", "flags", "message"),
    [
        (b"", [], "one of the arguments --prompts --prompt is required"),
        (b"", ["--prompt", "a", "--prompts", "b"], "--prompts: not allowed with argument --prompt"),
        (b"", ["--prompts", "-", "--input", "a"], "--input: it belongs to --prompt"),
        (b"", ["--prompts", "-"], "standard input: no rows in it"),
        (b'{"instruction": "a"}\n{', ["--prompts", "-"], "standard input:2:2: malformed JSON"),
        (b"\n{}", ["--prompts", "-"], "standard input:2: no field of a row in it"),
        (b"\xff", ["--prompts", "-"], "standard input:1: not UTF-8 text"),
        (b"", ["--prompt", "a\udcff"], "--prompt: 'a\\udcff': field 'instruction' has a lone surrogate"),
        (
            b"",
            ["--prompt", "fine", "--prompt", "word " * 300],
            "--prompt: 'word word word word word word word word ': the",
        ),
    ],
    ids=str,
)
def test_wrong_prompts_are_named(data, flags, message, model, monkeypatch, capsys):
    pipe(monkeypatch, data)
    assert message in mistake(generate.main, [*map(str, ["--model", model, "--max-new-tokens", 4, *flags])], capsys)
