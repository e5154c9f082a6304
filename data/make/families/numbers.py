"""Tasks about single numbers."""

from random import Random
from typing import Any

from data.make.families.common import (
    LABEL_PAIRS,
    NUMBER_LISTS,
    SCALARS,
    TWO_ARGUMENTS,
    Task,
    and_list,
    any_name,
    around,
    function,
    named_scalar,
    number_change,
    number_test,
    one_each,
)


def linear(rng: Random) -> Task:
    name, x = named_scalar(rng, "adjust scale convert transform compute")
    a, b = rng.randrange(2, 30), rng.randrange(2, 60)
    sign, word, factor = rng.choice([("+", "plus", 1), ("-", "minus", -1)])
    whats = (
        f"returns {a} times `{x}` {word} {b}",
        f"multiplies `{x}` by {a}, {'adds' if factor == 1 else 'subtracts'} {b} and returns the result",
        f"gives back `{x}` multiplied by {a}, {word} {b}",
    )
    return function(rng, name, x, f"return {x} * {a} {sign} {b}", whats, lambda v: a * v + factor * b, around(3))


def change_number(rng: Random) -> Task:
    name, x = named_scalar(rng, "change update modify rework")
    change = number_change(rng, x)
    whats = (f"returns `{x}` {change.words}", f"gives back `{x}` {change.words}", f"returns the {change.words} `{x}`")
    if " " in change.words:
        whats = (*whats[:2], f"takes a number and returns it {change.words}")
    return function(rng, name, x, f"return {change.code}", whats, change.apply, one_each([0, 1, -2, 7, 40, 81]))


def number_is(rng: Random) -> Task:
    name, x = named_scalar(rng, "check accept valid test is_good")
    test = number_test(rng, x)
    whats = (
        f"returns True if `{x}` {test.is_}",
        f"tells whether `{x}` {test.is_}",
        f"checks if `{x}` {test.is_} and returns a boolean",
        f"returns True when `{x}` {test.is_} and False otherwise",
    )
    return function(rng, name, x, f"return {test.code}", whats, test.holds, around(*test.edges))


def clamp(rng: Random) -> Task:
    name, x = named_scalar(rng, "clamp limit bound restrict")
    low = rng.randrange(0, 40)
    high = low + rng.randrange(3, 60)
    whats = (
        f"returns `{x}` limited to the range from {low} to {high}",
        f"clamps `{x}` between {low} and {high}",
        f"returns `{x}`, but never less than {low} or more than {high}",
    )
    body = f"return max({low}, min({high}, {x}))"
    return function(rng, name, x, body, whats, lambda v: low if v < low else high if v > high else v, around(low, high))


def two_numbers(rng: Random) -> Task:
    a, b = rng.choice(TWO_ARGUMENTS).split(",")
    verb, words, code, reference = rng.choice([
        ("difference", f"the absolute difference of `{a}` and `{b}`", f"abs({a} - {b})",
         lambda p, q: max(p, q) - min(p, q)),
        ("sum", f"the sum of `{a}` and `{b}`", f"{a} + {b}", lambda p, q: sum([p, q])),
        ("product", f"the product of `{a}` and `{b}`", f"{a} * {b}", lambda p, q: p * q),
        ("average", f"the average of `{a}` and `{b}`", f"({a} + {b}) / 2", lambda p, q: p / 2 + q / 2),
        ("larger", f"the larger of `{a}` and `{b}`", f"max({a}, {b})", lambda p, q: p if p > q else q),
        ("smaller", f"the smaller of `{a}` and `{b}`", f"min({a}, {b})", lambda p, q: p if p < q else q),
        ("remainder", f"the remainder of `{a}` divided by `{b}`", f"{a} % {b}", lambda p, q: p - p // q * q),
        ("swap", f"`{b}` and `{a}` as a tuple, in this order", f"{b}, {a}", lambda p, q: (q, p)),
        ("square", f"the sum of the squares of `{a}` and `{b}`", f"{a} ** 2 + {b} ** 2", lambda p, q: p * p + q * q),
    ])  # fmt: skip
    name = f"{rng.choice(['get', 'find', 'compute', verb])}_{rng.choice(SCALARS + NUMBER_LISTS)}"
    whats = (f"returns {words}", f"computes and returns {words}", f"gives {words}")
    return function(rng, name, f"{a}, {b}", f"return {code}", whats, reference, [(3, 5), (8, 2), (-4, 7), (6, -9)])


UNITS = [
    ("hours", "minutes", 60), ("minutes", "seconds", 60), ("days", "hours", 24), ("weeks", "days", 7),
    ("years", "months", 12), ("feet", "inches", 12), ("yards", "feet", 3), ("meters", "centimeters", 100),
    ("kilometers", "meters", 1000), ("kilograms", "grams", 1000), ("dollars", "cents", 100), ("dozens", "eggs", 12),
    ("decades", "years", 10), ("centuries", "years", 100), ("hours", "seconds", 3600), ("pounds", "ounces", 16),
    ("gallons", "quarts", 4), ("quarts", "cups", 4), ("liters", "milliliters", 1000), ("bicycles", "wheels", 2),
    ("miles", "feet", 5280), ("crates", "bottles", 24), ("boxes", "pencils", 20), ("packs", "cards", 52),
    ("teams", "players", 11), ("floors", "steps", 18), ("pages", "lines", 40), ("rows", "seats", 30),
]  # fmt: skip


def to_smaller_unit(rng: Random) -> Task:
    big, small, factor = rng.choice(UNITS)
    name = rng.choice([
        f"{big}_to_{small}", f"convert_{big}", f"{small}_in_{big}", f"count_{small}", f"{small}_from_{big}",
    ])  # fmt: skip
    x = rng.choice([big, big, "n", "amount", "count"])
    whats = (
        f"converts `{x}` from {big} to {small} (1 of the first is {factor} of the second)",
        f"returns the number of {small} in `{x}` {big}, {factor} for each",
        f"turns `{x}` {big} into {small} by multiplying with {factor}",
    )
    return function(rng, name, x, f"return {x} * {factor}", whats, lambda v: factor * v, one_each([0, 1, 3, 12]))


def percentage(rng: Random) -> Task:
    name, x = named_scalar(rng, "tax tip share percent part")
    p = rng.randrange(2, 99)
    whats = (
        f"returns {p} percent of `{x}`",
        f"computes {p}% of `{x}`",
        f"takes a number `{x}` and returns {p} percent of it",
    )
    return function(rng, name, x, f"return {x} * {p} / 100", whats, lambda v: p * v / 100, one_each([0, 10, 50, 200]))


def change_if(rng: Random) -> Task:
    name, x = named_scalar(rng, "adjust reduce fix correct raise")
    test, change = number_test(rng, x), number_change(rng, x)
    whats = (
        f"returns `{x}` {change.words} if it {test.is_}, and `{x}` itself otherwise",
        f"returns `{x}` {change.words} when it {test.is_}; otherwise it returns `{x}` unchanged",
        f"leaves `{x}` as it is unless it {test.is_}, in which case it returns `{x}` {change.words}",
    )
    body = f"if {test.code}:\n    return {change.code}\nreturn {x}"
    reference = lambda v: change.apply(v) if test.holds(v) else v
    return function(rng, name, x, body, whats, reference, around(*test.edges))


def two_labels(rng: Random) -> Task:
    name, x = named_scalar(rng, "label classify describe grade rate")
    first, second = rng.sample(rng.choice(LABEL_PAIRS).split(","), 2)
    test = number_test(rng, x)
    whats = (
        f'returns "{first}" if `{x}` {test.is_} and "{second}" otherwise',
        f'returns "{first}" when `{x}` {test.is_}, else "{second}"',
        f'gives the string "{first}" if `{x}` {test.is_}; in all other cases it gives "{second}"',
    )
    body = f'return "{first}" if {test.code} else "{second}"'
    return function(rng, name, x, body, whats, lambda v: [second, first][test.holds(v)], around(*test.edges))


def three_labels(rng: Random) -> Task:
    name, x = named_scalar(rng, "label classify describe grade rank")
    low, mid, high = rng.choice(
        "low,medium,high small,medium,large cold,warm,hot slow,normal,fast bad,fair,good short,average,tall "
        "weak,fair,strong empty,partial,full young,adult,old poor,ok,great light,medium,heavy early,mid,late".split()
    ).split(",")
    a = rng.randrange(2, 50)
    b = a + rng.randrange(5, 50)
    whats = (
        f'returns "{low}" if `{x}` is less than {a}, "{mid}" if it is less than {b}, and "{high}" otherwise',
        f'returns "{low}" for `{x}` below {a}, "{mid}" below {b} and "{high}" for anything else',
        f'classifies `{x}`: "{low}" under {a}, "{mid}" under {b}, else "{high}"',
    )
    body = f'if {x} < {a}:\n    return "{low}"\nif {x} < {b}:\n    return "{mid}"\nreturn "{high}"'
    reference = lambda v: [low, mid, high][(v >= a) + (v >= b)]
    return function(rng, name, x, body, whats, reference, around(a, b))


def digits(rng: Random) -> Task:
    name, x = named_scalar(rng, "digits measure inspect read")
    words, code, reference = rng.choice([
        ("the sum of the digits of `{x}`", "sum(int(digit) for digit in str({x}))", lambda v: sum(map(int, f"{v}"))),
        ("the number of digits of `{x}`", "len(str({x}))", lambda v: len(f"{v}")),
        ("the last digit of `{x}`", "{x} % 10", lambda v: int(f"{v}"[-1])),
        ("the first digit of `{x}`", "int(str({x})[0])", lambda v: int(f"{v}"[0])),
        ("`{x}` with its digits reversed", "int(str({x})[::-1])", lambda v: int("".join(reversed(f"{v}")))),
        ("the digits of `{x}` as a list", "[int(digit) for digit in str({x})]", lambda v: list(map(int, f"{v}"))),
        ("the largest digit of `{x}`", "max(int(digit) for digit in str({x}))", lambda v: int(max(f"{v}"))),
        ("`{x}` without its last digit", "{x} // 10", lambda v: (v - v % 10) // 10),
        ("the digits of `{x}` as a string of bits", 'format({x}, "b")', lambda v: bin(v)[2:]),
    ])  # fmt: skip
    words = words.format(x=x).replace("the digits of `" + x + "` as a string of bits", f"`{x}` in binary, as a string")
    whats = (
        f"returns {words}",
        f"takes a positive integer and returns {words}",
        f"gives {words}",
    )
    return function(
        rng, name, x, f"return {code.format(x=x)}", whats, reference, one_each([4, 10, 29, 305, 9171, 60023])
    )


def round_to(rng: Random) -> Task:
    name, x = named_scalar(rng, "round floor snap reduce")
    k = rng.randrange(2, 99)
    whats = (
        f"rounds `{x}` down to a multiple of {k}",
        f"returns the largest multiple of {k} that is not greater than `{x}`",
        f"returns `{x}` rounded down to the nearest multiple of {k}",
    )
    cases = around(k, 3 * k)
    return function(rng, name, x, f"return {x} // {k} * {k}", whats, lambda v: v - v % k, cases)


def multiples(rng: Random) -> Task:
    k = rng.randrange(2, 60)
    noun = rng.choice(SCALARS + NUMBER_LISTS)
    name = f"{rng.choice(['multiples', 'table', 'steps', 'list', 'make'])}_{noun}"
    n = rng.choice(["n", "count", "limit", "size", "length", "total"])
    whats = (
        f"returns a list of the first `{n}` multiples of {k}, starting with {k}",
        f"lists {k} times each number from 1 to `{n}`",
        f"returns a list with the multiples of {k} from {k} up to {k} times `{n}`",
    )
    body = f"return [{k} * i for i in range(1, {n} + 1)]"
    return function(rng, name, n, body, whats, lambda v: list(range(k, k * v + 1, k)), one_each([0, 1, 2, 5]))


def number_range(rng: Random) -> Task:
    start, step = rng.randrange(0, 40), rng.randrange(2, 12)
    n = rng.choice(["n", "stop", "limit", "end", "top", "last"])
    name = any_name(rng, "range list series make build", NUMBER_LISTS)
    inclusive = rng.random() < 0.5
    edge = f"up to and including `{n}`" if inclusive else f"up to but not including `{n}`"
    whats = (
        f"returns the list of numbers from {start} {edge} in steps of {step}",
        f"returns a list that starts at {start} and counts by {step} {edge}",
    )
    body = f"return list(range({start}, {n}{' + 1' if inclusive else ''}, {step}))"

    def reference(stop: int) -> list[int]:
        return [v for v in range(start, 400) if (v - start) % step == 0 and v < stop + inclusive]

    cases = one_each([start, start + 1, start + step - 1, start + step, start + step + 1, start + 3 * step])
    return function(rng, name, n, body, whats, reference, cases)


def sum_range(rng: Random) -> Task:
    noun, n = rng.choice(NUMBER_LISTS), rng.choice(["n", "limit", "top", "last", "end"])
    test, change = number_test(rng, "i"), number_change(rng, "i")
    name = f"{rng.choice(['sum', 'total', 'add', 'collect'])}_{noun}"
    if rng.random() < 0.5:
        whats = (
            f"returns the sum of the numbers from 1 to `{n}` that {test.are}",
            f"adds up all integers from 1 to `{n}` that {test.are}",
        )
        body = f"return sum(i for i in range(1, {n} + 1) if {test.code})"
        reference = lambda v: sum(filter(test.holds, range(1, v + 1)))
    else:
        whats = (
            f"returns the sum of the numbers from 1 to `{n}`, each {change.words}",
            f"adds up the integers from 1 to `{n}`, each of them {change.words}",
        )
        body = f"return sum({change.code} for i in range(1, {n} + 1))"
        reference = lambda v: sum(map(change.apply, range(1, v + 1)))
    cases = one_each([0, 1, 2, 7, *[edge for edge in test.edges if edge > 0], 100])
    return function(rng, name, n, body, whats, reference, cases)


def divisors(rng: Random) -> Task:
    name, x = named_scalar(rng, "divisors factors split parts")
    form, words = rng.choice([
        ("[{}]", "a list of the divisors of `{}`"), ("sum({})", "the sum of the divisors of `{}`"),
        ("len([{}])", "the number of divisors of `{}`"),
    ])  # fmt: skip
    start = rng.choice([1, 2])
    extra = " other than 1" if start == 2 else ""
    body = "return " + form.format(f"d for d in range({start}, {x} + 1) if {x} % d == 0")
    whats = (f"returns {words.format(x)}{extra}", f"finds {words.format(x)}{extra} and returns it")
    whats += (f"takes a positive integer and returns {words.format(x)}{extra}",)

    def reference(v: int) -> Any:
        found = [u for u in range(start, v + 1) if not v % u]
        return {"[": found, "s": sum(found), "l": len(found)}[form[0]]

    return function(rng, name, x, body, whats, reference, one_each([1, 2, 6, 7, 12, 36]))


def count_halvings(rng: Random) -> Task:
    name, x = named_scalar(rng, "count steps rounds turns")
    k, low = rng.randrange(2, 10), rng.randrange(1, 30)
    whats = (
        f"counts how often `{x}` can be divided by {k} (whole division) until it is at most {low}",
        f"returns how many times `{x}` must be floor-divided by {k} to become {low} or less",
    )
    body = f"count = 0\nwhile {x} > {low}:\n    {x} //= {k}\n    count += 1\nreturn count"

    def reference(v: int) -> int:
        return 0 if v <= low else 1 + reference(v // k)

    return function(rng, name, x, body, whats, reference, around(low, k * low, k * low + k, k * k * (low + 1)))


def safe_divide(rng: Random) -> Task:
    a, b = rng.choice("total,count distance,time money,people sum,size cost,units score,games top,bottom a,b x,y "
                      "miles,hours pages,days calories,meals words,lines".split()).split(",")  # fmt: skip
    fallback = rng.choice(["0", "None", "-1", "1", "0.0", '"error"'])
    name = any_name(rng, "divide ratio rate share average", SCALARS)
    whats = (
        f"returns `{a}` divided by `{b}`, or {fallback} if `{b}` is 0",
        f"divides `{a}` by `{b}` and returns {fallback} when `{b}` is zero",
    )
    body = f"if {b} == 0:\n    return {fallback}\nreturn {a} / {b}"
    cases = [(6, 3), (1, 4), (5, 0), (0, 2), (0, 0), (-3, 2)]
    return function(rng, name, f"{a}, {b}", body, whats, lambda p, q: p / q if q else eval(fallback), cases)


SHAPES = [
    ("rectangle", "width, height", "area", "{a} * {b}", lambda a, b: a * b),
    ("rectangle", "width, height", "perimeter", "2 * ({a} + {b})", lambda a, b: a + a + b + b),
    ("triangle", "base, height", "area", "{a} * {b} / 2", lambda a, b: a * b / 2),
    ("diamond", "p, q", "area", "{a} * {b} / 2", lambda a, b: a * b / 2),
    ("square", "side", "area", "{a} ** 2", lambda a: a * a),
    ("square", "side", "perimeter", "4 * {a}", lambda a: a + a + a + a),
    ("cube", "side", "volume", "{a} ** 3", lambda a: a * a * a),
    ("cube", "side", "surface", "6 * {a} ** 2", lambda a: a * a * 6),
]


def shape(rng: Random) -> Task:
    thing, arguments, measure, code, reference = rng.choice(SHAPES)
    arguments = rng.choice([
        arguments, *(["x, y", "a, b", "m, n", "length, breadth"] if ", " in arguments else ["x", "a", "edge", "s"]),
    ])  # fmt: skip
    owner = rng.choice(
        "room field garden tile wall sheet box roof floor yard plot screen card table window lawn".split()
    )
    name = rng.choice([f"{owner}_{measure}", f"{measure}_of_{owner}", f"get_{owner}_{measure}", f"{thing}_{owner}"])
    names = arguments.split(", ")
    code = code.format(a=names[0], b=names[-1])
    given = and_list(f"`{argument}`" for argument in names)
    sides = (
        "the side"
        if len(names) == 1
        else {"diamond": "the diagonals", "triangle": "base and height"}.get(thing, "the sides")
    )
    whats = (
        f"returns the {measure} of a {thing} with {sides} {given}",
        f"computes the {measure} of a {thing} from {sides} {given}",
    )
    cases = [(3, 4), (1, 10), (7, 2)] if len(names) == 2 else one_each([1, 2, 5])
    return function(rng, name, arguments, f"return {code}", whats, reference, cases)


def default_argument(rng: Random) -> Task:
    name, x = named_scalar(rng, "add change raise scale extend")
    step = rng.choice("step bonus extra factor delta change rate offset".split())
    k = rng.randrange(2, 99)
    op, words, reference = rng.choice([
        ("+", "the sum of `{x}` and `{step}`", lambda v, w=k: v + w),
        ("*", "the product of `{x}` and `{step}`", lambda v, w=k: v * w),
        ("-", "`{x}` minus `{step}`", lambda v, w=k: v - w),
    ])  # fmt: skip
    words = words.format(x=x, step=step)
    whats = (f"returns {words}", f"computes {words}", f"gives back {words}")
    cases = [(3,), (10,), (5, 2), (0, 7)]
    return function(rng, name, f"{x}, {step}={k}", f"return {x} {op} {step}", whats, reference, cases)


FAMILIES = (
    linear, change_number, number_is, clamp, two_numbers, to_smaller_unit, percentage, change_if, two_labels,
    three_labels, digits, round_to, multiples, number_range, sum_range, divisors, count_halvings, safe_divide,
    shape, default_argument,
)  # fmt: skip
