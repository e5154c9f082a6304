"""`minift COMMAND` and `python -m minift COMMAND`: the list of commands, unknown names, Ctrl-C during imports."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from minift import __main__ as command_line
from tests.runs import ROOT


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["minift", *arguments])
    try:
        command_line.main()
    except SystemExit as exit:
        return exit.code or 0
    return 0


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_lists_the_commands(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run(monkeypatch, *arguments) == 0
    listed = capsys.readouterr().out
    for command, (_, description) in command_line.COMMANDS.items():
        assert f"  {command} " in listed and description in listed


@pytest.mark.parametrize("command", command_line.COMMANDS)
def test_every_command_has_a_help_text(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run(monkeypatch, command, "--help") == 0
    assert f"usage: minift {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", [name for name in command_line.COMMANDS if name not in ("tour", "report")])
def test_help_has_groups_and_three_examples_that_are_command_lines(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run(monkeypatch, command, "--help") == 0
    text, examples = capsys.readouterr().out.split("\nexamples:\n")
    assert len(re.findall(r"^[a-z, ]+:$", text, re.MULTILINE)) >= 3
    parser = importlib.import_module(command_line.COMMANDS[command][0])._parser()
    lines = examples.splitlines()
    assert len(lines) == 3
    for line in lines:
        minift, name, *words = shlex.split(line)
        assert (minift, name) == ("minift", command) and parser.parse_args(words) and len(line) <= 110


def test_an_unknown_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert run(monkeypatch, "genrate") == 2
    assert capsys.readouterr().err == (
        "error: genrate: not a command, did you mean generate? (`minift` lists the commands)\n"
    )
    assert run(monkeypatch, "xyz") == 2
    assert "expected one of tour, chat, generate" in capsys.readouterr().err


def test_a_message_names_flags_as_they_are_typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run(monkeypatch, "generate", "--model", "x", "--prompts", "y", "--min-new-tokens", "129") == 2
    assert capsys.readouterr().err == "error: --min-new-tokens is 129, expected 0 to --max-new-tokens\n"


def test_ctrl_c_during_an_import_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def interrupt(module: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", interrupt)
    assert run(monkeypatch, "score") == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_runs_as_a_module() -> None:
    result = subprocess.run([sys.executable, "-m", "minift", "bleu"], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1


@pytest.mark.parametrize("flag", [["-m", "minift.generate"], ["-mminift.bleu"], ["-m", "minift.files.hub"]])
def test_a_module_is_not_a_command(flag: list[str]) -> None:
    """The old form of a command would do nothing, with status 0."""
    result = subprocess.run([sys.executable, *flag, "--prompts", "x"], capture_output=True, text=True)
    name = flag[-1].removeprefix("-m")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: {name} is not a command: `python -m minift` lists them\n"


@pytest.mark.parametrize("flag", [["-m", "minift"], ["-m", "minift.__main__"]])
def test_arguments_may_look_like_a_module(flag: list[str]) -> None:
    result = subprocess.run([sys.executable, *flag, "minift.generate"], capture_output=True, text=True)
    assert result.returncode == 2 and "minift.generate: not a command, did you mean" in result.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("arguments", "unread"),
    [
        (["sft", "LR=1e-4"], "LR"),
        (["rm", "data=x.jsonl"], "data"),
        (["sft", "ONLY=bleu"], "ONLY"),
        (["bench", "MODEL=x"], "MODEL"),
        (["LR=1e-4"], "LR"),
        (["sft", "RECIPE=course", "MODEL=x", "DATA=y", "ARGS=--lr 1e-4 --a=b", "PYTHON=python3"], None),
        (["compare", "ONLY=bleu", "ARGS=--faults"], None),
        (["bench", "DATA=x", "PAIRS=y", "TOKENIZER=z", "ARGS=--shape 125m"], None),
        (["compare", "PAIRS=y"], "PAIRS"),
        (["tour", "ARGS=--stop 5"], None),
        (["tour", "STOP=5"], "STOP"),
        (["test"], None),
    ],
)
def test_make_refuses_a_variable_that_it_would_ignore(arguments, unread):
    # As from a shell: `make test` would hand its own variables down to this make.
    shell = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, env=shell)
    if unread is None:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 2 and not done.stdout
        assert f" {unread}: not read by make " in done.stderr and done.stderr.count("\n") == 1
