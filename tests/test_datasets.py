"""Tests of files/datasets: the accepted formats, and the messages about wrong files and rows."""

import datetime
import json
import random
import sys

import pytest

from minift.errors import UserError
from minift.files.datasets import PAIR_SCHEMAS, PROMPT_SCHEMAS, drop_rows_with_input, load_rows, split

ROW = {"instruction": "Add.", "input": "", "output": "3"}


def test_array_and_lines_give_the_same_rows(tmp_path):
    rows = [
        ROW,
        {"instruction": "a\u2028b\n\u0085", "input": "x", "output": "😀 \0", "family": 7, "kind": None},
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
    ("d.jsonl", '{"instruction": "a", "input": null, "output": "b"}', "d.jsonl:1: field 'input' is null", ""),
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
    ("d.jsonl", '{"text": "a", "score": NaN}', "d.jsonl:1: malformed JSON: NaN", "expected an array"),
    ("d.jsonl", GOOD + "\n[]", "d.jsonl:2: [], expected an object", ""),
    ("d.jsonl", "[" * 100_000, "d.jsonl: malformed JSON", "recursion"),
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
    ("d.json", "[\nInfinity]", "d.json: malformed JSON: Infinity", "expected an array"),
    ("d.json", '{\n "data": []}', "d.json:1:2: malformed JSON", "array of objects, or one object a line"),
    ("d.csv", "a,b", "d.csv: expected a .json, .jsonl or .parquet file", ""),
]


@pytest.mark.parametrize(("name", "content", "start", "also"), WRONG)
def test_wrong_files_are_named_by_line_and_field(tmp_path, name, content, start, also):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        load_rows(path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/{start}") and also in message and "\n" not in message


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_rows(tmp_path / "data.json")
    with pytest.raises(UserError, match="a directory"):
        load_rows(tmp_path)


@pytest.fixture
def parquet(tmp_path):
    """A function that writes rows to a local .parquet file and returns its path."""
    pyarrow = pytest.importorskip("pyarrow", reason="the parquet extra is not installed")
    from pyarrow.parquet import write_table

    def write(rows: list[dict]):
        write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=2)
        return tmp_path / "rows.parquet"

    return write


def test_a_local_parquet_file(parquet):
    rows = [{"prompt": f"a{n}", "chosen": "b\u2028", "rejected": "", "margin": n / 2, "kind": None} for n in range(5)]
    loaded = load_rows(parquet(rows), PAIR_SCHEMAS)
    assert loaded == rows and [row.location for row in loaded] == [f"row {n}" for n in range(1, 6)]


def test_values_that_json_cannot_represent_become_text(parquet):
    row = {"text": "ä".encode(), "when": datetime.date(2022, 5, 2), "raw": b"\xff", "list": [1, 2]}
    assert load_rows(parquet([row])) == [{"text": "ä", "when": "2022-05-02", "raw": "\udcff", "list": [1, 2]}]
    with pytest.raises(UserError, match="row 1: field 'text' has a lone surrogate at character 1"):
        load_rows(parquet([{"text": b"\xff"}]))


def test_wrong_parquet_files(parquet, tmp_path, monkeypatch):
    path = parquet([{"instruction": "a", "output": "b"}, {"instruction": "c", "output": None}])
    with pytest.raises(UserError, match="rows.parquet: row 2: field 'output' is null, expected a string"):
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


def test_drop_rows_with_input(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([ROW, {**ROW, "input": "x"}, {**ROW, "input": " "}, ROW]))
    rows = load_rows(path)
    assert [row.location for row in drop_rows_with_input(rows)] == ["row 1", "row 4"]
    with pytest.raises(UserError, match="--no-input-only: all of the 2 rows"):
        drop_rows_with_input(rows[1:3])


def test_split_is_the_lab_s_row_for_row():
    """Recorded from datasets 5.2.0, for each (n, fraction, seed):

    d = Dataset.from_dict({"i": range(n)}).shuffle(seed=seed).train_test_split(fraction, seed=seed)
    print(list(d["train"]["i"]), list(d["test"]["i"]))
    """
    assert split(20, 0.2, 42) == ([11, 16, 6, 8, 7, 15, 17, 10, 5, 13, 14, 12, 1, 9, 18, 3], [4, 0, 2, 19])
    assert split(13, 0.1, 7) == ([6, 3, 4, 8, 5, 7, 11, 0, 1, 2, 9], [10, 12])
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
        assert split(n, fraction, seed) == (list(both["train"]["i"]), list(both["test"]["i"]))


def test_split_edges():
    assert split(3, 0, 42) == ([0, 1, 2], [])
    for fraction in (-0.1, 1, 1.5, float("nan")):
        with pytest.raises(UserError, match="--eval-fraction"):
            split(10, fraction, 42)
    with pytest.raises(UserError, match="--eval-fraction 0.9: holds out 5 of 5 rows"):
        split(5, 0.9, 42)
