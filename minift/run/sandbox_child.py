"""The inside of sandbox.py: allow-list an answer, run it in a process of its own, and report the values of its checks.

`serve` runs in an interpreter that sandbox.py starts. It forks once per answer, so that each answer has a fresh copy of
this interpreter. Only the standard library is imported here: the interpreter has no path to other packages.
"""

import ast
import builtins
import contextlib
import dataclasses
import gc
import io
import json
import math
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

MAX_STEPS = 20_000  # traced lines and calls per check; right answers need a few hundred
MAX_SECONDS = 10  # of wall-clock time; far above the CPU limit, because the machine may be busy
MAX_REPORT = 1_000_000  # bytes
NOBODY = 65534  # the user without rights on Linux
# As root, RLIMIT_NPROC has no effect: `_isolate` changes the user first.
LIMITS = {
    "RLIMIT_CPU": 1,  # seconds
    "RLIMIT_AS": 256 * 2**20,  # bytes of memory
    "RLIMIT_FSIZE": 0,  # bytes in a file
    "RLIMIT_NOFILE": 0,  # no new file descriptor: no file, socket, pipe or module from disk can be opened
    "RLIMIT_NPROC": 0,  # no fork, no thread
    "RLIMIT_CORE": 0,
}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


NODES = _words(
    """Module Expr Assign AugAssign AnnAssign NamedExpr Delete Pass Assert Global Nonlocal Import ImportFrom alias
    If For While Break Continue Try ExceptHandler Raise
    FunctionDef Lambda ClassDef arguments arg Return Yield YieldFrom
    Call keyword Starred Attribute Subscript Slice Name Load Store Del Constant JoinedStr FormattedValue
    List Tuple Set Dict ListComp SetComp DictComp GeneratorExp comprehension
    BoolOp And Or BinOp Add Sub Mult MatMult Div FloorDiv Mod Pow LShift RShift BitOr BitXor BitAnd
    UnaryOp Invert Not UAdd USub IfExp Compare Eq NotEq Lt LtE Gt GtE Is IsNot In NotIn"""
)
# The names with a leading underscore that an answer may use: methods that classes define, and the name of no use.
UNDERSCORED = _words(
    """_ __init__ __post_init__ __repr__ __str__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __hash__ __bool__ __len__
    __iter__ __next__ __contains__ __getitem__ __setitem__ __delitem__ __call__ __neg__ __abs__ __add__ __radd__
    __sub__ __rsub__ __mul__ __rmul__ __truediv__ __floordiv__ __mod__ __pow__"""
)
# Public attributes that lead to frames, code and classes, or that read attributes named in a string.
ATTRIBUTES_REFUSED = ("gi_", "cr_", "ag_", "tb_", "f_", "co_")
METHODS_REFUSED = ("format", "format_map", "mro")
IMPORTS = {
    "math": frozenset(name for name in dir(math) if not name.startswith("_")),
    "dataclasses": _words("dataclass field"),
}
MODULES = {"math": math, "dataclasses": dataclasses}
# Not: type, getattr, setattr, vars, open, eval, exec and whatever else leads out.
BUILTIN_NAMES = _words(
    """abs all any ascii bin bool bytes bytearray callable chr classmethod complex dict divmod enumerate filter float
    format frozenset hash hex int isinstance issubclass iter len list map max min next object oct ord pow print property
    range repr reversed round set slice sorted staticmethod str sum super tuple zip Ellipsis NotImplemented"""
)


def is_allowed(tree: ast.Module) -> bool:
    """Return True if every node, name and import of an answer is on the allow-list."""
    return all(_is_node_allowed(node) for node in ast.walk(tree))


def _is_node_allowed(node: ast.AST) -> bool:
    if type(node).__name__ not in NODES:
        return False
    match node:
        case ast.Constant():
            return True  # its strings are values, not names
        case ast.Import():
            return all(alias.name == "math" for alias in node.names)  # other modules contain `sys`
        case ast.ImportFrom():
            allowed = IMPORTS.get(node.module or "", frozenset())
            return node.level == 0 and all(alias.name in allowed for alias in node.names)
        case ast.ExceptHandler(type=None):
            return False
        case ast.ClassDef() if node.keywords:  # a metaclass
            return False
        case ast.Attribute() if node.attr.startswith(ATTRIBUTES_REFUSED) or node.attr in METHODS_REFUSED:
            return False
    # Every name, in whatever field: of a variable, attribute, function, argument, keyword or exception.
    values = [value for _, value in ast.iter_fields(node)]
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    return all(not name.startswith("_") or name in UNDERSCORED for name in names if isinstance(name, str))


def _builtins_of_answers() -> dict[str, Any]:
    everything = vars(builtins)
    classes = {name: value for name, value in everything.items() if isinstance(value, type)}
    errors = {name: value for name, value in classes.items() if issubclass(value, Exception)}
    functions = {name: everything[name] for name in (*BUILTIN_NAMES, "__build_class__")}
    return errors | functions | {"__import__": lambda name, *_: MODULES[name]}


def line_of(value: object) -> str:
    """Return a line of text that two values share if and only if they are equal and of one type.

    Raises TypeError for anything but Python's own plain types. No method of the value's is called, so a class of the
    answer cannot lie about being equal.
    """
    return f"{type(value).__name__} {_canonical(value)}"


def _canonical(value: Any) -> str:
    """Return the same text for equal values: as in Python, 1, 1.0 and True are equal inside of a list."""
    kind = type(value)
    if kind is float and value.is_integer():
        value = int(value)
    if type(value) in (int, bool):
        return hex(value)  # not decimal: Python refuses to write more than 4,300 digits
    if kind in (float, complex, str, bytes, type(None)):
        return repr(value)
    if kind in (list, tuple):
        return f"{'[' if kind is list else '('}{', '.join(map(_canonical, value))}]"
    if kind in (set, frozenset):
        return f"{{{', '.join(sorted(map(_canonical, value)))}}}"
    if kind is dict:
        return f"dict{{{', '.join(sorted(f'{_canonical(key)}: {_canonical(item)}' for key, item in value.items()))}}}"
    raise TypeError(f"{kind}: expected a number, text, list, tuple, set or dict")


def printed(function: Callable[[], object]) -> str:
    """Return what calling a function prints. A helper for checks."""
    with contextlib.redirect_stdout(io.StringIO()) as captured:
        function()
    return captured.getvalue()


def error_of(function: Callable[[], object]) -> str:
    """Return the error that calling a function raises, as `Name: message`. A helper for checks."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def evaluate(answer: str, checks: list[tuple[str, str]]) -> str:
    """Run an answer and return a line for the value of each (expression, before).

    The answer runs in a fresh namespace, after `before`, and again whenever a check has another `before`. Expressions
    see its names, but the helpers and builtins are the true ones, not those that the answer may have defined.
    Raises an error of the answer's. Ends the process after `MAX_STEPS` steps: an answer could catch an exception.
    """
    tree = ast.parse(answer)
    if not is_allowed(tree):
        raise ValueError("outside of the allow-list")
    compiled = compile(tree, "<answer>", "exec")
    own = {**vars(builtins), "ANSWER": answer.strip(), "printed": printed, "error_of": error_of}
    names: dict[str, Any] = {}
    names_before = None
    steps = 0

    def count_steps(frame: FrameType, event: str, argument: object) -> Callable:
        nonlocal steps
        steps += 1
        if steps > MAX_STEPS:
            os._exit(1)
        return count_steps

    lines = []
    for expression, before in checks:
        steps = 0
        sys.settrace(count_steps)
        if before != names_before:
            names, names_before = {"__name__": "answer"}, before
            exec(before, names)  # the row's: trusted, with all builtins
            names["__builtins__"] = _builtins_of_answers()
            exec(compiled, names)
        value = eval(expression, {**names, **own, "__builtins__": vars(builtins)})
        sys.settrace(None)
        lines.append(line_of(value))  # now, because the next expression may change the value
    return "\n".join(lines)


def _isolate(report: int, nothing: int) -> None:
    """Give up everything that this process could do harm with; `report` becomes file descriptor 3."""
    os.setsid()
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.dup2(report, 3)
    os.closerange(4, 256)
    signal.alarm(MAX_SECONDS + 1)  # ends it, should nobody be there any more to kill it
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):  # a container may forbid it; every other limit remains
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
    for name, wanted in LIMITS.items():
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        try:
            resource.setrlimit(number, (value, value))
        except ValueError:
            if name != "RLIMIT_AS":  # macOS refuses to limit memory
                raise


def _run(answer: str, checks: list[tuple[str, str]], report: int, nothing: int) -> NoReturn:
    """Run an answer in this process, which ends here; report the values of all its checks, or nothing."""
    try:
        _isolate(report, nothing)
        text = evaluate(answer, checks).encode()
        while text:
            text = text[os.write(3, text) :]
    finally:
        os._exit(0)  # without destructors and exit handlers, and whatever was raised


def serve() -> None:
    """Answer each line of JSON from standard input by a report: its length as four bytes, then its bytes, if any."""
    os.environ.clear()
    nothing = os.open(os.devnull, os.O_RDWR)
    sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (answers print there)
    gc.disable()  # answers are short-lived
    for line in sys.stdin:
        report = _report_of(json.loads(line), nothing)
        os.write(1, len(report).to_bytes(4, "little"))
        while report:
            report = report[os.write(1, report) :]


def _report_of(job: dict[str, Any], nothing: int) -> bytes:
    """Fork a process for an answer and return its report; kill its whole session after that, or after the limits."""
    reader, writer = os.pipe()
    deadline = time.monotonic() + MAX_SECONDS
    child = os.fork()
    if child == 0:
        _run(job["answer"], job["checks"], writer, nothing)
    os.close(writer)
    report = b""
    while len(report) <= MAX_REPORT:
        if not select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
            report = b""
            break
        chunk = os.read(reader, 65536)
        if not chunk:
            break
        report += chunk
    os.close(reader)
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return report if len(report) <= MAX_REPORT else b""
