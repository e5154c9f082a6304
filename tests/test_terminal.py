"""What reaches the terminal: no control characters from files, and nothing that the terminal cannot encode."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minift.commands import best_of, generate, preview, score, terminal, winrate
from minift.commands.cli import run_command
from minift.files.pretrained import find_model, load_for_rm
from minift.files.tokenizer import save_tokenizer
from minift.files.weights import save_model
from tests.runs import ROOT, SHIPPED, run, write_lines

NASTY = "é\x1b[2J\x1b[31m\x1b]0;title\x07\x08\r\x7f\x9b1m\u202e😀"
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]")
PAIR = {"prompt": f"Ask {NASTY}", "chosen": f"a {NASTY}", "rejected": f"b {NASTY}", "kind": f"k{NASTY}"}
INSTRUCTION = {"instruction": f"Ask {NASTY}", "input": "", "output": f"a {NASTY}", "kind": f"k{NASTY}"}
FLAGS = ["--model", SHIPPED, "--device", "cpu", "--max-steps", 1, "--batch-size", 2, "--max-length", 200]


def rows_file(folder: Path, row: dict, count: int = 3) -> Path:
    """Return a file whose name is as nasty as its rows."""
    return write_lines(folder / f"rows{NASTY}.jsonl", [row] * count)


def run_of(script: str, folder: Path) -> list[object]:
    data = rows_file(folder, INSTRUCTION if script == "sft" else PAIR)
    template = ["--response-template", NASTY] if script == "sft" else []
    return [*FLAGS, "--data", data, "--eval-data", data, "--out", folder / f"run{NASTY}", *template]


@pytest.mark.parametrize("script", ["sft", "rm"])
def test_a_script_prints_no_control_characters(script: str, tmp_path: Path) -> None:
    printed = run(script, *run_of(script, tmp_path))
    assert not CONTROL.search(printed)
    assert printed.count("\\x1b[2J") > 10 and "results" not in printed
    assert not re.search(r"\n\n  \d+(%| prompts)", printed)  # an indented line belongs to the line above it


def test_commands_print_no_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    judge = tmp_path / "judge"
    model, tokenizer = load_for_rm(find_model(SHIPPED), seed=1)
    save_model(model, judge)
    save_tokenizer(tokenizer, judge)
    pairs = rows_file(tmp_path, PAIR).rename(tmp_path / f"pairs{NASTY}.jsonl")
    prompts = write_lines(tmp_path / "p.jsonl", [{"instruction": NASTY}])
    folder = tmp_path / f"model{NASTY}"
    folder.symlink_to(SHIPPED)
    short = ["--prompts", prompts, "--max-new-tokens", 1, "--device", "cpu"]
    for command, flags in (
        (score, ["--model", judge, "--data", pairs, "--device", "cpu"]),
        (preview, ["--model", folder, "--data", rows_file(tmp_path, INSTRUCTION)]),
        (generate, ["--model", folder, *short]),
        (winrate, ["--model-a", folder, "--model-b", folder, "--judge", judge, *short]),
        (best_of, ["--model", folder, "--judge", judge, *short, "--samples", 2]),
    ):
        command.main([*map(str, flags)])
        printed = capsys.readouterr()
        assert printed.out and not CONTROL.search(printed.out)
        assert not CONTROL.search(re.sub("\r|\x1b\\[A", "", printed.err))  # those of progress bars
        if command is generate:
            assert json.loads(printed.out)["instruction"] == NASTY


def test_an_error_prints_no_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments in (
        ["--model", SHIPPED, "--data", tmp_path / f"{NASTY}.jsonl"],
        ["--model", SHIPPED, "--data", rows_file(tmp_path, {"text": NASTY}), "--template", NASTY],
        [NASTY],
    ):
        with pytest.raises(SystemExit):
            run_command(lambda: preview.main([*map(str, arguments)]))  # noqa: B023
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and not CONTROL.search(message)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "C"])
def test_output_that_is_not_utf8(encoding: str, tmp_path: Path) -> None:
    """Both streams of a process: `C` is the locale without UTF-8 mode, which also decides how file names are read."""
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    if encoding == "C":
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONIOENCODING"}
        environment |= {"LC_ALL": "C", "PYTHONUTF8": "0"}

    def execute(*command: object) -> subprocess.CompletedProcess:
        words = [sys.executable, *map(str, command)]
        return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, timeout=300)

    data = rows_file(tmp_path, INSTRUCTION)
    model = tmp_path / "é"  # the tokenizers library cannot open it in the C locale
    model.symlink_to(SHIPPED)
    good = execute("-m", "minift", "preview", "--model", model, "--data", data)
    assert (good.returncode, good.stderr) == (0, b"") and b"\\u27e6" in good.stdout
    bad = execute("-m", "minift", "preview", "--model", SHIPPED, "--data", tmp_path / "né😀.jsonl")
    assert bad.returncode == 2 and bad.stderr.count(b"\n") == 1 and b"no such file" in bad.stderr
    for script in {"ascii": ["rm"], "C": ["sft"]}.get(encoding, []):
        done = execute(f"train_{script}.py", *run_of(script, tmp_path))
        assert done.returncode == 0, done.stderr[-2000:]
        assert b"files in" in done.stdout
    if encoding == "ascii":
        assert execute("train_rm.py", "--help").returncode == 0  # it has a ²


@pytest.mark.skipif(os.name != "posix", reason="needs sh")
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_process_whose_streams_are_closed(closed: str, tmp_path: Path) -> None:
    """Python has None in place of a closed stream."""
    out = tmp_path / "labels.jsonl"
    data = rows_file(tmp_path, INSTRUCTION)
    words = [sys.executable, "-m", "minift", "preview", "--model", SHIPPED, "--data", data, "--out", out]
    shell = ["sh", "-c", f'"$@" {closed}', "sh"]
    done = subprocess.run([*shell, *map(str, words)], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"") and len(out.read_text().splitlines()) == 3
    bar = "from minift.commands.cli import run_command; from minift.progress import progress_bar; "
    bar += "run_command(lambda: progress_bar(1, 'a', 'b').close())"
    done = subprocess.run(
        ["sh", "-c", f'"$@" {closed}', "sh", sys.executable, "-c", bar], cwd=ROOT, capture_output=True
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr


def test_a_line_that_is_repeated_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_text("before", "a\n" + "#\n" * 40 + "b\nb\nb\n\n\n\n\nc")
    assert capsys.readouterr().out == "\n── before\na\n#\n… (40 such lines)\nb\nb\nb\n\n\n\n\nc\n"
