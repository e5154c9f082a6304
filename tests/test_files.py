"""Tests of files/text: errors name the line, writes are atomic; and of how commands end.

The commands' tests show the same for the files that they write.
"""

import hashlib
import json
import math
import os
import re
import stat

import pytest
from safetensors import SafetensorError

from minift.commands.cli import CommandParser, check_out, run_command
from minift.errors import UserError
from minift.files import text as text_files
from minift.files.adapters import save_adapters
from minift.files.datasets import load_rows
from minift.files.pretrained import find_model, load_for_sft, load_language_model
from minift.files.templates import load_template
from minift.files.text import (
    atomic_write,
    parse_json_lines,
    read_json,
    read_json_lines,
    read_text,
    sha256,
    to_json,
    write_json,
    write_json_lines,
    write_text,
)
from minift.files.tokenizer import save_tokenizer
from minift.files.weights import save_model
from minift.lora import add_lora
from tests.runs import SHIPPED


def test_a_failed_write_keeps_the_earlier_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "before\u2028\n")
    with pytest.raises(RuntimeError), atomic_write(path) as unfinished:
        unfinished.write_text("half")
        raise RuntimeError
    assert path.read_bytes() == "before\u2028\n".encode()
    with pytest.raises(TypeError):
        write_json_lines(path, iter([{"a": 1}, {"a": object()}]))
    assert path.read_bytes() == "before\u2028\n".encode()
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_git_lfs_pointer_is_named_wherever_a_file_is_opened(tmp_path):
    """Weights, their index, adapters, tokenizer, configs, templates and rows, in turn."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    model, tokenizer = load_for_sft(find_model(SHIPPED))
    save_model(model, tmp_path / "model")
    save_tokenizer(tokenizer, tmp_path / "model")
    add_lora(model, 2, 4.0, 0.0, ["q_proj"])
    save_adapters(model, tmp_path / "adapters", str(tmp_path / "model"))
    for name in ("pytorch_model.bin", "rows.jsonl", "rows.json", "rows.parquet", "format.txt", "format.json"):
        (tmp_path / name).write_bytes(pointer)
    for path in (
        *(tmp_path / "model").iterdir(),
        *(tmp_path / "adapters").iterdir(),
        *(tmp_path / "adapters" / name for name in ("adapter_model.bin", "template.json")),
        *(tmp_path / "model" / name for name in ("pytorch_model.bin", "model.safetensors.index.json")),
    ):
        kept = path.read_bytes() if path.exists() else None
        others = [*path.parent.glob("*model*")] if kept is None and path.name != "template.json" else []
        hidden = [other.rename(other.with_name("hidden")) for other in others]
        path.write_bytes(pointer)
        with pytest.raises(UserError, match=re.escape(f"{path}: a Git LFS pointer, ")):
            load_language_model(tmp_path / "adapters")
        path.unlink()
        for other, old in zip(hidden, others, strict=True):
            other.rename(old)
        if kept is not None:
            path.write_bytes(kept)
    load_language_model(tmp_path / "adapters")
    (tmp_path / "model" / "model.safetensors").write_bytes(pointer)
    (tmp_path / "model" / "config.json").write_text('{"vocab_size": 50272, "num_hidden_layers": 24}')
    with pytest.raises(UserError, match="model.safetensors: a Git LFS pointer, "):  # not "truncated"
        load_language_model(tmp_path / "adapters")
    for name in ("rows.jsonl", "rows.json", "rows.parquet"):
        with pytest.raises(UserError, match=f"{name}: a Git LFS pointer, not the file itself: run `git lfs pull`"):
            load_rows(tmp_path / name)
    for name in ("format.txt", "format.json"):
        with pytest.raises(UserError, match=f"{name}: a Git LFS pointer"):
            load_template(str(tmp_path / name))


def test_a_file_is_renamed_only_after_fsync(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(text_files.os, "fsync", lambda descriptor: (events.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(text_files.os, "replace", lambda *names: (events.append("replace"), replace(*names)))
    with atomic_write(tmp_path / "a") as unfinished:
        unfinished.write_text("text")
        unfinished.chmod(0o600)  # as safetensors leaves its files
        assert not (tmp_path / "a").exists()
    assert events == ["fsync", "replace"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~umask


def test_a_path_that_cannot_be_written(tmp_path):
    for path, message in ((tmp_path / "missing" / "a", "can't be written"), (tmp_path, "a directory")):
        with pytest.raises(UserError, match=f"{path}: {message}"):
            write_text(path, "text")
    assert list(tmp_path.iterdir()) == []


def test_text_is_utf8_with_or_without_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb")
    assert read_text(path, "text") == "a\r\nb"
    path.write_bytes(b"good\nb\xe4d")
    for wrong, message in (
        (path, f"{path}:2: not UTF-8 text"),
        (tmp_path, "a directory, expected text"),
        (tmp_path / "none", "no such file, expected text"),
        (path / "below", "no such file, expected text"),
    ):
        for read in (read_text, read_json, read_json_lines):
            with pytest.raises(UserError, match=message):
                read(wrong, "text")


def test_json_is_read_as_it_was_written(tmp_path):
    path, value = tmp_path / "a.json", {"a": [1, "\u2028ä"], "b": None}
    write_json(path, value)
    assert read_json(path, "a value") == value and path.read_text().startswith('{\n  "a"')
    write_json_lines(path, iter([value, {}]))
    assert list(read_json_lines(path)) == [(1, value), (2, {})]
    assert path.read_text() == json.dumps(value) + "\n{}\n"
    for text in ("", "{", "[]", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(UserError, match="a.json:.* expected a JSON object"):
            read_json(path, "a value")


def test_no_writer_writes_nan(tmp_path):
    row = {"a": math.nan, "b": [1, -math.inf], "c": {"d": math.inf}, "e": 0.1, "f": "NaN"}
    expected = {"a": None, "b": [1, None], "c": {"d": None}, "e": 0.1, "f": "NaN"}
    write_json_lines(tmp_path / "a.jsonl", [row, row])
    assert list(read_json_lines(tmp_path / "a.jsonl")) == [(1, expected), (2, expected)]
    write_json(tmp_path / "a.json", row)
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == expected
    assert to_json(row) == json.dumps(expected)


def test_json_lines_are_numbered_as_in_an_editor():
    assert list(parse_json_lines('{"a": "\u2028"}\n\n  [1]\n', "f")) == [(1, {"a": "\u2028"}), (3, [1])]
    for text, message in (
        ('1\n{"a": }\n', "f:2:7: malformed JSON: Expecting value; expected one JSON object a line"),
        ("1 2", "f:1:3: malformed JSON: Extra data"),
        ("1\nNaN", "f:2:1: malformed JSON: NaN is not a JSON value; expected one JSON object a line"),
        ("[" * 100_000, "f:1: malformed JSON: nested too deeply"),
    ):
        with pytest.raises(UserError, match=message):
            list(parse_json_lines(text, "f"))
    assert list(parse_json_lines('{"loss": -Infinity}', "f", allow_nan=True)) == [(1, {"loss": -math.inf})]


def test_sha256_is_that_of_all_bytes_in_turn(tmp_path):
    parts = [b"ab", b"c"]
    paths = [tmp_path / str(len(part)) for part in parts]
    for path, part in zip(paths, parts, strict=True):
        path.write_bytes(part)
    assert sha256(paths) == hashlib.sha256(b"abc").hexdigest()
    assert sha256(paths).startswith("ba7816bf")


def test_an_out_that_would_overwrite_the_input_is_refused(tmp_path):
    source = tmp_path / "rows.jsonl"
    check_out(None, "--data", str(source))
    check_out(str(tmp_path / "new"), "--data", str(source))
    for out, message in (
        (f"{tmp_path}/./rows.jsonl", "this is the file that --data names"),
        (str(tmp_path), "a directory, expected a regular file or a new name"),
        (f"{tmp_path}/missing/new", "expected a file name"),
    ):
        with pytest.raises(UserError, match=f"--out {out}: {message}"):
            check_out(out, "--data", str(source))


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
