"""Encoded data sets in memory-mapped files: made once, by all processor cores, for data larger than memory.

The folder of --encoded-cache has a folder for each data set and way to encode it, named by a hash of everything that
the ids depend on. It is made whole or not at all, and then only read:

about.json   what the name is a hash of, the texts of the remarks, the hashes of the other files
index.bin    an INDEX record for each row of the data, in its order
tokens.bin   the example or ranking of each kept row, as int32 (`_pack`)
rows.bin     the location and the fields of each row, as JSON
remarks.bin  a REMARK record for each remark about a row
"""

import hashlib
import json
import mmap
import multiprocessing
import os
import secrets
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import tokenizers

from minift.encode import IGNORE_INDEX, Example
from minift.errors import UserError
from minift.files.datasets import Row, Schemas, check_any_without_input, has_input, print_remarks, stream_rows
from minift.files.hub import data_files
from minift.files.text import append_bytes, fsync, read_json, say, sha256, write_json
from minift.pairs import Ranking, encode_rankings
from minift.progress import progress_bar
from minift.prompts import Template
from minift.remarks import NAMED_LOCATIONS, UNMARKED, Encoded
from minift.tokenizer import Tokenizer

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

INDEX = numpy.dtype([
    ("tokens_end", "<i8"), ("rows_end", "<i8"),  # in tokens.bin and rows.bin; a row begins where the one before ends
    ("num_tokens", "<i4"), ("num_supervised", "<i4"),
    ("is_used", "?"),  # False: left out by --no-input-only
    ("is_kept", "?"),  # False: dropped, as a remark says
    ("noun", "i1"),  # in NOUNS
])  # fmt: skip
NOUNS = ("row", "pair", "ranking")  # of `Encoded`; rows together have the last one of theirs
REMARK = numpy.dtype([("row", "<i8"), ("text", "<i4")])
FILES = {"index.bin": INDEX, "tokens.bin": numpy.dtype("<i4"), "rows.bin": numpy.dtype("u1"), "remarks.bin": REMARK}
CHUNK = 128  # rows that a process encodes at a time
UNFINISHED = ".unfinished"  # ends the name of a folder that is being made

Encode = partial[Encoded[Any]]  # `encode_rows` or `encode_rankings` with everything but the rows and their source
Text = tuple[bool, str]  # of a remark; True if it is about how a row is read, and not how it is encoded


# ---- a finished data set ----


@dataclass(frozen=True)
class Mapped(Sequence[Any]):
    """The items of the rows with some numbers; an item is made when it is asked for."""

    make: Callable[[int], Any]
    numbers: numpy.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        found = self.numbers[index]
        return [self.make(int(number)) for number in found] if isinstance(index, slice) else self.make(int(found))


class EncodedFile:
    """An encoded data set on disk. Its length is the number of rows, without those that --no-input-only leaves out."""

    def __init__(self, folder: Path, encode: Encode) -> None:
        """Map the files in a folder; raise UserError if one of them is not as it was written, or if no row is left."""
        try:
            about = read_json(folder / "about.json", "that of an encoded data set")
            for name in FILES:
                if sha256([folder / name]) != about["files"][name]:
                    raise UserError(f"{folder / name}: truncated or damaged")
            self._texts: list[Text] = [(is_note, text) for is_note, text in about["remarks"]]
        except (UserError, FileNotFoundError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{error}: delete {folder}, and the data will be encoded again") from None
        self._index, self._remarks = (_map(folder / name) for name in ("index.bin", "remarks.bin"))
        self._open = {name: (folder / f"{name}.bin").open("rb") for name in ("tokens", "rows")}
        self._used = _numbers(self._index["is_used"])
        self._encode = encode
        check_any_without_input(len(self._used), len(self._index))

    def __len__(self) -> int:
        return len(self._used)

    def print_notes(self, data: str) -> None:
        """Print the remarks that `load_rows` prints."""
        remarks = self._remarks_about(numpy.arange(len(self._index)), are_notes=True)
        print_remarks(Encoded(data, "row", 0, remarks=remarks), sys.stderr)

    def part(self, indices: numpy.ndarray, source: str) -> Encoded[Any]:
        """Return what `encode` returns for the rows with these indices; raise UserError if all of them are dropped."""
        numbers = self._used[indices]
        is_kept = self._index["is_kept"][numbers]
        kept = numbers[is_kept]
        are_rankings = self._encode.func is encode_rankings
        examples: Any = Mapped(self._ranking if are_rankings else self._example, kept)
        rows: Any = Mapped(self._row, kept)
        positions: Any = Mapped(int, _numbers(is_kept))
        noun: Any = NOUNS[self._index["noun"][numbers].max(initial=1 if are_rankings else 0)]
        encoded: Encoded[Any] = Encoded(source, noun, len(numbers), examples, rows, positions)
        encoded.tokens = int(self._index["num_tokens"][kept].sum(dtype=numpy.int64))
        if not are_rankings:
            encoded.supervised_tokens = int(self._index["num_supervised"][kept].sum(dtype=numpy.int64))
        remarks: dict[str, Any] = self._remarks_about(numbers, are_notes=False)
        encoded.remarks = remarks
        if UNMARKED in remarks:
            few = [self._row(number) for number in remarks[UNMARKED].numbers[:NAMED_LOCATIONS]]
            encoded.unmarked = self._encode(few, source=source, may_be_empty=True).unmarked
        encoded.check_any_kept()
        return encoded

    def _example(self, number: int) -> Example:
        stored = self._read("tokens", number)
        is_supervised = stored >= 0
        ids, labels = numpy.where(is_supervised, stored, ~stored), numpy.where(is_supervised, stored, IGNORE_INDEX)
        return Example(ids.tolist(), labels.tolist())

    def _ranking(self, number: int) -> Ranking:
        stored = self._read("tokens", number)
        ends = 3 + stored[2] + numpy.cumsum([0, *stored[3 : 3 + stored[2]]])
        responses = [stored[start:end].tolist() for start, end in zip(ends, ends[1:], strict=False)]
        return Ranking(responses, float(stored[:2].copy().view("<f8")[0]))

    def _row(self, number: int) -> Row:
        location, fields = json.loads(self._read("rows", number).tobytes())
        return Row(fields, location)

    def _read(self, name: str, number: int) -> numpy.ndarray:
        """Return what tokens.bin or rows.bin has of a row.

        Only this part is mapped, and only while it is used: if the whole file were, what was read of it would count as
        memory of this process, in the end all of it.
        """
        dtype, ends = FILES[f"{name}.bin"], self._index[f"{name}_end"]
        start, end = int(ends[number - 1]) * dtype.itemsize if number else 0, int(ends[number]) * dtype.itemsize
        before = start % mmap.ALLOCATIONGRANULARITY  # a map begins at a whole page
        file = self._open[name].fileno()
        pages = mmap.mmap(file, before + end - start, access=mmap.ACCESS_READ, offset=start - before)
        return numpy.frombuffer(pages, dtype, offset=before)

    def _remarks_about(self, numbers: numpy.ndarray, *, are_notes: bool) -> dict[str, Any]:
        """Return the remarks about rows, each with the locations that it applies to, in the order of the rows."""
        if not len(self._remarks):
            return {}
        place = numpy.full(len(self._index), -1)
        place[numbers] = numpy.arange(len(numbers))
        places = place[self._remarks["row"]]
        order = numpy.argsort(places, kind="stable")  # several remarks about a row keep their order
        found = self._remarks[order[numpy.searchsorted(places[order], 0) :]]
        codes, first = numpy.unique(found["text"], return_index=True)
        remarks = {}
        for code in codes[numpy.argsort(first)]:
            is_note, text = self._texts[code]
            if is_note == are_notes:
                remarks[text] = Mapped(lambda number: self._row(number).location, found["row"][found["text"] == code])
        return remarks


def _map(path: Path) -> numpy.ndarray:
    # An empty file cannot be mapped.
    return numpy.memmap(path, FILES[path.name], "r") if path.stat().st_size else numpy.empty(0, FILES[path.name])


def _numbers(are_wanted: numpy.ndarray) -> numpy.ndarray:
    """Return the indices of True, in as few bytes as a file of this length allows."""
    return numpy.flatnonzero(are_wanted).astype(numpy.int32 if len(are_wanted) < 2**31 else numpy.int64)


# ---- making one ----


def encoded_file(
    cache: Path,
    data: str,
    schemas: Schemas,
    encode: Encode,
    *,
    fingerprint: str,
    without_input: bool,
    waits: bool = False,
) -> EncodedFile:
    """Return a data set encoded by `encode`: from the folder of --encoded-cache, or made there now.

    `fingerprint` is the SHA-256 of the data's files. With `waits`, wait until another process has made it. Raises
    UserError like `datasets.load_rows` and `encode`, and if the folder cannot be written or a file in it is damaged.
    """
    identity = _identity(data, encode, fingerprint, without_input)
    folder = cache / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    while waits and not folder.is_dir():
        time.sleep(0.1)
    if not folder.is_dir():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with _lock(cache) as is_locked:
                if is_locked:  # so those that made these were killed
                    for unfinished in cache.glob(f".*{UNFINISHED}"):
                        shutil.rmtree(unfinished)
                if not folder.is_dir():
                    _make(folder, identity, data, schemas, partial(_encode_chunk, encode, data, without_input))
        except (FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError) as error:
            problem = f"{error.strerror}, expected a folder that can be made and written"
            raise UserError(f"--encoded-cache {cache}: {problem}") from None
    file = EncodedFile(folder, encode)
    file.print_notes(data)
    return file


def _identity(data: str, encode: Encode, fingerprint: str, without_input: bool) -> dict[str, Any]:
    """Return everything that the files depend on, ready for JSON."""
    code = [path for folder in (Path(__file__).parents[1], Path(__file__).parent) for path in folder.glob("*.py")]
    return {
        "code": sha256(sorted(code)),  # of the heart and of files/: no change of it can be forgotten here
        "tokenizers": tokenizers.__version__,
        "data": fingerprint,
        "names": [path.name for path in data_files(data)],
        "without_input": without_input,
        "encode": encode.func.__name__,
        "options": {name: _describe(value) for name, value in encode.keywords.items()},
    }


def _describe(option: object) -> Any:
    if isinstance(option, Template):
        return [option.with_input, option.without_input]
    if isinstance(option, Tokenizer):
        files = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(option.files.items())}
        return [files, option.bos_token, option.bos_token_id, option.eos_token, option.eos_token_id]
    return option


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Keep other processes from making data sets in a folder; yield False where that is not possible."""
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
    """Consecutive rows as the files have them. Ends count from the start of the chunk."""

    records: numpy.ndarray  # of INDEX
    tokens: bytes
    rows: bytes
    remarks: list[tuple[int, Text]]  # each with the number of its row in the chunk


def _make(folder: Path, identity: dict[str, Any], data: str, schemas: Schemas, work: Callable[[list], Chunk]) -> None:
    """Write the files of a data set under another name, then rename the folder."""
    unfinished = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}{UNFINISHED}")
    unfinished.mkdir()
    try:
        texts, digests = _write(unfinished, data, schemas, work)
        if sha256(data_files(data)) != identity["data"]:
            raise UserError(f"{data}: the file has changed while it was read: start again")
        write_json(unfinished / "about.json", {**identity, "remarks": texts, "files": digests})
        for path in [*unfinished.iterdir(), unfinished]:
            fsync(path)
        if not folder.is_dir():  # made meanwhile, where folders cannot be locked
            unfinished.rename(folder)
            fsync(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write(
    folder: Path, data: str, schemas: Schemas, work: Callable[[list], Chunk]
) -> tuple[list[Text], dict[str, str]]:
    """Write all files but about.json; return the texts of the remarks, and the hash of each file."""
    digests = {name: hashlib.sha256() for name in FILES}
    for name in FILES:
        (folder / name).touch()
    codes: dict[Text, int] = {}
    num_rows = tokens_end = rows_end = 0
    size = sum(path.stat().st_size for path in data_files(data))
    with progress_bar(size, f"encoding {Path(data).name}", "B", unit_scale=True) as bar:
        rows = stream_rows(data, schemas, on_read=bar.update)
        with closing(_in_processes(work, rows)) as chunks:
            for chunk in chunks:
                chunk.records["tokens_end"] += tokens_end
                chunk.records["rows_end"] += rows_end
                remarks = [(num_rows + row, codes.setdefault(text, len(codes))) for row, text in chunk.remarks]
                num_rows += len(chunk.records)
                tokens_end, rows_end = (int(chunk.records[end][-1]) for end in ("tokens_end", "rows_end"))
                parts = (chunk.records.tobytes(), chunk.tokens, chunk.rows, numpy.array(remarks, REMARK).tobytes())
                for name, part in zip(FILES, parts, strict=True):
                    append_bytes(folder / name, part)
                    digests[name].update(part)
                bar.set_postfix_str(f"{num_rows:,} rows", refresh=False)
    return [*codes], {name: digest.hexdigest() for name, digest in digests.items()}


def _encode_chunk(
    encode: Encode, data: str, without_input: bool, rows: list[tuple[dict[str, Any], str, list[str]]]
) -> Chunk:
    """Encode some rows, each given as its fields, its location and the remarks about how it is read."""
    index = numpy.zeros(len(rows), INDEX)
    tokens, lines = [], []
    remarks: list[tuple[int, Text]] = []
    for number, (fields, location, notes) in enumerate(rows):
        record = index[number]  # a view; ends are lengths until the last row is done
        lines.append(json.dumps([location, fields]).encode() + b"\n")
        record["rows_end"] = len(lines[-1])
        remarks += [(number, (True, note)) for note in notes]
        row = Row(fields, location)
        if without_input and has_input(row):
            continue
        encoded = encode([row], source=data, may_be_empty=True)
        remarks += [(number, (False, remark)) for remark in encoded.remarks]
        record["is_used"], record["noun"] = True, NOUNS.index(encoded.noun)
        record["num_tokens"], record["num_supervised"] = encoded.tokens, encoded.supervised_tokens or 0
        for item in encoded.examples:  # one, or none
            tokens.append(_pack(item))
            record["is_kept"], record["tokens_end"] = True, len(tokens[-1])
    for end in ("tokens_end", "rows_end"):
        index[end] = index[end].cumsum()
    return Chunk(index, b"".join(part.tobytes() for part in tokens), b"".join(lines), remarks)


def _pack(item: Example | Ranking) -> numpy.ndarray:
    """Return an example's supervised ids, and ~id (a negative number) of the others; or a ranking with its lengths.

    A ranking is its margin, the number of its responses, their lengths, and their ids.
    """
    if isinstance(item, Example):
        ids = numpy.array(item.input_ids, "<i4")
        return numpy.where(numpy.array(item.labels) == IGNORE_INDEX, ~ids, ids)
    lengths = [len(response) for response in item.responses]
    numbers = [len(lengths), *lengths, *(token for response in item.responses for token in response)]
    return numpy.concatenate([numpy.array([item.margin], "<f8").view("<i4"), numpy.array(numbers, "<i4")])


# ---- processes ----


def _in_processes(work: Callable[[list], Chunk], rows: Iterator[tuple[Row, list[str]]]) -> Generator[Chunk, None, None]:
    """Yield what `work` makes of each chunk of the rows, in their order, with a process for each processor core."""
    chunks: Iterator[list] = iter(lambda: [(dict(row), row.location, notes) for row, notes in islice(rows, CHUNK)], [])
    first = next(chunks, [])
    chunks = chain([first], chunks)
    # Few rows are quicker done here; and elsewhere than on Linux, a process with threads cannot be forked safely.
    if len(first) < CHUNK or not sys.platform.startswith("linux"):
        yield from map(work, chunks)
        return
    count = len(os.sched_getaffinity(0))
    forked = multiprocessing.get_context("fork")  # importing torch and reading the tokenizer would take seconds
    begun: deque[Future[Chunk]] = deque()
    with ProcessPoolExecutor(count, forked, initializer=_start, initargs=(work,)) as processes:
        try:
            for chunk in chunks:
                begun.append(processes.submit(_work_on, chunk))
                if len(begun) > 2 * count:  # more would only fill the memory
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        except BrokenProcessPool:
            raise OSError("a process that encoded rows has ended: it was killed, or out of memory") from None


_work: Callable[[list], Chunk]  # of a process that `_in_processes` started


def _start(work: Callable[[list], Chunk]) -> None:
    """Prepare a process: it gets its work by the fork, and ends with the process that started it."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes, and that one ends the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])  # type: ignore[union-attr]
    os._exit(1)


def _work_on(chunk: list) -> Chunk:
    return _work(chunk)
