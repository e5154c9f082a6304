"""Write data/instructions.jsonl and data/heldout.jsonl: small Python tasks whose answers have been executed.

    python -m data.make.instructions [--seed 0] [--known-rows 100] [--other-rows 14] [--out data]

Training rows have the fields instruction, input, output and family. Held-out rows also have `kind`: "new combination"
(a family of the training rows with other parameters) or "new family" (not in the training rows), and `checks`, as
minift/run/sandbox.py reads them. `generate` returns all rows with their checks; `passes` runs code against checks.
"""

import atexit
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from data.make.families import KNOWN, TRAINED_ONLY, UNSEEN
from data.make.families.common import Check, Task
from minift.commands.cli import CommandParser, run_command
from minift.files.text import write_text
from minift.run.sandbox import Sandbox

DATA = Path(__file__).resolve().parent.parent
KNOWN_ROWS, OTHER_ROWS = 100, 14  # training rows of each known family, and of each that is trained on only
NEW_COMBINATIONS_PER_FAMILY = 2
NEW_FAMILY_ROWS_PER_FAMILY = 12


class Row(NamedTuple):
    """A row of the shipped instructions, with its checks."""

    instruction: str
    input: str
    output: str
    family: str
    split: str  # "training", "new combination" or "new family"
    checks: list[Check]


# ---------------------------------------------------------------- running answers


@cache
def sandbox() -> Sandbox:
    """Return the sandbox of this process; starting one for each answer would take too long."""
    started = Sandbox()
    atexit.register(started.close)
    return started


@cache
def verdict(code: str, checks: tuple[tuple[tuple[str, str], ...], ...]) -> bool:
    return sandbox().passes(code, [dict(check) for check in checks])


def passes(code: str, checks: list[Check]) -> bool:
    """Return True if the answer `code` meets every check, in the sandbox that also checks a model's answers."""
    return verdict(code, tuple(tuple(as_fields(check).items()) for check in checks))


def as_fields(check: Check) -> dict[str, str]:
    """Return a check as rows have it, without an empty `before`."""
    fields = {"expression": check.expression, "expected": literal(check.expected), "before": check.before}
    return {name: text for name, text in fields.items() if text}


def literal(value: Any) -> str:
    """Return a value as Python text, always the same; the order of a set's repr changes from process to process."""
    return "{" + ", ".join(sorted(map(repr, value))) + "}" if isinstance(value, set) and value else repr(value)


# ---------------------------------------------------------------- rows and splits


def combination(family: str, task: Task) -> tuple[str, str, str]:
    """Return the fields that identify a task: the same task in other words is not new."""
    return family, task.input, task.output


def draw_rows(family: Callable, rng: Random, split: str, count: int, split_of: dict, questions: set) -> list[Row]:
    """Draw `count` rows of a family: no question twice, no instruction and no combination in two splits.

    Some instructions leave every detail to the input ("Negate the condition."). Only one split gets such a phrase.
    """
    rows = []
    name = family.__name__
    for _ in range(200 * count + 1):
        if len(rows) == count:
            return rows
        task = family(rng)
        question, marks = (task.instruction, task.input), (task.instruction, combination(name, task))
        if question not in questions and all(split_of.get(mark, split) == split for mark in marks):
            questions.add(question)
            split_of.update(dict.fromkeys(marks, split))
            rows.append(Row(task.instruction, task.input, task.output, name, split, task.checks))
    raise RuntimeError(f"{name} has too few combinations")


def generate(seed: int, known_rows: int = KNOWN_ROWS, other_rows: int = OTHER_ROWS) -> list[Row]:
    """Return the rows of all splits, shuffled. Each family draws from its own generator, held-out rows first."""
    generators = {family: Random(f"{seed} {family.__name__}") for family in KNOWN + TRAINED_ONLY + UNSEEN}
    wanted = [
        ("new combination", KNOWN, NEW_COMBINATIONS_PER_FAMILY),
        ("new family", UNSEEN, NEW_FAMILY_ROWS_PER_FAMILY),
        ("training", KNOWN, known_rows),
        ("training", TRAINED_ONLY, other_rows),
    ]
    split_of, questions, rows = {}, set(), []
    for split, families, count in wanted:
        for family in families:
            rows += draw_rows(family, generators[family], split, count, split_of, questions)
    Random(seed).shuffle(rows)
    return rows


def as_lines(rows: list[Row], held_out: bool) -> str:
    lines = []
    for row in rows:
        if (row.split == "training") == held_out:
            continue
        fields = {"instruction": row.instruction, "input": row.input, "output": row.output, "family": row.family}
        added = {"kind": row.split, "checks": [as_fields(check) for check in row.checks]} if held_out else {}
        lines.append(json.dumps(fields | added, ensure_ascii=False) + "\n")
    return "".join(lines)


def main() -> None:
    parser = CommandParser("python -m data.make.instructions", description="Write instructions.jsonl, heldout.jsonl.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--known-rows", type=int, default=KNOWN_ROWS, help="training rows of each known family")
    parser.add_argument("--other-rows", type=int, default=OTHER_ROWS, help="of each family that is trained on only")
    parser.add_argument("--out", type=Path, default=DATA, help="an existing directory")
    arguments = parser.parse_args()
    rows = generate(arguments.seed, arguments.known_rows, arguments.other_rows)
    write_text(arguments.out / "instructions.jsonl", as_lines(rows, held_out=False))
    write_text(arguments.out / "heldout.jsonl", as_lines(rows, held_out=True))
    print(f"{len(rows)} rows of {len({row.family for row in rows})} families written to {arguments.out}")


if __name__ == "__main__":
    run_command(main)
