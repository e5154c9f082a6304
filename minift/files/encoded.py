"""Encoded data sets in memory-mapped files: made once, by all processor cores, for data larger than memory.

The folder of --encoded-cache has a folder for each data set and way to encode it, named by a hash of everything that
the ids depend on. It is made whole or not at all, and then only read:

index.bin     an INDEX record for each row of the data, in its order
tokens.bin    the ids of each kept row, as int32 (`_ids_as_bytes`)
rows.bin      the location and the fields of each row, as JSON
remarks.json  the different sets of remarks about a row; the index has their numbers
about.json    what the name is a hash of, and the hashes of the files above
"""

import hashlib
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import tokenizers

from minift.encode import IGNORE_INDEX, Example
from minift.errors import UserError
from minift.files.datasets import Row, Schemas, check_any_without_input, has_input, print_remarks, stream_rows
from minift.files.hub import data_files
from minift.files.processes import map_chunks
from minift.files.text import append_bytes, fsync, name_errors, read_json, say, sha256, write_json
from minift.pairs import Ranking, encode_rankings
from minift.progress import progress_bar
from minift.prompts import Template
from minift.remarks import NAMED_LOCATIONS, UNMARKED, Encoded, Mapped, name_first
from minift.tokenizer import Tokenizer

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

INDEX = numpy.dtype([
    ("ends", "<i8", (2,)),  # of the row's bytes in tokens.bin and rows.bin; they begin where the row before ends
    ("margin", "<f8"),  # of a pair or ranking
    ("num_tokens", "<i4"), ("num_supervised", "<i4"),  # 0 for a dropped row
    ("remarks", "<i4"),  # the number of a pair in remarks.json
    ("is_used", "?"),  # False: left out by --no-input-only
    ("is_ranking", "?"),  # of three or more responses
])  # fmt: skip
PARTS = ("tokens.bin", "rows.bin")
FILES = ("index.bin", *PARTS, "remarks.json")
CHUNK = 128  # rows that a process encodes at a time
UNFINISHED = ".unfinished"  # ends the name of a folder that is being made

Encode = partial[Encoded[Any]]  # `encode_rows` or `encode_rankings` with everything but the rows and their source
Noted = tuple[Row, list[str]]  # a row, and the remarks about how it was read


# ---- a finished data set ----


class EncodedFile:
    """An encoded data set on disk. Its length is its number of rows, without those that --no-input-only leaves out."""

    def __init__(self, folder: Path, encode: Encode) -> None:
        """Map the files in a folder; raise UserError if one of them is not as it was written, or if no row is left."""
        try:
            about = read_json(folder / "about.json", "that of an encoded data set")
            for name in FILES:
                if sha256([folder / name]) != about["files"][name]:
                    raise UserError(f"{folder / name}: truncated or damaged")
        except (UserError, FileNotFoundError, LookupError, TypeError) as error:
            raise UserError(f"{error}: delete {folder}, and the data will be encoded again") from None
        self._remarks = read_json(folder / "remarks.json", "remarks")["remarks"]
        self._index = numpy.memmap(folder / "index.bin", INDEX, "r")
        self._open = [(folder / name).open("rb") for name in PARTS]
        self._used = _numbers(self._index["is_used"])
        self._encode = encode
        check_any_without_input(len(self._used), len(self._index))

    def __len__(self) -> int:
        return len(self._used)

    def print_notes(self, data: str) -> None:
        """Print the remarks that `load_rows` prints."""
        notes = self._remarks_about(numpy.arange(len(self._index)), how="read")
        print_remarks(Encoded(data, "row", 0, remarks=notes), sys.stderr)

    def part(self, indices: numpy.ndarray, source: str) -> Encoded[Any]:
        """Return what `encode` returns for the rows with these indices; raise UserError if all of them are dropped."""
        numbers = self._used[indices]
        remarks = self._remarks_about(numbers, how="encoded")
        unmarked = [*map(self._row, remarks[UNMARKED].numbers[:NAMED_LOCATIONS])] if UNMARKED in remarks else []
        # The noun, and `unmarked` of the first rows without their marker; most data sets have no such row.
        encoded: Any = self._encode(unmarked, source=source, may_be_empty=True)
        if self._index["is_ranking"][numbers].any():
            encoded.noun = "ranking"
        is_kept = self._index["num_tokens"][numbers] > 0
        kept = numbers[is_kept]
        encoded.num_rows, encoded.remarks = len(numbers), remarks
        encoded.examples, encoded.rows = Mapped(self._item, kept), Mapped(self._row, kept)
        encoded.indices = Mapped(int, _numbers(is_kept))
        encoded.tokens = int(self._index["num_tokens"][kept].sum(dtype=numpy.int64))
        if encoded.supervised_tokens is not None:
            encoded.supervised_tokens = int(self._index["num_supervised"][kept].sum(dtype=numpy.int64))
        encoded.check_any_kept()
        return encoded

    def _item(self, number: int) -> Example | Ranking:
        stored = self._read("tokens.bin", number).view("<i4")
        is_marked = stored < 0
        ids = numpy.where(is_marked, ~stored, stored)
        if self._encode.func is not encode_rankings:
            return Example(ids.tolist(), numpy.where(is_marked, IGNORE_INDEX, ids).tolist())
        *ends, _ = numpy.flatnonzero(is_marked) + 1
        responses = [response.tolist() for response in numpy.split(ids, ends)]
        return Ranking(responses, float(self._index["margin"][number]))

    def _row(self, number: int) -> Row:
        location, fields = json.loads(self._read("rows.bin", number).tobytes())
        return Row(fields, location)

    def _read(self, name: str, number: int) -> numpy.ndarray:
        """Return a row's bytes in tokens.bin or rows.bin.

        Only this part is mapped, and only while it is used. Of a file that is mapped whole, everything that was read
        counts as memory of this process, in the end all of it.
        """
        column = PARTS.index(name)
        start, end = (int(self._index["ends"][row, column]) if row >= 0 else 0 for row in (number - 1, number))
        return numpy.memmap(self._open[column], "u1", "r", start, (end - start,))

    def _remarks_about(self, numbers: numpy.ndarray, *, how: str) -> dict[str, Any]:
        """Return the remarks on how rows are read or encoded, and the locations of each, in the order of the rows."""
        codes = self._index["remarks"][numbers]
        remarks: dict[str, Any] = {}
        for text in (text for code in dict.fromkeys(codes.tolist()) for text in self._remarks[code][how]):
            if text not in remarks:
                with_text = [code for code, texts in enumerate(self._remarks) if text in texts[how]]
                remarks[text] = Mapped(lambda number: self._row(number).location, numbers[numpy.isin(codes, with_text)])
        return remarks


def _numbers(are_wanted: numpy.ndarray) -> numpy.ndarray:
    """Return the indices of True, in as few bytes as a file of this length allows."""
    return numpy.flatnonzero(are_wanted).astype(numpy.int32 if len(are_wanted) < 2**31 else numpy.int64)


# ---- making one ----


def encoded_file(
    cache: Path, data: str, schemas: Schemas, encode: Encode, *, fingerprint: str, without_input: bool,
    waits: bool = False,
) -> EncodedFile:  # fmt: skip
    """Return a data set encoded by `encode`: from the folder of --encoded-cache, or made there now.

    `fingerprint` is the SHA-256 of the data's files. With `waits`, wait until another process has made it. Raises
    UserError like `datasets.load_rows` and `encode`, and if the folder cannot be written or a file in it is damaged.
    """
    minift = Path(__file__).parents[1]
    identity: dict[str, Any] = {
        "code": sha256(sorted([*minift.glob("*.py"), *minift.glob("files/*.py")])),  # so no change of it is forgotten
        "tokenizers": tokenizers.__version__,
        "data": fingerprint,
        "names": [path.name for path in data_files(data)],
        "without_input": without_input,
        "encode": encode.func.__name__,
        "options": {name: _describe(value) for name, value in encode.keywords.items()},
    }
    folder = cache / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    while waits and not folder.is_dir():
        time.sleep(0.1)
    if not folder.is_dir():
        with _unfinished_folder(cache) as unfinished:
            if not folder.is_dir():  # else made while this process waited for the lock
                _make(unfinished, identity, data, schemas, partial(_encode_chunk, encode, data, without_input))
                if not folder.is_dir():  # else made meanwhile, where folders cannot be locked
                    unfinished.rename(folder)
                    fsync(cache)
                    _print_others(folder, data, identity["names"])
    file = EncodedFile(folder, encode)
    file.print_notes(data)
    return file


def _print_others(made: Path, data: str, names: list[str]) -> None:
    """Print which other data sets of files with these names are in the folder of --encoded-cache, and their size.

    They are not deleted: a run with other options, or of another version of minift, may need one, even now.
    """
    others, size = [], 0
    for about in sorted(made.parent.glob("*/about.json")):
        with suppress(UserError, OSError):  # damaged, or deleted meanwhile
            if about.parent != made and read_json(about, "that of an encoded data set").get("names") == names:
                size += sum(path.stat().st_size for path in about.parent.iterdir())
                others.append(about.parent.name)
    if others:
        noun = "encoding" + ("s" if len(others) > 1 else "")
        found = f"{len(others)} other {noun} of {Path(data).name} here, {size / 1e6:,.1f} MB"
        way = "delete those that no run needs (about.json in each says what it is of)"
        say(f"{made.parent}: {found}: {way}: {name_first(others)}", sys.stderr, wraps=True)


def _describe(option: object) -> Any:
    """Return everything of an option that ids depend on, ready for JSON."""
    if isinstance(option, Template):
        return [option.with_input, option.without_input]
    if isinstance(option, Tokenizer):
        files = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(option.files.items())}
        return [files, option.bos_token, option.bos_token_id, option.eos_token, option.eos_token_id]
    return option


@contextmanager
def _unfinished_folder(cache: Path) -> Iterator[Path]:
    """Yield a new folder in that of --encoded-cache, locked against other processes; delete it unless it is renamed."""
    unfinished = cache / f".{secrets.token_hex(4)}{UNFINISHED}"
    with ExitStack() as stack:
        with name_errors(f"--encoded-cache {cache}", "expected a folder that can be made and written"):
            cache.mkdir(parents=True, exist_ok=True)
            if stack.enter_context(_lock(cache)):  # so those that made these were killed
                for left in cache.glob(f".*{UNFINISHED}"):
                    shutil.rmtree(left)
            unfinished.mkdir()
        stack.callback(shutil.rmtree, unfinished, ignore_errors=True)
        yield unfinished


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Lock a folder, so that other processes make no data sets in it; yield False if it cannot be locked."""
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    is_locked = True
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{folder}: another process encodes data there, waiting for its end")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            is_locked = False
        yield is_locked
    finally:
        os.close(descriptor)


class Chunk(NamedTuple):
    """Consecutive rows as the files have them."""

    records: numpy.ndarray  # of INDEX, with lengths as `ends`, and without `remarks`
    tokens: bytes
    rows: bytes
    remarks: list[tuple[tuple[str, ...], tuple[str, ...]]]  # about how each row is read, and how it is encoded


def _make(
    folder: Path, identity: dict[str, Any], data: str, schemas: Schemas, work: Callable[[list[Noted]], Chunk]
) -> None:
    """Write the files of a data set; raise UserError if the data changes meanwhile."""
    num_rows, ends = 0, numpy.zeros(2, numpy.int64)
    codes: dict[tuple[tuple[str, ...], tuple[str, ...]], int] = {}
    size = sum(path.stat().st_size for path in data_files(data))
    with progress_bar(size, f"encoding {Path(data).name}", "B", unit_scale=True) as bar:
        rows = stream_rows(data, schemas, on_read=bar.update)
        with closing(map_chunks(work, rows, CHUNK)) as chunks:
            for records, tokens, lines, remarks in chunks:
                records["ends"] = ends + records["ends"].cumsum(axis=0)
                records["remarks"] = [codes.setdefault(both, len(codes)) for both in remarks]
                for name, part in zip(("index.bin", *PARTS), (records.tobytes(), tokens, lines), strict=True):
                    append_bytes(folder / name, part)
                num_rows, ends = num_rows + len(records), records["ends"][-1]
                bar.set_postfix_str(f"{num_rows:,} rows", refresh=False)
    if sha256(data_files(data)) != identity["data"]:
        raise UserError(f"{data}: the file has changed while it was read: start again")
    write_json(folder / "remarks.json", {"remarks": [{"read": read, "encoded": encoded} for read, encoded in codes]})
    digests = {name: sha256([folder / name]) for name in FILES}
    write_json(folder / "about.json", {**identity, "files": digests})
    for path in [*folder.iterdir(), folder]:
        fsync(path)


def _encode_chunk(encode: Encode, data: str, without_input: bool, rows: list[Noted]) -> Chunk:
    records = numpy.zeros(len(rows), INDEX)
    tokens, lines, remarks = [], [], []
    for record, (row, notes) in zip(records, rows, strict=True):  # a record is a view
        is_used = not (without_input and has_input(row))
        encoded = encode([row] if is_used else [], source=data, may_be_empty=True)
        [item] = encoded.examples or [None]
        tokens.append(_ids_as_bytes(item) if item else b"")
        lines.append(json.dumps([row.location, row]).encode() + b"\n")
        remarks.append((tuple(notes), tuple(encoded.remarks)))
        record["ends"] = len(tokens[-1]), len(lines[-1])
        record["margin"] = item.margin if isinstance(item, Ranking) else 0
        record["num_tokens"], record["num_supervised"] = encoded.tokens, encoded.supervised_tokens or 0
        record["is_used"], record["is_ranking"] = is_used, encoded.noun == "ranking"
    return Chunk(records, b"".join(tokens), b"".join(lines), remarks)


def _ids_as_bytes(item: Example | Ranking) -> bytes:
    """Return ids as int32, with ~id (a negative number) for one that is not supervised, or ends a response."""
    if isinstance(item, Example):
        pairs = zip(item.input_ids, item.labels, strict=True)
        ids = [~token if label == IGNORE_INDEX else token for token, label in pairs]
    else:
        ids = [token for *response, last in item.responses for token in (*response, ~last)]
    return numpy.array(ids, "<i4").tobytes()
