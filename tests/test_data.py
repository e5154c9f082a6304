"""The shipped instructions are reproducible and executed; splits do not overlap; the checks can fail."""

import ast
import builtins
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from data.make.families import KNOWN, TRAINED_ONLY, UNSEEN
from data.make.families.common import Check
from data.make.instructions import DATA, Row, generate, passes
from data.make.pretrain import PretrainingRun, initialise, train_language_model
from minift.model import OPT
from minift.run.sandbox import check_answers, checks_of
from tests.runs import SMALL_OPT


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return generate(0)


@pytest.fixture(scope="module")
def training() -> list[dict]:
    return [json.loads(line) for line in (DATA / "instructions.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def held_out() -> list[dict]:
    return [json.loads(line) for line in (DATA / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]


SIGNATURE = re.compile(r"def (\w+)\((.*?)\)")


def is_code(row: Row) -> bool:
    return row.checks[0].expression != "ANSWER"


def test_the_script_writes_the_committed_files_byte_for_byte(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    command = [sys.executable, "-m", "data.make.instructions", "--out", str(tmp_path)]
    subprocess.run(command, check=True, cwd=DATA.parent, env=environment, capture_output=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heldout.jsonl", "instructions.jsonl"]
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (DATA / path.name).read_bytes(), path.name


def test_held_out_answers_pass_the_checks_of_their_rows(held_out: list[dict]) -> None:
    checks = [checks_of(row, "a row") for row in held_out]
    assert check_answers([row["output"] for row in held_out], checks) == [True] * len(held_out)
    assert not any(check_answers(["pass"] * len(held_out), checks))
    assert (DATA / "heldout.jsonl").stat().st_size < 400_000


def test_another_seed_gives_other_rows(rows: list[Row]) -> None:
    mine = {row.instruction for row in rows}
    others = [row.instruction for row in generate(1)]
    assert sum(instruction in mine for instruction in others) < 0.2 * len(others)


def test_answers_pass_their_checks(rows: list[Row]) -> None:
    """Test all held-out answers and every fourth of the others, as each starts a process."""
    assert all(row.checks for row in rows)
    training = [row for row in rows if row.split == "training"]
    for row in training[::4] + [row for row in rows if row.split != "training"]:
        assert passes(row.output, row.checks), row
        if is_code(row):
            ast.parse(row.output)


def test_fields_and_sizes(training: list[dict], held_out: list[dict]) -> None:
    assert all(list(row) == ["instruction", "input", "output", "family"] for row in training)
    assert all(list(row) == ["instruction", "input", "output", "family", "kind", "checks"] for row in held_out)
    assert 13_000 <= len(training) <= 14_000
    assert (DATA / "instructions.jsonl").stat().st_size < 3_700_000
    for row in training + held_out:
        assert 20 <= len(row["instruction"]) <= 210, row
        assert 1 <= len(row["output"]) <= 400, row
        assert row["output"] == row["output"].strip()
        assert not row["instruction"].count("`") % 2, row
        assert "  " not in row["instruction"] or "  " in row["output"], row
    with_input = sum(row["input"] != "" for row in training) / len(training)
    assert 0.2 <= with_input <= 0.3


def test_families_and_categories(training: list[dict], held_out: list[dict]) -> None:
    known, unseen = {family.__name__ for family in KNOWN}, {family.__name__ for family in UNSEEN}
    assert len(known) == len(KNOWN) >= 110 and len(unseen) == len(UNSEEN) == 12
    trained_only = {family.__name__ for family in TRAINED_ONLY}
    assert len(known | unseen | trained_only) == len(KNOWN + UNSEEN + TRAINED_ONLY)
    assert {row["family"] for row in training} == known | trained_only
    by_category = defaultdict(set)
    for row in held_out:
        by_category[row["kind"]].add(row["family"])
    assert by_category == {"new combination": known, "new family": unseen}
    counts = Counter(row["kind"] for row in held_out)
    assert counts["new combination"] >= 250 and counts["new family"] >= 140 and len(counts) == 2


def test_splits_share_no_instruction_and_no_combination(training: list[dict], held_out: list[dict]) -> None:
    asked = Counter((row["instruction"], row["input"]) for row in training + held_out)
    assert max(asked.values()) == 1
    assert not {row["instruction"] for row in training} & {row["instruction"] for row in held_out}
    # The same answer to the same input is the same task, in other words.
    trained = {(row["family"], row["input"], row["output"]) for row in training}
    assert not [row for row in held_out if (row["family"], row["input"], row["output"]) in trained]
    code = {row["output"] for row in training if "\n" in row["output"] and row["input"] == ""}
    shared = [row for row in held_out if "\n" in row["output"] and row["input"] == "" and row["output"] in code]
    assert len(shared) < 0.02 * len(held_out)  # two families may happen to have the same answer


def test_phrasing_varies(training: list[dict]) -> None:
    openings = Counter(" ".join(row["instruction"].split()[:2]) for row in training)
    assert openings.most_common(1)[0][1] < 0.25 * len(training)
    shapes, outputs = defaultdict(set), defaultdict(set)
    for row in training:
        # The phrasing is the text outside backticks, without digits.
        words = row["instruction"].split("`")[::2]
        shapes[row["family"]].add("".join(character for character in "".join(words) if not character.isdigit()))
        outputs[row["family"]].add((row["input"], row["output"]))
    assert min(map(len, shapes.values())) >= 3
    assert min(map(len, outputs.values())) >= 12


def without_names(code: str) -> str:
    """Return the code with its variables numbered, equal for two answers that differ only in names."""
    tree, numbers = ast.parse(code), {}
    for node in ast.walk(tree):
        for field in ("id", "arg", "name"):
            name = getattr(node, field, None)
            if isinstance(name, str) and name not in vars(builtins):
                setattr(node, field, f"v{numbers.setdefault(name, len(numbers))}")
    return ast.unparse(tree)


def test_the_answer_of_another_row_fails(rows: list[Row]) -> None:
    """Even with its function renamed as the row asks."""
    by_family = defaultdict(list)
    for row in rows:
        if row.output.startswith("def "):
            by_family[row.family].append(row)
    tried = failed = 0
    for members in by_family.values():
        for row, other in zip(members[:10], members[10:20], strict=False):
            name, arguments = SIGNATURE.match(row.output).groups()
            other_name, other_arguments = SIGNATURE.match(other.output).groups()
            code = other.output.replace(other_name, name)
            if arguments.count(",") != other_arguments.count(",") or without_names(code) == without_names(row.output):
                continue
            tried += 1
            failed += not passes(code, row.checks)
    assert tried > 50
    assert failed > 0.95 * tried


SWAPPED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.FloorDiv: ast.Mod, ast.Pow: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
    "min": "max", "max": "min", "any": "all", "all": "any", "upper": "lower", "lower": "upper",
    "startswith": "endswith", "endswith": "startswith",
}  # fmt: skip


def subtle_bugs(code: str) -> Iterator[str]:
    """Yield the code with one operator or name swapped, one number off by one, or one string cut by a character."""
    for index in range(sum(1 for _ in ast.walk(ast.parse(code)))):
        tree = ast.parse(code)
        node = list(ast.walk(tree))[index]
        match node:
            case ast.Constant(value=bool() | None):
                continue
            case ast.Constant(value=int()):
                node.value += 1
            case ast.Constant(value=str()) if node.value:
                node.value = node.value[:-1]
            case ast.Compare(ops=[operator]) if type(operator) in SWAPPED:
                node.ops = [SWAPPED[type(operator)]()]
            case ast.BinOp(op=operator) | ast.AugAssign(op=operator) | ast.BoolOp(op=operator) if (
                type(operator) in SWAPPED
            ):
                node.op = SWAPPED[type(operator)]()
            case ast.Name() if node.id in SWAPPED:
                node.id = SWAPPED[node.id]
            case ast.Attribute() if node.attr in SWAPPED:
                node.attr = SWAPPED[node.attr]
            case _:
                continue
        yield ast.unparse(tree)


def test_answers_with_a_subtle_bug_fail(rows: list[Row]) -> None:
    by_family = defaultdict(list)
    for row in filter(is_code, rows):
        by_family[row.family].append(row)
    tried, survived = 0, []
    for family in sorted(by_family):
        for row in Random(family).sample(by_family[family], 4):
            for code in subtle_bugs(row.output):
                tried += 1
                if passes(code, row.checks):
                    survived.append(code)
    assert tried > 1_000
    # Most survivors are changes without effect, such as range(0, 64, 6) for range(0, 63, 6).
    assert len(survived) < 0.03 * tried, survived


def test_cut_off_answers_fail(rows: list[Row]) -> None:
    lines = [row.output.split("\n") for row in rows]
    # A last line `return None` is left out: the function does the same without it.
    cut = ["\n".join(own[:-1]) if own[-1].strip() != "return None" else "" for own in lines]
    chosen = [(code, row) for code, row in zip(cut, rows, strict=True) if code and is_code(row)][:500]
    assert len(chosen) == 500
    assert not [code for code, row in chosen if passes(code, row.checks)]


@pytest.mark.parametrize(
    "code",
    [
        "while True:\n    pass",
        "def f(x):\n    while True:\n        try:\n            x += 1\n        except BaseException:\n            pass",
        "def f(x):\n    while True:\n        try:\n            x += 1\n        except:\n            pass",
        "def f(x):\n    return f(x)",
        "def f(x):\n    return sum(1 for _ in iter(int, 1))",
        "def f(x):\n    raise SystemExit",
        "def f(x):\n    return open('/etc/hostname').read()",
        "import os\n\n\ndef f(x):\n    return x + 1",
        "def f(x):\n    return True",
        "def f(x:",
        "def f(x):\n    return '\0'",
        "",
    ],
)
def test_passes_returns_false_for(code: str, capsys: pytest.CaptureFixture) -> None:
    assert not passes(code, [Check("f(0)", 1)])
    assert capsys.readouterr() == ("", "")


def test_passes_returns_true_silently(capsys: pytest.CaptureFixture) -> None:
    code = "import math\n\nprint('loud')\n\n\ndef f(x):\n    print(x)\n    return math.floor(x) + y"
    assert passes(
        code, [Check("f(0)", 1, "y = 1"), Check("f(0)", 2, "y = 2"), Check("printed(lambda: f(5))", "5\n", "y = 0")]
    )
    assert passes("  42\n", [Check("ANSWER", "42")])
    assert not passes("43", [Check("ANSWER", "42")])
    assert capsys.readouterr() == ("", "")


def test_the_base_model_is_trained(tmp_path: Path) -> None:
    """The loss was called with arguments that it no longer had."""
    random, model, run = Random(0), OPT(SMALL_OPT), PretrainingRun(tmp_path, resume=False)
    initialise(model, 0)
    rows = [random.choices(range(3, 20), k=8) for _ in range(8)]
    flags = Namespace(lr=1e-2, steps=20, seed=0, dtype="float32")
    train_language_model(model, rows, rows, flags, run)
    first, *_, last = [line for line in run.lines if line["split"] == "eval"]
    assert last["supervised_tokens"] == 20 * 8 * 7  # nothing predicts a row's first token
    assert last["loss"] < 0.8 * first["loss"] and (tmp_path / "checkpoints").is_dir()
