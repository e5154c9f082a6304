"""Files: read as text or as JSON lines with errors that name the line; written whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minift.errors import UserError


def read_text(path: str | os.PathLike[str], expected: str, encoding: str = "utf-8-sig") -> str:
    """A file's text. UserError, saying what was `expected`, where there is none to read, or it is not UTF-8.

    The default encoding drops a byte order mark.
    """
    try:
        data = Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file, expected {expected}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a directory, expected {expected}") from None
    except PermissionError:
        raise UserError(f"{path}: no permission to read it, expected {expected}") from None
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text (byte 0x{data[error.start]:02x}); convert it") from None


def read_json(path: str | os.PathLike[str], expected: str) -> dict[str, Any]:
    """The JSON object in a file. UserError as `read_text`, and for anything that is no JSON object."""
    try:
        value = json.loads(read_text(path, expected))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def json_lines(
    text: str, path: str | os.PathLike[str], expected: str = "one JSON object a line"
) -> Iterator[tuple[int, Any]]:
    """The values of a text with one JSON value a line, each with its line's number; blank lines are passed over.

    UserError, naming `path` and the line, for a line that is not one JSON value. NaN and Infinity are none.
    """
    # Not splitlines(): a string in JSON may hold U+2028 or U+0085 as it is.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line, parse_constant=_refuse_constant)
            except json.JSONDecodeError as error:
                what = f"malformed JSON: {error.msg}; expected {expected}"
                raise UserError(f"{path}:{number}:{error.colno}: {what}") from None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}: malformed JSON: {error}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


JSON_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def check_out(path: str | None, flag: str, source: str) -> None:
    """Refuse, before any work, an --out that can't become a file or is `source`, the file that `flag` names."""
    if path is None:
        return
    if Path(path).resolve() == Path(source).resolve():
        raise UserError(f"--out {path}: that is {flag} itself, expected another file")
    if Path(path).is_dir() or not Path(path).parent.is_dir():
        raise UserError(f"--out {path}: expected a file's name in a directory that exists")


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside `path`; what was written under it takes the place of `path` if the block ends well.

    A crash leaves what was there before. UserError where nothing can be written under that name.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        if path.is_dir():
            raise IsADirectoryError(21, "it is a directory")
        unfinished.touch()
        mode = unfinished.stat().st_mode
        yield unfinished
        unfinished.chmod(mode)  # safetensors' own is for the owner's eyes only
        flush(unfinished)
        os.replace(unfinished, path)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"{path}: can't be written: {error.strerror}") from None
    finally:
        if unfinished.is_file():
            unfinished.unlink()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 file, whole or not at all."""
    with written_whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def flush(path: Path) -> None:
    """Have the system put a file, or a folder's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
