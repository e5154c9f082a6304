"""Tasks that combine a test or a change with what is made of it: a list, a set, a sum, a print, an error, …

Each family is one such combination for numbers, strings, the values of a dictionary or the fields of an object. The
combinations of unseen.py are not among them.
"""

from collections.abc import Callable, Iterable
from random import Random
from typing import Any

from data.make.families.common import (
    CHANGE_WORDS,
    CLASSES,
    NUMBER_FIELDS,
    SCALARS,
    STOCK,
    TEXT_FIELDS,
    WORD_LISTS,
    Check,
    Task,
    Test,
    around,
    calls,
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
    quote,
    texts,
    word_change,
    word_lists,
    word_test,
)

WORDS_TO_CHANGE = word_lists("  Abc d ", "prstuw", "abcdefghiklm", "noted")


def dictionaries(test: Test) -> list[tuple]:
    return one_each([{}, STOCK, {f"k{edge}": edge for edge in test.edges}])


def printed_lines(task: Task, name: str, cases: Iterable[tuple], lines: Callable[[Any], list]) -> Task:
    """Return the task with checks of what a call prints."""
    printed = [("".join(f"{line}\n" for line in lines(value)), value) for (value,) in cases]
    return task._replace(checks=[Check(f"printed(lambda: {name}({value!r}))", text) for text, value in printed])


# ---------------------------------------------------------------- lists of numbers


def drop_numbers(rng: Random) -> Task:
    name, items, item = named_list(rng, "drop remove exclude skip")
    test = number_test(rng, item)
    whats = (
        f"returns a list of `{items}` without the numbers that {test.are}",
        f"leaves out each `{item}` of `{items}` that {test.is_} and returns the others as a list",
    )
    body = f"return [{item} for {item} in {items} if not {test.code}]"
    reference = lambda v: [u for u in v if not test.holds(u)]
    return function(rng, name, items, body, whats, reference, number_lists(*test.edges))


def last_match(rng: Random) -> Task:
    name, items, item = named_list(rng, "last final latest")
    test, none = number_test(rng, item), rng.choice(["None", "-1", "0"])
    whats = (
        f"returns the last number in `{items}` that {test.is_}, or {none} if there is none",
        f"loops over `{items}` from the end and returns the first `{item}` that {test.is_}; if none does, {none}",
    )
    body = f"for {item} in reversed({items}):\n    if {test.code}:\n        return {item}\nreturn {none}"
    reference = lambda v: ([eval(none)] + [u for u in v if test.holds(u)])[-1]
    return function(rng, name, items, body, whats, reference, number_lists(*test.edges))


def extreme_if(rng: Random) -> Task:
    name, items, item = named_list(rng, "best peak limit edge")
    test = number_test(rng, item)
    word, code = rng.choice([("largest", "max"), ("smallest", "min")])
    none = rng.choice(["None", "0", "-1"])
    whats = (
        f"returns the {word} of the numbers in `{items}` that {test.are}, or {none} if there are none",
        f"gives the {word} `{item}` of `{items}` that {test.is_}, with {none} as the default",
    )
    body = f"return {code}(({item} for {item} in {items} if {test.code}), default={none})"
    reference = lambda v: {"max": max, "min": min}[code](filter(test.holds, v), default=eval(none))
    return function(rng, name, items, body, whats, reference, number_lists(*test.edges))


def average_changed(rng: Random) -> Task:
    name, items, item = named_list(rng, "average mean middle")
    change, made = number_change(rng, item), rng.choice(["changed", "new", "made"])
    whats = (
        f"stores each number of `{items}` {change.words} in the list `{made}` and returns the average of it",
        f"returns the average of every `{item}` of `{items}` {change.words}, first collected in a list `{made}`",
    )
    body = f"{made} = [{change.code} for {item} in {items}]\nreturn sum({made}) / len({made})"

    def reference(v: list) -> float:
        changed = [change.apply(u) for u in v]
        return sum(changed) / len(changed)

    return function(rng, name, items, body, whats, reference, number_lists(3, 8))


def share_of(rng: Random) -> Task:
    name, items, item = named_list(rng, "share fraction part ratio")
    test, kept = number_test(rng, item), rng.choice(["kept", "chosen", "matching"])
    whats = (
        f"stores the numbers of `{items}` that {test.are} in the list `{kept}` and returns what fraction of all "
        "they are",
        f"returns the length of `{kept}`, each `{item}` of `{items}` that {test.is_}, divided by that of `{items}`",
    )
    body = f"{kept} = [{item} for {item} in {items} if {test.code}]\nreturn len({kept}) / len({items})"
    reference = lambda v: sum(map(test.holds, v)) / len(v)
    return function(rng, name, items, body, whats, reference, number_lists(*test.edges))


def set_of_kept(rng: Random) -> Task:
    words = rng.random() < 0.5
    name, items, item = named_list(rng, "set_of distinct unique different", *([WORD_LISTS] if words else []))
    test, noun = (word_test(rng, item), "strings") if words else (number_test(rng, item), "numbers")
    whats = (
        f"returns a set of the {noun} in `{items}` that {test.are}",
        f"returns the set of each `{item}` in `{items}` that {test.is_}",
    )
    body = f"return {{{item} for {item} in {items} if {test.code}}}"
    cases = (word_lists if words else number_lists)(*test.edges)
    return function(rng, name, items, body, whats, lambda v: set(filter(test.holds, v)), cases)


def tuple_of_changes(rng: Random) -> Task:
    name, items, item = named_list(rng, "tuple_of fixed frozen")
    change = number_change(rng, item)
    whats = (
        f"returns a tuple with each number of `{items}` {change.words}",
        f"returns the tuple of every `{item}` in `{items}` {change.words}",
    )
    body = f"return tuple({change.code} for {item} in {items})"
    return function(rng, name, items, body, whats, lambda v: tuple(map(change.apply, v)), number_lists(3, 8))


def print_numbers(rng: Random) -> Task:
    name, items, item = named_list(rng, "print show display")
    if rng.random() < 0.5:
        test = number_test(rng, item)
        whats = (
            f"prints each number of `{items}` that {test.is_}, one a line",
            f"loops over `{items}` and prints every `{item}` that {test.is_}",
        )
        body = f"for {item} in {items}:\n    if {test.code}:\n        print({item})"
        cases, lines = number_lists(*test.edges), lambda v: [u for u in v if test.holds(u)]
    else:
        change = number_change(rng, item)
        whats = (
            f"prints each number of `{items}` {change.words}, one a line",
            f"loops over `{items}` and prints every `{item}` {change.words}",
        )
        body = f"for {item} in {items}:\n    print({change.code})"
        cases, lines = number_lists(3, 8), lambda v: [change.apply(u) for u in v]
    return printed_lines(function(rng, name, items, body, whats, lambda v: None, []), name, cases, lines)


def append_loop(rng: Random) -> Task:
    name, items, item = named_list(rng, "collect gather build")
    test, change, made = number_test(rng, item), number_change(rng, item), rng.choice(["result", "found", "output"])
    whats = (
        f"appends, in a loop, each `{item}` of `{items}` that {test.is_} to a list `{made}`, {change.words}",
        f"starts with an empty list `{made}`, adds the numbers of `{items}` that {test.are}, each {change.words}, "
        f"and returns `{made}`",
    )
    body = (
        f"{made} = []\nfor {item} in {items}:\n    if {test.code}:\n        {made}.append({change.code})\nreturn {made}"
    )
    reference = lambda v: [change.apply(u) for u in v if test.holds(u)]
    return function(rng, name, items, body, whats, reference, number_lists(*test.edges))


def sum_changed_if(rng: Random) -> Task:
    name, items, item = named_list(rng, "sum total add_up")
    test, change = number_test(rng, item), number_change(rng, item)
    whats = (
        f"returns the sum of the numbers in `{items}` that {test.are}, each {change.words}",
        f"adds up each `{item}` of `{items}` that {test.is_}, {change.words}",
    )
    body = f"return sum({change.code} for {item} in {items} if {test.code})"
    reference = lambda v: sum(change.apply(u) for u in v if test.holds(u))
    return function(rng, name, items, body, whats, reference, number_lists(*test.edges))


def dict_of_changes(rng: Random) -> Task:
    name, items, item = named_list(rng, "map table index")
    change = number_change(rng, item)
    whats = (
        f"returns a dictionary from each number of `{items}` to the number {change.words}",
        f"maps every `{item}` in `{items}` to `{item}` {change.words} in a dictionary",
    )
    body = f"return {{{item}: {change.code} for {item} in {items}}}"
    return function(rng, name, items, body, whats, lambda v: {u: change.apply(u) for u in v}, number_lists(3, 8))


# ---------------------------------------------------------------- lists of strings


def count_words(rng: Random) -> Task:
    name, items, item = named_list(rng, "count number_of tally how_many", WORD_LISTS)
    test = word_test(rng, item)
    whats = (
        f"returns how many strings in `{items}` {test.are}",
        f"counts each `{item}` in `{items}` that {test.is_}",
    )
    body = f"return sum(1 for {item} in {items} if {test.code})"
    return function(rng, name, items, body, whats, lambda v: sum(map(test.holds, v)), word_lists(*test.edges))


def any_all_words(rng: Random) -> Task:
    name, items, item = named_list(rng, "check test verify inspect", WORD_LISTS)
    test, what = word_test(rng, item), rng.choice(["any", "all"])
    which = {"any": "at least one string", "all": "every string"}[what]
    whats = (
        f"returns True if {which} in `{items}` {test.is_}",
        f"tells whether {what} of the `{items}` {test.are}",
    )
    body = f"return {what}({test.code} for {item} in {items})"
    reference = lambda v: sum(map(test.holds, v)) >= (len(v) if what == "all" else 1)
    cases = word_lists(*test.edges) + one_each([edge] for edge in test.edges)
    return function(rng, name, items, body, whats, reference, cases)


def first_word(rng: Random) -> Task:
    name, items, item = named_list(rng, "find first search get", WORD_LISTS)
    test, none = word_test(rng, item), rng.choice(["None", '""', '"none"'])
    whats = (
        f"returns the first string in `{items}` that {test.is_}, or {none} if there is none",
        f"loops over `{items}` and returns the first `{item}` that {test.is_}; if none does, it returns {none}",
    )
    body = f"for {item} in {items}:\n    if {test.code}:\n        return {item}\nreturn {none}"
    reference = lambda v: next(filter(test.holds, v), eval(none))
    return function(rng, name, items, body, whats, reference, word_lists(*test.edges))


def word_positions(rng: Random) -> Task:
    name, items, item = named_list(rng, "find positions_of index locate", WORD_LISTS)
    test, i = word_test(rng, item), rng.choice(["i", "index", "position", "place"])
    whats = (
        f"returns a list of the indices of the strings in `{items}` that {test.are} (name the index `{i}`)",
        f"enumerates `{items}` with `{i}` and `{item}` and returns each `{i}` at which `{item}` {test.is_}",
    )
    body = f"return [{i} for {i}, {item} in enumerate({items}) if {test.code}]"
    reference = lambda v: [k for k in range(len(v)) if test.holds(v[k])]
    return function(rng, name, items, body, whats, reference, word_lists(*test.edges))


def words_with_else(rng: Random) -> Task:
    name, items, item = named_list(rng, "convert replace fix adjust", WORD_LISTS)
    test, other = word_test(rng, item), rng.choice(["", "?", "none", "x", "-"])
    whats = (
        f"returns `{items}` as a list in which each string that {test.is_} is replaced by {quote(other)}",
        f"replaces every `{item}` in `{items}` that {test.is_} with {quote(other)} and returns the new list",
    )
    body = f"return [{quote(other)} if {test.code} else {item} for {item} in {items}]"
    reference = lambda v: [[u, other][test.holds(u)] for u in v]
    return function(rng, name, items, body, whats, reference, word_lists(*test.edges))


def set_of_words(rng: Random) -> Task:
    name, items, item = named_list(rng, "distinct unique set_of", WORD_LISTS)
    change = word_change(rng, item)
    whats = (
        f"returns a set with each string of `{items}` {change.words}",
        f"returns the set of every `{item}` in `{items}` {change.words}",
    )
    body = f"return {{{change.code} for {item} in {items}}}"
    return function(rng, name, items, body, whats, lambda v: set(map(change.apply, v)), WORDS_TO_CHANGE)


def lengths_of(rng: Random) -> Task:
    name, items, item = named_list(rng, "lengths measure sizes", WORD_LISTS)
    test = word_test(rng, item)
    if rng.random() < 0.5:
        whats = (
            f"returns a list of the lengths of the strings in `{items}` that {test.are}",
            f"returns the length of each `{item}` of `{items}` that {test.is_}, as a list",
        )
        body = f"return [len({item}) for {item} in {items} if {test.code}]"
        reference = lambda v: [len(u) for u in v if test.holds(u)]
    else:
        whats = (
            f"returns the total length of all strings in `{items}`",
            f"adds up the lengths of every `{item}` of `{items}`",
        )
        body = f"return sum(len({item}) for {item} in {items})"
        reference = lambda v: len("".join(v))
    return function(rng, name, items, body, whats, reference, word_lists(*test.edges))


def join_words_if(rng: Random) -> Task:
    name, items, item = named_list(rng, "join combine connect", WORD_LISTS)
    test, mark = word_test(rng, item), rng.choice(["-", ", ", "; ", " ", "/", "+", ""])
    whats = (
        f"joins the strings in `{items}` that {test.are} with {quote(mark)}",
        f"returns each `{item}` of `{items}` that {test.is_}, joined by {quote(mark)}",
    )
    body = f"return {quote(mark)}.join({item} for {item} in {items} if {test.code})"
    reference = lambda v: mark.join(filter(test.holds, v))
    return function(rng, name, items, body, whats, reference, word_lists(*test.edges))


def print_words_if(rng: Random) -> Task:
    name, items, item = named_list(rng, "print show display list", WORD_LISTS)
    test = word_test(rng, item)
    whats = (
        f"prints each string of `{items}` that {test.is_}, one a line",
        f"loops over `{items}` and prints every `{item}` that {test.is_}",
    )
    task = function(
        rng,
        name,
        items,
        f"for {item} in {items}:\n    if {test.code}:\n        print({item})",
        whats,
        lambda v: None,
        [],
    )
    return printed_lines(task, name, word_lists(*test.edges), lambda v: [u for u in v if test.holds(u)])


def append_words(rng: Random) -> Task:
    name, items, item = named_list(rng, "collect gather build", WORD_LISTS)
    change, made = word_change(rng, item), rng.choice(["result", "found", "output"])
    whats = (
        f"appends, in a loop, each `{item}` of `{items}` {change.words} to a list `{made}`, which it returns",
        f"starts with an empty list `{made}`, adds every string of `{items}` {change.words}, and returns `{made}`",
    )
    body = f"{made} = []\nfor {item} in {items}:\n    {made}.append({change.code})\nreturn {made}"
    return function(rng, name, items, body, whats, lambda v: list(map(change.apply, v)), WORDS_TO_CHANGE)


def dict_of_words(rng: Random) -> Task:
    name, items, item = named_list(rng, "map table index", WORD_LISTS)
    test = word_test(rng, item)
    whats = (
        f"returns a dictionary from each string of `{items}` that {test.is_} to its length",
        f"maps every `{item}` in `{items}` that {test.is_} to its length in a dictionary",
    )
    body = f"return {{{item}: len({item}) for {item} in {items} if {test.code}}}"
    reference = lambda v: {u: len(u) for u in v if test.holds(u)}
    return function(rng, name, items, body, whats, reference, word_lists(*test.edges))


# ---------------------------------------------------------------- dictionaries


def sum_in_dict(rng: Random) -> Task:
    name, data, _, value = named_dict(rng, "sum total add_up")
    test = number_test(rng, value)
    whats = (
        f"returns the sum of the values of the dictionary `{data}` that {test.are}",
        f"adds up each `{value}` in `{data}.values()` that {test.is_}",
    )
    body = f"return sum({value} for {value} in {data}.values() if {test.code})"
    reference = lambda v: sum(filter(test.holds, v.values()))
    return function(rng, name, data, body, whats, reference, dictionaries(test))


def any_all_in_dict(rng: Random) -> Task:
    name, data, _, value = named_dict(rng, "check test verify")
    test, what = number_test(rng, value), rng.choice(["any", "all"])
    which = {"any": "at least one value", "all": "every value"}[what]
    whats = (
        f"returns True if {which} of the dictionary `{data}` {test.is_}",
        f"tells whether {what} `{value}` in `{data}.values()` {test.is_}",
    )
    body = f"return {what}({test.code} for {value} in {data}.values())"
    reference = lambda v: sum(map(test.holds, v.values())) >= (len(v) if what == "all" else 1)
    return function(rng, name, data, body, whats, reference, dictionaries(test))


def values_of_dict(rng: Random) -> Task:
    name, data, _, value = named_dict(rng, "values list read")
    if rng.random() < 0.5:
        test = number_test(rng, value)
        whats = (
            f"returns a list of the values of the dictionary `{data}` that {test.are}",
            f"returns each `{value}` in `{data}.values()` that {test.is_}, as a list",
        )
        inner = f"{value} for {value} in {data}.values() if {test.code}"
        reference = lambda v: list(filter(test.holds, v.values()))
        cases = dictionaries(test)
    else:
        change = number_change(rng, value)
        whats = (
            f"returns a list with each value of the dictionary `{data}` {change.words}",
            f"returns every `{value}` in `{data}.values()` {change.words}, as a list",
        )
        inner = f"{change.code} for {value} in {data}.values()"
        reference = lambda v: list(map(change.apply, v.values()))
        cases = one_each([{}, STOCK, {"a": 5}])
    return function(rng, name, data, f"return [{inner}]", whats, reference, cases)


def print_dict(rng: Random) -> Task:
    name, data, key, value = named_dict(rng, "print show display")
    test = number_test(rng, value)
    whats = (
        f"prints each `{key}` of the dictionary `{data}` whose `{value}` {test.is_}, one a line",
        f"loops over `{key}` and `{value}` of `{data}` and prints every `{key}` whose `{value}` {test.is_}",
    )
    body = f"for {key}, {value} in {data}.items():\n    if {test.code}:\n        print({key})"
    task = function(rng, name, data, body, whats, lambda v: None, [])
    return printed_lines(task, name, dictionaries(test), lambda v: [k for k in v if test.holds(v[k])])


def drop_from_dict(rng: Random) -> Task:
    name, data, key, value = named_dict(rng, "drop remove exclude")
    test = number_test(rng, value)
    whats = (
        f"returns a dictionary of `{data}` without the entries whose value {test.is_} (loop over `{key}`, `{value}`)",
        f"leaves out each `{key}` of the dictionary `{data}` whose `{value}` {test.is_}",
    )
    body = f"return {{{key}: {value} for {key}, {value} in {data}.items() if not {test.code}}}"
    reference = lambda v: {k: v[k] for k in v if not test.holds(v[k])}
    return function(rng, name, data, body, whats, reference, dictionaries(test))


# ---------------------------------------------------------------- one string, one number


def change_text_if(rng: Random) -> Task:
    name, s = named_text(rng, "adjust fix correct tidy")
    test, change = word_test(rng, s), word_change(rng, s)
    whats = (
        f"returns `{s}` {change.words} if it {test.is_}, and `{s}` itself otherwise",
        f"leaves `{s}` as it is unless it {test.is_}, in which case it returns `{s}` {change.words}",
    )
    body = f"if {test.code}:\n    return {change.code}\nreturn {s}"
    reference = lambda v: change.apply(v) if test.holds(v) else v
    return function(rng, name, s, body, whats, reference, texts(*test.edges))


def default_text(rng: Random) -> Task:
    name, s = named_text(rng, "accept clean take")
    test, none = word_test(rng, s), rng.choice(["None", '""', "False", '"none"'])
    whats = (
        f"returns `{s}` if it {test.is_} and {none} otherwise",
        f"returns {none} unless `{s}` {test.is_}; then it returns `{s}`",
    )
    body = f"return {s} if {test.code} else {none}"
    return function(rng, name, s, body, whats, lambda v: v if test.holds(v) else eval(none), texts(*test.edges))


def number_if_text(rng: Random) -> Task:
    name, s = named_text(rng, "rate score grade price")
    test, (first, second) = word_test(rng, s), rng.sample(range(100), 2)
    whats = (
        f"returns {first} if `{s}` {test.is_} and {second} otherwise",
        f"returns {first} when `{s}` {test.is_}, else {second}",
    )
    body = f"return {first} if {test.code} else {second}"
    return function(rng, name, s, body, whats, lambda v: [second, first][test.holds(v)], texts(*test.edges))


def print_if_text(rng: Random) -> Task:
    name, s = named_text(rng, "report announce warn")
    test, words = word_test(rng, s), rng.choice(["too bad", "found", "attention", "matched", "yes"])
    whats = (
        f'prints "{words}" if `{s}` {test.is_}',
        f'prints the text "{words}", but only when `{s}` {test.is_}',
    )
    body = f'if {test.code}:\n    print("{words}")'
    task = function(rng, name, s, body, whats, lambda v: None, [])
    return printed_lines(task, name, texts(*test.edges), lambda v: [words] * test.holds(v))


def print_label(rng: Random) -> Task:
    name, x = named_scalar(rng, "report announce tell")
    test, (first, second) = number_test(rng, x), rng.sample("good bad high low yes no ok stop more less".split(), 2)
    whats = (
        f'prints "{first}" if `{x}` {test.is_} and "{second}" otherwise',
        f'prints "{first}" when `{x}` {test.is_}, else "{second}"',
    )
    body = f'if {test.code}:\n    print("{first}")\nelse:\n    print("{second}")'
    task = function(rng, name, x, body, whats, lambda v: None, [])
    return printed_lines(task, name, around(*test.edges), lambda v: [first if test.holds(v) else second])


def assert_number(rng: Random) -> Task:
    name, x = named_scalar(rng, "demand assert_good insist")
    test = number_test(rng, x)
    whats = (
        f"asserts that `{x}` {test.is_} and returns `{x}`",
        f"returns `{x}` after an assert statement that it {test.is_}",
    )

    def reference(v: int) -> int:
        assert test.holds(v)
        return v

    return function(rng, name, x, f"assert {test.code}\nreturn {x}", whats, reference, around(*test.edges))


# ---------------------------------------------------------------- classes


def class_text_setter(rng: Random) -> Task:
    name, field = rng.choice(CLASSES), rng.choice(TEXT_FIELDS)
    change, method = word_change(rng, f"self.{field}"), rng.choice("clean tidy convert fix format_it".split())
    whats = (
        f"with a field `{field}` and a method `{method}` that sets `{field}` to `{field}` {change.words}",
        f"that stores `{field}` and has a method `{method}` replacing it by `{field}` {change.words}",
    )
    code = f"{class_head(name, [field])}\n\n    def {method}(self):\n        self.{field} = {change.code}"
    checks = [
        Check(f"(lambda thing: [thing.{method}(), thing.{field}][1])({name}({v!r}))", change.apply(v))
        for (v,) in CHANGE_WORDS
    ]
    return class_task(rng, whats, code, checks, name)


def class_changed(rng: Random) -> Task:
    name, field = rng.choice(CLASSES), rng.choice(NUMBER_FIELDS)
    change, method = number_change(rng, f"self.{field}"), rng.choice("next_value planned expected future".split())
    whats = (
        f"with a field `{field}` and a method `{method}` that returns `{field}` {change.words}",
        f"that stores `{field}` and has a method `{method}` returning it {change.words}",
    )
    code = f"{class_head(name, [field])}\n\n    def {method}(self):\n        return {change.code}"
    checks = [Check(f"{name}({v}).{method}()", change.apply(v)) for v in (1, 7, 40)]
    return class_task(rng, whats, code, checks, name)


def class_set_argument(rng: Random) -> Task:
    name, field = rng.choice(CLASSES), rng.choice(NUMBER_FIELDS + TEXT_FIELDS)
    method, new = f"{rng.choice(['set', 'change', 'replace'])}_{field}", rng.choice(["new", "value", "other"])
    whats = (
        f"with a field `{field}` and a method `{method}({new})` that sets `{field}` to `{new}`",
        f"that stores `{field}` and has a method `{method}({new})` replacing it by `{new}`",
    )
    code = f"{class_head(name, [field])}\n\n    def {method}(self, {new}):\n        self.{field} = {new}"
    checks = [
        Check(f"(lambda thing: [thing.{method}(8), thing.{field}][1])({name}(3))", 8),
        Check(f"{name}(3).{field}", 3),
    ]
    return class_task(rng, whats, code, checks, name)


def class_text_is(rng: Random) -> Task:
    name, field = rng.choice(CLASSES), rng.choice(TEXT_FIELDS)
    test, method = word_test(rng, f"self.{field}"), f"is_{rng.choice('fine good valid special allowed nice'.split())}"
    whats = (
        f"with a field `{field}` and a method `{method}` that returns True if `{field}` {test.is_}",
        f"that stores `{field}` and has a method `{method}` telling whether it {test.is_}",
    )
    code = f"{class_head(name, [field])}\n\n    def {method}(self):\n        return {test.code}"
    checks = [Check(f"{name}({v!r}).{method}()", test.holds(v)) for (v,) in texts(*test.edges)]
    return class_task(rng, whats, code, checks, name)


# ---------------------------------------------------------------- edits


def number_function(rng: Random) -> tuple[str, str, str, Callable]:
    name, x = named_scalar(rng, "make get find work_out")
    change = number_change(rng, x)
    return name, x, change.code, change.apply


def remove_docstring(rng: Random) -> Task:
    name, x, code, reference = number_function(rng)
    text = f"{rng.choice(['Return the new', 'Compute the', 'Work out the', 'Give the'])} {rng.choice(SCALARS)}."
    ask = ("Remove the docstring.", f"Delete the docstring of `{name}`.", "This function should have no docstring.")
    checks = [*calls(name, reference, one_each([3, 8, 20])), Check(f"{name}.__doc__", None)]
    before = define(name, x, f'"""{text}"""\nreturn {code}')
    return Task(rng.choice(ask), before, define(name, x, f"return {code}"), checks)


def remove_type_hints(rng: Random) -> Task:
    name, x, code, reference = number_function(rng)
    kind = rng.choice(["int", "float"])
    ask = ("Remove the type hints.", "Delete the annotations of this function.", "Write this without type hints.")
    checks = [*calls(name, reference, one_each([3, 8, 20])), Check(f"{name}.__annotations__", {})]
    before = f"def {name}({x}: {kind}) -> {kind}:\n    return {code}"
    return Task(rng.choice(ask), before, define(name, x, f"return {code}"), checks)


def remove_argument(rng: Random) -> Task:
    name, x, code, reference = number_function(rng)
    extra = rng.choice("unused extra option flag other more".split())
    ask = (
        f"Remove the parameter `{extra}`.",
        f"Delete the argument `{extra}`, which is not used.",
        f"This function should not take `{extra}`.",
    )
    order = f"{x}, {extra}" if rng.random() < 0.6 else f"{extra}, {x}"
    checks = calls(name, reference, one_each([3, 8, 20]))
    return Task(rng.choice(ask), define(name, order, f"return {code}"), define(name, x, f"return {code}"), checks)


def remove_guard(rng: Random) -> Task:
    name, x, code, reference = number_function(rng)
    test, error = number_test(rng, x), rng.choice(["ValueError", "RuntimeError"])
    ask = (f"Remove the check that raises {error}.", "Remove the `if` statement.", f"Do not raise {error} any more.")
    before = define(name, x, f"if {test.code}:\n    raise {error}\nreturn {code}")
    checks = calls(name, reference, around(*test.edges))
    return Task(rng.choice(ask), before, define(name, x, f"return {code}"), checks)


def change_default(rng: Random) -> Task:
    name, x, y = *named_scalar(rng, "add shift move"), rng.choice("step bonus extra factor delta offset".split())
    old, new = rng.sample(range(99), 2)
    ask = (
        f"Change the default value of `{y}` to {new}.",
        f"The parameter `{y}` should be {new} by default.",
        f"Use {new} as the default of `{y}`, not {old}.",
    )
    checks = [Check(f"{name}(7, 2)", 9), Check(f"{name}(7)", 7 + new)]
    body = f"return {x} + {y}"
    return Task(rng.choice(ask), define(name, f"{x}, {y}={old}", body), define(name, f"{x}, {y}={new}", body), checks)


def remove_field(rng: Random) -> Task:
    name, fields = rng.choice(CLASSES), rng.sample(TEXT_FIELDS + NUMBER_FIELDS, rng.randrange(2, 4))
    gone = rng.choice(fields)
    kept = [field for field in fields if field != gone]
    ask = (
        f"Remove the field `{gone}` from this class.",
        f"This class should no longer store `{gone}`.",
        f"Delete `{gone}` from the constructor.",
    )
    values = [10 * i + 3 for i in range(len(kept))]
    checks = [
        Check(f"{name}({', '.join(map(str, values))}).{field}", value)
        for field, value in zip(kept, values, strict=True)
    ]
    return Task(rng.choice(ask), class_head(name, fields), class_head(name, kept), checks)


def rename_method(rng: Random) -> Task:
    name, field = rng.choice(CLASSES), rng.choice(NUMBER_FIELDS)
    change = number_change(rng, f"self.{field}")
    old, new = rng.sample("next_value planned expected future adjusted final measure compute result".split(), 2)
    code = f"{class_head(name, [field])}\n\n    def {{}}(self):\n        return {change.code}"
    ask = (
        f"Rename the method in this code to `{new}`.",
        f"Change the method's name to `{new}`.",
        f"Rename `{old}` to `{new}`.",
    )
    checks = [Check(f"{name}({v}).{new}()", change.apply(v)) for v in (1, 7, 40)]
    checks.append(Check(f"hasattr({name}, '{old}')", False))
    return Task(rng.choice(ask), code.format(old), code.format(new), checks)


def rename_field(rng: Random) -> Task:
    name = rng.choice(CLASSES)
    first, old, new = rng.sample(TEXT_FIELDS + NUMBER_FIELDS, 3)
    ask = (
        f"Rename the field `{old}` in this class to `{new}`.",
        f"Change the field's name from `{old}` to `{new}`.",
        f"Rename `{old}` to `{new}`.",
    )
    checks = [Check(f"{name}(3, 13).{field}", v) for field, v in zip((first, new), (3, 13), strict=True)]
    return Task(rng.choice(ask), class_head(name, [first, old]), class_head(name, [first, new]), checks)


def rename_variable(rng: Random) -> Task:
    name, items, item = named_list(rng, "sum total add_up")
    change = number_change(rng, item)
    old, new = rng.sample(["total", "result", "answer", "acc", "amount_so_far", "running"], 2)
    body = f"{{0}} = 0\nfor {item} in {items}:\n    {{0}} += {change.code}\nreturn {{0}}"
    ask = (
        f"Rename the variable `{old}` to `{new}`.",
        f"Call the variable `{new}` instead of `{old}`.",
        f"Use the name `{new}` for `{old}`.",
    )
    checks = calls(name, lambda v: sum(map(change.apply, v)), number_lists(3, 8))
    checks.append(Check(f"'{new}' in {name}.__code__.co_varnames", True))
    return Task(rng.choice(ask), define(name, items, body.format(old)), define(name, items, body.format(new)), checks)


FAMILIES = (
    drop_numbers, last_match, extreme_if, average_changed, share_of, set_of_kept, tuple_of_changes, print_numbers,
    append_loop, sum_changed_if, dict_of_changes, count_words, any_all_words, first_word, word_positions,
    words_with_else, set_of_words, lengths_of, join_words_if, print_words_if, append_words, dict_of_words, sum_in_dict,
    any_all_in_dict, values_of_dict, print_dict, drop_from_dict, change_text_if, default_text, number_if_text,
    print_if_text, print_label, assert_number, class_text_setter, class_changed, class_set_argument, class_text_is,
    remove_docstring, remove_type_hints, remove_argument, remove_guard, change_default, remove_field, rename_method,
    rename_field, rename_variable,
)  # fmt: skip
