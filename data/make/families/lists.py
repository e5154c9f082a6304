"""Tasks about lists of numbers and of strings."""

from random import Random

from data.make.families.common import (
    LETTERS,
    NUMBER_LISTS,
    SAMPLE_WORDS,
    SEPARATORS,
    WORD_LISTS,
    Task,
    any_name,
    function,
    named_list,
    number_change,
    number_lists,
    number_test,
    one_each,
    quote,
    word_change,
    word_lists,
    word_test,
)

SHORT_LISTS = [[4], [3, 1, 2], [9, -4, 7, 7, 0, 12], [5, 5, 1, 30, 8, 2, -6, 11, 4, 40]]


def keep_numbers(rng: Random) -> Task:
    name, items, item = named_list(rng, "keep filter select pick")
    test = number_test(rng, item)
    whats = (
        f"returns a list of the numbers in `{items}` that {test.are}",
        f"returns only those elements of `{items}` that {test.are}",
        f"keeps each `{item}` of `{items}` that {test.is_} and returns them as a list",
    )
    body = f"return [{item} for {item} in {items} if {test.code}]"
    cases = number_lists(*test.edges)
    return function(rng, name, items, body, whats, lambda v: list(filter(test.holds, v)), cases)


def keep_words(rng: Random) -> Task:
    name, items, item = named_list(rng, "keep filter select pick", WORD_LISTS)
    test = word_test(rng, item)
    whats = (
        f"returns a list of the strings in `{items}` that {test.are}",
        f"returns only those `{items}` that {test.are}",
        f"keeps each `{item}` of `{items}` that {test.is_} and returns them as a list",
    )
    body = f"return [{item} for {item} in {items} if {test.code}]"
    return function(rng, name, items, body, whats, lambda v: list(filter(test.holds, v)), word_lists(*test.edges))


def count_numbers(rng: Random) -> Task:
    name, items, item = named_list(rng, "count number_of tally how_many")
    test = number_test(rng, item)
    whats = (
        f"returns how many numbers in `{items}` {test.are}",
        f"counts the elements of `{items}` that {test.are}",
        f"counts each `{item}` in `{items}` that {test.is_}",
    )
    body = f"return sum(1 for {item} in {items} if {test.code})"
    reference = lambda v: len([u for u in v if test.holds(u)])
    return function(rng, name, items, body, whats, reference, number_lists(*test.edges))


def count_words_loop(rng: Random) -> Task:
    name, items, item = named_list(rng, "count number_of tally how_many", WORD_LISTS)
    test = word_test(rng, item)
    count = rng.choice(["count", "total", "found", "matches", "hits"])
    whats = (
        f"counts with a loop and the variable `{count}` how many of the `{items}` {test.are}",
        f"goes through `{items}`, adds 1 to `{count}` for each `{item}` that {test.is_}, and returns `{count}`",
    )
    body = f"{count} = 0\nfor {item} in {items}:\n    if {test.code}:\n        {count} += 1\nreturn {count}"
    reference = lambda v: len([u for u in v if test.holds(u)])
    return function(rng, name, items, body, whats, reference, word_lists(*test.edges))


def sum_numbers_if(rng: Random) -> Task:
    name, items, item = named_list(rng, "sum total add_up combine")
    test = number_test(rng, item)
    whats = (
        f"returns the sum of the numbers in `{items}` that {test.are}",
        f"adds up all elements of `{items}` that {test.are}",
        f"sums each `{item}` of `{items}` that {test.is_}",
    )
    body = f"return sum({item} for {item} in {items} if {test.code})"
    return function(rng, name, items, body, whats, lambda v: sum(filter(test.holds, v)), number_lists(*test.edges))


def sum_loop(rng: Random) -> Task:
    name, items, item = named_list(rng, "sum total add_up accumulate")
    change, total = number_change(rng, item), rng.choice(["total", "result", "answer", "acc"])
    start = rng.choice([0, 0, rng.randrange(1, 50)])
    whats = (
        f"starts `{total}` at {start}, adds each `{item}` of `{items}` {change.words} in a loop, and returns `{total}`",
        f"uses a for loop to add every `{item}` in `{items}`, {change.words}, to `{total}` (initially {start})",
    )
    body = f"{total} = {start}\nfor {item} in {items}:\n    {total} += {change.code}\nreturn {total}"
    reference = lambda v: sum((change.apply(u) for u in v), start)
    return function(rng, name, items, body, whats, reference, number_lists(3, 8))


def any_all(rng: Random) -> Task:
    name, items, item = named_list(rng, "check test verify inspect")
    test, what = number_test(rng, item), rng.choice(["any", "all"])
    which = {"any": "at least one number", "all": "every number"}[what]
    whats = (
        f"returns True if {which} in `{items}` {test.is_}",
        f"tells whether {what} of the `{items}` {test.are}"
        if what == "all"
        else f"tells whether any of the `{items}` {test.is_}",
        f"checks that {which} in `{items}` {test.is_}",
    )
    body = f"return {what}({test.code} for {item} in {items})"
    reference = lambda v: len([u for u in v if test.holds(u)]) >= (len(v) if what == "all" else 1)
    cases = number_lists(*test.edges) + one_each([edge] for edge in test.edges)
    return function(rng, name, items, body, whats, reference, cases)


def map_numbers(rng: Random) -> Task:
    name, items, item = named_list(rng, "convert change scale map")
    change = number_change(rng, item)
    whats = (
        f"returns a list with each number of `{items}` {change.words}",
        f"returns every `{item}` in `{items}` {change.words}, as a list",
        f"builds a list of the `{items}`, each {change.words}",
    )
    body = f"return [{change.code} for {item} in {items}]"
    return function(rng, name, items, body, whats, lambda v: list(map(change.apply, v)), number_lists(3, 8))


def map_words(rng: Random) -> Task:
    name, items, item = named_list(rng, "convert change format map", WORD_LISTS)
    change = word_change(rng, item)
    whats = (
        f"returns a list with each string of `{items}` {change.words}",
        f"returns every `{item}` in `{items}` {change.words}, as a list",
        f"builds a list of the `{items}`, each {change.words}",
    )
    body = f"return [{change.code} for {item} in {items}]"
    cases = word_lists("  Abc d ", "prstuw", "abcdefghiklm", "noted")
    return function(rng, name, items, body, whats, lambda v: list(map(change.apply, v)), cases)


def map_and_keep(rng: Random) -> Task:
    name, items, item = named_list(rng, "convert process select map")
    change, test = number_change(rng, item), number_test(rng, item)
    whats = (
        f"returns a list of the numbers in `{items}` that {test.are}, each {change.words}",
        f"takes each `{item}` of `{items}` that {test.is_} and returns a list of them {change.words}",
    )
    body = f"return [{change.code} for {item} in {items} if {test.code}]"
    reference = lambda v: list(map(change.apply, filter(test.holds, v)))
    return function(rng, name, items, body, whats, reference, number_lists(*test.edges))


def map_with_else(rng: Random) -> Task:
    name, items, item = named_list(rng, "convert replace fix adjust")
    test, other = number_test(rng, item), rng.choice([0, 1, -1, rng.randrange(2, 100)])
    whats = (
        f"returns `{items}` as a list in which each number that {test.is_} is replaced by {other}",
        f"replaces every `{item}` in `{items}` that {test.is_} with {other} and returns the new list",
    )
    body = f"return [{other} if {test.code} else {item} for {item} in {items}]"
    reference = lambda v: [[u, other][test.holds(u)] for u in v]
    return function(rng, name, items, body, whats, reference, number_lists(*test.edges))


def first_match(rng: Random) -> Task:
    name, items, item = named_list(rng, "find first search get")
    test, none = number_test(rng, item), rng.choice(["None", "-1", "0", "False"])
    whats = (
        f"returns the first number in `{items}` that {test.is_}, or {none} if there is none",
        f"loops over `{items}` and returns the first `{item}` that {test.is_}; if none does, it returns {none}",
    )
    body = f"for {item} in {items}:\n    if {test.code}:\n        return {item}\nreturn {none}"
    reference = lambda v: next(filter(test.holds, v), eval(none))
    cases = number_lists(*test.edges) + one_each([edge] for edge in test.edges)
    return function(rng, name, items, body, whats, reference, cases)


def match_positions(rng: Random) -> Task:
    name, items, item = named_list(rng, "find positions_of index locate")
    test, i = number_test(rng, item), rng.choice(["i", "index", "position", "place"])
    whats = (
        f"returns a list of the indices of the numbers in `{items}` that {test.are} (name the index `{i}`)",
        f"enumerates `{items}` with `{i}` and `{item}` and returns each `{i}` at which `{item}` {test.is_}",
    )
    body = f"return [{i} for {i}, {item} in enumerate({items}) if {test.code}]"
    reference = lambda v: [k for k in range(len(v)) if test.holds(v[k])]
    return function(rng, name, items, body, whats, reference, number_lists(*test.edges))


def sort_list(rng: Random) -> Task:
    numbers = rng.random() < 0.5
    name, items, item = named_list(rng, "sort order rank arrange", NUMBER_LISTS if numbers else WORD_LISTS)
    n = rng.randrange(2, 20)
    options = [("", None, ""), (f", key=lambda {item}: abs({item} - {n})", lambda v: abs(v - n),
            f" by their distance from {n}"),
               (f", key=lambda {item}: {item} % {n}", lambda v: v % n, f" by their remainder modulo {n}"),
               (", key=abs", lambda v: max(v, -v), " by their absolute value")]  # fmt: skip
    if not numbers:
        options = [("", None, ""), (", key=len", len, " by length"), (", key=str.lower", str.lower, " ignoring case"),
                   (f", key=lambda {item}: {item}[-1]", lambda v: v[-1], " by their last character"),
                   (f", key=lambda {item}: {item}[1:]", lambda v: v[1:], " by all but their first character"),
                   (f', key=lambda {item}: {item}.count("e")', lambda v: v.count("e"),
                       ' by how often they contain "e"')]  # fmt: skip
    code, key, words = rng.choice(options)
    down = rng.random() < 0.5
    direction = "descending" if down else "ascending"
    top = rng.choice([0, 0, rng.randrange(2, 9)])
    first = f"the first {top} of " if top else ""
    whats = (
        f"sorts `{items}`{words} in {direction} order and returns {first or 'them as '}{'them' if top else 'a list'}",
        f"returns {first}the elements of `{items}` sorted{words} in {direction} order",
    )
    body = f"return sorted({items}{code}{', reverse=True' if down else ''}){f'[:{top}]' if top else ''}"

    def reference(v: list) -> list:
        v = v[:]
        v.sort(key=key, reverse=down)
        return v[:top] if top else v

    cases = one_each([[], [5, -30, 12, 7, 3, 19, 8, 41, -2, 2, 26], [1, 2, 3]])
    if not numbers:
        cases = one_each(
            [[], ["pear", "Apple", "fig", "kiwi", "Eve", "cheese", "bed", "Zoo", "melee", "am"], ["b", "a"]]
        )
    return function(rng, name, items, body, whats, reference, cases)


def slice_list(rng: Random) -> Task:
    name, items, _ = named_list(rng, "slice take part_of cut", rng.choice([NUMBER_LISTS, WORD_LISTS]))
    n, k = rng.randrange(2, 9), rng.randrange(2, 7)
    words, code, keep = rng.choice([
        (f"the first {n} elements", f"[:{n}]", lambda i, size: i < n),
        (f"the last {n} elements", f"[-{n}:]", lambda i, size: i >= size - n),
        (f"all but the first {n} elements", f"[{n}:]", lambda i, size: i >= n),
        (f"all but the last {n} elements", f"[:-{n}]", lambda i, size: i < size - n),
        (f"every {k}th element, starting with the first,".replace("2th", "2nd").replace("3th", "3rd"), f"[::{k}]",
         lambda i, size: i % k == 0),
        (f"the elements from index {k} up to but not including index {k + n}", f"[{k}:{k + n}]",
         lambda i, size: k <= i < k + n),
    ])  # fmt: skip
    back = rng.random() < 0.25
    whats = (
        f"returns {words} of `{items}`{' in reverse order' * back}",
        f"gives {words} of the list `{items}`{', reversed' * back}",
    )
    reference = lambda v: [u for i, u in enumerate(v) if keep(i, len(v))][:: -1 if back else 1]
    cases = one_each([[], [1, 2, 3], list(range(10, 30)), ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k"]])
    return function(rng, name, items, f"return {items}{code}{'[::-1]' * back}", whats, reference, cases)


def chunk_list(rng: Random) -> Task:
    name, items, _ = named_list(rng, "chunk split group batch", rng.choice([NUMBER_LISTS, WORD_LISTS]))
    n, i = rng.randrange(2, 20), rng.choice(["i", "start", "k", "begin"])
    whats = (
        f"splits `{items}` into lists of {n}, the last of which may be shorter (index variable `{i}`)",
        f"returns a list of consecutive slices of `{items}` of length {n}, each starting at an index `{i}`",
    )
    body = f"return [{items}[{i} : {i} + {n}] for {i} in range(0, len({items}), {n})]"

    def reference(v: list) -> list:
        return [v[:n], *reference(v[n:])] if v else []

    return function(
        rng,
        name,
        items,
        body,
        whats,
        reference,
        one_each([[], [1], list(range(n)), list(range(n + 1)), list(range(45))]),
    )


def list_statistics(rng: Random) -> Task:
    name, items, item = named_list(rng, "measure get summarize evaluate")
    words, code, reference = rng.choice([
        ("the sum of `{s}`", "sum({s})", lambda v: v[0] + sum(v[1:])),
        ("the average of `{s}`", "sum({s}) / len({s})", lambda v: sum(v) / len(v)),
        ("the difference between the largest and the smallest of `{s}`", "max({s}) - min({s})",
         lambda v: sorted(v)[-1] - sorted(v)[0]),
        ("the largest of `{s}`", "max({s})", lambda v: sorted(v)[-1]),
        ("the smallest of `{s}`", "min({s})", lambda v: sorted(v)[0]),
        ("the sum of the squares of `{s}`", "sum({i} ** 2 for {i} in {s})", lambda v: sum(map(lambda u: u * u, v))),
        ("the sum of the absolute values of `{s}`", "sum(abs({i}) for {i} in {s})", lambda v: sum(map(abs, v))),
        ("the index of the largest of `{s}`", "{s}.index(max({s}))",
         lambda v: max(range(len(v)), key=lambda k: (v[k], -k))),
        ("the index of the smallest of `{s}`", "{s}.index(min({s}))",
         lambda v: min(range(len(v)), key=lambda k: (v[k], k))),
        ("the number of different values in `{s}`", "len(set({s}))", lambda v: len(dict.fromkeys(v))),
        ("the sum of the first and the last of `{s}`", "{s}[0] + {s}[-1]", lambda v: v[0] + v[len(v) - 1]),
        ("the second largest of the different values in `{s}`", "sorted(set({s}))[-2]",
         lambda v: sorted(dict.fromkeys(v))[-2]),
        ("the largest and the smallest of `{s}` as a tuple", "max({s}), min({s})",
         lambda v: (sorted(v)[-1], sorted(v)[0])),
    ])  # fmt: skip
    words, code = words.format(s=items), code.format(s=items, i=item)
    whats = (f"returns {words}", f"computes {words}", f"takes a list of numbers and returns {words}")
    return function(rng, name, items, f"return {code}", whats, reference, one_each(SHORT_LISTS[1:]))


def average_or_default(rng: Random) -> Task:
    name, items, _ = named_list(rng, "average mean center typical")
    what, code, reference = rng.choice([
        ("average", "sum({s}) / len({s})", lambda v: sum(v) / len(v)), ("largest", "max({s})", max),
        ("smallest", "min({s})", min), ("last", "{s}[-1]", lambda v: v[len(v) - 1]),
    ])  # fmt: skip
    none = rng.choice(["0", "None", "-1", "0.0", "1", "100"])
    whats = (
        f"returns the {what} of `{items}`, or {none} if the list is empty",
        f"returns {none} for an empty list and otherwise the {what} of `{items}`",
    )
    body = f"if not {items}:\n    return {none}\nreturn {code.format(s=items)}"
    cases = one_each([[], *SHORT_LISTS])
    return function(rng, name, items, body, whats, lambda v: reference(v) if v else eval(none), cases)


def neighbor_pairs(rng: Random) -> Task:
    name, items, _ = named_list(rng, "pair compare neighbors differences")
    a, b = rng.choice("a,b x,y first,second left,right old,new before,after".split()).split(",")
    words, code, reference = rng.choice([
        (f"the differences `{b} - {a}`", f"[{b} - {a}", lambda p, q: q - p),
        (f"the sums `{a} + {b}`", f"[{a} + {b}", lambda p, q: p + q),
        (f"the products `{a} * {b}`", f"[{a} * {b}", lambda p, q: p * q),
        (f"whether `{a}` is less than `{b}`", f"[{a} < {b}", lambda p, q: q > p),
        (f"the tuples `({a}, {b})`", f"[({a}, {b})", lambda p, q: (p, q)),
        (f"the larger of `{a}` and `{b}`", f"[max({a}, {b})", lambda p, q: p if p > q else q),
    ])  # fmt: skip
    whats = (
        f"returns a list of {words} for all neighbors `{a}`, `{b}` in `{items}`",
        f"pairs each element `{a}` of `{items}` with the next one `{b}` and returns a list of {words}",
    )
    body = f"return {code} for {a}, {b} in zip({items}, {items}[1:])]"
    reference_list = lambda v: [reference(v[i], v[i + 1]) for i in range(len(v) - 1)]
    return function(rng, name, items, body, whats, reference_list, one_each([[], *SHORT_LISTS]))


def two_lists(rng: Random) -> Task:
    first, second = rng.sample(NUMBER_LISTS, 2)
    a, b = first[:-1], second[:-1]
    name = f"{rng.choice(['combine', 'merge', 'join', 'match'])}_{rng.choice([first, second])}"
    words, code, reference = rng.choice([
        ("the sums of", f"[{a} + {b}", lambda p, q: p + q), ("the products of", f"[{a} * {b}", lambda p, q: p * q),
        ("the differences of", f"[{a} - {b}", lambda p, q: p - q),
        ("the larger of", f"[max({a}, {b})", lambda p, q: p if p > q else q),
        ("the smaller of", f"[min({a}, {b})", lambda p, q: p if p < q else q),
        ("tuples of", f"[({a}, {b})", lambda p, q: (p, q)),
    ])  # fmt: skip
    whats = (
        f"returns a list of {words} the elements of `{first}` and `{second}`, pair by pair",
        f"returns a list of {words} each `{a}` and the `{b}` at the same position",
    )
    body = f"return {code} for {a}, {b} in zip({first}, {second})]"
    reference_list = lambda v, w: [reference(v[i], w[i]) for i in range(len(v))]
    return function(
        rng, name, f"{first}, {second}", body, whats, reference_list, [([], []), ([4], [9]), ([3, 1, 8], [2, 1, 9])]
    )


def unique_in_order(rng: Random) -> Task:
    name, items, item = named_list(rng, "unique dedupe distinct clean", rng.choice([NUMBER_LISTS, WORD_LISTS]))
    result = rng.choice(["result", "unique", "seen", "kept", "output"])
    whats = (
        f"returns `{items}` without duplicates in the original order, collecting them in a list `{result}`",
        f"appends each `{item}` of `{items}` that is not yet in the list `{result}` to it and returns `{result}`",
    )
    loop = f"for {item} in {items}:\n    if {item} not in {result}:\n        {result}.append({item})"
    body = f"{result} = []\n{loop}\nreturn {result}"
    cases = one_each([[], [3, 1, 3, 2, 1], ["b", "a", "b", "B"]])
    return function(rng, name, items, body, whats, lambda v: list(dict.fromkeys(v)), cases)


def count_value(rng: Random) -> Task:
    name, items, _ = named_list(rng, "count repeats_of tally frequency")
    value, more = rng.randrange(2, 99), rng.choice([None, rng.randrange(2, 9)])
    if more is None:
        whats = (
            f"returns how often {value} occurs in `{items}`",
            f"counts the number {value} in the list `{items}`",
            f"returns the number of elements of `{items}` equal to {value}",
        )
    else:
        whats = (
            f"returns True if {value} occurs at least {more} times in `{items}`",
            f"checks whether the list `{items}` contains {value} {more} times or more",
        )
    body = f"return {items}.count({value})" + (f" >= {more}" if more else "")
    reference = lambda v: len([u for u in v if u == value]) if more is None else sum(u == value for u in v) >= more
    k = more or 2
    cases = one_each([[], [value], [value, 1] * (k - 1), [value, 0] * k, [value + 1] * k, [value] * (k + 1)])
    return function(rng, name, items, body, whats, reference, cases)


def edit_list(rng: Random) -> Task:
    numbers = rng.random() < 0.5
    name, items, _ = named_list(rng, "edit extend update change", NUMBER_LISTS if numbers else WORD_LISTS)
    value = rng.randrange(2, 100) if numbers else rng.choice(SAMPLE_WORDS)
    v, i = quote(value), rng.randrange(1, 4)
    words, code, reference = rng.choice([
        (f"with {v} added at the end", f"{items} + [{v}]", lambda u: [*u, value]),
        (f"with {v} added at the front", f"[{v}] + {items}", lambda u: [value, *u]),
        (f"with {v} inserted at index {i}", f"{items}[:{i}] + [{v}] + {items}[{i}:]",
         lambda u: [*u[:i], value, *u[i:]]),
        (f"with the element at index {i} replaced by {v}", f"{items}[:{i}] + [{v}] + {items}[{i + 1}:]",
         lambda u: [value if k == i else w for k, w in enumerate(u)]),
        (f"without the element at index {i}", f"{items}[:{i}] + {items}[{i + 1}:]",
         lambda u: [w for k, w in enumerate(u) if k != i]),
    ])  # fmt: skip
    whats = (
        f"returns a new list: `{items}` {words}",
        f"returns a copy of `{items}` {words}",
        f"returns `{items}` {words}",
    )
    cases = one_each([[1, 2, 3, 4, 5, 6], ["a", "b", "c", "d"], [value] * 5 + [0]])
    return function(rng, name, items, f"return {code}", whats, reference, cases)


def extreme_by(rng: Random) -> Task:
    words_list = rng.random() < 0.5
    name, items, item = named_list(rng, "best pick choose top", WORD_LISTS if words_list else NUMBER_LISTS)
    n = rng.randrange(2, 60)
    c = rng.choice(LETTERS)
    code, words, key = rng.choice([("len", "length", len),
            (f'lambda {item}: {item}.count("{c}")', f'number of "{c}"', lambda v: v.count(c))]
                                  if words_list else [(f"lambda {item}: abs({item} - {n})", f"distance from {n}",
                                          lambda v: abs(n - v)),
                                                      (f"lambda {item}: {item} % {n}", f"remainder modulo {n}",
                                                          lambda v: v % n)])  # fmt: skip
    least = rng.random() < 0.5
    extreme = "smallest" if least else "largest"
    whats = (
        f"returns the element of `{items}` with the {extreme} {words}",
        f"finds the `{item}` in `{items}` whose {words} is the {extreme}",
    )
    body = f"return {'min' if least else 'max'}({items}, key={code})"
    reference = lambda v: sorted(v, key=lambda u: key(u) if least else -key(u))[0]
    cases = [["fig", "banana", "kiwi", "strawberry", "am"], [c, c + c + "x", "x"], ["zzzz", c, "yy"]]
    cases = cases if words_list else [[3, 90, 41, n, n + 1], [n - 1, 2 * n, 5], [100, -50, 7, 23]]
    return function(rng, name, items, body, whats, reference, one_each(cases))


def join_list(rng: Random) -> Task:
    name, items, item = named_list(rng, "join show print_out list_of", rng.choice([NUMBER_LISTS, WORD_LISTS]))
    sep = rng.choice(SEPARATORS)
    code, words, apply = rng.choice([
        (f"str({item}) for {item} in {items}", "converted to strings", str),
        (f'f"<{{{item}}}>" for {item} in {items}', "each put between < and >", lambda v: f"<{v}>"),
        (f'f"[{{{item}}}]" for {item} in {items}', "each put between [and ]", lambda v: f"[{v}]"),
        (f'f"{{{item}}}%" for {item} in {items}', 'each followed by "%"', lambda v: f"{v}%"),
        (f'f"#{{{item}}}" for {item} in {items}', 'each preceded by "#"', lambda v: f"#{v}"),
    ])  # fmt: skip
    whats = (
        f'joins the elements of `{items}`, {words}, with "{sep}"',
        f'returns a string of the `{items}`, {words}, separated by "{sep}"',
    )
    reference = lambda v: sep.join(map(apply, v))
    return function(
        rng, name, items, f'return "{sep}".join({code})', whats, reference, one_each([[], [4], [3, 1, 2], ["a", "b"]])
    )


def numbered_lines(rng: Random) -> Task:
    name, items, item = named_list(rng, "number label enumerate mark", WORD_LISTS)
    start, i = rng.choice([0, 1, rng.randrange(2, 60)]), rng.choice(["i", "index", "number", "k"])
    sep = rng.choice([". ", ": ", ") ", " - ", "=", " ", "/"])
    whats = (
        f'returns a list of strings "{{{i}}}{sep}{{{item}}}" with `{i}` counting from {start} through `{items}`',
        f'numbers the `{items}` from {start} with `{i}`: each becomes the f-string "{{{i}}}{sep}{{{item}}}" in a list',
    )
    body = f'return [f"{{{i}}}{sep}{{{item}}}" for {i}, {item} in enumerate({items}{f", {start}" if start else ""})]'
    reference = lambda v: [str(start + k) + sep + v[k] for k in range(len(v))]
    return function(rng, name, items, body, whats, reference, one_each([[], ["a", "b"], ["x"]]))


def flatten(rng: Random) -> Task:
    rows, row, item = rng.choice([
        ("rows", "row", "cell"), ("matrix", "row", "value"), ("groups", "group", "item"), ("lists", "part", "item"),
        ("pages", "page", "line"), ("teams", "team", "player"), ("boxes", "box", "item"), ("grid", "line", "cell"),
        ("tables", "table", "entry"), ("shelves", "shelf", "book"), ("batches", "batch", "sample"),
    ])  # fmt: skip
    name = any_name(rng, "flatten collect measure reduce", NUMBER_LISTS)
    n = rng.randrange(0, 6)
    code, words, reference = rng.choice([
        (f"[{item} for {row} in {rows} for {item} in {row}]", f"one list of every `{item}` in every `{row}`",
         lambda v: sum(v, [])),
        (f"[sum({row}) for {row} in {rows}]", f"a list of the sum of each `{row}`", lambda v: [sum(u) for u in v]),
        (f"[max({row}) for {row} in {rows}]", f"a list of the largest number of each `{row}`",
         lambda v: list(map(max, v))),
        (f"[len({row}) for {row} in {rows}]", f"a list of the length of each `{row}`", lambda v: list(map(len, v))),
        (f"[{row}[::-1] for {row} in {rows}]", f"a list of each `{row}` reversed",
         lambda v: [list(reversed(u)) for u in v]),
        (f"[{row}[{n}] for {row} in {rows}]", f"a list of the element at index {n} of each `{row}`",
         lambda v: [dict(enumerate(u))[n] for u in v]),
        (f"sum(len({row}) for {row} in {rows})", f"the lengths of every `{row}` added up", lambda v: len(sum(v, []))),
    ])  # fmt: skip
    whats = (f"returns {words} in the nested list `{rows}`", f"takes a list of lists `{rows}` and returns {words}")
    cases = [[[3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8]], [[6, 2, 6, 4, 3, 0, 3], [0, 7, 7, 2, 1, 5], [9, 9, 9, 9, 9, 8]]]
    return function(rng, name, rows, f"return {code}", whats, reference, one_each(cases))


FAMILIES = (
    keep_numbers, keep_words, count_numbers, count_words_loop, sum_numbers_if, sum_loop, any_all, map_numbers,
    map_words, map_and_keep, map_with_else, first_match, match_positions, sort_list, slice_list, chunk_list,
    list_statistics, average_or_default, neighbor_pairs, two_lists, unique_in_order, count_value, edit_list,
    extreme_by, join_list, numbered_lines, flatten,
)  # fmt: skip
