"""Tasks about errors, recursion, generators, functions as values, and single statements."""

from random import Random
from typing import Any

from data.make.families.common import (
    NUMBER_LISTS,
    SCALARS,
    Check,
    Task,
    any_name,
    around,
    calls,
    define,
    function,
    named_list,
    named_scalar,
    named_text,
    number_change,
    number_lists,
    number_test,
    one_each,
)


def raise_if(rng: Random) -> Task:
    name, x = named_scalar(rng, "check validate require set ensure")
    test = number_test(rng, x)
    error = rng.choice(["ValueError", "ValueError", "RuntimeError", "IndexError"])
    message = rng.choice([
        "bad value", "not allowed", f"invalid {x}", f"wrong {x}", "out of range", "refused", f"{x} not accepted",
    ])  # fmt: skip
    whats = (
        f'raises {error}("{message}") if `{x}` {test.is_} and returns `{x}` otherwise',
        f'returns `{x}`, but raises {error} with the message "{message}" when it {test.is_}',
    )
    body = f'if {test.code}:\n    raise {error}("{message}")\nreturn {x}'

    def reference(v: int) -> int:
        if test.holds(v):
            raise {"V": ValueError, "R": RuntimeError, "I": IndexError}[error[0]](message)
        return v

    return function(rng, name, x, body, whats, reference, around(*test.edges))


def try_parse(rng: Random) -> Task:
    name, s = named_text(rng, "parse read to_number convert")
    kind, default = rng.choice(["int", "float"]), rng.choice(["0", "None", "-1", "1", str(rng.randrange(2, 99))])
    whats = (
        f"converts `{s}` to {'an int' if kind == 'int' else 'a float'} and returns {default} if that raises ValueError",
        f"returns `{kind}({s})`, or {default} if the conversion fails with a ValueError",
    )
    body = f"try:\n    return {kind}({s})\nexcept ValueError:\n    return {default}"
    good = {"12": 12, " 7 ": 7, "x": None, "": None, "-3": -3, "4.5": None if kind == "int" else 4.5}
    reference = lambda v: eval(default) if good[v] is None else eval(kind)(good[v])
    return function(rng, name, s, body, whats, reference, one_each(good))


def check_type(rng: Random) -> Task:
    name, x = named_scalar(rng, "check accept take describe")
    kind = rng.choice(["int", "str", "float", "list", "dict", "tuple"])
    a, b = rng.choice([
        ('"yes"', '"no"'), ("True", "False"), ("1", "0"), (f'"{kind}"', '"other"'), (x, "None"), ('"good"', '"bad"'),
        (x, "0"), (x, '""'), ("1", "-1"),
    ])  # fmt: skip
    a_words, b_words = (f"`{v}`" if v == x else v for v in (a, b))
    whats = (
        f"returns {a_words} if `{x}` is of type {kind} and {b_words} otherwise",
        f"uses isinstance to return {a_words} for an argument of type {kind} and {b_words} for any other",
    )
    body = f"if isinstance({x}, {kind}):\n    return {a}\nreturn {b}"
    values = [3, "s", 2.5, [1], {"k": 1}, (1, 2)]
    if a == "True":
        body = f"return isinstance({x}, {kind})"

    def reference(v: Any) -> Any:
        if type(v).__name__ != kind:
            return eval(b)
        return v if a == x else eval(a)

    return function(rng, name, x, body, whats, reference, one_each(values))


def recursive_number(rng: Random) -> Task:
    noun = rng.choice(SCALARS)
    name, n = f"{rng.choice(['recursive', 'nested', 'compute', 'f'])}_{noun}", rng.choice(["n", "k", "x", "level"])
    start, a, b = rng.randrange(0, 30), rng.randrange(2, 10), rng.randrange(1, 60)
    words, code, step = rng.choice([
        (f"{a} times its value for `{n} - 1`", f"{a} * {name}({n} - 1)", lambda v, k: a * v),
        (f"{b} plus its value for `{n} - 1`", f"{b} + {name}({n} - 1)", lambda v, k: b + v),
        (f"`{n}` plus its value for `{n} - 1`", f"{n} + {name}({n} - 1)", lambda v, k: k + v),
        (f"`{n}` times its value for `{n} - 1`", f"{n} * {name}({n} - 1)", lambda v, k: k * v),
        (f"{a} times its value for `{n} - 1` plus {b}", f"{a} * {name}({n} - 1) + {b}", lambda v, k: a * v + b),
    ])  # fmt: skip
    whats = (
        f"is recursive: it returns {start} for 0, and otherwise {words}",
        f"returns {start} if `{n}` is 0 and, by recursion, {words} otherwise",
    )
    body = f"if {n} == 0:\n    return {start}\nreturn {code}"

    def reference(top: int) -> int:
        value = start
        for k in range(1, top + 1):
            value = step(value, k)
        return value

    return function(rng, name, n, body, whats, reference, one_each([0, 1, 2, 5]))


def generator(rng: Random) -> Task:
    name, n = (
        any_name(rng, "generate stream iterate yield", NUMBER_LISTS),
        rng.choice(["n", "count", "limit", "stop"]),
    )
    change, start = number_change(rng, "i"), rng.choice([0, 0, 1, rng.randrange(2, 30)])
    whats = (
        f"is a generator: for each `i` from {start} up to but not including `{n}` it yields `i` {change.words}",
        f"yields each integer `i` with {start} <= i < `{n}`, {change.words}",
    )
    spread = f"range({start}, {n})" if start else f"range({n})"
    code = define(name, n, f"for i in {spread}:\n    yield {change.code}")
    cases = [start, start + 1, start + 4, start + 45]
    checks = [Check(f"list({name}({v}))", [change.apply(u) for u in range(start, v)]) for v in cases]
    return function(rng, name, n, "pass", whats, lambda v: None, [])._replace(output=code, checks=checks)


def generator_filter(rng: Random) -> Task:
    name, items, item = named_list(rng, "yield stream iterate generate")
    test = number_test(rng, item)
    whats = (
        f"yields the numbers in `{items}` that {test.are}",
        f"is a generator over each `{item}` of `{items}` that {test.is_}",
    )
    code = define(name, items, f"for {item} in {items}:\n    if {test.code}:\n        yield {item}")
    checks = [Check(f"list({name}({v}))", [u for u in v if test.holds(u)]) for (v,) in number_lists(*test.edges)]
    checks.append(Check(f"hasattr({name}([]), '__next__')", True))
    return function(rng, name, items, "pass", whats, lambda v: None, [])._replace(output=code, checks=checks)


def closure(rng: Random) -> Task:
    op, verb, reference = rng.choice([
        ("+", "adds", lambda x, k: x + k), ("*", "multiplies", lambda x, k: x * k),
        ("-", "subtracts", lambda x, k: x - k), (">", "compares", lambda x, k: x > k),
        ("%", "reduces", lambda x, k: x % k),
    ])  # fmt: skip
    k = rng.choice("k n amount step factor limit size base".split())
    x, inner = rng.choice("x value number item".split()), rng.choice("inner apply run change function".split())
    name = f"{any_name(rng, 'make create build get', SCALARS)}_{rng.choice(['changer', 'function', 'maker', 'tool'])}"
    words = {"adds": f"adds `{k}` to `{x}`", "multiplies": f"multiplies `{x}` by `{k}`",
        "subtracts": f"subtracts `{k}` from `{x}`",
             "compares": f"tells whether `{x}` is greater than `{k}`",
             "reduces": f"returns `{x}` modulo `{k}`"}[verb]  # fmt: skip
    whats = (
        f"returns a function `{inner}({x})` that {words}",
        f"defines an inner function `{inner}` of `{x}`, which {words}, and returns it",
    )
    body = f"def {inner}({x}):\n    return {x} {op} {k}\n\nreturn {inner}"
    task = function(rng, name, k, body, whats, lambda v: None, [])
    return task._replace(checks=[Check(f"{name}({b})({a})", reference(a, b)) for a, b in ((7, 3), (2, 5), (5, 5))])


def lambda_variable(rng: Random) -> Task:
    noun = rng.choice(SCALARS)
    name, x = f"{rng.choice(['get', 'to', 'compute', 'new'])}_{noun}", rng.choice([noun, "x", "n", "value"])
    change = number_change(rng, x)
    ask = (
        f"Assign to `{name}` a lambda of `{x}` that returns `{x}` {change.words}.",
        f"Write a lambda called `{name}` that takes `{x}` and returns it {change.words}.",
        f"Define `{name}` as a lambda: its argument `{x}` {change.words}.",
        f"Use a lambda to define `{name}({x})`, which returns `{x}` {change.words}.",
    )
    checks = calls(name, change.apply, one_each([0, 1, -2, 7, 40]))
    return Task(rng.choice(ask), "", f"{name} = lambda {x}: {change.code}", checks)


def print_loop(rng: Random) -> Task:
    name = any_name(rng, "print show display", NUMBER_LISTS)
    i, start = rng.choice(["i", "number", "k", "n"]), rng.randrange(0, 30)
    stop, test, change = start + rng.randrange(5, 40), number_test(rng, i), number_change(rng, i)
    if rng.random() < 0.5:
        whats = (
            f"prints the numbers `{i}` from {start} to {stop} (inclusive) that {test.are}, one a line",
            f"prints each `{i}` from {start} up to and including {stop} if it {test.is_}",
        )
        loop, lines = f"if {test.code}:\n        print({i})", [v for v in range(start, stop + 1) if test.holds(v)]
    else:
        whats = (
            f"prints each number `{i}` from {start} to {stop} (inclusive) {change.words}, one a line",
            f"loops over `{i}` from {start} up to and including {stop}, printing it {change.words}",
        )
        loop, lines = f"print({change.code})", [change.apply(v) for v in range(start, stop + 1)]
    body = f"for {i} in range({start}, {stop + 1}):\n    {loop}"
    task = function(rng, name, "", body, whats, lambda: None, [])
    return task._replace(checks=[Check(f"printed({name})", "".join(f"{v}\n" for v in lines))])


def assign_comprehension(rng: Random) -> Task:
    result, source = rng.sample(NUMBER_LISTS, 2)
    item = source[:-1]
    test, change = number_test(rng, item), number_change(rng, item)
    ask = (
        f"Write one line that stores in `{result}` the numbers of `{source}` that {test.are}, each {change.words}.",
        f"Use a comprehension to assign to `{result}` each `{item}` of `{source}` {change.words}, if it {test.is_}.",
        f"Given a list `{source}`, set `{result}` to a list of those that {test.are}, {change.words}.",
    )
    code = f"{result} = [{change.code} for {item} in {source} if {test.code}]"
    checks = [
        Check(result, [change.apply(u) for u in v if test.holds(u)], f"{source} = {v}")
        for (v,) in number_lists(*test.edges)
    ]
    return Task(rng.choice(ask), "", code, checks)


def assign_range(rng: Random) -> Task:
    name, start = rng.choice(NUMBER_LISTS), rng.randrange(0, 50)
    stop, step = start + rng.randrange(10, 60), rng.randrange(2, 10)
    ask = (
        f"Create a list `{name}` with the numbers from {start} up to but not including {stop} in steps of {step}.",
        f"Assign to `{name}` the list of every {step}th number from {start} to below {stop}.".replace(
            " 2th", " 2nd"
        ).replace(" 3th", " 3rd"),
        f"Write a statement that makes `{name}` a list counting from {start} by {step}, ending before {stop}.",
    )
    expected = [v for v in range(start, stop) if (v - start) % step == 0]
    return Task(rng.choice(ask), "", f"{name} = list(range({start}, {stop}, {step}))", [Check(name, expected)])


def swap_and_update(rng: Random) -> Task:
    a, b = rng.sample(SCALARS, 2)
    n = rng.randrange(2, 99)
    words, code, after = rng.choice([
        (f"swaps the variables `{a}` and `{b}`", f"{a}, {b} = {b}, {a}", lambda p, q: (q, p)),
        (f"adds `{b}` times {n} to `{a}`", f"{a} += {b} * {n}", lambda p, q: (p + q * n, q)),
        (f"sets `{a}` to the larger of `{b}` and {n}", f"{a} = max({b}, {n})", lambda p, q: (max(q, n), q)),
        (f"subtracts {n} from `{a}` if it is greater than `{b}`", f"if {a} > {b}:\n    {a} -= {n}",
         lambda p, q: (p - n if p > q else p, q)),
        (f"sets `{a}` to {n} if `{b}` is 0", f"if {b} == 0:\n    {a} = {n}", lambda p, q: (p if q else n, q)),
        (f"sets both `{a}` and `{b}` to {n}", f"{a} = {b} = {n}", lambda p, q: (n, n)),
    ])  # fmt: skip
    ask = (
        f"Write Python code that {words}.",
        f"Write a statement that {words}.",
        f"Give a short piece of Python that {words}.",
    )
    checks = [
        Check(f"({a}, {b})", after(p, q), f"{a}, {b} = {p}, {q}") for p, q in ((3, 8), (9, 0), (n, n), (200, 120))
    ]
    return Task(rng.choice(ask), "", code, checks)


FAMILIES = (
    raise_if, try_parse, check_type, recursive_number, generator, generator_filter, closure, lambda_variable,
    print_loop, assign_comprehension, assign_range, swap_and_update,
)  # fmt: skip
