"""Tasks that ask for a class."""

from random import Random

from data.make.families.common import (
    CLASSES,
    NUMBER_FIELDS,
    SAMPLE_WORDS,
    TEXT_FIELDS,
    WORD_LISTS,
    Check,
    Task,
    and_list,
    around,
    class_head,
    class_task,
    number_change,
    number_test,
    quote,
)


def class_fields(rng: Random) -> Task:
    name, fields = rng.choice(CLASSES), rng.sample(TEXT_FIELDS + NUMBER_FIELDS, rng.randrange(1, 4))
    listed = and_list(f"`{field}`" for field in fields)
    word = "fields" if len(fields) > 1 else "field"
    whats = (
        f"with the {word} {listed}, set in its constructor",
        f"whose `__init__` stores {listed}",
        f"that keeps {listed} as attribute{'s' * (len(fields) > 1)} of the object",
    )
    values = [10 * i + 3 for i in range(len(fields))]
    made = f"{name}({', '.join(map(str, values))})"
    checks = [Check(f"{made}.{field}", value) for field, value in zip(fields, values, strict=True)]
    return class_task(rng, whats, class_head(name, fields), checks, name)


def class_method(rng: Random) -> Task:
    name, (a, b) = rng.choice(CLASSES), rng.sample(NUMBER_FIELDS, 2)
    method = rng.choice("total measure compute value result rating effort price_of amount".split())
    n = rng.randrange(2, 30)
    words, code, reference = rng.choice([
        (f"`{a}` times `{b}`", f"self.{a} * self.{b}", lambda v, w: v * w),
        (f"`{a}` plus `{b}`", f"self.{a} + self.{b}", lambda v, w: w + v),
        (f"`{a}` minus `{b}`", f"self.{a} - self.{b}", lambda v, w: v - w),
        (f"the larger of `{a}` and `{b}`", f"max(self.{a}, self.{b})", max),
        (f"{n} times `{a}` plus `{b}`", f"{n} * self.{a} + self.{b}", lambda v, w: w + v * n),
        (f"`{a}` divided by `{b}`", f"self.{a} / self.{b}", lambda v, w: v / w),
    ])  # fmt: skip
    whats = (
        f"with the fields `{a}` and `{b}` and a method `{method}` that returns {words}",
        f"with `{a}`, `{b}` and a method `{method}()` returning {words}",
    )
    code = f"{class_head(name, [a, b])}\n\n    def {method}(self):\n        return {code}"
    checks = [Check(f"{name}({v}, {w}).{method}()", reference(v, w)) for v, w in ((3, 4), (12, 5), (7, 2))]
    return class_task(rng, whats, code, checks, name)


def class_is(rng: Random) -> Task:
    name, field = rng.choice(CLASSES), rng.choice(NUMBER_FIELDS)
    test = number_test(rng, f"self.{field}")
    method = "is_" + rng.choice(
        "large old ready good valid heavy new full open rare cheap fine special allowed".split()
    )
    whats = (
        f"with a field `{field}` and a method `{method}` that returns True if `{field}` {test.is_}",
        f"that stores `{field}` and has a method `{method}` telling whether it {test.is_}",
    )
    code = f"{class_head(name, [field])}\n\n    def {method}(self):\n        return {test.code}"
    checks = [Check(f"{name}({v}).{method}()", test.holds(v)) for (v,) in around(*test.edges)]
    return class_task(rng, whats, code, checks, name)


def class_counter(rng: Random) -> Task:
    name, field = rng.choice(CLASSES), rng.choice(NUMBER_FIELDS)
    method = rng.choice("grow step click raise_it advance push move add charge fill use turn".split())
    start, k = rng.randrange(0, 50), rng.randrange(1, 30)
    down = rng.random() < 0.4
    whats = (
        f"whose `{field}` starts at {start} and whose method `{method}` {'lowers' if down else 'increases'} it by {k}",
        f"with `{field}` = {start} at first and a method `{method}` that {'subtracts' if down else 'adds'} {k}",
    )
    code = f"class {name}:\n    def __init__(self):\n        self.{field} = {start}\n"
    code += f"\n    def {method}(self):\n        self.{field} {'-' if down else '+'}= {k}"
    checks = [Check(f"{name}().{field}", start)]
    for times in (1, 3):
        run = f"(lambda thing: [[thing.{method}() for _ in range({times})], thing.{field}][1])({name}())"
        checks.append(Check(run, start + (-k if down else k) * times))
    return class_task(rng, whats, code, checks, name)


def class_str(rng: Random) -> Task:
    name, a, b = rng.choice(CLASSES), rng.choice(TEXT_FIELDS), rng.choice(NUMBER_FIELDS)
    left, middle, right = rng.choice([
        ("", " (", ")"), ("", ": ", ""), ("", " - ", ""), ("<", " ", ">"), ("", " has ", ""), ("[", ", ", "]"),
        ("", ", ", ""), (f"{name} ", " of ", ""), ("", "/", ""), (f"{name}(", ", ", ")"),
    ])  # fmt: skip
    method = rng.choice(["__str__", "__str__", "describe", "label_text", "summary"])
    whats = (
        f'with the fields `{a}` and `{b}` whose `{method}` returns "{left}{{{a}}}{middle}{{{b}}}{right}"',
        f'with `{a}`, `{b}` and a `{method}` that gives strings like "{left}abc{middle}7{right}" ({a} "abc", {b} 7)',
    )
    text = f'f"{left}{{self.{a}}}{middle}{{self.{b}}}{right}"'
    code = f"{class_head(name, [a, b])}\n\n    def {method}(self):\n        return {text}"
    call = f"str({name}({{}}))" if method == "__str__" else f"{name}({{}}).{method}()"
    checks = [Check(call.format(f"{v!r}, {w}"), left + v + middle + str(w) + right) for v, w in (("abc", 7), ("", 12))]
    return class_task(rng, whats, code, checks, name)


def subclass(rng: Random) -> Task:
    parent, name = rng.sample(CLASSES, 2)
    method, value = (
        rng.choice("sound describe kind speak show cost size speed color price".split()),
        rng.choice([*SAMPLE_WORDS, *range(2, 60)]),
    )
    whats = (
        f"that inherits from `{parent}` and overrides `{method}` to return {quote(value)}",
        f"as a subclass of `{parent}` with its own method `{method}` returning {quote(value)}",
    )
    code = f"class {name}({parent}):\n    def {method}(self):\n        return {quote(value)}"
    before = f"class {parent}:\n    def {method}(self):\n        return 'base'\n"
    checks = [Check(f"{name}().{method}()", value, before), Check(f"isinstance({name}(), {parent})", True, before)]
    return class_task(rng, whats, code, checks, name)


def class_property(rng: Random) -> Task:
    name, a = rng.choice(CLASSES), rng.choice(NUMBER_FIELDS)
    prop = rng.choice("doubled adjusted final real total net scaled converted shown rounded".split()) + "_" + a
    change = number_change(rng, f"self.{a}")
    whats = (
        f"with a field `{a}` and a property `{prop}` that is `{a}` {change.words}",
        f"that stores `{a}` and has a property `{prop}`: `{a}` {change.words}",
    )
    code = f"{class_head(name, [a])}\n\n    @property\n    def {prop}(self):\n        return {change.code}"
    checks = [Check(f"{name}({v}).{prop}", change.apply(v)) for v in (1, 7, 40)]
    return class_task(rng, whats, code, checks, name)


def class_collection(rng: Random) -> Task:
    name, items = rng.choice(CLASSES), rng.choice(WORD_LISTS)
    item, add = items[:-1], rng.choice(["add", "append", "put", "insert", "register", "include"])
    other, words, value, expected = rng.choice([
        ("count", "how many there are", f"len(self.{items})", 3), ("first", "the first one", f"self.{items}[0]", "b"),
        ("last", "the last one", f"self.{items}[-1]", "a"),
        ("ordered", "them sorted", f"sorted(self.{items})", ["a", "b", "c"]),
    ])  # fmt: skip
    whats = (
        f"with an empty list `{items}`, a method `{add}` that appends one `{item}`, and `{other}` that returns {words}",
        f"that collects `{items}`: `{add}({item})` appends to the list and `{other}()` returns {words}",
    )
    code = f"class {name}:\n    def __init__(self):\n        self.{items} = []\n"
    code += f"\n    def {add}(self, {item}):\n        self.{items}.append({item})\n"
    code += f"\n    def {other}(self):\n        return {value}"
    run = f"(lambda thing: [[thing.{add}(letter) for letter in 'bca'], thing.{{}}][1])({name}())"
    checks = [
        Check(f"{name}().{items}", []),
        Check(run.format(items), ["b", "c", "a"]),
        Check(run.format(f"{other}()"), expected),
    ]
    return class_task(rng, whats, code, checks, name)


def dataclass_task(rng: Random) -> Task:
    name, a, b = rng.choice(CLASSES), rng.choice(TEXT_FIELDS), rng.choice(NUMBER_FIELDS)
    default = rng.choice([None, rng.randrange(0, 99)])
    kind = rng.choice(["int", "float"]) if default is None else "int"
    ending = "" if default is None else f" = {default}"
    also = "" if default is None else f", {default} by default"
    ask = (
        f"Write a dataclass `{name}` with a string `{a}` and {'an int' if kind == 'int' else 'a float'} `{b}`{also}.",
        f"Define `{name}` as a dataclass with the fields `{a}` (str) and `{b}` ({kind}{also}).",
        f"Create a Python dataclass called `{name}` whose fields are `{a}: str` and `{b}: {kind}`{also}.",
    )
    code = f"from dataclasses import dataclass\n\n\n@dataclass\nclass {name}:\n    {a}: str\n    {b}: {kind}{ending}"
    checks = [Check(f"({name}('x', 3).{a}, {name}('x', 3).{b})", ("x", 3)),
        Check(f"{name}('x', 3) == {name}('x', 3)", True),
              Check(f"{name}.__annotations__['{b}'].__name__", kind)]  # fmt: skip
    if default is not None:
        checks.append(Check(f"{name}('y').{b}", default))
    return Task(rng.choice(ask), "", code, checks)


def account(rng: Random) -> Task:
    name, field = rng.choice(CLASSES), rng.choice("balance stock fuel energy supply water credit budget".split())
    method, amount = (
        rng.choice("take withdraw use spend draw consume remove".split()),
        rng.choice(["amount", "n", "x", "quantity"]),
    )
    message = rng.choice(["not enough", "too much", "empty", "insufficient", f"{field} too low", f"no {field} left"])
    whats = (
        f"with a field `{field}` and a method `{method}({amount})` that subtracts `{amount}` from it, "
        f'or raises ValueError("{message}") if `{amount}` is greater',
        f"that stores `{field}`; its method `{method}({amount})` reduces it by `{amount}` "
        f'but raises ValueError("{message}") if `{field}` is less',
    )
    code = (f'{class_head(name, [field])}\n\n    def {method}(self, {amount}):\n        if {amount} > self.{field}:\n'
            f'            raise ValueError("{message}")\n        self.{field} -= {amount}')  # fmt: skip
    run = f"(lambda thing: [thing.{method}({{}}), thing.{field}][1])({name}({{}}))"
    checks = [
        Check(run.format(3, 10), 7),
        Check(run.format(10, 10), 0),
        Check(f"error_of(lambda: {name}(4).{method}(5))", f"ValueError: {message}"),
    ]
    return class_task(rng, whats, code, checks, name)


FAMILIES = (
    class_fields, class_method, class_is, class_counter, class_str, subclass, class_property, class_collection,
    dataclass_task, account,
)  # fmt: skip
