"""Tasks whose input is code and whose answer is the value that it has or prints."""

from random import Random
from typing import Any

from data.make.families.common import SAMPLE_WORDS, SCALARS, Check, Task, named_scalar, number_change, number_test


def value_task(rng: Random, ask: tuple, code: str, value: Any) -> Task:
    answer = value if isinstance(value, str) else repr(value)
    return Task(rng.choice(ask), code, answer, [Check("ANSWER", answer)])


EVALUATE = (
    "What does this expression evaluate to?",
    "Evaluate this Python expression.",
    "Give the value of the following expression.",
    "What is the result of this expression?",
    "What value does Python print for this expression?",
    "Work out the value of this expression.",
    "Compute the value of this Python expression.",
    "What would Python give for the following expression?",
    "State the value of this expression.",
    "What is the value of the following Python expression?",
    "Find the value of this Python expression.",
    "Evaluate the following expression.",
)


def value_of_arithmetic(rng: Random) -> Task:
    a, b, c = rng.randrange(2, 30), rng.randrange(2, 13), rng.randrange(2, 50)
    code, value = rng.choice([
        (f"{a} + {b} * {c}", a + b * c), (f"{a} * {b} - {c}", a * b - c), (f"({a} + {c}) * {b}", (a + c) * b),
        (f"{c} // {b}", c // b), (f"{c} % {b}", c % b), (f"{b} ** 2", b * b),
        (f"max({a}, {c}) - min({a}, {c})", abs(a - c)), (f"{a} > {c}", a > c), (f"{a} + {b} == {c}", a + b == c),
        (f"abs({a} - {c})", abs(a - c)), (f"divmod({c}, {b})", divmod(c, b)), (f"{a} != {c}", a != c),
    ])  # fmt: skip
    return value_task(rng, EVALUATE, code, value)


def value_of_text(rng: Random) -> Task:
    w, n = rng.choice(SAMPLE_WORDS), rng.randrange(1, 4)
    n = min(n, len(w) - 1)
    c, other = rng.choice(w), rng.choice(SAMPLE_WORDS)
    code, value = rng.choice([
        (f'"{w}".upper()', w.upper()), (f'len("{w}")', len(w)), (f'"{w}"[:{n}]', w[:n]), (f'"{w}"[{n}]', w[n]),
        (f'"{w}"[::-1]', w[::-1]), (f'"{w}".count("{c}")', w.count(c)), (f'"{w}" + "{other}"', w + other),
        (f'"{w}"[-{n}:]', w[-n:]), (f'"{c}" * {n + 1}', c * (n + 1)), (f'"{w}".capitalize()', w.capitalize()),
        (f'"{c}" in "{other}"', c in other), (f'"{w}".index("{c}")', w.index(c)),
        (f'"{w} {other}".split()', [w, other]), (f'"-".join(["{w}", "{other}"])', f"{w}-{other}"),
    ])  # fmt: skip
    return value_task(rng, EVALUATE, code, repr(value).replace("'", '"'))


def value_of_list(rng: Random) -> Task:
    v = [rng.randrange(1, 30) for _ in range(rng.randrange(4, 7))]
    n = rng.randrange(1, 4)
    code, value = rng.choice([
        (f"sorted({v})", sorted(v)), (f"len({v})", len(v)), (f"{v}[{n}]", v[n]), (f"{v}[:{n}]", v[:n]),
        (f"{v}[-1]", v[-1]), (f"{v}[::-1]", v[::-1]), (f"max({v})", max(v)), (f"{v}[{n}:]", v[n:]),
        (f"{v[0]} in {v[1:]}", v[0] in v[1:]), (f"{v[:3]} + {v[3:]}", v), (f"{v}.index({v[n]})", v.index(v[n])),
        (f"sum({v[:3]})", sum(v[:3])),
    ])  # fmt: skip
    return value_task(rng, EVALUATE, code, value)


PRINTS = (
    "What does this code print?",
    "What is the output of this code?",
    "What will be printed when this code runs?",
    "Tell me what this prints.",
    "Write down what this code prints.",
    "Give the output of the following code.",
    "Which lines does this code print?",
)


def value_of_call(rng: Random) -> Task:
    name, x = named_scalar(rng, "get make compute check")
    change, test, v = number_change(rng, x), number_test(rng, x), rng.randrange(1, 30)
    body, value = rng.choice([(change.code, change.apply(v)), (test.code, test.holds(v))])
    return value_task(rng, PRINTS, f"def {name}({x}):\n    return {body}\n\n\nprint({name}({v}))", value)


def value_after_loop(rng: Random) -> Task:
    name, start, step, times = rng.choice(SCALARS), rng.randrange(0, 20), rng.randrange(1, 10), rng.randrange(2, 6)
    op, value = rng.choice([("+=", start + step * times), ("-=", start - step * times)])
    ask = (*PRINTS, f"What is the value of `{name}` at the end?")
    return value_task(
        rng, ask, f"{name} = {start}\nfor _ in range({times}):\n    {name} {op} {step}\nprint({name})", value
    )


def type_of_value(rng: Random) -> Task:
    n, m, w = rng.randrange(1, 99), rng.randrange(1, 10), rng.choice(SAMPLE_WORDS)
    code, kind = rng.choice([
        (f"{n}", "int"), (f"{n}.{m}", "float"), (f'"{w}"', "str"), (f"[{n}, {m}]", "list"), (f"({n}, {m})", "tuple"),
        (f'{{"{w}": {n}}}', "dict"), (f"{{{n}, {m}}}", "set"), (f"{n} > {m}", "bool"), (f"{n} / {m}", "float"),
        (f'len("{w}")', "int"), (f"str({n})", "str"), (f'"{w}".split()', "list"), (f"{n} // {m}", "int"),
        (f'"{w}" == "{n}"', "bool"), ("None", "NoneType"), (f'["{w}"] * {m}', "list"),
    ])  # fmt: skip
    ask = (
        "What is the type of this value?",
        "Name the Python type of this expression.",
        "Which type does this expression have?",
        "What would `type(...).__name__` be for this?",
        "Give the name of the type of this expression.",
        "Tell me the type of this value.",
    )
    return value_task(rng, ask, code, kind)


FAMILIES = (
    value_of_arithmetic, value_of_text, value_of_list, value_of_call, value_after_loop, type_of_value,
)  # fmt: skip
