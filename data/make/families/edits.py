"""Tasks with an input: code to change, or data to turn into code."""

from collections.abc import Callable
from random import Random
from typing import Any

from data.make.families.common import (
    CLASSES,
    KEYS,
    LABEL_PAIRS,
    NUMBER_FIELDS,
    NUMBER_LISTS,
    SAMPLE_WORDS,
    SCALARS,
    TEXT_FIELDS,
    TEXTS,
    TWO_ARGUMENTS,
    WORD_LISTS,
    Check,
    Task,
    any_name,
    around,
    calls,
    class_head,
    define,
    named_list,
    named_scalar,
    named_text,
    number_change,
    number_lists,
    number_test,
    one_each,
    quote,
    records,
)


def small_function(rng: Random) -> tuple[str, str, str, Callable, list[tuple]]:
    """Return name, argument, expression, reference and cases of a one-line function to edit."""
    name, x = named_scalar(rng, "get make compute find check update")
    test, change = number_test(rng, x), number_change(rng, x)
    code, reference = rng.choice([(test.code, test.holds), (change.code, change.apply), (change.code, change.apply)])
    return name, x, code, reference, around(*test.edges, 40)


def rename_function(rng: Random) -> Task:
    name, x, code, reference, cases = small_function(rng)
    new = any_name(rng, "read solve build score adapt", NUMBER_LISTS)
    ask = (
        f"Rename the function in this code to `{new}`.",
        f"Change the function's name to `{new}`.",
        f"Rename `{name}` to `{new}`.",
        f"Give this function the new name `{new}`.",
    )
    checks = [*calls(new, reference, cases), Check(f"'{name}' in globals()", False)]
    return Task(rng.choice(ask), define(name, x, f"return {code}"), define(new, x, f"return {code}"), checks)


def rename_argument(rng: Random) -> Task:
    name, x, code, reference, cases = small_function(rng)
    new = rng.choice([y for y in [*SCALARS, "a", "m", "t", "item", "data"] if y != x])
    ask = (
        f"Rename the parameter of this function to `{new}`.",
        f"Rename `{x}` to `{new}` in this function.",
        f"Call the function's argument `{new}` instead of `{x}`.",
    )
    renamed = (
        code.replace(x, new)
        if x not in ("n", "x")
        else " ".join(new if word in (x, f"-{x}") else word for word in code.split())
    )
    renamed = f"-{new}" if code == f"-{x}" else renamed
    checks = [Check(f"{name}({new}={v})", reference(v)) for (v,) in cases]
    return Task(rng.choice(ask), define(name, x, f"return {code}"), define(name, new, f"return {renamed}"), checks)


def missing_colon(rng: Random) -> Task:
    name, items, item = named_list(rng, "keep list collect show")
    test = number_test(rng, item)
    code = define(name, items, f"for {item} in {items}:\n    if {test.code}:\n        print({item})")
    wrong = [line for line in code.split("\n") if line.endswith(":")]
    line = rng.choice(wrong)
    broken = rng.choice([code.replace(line, line[:-1], 1)] * 2 + [code.replace(f"print({item})", f"print({item}", 1)])
    ask = (
        "Fix the syntax error in this code.",
        "This code has a syntax error. Correct it.",
        "Repair this function so that Python accepts it.",
        "Why does this not run? Give the corrected code.",
        "Correct the syntax of this code.",
    )
    checks = [
        Check(f"printed(lambda: {name}({v}))", "".join(f"{u}\n" for u in v if test.holds(u)))
        for (v,) in number_lists(*test.edges)
    ]
    return Task(rng.choice(ask), broken, code, checks)


def wrong_operator(rng: Random) -> Task:
    name, x = named_scalar(rng, "check accept valid test")
    n = rng.randrange(2, 99)
    words, good, bad, holds = rng.choice([
        (f"greater than {n}", ">", ["<", ">=", "<="], lambda v: v > n),
        (f"less than {n}", "<", [">", ">=", "<="], lambda v: v < n),
        (f"at least {n}", ">=", ["<", ">", "<="], lambda v: v >= n),
        (f"at most {n}", "<=", ["<", ">=", ">"], lambda v: v <= n),
        (f"equal to {n}", "==", ["!=", ">=", "<="], lambda v: v == n),
        (f"different from {n}", "!=", ["==", ">=", "<="], lambda v: v != n),
    ])  # fmt: skip
    ask = (
        f"This function should return True if `{x}` is {words}. Fix it.",
        f"Fix the bug: the result must be True when `{x}` is {words}.",
        f"Correct this function so that it checks whether `{x}` is {words}.",
    )
    broken = define(name, x, f"return {x} {rng.choice(bad)} {n}")
    return Task(rng.choice(ask), broken, define(name, x, f"return {x} {good} {n}"), calls(name, holds, around(n)))


def add_docstring(rng: Random) -> Task:
    name, x, code, reference, cases = small_function(rng)
    text = (
        rng.choice(["Return the new", "Compute the", "Work out the", "Give the", "Find the"])
        + f" {rng.choice(SCALARS)}."
    )
    ask = (
        f'Add the docstring "{text}" to this function.',
        f'Document this function with "{text}"',
        f'Give the function the docstring "{text}"',
    )
    checks = [Check(f"{name}.__doc__", text), *calls(name, reference, cases)]
    return Task(
        rng.choice(ask), define(name, x, f"return {code}"), define(name, x, f'"""{text}"""\nreturn {code}'), checks
    )


def add_type_hints(rng: Random) -> Task:
    name, s = named_text(rng, "make get check read")
    given, result, code, cases = rng.choice([
        ("str", "int", "len({})", {"ab": 2}), ("str", "str", "{}.upper()", {"ab": "AB"}),
        ("str", "list", "{}.split()", {"a b": ["a", "b"]}), ("int", "int", "{} + 1", {4: 5}),
        ("int", "str", "str({})", {4: "4"}), ("float", "int", "round({})", {4.2: 4}),
        ("int", "float", "{} / 2", {3: 1.5}), ("int", "bool", "{} > 0", {1: True, 0: False}),
        ("str", "bool", "{}.isdigit()", {"4": True}), ("str", "float", "float({})", {"4": 4.0}),
    ])  # fmt: skip
    s = s if given == "str" else rng.choice(SCALARS)
    code = code.format(s)
    ask = (
        f"Add type hints: the function takes {given} and returns {result}.",
        f"Annotate the parameter as {given} and the return value as {result}.",
        f"Add the type hints {given} for `{s}` and {result} for the result.",
    )
    checks = [Check(f"[{name}.__annotations__[key].__name__ for key in ('{s}', 'return')]", [given, result])]
    checks += [Check(f"{name}({key!r})", value) for key, value in cases.items()]
    output = f"def {name}({s}: {given}) -> {result}:\n    return {code}"
    return Task(rng.choice(ask), define(name, s, f"return {code}"), output, checks)


def add_default(rng: Random) -> Task:
    name, x = named_scalar(rng, "add change raise scale extend")
    y, k = rng.choice("step bonus extra factor delta change offset by".split()), rng.randrange(0, 99)
    op, apply = rng.choice([("+", lambda v, w: v + w), ("-", lambda v, w: v - w), ("*", lambda v, w: v * w)])
    ask = (
        f"Give `{y}` the default value {k}.",
        f"Make {k} the default of the parameter `{y}`.",
        f"Add a default argument: `{y}` should be {k} if not given.",
    )
    body = f"return {x} {op} {y}"
    checks = [
        Check(f"{name}(7)", apply(7, k)),
        Check(f"{name}(7, 2)", apply(7, 2)),
        Check(f"{name}.__defaults__", (k,)),
    ]
    return Task(rng.choice(ask), define(name, f"{x}, {y}", body), define(name, f"{x}, {y}={k}", body), checks)


def loop_to_comprehension(rng: Random) -> Task:
    result, source = rng.sample(NUMBER_LISTS, 2)
    item = source[:-1]
    test, change = number_test(rng, item), number_change(rng, item)
    plain = rng.random() < 0.4
    loop = f"{result} = []\nfor {item} in {source}:\n"
    loop += (
        f"    {result}.append({change.code})"
        if plain
        else f"    if {test.code}:\n        {result}.append({change.code})"
    )
    code = f"{result} = [{change.code} for {item} in {source}{'' if plain else f' if {test.code}'}]"
    ask = (
        "Rewrite this loop as a list comprehension.",
        "Turn this loop into a list comprehension.",
        "Replace the loop by one list comprehension.",
        "Shorten this code with a list comprehension.",
        "Write this as a list comprehension instead.",
    )
    checks = [Check("'append' in ANSWER", False, f"{source} = []")]
    checks += [
        Check(result, [change.apply(u) for u in v if plain or test.holds(u)], f"{source} = {v}")
        for (v,) in number_lists(*test.edges)
    ]
    return Task(rng.choice(ask), loop, code, checks)


def comprehension_to_loop(rng: Random) -> Task:
    result, source = rng.sample(NUMBER_LISTS, 2)
    item = source[:-1]
    test, change = number_test(rng, item), number_change(rng, item)
    plain = rng.random() < 0.4
    loop = f"{result} = []\nfor {item} in {source}:\n"
    loop += (
        f"    {result}.append({change.code})"
        if plain
        else f"    if {test.code}:\n        {result}.append({change.code})"
    )
    code = f"{result} = [{change.code} for {item} in {source}{'' if plain else f' if {test.code}'}]"
    ask = (
        "Rewrite this list comprehension as a for loop.",
        "Turn this comprehension into a loop with `append`.",
        "Write the same with an ordinary for loop.",
        "Replace the comprehension by a for loop.",
        "Expand this list comprehension into a loop.",
        "Use a for loop and `append` here instead.",
    )
    checks = [Check(f"'{result}.append(' in ANSWER", True, f"{source} = []")]
    checks += [
        Check(result, [change.apply(u) for u in v if plain or test.holds(u)], f"{source} = {v}")
        for (v,) in number_lists(*test.edges)
    ]
    return Task(rng.choice(ask), code, loop, checks)


def lambda_to_def(rng: Random) -> Task:
    name, x, code, reference, cases = small_function(rng)
    ask = (
        "Rewrite this lambda as a function with `def`.",
        "Turn the lambda into a normal function.",
        "Write this with `def` instead of a lambda.",
        "Replace this lambda by a `def`.",
        "Convert the lambda to a named function with `def`.",
        "Use `def` for this function.",
    )
    checks = [Check("'lambda' in ANSWER", False), Check(f"{name}.__name__", name), *calls(name, reference, cases)]
    return Task(rng.choice(ask), f"{name} = lambda {x}: {code}", define(name, x, f"return {code}"), checks)


def def_to_lambda(rng: Random) -> Task:
    name, x, code, reference, cases = small_function(rng)
    ask = (
        "Rewrite this function as a lambda.",
        "Turn this function into a lambda assigned to the same name.",
        "Write this as a lambda instead of a `def`.",
        "Replace this function by a lambda.",
        "Convert this `def` to a lambda.",
        "Make this function a lambda.",
    )
    checks = [Check(f"{name}.__name__", "<lambda>"), *calls(name, reference, cases)]
    return Task(rng.choice(ask), define(name, x, f"return {code}"), f"{name} = lambda {x}: {code}", checks)


def class_from_fields(rng: Random) -> Task:
    name, fields = rng.choice(CLASSES), rng.sample(TEXT_FIELDS + NUMBER_FIELDS, rng.randrange(2, 5))
    ask = (
        f"Create a class `{name}` whose constructor takes and stores these fields.",
        f"Write a class `{name}` with the following fields.",
        f"Define a Python class called `{name}` that has these attributes.",
    )
    values = [10 * i + 3 for i in range(len(fields))]
    made = f"{name}({', '.join(map(str, values))})"
    checks = [Check(f"{made}.{field}", value) for field, value in zip(fields, values, strict=True)]
    return Task(rng.choice(ask), ", ".join(fields), class_head(name, fields), checks)


def list_from_text(rng: Random) -> Task:
    name, words = rng.choice(NUMBER_LISTS), rng.random() < 0.5
    values = (
        rng.sample(SAMPLE_WORDS, rng.randrange(3, 6))
        if words
        else [rng.randrange(1, 99) for _ in range(rng.randrange(3, 7))]
    )
    kind, left, right, make = rng.choice([
        ("list", "[", "]", list), ("list", "[", "]", list), ("tuple", "(", ")", tuple),
    ])  # fmt: skip
    ask = (
        f"Put these values into a {kind} called `{name}`.",
        f"Write a {kind} `{name}` with the following elements.",
        f"Assign these values to `{name}` as a {kind}.",
    )
    code = f"{name} = {left}{', '.join(quote(v) for v in values)}{right}"
    return Task(
        rng.choice(ask), rng.choice([", ", "\n", " "]).join(map(str, values)), code, [Check(name, make(values))]
    )


def dict_from_text(rng: Random) -> Task:
    name, keys = (
        rng.choice("stock prices ages scores table data sizes weights costs levels".split()),
        rng.sample(SAMPLE_WORDS, rng.randrange(2, 5)),
    )
    data, sep = {key: rng.randrange(1, 99) for key in keys}, rng.choice([": ", " ", " = ", ",", " - "])
    ask = (
        f"Write these entries as a dictionary called `{name}`.",
        f"Create a dictionary `{name}` from this table.",
        f"Assign to `{name}` a dictionary with these keys and values.",
    )
    return Task(
        rng.choice(ask),
        "\n".join(f"{k}{sep}{v}" for k, v in data.items()),
        f"{name} = {quote(data)}",
        [Check(name, data)],
    )


def if_to_expression(rng: Random) -> Task:
    result, x = rng.sample(SCALARS, 2)
    test = number_test(rng, x)
    a, b = rng.choice([rng.sample(range(100), 2), [quote(v) for v in rng.choice(LABEL_PAIRS).split(",")]])
    ask = (
        "Rewrite this as a conditional expression.",
        "Write this if statement in one line with a conditional expression.",
        "Shorten this to a single assignment.",
        "Turn this if statement into a conditional expression.",
        "Replace the if and else by one assignment.",
        "Use `... if ... else ...` for this.",
    )
    block = f"if {test.code}:\n    {result} = {a}\nelse:\n    {result} = {b}"
    checks = [Check("len(ANSWER.splitlines())", 1, f"{x} = 0")]
    checks += [Check(result, eval(str([b, a][test.holds(v)])), f"{x} = {v}") for (v,) in around(*test.edges)]
    return Task(rng.choice(ask), block, f"{result} = {a} if {test.code} else {b}", checks)


def to_f_string(rng: Random) -> Task:
    a, b = rng.choice(TEXT_FIELDS), rng.choice(NUMBER_FIELDS)
    middle, end = (
        rng.choice([" has ", ": ", " - ", " is ", " costs ", " weighs ", " = ", ", "]),
        rng.choice(["", ".", "!", " units", " points", "?"]),
    )
    result = rng.choice(TEXTS)
    tail = f' + "{end}"' if end else ""
    ask = (
        "Rewrite this with an f-string.",
        "Use an f-string instead of the concatenation.",
        "Replace the string concatenation by an f-string.",
        "Turn this concatenation into an f-string.",
        "Write the string with an f-string instead.",
        "Convert this to an f-string.",
    )
    given = f"{a}, {b} = 'abc', 7"
    checks = [Check("'f\"' in ANSWER", True, given), Check(result, f"abc{middle}7{end}", given)]
    return Task(
        rng.choice(ask),
        f'{result} = {a} + "{middle}" + str({b}){tail}',
        f'{result} = f"{{{a}}}{middle}{{{b}}}{end}"',
        checks,
    )


def change_constant(rng: Random) -> Task:
    name, items, item = named_list(rng, "keep filter select pick")
    old, new = rng.sample(range(2, 99), 2)
    op, holds = rng.choice([
        (">", lambda v: v > new), ("<", lambda v: v < new), (">=", lambda v: v >= new), ("<=", lambda v: v <= new),
    ])  # fmt: skip
    ask = (
        f"Change the limit in this function to {new}.",
        f"Use {new} instead of {old}.",
        f"Replace the constant by {new}.",
    )
    body = f"return [{item} for {item} in {items} if {item} {op} {{}}]"
    code = define(name, items, body.format(new))
    return Task(
        rng.choice(ask),
        define(name, items, body.format(old)),
        code,
        calls(name, lambda v: list(filter(holds, v)), number_lists(new, new - 1, new + 1)),
    )


def negate_condition(rng: Random) -> Task:
    name, x = named_scalar(rng, "check accept valid test")
    n = rng.randrange(2, 99)
    op, other, holds = rng.choice([
        (">", "<=", lambda v: v > n), ("<", ">=", lambda v: v < n), (">=", "<", lambda v: v >= n),
        ("<=", ">", lambda v: v <= n), ("==", "!=", lambda v: v == n), ("!=", "==", lambda v: v != n),
    ])  # fmt: skip
    ask = (
        "Change this function to return the opposite.",
        "Negate the condition in this function.",
        "Make the function return True exactly when it now returns False.",
        "Invert what this function returns.",
        "Turn the result of this function into its opposite.",
        "Let this function return the negated condition.",
    )
    checks = calls(name, lambda v: not holds(v), around(n))
    return Task(
        rng.choice(ask), define(name, x, f"return {x} {op} {n}"), define(name, x, f"return {x} {other} {n}"), checks
    )


def write_call(rng: Random) -> Task:
    name = any_name(rng, "mix combine measure rate", NUMBER_LISTS)
    a, b = rng.choice(TWO_ARGUMENTS).split(",")
    v, w, result = (
        rng.randrange(2, 99),
        rng.randrange(2, 99),
        rng.choice(["result", "answer", "value", "outcome", "total"]),
    )
    op, n = rng.choice("+-*"), rng.randrange(2, 9)
    keyword = rng.random() < 0.5
    how = " with keyword arguments" if keyword else ""
    ask = (
        f"Call this function{how} with {a} {v} and {b} {w} and store the result in `{result}`.",
        f"Write a call of this function{how} for `{a}` = {v} and `{b}` = {w}, assigned to `{result}`.",
    )
    source = define(name, f"{a}, {b}", f"return {a} {op} {n} * {b}")
    code = f"{result} = {name}({a}={v}, {b}={w})" if keyword else f"{result} = {name}({v}, {w})"
    expected = {"+": v + n * w, "-": v - n * w, "*": v * n * w}[op]
    return Task(
        rng.choice(ask), source, code, [Check(result, expected, source), Check(f"'{a}=' in ANSWER", keyword, source)]
    )


def add_guard(rng: Random) -> Task:
    name, x, code, reference, cases = small_function(rng)
    n = rng.randrange(2, 40)
    words, guard, bad = rng.choice([
        ("negative", f"{x} < 0", lambda v: v < 0), (f"greater than {n}", f"{x} > {n}", lambda v: v > n),
        ("zero", f"{x} == 0", lambda v: v == 0), (f"less than {n}", f"{x} < {n}", lambda v: v < n),
    ])  # fmt: skip
    error = rng.choice(["ValueError", "RuntimeError", "ValueError"])
    ask = (
        f"Make this function raise {error} if `{x}` is {words}.",
        f"Add a check that raises {error} when `{x}` is {words}.",
        f"Extend the function: if `{x}` is {words}, it should raise {error}.",
    )

    def guarded(v: int) -> Any:
        if bad(v):
            raise {"V": ValueError, "R": RuntimeError}[error[0]]
        return reference(v)

    output = define(name, x, f"if {guard}:\n    raise {error}\nreturn {code}")
    return Task(rng.choice(ask), define(name, x, f"return {code}"), output, calls(name, guarded, around(0, n)))


def print_to_return(rng: Random) -> Task:
    name, x, code, reference, cases = small_function(rng)
    ask = (
        "Make this function return the value instead of printing it.",
        "Replace the print by a return.",
        "Change this function so that it returns its result.",
        "Return the value here instead of printing it.",
        "Let this function return what it now prints.",
        "Use return instead of print in this function.",
    )
    return Task(
        rng.choice(ask),
        define(name, x, f"print({code})"),
        define(name, x, f"return {code}"),
        calls(name, reference, cases),
    )


def return_to_print(rng: Random) -> Task:
    name, x, code, reference, cases = small_function(rng)
    ask = (
        "Make this function print the value instead of returning it.",
        "Replace the return by a print.",
        "Change this function so that it prints its result.",
        "Print the value here instead of returning it.",
        "Let this function print what it now returns.",
        "Use print instead of return in this function.",
    )
    checks = [Check(f"printed(lambda: {name}({v}))", f"{reference(v)}\n") for (v,) in cases]
    return Task(rng.choice(ask), define(name, x, f"return {code}"), define(name, x, f"print({code})"), checks)


def add_field(rng: Random) -> Task:
    name, fields = rng.choice(CLASSES), rng.sample(TEXT_FIELDS + NUMBER_FIELDS, rng.randrange(2, 4))
    new = fields[-1]
    ask = (
        f"Add a field `{new}` to this class.",
        f"Extend the constructor of this class by `{new}`.",
        f"This class should also store `{new}`.",
    )
    values = [10 * i + 3 for i in range(len(fields))]
    made = f"{name}({', '.join(map(str, values))})"
    checks = [Check(f"{made}.{field}", value) for field, value in zip(fields, values, strict=True)]
    return Task(rng.choice(ask), class_head(name, fields[:-1]), class_head(name, fields), checks)


def change_key(rng: Random) -> Task:
    items = rng.choice(WORD_LISTS)
    item, (old, new) = items[:-1], rng.sample(KEYS, 2)
    name = f"{rng.choice(['sort', 'order', 'rank', 'arrange'])}_{items}"
    down = rng.random() < 0.5
    ask = (
        f'Make this function use the key "{new}".',
        f'Change the key from "{old}" to "{new}".',
        f'Sort by "{new}" instead of "{old}".',
    )
    body = f"return sorted({items}, key=lambda {item}: {item}[{{}}]{', reverse=True' * down})"
    cases = one_each([records(rng), [{**dict.fromkeys(KEYS, 1), new: v} for v in (5, 9, 2)]])
    checks = calls(name, lambda v: sorted(v, key=lambda u: -u[new] if down else u[new]), cases)
    return Task(
        rng.choice(ask),
        define(name, items, body.format(quote(old))),
        define(name, items, body.format(quote(new))),
        checks,
    )


FAMILIES = (
    rename_function, rename_argument, missing_colon, wrong_operator, add_docstring, add_type_hints, add_default,
    loop_to_comprehension, comprehension_to_loop, lambda_to_def, def_to_lambda, class_from_fields, list_from_text,
    dict_from_text, if_to_expression, to_f_string, change_constant, negate_condition, write_call, add_guard,
    print_to_return, return_to_print, add_field, change_key,
)  # fmt: skip
