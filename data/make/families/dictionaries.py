"""Tasks about dictionaries, lists of dictionaries, and sets."""

from random import Random

from data.make.families.common import (
    CLASSES,
    KEYS,
    STOCK,
    WORD_LISTS,
    Task,
    and_list,
    any_name,
    function,
    named_dict,
    named_list,
    number_change,
    number_test,
    one_each,
    quote,
    records,
)


def dict_keep(rng: Random) -> Task:
    name, data, key, value = named_dict(rng, "keep filter select reduce pick")
    test = number_test(rng, value)
    whats = (
        f"returns a dictionary of the entries of `{data}` whose value {test.is_} (loop over `{key}`, `{value}`)",
        f"keeps each `{key}` of the dictionary `{data}` whose `{value}` {test.is_}, together with the value",
    )
    body = f"return {{{key}: {value} for {key}, {value} in {data}.items() if {test.code}}}"
    cases = one_each([{}, STOCK, {f"k{edge}": edge for edge in test.edges}])
    return function(rng, name, data, body, whats, lambda v: {k: v[k] for k in v if test.holds(v[k])}, cases)


def dict_map(rng: Random) -> Task:
    name, data, key, value = named_dict(rng, "change convert scale update map")
    change = number_change(rng, value)
    whats = (
        f"returns a dictionary with the keys of `{data}` and each value {change.words} (loop over `{key}`, `{value}`)",
        f"maps each `{key}` of the dictionary `{data}` to its `{value}` {change.words}",
    )
    body = f"return {{{key}: {change.code} for {key}, {value} in {data}.items()}}"
    cases = one_each([{}, STOCK, {"a": 5}])
    return function(
        rng, name, data, body, whats, lambda v: dict(zip(v, map(change.apply, v.values()), strict=True)), cases
    )


def dict_keys_where(rng: Random) -> Task:
    name, data, key, value = named_dict(rng, "find keys_of list search names_in")
    test = number_test(rng, value)
    sort = rng.random() < 0.4
    whats = (
        f"returns a {'sorted ' * sort}list of each `{key}` in the dictionary `{data}` whose `{value}` {test.is_}",
        f"lists the keys of `{data}`{' in sorted order' * sort} whose values {test.are} (loop over `{key}`, `{value}`)",
    )
    inner = f"{key} for {key}, {value} in {data}.items() if {test.code}"
    body = f"return sorted({inner})" if sort else f"return [{inner}]"
    cases = one_each([{}, STOCK, {f"k{edge}": edge for edge in test.edges}])

    def reference(v: dict) -> list:
        found = [k for k in v if test.holds(v[k])]
        return sorted(found) if sort else found

    return function(rng, name, data, body, whats, reference, cases)


def dict_lookup(rng: Random) -> Task:
    name, data, key, _ = named_dict(rng, "get look_up read find fetch")
    default = rng.choice(["0", "None", "-1", '"unknown"', '"none"', "[]", str(rng.randrange(2, 99))])
    whats = (
        f"returns the value of `{key}` in the dictionary `{data}`, or {default} if it is missing",
        f"looks up `{key}` in `{data}` with {default} as the default",
    )
    code = f"{data}.get({key})" if default == "None" else f"{data}.get({key}, {default})"
    cases = [({"a": 5}, "a"), ({"a": 5}, "b"), ({}, "x")]
    reference = lambda v, k: v[k] if k in v else eval(default)
    return function(rng, name, f"{data}, {key}", f"return {code}", whats, reference, cases)


def dict_count(rng: Random) -> Task:
    name, items, item = named_list(rng, "count tally frequency histogram", WORD_LISTS)
    counts = rng.choice(["counts", "tally", "result", "table", "seen"])
    code, words, key = rng.choice([
        (item, f"each `{item}`", lambda v: v), (f"len({item})", f"the length of each `{item}`", len),
        (f"{item}[0]", f"the first character of each `{item}`", lambda v: v[0]),
        (f"{item}[-1]", f"the last character of each `{item}`", lambda v: v[-1]),
        (f"{item}.lower()", f"each `{item}` in lower case", str.lower),
    ])  # fmt: skip
    whats = (
        f"counts in a dictionary `{counts}` how often {words} of `{items}` occurs",
        f"returns a dictionary `{counts}` with the number of times {words} appears in `{items}`",
    )
    loop = f"for {item} in {items}:\n    {counts}[{code}] = {counts}.get({code}, 0) + 1"
    body = f"{counts} = {{}}\n{loop}\nreturn {counts}"

    def reference(v: list) -> dict:
        keys = [key(u) for u in v]
        return {k: keys.count(k) for k in keys}

    return function(
        rng,
        name,
        items,
        body,
        whats,
        reference,
        one_each([[], ["fig", "Fig", "kiwi", "fig"], ["ab", "cb", "a", "B", "b"]]),
    )


def dict_from_list(rng: Random) -> Task:
    name, items, item = named_list(rng, "index map table lookup", WORD_LISTS)
    code, words, value = rng.choice([
        (f"len({item})", "its length", len), (f"{item}.upper()", "its upper-case form", str.upper),
        (f"{item}[0]", "its first character", lambda v: v[:1]), ("0", "0", lambda v: 0),
        (f"{item}[::-1]", "its reverse", lambda v: "".join(reversed(v))), ("[]", "an empty list", lambda v: []),
        (f"{item}.lower()", "its lower-case form", str.lower),
    ])  # fmt: skip
    whats = (
        f"returns a dictionary that maps each `{item}` in `{items}` to {words}",
        f"builds a dictionary from the list `{items}`: every `{item}` is a key, and its value is {words}",
    )
    body = f"return {{{item}: {code} for {item} in {items}}}"
    reference = lambda v: dict([(u, value(u)) for u in v])
    return function(rng, name, items, body, whats, reference, one_each([[], ["fig", "Kiwi"], ["pear", "pear", "Ab"]]))


def dict_simple(rng: Random) -> Task:
    name, data, key, value = named_dict(rng, "inspect process summarize report")
    words, code, reference = rng.choice([
        ("the sum of the values of `{d}`", "sum({d}.values())", lambda v: sum(v[k] for k in v)),
        ("the key of `{d}` with the largest value", "max({d}, key={d}.get)",
         lambda v: sorted(v, key=lambda k: -v[k])[0]),
        ("the key of `{d}` with the smallest value", "min({d}, key={d}.get)",
         lambda v: sorted(v, key=lambda k: v[k])[0]),
        ("a list of the keys of `{d}` sorted by value", "sorted({d}, key={d}.get)",
         lambda v: [b for a, b in sorted((v[k], k) for k in v)]),
        ("a sorted list of the keys of `{d}`", "sorted({d})", lambda v: sorted(list(v.keys()))),
        ("`{d}` with keys and values exchanged", "{{{v}: {k} for {k}, {v} in {d}.items()}}",
         lambda v: dict(zip(v.values(), v, strict=True))),
        ("a list of the (key, value) pairs of `{d}`", "list({d}.items())", lambda v: [(k, v[k]) for k in v]),
        ("the largest value in `{d}`", "max({d}.values())", lambda v: sorted(v.values())[-1]),
        ("the average of the values of `{d}`", "sum({d}.values()) / len({d})",
         lambda v: sum(v[k] for k in v) / len(list(v))),
        ("the longest key of `{d}`", "max({d}, key=len)", lambda v: sorted(v, key=lambda k: -len(k))[0]),
        ("a sorted list of the values of `{d}`", "sorted({d}.values())", lambda v: sorted([v[k] for k in v])),
    ])  # fmt: skip
    words, code = words.format(d=data), code.format(d=data, k=key, v=value)
    note = f" (loop over `{key}`, `{value}`)" if ".items() " in code or "for " in code else ""
    whats = (f"returns {words}{note}", f"takes a dictionary `{data}` and returns {words}{note}", f"gives {words}{note}")
    cases = one_each([STOCK, {"a": 5}, {"bb": 1, "a": 9, "ccc": 4}])
    return function(rng, name, data, f"return {code}", whats, reference, cases)


def field_of_records(rng: Random) -> Task:
    items = rng.choice(WORD_LISTS)
    item, key = items[:-1], rng.choice(KEYS)
    name = f"{rng.choice(['get', 'list', 'collect', 'extract', 'all'])}_{key if key[-1] == 's' else key + 's'}"
    form, words, reference = rng.choice([
        ("[{}]", "a list of", list), ("sum({})", "the sum of", sum), ("max({})", "the largest of", max),
        ("min({})", "the smallest of", min), ("sorted({})", "a sorted list of", sorted), ("[{}]", "all of", list),
    ])  # fmt: skip
    whats = (
        f'returns {words} the "{key}" values of the dictionaries in `{items}`',
        f'takes a list of dictionaries `{items}` and returns {words} their "{key}" entries',
    )
    body = "return " + form.format(f'{item}["{key}"] for {item} in {items}')
    cases = one_each([records(rng), records(rng)[:2]])
    return function(rng, name, items, body, whats, lambda v: reference([dict(u)[key] for u in v]), cases)


def keep_records(rng: Random) -> Task:
    items = rng.choice(WORD_LISTS)
    item, key = items[:-1], rng.choice(KEYS)
    test = number_test(rng, f'{item}["{key}"]')
    name = f"{rng.choice(['keep', 'filter', 'select', 'choose'])}_{items}"
    whats = (
        f'returns the dictionaries in the list `{items}` whose "{key}" {test.is_}',
        f'keeps each `{item}` of `{items}` with a "{key}" entry that {test.is_}',
    )
    body = f"return [{item} for {item} in {items} if {test.code}]"
    cases = one_each([[], records(rng), [{key: edge, "id": i} for i, edge in enumerate(test.edges)]])
    return function(rng, name, items, body, whats, lambda v: list(filter(lambda u: test.holds(u[key]), v)), cases)


def sort_records(rng: Random) -> Task:
    items = rng.choice(WORD_LISTS)
    item, key = items[:-1], rng.choice(KEYS)
    name = f"{rng.choice(['sort', 'order', 'rank', 'arrange'])}_{items}"
    how, code, reference = rng.choice([
        ("sorted by {} ascending", "sorted({}, key={})", lambda v, k: sorted(v, key=k)),
        ("sorted by {} descending", "sorted({}, key={}, reverse=True)", lambda v, k: sorted(v, key=lambda u: -k(u))),
        ("with the largest {}", "max({}, key={})", lambda v, k: sorted(v, key=lambda u: -k(u))[0]),
        ("with the smallest {}", "min({}, key={})", lambda v, k: sorted(v, key=k)[0]),
    ])  # fmt: skip
    how = how.format(f'"{key}"')
    what = "the dictionaries" if how.startswith("sorted") else "the dictionary"
    whats = (
        f"returns {what} in the list `{items}` {how}",
        f"takes a list of dictionaries and returns {what} of `{items}` {how}",
    )
    body = "return " + code.format(items, f'lambda {item}: {item}["{key}"]')
    cases = one_each([records(rng), records(rng), [{**dict.fromkeys(KEYS, 1), key: value} for value in (5, 9, 2)]])
    return function(rng, name, items, body, whats, lambda v: reference(v, lambda u: u[key]), cases)


def group_by(rng: Random) -> Task:
    name, items, item = named_list(rng, "group bucket cluster sort_into", WORD_LISTS)
    groups = rng.choice(["groups", "result", "table", "buckets", "index"])
    k = rng.randrange(1, 4)
    code, words, key = rng.choice([
        (f"len({item})", "its length", len), (f"{item}[0]", "its first character", lambda v: v[0]),
        (f"{item}[-1]", "its last character", lambda v: v[-1]),
        (f"{item}[:{k}]", f"its first {k} characters", lambda v: v[0:k]),
        (f"{item}.lower()", "its lower-case form", str.lower),
    ])  # fmt: skip
    words = words.replace("1 characters", "1 character")
    whats = (
        f"groups the `{items}` in a dictionary `{groups}` of lists, with {words} as the key of each `{item}`",
        f"returns a dictionary `{groups}` of lists in which each `{item}` of `{items}` is filed under {words}",
    )
    body = (
        f"{groups} = {{}}\nfor {item} in {items}:\n    {groups}.setdefault({code}, []).append({item})\nreturn {groups}"
    )
    reference = lambda v: {key(u): [w for w in v if key(w) == key(u)] for u in v}
    cases = one_each([[], ["fig", "Fig", "kiwi", "figs", "date", "kite"], ["ab", "abc", "b", "abd"]])
    return function(rng, name, items, body, whats, reference, cases)


def dict_literal(rng: Random) -> Task:
    keys = rng.sample(KEYS, rng.randrange(2, 4))
    thing = rng.choice(CLASSES).lower()
    name = f"{rng.choice(['make', 'new', 'create', 'build'])}_{thing}"
    k = rng.randrange(2, 99)
    fixed = rng.choice([None, k, k])
    body = "return {" + ", ".join(f'"{key}": {key}' for key in keys) + (f', "id": {fixed}' if fixed else "") + "}"
    more = f' and "id" set to {fixed}' if fixed else ""
    whats = (
        f"returns a dictionary with its arguments under the keys {and_list(quote(key) for key in keys)}{more}",
        f"returns a dictionary ({thing}) with the keys {and_list(quote(key) for key in keys)}{more}",
    )
    reference = lambda *v: {**dict(zip(keys, v, strict=True)), **({"id": fixed} if fixed else {})}
    cases = [("x", "y", "z")[: len(keys)], (3, 4, 5)[: len(keys)]]
    return function(rng, name, ", ".join(keys), body, whats, reference, cases)


def update_dict(rng: Random) -> Task:
    name, data, key, _ = named_dict(rng, "update change edit set")
    n = rng.randrange(2, 99)
    words, code, change = rng.choice([
        (f"increases the value of `{key}` in `{data}` by {n}", f"{data}[{key}] += {n}",
         lambda d, k: d.update({k: d[k] + n})),
        (f"decreases the value of `{key}` in `{data}` by {n}", f"{data}[{key}] -= {n}",
         lambda d, k: d.update({k: d[k] - n})),
        (f"sets the value of `{key}` in `{data}` to {n}", f"{data}[{key}] = {n}", lambda d, k: d.update({k: n})),
        (f"multiplies the value of `{key}` in `{data}` by {n}", f"{data}[{key}] *= {n}",
         lambda d, k: d.update({k: d[k] * n})),
        (f"deletes `{key}` from `{data}`", f"del {data}[{key}]", lambda d, k: d.pop(k)),
    ])  # fmt: skip

    def reference(d: dict, k: str) -> dict:
        change(d, k)
        return d

    whats = (f"{words} and returns `{data}`", f"{words}, then returns the dictionary `{data}`")
    cases = [({"a": 5, "b": 7}, "a"), ({"x": 0}, "x"), ({"c": 1, "d": n}, "d")]
    return function(rng, name, f"{data}, {key}", f"{code}\nreturn {data}", whats, reference, cases)


def set_operation(rng: Random) -> Task:
    a, b = rng.choice(
        "first,second a,b left,right old,new mine,yours today,yesterday invited,present owned,wanted".split()
    ).split(",")
    name = any_name(rng, "common shared compare diff match", WORD_LISTS)
    words, op, reference = rng.choice([
        (f"that are in both `{a}` and `{b}`", "&", lambda v, w: [u for u in v if u in w]),
        (f"that are in `{a}` but not in `{b}`", "-", lambda v, w: [u for u in v if u not in w]),
        (f"that are in `{a}` or `{b}`", "|", lambda v, w: v + w),
        (f"that are in exactly one of `{a}` and `{b}`", "^", lambda v, w: [u for u in v + w if (u in v) != (u in w)]),
    ])  # fmt: skip
    form, result, outer = rng.choice([
        ("sorted({})", "a sorted list of the elements", sorted), ("len({})", "the number of different elements", len),
    ])  # fmt: skip
    whats = (
        f"returns {result} {words}",
        f"uses sets to find {result} {words}",
        f"takes two lists and returns {result} {words}",
    )
    body = "return " + form.format(f"set({a}) {op} set({b})")
    cases = [([1, 2, 2, 3], [2, 3, 4]), ([], [5]), ([7, 8], []), ([1, 9, 4, 6], [4, 9, 9])]
    return function(rng, name, f"{a}, {b}", body, whats, lambda v, w: outer(set(reference(v, w))), cases)


FAMILIES = (
    dict_keep, dict_map, dict_keys_where, dict_lookup, dict_count, dict_from_list, dict_simple, field_of_records,
    keep_records, sort_records, group_by, dict_literal, update_dict, set_operation,
)  # fmt: skip
