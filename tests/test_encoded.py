"""Tests of files/encoded: rows encoded on disk are those encoded in memory, and a cache is never taken for another."""

import csv
import errno
import gzip
import json
import os
import shutil
import signal
import time
import tracemalloc
from functools import partial
from pathlib import Path
from unittest import mock

import numpy
import pyarrow
import pytest
import tokenizers
from pyarrow import parquet

from minift.batching import Loader, collate
from minift.encode import Example, encode_rows
from minift.errors import UserError
from minift.files import encoded
from minift.files.datasets import PAIR_SCHEMAS, TRAINING_SCHEMAS, load_rows, split
from minift.files.encoded import Encode, EncodedFile, encoded_file
from minift.files.text import sha256
from minift.files.tokenizer import load_tokenizer
from minift.pairs import encode_rankings
from minift.prompts import TEMPLATES, Template
from minift.remarks import Encoded
from minift.run.folder import Run
from minift.run.setup import group_by_chosen, swap_half
from tests.runs import TINY, assert_same_run, few_rows, refused, run, snapshot, task_of, user_error, write_lines

COUNT = 2 * encoded.CHUNK + 9  # rows of several chunks, the last one short


@pytest.fixture
def encode(tokenizer) -> Encode:
    return partial(encode_rows, tokenizer=tokenizer, template=TEMPLATES["course"], max_length=40)


def instructions(count: int) -> list[dict]:
    """Return rows about which there are many remarks: some are cut, dropped, renamed, empty, or read in part."""
    rows = [{"instruction": f"Add {n} and 1.", "input": "x" * (n % 3), "output": "y" * (n % 4)} for n in range(count)]
    for n in range(0, count, 7):
        rows[n]["instruction"] += " Then wait." * (n % 40)  # too long: cut, or nothing supervised is left
    for n in range(3, count, 11):
        rows[n] = {"conversations": [{"from": "human", "value": f"Hi {n}"}, {"from": "gpt", "value": "Ho</s>!"}]}
    for n in range(5, count, 13):
        rows[n]["system"] = "Be kind."
    return rows


def build(cache: Path, data: Path, encode: Encode, schemas=TRAINING_SCHEMAS, **settings) -> EncodedFile:
    settings = {"without_input": False, **settings}
    return encoded_file(cache, str(data), schemas, encode, fingerprint=sha256([data]), **settings)


def assert_same(part: Encoded, expected: Encoded) -> None:
    assert part.summary == expected.summary
    assert (part.noun, part.num_rows, part.tokens) == (expected.noun, expected.num_rows, expected.tokens)
    assert [*part.examples] == expected.examples and [*part.indices] == expected.indices
    assert [*part.rows] == expected.rows and part.categories == expected.categories
    assert [row.location for row in part.rows] == [row.location for row in expected.rows]
    assert {text: [*locations] for text, locations in part.remarks.items()} == expected.remarks
    assert [*part.remarks] == [*expected.remarks]


def as_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n\n" for row in rows).encode()


def as_csv(rows: list[dict], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["instruction", "input", "output", "system"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows({"instruction": "a\nb", "output": "c", **row} for row in rows)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet"])
def test_rows_are_those_encoded_in_memory(tmp_path, encode, capsys, name):
    path, rows = tmp_path / name, instructions(COUNT)
    if name == "a.parquet":
        parquet.write_table(
            pyarrow.Table.from_pylist([{"system": None, "conversations": None, **row} for row in rows]), path
        )
    elif name == "a.csv":
        as_csv(rows, path)
    elif name == "a.json":
        path.write_text(json.dumps(rows))
    else:
        path.write_bytes(gzip.compress(as_lines(rows)) if name.endswith(".gz") else as_lines(rows))
    file = build(tmp_path / "cache", path, encode)
    made = capsys.readouterr().err
    loaded = load_rows(path)
    notes = capsys.readouterr().err
    assert made.endswith(notes) and ("is read as" in notes) == (name != "a.csv")
    for part, source in zip(split(len(file), 0.3, 42), ("train", "held out"), strict=True):
        expected = encode([loaded[index] for index in part], source=source)
        assert_same(file.part(part, source), expected)
        assert len(expected.remarks) >= 3
    assert_same(file.part(numpy.arange(0), "none"), encode([], source="none"))
    # The second time it is only opened.
    with mock.patch.object(encoded, "_make", side_effect=AssertionError):
        assert len(build(tmp_path / "cache", path, encode)) == len(loaded)
    assert capsys.readouterr().err == notes


def test_text_rows_without_their_marker_have_the_same_causes(tmp_path, encode):
    texts = [f"Q {n}\n### response: yes" if n % 3 else f"### Response:\n{n}" for n in range(40)]
    path = write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    file, rows = build(tmp_path / "cache", path, encode), load_rows(path)
    order = numpy.arange(40)[::-1]
    assert_same(file.part(order, "s"), encode([rows[index] for index in order], source="s"))
    assert "it differs in case and in spaces" in file.part(order, "s").summary
    none = numpy.array([1, 2, 4, 5])
    of_memory = user_error(encode, [rows[index] for index in none], source="s")
    assert "none of its 4 rows has a supervised token" in of_memory == user_error(file.part, none, "s")


@pytest.mark.parametrize("longest", [2, 3])
def test_pairs_and_rankings(tmp_path, tokenizer, longest):
    encode = partial(
        encode_rankings, tokenizer=tokenizer, template=TEMPLATES["dialogue"], max_length=30, margin_field="m"
    )
    rows = [
        {
            "prompt": f"Say {n}",
            "responses": ["yes", f"no {n % 5}" * (1 + n % 9), "no 0"][: 2 + n % (longest - 1)],
            "m": n / 3,
        }
        for n in range(60)
    ]
    path = write_lines(tmp_path / "pairs.jsonl", rows)
    file, loaded = build(tmp_path / "cache", path, encode, PAIR_SCHEMAS), load_rows(path, PAIR_SCHEMAS)
    for part in (*split(60, 0.5, 1), numpy.arange(0), numpy.arange(0, 60, 2)):
        assert_same(file.part(part, "s"), encode([loaded[index] for index in part], source="s"))
    assert file.part(numpy.arange(60), "s").noun == ("pair" if longest == 2 else "ranking")


def test_rows_with_an_input_are_left_out_before_the_split(tmp_path, tokenizer):
    template = Template("no input", "{instruction}: {response}", "{instruction}: {response}")  # an error for an input
    encode = partial(encode_rows, tokenizer=tokenizer, template=template, max_length=40)
    path = write_lines(tmp_path / "rows.jsonl", instructions(50))
    file = build(tmp_path / "cache", path, encode, without_input=True)
    rows = [row for row in load_rows(path) if not row.get("input")]
    assert 0 < len(file) == len(rows) < 50
    assert_same(file.part(numpy.arange(len(rows)), "s"), encode(rows, source="s"))
    assert "it has no {input}" in user_error(build, tmp_path / "cache", path, encode)
    path = write_lines(path, [{"instruction": "a", "input": "b", "output": "c"}] * 2)
    assert user_error(build, tmp_path / "cache", path, encode, without_input=True).startswith("--no-input-only: all of")


def test_nothing_else_is_ever_taken_for_a_data_set(tmp_path, encode, tokenizer, tokenizer_directory, monkeypatch):
    data = write_lines(tmp_path / "rows.jsonl", instructions(9))
    cache = tmp_path / "cache"

    def made(path: Path, encode: Encode, **settings: bool) -> int:
        """Return how many data sets are made for this one: 0 or 1."""
        before = {*cache.iterdir()} if cache.exists() else set()
        build(cache, path, encode, **settings)
        return len({*cache.iterdir()} - before)

    def other(**options: object) -> Encode:
        return partial(encode_rows, **{**encode.keywords, **options})

    assert made(data, encode) == 1
    named = Template("renamed", TEMPLATES["course"].with_input, TEMPLATES["course"].without_input)
    assert made(data, encode) == made(data, other(template=named)) == 0
    os.utime(data, (1, 1))  # the content counts
    assert made(data, encode) == made(data, other(tokenizer=load_tokenizer(tokenizer_directory))) == 0

    times = data.stat()
    data.write_bytes(data.read_bytes().replace(b"Add 1 and", b"Add 9 and"))
    os.utime(data, (times.st_atime, times.st_mtime))
    assert made(data, encode) == 1
    assert made(data.rename(tmp_path / "rows.json"), encode) == 1
    data = tmp_path / "rows.json"
    for options in (
        {"template": TEMPLATES["alpaca"]},
        {"max_length": 39},
        {"max_length": None},
        {"supervise": "all"},
        {"response_template": "A:"},
    ):
        assert made(data, other(**options)) == 1, options
    assert made(data, encode, without_input=True) == 1

    changed = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_directory, changed)
    merges = (changed / "merges.txt").read_text().splitlines()
    (changed / "merges.txt").write_text("\n".join([merges[0], *merges[:0:-1]]))
    assert made(data, other(tokenizer=load_tokenizer(changed))) == 1
    shutil.copytree(tokenizer_directory, changed, dirs_exist_ok=True)
    settings = json.loads((changed / "tokenizer_config.json").read_text())
    (changed / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<unk>"}))
    assert made(data, other(tokenizer=load_tokenizer(changed))) == 1

    monkeypatch.setattr(tokenizers, "__version__", "0.0.0")
    assert made(data, encode) == 1
    code = tmp_path / "minift" / "files"
    code.mkdir(parents=True)
    monkeypatch.setattr(encoded, "__file__", str(code / "encoded.py"))
    for path in (code / "datasets.py", code.parent / "encode.py"):
        path.write_text("1\n")
        assert made(data, encode) == 1
        path.write_text("2\n")
        assert made(data, encode) == 1


def test_other_data_sets_of_the_same_file_are_named_and_kept(tmp_path, encode, capsys):
    """A folder grew for ever, and nothing said so."""
    cache = tmp_path / "cache"
    data = write_lines(tmp_path / "rows.jsonl", instructions(9))
    build(cache, write_lines(tmp_path / "heldout.jsonl", instructions(3)), encode)  # of another file: not named
    build(cache, data, encode)
    assert " other encoding" not in capsys.readouterr().err
    [first] = [path for path in cache.iterdir() if b"rows.jsonl" in (path / "about.json").read_bytes()]
    before = snapshot(cache)
    write_lines(data, instructions(10))
    build(cache, data, encode)
    size = sum(path.stat().st_size for path in first.iterdir()) / 1e6
    said = capsys.readouterr().err
    assert f"\n{cache}: 1 other encoding of rows.jsonl here, {size:.1f} MB: " in said and f": {first.name}\n" in said
    assert before.items() <= snapshot(cache).items()
    build(cache, data, encode)  # only opened
    assert " other encoding" not in capsys.readouterr().err


@pytest.mark.parametrize("name", [*encoded.FILES, "about.json"])
@pytest.mark.parametrize("damage", ["truncated", "changed", "deleted"])
def test_a_damaged_file_is_named(tmp_path, encode, name, damage):
    data = write_lines(tmp_path / "rows.jsonl", instructions(30))
    expected = [*build(tmp_path / "cache", data, encode).part(numpy.arange(30), "s").examples]
    [folder] = (tmp_path / "cache").iterdir()
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-3] if damage == "truncated" else b"!" + content[1:])
    if damage == "deleted":
        (folder / name).unlink()
    message = user_error(build, tmp_path / "cache", data, encode)
    assert str(folder / name) in message and message.endswith(f"delete {folder}, and the data will be encoded again")
    shutil.rmtree(folder)
    assert [*build(tmp_path / "cache", data, encode).part(numpy.arange(30), "s").examples] == expected


def test_no_changed_byte_goes_unnoticed(tmp_path, encode):
    """In about.json, the texts of remarks once had no checksum."""
    data = write_lines(tmp_path / "rows.jsonl", instructions(30))
    expected = encode(load_rows(data), source="s")
    build(tmp_path / "cache", data, encode)
    [folder] = (tmp_path / "cache").iterdir()
    for path in folder.iterdir():
        content = path.read_bytes()
        for at in range(0, len(content), 1 + len(content) // 12):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            try:
                assert_same(build(tmp_path / "cache", data, encode).part(numpy.arange(30), "s"), expected)
            except UserError as error:
                assert f"delete {folder}" in str(error)
        path.write_bytes(content)


def test_a_wrong_row_is_named_as_in_memory(tmp_path, encode):
    rows = instructions(COUNT)
    for row, value in ((COUNT - 1, 7), (0, None)):
        path = write_lines(
            tmp_path / "rows.jsonl", [{**r, "output": value} if n == row else r for n, r in enumerate(rows)]
        )
        message = user_error(build, tmp_path / "cache", path, encode)
        assert message == user_error(load_rows, path) and f"{path}:{row + 1}:" in message
    # One that is only found to be wrong when it is encoded, in another process.
    path = write_lines(tmp_path / "rows.jsonl", [{"text": "### Response:"}] * COUNT)
    no_marker = partial(encode_rows, **{**encode.keywords, "template": TEMPLATES["none"]})
    assert user_error(build, tmp_path / "cache", path, no_marker) == user_error(no_marker, load_rows(path))
    assert not [*(tmp_path / "cache").iterdir()]


def test_a_full_disk_leaves_nothing(tmp_path, encode, monkeypatch):
    data = write_lines(tmp_path / "rows.jsonl", instructions(COUNT))
    write = encoded.append_bytes
    calls = []

    def full(path: Path, part: bytes) -> None:
        calls.append(path)
        if len(calls) == 7:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, part)

    monkeypatch.setattr(encoded, "append_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        build(tmp_path / "cache", data, encode)
    assert not [*(tmp_path / "cache").iterdir()]


def in_child(function) -> int:
    """Run a function in a forked process; return the process's number."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child


def status(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_killed_process_leaves_nothing_that_is_used(tmp_path, encode, monkeypatch):
    """And its helpers end with it: they would otherwise wait for work for ever."""
    data, cache = write_lines(tmp_path / "rows.jsonl", instructions(COUNT)), tmp_path / "cache"

    def encode_slowly(rows, **settings) -> Encoded:
        Path(tmp_path, f"process {os.getpid()}").touch()
        time.sleep(0.001)
        return encode_rows(rows, **encode.keywords, **settings)

    child = in_child(lambda: build(cache, data, partial(encode_slowly)))
    while not (helpers := [*tmp_path.glob("process *")]):
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert status(child) == -signal.SIGKILL
    [unfinished] = cache.iterdir()
    assert unfinished.name.endswith(encoded.UNFINISHED)
    processes = [int(helper.name.split()[1]) for helper in helpers]
    deadline = time.monotonic() + 60
    while any(map(is_running, processes)) and time.monotonic() < deadline:
        time.sleep(0.01)
    left = [process for process in processes if is_running(process)]
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert not left
    build(cache, data, encode)
    assert not unfinished.exists() and len([*cache.iterdir()]) == 1


def is_running(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().split()[2] != "Z"


def test_a_lost_helper_is_the_machine_s_fault(tmp_path, encode):
    data = write_lines(tmp_path / "rows.jsonl", instructions(COUNT))
    with pytest.raises(OSError, match="a process that encoded rows has ended"):
        build(tmp_path / "cache", data, partial(lambda rows, **settings: os._exit(1)))
    assert not [*(tmp_path / "cache").iterdir()]


def test_ctrl_c_at_the_fork_is_not_lost(tmp_path, encode):
    """The run went on as if nothing had happened, or ended as one that the machine had failed."""
    data = write_lines(tmp_path / "rows.jsonl", instructions(COUNT))

    def interrupted() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        press = partial(signal.raise_signal, signal.SIGINT)
        os.register_at_fork(after_in_parent=press, after_in_child=press)  # Ctrl-C goes to all processes
        try:
            build(tmp_path / "cache", data, encode)
        except KeyboardInterrupt:
            os._exit(130)

    assert status(in_child(interrupted)) == 130
    assert not [*(tmp_path / "cache").iterdir()]


def test_several_processes_make_one_data_set(tmp_path, encode, capfd):
    data, cache = write_lines(tmp_path / "rows.jsonl", instructions(COUNT)), tmp_path / "cache"
    children = [in_child(lambda: build(cache, data, encode)) for _ in range(3)]
    assert [status(child) for child in children] == [0, 0, 0]
    assert len([*cache.iterdir()]) == 1
    assert capfd.readouterr().err.count(f"{COUNT:,} rows]") == 1  # only one of them encoded


def test_the_other_ranks_wait_for_the_first(tmp_path, encode):
    data, cache = write_lines(tmp_path / "rows.jsonl", instructions(9)), tmp_path / "cache"
    child = in_child(lambda: time.sleep(0.2) or build(cache, data, encode))
    with mock.patch.object(encoded, "_make", side_effect=AssertionError):
        assert len(build(cache, data, encode, waits=True)) == 9
    assert status(child) == 0


def test_data_that_changes_while_it_is_read_is_refused(tmp_path, encode, monkeypatch):
    data = write_lines(tmp_path / "rows.jsonl", instructions(9))
    stream = encoded.stream_rows

    def append(*arguments, **settings):
        with data.open("a") as file:
            file.write(json.dumps({"instruction": "new", "output": "row"}) + "\n")
        return stream(*arguments, **settings)

    monkeypatch.setattr(encoded, "stream_rows", append)
    assert "has changed while it was read" in user_error(build, tmp_path / "cache", data, encode)
    assert not [*(tmp_path / "cache").iterdir()]


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(encoded, "CHUNK", 8)

    def tiny(rows, **settings) -> Encoded:
        return Encoded("s", "row", 1, [Example([2, 5, 2] * 20, [-100, 5, 2] * 20)], rows, [0], 60, 40)

    def peak(count: int) -> int:
        """Return the most bytes that making, opening and reading a file of `count` rows takes."""
        row = {"instruction": "a" * 20000, "output": "b", "system": "not read"}
        data = write_lines(tmp_path / f"{count}.jsonl", [row] * count)
        tracemalloc.start()
        try:
            part = build(tmp_path / "cache", data, partial(tiny)).part(split(count, 0.1, 0)[0], "s")
            for batch in Loader(part.examples, collate, 8):
                assert len(batch.rows) <= 8
            assert all(row["output"] == "b" for row in part.rows)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak(300), peak(900)
    assert many - few < 600 * 500 and (tmp_path / "900.jsonl").stat().st_size > 18_000_000


def test_grouping_and_swapping_pairs_take_no_memory_for_them(tmp_path, tokenizer):
    """Both once read all pairs into a list."""
    encode = partial(encode_rankings, tokenizer=tokenizer, template=TEMPLATES["dialogue"], max_length=2000)

    def peak(count: int) -> int:
        """Return the most bytes that grouping, swapping and reading `count` pairs takes."""
        rows = [
            {"prompt": f"Say {n // 3}", "chosen": "yes " * 200, "rejected": f"{n} " * 200, "kind": f"kind {n % 5}"}
            for n in range(count)
        ]
        part = build(tmp_path / "cache", write_lines(tmp_path / f"{count}.jsonl", rows), encode, PAIR_SCHEMAS).part(
            numpy.arange(count), "s"
        )
        tracemalloc.start()
        try:
            grouped = group_by_chosen(part.examples)
            swapped = swap_half(part.examples, part.categories, 0)
            assert len(grouped) == count // 3 and {len(each.responses) for each in grouped} == {4}
            assert sum(a != b for a, b in zip(swapped, part.examples, strict=True)) == count // 2
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak(120), peak(360)
    assert many - few < 240 * 150


# ---- runs ----


@pytest.fixture(scope="module", params=["sft", "rm"])
def whole(request, tmp_path_factory) -> tuple[str, list, Path]:
    """Return a script, flags that name a few of the shipped rows, and the folder of a run on them in memory."""
    folder = tmp_path_factory.mktemp(request.param)
    flags = [*TINY, *few_rows(request.param, folder), "--dropout", 0.1, "--save-every", 1]
    flags += ["--bleu-samples", 2] if request.param == "sft" else []
    run(request.param, *flags, "--out", folder / "run")
    return request.param, flags, folder / "run"


def test_a_run_is_the_same_to_the_bit(tmp_path, whole):
    script, flags, expected = whole
    cached = [*flags, "--encoded-cache", tmp_path / "cache"]
    run(script, *cached, "--out", tmp_path / "run")
    assert_same_run(tmp_path / "run", expected)
    assert len([*(tmp_path / "cache").iterdir()]) == 2  # --data and --eval-data

    # Stopped after two steps, and resumed from the files, which are there already.
    with mock.patch("minift.run.folder.Run.log", stop_at(3)), pytest.raises(KeyboardInterrupt):
        run(script, *cached, "--out", tmp_path / "resumed")
    with mock.patch.object(encoded, "_make", side_effect=AssertionError):
        run(script, *cached, "--out", tmp_path / "resumed", "--resume")
    assert_same_run(tmp_path / "resumed", expected)


def stop_at(step: int):
    """Return a `Run.log` that ends the run at a step."""
    log = Run.log

    def log_or_stop(self, line: dict) -> None:
        if line["step"] == step:
            raise KeyboardInterrupt
        log(self, line)

    return log_or_stop


def test_a_part_of_the_data_is_held_out_as_in_memory(tmp_path):
    flags = [*TINY, *few_rows("sft", tmp_path)[:2], "--eval-fraction", 0.2, "--no-input-only"]
    tasks = [
        task_of("sft", tmp_path / name, *flags, *more)
        for name, more in (("memory", []), ("disk", ["--encoded-cache", tmp_path / "cache"]))
    ]
    for batches in ("train_batches", "eval_batches"):
        memory, disk = ([*getattr(task, batches).examples] for task in tasks)
        assert memory == disk and memory


def test_a_folder_that_cannot_be_made(tmp_path):
    flags = [*few_rows("sft", tmp_path), "--out", tmp_path / "run", "--encoded-cache"]
    (tmp_path / "file").touch()
    for folder in ("file", "file/cache"):
        message = refused("sft", *TINY, *flags, tmp_path / folder)
        assert message.startswith(f"--encoded-cache {tmp_path / folder}: ") and "expected a folder" in message
    assert not (tmp_path / "run").exists()


def test_a_read_only_file_system_is_the_user_s_to_change(tmp_path, encode, monkeypatch):
    data = write_lines(tmp_path / "rows.jsonl", instructions(3))
    read_only = OSError(errno.EROFS, "Read-only file system", "x")
    monkeypatch.setattr(Path, "mkdir", mock.Mock(side_effect=read_only))
    message = user_error(build, tmp_path / "cache", data, encode)
    assert message.startswith(f"--encoded-cache {tmp_path / 'cache'}: Read-only file system, expected a folder")
