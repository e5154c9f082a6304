"""Text, JSON and JSON lines: read with errors that name the line, written atomically."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minift.errors import UserError


def read_text(path: str | Path, expected: str, encoding: str = "utf-8-sig") -> str:
    """Return a file's text; raise UserError with `expected` if it can't be read. By default drop a byte order mark."""
    try:
        data = Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        problems = {IsADirectoryError: "a directory", PermissionError: "no permission to read it"}
        raise UserError(f"{path}: {problems.get(type(error), 'no such file')}, expected {expected}") from None
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text (byte 0x{data[error.start]:02x}); convert it") from None


def read_json(path: str | Path, expected: str) -> dict[str, Any]:
    """Return the JSON object in a file; raise UserError like `read_text`, and for anything else than an object."""
    value = parse_json(read_text(path, expected), path, "a JSON object", allow_nan=True)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def parse_json(text: str, path: str | Path, expected: str, *, line: int | None = None, allow_nan: bool = False) -> Any:
    """Parse the JSON value that is a whole file, or its line number `line`.

    Raises UserError with file, line and column for malformed JSON, and without `allow_nan` for Python's NaN, Infinity.
    """
    try:
        return json.loads(text, parse_constant=None if allow_nan else _refuse_constant)
    except json.JSONDecodeError as error:
        where, problem = f"{path}:{line or error.lineno}:{error.colno}", error.msg
    except (ValueError, RecursionError) as error:
        where, problem = f"{path}:{line}" if line else f"{path}", str(error)
    raise UserError(f"{where}: malformed JSON: {problem}; expected {expected}")


def parse_json_lines(
    text: str, path: str | Path, expected: str = "one JSON object a line", *, allow_nan: bool = False
) -> Iterator[tuple[int, Any]]:
    """Yield each line's number and JSON value, skipping blank lines; raise UserError like `parse_json`."""
    # Not splitlines(): a JSON string may contain a raw U+2028 or U+0085.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, parse_json(line, path, expected, line=number, allow_nan=allow_nan)


def read_json_lines(path: str | Path, expected: str = "one JSON object a line") -> Iterator[tuple[int, Any]]:
    """Read a file and yield each line's number and JSON value, as `parse_json_lines` does."""
    return parse_json_lines(read_text(path, expected), path, expected)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path; rename it to `path` on success, delete it otherwise.

    A crash leaves the earlier file. Raises UserError if `path` cannot be written.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode
        yield unfinished
        unfinished.chmod(mode)  # safetensors creates files that only their owner can read
        fsync(unfinished)
        unfinished.replace(path)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"{path}: can't be written: {error.strerror}") from None
    finally:
        if unfinished.is_file():
            unfinished.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file atomically."""
    with atomic_write(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, indented."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_json_lines(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    write_text(path, "".join(to_json_lines(rows)))


def to_json_lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield each row as one line of JSON."""
    for row in rows:
        yield json.dumps(row) + "\n"


def fsync(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(paths: Iterable[Path]) -> str:
    """Return the SHA-256 of the files' bytes, one file after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")
