"""Run the answers of a model against the checks of their rows.

An answer is a program that nobody has read. Four layers keep it from doing harm:

1. An allow-list of syntax nodes and names (sandbox_child.py). No name begins with an underscore, except for the usual
   methods of a class. Nothing is imported but `math` and `dataclass`. Not in it: open, exec, eval, getattr, type,
   `str.format`, and every way to a frame. An answer that uses anything else fails, and does not run.
2. A process for each answer, forked by an interpreter that holds nothing but the standard library, so that one answer
   cannot influence the next. Its environment and its input are empty, its folder is a scratch directory. Its only file
   descriptors are the null device and the pipe for its report. It is killed, with its session, after that report or
   after `MAX_SECONDS`.
3. Limits of the kernel (`LIMITS`): processor time, memory, no new file descriptor (so no file, no socket, no other
   module), no byte in a file, no new process. Root is exempt from the last one: as root, the process first becomes the
   user nobody. Where a container forbids that, only layer 1 forbids forking.
4. The process does not know what its checks expect. It reports values, and they are compared outside of it, as text. To
   forge a report, an answer would still need the right values. No method of the answer is called for the comparison.

Promised: an answer that the allow-list accepts cannot read or write files, reach the network, start processes, exceed
its limits, or pass without the right values.
Not promised: that neither Python nor the allow-list has a hole. Layers 2 to 4 would still hold for an answer that finds
one, but it could delete or rename files of the user's and signal the user's processes. If it was started by root, it is
the user nobody, who cannot do that. macOS does not limit memory. Windows, which has no fork, is refused.
Trusted: the row's own `before` and `expression`. An answer can use the modules that `before` imports.

A check is {"expression": "f(2)", "expected": "4"}, optionally with "before": code to run before the answer. The
expression's value must equal the literal `expected` and have its type. `ANSWER` compares the answer's stripped text
and runs nothing; `printed(f)` is what calling f prints, `error_of(f)` the error that it raises, as `Name: message`.
An expression's builtins are Python's own: an answer cannot replace `len`, and a row cannot ask for a function `len`.
"""

import ast
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from minift.errors import UserError

try:
    from minift.run.sandbox_child import MAX_SECONDS, line_of
except ImportError:  # Windows has no `resource`
    IS_AVAILABLE = False
else:
    IS_AVAILABLE = hasattr(os, "fork")

Check = Mapping[str, str]
FOLDER = Path(__file__).resolve().parent
# -I -S: no user's packages, variables or start-up code; the path to this folder comes last.
START = "import sys; sys.path.append(sys.argv[1]); import sandbox_child; sandbox_child.serve()"
KEPT_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")  # for a Python that needs them to start; removed after that


def check_available() -> None:
    """Raise UserError on a system that cannot confine answers."""
    if not IS_AVAILABLE:
        raise UserError("--run-checks: this system has no fork and no limits to confine answers with: leave it out")


def checks_of(row: Mapping[str, Any], where: str) -> list[Check] | None:
    """Return a row's checks, None if it has no such field; UserError, beginning with `where`, if they are malformed."""
    checks = row.get("checks")
    if checks is None:
        return None
    if not isinstance(checks, list) or not checks:
        raise UserError(f"{where}: field 'checks', expected a list of one or more objects")
    for number, check in enumerate(checks, start=1):
        named = f"{where}: check {number}"
        if not isinstance(check, dict) or not {"expression", "expected"} <= check.keys():
            raise UserError(f"{named}: expected an object with 'expression' and 'expected'")
        for name, wanted, read in (
            ("expression", "a Python expression", partial(compile, filename="expression", mode="eval")),
            ("before", "Python statements", partial(compile, filename="before", mode="exec")),
            ("expected", "a Python literal", _expected_line),
        ):
            try:
                read(check.get(name, ""))  # each refuses what is not a string
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                raise UserError(f"{named}: '{name}' is {json.dumps(check[name]):.40}, expected {wanted}") from None
    return checks


def check_answers(
    answers: Sequence[str],
    checks: Sequence[Sequence[Check] | None],
    on_progress: Callable[[int], object] = lambda _: None,
) -> list[bool | None]:
    """Return whether each answer passes all its checks, None where it has none; call `on_progress(1)` after each.

    Raises UserError like `check_available`, OSError if the sandbox does not start.
    """
    passed: list[bool | None] = []
    with Sandbox() as sandbox:
        for answer, own in zip(answers, checks, strict=True):
            passed.append(None if own is None else sandbox.passes(answer, own))
            on_progress(1)
    return passed


class Sandbox(ExitStack):
    """sandbox_child.py in another interpreter, behind a socket; it starts with the first answer. Must be closed."""

    _socket: socket.socket

    def __init__(self) -> None:
        super().__init__()
        check_available()
        self._scratch = self.enter_context(TemporaryDirectory(prefix="minift-"))
        self._process: subprocess.Popen | None = None
        self.callback(self._stop)

    def passes(self, answer: str, checks: Sequence[Check]) -> bool:
        """Return True if an answer passes all its checks. Raises OSError if the sandbox does not start."""
        to_run, expected = [], []
        for check in checks:
            line = _expected_line(check["expected"])
            if check["expression"] != "ANSWER":
                to_run.append([check["expression"], check.get("before", "")])
                expected.append(line)
            elif line != line_of(answer.strip()):
                return False
        if to_run and self._process is None:
            self._start()
        return not to_run or self._report(answer, to_run) == "\n".join(expected).encode()

    def _start(self) -> None:
        """Start the interpreter; raise OSError if it fails a right answer: every answer would then seem wrong."""
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(2 * MAX_SECONDS)  # it stops answers itself; this is for one that stopped it instead
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", START, str(FOLDER)],
                stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ},
                cwd=self._scratch, start_new_session=True,
            )  # fmt: skip
        if self._report("x = 1", [["x", ""]]) != line_of(1).encode():
            self._stop()
            raise OSError("the sandbox of --run-checks cannot run an answer here: leave the flag out")

    def _report(self, answer: str, checks: list[list[str]]) -> bytes:
        """Return the report of an answer, b"" if it failed. An interpreter that is lost or silent is stopped."""
        try:
            self._socket.sendall(json.dumps({"answer": answer, "checks": checks}).encode() + b"\n")
            with self._socket.makefile("rb") as replies:
                head = replies.read(4)
                size = int.from_bytes(head, "little")
                report = replies.read(size)
            if len(head + report) == 4 + size:
                return report
        except OSError:
            pass
        self._stop()
        return b""

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._socket.close()
            self._process = None


@lru_cache(maxsize=10_000)
def _expected_line(literal: str) -> str:
    return line_of(ast.literal_eval(literal))
