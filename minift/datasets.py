"""JSON, JSONL and parquet files to checked rows, and the seeded split into rows to train on and rows held out."""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy

from minift.errors import UserError
from minift.files import JSON_DECODER, json_lines, read_text
from minift.hub import DATA_SUFFIXES, data_files

# The fields that make a row one of a kind, each a string. An "instruction" row may have an "input" besides ("" if not).
# A row is of the first kind that it has every field of: data sets keep rendered copies in "prompt" and "text".
TRAINING_KINDS = {
    "instruction": ("instruction", "output"),
    "prompt": ("prompt", "completion"),
    "text": ("text",),
}
PROMPT_KINDS = {
    "instruction": ("instruction",),
    "prompt": ("prompt",),
}
# A "prompt" is optional: whole dialogues (hh-rlhf) begin alike instead. "responses" is a list of strings, best first.
PAIR_KINDS = {
    "pair": ("chosen", "rejected"),
    "ranking": ("responses",),
}
SCORE_KINDS = {
    "pair": ("chosen", "rejected"),
    "response": ("prompt", "response"),
}
OPTIONAL_FIELDS = {"instruction": ("input",), "pair": ("prompt",), "ranking": ("prompt",)}


class Row(dict[str, Any]):
    """A row's fields, and where its file has it: `place`, "line 17" of JSONL or "row 17" of a JSON array.

    A dict that remembers its place, so that a message can name the row after filtering and splitting.
    """

    __slots__ = ("place",)

    def __init__(self, fields: dict[str, Any], place: str):
        super().__init__(fields)
        self.place = place


def load_rows(
    data: str | os.PathLike[str], kinds: dict[str, tuple[str, ...]] = TRAINING_KINDS, *, mixed: bool = False
) -> list[Row]:
    """The rows of a file or of a hub data set (`hub.data_files`), in order.

    A file is JSON (an array of objects, or one object a line), JSONL or parquet. All rows are of one kind (see
    `TRAINING_KINDS`), unless `mixed`; other fields are kept as they are.

    Raises UserError naming the file, the line, and the row's field where one is at fault: a missing or unreadable file,
    malformed JSON, a field that is missing or no string, text that is not valid Unicode, kinds mixed, no row at all.
    And as `hub.look_up` does.
    """
    files = data_files(data)
    rows: list[Row] = []
    first_kind = None
    for path in files:
        for where, place, value in _values(path):
            kind = _check_row(value, kinds, where)
            first_kind = first_kind or kind
            if kind != first_kind and not mixed:
                raise UserError(
                    f"{where}: this row has {_quoted(kinds[kind])}, but the rows before it have "
                    f"{_quoted(kinds[first_kind])}; put the two kinds into files of their own"
                )
            rows.append(Row(value, place if len(files) == 1 else f"{path.name}: {place}"))
    if not rows:
        raise UserError(f"{data}: no rows in it, expected a JSON array of objects or one object a line")
    return rows


def drop_rows_with_input(rows: Sequence[Row]) -> list[Row]:
    """The course's filter: rows whose input is empty. Raises UserError if that is none."""
    kept = [row for row in rows if row.get("input", "") == ""]
    if not kept:
        raise UserError(f"--no-input-only: all of the {len(rows)} rows have an input, so none is left; leave it out")
    return kept


def split(n: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Which of n rows to train on and which to hold out, in order, as the course's lab has it.

    Equal to `datasets`' `shuffle(seed)` and then `train_test_split(fraction, seed)`, row for row: each is
    `numpy.random.default_rng(seed).permutation(n)`, and the first ceil(fraction · n) rows are held out. A fraction of 0
    holds nothing out and leaves the rows in their order.

    Raises UserError naming --eval-fraction if it isn't in [0, 1) or leaves nothing to train on.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"--eval-fraction {fraction}: expected 0 (hold nothing out) or a number between 0 and 1")
    if fraction == 0:
        return list(range(n)), []
    held_out = math.ceil(fraction * n)
    if held_out >= n:
        raise UserError(f"--eval-fraction {fraction}: holds out {held_out} of {n} rows, so none is left to train on")
    shuffled = numpy.random.default_rng(seed).permutation(n)
    order = shuffled[numpy.random.default_rng(seed).permutation(n)].tolist()
    return order[held_out:], order[:held_out]


def fingerprint(data: str | os.PathLike[str]) -> str:
    """The SHA-256 of a data set's bytes in hexadecimal, by which run.json says what data it was."""
    digest = hashlib.sha256()
    for path in data_files(data):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _values(path: Path) -> Iterator[tuple[str, str, Any]]:
    """A file's values, each with where it stands for a message and its place for `Row`."""
    expected = f"a {', '.join(DATA_SUFFIXES[:-1])} or {DATA_SUFFIXES[-1]} file, or a hub data set (owner/name)"
    if path.suffix not in DATA_SUFFIXES and not path.is_dir():
        raise UserError(f"{path}: expected {expected}")
    if path.suffix == ".parquet" and path.is_file():
        return _parquet_values(path)
    text = read_text(path, expected)
    if text.lstrip()[:1] == "[":
        return _array_values(text, path)
    lines = json_lines(text, path, "an array of objects, or one object a line")
    return ((f"{path}:{number}", f"line {number}", value) for number, value in lines)


def _parquet_values(path: Path) -> Iterator[tuple[str, str, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path}: reading parquet takes pyarrow: pip install -e '.[parquet]'") from None
    try:
        with ParquetFile(path) as file:
            values = (value for batch in file.iter_batches() for value in batch.to_pylist())
            for number, value in enumerate(values, start=1):
                yield f"{path}: row {number}", f"row {number}", json.loads(json.dumps(value, default=_as_json))
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no readable parquet, truncated or damaged: download it again ({error})") from None


def _as_json(value: Any) -> Any:
    """What JSON has no word for, as text: a row is to be written as JSON again."""
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode("utf-8")  # text whose writer left out that it is
    except UnicodeDecodeError:
        return {"bytes": len(value)}  # so that a field that should be text is refused


def _array_values(text: str, path: str | os.PathLike[str]) -> Iterator[tuple[str, str, Any]]:
    """Walk the array value by value, counting lines: json.loads would forget where each row stood."""
    position, line, number = text.index("[") + 1, 1, 0
    counted = 0
    while True:
        position = _skip_space(text, position)
        if number == 0 and text[position : position + 1] == "]":
            break
        line += text.count("\n", counted, position)
        counted = position
        number += 1
        value, position = _decode(text, position, f"{path}:{line}: row {number}", path, 1)
        yield f"{path}:{line}: row {number}", f"row {number}", value
        position = _skip_space(text, position)
        if text[position : position + 1] != ",":
            break
        position += 1
    expected = "',' or the array's closing ']'"
    if text[position : position + 1] == "]":
        position = _skip_space(text, position + 1)
        expected = "nothing after the array"
    if position < len(text) or expected != "nothing after the array":
        line = text.count("\n", 0, position) + 1
        column = position - text.rfind("\n", 0, position)
        raise UserError(f"{path}:{line}:{column}: malformed JSON: expected {expected}")


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\n", "\r", "\t"):
        position += 1
    return position


def _decode(text: str, start: int, where: str, path: str | os.PathLike[str], first_line: int) -> tuple[Any, int]:
    """The JSON value that starts at `start`, and where it ends."""
    try:
        return JSON_DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        expected = "expected an array of objects, or one object a line"
        raise UserError(f"{path}:{line}:{error.colno}: malformed JSON: {error.msg}; {expected}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: malformed JSON: {error}") from None


def _check_row(value: Any, kinds: dict[str, tuple[str, ...]], where: str) -> str:
    """The row's kind. Raises UserError if it has none, or a field that is not as it should be."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: {_type_name(value)}, expected an object with the fields of a row")
    kind = next((kind for kind, fields in kinds.items() if all(field in value for field in fields)), None)
    begun = next((kind for kind, fields in kinds.items() if any(field in value for field in fields)), None)
    if begun is None:
        expected = ", or ".join(_quoted(fields) for fields in kinds.values())
        raise UserError(f"{where}: no field of a row in it, expected {expected}")
    if kind is None or kind == "text":
        # "text" counts only where no other kind was begun: beside an "instruction" it doesn't make up for an "output".
        kind = begun
    fields = kinds[kind] + tuple(field for field in OPTIONAL_FIELDS.get(kind, ()) if field in value)
    for field in fields:
        if field not in value:
            raise UserError(f"{where}: field '{field}' is missing")
        texts = [value[field]]
        if field == "responses":
            if not isinstance(value[field], list) or len(value[field]) < 2:
                raise UserError(f"{where}: field 'responses', expected a list of two or more strings, best first")
            texts = value[field]
        for text in texts:
            if not isinstance(text, str):
                raise UserError(f"{where}: field '{field}' is {_type_name(text)}, expected a string")
            _check_unicode(text, f"{where}: field '{field}'")
    return kind


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON allows "\ud800" in a string, Unicode does not, and no tokenizer can encode it.
        code = f"\\u{ord(text[error.start]):04x}"
        raise UserError(f"{where} holds half of a character, {code} alone, at character {error.start + 1}") from None


def _quoted(fields: tuple[str, ...]) -> str:
    return " and ".join(f"'{field}'" for field in fields)


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number"}
    return "null" if value is None else names.get(type(value), "a number")
