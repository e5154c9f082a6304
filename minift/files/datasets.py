"""Checked rows from JSON, JSONL, CSV and parquet files; the seeded split into training and held-out rows."""

import csv
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

import numpy

from minift.errors import UserError
from minift.files.hub import CSV, DATA_SUFFIXES, data_files
from minift.files.layouts import to_own_fields
from minift.files.text import (
    MACHINE_ERRORS,
    STDIN,
    check_not_pointer,
    check_unicode,
    parse_json,
    parse_json_lines,
    read_lines,
    read_stdin,
    say,
)
from minift.prompts import question_fields
from minift.remarks import Encoded

Schemas = Mapping[str, tuple[str, ...]]
# A schema's required fields, each a string. A row's schema is the first one whose fields are all present. In a row with
# both "instruction" and "prompt", `prompts.question_fields` chooses. A null field counts as absent.
TRAINING_SCHEMAS = {"instruction": ("instruction", "output"), "prompt": ("prompt", "completion"), "text": ("text",)}
PROMPT_SCHEMAS = {"instruction": ("instruction",), "prompt": ("prompt",)}
# A question is optional: in whole dialogues (hh-rlhf) it is the shared beginning. "responses": strings, best first.
PAIR_SCHEMAS = {"pair": ("chosen", "rejected"), "ranking": ("responses",)}
SCORE_SCHEMAS = {"pair": PAIR_SCHEMAS["pair"], "response": ("prompt", "response"),
    "instruction": ("instruction", "response")}  # fmt: skip
# Names of fields in other data sets, for messages.
QUESTIONS = ("question", "query", "problem", "instruction", "prompt", "input", "inputs")
ANSWERS = ("response", "answer", "completion", "output", "solution", "target", "targets")
ALIASES = {"instruction": QUESTIONS, "prompt": QUESTIONS, "input": ("context",), "text": ("content",),
    "output": ANSWERS, "completion": ANSWERS, "response": ANSWERS}  # fmt: skip
LINES_OR_ARRAY = "an array of objects, or one object a line"


class Row(dict[str, Any]):
    """A row's fields, its `location` for messages, and the fields that it has in its file.

    The location is "line 17" of JSONL or CSV, "row 17" of a JSON array or of parquet. `given` differs from the fields
    where `layouts.to_own_fields` renamed some: it is what commands write again.
    """

    __slots__ = ("given", "location")

    def __init__(self, fields: dict[str, Any], location: str, given: dict[str, Any] | None = None) -> None:
        super().__init__(fields)
        self.location = location
        self.given = fields if given is None else given


def load_rows(data: str | Path | None, schemas: Schemas = TRAINING_SCHEMAS, *, mixed: bool = False) -> list[Row]:
    """Return the rows of a JSON, JSONL, CSV or parquet file, or of a hub data set (`hub.data_files`), in order.

    None is standard input, in JSON or JSONL. Conversations and the names of other data sets are replaced first
    (`layouts.to_own_fields`); remarks on stderr say so. Then all rows must follow one schema of `schemas`, unless
    `mixed`. Null fields are dropped, nested ones too; the others are kept unchanged. Raises UserError naming the file,
    the line or row, and the field if the data cannot be read or is wrong, and like `hub.look_up`.
    """
    rows: list[Row] = []
    noted: Encoded[Row] = Encoded(str(data or STDIN), "row", 0)
    for row, remarks in stream_rows(data, schemas, mixed=mixed):
        rows.append(row)
        for remark in remarks:
            noted.remark(remark, row.location)
    print_remarks(noted, sys.stderr)
    return rows


def stream_rows(
    data: str | Path | None,
    schemas: Schemas,
    *,
    mixed: bool = False,
    on_read: Callable[[int], object] = lambda count: None,
) -> Iterator[tuple[Row, list[str]]]:
    """Yield the rows that `load_rows` returns, each with the remarks about it; call `on_read` with numbers of bytes.

    Only one row is in memory, but a JSON array is read whole. Raises like `load_rows`, at the row with the problem.
    """
    files = [Path(STDIN)] if data is None else data_files(data)
    first = None  # the fields of the first row's schema
    for path in files:
        if data is None:
            unit, values = _parse_values(StringIO(read_stdin(LINES_OR_ARRAY), newline="\n"), path)
        else:
            unit, values = _read_values(path, on_read)
        for number, value in values:
            where = f"{path}:{number}" if unit == "line" else f"{path}: row {number}"
            fields, required, remarks = read_row(value, schemas, where)
            first = first or required
            if required != first and not mixed:
                has, had = _quoted(required), _quoted(first)
                raise UserError(f"{where}: this row has {has}, earlier ones {had}: split the file")
            location = f"{unit} {number}" if len(files) == 1 else f"{path.name}: {unit} {number}"
            yield Row(fields, location, value), remarks
    if first is None:
        expected = "a line of names, then one row a line" if str(data).endswith(CSV) else LINES_OR_ARRAY
        raise UserError(f"{data or STDIN}: no rows in it, expected {expected}")


def print_remarks(encoded: Encoded, stream: TextIO) -> None:
    """Print the remarks about a data set's rows, if there are any."""
    if encoded.remarks:
        say("\n".join([f"{encoded.source}:", *encoded.remark_lines]), stream, wraps=True)


def check_added(rows: Sequence[Row], names: Sequence[str], source: str) -> None:
    """Raise UserError if rows cannot be written with fields added: one is there already, or a text is not valid."""
    for row in rows:
        where = f"{source}: {row.location}"
        if taken := [name for name in names if name in row.given]:
            raise UserError(f"{where}: the row has a field '{taken[0]}', which is to be added: rename the row's own")
        for name, value in row.given.items():
            check_unicode(name, value, where)
            check_unicode(name, name, where)


def drop_rows_with_input(rows: Sequence[Row]) -> list[Row]:
    """Keep the rows whose input is empty, as the course does; raise UserError if there are none."""
    kept = [row for row in rows if not has_input(row)]
    check_any_without_input(len(kept), len(rows))
    return kept


def has_input(row: Mapping[str, Any]) -> bool:
    """Return whether a row's input is not empty."""
    return row.get("input", "") != ""


def check_any_without_input(num_kept: int, num_rows: int) -> None:
    """Raise UserError if --no-input-only keeps none of the rows."""
    if not num_kept:
        raise UserError(f"--no-input-only: all of the {num_rows} rows have an input, so none is left; leave it out")


def split(n: int, fraction: float, seed: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return the indices, of n rows, to train on and to hold out, in order, as the course's lab splits them.

    Equal to `shuffle(seed)` and then `train_test_split(fraction, seed)` of Hugging Face's `datasets`: each of them is
    `numpy.random.default_rng(seed).permutation(n)`, and the first ceil(fraction · n) rows are held out. A fraction of 0
    keeps the order. Raises UserError naming --eval-fraction if it isn't in [0, 1) or leaves nothing to train on.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"--eval-fraction {fraction}: expected 0 (hold nothing out) or a number between 0 and 1")
    if fraction == 0:
        return numpy.arange(n), numpy.arange(0)
    held_out = math.ceil(fraction * n)
    if held_out >= n:
        raise UserError(f"--eval-fraction {fraction}: holds out {held_out} of {n} rows, so none is left to train on")
    shuffled = numpy.random.default_rng(seed).permutation(n)
    order = shuffled[numpy.random.default_rng(seed).permutation(n)]
    return order[held_out:], order[:held_out]


def _read_values(path: Path, on_read: Callable[[int], object]) -> tuple[str, Iterable[tuple[int, Any]]]:
    """Return the unit in which a file is counted, "line" or "row", and its numbered values."""
    expected = "a .json, .jsonl, .csv or .parquet file, gzipped (.gz) or not, or a hub data set (owner/name)"
    if not path.name.endswith(DATA_SUFFIXES) and not path.is_dir():
        raise UserError(f"{path}: expected {expected}")
    if path.suffix == ".parquet" and path.is_file():
        check_not_pointer(path)
        return "row", enumerate(_read_parquet(path, on_read), start=1)
    if path.name.endswith(CSV):
        return "line", _parse_csv(read_lines(path, expected, newline="", on_read=on_read), path)
    return _parse_values(read_lines(path, expected, newline="\n", on_read=on_read), path)


def _parse_csv(lines: Iterable[str], path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the first line's number and the fields of each record; the first record has their names.

    Raises UserError for a record that has more or fewer fields, and for quotes that do not match.
    """
    csv.field_size_limit(2**31 - 1)  # the largest that every system has
    records = csv.reader(lines, strict=True)
    names: list[str] | None = None
    end = 0  # the last line of the record before
    while True:
        where = f"{path}:{end + 1}"
        try:
            record = next(records, None)
        except csv.Error as error:
            rule = "a field with a quote, a comma or a line end in it needs quotes around it, and its own doubled"
            raise UserError(f"{where}: malformed CSV: {error}; {rule}") from None
        if record is None:
            return
        number, end = end + 1, records.line_num
        if not record:  # a blank line
            continue
        if names is None:
            names = record
            if twice := [name for name in names if names.count(name) > 1]:
                raise UserError(f"{where}: two fields have the name {twice[0]!r:.40}")
        elif len(record) != len(names):
            rule = "a field with a comma or a line end in it needs quotes around it"
            raise UserError(f"{where}: {len(record)} fields, expected the {len(names)} that the header names: {rule}")
        else:
            yield number, dict(zip(names, record, strict=True))


def _parse_values(lines: Iterable[str], path: Path) -> tuple[str, Iterable[tuple[int, Any]]]:
    """Return the unit and the numbered values of JSON or JSONL, as `_read_values` does."""
    lines = iter(lines)
    begun = []  # the lines up to the first that is not blank
    for line in lines:
        begun.append(line)
        if line.strip():
            break
    first, lines = begun[-1].strip() if begun else "", chain(begun, lines)
    if first.startswith("[") or (first.startswith("{") and first[-1] in "{[,"):
        several = not first.startswith("[")  # objects over several lines, as jq prints them
        values = parse_json("".join(lines), path, LINES_OR_ARRAY, several=several, object_hook=_without_nulls)
        return "row", enumerate(values, start=1)
    return "line", parse_json_lines(lines, path, LINES_OR_ARRAY, object_hook=_without_nulls)


def _read_parquet(path: Path, on_read: Callable[[int], object]) -> Iterator[Any]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path}: reading parquet takes pyarrow: pip install -e '.[parquet]'") from None
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches():
                on_read(path.stat().st_size * batch.num_rows // file.metadata.num_rows)
                for value in batch.to_pylist():
                    text = json.dumps(value, default=_as_text)  # may hold NaN and Infinity: they become null
                    yield json.loads(text, parse_constant=lambda _: None, object_hook=_without_nulls)
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        if getattr(error, "errno", None) in MACHINE_ERRORS:
            raise
        raise UserError(f"{path}: unreadable, truncated or damaged parquet: download it again ({error})") from None


def _as_text(value: object) -> str:
    """Return a value that JSON lacks as text. Bytes that are not UTF-8 become lone surrogates, which are refused."""
    return str(value, "utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def _without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def read_row(row: object, schemas: Schemas, where: str) -> tuple[dict[str, Any], tuple[str, ...], list[str]]:
    """Return a row's fields as minift names them, the required ones of its schema, and remarks about what is renamed.

    Raises UserError like `check_row` and `layouts.to_own_fields`, and for anything but an object.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: {json.dumps(row):.40}, expected an object with the fields of a row")
    fields, remarks = to_own_fields(row, schemas, where)
    return fields, check_row(fields, schemas, where), remarks


def check_row(row: Mapping[str, Any], schemas: Schemas, where: str) -> tuple[str, ...]:
    """Return the required fields of a row's schema; raise UserError if it has none, or a field of the wrong type.

    The schema is the first whose fields the row has and which asks the question that `question_fields` chose.
    """
    begun = [name for name, fields in schemas.items() if any(field in row for field in fields)]
    # A "text" beside an "instruction" is a rendered copy: it does not make up for a missing "output".
    possible = begun if begun == ["text"] else [name for name in begun if name != "text"]
    complete = [name for name in possible if all(field in row for field in schemas[name])]
    if not complete:
        raise UserError(f"{where}: {_missing(row, schemas, begun)}")
    question = question_fields(row)
    not_asked = {"instruction", "prompt"} - {*question}
    required = next(schemas[name] for name in complete if not not_asked & {*schemas[name]})
    texts = [text for field in dict.fromkeys((*required, *question)) for text in _texts_in(row, field, where)]
    if required in PAIR_SCHEMAS.values() and not question:  # whole dialogues, which have their question in them
        for field in ALIASES["prompt"]:
            text = row.get(field)
            if isinstance(text, str) and not all(text.strip() in side for side in texts):
                raise UserError(f"{where}: '{field}' is not read: rename it to 'prompt', or remove it")
    if "kind" in row:  # runs and tables show it
        check_unicode("kind", row["kind"], where)
    return required


def _texts_in(row: Mapping[str, Any], field: str, where: str) -> list[str]:
    """Return the text of a field, or those in "responses" and "history"; UserError if it holds anything else."""
    value = row.get(field, "")
    if field == "history":
        turns = value or []
        if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
            found = json.dumps(value)
            raise UserError(f"{where}: field 'history' is {found:.40}, expected a list of [question, answer]")
        value = [text for turn in turns for text in turn]
    texts = value if field in ("history", "responses") else [value]
    if not isinstance(texts, list) or (field == "responses" and len(texts) < 2):
        raise UserError(f"{where}: field 'responses', expected a list of two or more strings, best first")
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"{where}: field '{field}' is {json.dumps(text):.40}, expected a string")
        check_unicode(field, text, where)
    return texts


def _missing(row: Mapping[str, Any], schemas: Schemas, begun: Sequence[str]) -> str:
    """Return the end of a message: which field a row lacks, which ones it has, and which of them to rename."""
    renames, spelled = "", {name.lower(): name for name in row}
    for name in begun or schemas:
        optional = ("input",) if name == "instruction" else ()
        wanted = [field for field in (*schemas[name], *optional) if field not in row]
        # Reversed: of several aliases in the row, the first counts.
        named = [(field, alias) for field in wanted for alias in reversed((field, *ALIASES.get(field, ())))]
        found = {field: spelled[alias] for field, alias in named if alias in spelled}
        if all(field in found for field in wanted if field not in optional):
            renames = ": rename " + " and ".join(f"'{alias}' to '{field}'" for field, alias in found.items())
            break
    if begun:
        problem = f"field '{next(field for field in schemas[begun[0]] if field not in row)}' is missing, or null"
    else:
        problem = "no field of a row in it, expected " + ", or ".join(_quoted(fields) for fields in schemas.values())
        problem += ", or 'messages'" if "instruction" in schemas else ""
    tables = [name for name, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if tables and not begun:
        is_chat = {"role", "from"} & row[tables[0]][0].keys()
        advice = "is a conversation: rename it to 'messages'" if is_chat else "should be the whole file"
        renames = f": the list in {tables[0]!r:.40} {advice}"
    names = ", ".join(f"{name!r:.40}" for name in [*row][:8]) or "no field that is not null"
    return f"{problem}; the row has {names}{renames}"


def _quoted(fields: tuple[str, ...]) -> str:
    return " and ".join(f"'{field}'" for field in fields)
