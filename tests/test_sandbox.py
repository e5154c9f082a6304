"""Answers that try to get out of the sandbox, one layer after the other; and verdicts that must be right.

Behind `RIGHT`, an attack that had no effect would pass: so would one that the sandbox lets through.
"""

import errno
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minift.errors import UserError
from minift.run import sandbox, sandbox_child
from minift.run.sandbox import Sandbox, check_answers, checks_of
from minift.run.sandbox_child import line_of

RIGHT = "def f(x):\n    return x + 1\n\n\n"
CHECKS = [{"expression": "f(0)", "expected": "1"}]

# The child with an allow-list that allows everything, all builtins, and the module for sockets loaded.
UNGUARDED = Path(sandbox_child.__file__).read_text(encoding="utf-8")
for old, new in (
    ("if not is_allowed(tree)", "if False"),
    ("= _builtins_of_answers()", "= vars(builtins)"),
    ("import select\n", "import select\nimport socket\n"),
):
    assert UNGUARDED.count(old) == 1
    UNGUARDED = UNGUARDED.replace(old, new)


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    with Sandbox() as opened:
        yield opened


@pytest.fixture(scope="module")
def open_box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """Open a sandbox whose allow-list allows everything: only processes and limits are left."""
    folder = tmp_path_factory.mktemp("child")
    (folder / "sandbox_child.py").write_text(UNGUARDED, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch, Sandbox() as opened:
        patch.setattr(sandbox, "FOLDER", folder)
        yield opened


# ---- right and wrong answers ----


def test_a_right_answer_passes_and_a_wrong_one_does_not(box: Sandbox, capfd: pytest.CaptureFixture) -> None:
    code = "import math\n\nprint('loud')\n\n\ndef f(x):\n    print(x)\n    return math.floor(x) + y"
    checks = [
        {"expression": "f(0)", "expected": "1", "before": "y = 1"},
        {"expression": "f(0)", "expected": "2", "before": "y = 2"},
        {"expression": "printed(lambda: f(5))", "expected": r"'5\n'", "before": "y = 0"},
        {"expression": "error_of(lambda: f('a'))", "expected": "'TypeError: must be real number, not str'"},
        {"expression": "ANSWER.count('math')", "expected": "2"},
    ]
    assert box.passes(code, checks)
    for index in range(len(checks)):
        wrong = [*checks[:index], checks[index] | {"expected": "0"}, *checks[index + 1 :]]
        assert not box.passes(code, wrong)
    assert capfd.readouterr() == ("", "")


def test_the_text_of_an_answer_is_compared_without_being_run(box: Sandbox) -> None:
    assert box.passes("  42\n", [{"expression": "ANSWER", "expected": "'42'"}])
    assert not box.passes("43", [{"expression": "ANSWER", "expected": "'42'"}])
    assert not box.passes("42", [{"expression": "ANSWER", "expected": "42"}])
    assert box.passes("not Python", [{"expression": "ANSWER", "expected": "'not Python'"}])


@pytest.mark.parametrize(
    "code",
    [
        "from dataclasses import dataclass, field\n@dataclass\nclass A:\n    x: int\n    y: list = field(default=None)",
        "class A:\n    def __init__(self, x):\n        self.x = x\n    def __str__(a):\n        return f'{a.x!r}'",
        "class B(Exception):\n    pass\n\n\nclass C(B):\n    def __init__(self):\n        super().__init__('c')",
        "try:\n    [][0]\nexcept (IndexError, KeyError) as e:\n    assert e.args\nelse:\n    pass\nfinally:\n    y = 1",
        "def g():\n    n = 0\n    def h(*a, k=1):\n        nonlocal n\n        n += 1\n        return n\n    return h",
        "def g():\n    a = yield 1\n    yield from (x for x in range(3) if x)\n    while (n := 3) > 4:\n        break",
        "a, *b = {1, 2} | {3}\ndel a\nb[0:1] = []\nw = lambda q: -q if q else ~q\nfor _ in {**{1: 2}}:\n    continue",
        "from math import sqrt as root, pi\nx: float = root(4) @ pi if False else 1 << 2",
        "class A:\n    @property\n    def y(a):\n        return 1\n    @staticmethod\n    def z():\n        global q",
        "assert '%d' % 3 + format(2.5, '.2f') and isinstance(1, int) and sorted('ba', key=str.upper)",
    ],
)
def test_ordinary_code_is_allowed(code: str, box: Sandbox) -> None:
    assert box.passes(RIGHT + code, CHECKS)


@pytest.mark.parametrize(
    "code",
    ["", "def f(x:", "def f(x):\n    return '\0'", "def f(x):\n    return '\ud800'", "x" * 100_000, "(" * 100_000,
     "-" * 50_000, "def f(x):\n    return True", "def f(x):\n    return 1.0", "def f(x):\n    raise SystemExit",
     "def f(x):\n    return x.nothing", " def f(x):\n    return 1"],
)  # fmt: skip
def test_a_broken_or_wrong_answer_fails(code: str, box: Sandbox) -> None:
    assert not box.passes(code, CHECKS)


# ---- comparison ----

VALUES = [
    0, 1, True, False, -1, 10**5000, 1.0, 1.5, 0.1, float("inf"), 1j, None, "", "a", "1", "'", b"a", [], [1], [1.0],
    [True], [[1], 2], [1, 2], (), (1,), (1, 2), set(), {1}, {1, 2}, {2, 1}, {"a", "b"}, {}, {1: 2}, {2: 1, 1: 2},
    {1: 2, 2: 1}, {1: {2}}, {"a": [1, None]}, {"a, b": 1}, {"a": 1, "b": 1}, ["a, b"], ["a", "b"], ["[1]"], [(1,)],
    [{1: 1}], [{1}],
]  # fmt: skip


def test_values_are_compared_as_python_compares_them_and_by_type() -> None:
    for a, b in itertools.product(VALUES, VALUES):
        assert (line_of(a) == line_of(b)) == (type(a) is type(b) and a == b), (a, b)


class Liar(int):
    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        raise AssertionError


@pytest.mark.parametrize(
    "value", [Liar(1), [Liar(1)], {1: Liar(1)}, {Liar(1): 1}, object(), int, len, iter([]), range(2)]
)
def test_values_of_other_types_have_no_text(value: object) -> None:
    with pytest.raises(TypeError):
        line_of(value)


@pytest.mark.parametrize(
    "code",
    [
        "class A(int):\n    def __eq__(self, other):\n        return True\n\n\ndef f(x):\n    return A(1)",
        "class A:\n    def __eq__(self, other):\n        return True\n\n\ndef f(x):\n    return A()",
        "class int(int):\n    pass\n\n\ndef f(x):\n    return int(1)",
    ],
)
def test_an_answer_cannot_lie_about_being_equal(code: str, box: Sandbox) -> None:
    assert not box.passes(code, CHECKS)


@pytest.mark.parametrize("name", ["hasattr", "printed", "error_of", "ANSWER", "len", "list", "sorted"])
def test_an_answer_cannot_replace_what_checks_use(name: str, box: Sandbox) -> None:
    truth = {
        "hasattr": ("hasattr(f, 'nothing')", "False"), "printed": ("printed(lambda: None)", "''"),
        "error_of": ("error_of(lambda: None)", "'no error'"), "ANSWER": ("len(ANSWER) > 50", "True"),
        "len": ("len([1])", "1"), "list": ("list('a')", "['a']"), "sorted": ("sorted([2, 1])", "[1, 2]"),
    }[name]  # fmt: skip
    check = {"expression": truth[0], "expected": truth[1]}
    for code in (f"def {name}(*_):\n    return 'forged'", f"global {name}\n{name} = lambda *_: 'forged'"):
        assert box.passes(RIGHT + code, [*CHECKS, check])


def test_a_value_that_changes_later_is_compared_as_it_was(box: Sandbox) -> None:
    code = "kept = []\n\n\ndef f(x):\n    kept.append(x)\n    return kept"
    checks = [{"expression": f"f({x})", "expected": str([*range(x + 1)])} for x in range(3)]
    assert box.passes(code, checks)


def test_checks_of_one_answer_share_names_until_before_changes(box: Sandbox) -> None:
    checks = [{"expression": "f(n)", "expected": "2", "before": "n = 1"}]
    assert box.passes("n += 0\n" + RIGHT, [*checks, checks[0] | {"before": "n = 2", "expected": "3"}, *checks])


# ---- the allow-list ----

GETTERS = {
    "getattr": "getattr((), 'count')", "vars": "vars()", "globals": "globals()", "locals": "locals()", "dir": "dir()",
    "eval": "eval('1')", "exec": "exec('1')", "compile": "compile('1', '', 'eval')", "open": "open(0)",
    "input": "input()", "type": "type(1)", "setattr": "setattr(f, 'a', 1)", "delattr": "delattr(f, 'a')",
    "memoryview": "memoryview(b'')", "hasattr": "hasattr(f, 'a')", "breakpoint": "breakpoint()", "exit": "exit()",
    "help": "help()", "id": "id(1)", "BaseException": "BaseException()", "SystemExit": "SystemExit()",
    "KeyboardInterrupt": "KeyboardInterrupt()", "import": "__import__('math')", "build_class": "__build_class__",
    "builtins": "__builtins__", "name": "__name__",
}  # fmt: skip
ATTACKS = [
    *GETTERS.values(), "import os", "import sys", "import builtins", "import dataclasses", "import re",
    "import math, os", "import os.path", "from os import system", "from math import *", "from dataclasses import sys",
    "from dataclasses import make_dataclass", "from . import x", "from .math import pi",
    "from __future__ import annotations", "import math as __builtins__", "().__class__",
    "().__class__.__base__.__subclasses__()", "f.__globals__", "f.__code__", "f.__builtins__", "f.__init__.__self__",
    "().＿＿class＿＿", "[].__reduce_ex__", "print.__self__", "super.__mro__", "f.__dict__", "int.mro()", "f._x = 1",
    "_x = 1", "(lambda: (yield))().gi_frame", "g = (x for x in [1])\ng.gi_frame.f_back",
    "g = (x for x in [1])\ng.gi_code", "try:\n    1 / 0\nexcept Exception as e:\n    e.__traceback__",
    "def g(t):\n    t.tb_frame", "def g(c):\n    c.cr_frame", "def g(c):\n    c.f_locals",
    "def g(c):\n    c.co_consts", "def g(c):\n    c.ag_frame", "'{0.__class__}'.format(1)", "'{a}'.format_map({})",
    "str.format('{0.__class__}', 1)", "map(str.format, ['{0.a}'])", "f'{().__class__}'", "f'{1:{().__class__}}'",
    "f'{__builtins__}'", "(y := ().__class__)", "y = lambda: ().__class__", "def g(y=().__class__):\n    pass",
    "@().__class__\ndef g():\n    pass", "class A:\n    y = ().__class__", "class A(metaclass=lambda *_: 1):\n    pass",
    "class A(y=1):\n    pass", "class A(().__class__):\n    pass", "class A:\n    def __del__(self):\n        pass",
    "class A:\n    def __getattr__(self, name):\n        pass",
    "class A:\n    def __getattribute__(self, name):\n        pass",
    "class A:\n    def __class_getitem__(cls, x):\n        pass",
    "class A:\n    def __init_subclass__(cls):\n        pass", "class A:\n    def __new__(cls):\n        pass",
    "class A:\n    def __reduce__(self):\n        pass", "class A:\n    __slots__ = ()", "class __A:\n    pass",
    "def __g():\n    pass", "def g(__x):\n    pass", "dict(__x=1)", "global __x", "for __x in []:\n    pass",
    "try:\n    pass\nexcept ValueError as __x:\n    pass", "import math as _m", "lambda *__x: 1", "[1 for __x in []]",
    "match 1:\n    case int():\n        pass", "match 1:\n    case int(__class__=y):\n        pass",
    "match 1:\n    case __x:\n        pass", "async def g():\n    pass", "async def g():\n    await f",
    "[x async for x in y]", "with f:\n    pass", "try:\n    pass\nexcept:\n    pass",
    "try:\n    pass\nexcept* ValueError:\n    pass", "type X = int", "def g[T](): pass",
]  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_the_allow_list_does_not_name_fails(attack: str, box: Sandbox) -> None:
    assert not box.passes(RIGHT + attack, CHECKS)


@pytest.mark.parametrize("attack", sorted(GETTERS.values()))
def test_names_that_lead_out_are_not_there_when_used_late(attack: str, box: Sandbox) -> None:
    """The answer is caught where it uses the name, not only where it is loaded."""
    code = f"def f(x):\n    try:\n        {attack}\n    except NameError:\n        return 2\n    return 1"
    assert not box.passes(code, CHECKS)


def test_the_allow_list_names_what_exists() -> None:
    for names in (sandbox_child.NODES, sandbox_child.BUILTIN_NAMES, sandbox_child.UNDERSCORED):
        assert names and all(name.strip() == name for name in names)
    assert not sandbox_child.NODES & {"Await", "With", "Match", "TryStar", "AsyncFunctionDef"}
    assert not sandbox_child.BUILTIN_NAMES & {
        "type",
        "getattr",
        "open",
        "eval",
        "exec",
        "vars",
        "hasattr",
        "memoryview",
    }


# ---- time, memory, output ----

ENDLESS = [
    "def f(x):\n    while True:\n        pass",
    "def f(x):\n    while True:\n        try:\n            x += 1\n        except Exception:\n            pass",
    "def f(x):\n    while True:\n        try:\n            x += 1\n        finally:\n            continue",
    "def f(x):\n    return f(x)",
    "def f(x):\n    try:\n        return f(x)\n    finally:\n        return f(x)",
    "def f(x):\n    return sum(1 for _ in iter(int, 1))",
    "while True:\n    print('x' * 10**6)",
    "def f(x):\n    return [0] * 10**10",
    "def f(x):\n    return 'x' * 10**10",
    "def f(x):\n    y = [x]\n    while True:\n        y = y + y",
    "def f(x):\n    return f'{x:1000000000}'",
    "def f(x):\n    y = []\n    y.append(y)\n    return y",
    "def f(x):\n    y = []\n    for _ in range(9000):\n        y = [y]\n    return y",
    "def f(x):\n    return 'x' * 2_000_000",
    "class A(Exception):\n    def __str__(self):\n        return str(self)\n\n\ndef f(x):\n    raise A",
]


@pytest.mark.parametrize("code", ENDLESS)
def test_time_memory_and_output_have_limits(code: str, box: Sandbox) -> None:
    assert not box.passes(code, [{"expression": "f(0)", "expected": "'" + "x" * 2_000_000 + "'"}])
    assert box.passes(RIGHT, CHECKS)


@pytest.mark.parametrize(
    "code, inside, outside",
    [
        ("def f(x):\n    for _ in range({}):\n        pass\n    return 1", 1_000, 30_000),  # steps
        ("def f(x):\n    return len(bytes({})) // {}", 10**7, 300 * 2**20),  # bytes
        ("def f(x):\n    return 1\n\n\ny = 'x' * {}", 10**5, 10**9),
    ],
)
def test_a_right_answer_has_limits_too(code: str, inside: int, outside: int, box: Sandbox) -> None:
    assert box.passes(code.replace("{}", str(inside)), CHECKS)
    assert not box.passes(code.replace("{}", str(outside)), CHECKS)


@pytest.mark.parametrize("code", ["10**10**10", "sum(range(10**12))", "max(iter(int, 1))"])
def test_a_computation_inside_of_c_has_a_limit(code: str, box: Sandbox) -> None:
    """No line of Python is executed during these: the kernel has to end them."""
    assert not box.passes(f"def f(x):\n    return {code}", CHECKS)


# ---- processes and limits, with an allow-list that allows everything ----


def value_of(open_box: Sandbox, statements: str, expected: object) -> bool:
    """Return True if the value `y` that the statements leave is the expected one."""
    return open_box.passes("import os, sys\n" + statements, [{"expression": "y", "expected": repr(expected)}])


def error_number(statement: str) -> str:
    return f"try:\n    {statement}\n    y = 0\nexcept OSError as error:\n    y = error.errno\n"


def test_without_the_allow_list_answers_do_run(open_box: Sandbox) -> None:
    assert value_of(open_box, "y = ().__class__.__name__", "tuple")


def test_no_file_can_be_opened(open_box: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for statement in (
        f"open({str(secret)!r})",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        "open('new', 'w')",
    ):
        assert value_of(open_box, error_number(statement), errno.EMFILE), statement
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_no_socket_can_be_opened(open_box: Sandbox) -> None:
    assert value_of(open_box, "import socket\n" + error_number("socket.socket()"), errno.EMFILE)
    assert value_of(open_box, "import socket\n" + error_number("socket.socketpair()"), errno.EMFILE)
    assert value_of(open_box, error_number("os.pipe()"), errno.EMFILE)


@pytest.mark.skipif(sys.platform != "linux", reason="how a fork is refused depends on the kernel")
def test_no_process_can_be_started(open_box: Sandbox) -> None:
    forked = error_number("os.fork() or os._exit(0)")
    assert value_of(open_box, forked, errno.EAGAIN)
    assert value_of(
        open_box, "import _thread\ntry:\n    _thread.start_new_thread(int, ())\nexcept RuntimeError:\n    y = 1", 1
    )


def test_nothing_is_inherited(open_box: Sandbox) -> None:
    assert value_of(open_box, "y = dict(os.environ)", {})
    alive = "def alive(fd):\n    try:\n        return bool(os.fstat(fd))\n    except OSError:\n        return False\n"
    assert value_of(open_box, f"{alive}y = [fd for fd in range(256) if alive(fd)]", [0, 1, 2, 3])
    assert value_of(open_box, "y = os.read(0, 9)", b"")
    assert value_of(open_box, "y = [name for name in ('torch', 'minift', 'numpy') if name in sys.modules]", [])
    assert value_of(open_box, "y = 'minift-' in os.getcwd() and os.getsid(0) == os.getpid()", True)


def test_root_is_given_up(open_box: Sandbox) -> None:
    assert value_of(open_box, "y = os.geteuid() != 0", True)


FORGERIES = [
    "os.write(3, b'int 0x2')\nos._exit(0)",
    "os.write(3, b'')\nos._exit(0)",
    "os.write(3, b'int 0x1' * 10**6)\nos._exit(0)",
    "os.write(1, b'int 0x1')\nprint('int 0x1')\nos._exit(0)",
    "os._exit(0)",
    "os.close(3)",
    "import signal\nsignal.raise_signal(9)",
    "os.killpg(0, 9)",
    "import signal\nfor n in (14, 15, 2, 24): signal.signal(n, 1)\nos.close(3)\nwhile True: sum(range(10**9))",
    "sys.setrecursionlimit(10**9)\ndef g(): g()\ng()",
    "def f(x):\n    y = sys._getframe()\n    while y:\n        for value in list(y.f_locals.values()):\n"
    "            if str(value) == '12345': return value\n        y = y.f_back\n    return 0",
    "import gc\nfound = [o for o in gc.get_objects() if o == 12345 or str(o) == '12345']\ndef f(x): return found[0]",
]


@pytest.mark.parametrize("code", FORGERIES)
def test_a_report_cannot_be_forged(code: str, open_box: Sandbox) -> None:
    """An answer does not know what is expected: 12345 is in no process of the sandbox's."""
    assert not open_box.passes("import os, sys\n" + code, [{"expression": "f(0)", "expected": "12345"}])
    assert open_box.passes(RIGHT, CHECKS)


@pytest.mark.skipif(os.geteuid() == 0, reason="as root, answers belong to another user, who cannot do this")
def test_an_answer_that_kills_the_interpreter_fails_alone(open_box: Sandbox) -> None:
    assert not open_box.passes("import os\nos.kill(os.getppid(), 9)\nwhile True: pass", CHECKS)
    assert open_box.passes(RIGHT, CHECKS)


def test_an_interpreter_that_is_lost_is_replaced(box: Sandbox) -> None:
    assert box.passes(RIGHT, CHECKS)
    lost = box._process
    lost.send_signal(signal.SIGKILL)
    lost.wait()
    box.passes(RIGHT, CHECKS)
    assert box.passes(RIGHT, CHECKS) and box._process.pid != lost.pid


def test_an_answer_does_not_change_the_next(open_box: Sandbox) -> None:
    code = "import builtins, math\nbuiltins.len = lambda _: 9\nmath.pi = 3\nbuiltins.left = 1\n"
    check = {"expression": "len([]) == 0 and hasattr(__builtins__, 'left')", "expected": "True"}
    assert not open_box.passes(code + RIGHT, [check])
    assert value_of(
        open_box, "import builtins, math\ny = (len([]), math.pi > 3, hasattr(builtins, 'left'))", (0, True, False)
    )


def test_nobody_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Sandbox() as opened:
        assert opened.passes(RIGHT, CHECKS)
        process, scratch = opened._process, Path(opened._scratch)
        assert scratch.is_dir()
    assert process.poll() is not None and not scratch.exists()


# ---- check_answers, checks_of and systems that cannot do it ----


def test_rows_without_checks_have_no_verdict() -> None:
    calls: list[int] = []
    answers = [RIGHT, RIGHT, "def f(x):\n    return 7", "anything"]
    assert check_answers(answers, [CHECKS, None, CHECKS, None], calls.append) == [True, None, False, None]
    assert calls == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="argument 2 is"):
        check_answers(answers, [CHECKS])


@pytest.mark.parametrize(
    "checks, problem",
    [
        ([], "field 'checks', expected a list of one or more objects"),
        ({}, "field 'checks', expected a list"),
        (["f(0)"], "check 1: expected an object with 'expression' and 'expected'"),
        ([{"expression": "f(0)"}], "check 1: expected an object with 'expression' and 'expected'"),
        ([CHECKS[0], {"expression": "f(0)", "expected": 1}], "check 2: 'expected' is 1, expected a Python literal"),
        ([CHECKS[0] | {"before": 1}], "check 1: 'before' is 1, expected Python statements"),
        ([CHECKS[0] | {"expected": "f(0)"}], "check 1: 'expected' is \"f(0)\", expected a Python literal"),
        ([CHECKS[0] | {"expected": "("}], "expected a Python literal"),
        ([CHECKS[0] | {"expected": "..."}], "expected a Python literal"),
        ([CHECKS[0] | {"expression": "f("}], "check 1: 'expression' is \"f(\", expected a Python expression"),
        ([CHECKS[0] | {"before": "1 +"}], "check 1: 'before' is \"1 +\", expected Python statements"),
    ],
)
def test_malformed_checks_are_named(checks: object, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        checks_of({"checks": checks}, "rows.jsonl: line 3")
    assert str(caught.value).startswith("rows.jsonl: line 3: ") and problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_checks_are_optional() -> None:
    assert checks_of({}, "") is None and checks_of({"checks": None}, "") is None
    assert checks_of({"checks": CHECKS}, "") == CHECKS


def test_a_system_without_fork_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "IS_AVAILABLE", False)
    with pytest.raises(UserError, match="^--run-checks: this system has no fork"):
        check_answers([RIGHT], [CHECKS])
    imported = "import sys; sys.modules['resource'] = None; import minift.run.sandbox as s; assert not s.IS_AVAILABLE"
    subprocess.run([sys.executable, "-c", imported], check=True, cwd=Path(__file__).parents[1])


def test_a_machine_where_nothing_runs_is_not_a_model_that_is_always_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "START", "raise SystemExit")
    with pytest.raises(OSError, match="cannot run an answer here"):
        check_answers([RIGHT], [CHECKS])


def test_an_answer_that_hangs_is_ended_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = UNGUARDED.replace("MAX_SECONDS = 10 ", "MAX_SECONDS = 1 ")
    assert source != UNGUARDED
    (tmp_path / "sandbox_child.py").write_text(source, encoding="utf-8")
    monkeypatch.setattr(sandbox, "FOLDER", tmp_path)
    with Sandbox() as opened:
        assert opened.passes(RIGHT, CHECKS)
        interpreter = opened._process
        assert not opened.passes("import signal, time\nsignal.alarm(0)\ntime.sleep(600)\n" + RIGHT, CHECKS)
        assert opened.passes(RIGHT, CHECKS) and opened._process is interpreter
