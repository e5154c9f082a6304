"""What reaches the terminal: no control characters from files, and nothing that the terminal cannot encode."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from minift.commands import best_of, generate, preview, score, terminal, winrate
from minift.commands.cli import run_command
from minift.encode import encode_rows
from minift.files.pretrained import find_model, load_for_rm
from minift.files.text import wrap
from minift.files.tokenizer import save_tokenizer
from minift.files.weights import save_model
from minift.prompts import TEMPLATES
from minift.tokenizer import Tokenizer
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


# --------------------------------------------------------------------------------------------------------- long lines


@pytest.mark.parametrize(
    ("line", "wrapped"),
    [
        ("", ""),
        ("  ", "  "),
        ("one two", "one two"),
        ("one two three", "one two\nthree"),
        ("  one two  three ", "  one two\n  three "),
        ("onetwothreefour five", "onetwothreefour\nfive"),  # a word, a path or a command stays whole
        ("\x1b[32mone two x\x1b[0m y", "\x1b[32mone two x\x1b[0m\ny"),  # colours take no room
        ("    if a: return b", "    if a:\n    return\n    b"),
    ],
)
def test_a_line_is_broken_between_words(line: str, wrapped: str) -> None:
    assert wrap(line, 10) == wrapped


def test_only_a_terminal_gets_broken_lines(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    rows = [{"instruction": "Write a function that adds " + "many " * 20, "output": "word " * 30}]
    encoded = encode_rows(rows, tokenizer, TEMPLATES["course"], max_length=150, source="a file of rows")
    printed = []
    for is_terminal in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda is_terminal=is_terminal: is_terminal)
        terminal.print_summaries(encoded)
        terminal.show_labels(encoded.examples, tokenizer)
        terminal.print_text("prompt", rows[0]["instruction"])
        printed.append(re.sub("\x1b\\[\\d+m|[⟦⟧]", "", capsys.readouterr().out))
    plain, fitted = printed
    assert max(map(len, plain.splitlines())) > 100 and max(map(len, fitted.splitlines())) <= 40
    assert fitted.replace("green", "between  and ").split() == plain.split()


def test_columns_that_do_not_fit_follow_below(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    rows = [["pass rate", "before training", "after", "after 2"], ["all", "1.0%", "2.0%", "3.0%"]]
    terminal.print_columns(rows)
    assert capsys.readouterr().out.splitlines() == [
        "pass rate                         before training    after    after 2",
        "all                                          1.0%     2.0%       3.0%",
    ]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    terminal.print_columns(rows)
    assert capsys.readouterr().out.splitlines() == [
        "pass rate                         before training    after",
        "all                                          1.0%     2.0%",
        "pass rate                         after 2",
        "all                                  3.0%",
    ]
    monkeypatch.setenv("COLUMNS", "10")
    terminal.print_columns(rows)
    assert capsys.readouterr().out.count("\n") == 6


def test_the_next_command_has_paths_of_the_folder_that_the_run_started_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """`cd elsewhere; python …/train_rm.py` named files of the project as if they were elsewhere."""

    def words() -> dict[str, str]:
        terminal.print_best_of(Path("my runs/rm"), "tiny")
        python, *words = shlex.split(capsys.readouterr().out.splitlines()[-1])
        assert (python, words[:3], "--run-checks" in words) == ("/a b/python", ["-m", "minift", "best-of"], True)
        words.remove("--run-checks")
        return dict(zip(words[3::2], words[4::2], strict=True))

    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    monkeypatch.setattr(sys, "orig_argv", ["/a b/python", "train_rm.py"])
    monkeypatch.setattr("minift.commands.flags.PROJECT", project)
    judged = {"--judge": "my runs/rm", "--out": "my runs/best-of.jsonl"}
    for folder, start in ((project, ""), (elsewhere, f"{project}/")):
        folder.mkdir()
        monkeypatch.chdir(folder)
        expected = judged | {"--model": f"{start}runs/sft", "--prompts": f"{start}data/heldout.jsonl"}
        assert words() == expected
        Path("my runs/sft").mkdir(parents=True)
        assert words() == expected | {"--model": "my runs/sft"}
    terminal.print_best_of(Path("rm"), None)
    assert capsys.readouterr().out.endswith("--judge rm --prompts PROMPTS.jsonl --out best-of.jsonl\n")
