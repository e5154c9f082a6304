"""Checked rows from JSON, JSONL and parquet files; the seeded split into training and held-out rows."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from minift.errors import UserError
from minift.files.hub import DATA_SUFFIXES, data_files
from minift.files.text import parse_json, parse_json_lines, read_text

# A schema's required fields, each a string. An "instruction" row may also have an "input" (default "").
# A row's schema is the first whose fields it all has: data sets keep rendered copies in "prompt" and "text".
TRAINING_SCHEMAS = {"instruction": ("instruction", "output"), "prompt": ("prompt", "completion"), "text": ("text",)}
PROMPT_SCHEMAS = {"instruction": ("instruction",), "prompt": ("prompt",)}
# A "prompt" is optional: in whole dialogues (hh-rlhf) it is the shared beginning. "responses": strings, best first.
PAIR_SCHEMAS = {"pair": ("chosen", "rejected"), "ranking": ("responses",)}
SCORE_SCHEMAS = {"pair": ("chosen", "rejected"), "response": ("prompt", "response")}
OPTIONAL_FIELDS = {"instruction": ("input",), "pair": ("prompt",), "ranking": ("prompt",)}
LINES_OR_ARRAY = "an array of objects, or one object a line"


class Row(dict[str, Any]):
    """A row's fields and its `location`, for messages: "line 17" of JSONL, "row 17" of a JSON array or of parquet."""

    __slots__ = ("location",)

    def __init__(self, fields: Mapping[str, Any], location: str) -> None:
        super().__init__(fields)
        self.location = location


def load_rows(
    data: str | Path, schemas: Mapping[str, tuple[str, ...]] = TRAINING_SCHEMAS, *, mixed: bool = False
) -> list[Row]:
    """Return the rows of a JSON, JSONL or parquet file, or of a hub data set (`hub.data_files`), in order.

    All rows follow one schema of `schemas`, unless `mixed`; their other fields are kept unchanged. Raises UserError
    naming the file, the line or row, and the field if the data cannot be read or is wrong, and like `hub.look_up`.
    """
    files = data_files(data)
    rows: list[Row] = []
    first_schema = None
    for path in files:
        unit, values = _read_values(path)
        for number, value in values:
            where = f"{path}:{number}" if unit == "line" else f"{path}: row {number}"
            schema = _check_row(value, schemas, where)
            first_schema = first_schema or schema
            if schema != first_schema and not mixed:
                earlier = _quoted(schemas[first_schema])
                raise UserError(
                    f"{where}: this row has {_quoted(schemas[schema])}, earlier ones {earlier}: split the file"
                )
            location = f"{unit} {number}"
            rows.append(Row(value, location if len(files) == 1 else f"{path.name}: {location}"))
    if not rows:
        raise UserError(f"{data}: no rows in it, expected {LINES_OR_ARRAY}")
    return rows


def drop_rows_with_input(rows: Sequence[Row]) -> list[Row]:
    """Keep the rows whose input is empty, as the course does; raise UserError if there are none."""
    kept = [row for row in rows if row.get("input", "") == ""]
    if not kept:
        raise UserError(f"--no-input-only: all of the {len(rows)} rows have an input, so none is left; leave it out")
    return kept


def split(n: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Return the indices, of n rows, to train on and to hold out, in order, as the course's lab splits them.

    Equal to `shuffle(seed)` and then `train_test_split(fraction, seed)` of Hugging Face's `datasets`: each of them is
    `numpy.random.default_rng(seed).permutation(n)`, and the first ceil(fraction · n) rows are held out. A fraction of 0
    keeps the order. Raises UserError naming --eval-fraction if it isn't in [0, 1) or leaves nothing to train on.
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


def _read_values(path: Path) -> tuple[str, Iterable[tuple[int, Any]]]:
    """Return the unit in which a file is counted, "line" or "row", and its numbered values."""
    expected = "a .json, .jsonl or .parquet file, or a hub data set (owner/name)"
    if path.suffix not in DATA_SUFFIXES and not path.is_dir():
        raise UserError(f"{path}: expected {expected}")
    if path.suffix == ".parquet" and path.is_file():
        return "row", enumerate(_read_parquet(path), start=1)
    text = read_text(path, expected)
    if text.lstrip()[:1] == "[":
        return "row", enumerate(parse_json(text, path, LINES_OR_ARRAY), start=1)
    return "line", parse_json_lines(text, path, LINES_OR_ARRAY)


def _read_parquet(path: Path) -> Iterator[Any]:
    try:
        from pyarrow import ArrowException  # noqa: PLC0415 (an optional extra)
        from pyarrow.parquet import ParquetFile  # noqa: PLC0415
    except ImportError:
        raise UserError(f"{path}: reading parquet takes pyarrow: pip install -e '.[parquet]'") from None
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches():
                for value in batch.to_pylist():
                    yield json.loads(json.dumps(value, default=_as_text))
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: unreadable, truncated or damaged parquet: download it again ({error})") from None


def _as_text(value: object) -> str:
    """Convert a value that JSON does not have; bytes that are not UTF-8 become lone surrogates, which are not text."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def _check_row(row: object, schemas: Mapping[str, tuple[str, ...]], where: str) -> str:
    """Return the name of the row's schema; raise UserError if it follows none or has a field of the wrong type."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: {json.dumps(row):.40}, expected an object with the fields of a row")
    begun = [name for name, fields in schemas.items() if any(field in row for field in fields)]
    if not begun:
        expected = ", or ".join(_quoted(fields) for fields in schemas.values())
        raise UserError(f"{where}: no field of a row in it, expected {expected}")
    # A "text" beside an "instruction" is a rendered copy: it does not make up for a missing "output".
    complete = [name for name in begun if name != "text" and all(field in row for field in schemas[name])]
    schema = (complete or begun)[0]
    for field in (*schemas[schema], *OPTIONAL_FIELDS.get(schema, ())):
        if field not in row and field in schemas[schema]:
            raise UserError(f"{where}: field '{field}' is missing")
        value = row.get(field, "")
        if field == "responses" and not (isinstance(value, list) and len(value) >= 2):
            raise UserError(f"{where}: field 'responses', expected a list of two or more strings, best first")
        for text in value if field == "responses" else [value]:
            if not isinstance(text, str):
                raise UserError(f"{where}: field '{field}' is {json.dumps(text):.40}, expected a string")
            if bad := re.search("[\ud800-\udfff]", text):  # JSON allows "\ud800" in a string; Unicode does not
                at = bad.start() + 1
                raise UserError(f"{where}: field '{field}' has a lone surrogate at character {at}: not valid Unicode")
    return schema


def _quoted(fields: tuple[str, ...]) -> str:
    return " and ".join(f"'{field}'" for field in fields)
