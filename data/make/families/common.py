"""Shared by the task families: word pools, conditions and changes (in words and in code), checks."""

import json
from collections.abc import Callable, Iterable
from copy import deepcopy
from random import Random
from typing import Any, NamedTuple


class Check(NamedTuple):
    """A condition on an answer: `expression` equals `expected`.

    The expression is evaluated in a fresh namespace, after `before` and then the answer have run there. In it, `ANSWER`
    is the text of the answer, `printed(f)` is the output of calling f, and `error_of(f)` is the error that f raises, as
    `Name: message`. If the expression is just `ANSWER`, the answer is not run.
    """

    expression: str
    expected: Any
    before: str = ""


class Task(NamedTuple):
    """One instruction with the right answer and the checks for any answer."""

    instruction: str
    input: str
    output: str
    checks: list[Check]


class Test(NamedTuple):
    """A condition in words, plural (`are`) and singular (`is_`), as code, as a predicate; with values near its edge."""

    are: str
    is_: str
    code: str
    holds: Callable[[Any], bool]
    edges: list


class Change(NamedTuple):
    """A transformation: in words ("each number `words`"), as code, as a function."""

    words: str
    code: str
    apply: Callable[[Any], Any]


NUMBER_LISTS = """prices scores ages heights weights grades distances speeds marks readings costs lengths sizes points
amounts votes rates levels fees bills sales orders steps laps goals profits credits debts deposits hours minutes days
weeks years miles depths widths volumes powers samples signals pages seats coins stocks ranks wages bids offers rents
gains scales angles shares donations visits clicks repairs tickets payments""".split()
WORD_LISTS = """names titles colors fruits animals tags labels users files teams tools songs books towns rivers streets
planets flowers birds cars games brands drinks shops pets guests players students teachers doctors farmers artists
authors pilots singers actors villages mountains islands sports hobbies_ plants trees roads rooms parks schools trains
ships cooks drivers friends neighbors members workers topics chapters codes""".replace("hobbies_", "meals").split()
TEXTS = """text word sentence line phrase title message name label comment header reply password slogan motto caption
note address query token answer question remark quote email subject nickname""".split()
SCALARS = """number value price score age height weight distance speed amount level rate size length width cost points
fee year volume depth power rank wage bid offer rent salary budget profit""".split()
CLASSES = """Dog Car House Book Player Robot Lamp Phone Chair Table Ship Train Plane Tree Garden School Student Teacher
Worker Farmer Painter Singer Camera Clock Bottle Window Door Bridge Tower Castle River Island Planet Rocket Engine Wheel
Guitar Piano Ticket Letter Parcel Basket Market Bakery Hotel Museum Library Kitchen Sensor Printer""".split()
TEXT_FIELDS = "name title label code kind color brand owner city country model status".split()
NUMBER_FIELDS = "size price weight age width height length level rank score year speed volume cost points power".split()
KEYS = "name city color brand kind size price weight age level score year rank cost owner country status code".split()
SEPARATORS = ["-", "_", ", ", "; ", " / ", ":", " | ", ".", " + ", "*"]
SUFFIXES = "ing ed er ly ness tion able ful ous al".split()
LETTERS = "abcdefghiklmnoprstuw"
SAMPLE_WORDS = """apple pear kiwi mango grape lemon peach plum cherry olive onion carrot bread cheese milk sugar tea
coffee river stone cloud storm winter summer garden window table chair paper pencil silver copper red green blue
tiger horse eagle shark mouse rabbit""".split()
SAMPLE_TEXTS = [
    "",
    "a",
    "Hello World",
    "level",
    "banana split",
    "  Mixed Case  ",
    "x1y22z",
    "one two three four",
    "Noon",
]
FRAMES = (
    "Write a function `{call}` that {what}.",
    "Write a Python function `{call}` that {what}.",
    "Write a function called `{name}` that takes {takes} and {what}.",
    "Create a function named `{name}` that takes {takes} and {what}.",
    "Create a Python function `{call}` that {what}.",
    "Define a function `{call}` which {what}.",
    "Define `{call}` so that it {what}.",
    "Implement `{call}`, a function that {what}.",
    "Implement a Python function called `{name}` that takes {takes} and {what}.",
    "I need a function `{call}` that {what}.",
    "Please write a function `{call}` that {what}.",
)


def quote(text: Any) -> str:
    """Return a literal with double quotes, the style of all answers."""
    return json.dumps(text)


def indent(code: str) -> str:
    return "\n".join(f"    {line}" if line else line for line in code.split("\n"))


def define(name: str, arguments: str, body: str) -> str:
    return f"def {name}({arguments}):\n{indent(body)}"


def and_list(things: Iterable[str]) -> str:
    *head, last = things
    return f"{', '.join(head)} and {last}" if head else last


def in_words(argument: str) -> str:
    name, _, default = argument.partition("=")
    return f"`{name}` (default {default})" if default else f"`{name}`"


def calls(name: str, reference: Callable, cases: Iterable[tuple], before: str = "") -> list[Check]:
    """Return one check per case: the value of the call, or the error if the reference raises one."""
    checks = []
    for case in cases:
        call = f"{name}({', '.join(map(repr, case))})"
        try:
            checks.append(Check(call, reference(*deepcopy(case)), before))
        except Exception as error:
            checks.append(Check(f"error_of(lambda: {call})", f"{type(error).__name__}: {error}", before))
    return checks


def function(
    rng: Random, name: str, arguments: str, body: str, whats: tuple, reference: Callable, cases: Iterable[tuple]
) -> Task:
    """Return a task that asks for one function. `whats` are phrases such as "returns the sum of `prices`"."""
    takes = and_list([in_words(argument) for argument in arguments.split(", ")])
    what = rng.choice(whats)
    # Not "a function that takes `x` and takes a number and …".
    frames = [frame for frame in FRAMES if arguments and not what.startswith("takes") or "{takes}" not in frame]
    instruction = rng.choice(frames).format(call=f"{name}({arguments})", name=name, takes=takes, what=what)
    return Task(instruction, "", define(name, arguments, body), calls(name, reference, cases))


def one_each(values: Iterable) -> list[tuple]:
    return [(value,) for value in values]


def around(*edges: int) -> list[tuple]:
    """Return cases with one whole number: each edge, its neighbours, and some others."""
    near = {edge + step for edge in edges for step in (-1, 0, 1)}
    return one_each(sorted(near | {-7, 0, 1, 2, 10, 25, 100}))


def number_lists(*edges: int) -> list[tuple]:
    """Return cases with one list of numbers.

    When elements are counted, "different from" and "at most" give the same number for all edges together, and different
    numbers without the last edge.
    """
    mixed = [[0, 7, -3, 12, 5, *edges, 8], [*reversed(edges), 100, -100, 2, 2, 31]]
    return one_each([[], list(edges), list(edges[:-1]), *mixed])


def word_lists(*edges: str) -> list[tuple]:
    mixed = [["kiwi", *edges, "Banana", "level", "RED"], ["a", "planning", *edges, "noon"]]
    return one_each([[], list(edges), list(edges[:-1]), *mixed])


def texts(*edges: str) -> list[tuple]:
    return one_each([*edges, *SAMPLE_TEXTS])


def any_name(rng: Random, verbs: str, pool: list[str]) -> str:
    return f"{rng.choice(verbs.split())}_{rng.choice(pool)}"


def named_list(rng: Random, verbs: str, pool: list[str] = NUMBER_LISTS) -> tuple[str, str, str]:
    """Return function name, list argument and loop variable, for example ("sum_prices", "prices", "price")."""
    noun = rng.choice(pool)
    general = ["values", "numbers", "items"] if pool is NUMBER_LISTS else ["words", "strings", "items"]
    items = noun if rng.random() < 0.6 else rng.choice(general)
    return f"{rng.choice(verbs.split())}_{noun}", items, items[:-1]


def named_text(rng: Random, verbs: str) -> tuple[str, str]:
    noun = rng.choice(TEXTS)
    return f"{rng.choice(verbs.split())}_{noun}", noun if rng.random() < 0.6 else rng.choice(["text", "string", "s"])


def named_scalar(rng: Random, verbs: str) -> tuple[str, str]:
    noun = rng.choice(SCALARS)
    return f"{rng.choice(verbs.split())}_{noun}", noun if rng.random() < 0.6 else rng.choice(["n", "x", "number"])


def number_test(rng: Random, x: str) -> Test:
    n, m = rng.randrange(2, 60), rng.randrange(2, 13)
    top = n + rng.randrange(3, 40)
    digit = rng.randrange(10)
    words, code, holds, edges = rng.choice([
        (f"greater than {n}", f"{x} > {n}", lambda v: v > n, [n - 1, n, n + 1]),
        (f"less than {n}", f"{x} < {n}", lambda v: v < n, [n - 1, n, n + 1]),
        (f"at least {n}", f"{x} >= {n}", lambda v: v >= n, [n - 1, n, n + 1]),
        (f"at most {n}", f"{x} <= {n}", lambda v: v <= n, [n - 1, n, n + 1]),
        (f"divisible by {m}", f"{x} % {m} == 0", lambda v: v % m == 0, [m, 2 * m + 1, 3 * m, m + 1, 5 * m - 1]),
        (f"not divisible by {m}", f"{x} % {m} != 0", lambda v: v % m != 0, [m, 2 * m + 1, 3 * m, m + 1]),
        (f"between {n} and {top}", f"{n} <= {x} <= {top}", lambda v: n <= v <= top,
         [n - 1, n, n + 1, top - 1, top, top + 1]),
        (f"different from {n}", f"{x} != {n}", lambda v: v != n, [n - 1, n, n + 1]),
        ("even", f"{x} % 2 == 0", lambda v: v % 2 == 0, [4, 5, 9]),
        ("odd", f"{x} % 2 == 1", lambda v: v % 2 == 1, [4, 5, 9]),
        ("positive", f"{x} > 0", lambda v: v > 0, [-1, 0, 1]), ("negative", f"{x} < 0", lambda v: v < 0, [-1, 0, 1]),
    ])  # fmt: skip
    if rng.random() < 0.08:
        ending = f"with the digit {digit}"
        return Test(f"end {ending}", f"ends {ending}", f"{x} % 10 == {digit}", lambda v: v % 10 == digit,
                    [digit, 10 + digit, 11 + digit, 9 + digit])  # fmt: skip
    return Test(f"are {words}", f"is {words}", code, holds, edges)


def word_test(rng: Random, x: str) -> Test:
    n, letter, suffix = rng.randrange(3, 12), rng.choice(LETTERS), rng.choice(SUFFIXES)
    sized = ["a" * (n - 1), "b" * n, "c" * (n + 1)]
    start, end, inside = f"{letter}xx", f"yy{letter}", f"z{letter}z"
    return Test(
        *rng.choice(
            [
                (f"are longer than {n} characters", f"is longer than {n} characters", f"len({x}) > {n}",
                 lambda v: len(v) > n, sized),
                (f"are shorter than {n} characters", f"is shorter than {n} characters", f"len({x}) < {n}",
                 lambda v: len(v) < n, sized),
                (f"have exactly {n} characters", f"has exactly {n} characters", f"len({x}) == {n}",
                 lambda v: len(v) == n, sized),
                (f'start with "{letter}"', f'starts with "{letter}"', f'{x}.startswith("{letter}")',
                 lambda v: v[:1] == letter, [start, end, inside]),
                (f'end with "{letter}"', f'ends with "{letter}"', f'{x}.endswith("{letter}")',
                 lambda v: v[-1:] == letter, [start, end, inside]),
                (f'end with "{suffix}"', f'ends with "{suffix}"', f'{x}.endswith("{suffix}")',
                 lambda v: v[-len(suffix) :] == suffix, ["go" + suffix, suffix + "o", "go" + suffix[1:]]),
                (f'contain "{letter}"', f'contains "{letter}"', f'"{letter}" in {x}',
                 lambda v: v.count(letter) > 0, [start, end, inside]),
                (f'do not contain "{letter}"', f'does not contain "{letter}"', f'"{letter}" not in {x}',
                 lambda v: v.count(letter) == 0, [start, end, inside]),
                ("are in upper case", "is in upper case", f"{x}.isupper()", lambda v: v.isupper(), ["AB", "aB", "ab"]),
            ]
        )
    )  # fmt: skip


def number_change(rng: Random, x: str) -> Change:
    n = rng.randrange(2, 40)
    k = rng.randrange(2, 6)
    return Change(
        *rng.choice(
            [
                (f"multiplied by {n}", f"{x} * {n}", lambda v: v * n),
                (f"increased by {n}", f"{x} + {n}", lambda v: v + n),
                (f"decreased by {n}", f"{x} - {n}", lambda v: v - n),
                (f"divided by {n}", f"{x} / {n}", lambda v: v / n),
                (f"taken modulo {n}", f"{x} % {n}", lambda v: v % n),
                (f"raised to the power of {k}", f"{x} ** {k}", lambda v: v**k),
                ("doubled", f"{x} * 2", lambda v: v + v),
                ("squared", f"{x} ** 2", lambda v: v * v),
                ("negated", f"-{x}", lambda v: 0 - v),
            ]
        )
    )


def word_change(rng: Random, x: str) -> Change:
    n, letter, mark = rng.randrange(2, 7), rng.choice(LETTERS), rng.choice("!?.:;*#")
    other = rng.choice(LETTERS.replace(letter, ""))
    return Change(
        *rng.choice(
            [
                ("in upper case", f"{x}.upper()", lambda v: v.upper()),
                ("in lower case", f"{x}.lower()", lambda v: v.lower()),
                ("capitalized", f"{x}.capitalize()", lambda v: v[:1].upper() + v[1:].lower()),
                ("reversed", f"{x}[::-1]", lambda v: "".join(reversed(v))),
                ("stripped of surrounding spaces", f"{x}.strip()", lambda v: v.strip(" ")),
                (f"repeated {n} times", f"{x} * {n}", lambda v: "".join([v] * n)),
                (f"cut to {n} characters", f"{x}[:{n}]", lambda v: "".join(list(v)[:n])),
                (f'followed by "{mark}"', f'{x} + "{mark}"', lambda v: f"{v}{mark}"),
                (f'with "{letter}" replaced by "{other}"', f'{x}.replace("{letter}", "{other}")',
                 lambda v: "".join(other if c == letter else c for c in v)),
            ]
        )
    )  # fmt: skip


CHANGE_WORDS = [("kiwi",), ("Banana Split",), ("  abcdefghiklm ",), ("noprstuw",), ("",)]
TWO_ARGUMENTS = """a,b x,y first,second left,right start,stop old,new width,height price,tax low,high mine,yours
before,after here,there income,expenses goals,misses rows,columns hours,minutes""".split()
LABEL_PAIRS = """adult,child pass,fail high,low hot,cold big,small yes,no rich,poor long,short old,new open,closed
heavy,light fast,slow loud,quiet full,empty good,bad warm,cool deep,shallow strong,weak near,far
cheap,expensive safe,risky early,late win,lose on,off wide,narrow""".split()
STOCK = {"pear": 3, "apple": 12, "fig": 0, "plum": 40, "kiwi": 7, "date": -2}


def named_dict(rng: Random, verbs: str) -> tuple[str, str, str, str]:
    """Return function name, dictionary argument, key variable and value variable."""
    data, key, value = rng.choice(
        """stock,item,count prices,product,price ages,person,age scores,player,score marks,student,mark
        votes,candidate,number salaries,worker,salary sizes,file,size distances,city,distance weights,animal,weight
        costs,project,cost levels,tank,level points,team,point sales,shop,amount data,key,value table,name,value
        heights,mountain,height hours,employee,time tickets,event,left readings,sensor,reading""".split()
    ).split(",")
    return f"{rng.choice(verbs.split())}_{data}", data, key, value


def records(rng: Random) -> list[dict]:
    return [{key: (i * 7 + j * 5) % 11 + i for j, key in enumerate(KEYS)} for i in rng.sample(range(9), 4)]


def class_task(rng: Random, whats: tuple, code: str, checks: list[Check], name: str) -> Task:
    """Return a task that asks for a class. `whats` follow its name: "with the fields `a` and `b`"."""
    start = rng.choice([
        "Write a class `{}`", "Create a Python class `{}`", "Define a class called `{}`", "Implement a class `{}`",
        "Create a class named `{}`", "Write a Python class called `{}`",
    ])  # fmt: skip
    return Task(f"{start.format(name)} {rng.choice(whats)}.", "", code, checks)


def class_head(name: str, fields: list[str]) -> str:
    stores = "\n".join(f"        self.{field} = {field}" for field in fields)
    return f"class {name}:\n    def __init__(self, {', '.join(fields)}):\n{stores}"
