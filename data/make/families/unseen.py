"""Families that are not in the training data; each resembles some that are."""

from random import Random

from data.make.families.common import (
    CLASSES,
    LABEL_PAIRS,
    NUMBER_FIELDS,
    STOCK,
    TEXT_FIELDS,
    WORD_LISTS,
    Check,
    Task,
    class_head,
    class_task,
    define,
    function,
    named_dict,
    named_list,
    named_scalar,
    named_text,
    number_change,
    number_lists,
    number_test,
    one_each,
    texts,
    word_change,
    word_lists,
    word_test,
)


def average_if(rng: Random) -> Task:
    name, items, item = named_list(rng, "average mean")
    test, kept = number_test(rng, item), rng.choice(["kept", "chosen", "selected"])
    whats = (
        f"stores the numbers of `{items}` that {test.are} in the list `{kept}` and returns its average",
        f"returns the average of each `{item}` of `{items}` that {test.is_}, first collected in a list `{kept}`",
    )
    body = f"{kept} = [{item} for {item} in {items} if {test.code}]\nreturn sum({kept}) / len({kept})"

    def reference(v: list) -> float:
        good = [u for u in v if test.holds(u)]
        return sum(good) / len(good)

    return function(rng, name, items, body, whats, reference, number_lists(*test.edges))


def drop_words(rng: Random) -> Task:
    name, items, item = named_list(rng, "drop remove exclude", WORD_LISTS)
    test = word_test(rng, item)
    whats = (
        f"returns a list of `{items}` without the strings that {test.are}",
        f"leaves out each `{item}` of `{items}` that {test.is_}",
    )
    body = f"return [{item} for {item} in {items} if not {test.code}]"
    return function(
        rng, name, items, body, whats, lambda v: [u for u in v if not test.holds(u)], word_lists(*test.edges)
    )


def keep_and_change_words(rng: Random) -> Task:
    name, items, item = named_list(rng, "convert select process", WORD_LISTS)
    test, change = word_test(rng, item), word_change(rng, item)
    whats = (
        f"returns a list of the strings in `{items}` that {test.are}, each {change.words}",
        f"takes each `{item}` of `{items}` that {test.is_} and returns a list of them {change.words}",
    )
    body = f"return [{change.code} for {item} in {items} if {test.code}]"
    reference = lambda v: list(map(change.apply, filter(test.holds, v)))
    return function(rng, name, items, body, whats, reference, word_lists(*test.edges, " Ab ac "))


def raise_if_text(rng: Random) -> Task:
    name, s = named_text(rng, "check validate require")
    test = word_test(rng, s)
    message = rng.choice(["bad text", "not allowed", f"invalid {s}", f"wrong {s}", "refused"])
    whats = (
        f'raises ValueError("{message}") if `{s}` {test.is_} and returns `{s}` otherwise',
        f'returns `{s}`, but raises ValueError with the message "{message}" when it {test.is_}',
    )
    body = f'if {test.code}:\n    raise ValueError("{message}")\nreturn {s}'

    def reference(v: str) -> str:
        if test.holds(v):
            raise ValueError(message)
        return v

    return function(rng, name, s, body, whats, reference, texts(*test.edges))


def two_labels_text(rng: Random) -> Task:
    name, s = named_text(rng, "label classify describe")
    first, second = rng.choice(LABEL_PAIRS).split(",")
    test = word_test(rng, s)
    whats = (
        f'returns "{first}" if `{s}` {test.is_} and "{second}" otherwise',
        f'returns "{first}" when `{s}` {test.is_}, else "{second}"',
    )
    body = f'return "{first}" if {test.code} else "{second}"'
    return function(rng, name, s, body, whats, lambda v: [second, first][test.holds(v)], texts(*test.edges))


def count_in_dict(rng: Random) -> Task:
    name, data, _, value = named_dict(rng, "count number_of tally")
    test = number_test(rng, value)
    whats = (
        f"returns how many values of the dictionary `{data}` {test.are}",
        f"counts each `{value}` in `{data}.values()` that {test.is_}",
    )
    body = f"return sum(1 for {value} in {data}.values() if {test.code})"
    cases = one_each([{}, STOCK, {f"k{edge}": edge for edge in test.edges}])
    return function(rng, name, data, body, whats, lambda v: len([k for k in v if test.holds(v[k])]), cases)


def set_of_changes(rng: Random) -> Task:
    name, items, item = named_list(rng, "distinct unique set_of")
    change = number_change(rng, item)
    whats = (
        f"returns a set with each number of `{items}` {change.words}",
        f"returns the set of every `{item}` in `{items}` {change.words}",
    )
    body = f"return {{{change.code} for {item} in {items}}}"
    return function(rng, name, items, body, whats, lambda v: set(map(change.apply, v)), number_lists(3, 8))


def class_setter(rng: Random) -> Task:
    name, field = rng.choice(CLASSES), rng.choice(NUMBER_FIELDS)
    change, method = number_change(rng, f"self.{field}"), rng.choice("update change adjust refresh".split())
    whats = (
        f"with a field `{field}` and a method `{method}` that sets `{field}` to `{field}` {change.words}",
        f"that stores `{field}` and has a method `{method}` replacing it by `{field}` {change.words}",
    )
    code = f"{class_head(name, [field])}\n\n    def {method}(self):\n        self.{field} = {change.code}"
    checks = [
        Check(f"(lambda thing: [thing.{method}(), thing.{field}][1])({name}({v}))", change.apply(v)) for v in (1, 7, 40)
    ]
    return class_task(rng, whats, code, checks, name)


def rename_class(rng: Random) -> Task:
    (old, new), fields = rng.sample(CLASSES, 2), rng.sample(TEXT_FIELDS + NUMBER_FIELDS, 2)
    ask = (
        f"Rename the class in this code to `{new}`.",
        f"Change the class's name to `{new}`.",
        f"Rename `{old}` to `{new}`.",
    )
    checks = [
        Check(f"'{old}' in globals()", False),
        *[Check(f"{new}(3, 13).{field}", v) for field, v in zip(fields, (3, 13), strict=True)],
    ]
    return Task(rng.choice(ask), class_head(old, fields), class_head(new, fields), checks)


def remove_default(rng: Random) -> Task:
    name, x = named_scalar(rng, "add change raise")
    y, k = rng.choice("step bonus extra factor delta offset".split()), rng.randrange(0, 99)
    op, value = rng.choice([("+", 9), ("-", 5), ("*", 14)])
    ask = (
        f"Remove the default value of `{y}`.",
        f"Make `{y}` a required argument.",
        f"The parameter `{y}` should have no default.",
    )
    body = f"return {x} {op} {y}"
    checks = [Check(f"{name}(7, 2)", value), Check(f"{name}.__defaults__", None)]
    return Task(rng.choice(ask), define(name, f"{x}, {y}={k}", body), define(name, f"{x}, {y}", body), checks)


def sum_change_text(rng: Random) -> Task:
    name, items, item = named_list(rng, "total measure weigh", WORD_LISTS)
    test = word_test(rng, item)
    whats = (
        f"returns the total length of the strings in `{items}` that {test.are}",
        f"adds up the lengths of each `{item}` of `{items}` that {test.is_}",
    )
    body = f"return sum(len({item}) for {item} in {items} if {test.code})"
    return function(
        rng, name, items, body, whats, lambda v: len("".join(filter(test.holds, v))), word_lists(*test.edges)
    )


def print_words(rng: Random) -> Task:
    name, items, item = named_list(rng, "print show display", WORD_LISTS)
    change = word_change(rng, item)
    whats = (
        f"prints each string of `{items}` {change.words}, one a line",
        f"loops over `{items}` and prints every `{item}` {change.words}",
    )
    task = function(rng, name, items, f"for {item} in {items}:\n    print({change.code})", whats, lambda v: None, [])
    cases = [["kiwi", "  Banana Split "], ["abcdefghiklm", "noprstuw"]]
    return task._replace(
        checks=[Check(f"printed(lambda: {name}({v}))", "".join(f"{change.apply(u)}\n" for u in v)) for v in cases]
    )


FAMILIES = (
    average_if, drop_words, keep_and_change_words, raise_if_text, two_labels_text, count_in_dict, set_of_changes,
    class_setter, rename_class, remove_default, sum_change_text, print_words,
)  # fmt: skip
