"""Write data/instructions.jsonl and data/heldout.jsonl: small Python tasks whose answers have been executed.

    python -m data.make.instructions [--seed 0] [--out data]

Training rows have the fields instruction, input, output and family. Held-out rows also have `kind`: "new combination"
(a family of the training rows with other parameters) or "new family" (not in the training rows). `generate` returns the
rows with their checks; `passes` runs code against checks.
"""

import ast
import builtins
import contextlib
import dataclasses  # noqa: F401  (imported here, so that the import in an answer does not count as traced steps)
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from data.make.families import KNOWN, UNSEEN
from data.make.families.common import Check, Task
from minift.commands.cli import CommandParser, run_command
from minift.files.text import write_text

DATA = Path(__file__).resolve().parent.parent
TRAINING_ROWS_PER_FAMILY = 62
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

STEPS_ALLOWED = 20_000  # traced lines and calls; right answers need a few hundred
MODULES_ALLOWED = {"dataclasses", "math", "re", "string", "collections", "itertools", "functools", "datetime", "typing"}
NOT_ALLOWED = {"open", "input", "exec", "compile", "breakpoint", "exit", "quit", "help", "BaseException"}


class TooLong(BaseException):
    """The answer took too many steps. Not an Exception: `except Exception` in the answer must not catch it."""


def limited_import(name: str, *args: Any) -> Any:
    if name not in MODULES_ALLOWED:
        raise ImportError(name)
    return __import__(name, *args)


BUILTINS = {name: value for name, value in vars(builtins).items() if name not in NOT_ALLOWED}
BUILTINS["__import__"] = limited_import


def printed(function: Callable) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as captured:
        function()
    return captured.getvalue()


def error_of(function: Callable) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def passes(code: str, checks: list[Check]) -> bool:
    """Return True if the answer `code` meets every check.

    The answer runs in a fresh namespace, without output to the terminal, and again whenever a check has another
    `before`. More than `STEPS_ALLOWED` steps fail. This guards against accidents such as endless loops, not against
    malice: a single huge computation still runs.
    """
    answer = code.strip()
    compiled = None
    if any(check.expression != "ANSWER" for check in checks):
        try:
            tree = ast.parse(code)
            compiled = compile(tree, "<answer>", "exec")
        except (SyntaxError, ValueError):
            return False
        if any(isinstance(node, ast.ExceptHandler) and node.type is None for node in ast.walk(tree)):
            return False  # a bare except in an endless loop would catch TooLong too
    steps = 0

    def count_steps(*_: Any) -> Callable:
        nonlocal steps
        steps += 1
        if steps > STEPS_ALLOWED:
            raise TooLong
        return count_steps

    helpers = {
        "__builtins__": BUILTINS,
        "__name__": "answer",
        "ANSWER": answer,
        "printed": printed,
        "error_of": error_of,
    }
    names, names_before = {}, None
    tracer = sys.gettrace()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            for check in checks:
                if check.expression == "ANSWER":
                    if answer != check.expected:
                        return False
                    continue
                steps = 0
                sys.settrace(count_steps)
                if check.before != names_before:
                    names, names_before = dict(helpers), check.before
                    exec(check.before, names)
                    exec(compiled, names)
                value = eval(check.expression, names)
                if type(value) is not type(check.expected) or not bool(value == check.expected):
                    return False
    except (Exception, TooLong, SystemExit):
        return False
    finally:
        sys.settrace(tracer)
    return True


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
    for _ in range(200 * count):
        if len(rows) == count:
            return rows
        task = family(rng)
        question, marks = (task.instruction, task.input), (task.instruction, combination(name, task))
        if question not in questions and all(split_of.get(mark, split) == split for mark in marks):
            questions.add(question)
            split_of.update(dict.fromkeys(marks, split))
            rows.append(Row(task.instruction, task.input, task.output, name, split, task.checks))
    raise RuntimeError(f"{name} has too few combinations")


def generate(seed: int) -> list[Row]:
    """Return the rows of all splits, shuffled. Each family draws from its own generator, held-out rows first."""
    generators = {family: Random(f"{seed} {family.__name__}") for family in KNOWN + UNSEEN}
    wanted = [
        ("new combination", KNOWN, NEW_COMBINATIONS_PER_FAMILY),
        ("new family", UNSEEN, NEW_FAMILY_ROWS_PER_FAMILY),
        ("training", KNOWN, TRAINING_ROWS_PER_FAMILY),
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
        lines.append(json.dumps(fields | ({"kind": row.split} if held_out else {}), ensure_ascii=False) + "\n")
    return "".join(lines)


def main() -> None:
    parser = CommandParser("python -m data.make.instructions", description="Write instructions.jsonl, heldout.jsonl.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=DATA, help="an existing directory")
    arguments = parser.parse_args()
    rows = generate(arguments.seed)
    write_text(arguments.out / "instructions.jsonl", as_lines(rows, held_out=False))
    write_text(arguments.out / "heldout.jsonl", as_lines(rows, held_out=True))
    print(f"{len(rows)} rows of {len(KNOWN) + len(UNSEEN)} families written to {arguments.out}")


if __name__ == "__main__":
    run_command(main)
