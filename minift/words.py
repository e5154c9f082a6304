"""Text → the words that BLEU counts, by the tokenisers of sacreBLEU 2.6.0 (Post 2018, aclanthology.org/W18-6319)."""

import functools
import re
import sys
import unicodedata

TOKENIZERS = ("13a", "none", "char", "intl")  # the first and the last by the rules of NIST's mteval-v13a.pl and -v14.pl


def words(text: str, tokenize: str = "13a", lowercase: bool = False) -> list[str]:
    """Split `text` into the words that BLEU counts.

    "13a": the default, for Western languages: splits off ASCII punctuation, except marks inside numbers, ' and -.
    "intl": splits off Unicode punctuation, except marks inside numbers, and Unicode symbols.
    "char": every character that is not white space. "none": split at white space only.
    """
    if tokenize not in TOKENIZERS:
        raise ValueError(f"tokenize must be one of {[*TOKENIZERS]}; got {tokenize!r}")
    # The order of these steps matters: "<SKIPPED>" is lowercased and then removed; "-\n" at the end of a text is kept,
    # as its newline is stripped first.
    text = (text.lower() if lowercase else text).rstrip()
    rules = []
    if tokenize == "13a":
        text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
        # "&amp;" before "&lt;", as in mteval: "&amp;lt;" becomes "<".
        for entity, character in ("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"):
            text = text.replace(entity, character)
        text = f" {text} "  # so that a mark at either end has a neighbour that is not a digit
        rules = RULES_13A
    elif tokenize == "intl":
        rules = _rules_intl()
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return list("".join(text.split())) if tokenize == "char" else text.split()


# Each rule is applied to the result of the rule before it, and matches of one rule never overlap: "a..5" becomes
# a . .5 but "a...5" becomes a . . . 5
RULES_13A = [
    (re.compile(r"([!-&(-+/:-@\[-`{-~])"), r" \1 "),  # ASCII punctuation without ' , - .
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
]


@functools.cache
def _rules_intl() -> list[tuple[re.Pattern[str], str]]:
    r"""Return mteval-v14's rules, with \p{P}, \p{S} and \p{N} as ranges: Python's `re` has no Unicode categories.

    A character that the running Python's Unicode (unicodedata.unidata_version) doesn't know is none of the three.
    """
    categories = "".join(unicodedata.category(chr(code))[0] for code in range(sys.maxunicode + 1))
    punctuation, symbol, number = (
        "".join(f"\\U{run.start():08x}-\\U{run.end() - 1:08x}" for run in re.finditer(f"{category}+", categories))
        for category in "PSN"
    )
    return [
        (re.compile(f"([^{number}])([{punctuation}])"), r"\1 \2 "),
        (re.compile(f"([{punctuation}])([^{number}])"), r" \1 \2"),
        (re.compile(f"([{symbol}])"), r" \1 "),
    ]
