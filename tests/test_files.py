"""Reading names the line; writing is whole or not at all. The commands' own tests show the same for their files."""

import os
import stat

import pytest
from safetensors import SafetensorError

from minift import files
from minift.errors import CommandParser, UserError, run_command
from minift.files import check_out, json_lines, read_text, write_text, written_whole


def test_a_block_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "before\u2028\n")
    with pytest.raises(RuntimeError), written_whole(path) as unfinished:
        unfinished.write_text("half")
        raise RuntimeError
    assert path.read_bytes() == "before\u2028\n".encode()
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_the_name_appears_only_when_all_is_on_the_disk(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: (events.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(files.os, "replace", lambda *names: (events.append("replace"), replace(*names)))
    with written_whole(tmp_path / "a") as unfinished:
        unfinished.write_text("text")
        unfinished.chmod(0o600)  # as safetensors leaves its files
        assert not (tmp_path / "a").exists()
    assert events == ["fsync", "replace"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~umask


def test_an_out_that_would_lose_something_is_refused_before_the_work(tmp_path):
    source = tmp_path / "rows.jsonl"
    check_out(None, "--data", str(source))
    check_out(str(tmp_path / "new"), "--data", str(source))
    for out, message in (
        (f"{tmp_path}/./rows.jsonl", "that is --data itself"),
        (str(tmp_path), "expected a file's name"),
        (f"{tmp_path}/missing/new", "expected a file's name"),
    ):
        with pytest.raises(UserError, match=f"--out {out}: {message}"):
            check_out(out, "--data", str(source))


def test_where_nothing_can_be_written(tmp_path):
    for path in (tmp_path / "missing" / "a", tmp_path):
        with pytest.raises(UserError, match=f"{path}: can't be written"):
            write_text(path, "text")
    assert list(tmp_path.iterdir()) == []


def test_text_is_utf8_with_or_without_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb")
    assert read_text(path, "text") == "a\r\nb"
    path.write_bytes(b"good\nb\xe4d")
    for where, message in (
        (path, f"{path}:2: not UTF-8 text"),
        (tmp_path, "a directory, expected text"),
        (tmp_path / "none", "no such file, expected text"),
        (path / "below", "no such file, expected text"),
    ):
        with pytest.raises(UserError, match=message):
            read_text(where, "text")


def test_json_lines_are_counted_as_an_editor_counts_them():
    assert list(json_lines('{"a": "\u2028"}\n\n  [1]\n', "f")) == [(1, {"a": "\u2028"}), (3, [1])]
    for text, message in (
        ('1\n{"a": }\n', "f:2:7: malformed JSON: Expecting value; expected one JSON object a line"),
        ("1 2", "f:1:3: malformed JSON: Extra data"),
        ("NaN", "f:1: malformed JSON: NaN is no JSON value"),
        ("[" * 100_000, "f:1: malformed JSON"),
    ):
        with pytest.raises(UserError, match=message):
            list(json_lines(text, "f"))


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("--lr 0:\nexpected more"), 2, "error: --lr 0: expected more\n"),
        (OSError(28, "No space left on device"), 1, "error: the machine failed: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, None),
        (SafetensorError("I/O error: File too large"), 1, "error: the machine failed: I/O error: File too large\n"),
        (None, 2, "error: unrecognized arguments: --n 1 (see prog --help)\n"),
    ],
)
def test_commands_end_with_one_line_and_a_status(capsys, error, status, line):
    def main():
        if error is None:
            parser = CommandParser("prog")
            parser.add_argument("--name")
            parser.parse_args(["--n", "1"])
        raise error

    with pytest.raises(SystemExit) as ending:
        run_command(main)
    printed = capsys.readouterr().err
    assert ending.value.code == status and printed.count("\n") == 1
    assert line is None or printed == line


def test_a_bug_keeps_its_traceback():
    def main():
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError):
        run_command(main)
