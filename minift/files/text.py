"""Text, JSON and JSON lines: read with errors that name the line, written atomically, printed without control codes."""

import errno
import gzip
import hashlib
import json
import math
import os
import re
import shutil
import stat
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

from minift.errors import UserError

NOT_BLANK = re.compile(r"[^ \t\n\r]")  # JSON's blanks, fewer than Python's
GZIP = b"\x1f\x8b"  # the first bytes of every such file, and of no UTF-8 text
STDIN = "standard input"  # in messages
STREAM = re.compile(r"/+dev/(stdin|stdout|stderr|fd/\d+)|/proc/(self|\d+)/fd/\d+")
COLOUR = re.compile("\x1b\\[\\d+m")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
MACHINE_ERRORS = {errno.EIO, errno.ENOSPC, errno.EDQUOT}  # OSErrors that no other name or flag avoids
FILE_TYPES = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}


def printable(text: str) -> str:
    """Escape control characters, and others that do not print: text from a file must not move the cursor."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def say(text: str, stream: TextIO | None = None, *, is_escaped: bool = False, wraps: bool = False) -> None:
    """Print text, escaped unless it already is, by default to standard output. All of minift prints by this function.

    With `wraps`, lines that are too long for a terminal are broken between words; in a file or pipe they stay.
    """
    stream = stream or sys.stdout
    text = text if is_escaped else printable(text)
    if wraps and stream is not None and stream.isatty():
        columns = shutil.get_terminal_size().columns
        text = "\n".join(wrap(line, columns) for line in text.split("\n"))
    print(text, file=stream, flush=True)


def wrap(line: str, columns: int) -> str:
    r"""Break a line between words, at most `columns` characters apart and with its own indentation. Colours take none.

    >>> wrap("  one two three", 10)
    '  one two\n  three'
    """
    words = re.findall(r"\s*\S+", line)
    indent = re.match(r"\s*", line)[0] if words else ""  # type: ignore[index]
    lines = [""]
    for word in words:
        if lines[-1] and len(COLOUR.sub("", lines[-1] + word)) > columns:
            lines.append(indent + word.lstrip())
        else:
            lines[-1] += word
    return "\n".join(lines) + line[sum(map(len, words)) :]


def read_bytes(path: str | Path, length: int = -1) -> bytes:
    """Return a file's first `length` bytes, by default all; raise UserError if it is a Git LFS pointer."""
    with Path(path).open("rb") as file:
        data = file.read(length)
    if data.startswith(LFS_POINTER):
        raise UserError(f"{path}: a Git LFS pointer, not the file itself: run `git lfs pull` where it was cloned")
    return data


def check_not_pointer(path: str | Path) -> None:
    """Raise UserError for the small text that Git LFS leaves where a large file belongs."""
    read_bytes(path, len(LFS_POINTER))


def read_text(path: str | Path, expected: str, encoding: str = "utf-8-sig") -> str:
    """Return a file's text, decompressed if it is gzip; UserError with `expected` if it can't be read."""
    with _readable(path, expected):
        data = read_bytes(path)
    return _decode(data, path, expected, encoding)


def read_lines(path: Path, expected: str, newline: str, on_read: Callable[[int], object]) -> Iterator[str]:
    """Yield a file's lines with their ends, decompressed if it is gzip: `read_text` for a file of any size.

    `newline` is that of `open`; `on_read` is called with the numbers of bytes read. Raises UserError like `read_text`,
    at the line with the problem.
    """
    with _readable(path, expected):
        check_not_pointer(path)
        file = path.open("rb")
    with file:
        data: Any = gzip.GzipFile(fileobj=file) if file.peek(len(GZIP)).startswith(GZIP) else file
        text, done = TextIOWrapper(data, "utf-8-sig", newline=newline), 0
        try:
            for line in text:
                on_read(file.tell() - done)
                done = file.tell()
                yield line
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise _damaged_gzip(path, error, expected) from None
        except UnicodeDecodeError:  # without the line's number
            data.seek(0)
            for number, raw in enumerate(data, start=1):
                try:
                    raw.decode()
                except UnicodeDecodeError as error:
                    raise _not_utf_8(path, number, raw[error.start]) from None


@contextmanager
def _readable(path: str | Path, expected: str) -> Iterator[None]:
    """Translate the errors of opening a file into UserError."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        problems = {IsADirectoryError: "a directory", PermissionError: "no permission to read it"}
        raise UserError(f"{path}: {problems.get(type(error), 'no such file')}, expected {expected}") from None


@contextmanager
def name_errors(subject: str, expected: str) -> Iterator[None]:
    """Translate an OSError into a UserError about `subject`, unless the machine is at fault."""
    try:
        yield
    except OSError as error:
        if error.errno in MACHINE_ERRORS:
            raise
        raise UserError(f"{subject}: {error.strerror}, {expected}") from None


def read_stdin(expected: str) -> str:
    """Return all of standard input as text; raise UserError like `read_text`."""
    return _decode(sys.stdin.buffer.read() if sys.stdin else b"", STDIN, expected)


def _decode(data: bytes, path: str | Path, expected: str, encoding: str = "utf-8-sig") -> str:
    try:
        data = gzip.decompress(data) if data.startswith(GZIP) else data
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged_gzip(path, error, expected) from None
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise _not_utf_8(path, data.count(b"\n", 0, error.start) + 1, data[error.start]) from None


def _damaged_gzip(path: str | Path, error: Exception, expected: str) -> UserError:
    return UserError(f"{path}: truncated or damaged gzip ({error}), expected {expected}")


def _not_utf_8(path: str | Path, line: int, byte: int) -> UserError:
    return UserError(f"{path}:{line}: not UTF-8 text (byte 0x{byte:02x}); convert it")


def read_json(path: str | Path, expected: str) -> dict[str, Any]:
    """Return the JSON object in a file; raise UserError like `read_text`, and for anything else than an object."""
    value = parse_json(read_text(path, expected), path, "a JSON object", allow_nan=True)
    if not isinstance(value, dict):
        names = {list: "an array", str: "a string", bool: "true or false", type(None): "null"}
        raise UserError(f"{path}: expected a JSON object, found {names.get(type(value), 'a number')}")
    return value


def parse_json(
    text: str,
    path: str | Path,
    expected: str,
    *,
    line: int | None = None,
    several: bool = False,
    allow_nan: bool = False,
    object_hook: Callable[[dict[str, Any]], Any] | None = None,
) -> Any:
    """Parse the JSON value that is a whole file, or its line number `line`; with `several`, a list of all values in it.

    Raises UserError with file, line and column for malformed JSON, and without `allow_nan` for numbers that are not
    finite: Python's NaN and Infinity, and 1e999.
    """

    def finite(number: str) -> float:
        if math.isfinite(value := float(number)):
            return value
        problem = f"{number} is not a JSON value" if number[-1].isalpha() else f"{number} is too large a number"
        # The first one outside a string: the parser reads from left to right.
        found = re.finditer(rf'"(?:[^"\\]+|\\.)*"|({re.escape(number)})', text)
        raise json.JSONDecodeError(problem, text, next(match.start() for match in found if match[1]))

    number = None if allow_nan else finite
    decoder = json.JSONDecoder(object_hook=object_hook, parse_constant=number, parse_float=number)
    try:
        if not several:
            return decoder.decode(text)
        values, end = [], 0
        while start := NOT_BLANK.search(text, end):
            value, end = decoder.raw_decode(text, start.start())
            values.append(value)
        return values
    except json.JSONDecodeError as error:
        where, problem = f"{path}:{line or error.lineno}:{error.colno}", error.msg
    except (ValueError, RecursionError) as error:  # Python reads no more digits than sys.get_int_max_str_digits()
        where = f"{path}:{line}" if line else f"{path}"
        problem = "a number has too many digits" if isinstance(error, ValueError) else "nested too deeply"
    raise UserError(f"{where}: malformed JSON: {problem}; expected {expected}")


def parse_json_lines(
    text: str | Iterable[str], path: str | Path, expected: str = "one JSON object a line", **settings: Any
) -> Iterator[tuple[int, Any]]:
    """Yield the number and JSON value of each line of a text, or of lines; skip blank ones.

    Raises UserError like `parse_json`.
    """
    # Not splitlines(): a JSON string may contain a raw U+2028 or U+0085.
    for number, line in enumerate(text.split("\n") if isinstance(text, str) else text, start=1):
        if line.strip():
            yield number, parse_json(line.removesuffix("\n"), path, expected, line=number, **settings)


def read_json_lines(path: str | Path, expected: str = "one JSON object a line") -> Iterator[tuple[int, Any]]:
    """Read a file and yield each line's number and JSON value, as `parse_json_lines` does."""
    return parse_json_lines(read_text(path, expected), path, expected)


def target_of(path: str | Path) -> Path:
    """Return the file that writing to `path` creates or replaces: `path`, or what it links to.

    Raises UserError if that is not a regular file, because a rename would destroy it, or if it cannot be written.
    """
    if STREAM.fullmatch(os.path.abspath(path)):  # noqa: PTH100  (resolve() would follow the link)
        raise UserError(f"{path}: an open stream, expected a file's name")
    try:
        mode = Path(path).stat().st_mode
    except FileNotFoundError:
        return Path(os.path.realpath(path))
    except OSError as error:
        raise UserError(f"{path}: can't be written: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        found = FILE_TYPES.get(stat.S_IFMT(mode), "a device")
        raise UserError(f"{path}: {found}, expected a regular file or a new name")
    if not os.access(path, os.W_OK):
        raise UserError(f"{path}: no permission to write it, expected another name")
    return Path(os.path.realpath(path))


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path; rename it to `path` on success, delete it otherwise. A crash leaves the earlier file.

    A link stays, and the file that it leads to is replaced; a file's mode stays too. Of a hard link, only this name
    gets the new content. Raises UserError like `target_of`, and if nothing can be written.
    """
    target = target_of(path)
    unfinished = target.with_name(f".{target.name}.unfinished")
    try:
        unfinished.unlink(missing_ok=True)  # a killed process may have left it; it must not be a link
        unfinished.touch(exist_ok=False)
        mode = (target if target.exists() else unfinished).stat().st_mode
        yield unfinished
        unfinished.chmod(stat.S_IMODE(mode))  # safetensors creates files that only their owner can read
        fsync(unfinished)
        unfinished.replace(target)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"{path}: can't be written: {error.strerror}") from None
    finally:
        if unfinished.is_file():
            unfinished.unlink()


def check_unicode(name: str, value: object, where: str) -> None:
    """Raise UserError if a field's value has a lone surrogate: JSON allows "\\ud800" in a string, Unicode does not."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if bad := re.search("[\ud800-\udfff]", text):
        at = bad.start() + 1
        raise UserError(f"{where}: field {name!r} has a lone surrogate at character {at}: not valid Unicode")


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file atomically."""
    with atomic_write(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, indented."""
    write_text(path, to_json(value, indent=2) + "\n")


def write_json_lines(path: str | Path | None, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, atomically; print the lines if `path` is None."""
    if path is not None:
        write_text(path, "".join(to_json(row) + "\n" for row in rows))
    else:
        for row in rows:
            say(to_json(row))


def append_bytes(path: Path, data: bytes) -> None:
    """Append bytes to a file, which is made if it does not exist."""
    with path.open("ab") as file:
        file.write(data)


def append_json_line(path: str | Path, value: Mapping[str, Any]) -> None:
    """Append a JSON object to a file as a line."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(to_json(value) + "\n")


def to_json(value: object, indent: int | None = None) -> str:
    """Return a value as JSON, which lacks NaN and Infinity: they become null."""
    finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return json.dumps(finite, indent=indent).replace("\x7f", "\\u007f")  # the one control character that is left


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
