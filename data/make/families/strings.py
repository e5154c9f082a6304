"""Tasks about single strings."""

from collections.abc import Callable
from random import Random

from data.make.families.common import (
    CHANGE_WORDS,
    CLASSES,
    LETTERS,
    NUMBER_FIELDS,
    SAMPLE_WORDS,
    SEPARATORS,
    TEXT_FIELDS,
    Task,
    function,
    named_text,
    one_each,
    texts,
    word_change,
    word_test,
)


def change_text(rng: Random) -> Task:
    name, s = named_text(rng, "change format convert clean style")
    change = word_change(rng, s)
    whats = (
        f"returns `{s}` {change.words}",
        f"takes a string `{s}` and returns it {change.words}",
        f"gives back the string `{s}` {change.words}",
    )
    return function(rng, name, s, f"return {change.code}", whats, change.apply, CHANGE_WORDS)


def count_letter(rng: Random) -> Task:
    name, s = named_text(rng, "count find_in tally letters number")
    c = rng.choice(LETTERS)
    whats = (
        f'returns how often "{c}" occurs in `{s}`',
        f'counts the letter "{c}" in the string `{s}`',
        f'returns the number of times "{c}" appears in `{s}`',
    )
    cases = texts(c, f"{c}{c}{c}", f"a{c}b{c.upper()}{c}")
    return function(rng, name, s, f'return {s}.count("{c}")', whats, lambda v: sum(u == c for u in v), cases)


CHARACTER_KINDS = [
    ("digits", "{c}.isdigit()", lambda c: c in "0123456789"),
    ("letters", "{c}.isalpha()", lambda c: c.lower() in "abcdefghijklmnopqrstuvwxyz"),
    ("spaces", "{c}.isspace()", lambda c: c == " "),
    ("upper-case letters", "{c}.isupper()", lambda c: c != c.lower()),
    ("lower-case letters", "{c}.islower()", lambda c: c != c.upper()),
    ("vowels", '{c} in "aeiou"', lambda c: c in ("a", "e", "i", "o", "u")),
]


def character_kind(rng: Random, c: str) -> tuple[str, str, Callable]:
    words, code, holds = rng.choice(CHARACTER_KINDS)
    if rng.random() < 0.4:
        chosen = "".join(rng.sample(LETTERS, rng.randrange(3, 5)))
        return f'characters from "{chosen}"', f'{c} in "{chosen}"', lambda u: u in set(chosen)
    return words, code.format(c=c), holds


KIND_TEXTS = texts("AbC dEf 123", "aeiou bcdfg", "hkl mnp rstuw 9", LETTERS)


def count_characters(rng: Random) -> Task:
    name, s = named_text(rng, "count tally number measure")
    c = rng.choice(["c", "char", "letter", "ch"])
    words, code, holds = character_kind(rng, c)
    whats = (
        f"returns the number of {words} in `{s}`, using `{c}` as the loop variable",
        f"counts the {words} in the string `{s}` (loop variable `{c}`)",
    )
    body = f"return sum(1 for {c} in {s} if {code})"
    return function(rng, name, s, body, whats, lambda v: len([u for u in v if holds(u)]), KIND_TEXTS)


def replace_text(rng: Random) -> Task:
    name, s = named_text(rng, "replace swap edit patch fix")
    old, new = rng.sample(SAMPLE_WORDS, 2) if rng.random() < 0.5 else rng.sample(LETTERS, 2)
    whats = (
        f'returns `{s}` with every "{old}" replaced by "{new}"',
        f'replaces "{old}" with "{new}" in `{s}` and returns the new string',
        f'changes each "{old}" in `{s}` to "{new}"',
    )
    cases = texts(old, f"{old} and {old}", f"x{new}{old}")
    body = f'return {s}.replace("{old}", "{new}")'
    return function(rng, name, s, body, whats, lambda v: new.join(v.split(old)), cases)


def text_is(rng: Random) -> Task:
    name, s = named_text(rng, "check accept valid test allow")
    test = word_test(rng, s)
    whats = (
        f"returns True if `{s}` {test.is_}",
        f"tells whether the string `{s}` {test.is_}",
        f"checks if `{s}` {test.is_}",
    )
    return function(rng, name, s, f"return {test.code}", whats, test.holds, texts(*test.edges))


def slice_text(rng: Random) -> Task:
    name, s = named_text(rng, "cut slice part trim piece")
    n, m = rng.randrange(2, 15), rng.randrange(2, 6)
    words, code, reference = rng.choice([
        (f"the first {n} characters of", f"[:{n}]", lambda v: "".join(c for i, c in enumerate(v) if i < n)),
        (f"the last {n} characters of", f"[-{n}:]", lambda v: v[max(0, len(v) - n) :]),
        (f"all but the first {n} characters of", f"[{n}:]", lambda v: "".join(c for i, c in enumerate(v) if i >= n)),
        (f"all but the last {n} characters of", f"[:-{n}]", lambda v: v[: max(0, len(v) - n)]),
        (f"every character at an index divisible by {m} of", f"[::{m}]",
         lambda v: "".join(v[i] for i in range(0, len(v), m))),
        (f"the characters from index {m} up to index {m + n} (excluded) of", f"[{m}:{m + n}]",
         lambda v: "".join(c for i, c in enumerate(v) if m <= i < m + n)),
    ])  # fmt: skip
    whats = (f"returns {words} `{s}`", f"returns {words} the string `{s}`", f"gives back {words} `{s}`")
    cases = texts("abcdefghijklmnopqrstuvwxyz", "abcdefgh")
    return function(rng, name, s, f"return {s}{code}", whats, reference, cases)


def shorten(rng: Random) -> Task:
    name, s = named_text(rng, "shorten truncate abbreviate preview limit")
    n, dots = rng.randrange(4, 40), rng.choice(["...", "..", "-", "~", " (more)", "+", "/"])
    whats = (
        f'returns the first {n} characters of `{s}` followed by "{dots}" if it is longer than {n}, else `{s}` itself',
        f'cuts `{s}` to {n} characters and appends "{dots}" if it has more, and returns it unchanged otherwise',
    )
    body = f'if len({s}) > {n}:\n    return {s}[:{n}] + "{dots}"\nreturn {s}'
    cases = texts("a" * (n - 1), "a" * n, "a" * n + "b", "ab" * n)
    return function(rng, name, s, body, whats, lambda v: v if len(v) <= n else f"{v[:n]}{dots}", cases)


def repeat_text(rng: Random) -> Task:
    name, s = named_text(rng, "repeat multiply echo copy")
    n, sep = rng.randrange(2, 12), rng.choice(SEPARATORS)
    whats = (
        f'returns `{s}` repeated {n} times, separated by "{sep}"',
        f'joins {n} copies of `{s}` with "{sep}"',
    )
    body = f'return "{sep}".join([{s}] * {n})'
    return function(rng, name, s, body, whats, lambda v: (v + sep) * (n - 1) + v, texts("ab"))


def split_words(rng: Random) -> Task:
    name, s = named_text(rng, "words split parse inspect read")
    n = rng.randrange(2, 9)
    words, code, reference = rng.choice([
        ("the number of words in `{s}`", "len({s}.split())", lambda v: len(v.split())),
        ("the longest word in `{s}`", "max({s}.split(), key=len)",
         lambda v: sorted(v.split(), key=lambda w: -len(w))[0]),
        ("the shortest word in `{s}`", "min({s}.split(), key=len)", lambda v: sorted(v.split(), key=len)[0]),
        ("the first word of `{s}`", "{s}.split()[0]", lambda v: v.strip().partition(" ")[0]),
        ("the last word of `{s}`", "{s}.split()[-1]", lambda v: v.strip().rpartition(" ")[2]),
        (f"the first {n} words of `{{s}}` as a list", f"{{s}}.split()[:{n}]", lambda v: v.split()[0:n]),
        (f"the last {n} words of `{{s}}` as a list", f"{{s}}.split()[-{n}:]", lambda v: v.split()[-n:]),
        ("the words of `{s}` in alphabetical order", "sorted({s}.split())", lambda v: sorted(v.split())),
        ("the words of `{s}` in reverse order as a list", "{s}.split()[::-1]", lambda v: list(reversed(v.split()))),
    ])  # fmt: skip
    words, code = words.format(s=s), code.format(s=s)
    whats = (f"returns {words}", f"splits `{s}` at whitespace and returns {words}", f"finds and returns {words}")
    cases = one_each(["one two three four", "pear", " the quick brown fox jumps over a lazy dog ", "bb a ccc ddd a"])
    return function(rng, name, s, f"return {code}", whats, reference, cases)


def wrap_text(rng: Random) -> Task:
    name, s = named_text(rng, "wrap enclose decorate frame mark")
    left, right = rng.choice([
        ("<", ">"), ("[", "]"), ("(", ")"), ("{", "}"), ("*", "*"), ("--", "--"), ("<b>", "</b>"), ("<p>", "</p>"),
        ("#", "#"), ("«", "»"), ("<i>", "</i>"), ("/*", "*/"), ("**", "**"), ("~", "~"),
    ])  # fmt: skip
    whats = (
        f'returns `{s}` with "{left}" in front and "{right}" behind it',
        f'puts "{left}" before and "{right}" after `{s}`',
        f'encloses `{s}` in "{left}" and "{right}"',
    )
    return function(
        rng, name, s, f'return "{left}" + {s} + "{right}"', whats, lambda v: f"{left}{v}{right}", texts("ab")
    )


def greet(rng: Random) -> Task:
    verb = rng.choice("greet welcome invite thank warn praise remind congratulate".split())
    greeting = rng.choice(
        "Hello Hi Welcome Dear Goodbye Thanks Sorry Bravo Cheers Greetings Please Attention Congratulations".split()
    )
    x = rng.choice("name user person friend guest player customer student visitor member".split())
    mark = rng.choice(["!", ".", "?", "...", "!!", ", have fun!", ", see you soon.", ", come in."])
    name = f"{verb}_{rng.choice(['user', 'person', 'friend', 'guest', 'player', 'customer', 'student', 'visitor'])}"
    whats = (
        f'returns the string "{greeting}, " followed by `{x}` and "{mark}"',
        f'uses an f-string to return "{greeting}, <{x}>{mark}" with the value of `{x}`',
        f'returns a message like "{greeting}, Ann{mark}" for the given `{x}`',
    )
    body = f'return f"{greeting}, {{{x}}}{mark}"'
    return function(rng, name, x, body, whats, lambda v: greeting + ", " + v + mark, one_each(["Ann", "Bo", ""]))


def describe(rng: Random) -> Task:
    a, b = rng.choice(TEXT_FIELDS), rng.choice(NUMBER_FIELDS)
    middle = rng.choice([" has {b} ", " - {b}: ", ": {b} ", " ({b} ", ", {b} = ", " with {b} "]).format(b=b)
    end = {" (": ")"}.get(middle[:2], rng.choice(["", ".", "!"]))
    name = f"{rng.choice(['describe', 'format', 'show', 'report', 'summarize'])}_{rng.choice(CLASSES).lower()}"
    whats = (
        f'returns an f-string of `{a}`, the text "{middle}", then `{b}`' + (f' and "{end}"' if end else ""),
        f'formats its arguments as "<{a}>{middle}<{b}>{end}"',
        f'returns a string such as "abc{middle}5{end}" for {a} "abc" and {b} 5',
    )
    body = f'return f"{{{a}}}{middle}{{{b}}}{end}"'
    cases = [("abc", 5), ("", 0), ("x y", -2)]
    return function(rng, name, f"{a}, {b}", body, whats, lambda v, w: v + middle + str(w) + end, cases)


def initials(rng: Random) -> Task:
    name, s = named_text(rng, "initials acronym short code first_letters")
    k, sep = rng.randrange(1, 4), rng.choice(["", ".", "-", "_", "/"])
    upper = rng.random() < 0.5
    letters = "first letter" if k == 1 else f"first {k} letters"
    code = f"word[0]{'.upper()' * upper}" if k == 1 else f"word[:{k}]{'.upper()' * upper}"
    joined = f'joined by "{sep}"' if sep else "joined together"
    whats = (
        f"returns the {letters} of each word in `{s}`{' in upper case' if upper else ''}, {joined}",
        f"takes the {letters} of every word of `{s}`{', in upper case,' * upper} and returns them {joined}",
    )
    body = f'return "{sep}".join({code} for word in {s}.split())'
    reference = lambda v: sep.join([u[0:k].upper() if upper else u[0:k] for u in v.split()])
    return function(rng, name, s, body, whats, reference, texts("random access memory", "a Bc def ghij"))


def insert_text(rng: Random) -> Task:
    name, s = named_text(rng, "insert place put add")
    n, piece = rng.randrange(1, 12), rng.choice(SEPARATORS + SAMPLE_WORDS[:20])
    whats = (
        f'inserts "{piece}" into `{s}` at index {n}',
        f'returns `{s}` with "{piece}" inserted after the first {n} characters',
    )
    body = f'return {s}[:{n}] + "{piece}" + {s}[{n}:]'
    cases = texts("a" * n, "bc" * n, "a" * (n + 1))
    return function(rng, name, s, body, whats, lambda v: "".join([*list(v)[:n], piece, *list(v)[n:]]), cases)


def find_text(rng: Random) -> Task:
    name, s = named_text(rng, "find locate position search")
    piece = rng.choice([rng.choice(LETTERS), rng.choice(SAMPLE_WORDS), rng.choice("@#:/,.=")])
    last = rng.random() < 0.4
    whats = (
        f'returns the index of the {"last" if last else "first"} "{piece}" in `{s}`, or -1 if there is none',
        f'finds where "{piece}" occurs {"last" if last else "first"} in `{s}` (-1 if it does not)',
    )

    def reference(v: str) -> int:
        found = [i for i in range(len(v)) if v.startswith(piece, i)]
        return (found[-1] if last else found[0]) if found else -1

    cases = texts(piece, f"..{piece}{piece}!", f"ab{piece} {piece}c")
    return function(rng, name, s, f'return {s}.{"rfind" if last else "find"}("{piece}")', whats, reference, cases)


def split_pair(rng: Random) -> Task:
    name, s = named_text(rng, "split divide separate part")
    sep = rng.choice(["=", ":", "@", "/", "->", "|", "#", ",", ".", "+"])
    a, b = rng.choice(
        "key,value user,host left,right head,tail first,rest before,after front,back start,end".split()
    ).split(",")
    swap = rng.random() < 0.4
    order = f"`{b}` and `{a}`" if swap else f"`{a}` and `{b}`"
    whats = (
        f'splits `{s}` at "{sep}" into `{a}` and `{b}`, and returns {order}',
        f'unpacks the two parts of `{s}` around "{sep}" into `{a}` and `{b}` and returns {order} as a tuple',
    )
    body = (
        f'{a}, {b} = {s}.split("{sep}")\nreturn {b}, {a}' if swap else f'{a}, {b} = {s}.split("{sep}")\nreturn {a}, {b}'
    )
    reference = lambda v: tuple(v.split(sep)[:: -1 if swap else 1])
    return function(rng, name, s, body, whats, reference, one_each([f"ab{sep}cd", f"{sep}x", f"12{sep}"]))


FAMILIES = (
    change_text, count_letter, count_characters, replace_text, text_is, slice_text, shorten, repeat_text,
    split_words, wrap_text, greet, describe, initials, insert_text, find_text, split_pair,
)  # fmt: skip
