"""Tests of files/datasets: the accepted formats, and the messages about wrong files and rows."""

import csv
import datetime
import gzip
import json
import math
import random
import sys
from io import StringIO

import pytest

from minift.errors import UserError
from minift.files.datasets import (
    PAIR_SCHEMAS,
    PROMPT_SCHEMAS,
    SCORE_SCHEMAS,
    TRAINING_SCHEMAS,
    check_added,
    drop_rows_with_input,
    load_rows,
    split,
)
from minift.pairs import responses_of
from minift.prompts import question_of

ROW = {"instruction": "Add.", "input": "", "output": "3"}


def test_array_and_lines_give_the_same_rows(tmp_path):
    rows = [
        ROW,
        {"instruction": "a\u2028b\n\u0085", "input": "x", "output": "😀 \0", "family": 7, "meta": {"a": [None]}},
        {"instruction": "no input", "output": ""},
    ]
    for ensure_ascii in (True, False):
        lines = [json.dumps(row, ensure_ascii=ensure_ascii) for row in rows]
        files = {
            "pretty.json": json.dumps(rows, indent=3, ensure_ascii=ensure_ascii),
            "flat.json": json.dumps(rows, ensure_ascii=ensure_ascii),
            "lines.json": "\n".join(lines),
            "lines.jsonl": "\n\n".join(lines) + "\n \n",
            "windows.jsonl": "\ufeff" + "\r\n".join(lines) + "\r\n",
            "array.jsonl": f" [{','.join(lines)}] ",
        }
        for name, text in files.items():
            (tmp_path / name).write_bytes(text.encode())
            loaded = load_rows(tmp_path / name)
            assert loaded == rows, name
    assert [row.location for row in load_rows(tmp_path / "lines.jsonl")] == ["line 1", "line 3", "line 5"]
    assert [row.location for row in load_rows(tmp_path / "pretty.json")] == ["row 1", "row 2", "row 3"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": "b"},
        {"text": "a"},
        {"instruction": "a", "input": "", "output": "b", "text": "rendered", "prompt": "rendered"},
    ],
)
def test_each_schema(tmp_path, row):
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    assert load_rows(tmp_path / "data.jsonl") == [row]


def test_prompts_need_no_response(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"instruction": "a"}\n{"instruction": "b", "input": "c"}\n')
    assert load_rows(path, PROMPT_SCHEMAS) == [{"instruction": "a"}, {"instruction": "b", "input": "c"}]
    with pytest.raises(UserError, match="field 'output' is missing"):
        load_rows(path)


GOOD = '{"instruction": "a", "output": "b"}'
WRONG = [
    # (file name, content, the start of the message after the directory, another part of the message)
    ("d.jsonl", GOOD + '\n{"instruction": "a"}', "d.jsonl:2: field 'output' is missing", ""),
    (
        "d.jsonl",
        GOOD + '\n\n{"instruction": "a", "output": 3}',
        "d.jsonl:3: field 'output' is 3, expected a string",
        "",
    ),
    ("d.jsonl", '{"instruction": "a", "output": null}', "d.jsonl:1: field 'output' is missing, or null", ""),
    ("d.jsonl", '{"prompt": ["a"], "completion": "b"}', "d.jsonl:1: field 'prompt' is [\"a\"], expected", ""),
    ("d.jsonl", '{"prompt": "a"}', "d.jsonl:1: field 'completion' is missing", ""),
    ("d.jsonl", '{"instruction": "a", "text": "b"}', "d.jsonl:1: field 'output' is missing", ""),
    ("d.jsonl", '{"text": true}', "d.jsonl:1: field 'text' is true, expected", ""),
    ("d.jsonl", '{"question": "a"}', "d.jsonl:1: no field of a row", "'instruction' and 'output'"),
    ("d.jsonl", '"a"', 'd.jsonl:1: "a", expected an object', ""),
    ("d.jsonl", GOOD + '\n{"instruction": "a", "output": "b"', "d.jsonl:2:35: malformed JSON", ""),
    ("d.jsonl", GOOD + " " + GOOD, "d.jsonl:1:37: malformed JSON: Extra data", ""),
    ("d.jsonl", GOOD + '\n{"text": "a"}', "d.jsonl:2: this row has 'text'", "'instruction' and 'output'"),
    ("d.jsonl", '{"text": "ab\\ud800"}', "d.jsonl:1: field 'text' has a lone surrogate at character 3", "Unicode"),
    ("d.json", '[{"text": "\\udc00"}]', "d.json: row 1: field 'text' has a lone surrogate at character 1", "Unicode"),
    ("d.jsonl", '{"text": "a", "score": NaN}', "d.jsonl:1:24: malformed JSON: NaN", "expected an array"),
    ("d.jsonl", GOOD + "\n[]", "d.jsonl:2: [], expected an object", ""),
    ("d.jsonl", "[" * 100_000, "d.jsonl: malformed JSON", "nested too deeply"),
    ("d.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', "d.jsonl:2: not UTF-8", "0xe9"),
    ("d.jsonl", "", "d.jsonl: no rows", ""),
    ("d.json", "[]", "d.json: no rows", ""),
    ("d.json", f"[\n{GOOD},\n\n{{\n}}]", "d.json: row 2: no field of a row", ""),
    ("d.json", f'[\n{GOOD},\n{{"text":\n "a"}}]', "d.json: row 2: this row has 'text'", ""),
    ("d.json", f"[\n{GOOD},\n]", "d.json:3:1: malformed JSON" if sys.version_info < (3, 13) else "d.json:2:36", ""),
    ("d.json", f"[\n{GOOD}\n", "d.json:3:1: malformed JSON: Expecting ','", "expected an array"),
    ("d.json", f"[\n{GOOD}\n{GOOD}]", "d.json:3:1: malformed JSON: Expecting ','", "expected an array"),
    ("d.json", f"[{GOOD}]\n]", "d.json:2:1: malformed JSON: Extra data", ""),
    ("d.json", '[\n{"instruction": "a",\n "output" "b"}]', "d.json:3:11: malformed JSON", ""),
    ("d.json", f"[\n{GOOD},\n[1]]", "d.json: row 2: [1], expected", ""),
    ("d.json", "[\nInfinity]", "d.json:2:1: malformed JSON: Infinity", "expected an array"),
    (
        "d.json",
        '[\n{"text": "NaN \\\\\\"NaN"},\n{"text": "a", "score": [1e9, NaN]}]',
        "d.json:3:30: malformed JSON: NaN is not a JSON value",
        "",
    ),
    ("d.json", '[{"text": "a"},\n{"text": "b", "score": -1e999}]', "d.json:2:24: malformed JSON: -1e999 is too", ""),
    (
        "d.json",
        '{\n "data": [{}]\n}',
        "d.json: row 1: no field of a row",
        "the list in 'data' should be the whole file",
    ),
    (
        "d.jsonl",
        '{"dialog": [{"role": "user", "content": "Hi"}]}',
        "d.jsonl:1: no field of a row",
        "the list in 'dialog' is a conversation: rename it to 'messages'",
    ),
    (
        "d.jsonl",
        '{"Instruction": "a", "Response": "b"}',
        "d.jsonl:1: no field of a row",
        "rename 'Instruction' to 'instruction' and 'Response' to 'output'",
    ),
    ("d.json", '{"data": [{}]}', "d.json:1: no field of a row", "the list in 'data' should be the whole file"),
    ("d.json", f"{{\n{GOOD}\n}}", "d.json:2:1: malformed JSON", "array of objects, or one object a line"),
    ("d.jsonl", '{"text": "a", "score": 1e999}', "d.jsonl:1:24: malformed JSON: 1e999 is too large a number", ""),
    ("d.jsonl", '{"text": "a", "kind": "b\\ud800"}', "d.jsonl:1: field 'kind' has a lone surrogate at character 2", ""),
    ("d.jsonl", '{"text": "a", "kind": ["\\ud800"]}', "d.jsonl:1: field 'kind' has a lone surrogate", ""),
    (
        "d.jsonl",
        '{"instruction": "a", "context": "b", "answer": "c"}',
        "d.jsonl:1: field 'output' is missing",
        "the row has 'instruction', 'context', 'answer': rename 'answer' to 'output' and 'context' to 'input'",
    ),
    (
        "d.jsonl",
        '{"question": "a", "answer": "c"}',
        "d.jsonl:1: no field of a row in it",
        "the row has 'question', 'answer': rename 'question' to 'instruction' and 'answer' to 'output'",
    ),
    ("d.jsonl", '{"prompt": "a", "response": "c"}', "d.jsonl:1: field 'completion' is", "rename 'response' to 'comp"),
    (
        "d.jsonl",
        '{"input": "a", "output": "c"}',
        "d.jsonl:1: field 'instruction' is",
        "rename 'input' to 'instruction'",
    ),
    ("d.jsonl", '{"a": null}', "d.jsonl:1: no field of a row in it", "the row has no field that is not null"),
    ("d.jsonl.gz", gzip.compress(b"{}", mtime=0)[:-3], "d.jsonl.gz: truncated or damaged gzip", ""),
    ("d.jsonl.gz", b"\x1f\x8b\x08 no", "d.jsonl.gz: truncated or damaged gzip", ""),
    ("d.tsv", "a,b", "d.tsv: expected a .json, .jsonl, .csv or .parquet file", ""),
    ("d.csv", "", "d.csv: no rows in it, expected a line of names", ""),
    ("d.csv", "instruction,output\n", "d.csv: no rows in it", ""),
    ("d.csv", "instruction,output\na,b\n\nc\n", "d.csv:4: 1 fields, expected the 2 that the header names", ""),
    ("d.csv", 'instruction,output\n"a\n\n",b\nc,d,e', "d.csv:5: 3 fields, expected the 2", "with a comma"),
    ("d.csv", 'instruction,output\na,b\n"c,d\n\n', "d.csv:3: malformed CSV: unexpected end of data", "needs quotes"),
    ("d.csv", 'instruction,output\n"a" b,c\n', "d.csv:2: malformed CSV: ',' expected after", "its own doubled"),
    ("d.csv", "output,output\na,b\n", "d.csv:1: two fields have the name 'output'", ""),
    ("d.csv", "instruction;output\na;b\n", "d.csv:2: no field of a row in it", "the row has 'instruction;output'"),
    ("d.csv", b"instruction,output\na,\xe9\n", "d.csv:2: not UTF-8 text (byte 0xe9)", ""),
    ("d.csv.gz", gzip.compress(b"text\na", mtime=0)[:-3], "d.csv.gz: truncated or damaged gzip", ""),
]


@pytest.mark.parametrize(("name", "content", "start", "also"), WRONG)
def test_wrong_files_are_named_by_line_and_field(tmp_path, name, content, start, also):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        load_rows(path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/{start}") and also in message and "\n" not in message


def test_objects_over_several_lines_one_after_the_other(tmp_path):
    """As `jq .` prints them."""
    rows = [{"instruction": "a", "output": text} for text in ("b", "{\n}", "\u2028")]
    path = tmp_path / "data.jsonl"
    for blank in ("\n", "", "\r\n\n"):
        path.write_text(blank.join(json.dumps(row, indent=2) for row in rows) + blank)
        loaded = load_rows(path)
        assert loaded == rows and [row.location for row in loaded] == ["row 1", "row 2", "row 3"]
    path.write_text("\n".join(json.dumps(row, indent=2) for row in rows)[:-1])
    with pytest.raises(UserError, match="data.jsonl:12:.*malformed JSON: Expecting"):
        load_rows(path)


def test_null_is_absent_everywhere(tmp_path):
    row = {"instruction": None, "prompt": "a", "completion": "b", "text": None, "meta": {"x": None, "y": [{"z": None}]}}
    expected = {"prompt": "a", "completion": "b", "meta": {"y": [{}]}}
    for name, text in (
        ("a.jsonl", json.dumps(row)),
        ("a.json", json.dumps([row])),
        ("b.json", json.dumps(row, indent=1)),
    ):
        (tmp_path / name).write_text(text)
        assert load_rows(tmp_path / name) == [expected]
    row = {"prompt": None, "chosen": "a", "rejected": "b", "responses": None, "instruction": "c", "input": None}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    assert load_rows(tmp_path / "pairs.jsonl", PAIR_SCHEMAS) == [{"chosen": "a", "rejected": "b", "instruction": "c"}]
    with pytest.raises(UserError, match="no field of a row"):
        (tmp_path / "a.jsonl").write_text('{"text": null}')
        load_rows(tmp_path / "a.jsonl")


def test_files_that_are_compressed_or_one_indented_object(tmp_path):
    lines = f"{json.dumps(ROW)}\n{json.dumps(ROW)}\n".encode()
    for name, content in (
        ("a.jsonl.gz", gzip.compress(lines)),
        ("a.json.gz", gzip.compress(json.dumps([ROW, ROW]).encode())),
        ("a.jsonl", gzip.compress(lines[:30]) + gzip.compress(lines[30:])),
    ):
        (tmp_path / name).write_bytes(content)
        assert load_rows(tmp_path / name) == [ROW, ROW]
    (tmp_path / "one.json").write_text(json.dumps(ROW, indent=4))
    assert load_rows(tmp_path / "one.json") == [ROW]


def test_csv(tmp_path):
    """Quotes, commas, quotes and line ends in a field, a byte order mark, CRLF, pandas' column without a name."""
    rows = [
        {"": "0", "instruction": 'Say "hi", then\nbye.\r\n', "input": "", "output": "1,5"},
        {"": "1", "instruction": "é\u2028 'x'", "input": " ", "output": "\0"},
        {"": "2", "instruction": "a" * 200_000, "input": "null", "output": "3"},  # csv's own limit is 131,072
    ]
    for encoding, end in (("utf-8", "\n"), ("utf-8-sig", "\r\n"), ("utf-8", "\r")):
        text = StringIO(newline="")
        writer = csv.DictWriter(text, [*rows[0]], lineterminator=end)
        writer.writeheader()
        writer.writerows(rows)
        content = (text.getvalue() + end * 2).encode(encoding)
        for name in ("rows.csv", "rows.csv.gz"):
            (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
            loaded = load_rows(tmp_path / name)
            assert loaded == rows and [row.location for row in loaded] == ["line 2", "line 5", "line 6"]
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\na,b,c\n")
    assert load_rows(tmp_path / "pairs.csv", PAIR_SCHEMAS) == [{"prompt": "a", "chosen": "b", "rejected": "c"}]


@pytest.mark.parametrize(
    "row, schemas, wrong",
    [
        # The field that is used is the one that is checked; the others may hold anything.
        ({"instruction": "a", "prompt": 3}, PROMPT_SCHEMAS, "prompt"),
        ({"instruction": 3, "prompt": "a"}, PROMPT_SCHEMAS, None),
        ({"instruction": "a", "output": "b", "prompt": 3}, PROMPT_SCHEMAS, None),
        ({"instruction": 3, "output": "b", "prompt": "a"}, PROMPT_SCHEMAS, "instruction"),
        ({"instruction": 3, "prompt": "a", "completion": "b", "input": 3}, TRAINING_SCHEMAS, None),
        ({"instruction": "a", "output": "b", "prompt": 3, "completion": "b"}, TRAINING_SCHEMAS, None),
        ({"instruction": "a", "prompt": 3, "chosen": "b", "rejected": "c"}, PAIR_SCHEMAS, "prompt"),
        ({"instruction": "a", "input": 3, "chosen": "b", "rejected": "c"}, PAIR_SCHEMAS, "input"),
        ({"chosen": "b", "rejected": "c", "responses": 3}, PAIR_SCHEMAS, None),
        ({"chosen": 3, "responses": ["b", "c"]}, PAIR_SCHEMAS, None),
        ({"instruction": 3, "prompt": "a", "response": "b"}, SCORE_SCHEMAS, None),
        ({"instruction": "a", "output": "", "prompt": 3, "response": "b"}, SCORE_SCHEMAS, None),
    ],
)
def test_rows_that_fit_two_schemas(tmp_path, row, schemas, wrong):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    if wrong is not None:
        with pytest.raises(UserError, match=f":1: field '{wrong}' is 3, expected a string"):
            load_rows(path, schemas)
        return
    (loaded,) = load_rows(path, schemas)
    question = question_of(loaded)
    assert all(isinstance(text, str) for text in question.values()) if question else "chosen" in row
    if schemas is PAIR_SCHEMAS:
        assert responses_of(loaded) == ["b", "c"]


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_rows(tmp_path / "data.json")
    with pytest.raises(UserError, match="a directory"):
        load_rows(tmp_path)


@pytest.fixture
def parquet(tmp_path):
    """Return a function that writes rows to a local .parquet file and returns its path."""
    pyarrow = pytest.importorskip("pyarrow", reason="the parquet extra is not installed")
    from pyarrow.parquet import write_table

    def write(rows: list[dict]):
        write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=2)
        return tmp_path / "rows.parquet"

    return write


def test_a_local_parquet_file(parquet):
    rows = [{"prompt": f"a{n}", "chosen": "b\u2028", "rejected": "", "margin": n / 2} for n in range(5)]
    loaded = load_rows(parquet(rows), PAIR_SCHEMAS)
    assert loaded == rows and [row.location for row in loaded] == [f"row {n}" for n in range(1, 6)]


def test_values_that_json_cannot_represent_become_text(parquet):
    row = {"text": "ä".encode(), "when": datetime.date(2022, 5, 2), "raw": b"\xff", "list": [1, 2]}
    assert load_rows(parquet([row])) == [{"text": "ä", "when": "2022-05-02", "raw": "\udcff", "list": [1, 2]}]
    with pytest.raises(UserError, match="row 1: field 'text' has a lone surrogate at character 1"):
        load_rows(parquet([{"text": b"\xff"}]))


def test_nan_of_parquet_is_null(parquet):
    """pandas fills absent numbers with NaN, which JSON does not have: it was written and could not be read again."""
    rows = [{"text": "a", "margin": math.nan, "list": [1.0, math.inf], "in": {"x": math.nan}, "n": 0.1}]
    assert load_rows(parquet(rows)) == [{"text": "a", "list": [1.0, None], "in": {}, "n": 0.1}]


def test_what_parquet_fills_with_null_is_absent(parquet):
    pair, ranking = {"chosen": "a", "rejected": "b", "prompt": "p"}, {"prompt": "p", "responses": ["a", "b"]}
    columns = ("chosen", "rejected", "prompt", "responses")
    path = parquet([{name: row.get(name) for name in columns} for row in (pair, ranking)])
    assert load_rows(path, PAIR_SCHEMAS, mixed=True) == [pair, ranking]


def test_wrong_parquet_files(parquet, tmp_path, monkeypatch):
    path = parquet([{"instruction": "a", "output": "b"}, {"instruction": "c", "output": None}])
    with pytest.raises(UserError, match="rows.parquet: row 2: field 'output' is missing, or null"):
        load_rows(path)
    whole = path.read_bytes()
    for damaged in (b"", b"PAR1", whole[:-1], whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="rows.parquet: unreadable, truncated or damaged parquet") as caught:
            load_rows(path)
        assert "\n" not in str(caught.value)
    import pyarrow
    from pyarrow.parquet import write_table

    latin1 = pyarrow.array(["é".encode("latin-1")], pyarrow.binary())
    text = pyarrow.StringArray.from_buffers(1, *latin1.buffers()[1:])
    write_table(pyarrow.table({"text": text}), path)
    with pytest.raises(UserError, match="rows.parquet: unreadable, truncated or damaged parquet.*utf-8"):
        load_rows(path)
    for name in ("nowhere.parquet", "someone/nowhere.parquet"):
        with pytest.raises(UserError, match=f"{name}: no such file"):
            load_rows(name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pyarrow: pip install -e '.\[parquet\]'"):
        load_rows(path)


def test_rows_that_cannot_be_written_with_another_field(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "id": "b\\ud800"}\n{"text": "a", "score": 1}\n')
    rows = load_rows(path)  # nobody writes these fields
    with pytest.raises(UserError, match="line 1: field 'id' has a lone surrogate at character 2"):
        check_added(rows, ["score"], "rows.jsonl")
    with pytest.raises(UserError, match="^rows.jsonl: line 2: the row has a field 'score'"):
        check_added(rows[1:], ["score"], "rows.jsonl")
    path.write_text('{"text": "a", "b\\udc00": 3}')
    with pytest.raises(UserError, match=r"field 'b\\udc00' has a lone surrogate"):
        check_added(load_rows(path), [], "rows.jsonl")


def test_drop_rows_with_input(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([ROW, {**ROW, "input": "x"}, {**ROW, "input": " "}, ROW]))
    rows = load_rows(path)
    assert [row.location for row in drop_rows_with_input(rows)] == ["row 1", "row 4"]
    with pytest.raises(UserError, match="--no-input-only: all of the 2 rows"):
        drop_rows_with_input(rows[1:3])


def lists(parts):
    return tuple(part.tolist() for part in parts)


def test_split_is_the_lab_s_row_for_row():
    """Recorded from datasets 5.2.0, for each (n, fraction, seed):

    d = Dataset.from_dict({"i": range(n)}).shuffle(seed=seed).train_test_split(fraction, seed=seed)
    print(list(d["train"]["i"]), list(d["test"]["i"]))
    """
    assert lists(split(20, 0.2, 42)) == ([11, 16, 6, 8, 7, 15, 17, 10, 5, 13, 14, 12, 1, 9, 18, 3], [4, 0, 2, 19])
    assert lists(split(13, 0.1, 7)) == ([6, 3, 4, 8, 5, 7, 11, 0, 1, 2, 9], [10, 12])
    # The lab's published log: 7,811 training rows.
    assert len(split(9764, 0.2, 42)[0]) == 7811


def test_split_against_datasets_itself():
    datasets = pytest.importorskip("datasets", reason="the datasets package is not installed")
    rng = random.Random(0)
    for _ in range(5):
        n, fraction, seed = rng.randrange(2, 300), rng.uniform(0.01, 0.5), rng.randrange(100)
        both = (
            datasets.Dataset.from_dict({"i": list(range(n))}).shuffle(seed=seed).train_test_split(fraction, seed=seed)
        )
        assert lists(split(n, fraction, seed)) == (list(both["train"]["i"]), list(both["test"]["i"]))


def test_split_edges():
    assert lists(split(3, 0, 42)) == ([0, 1, 2], [])
    for fraction in (-0.1, 1, 1.5, float("nan")):
        with pytest.raises(UserError, match="--eval-fraction"):
            split(10, fraction, 42)
    with pytest.raises(UserError, match="--eval-fraction 0.9: holds out 5 of 5 rows"):
        split(5, 0.9, 42)
