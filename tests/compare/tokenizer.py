"""The tokenizer against transformers' `AutoTokenizer` of the same folder: ids of texts, and texts of ids.

A special token's name in a text is text to minift. The reference does the same when asked to (`split_special_tokens`),
and by default takes it for the token, which minift takes a `Special` piece for: both are compared.
"""

import random
import re
from collections.abc import Iterator, Sequence
from itertools import islice

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from minift.datasets import load_rows
from minift.tokenizer import Special, load_tokenizer
from tests.compare import Check, Setting

SECTION = "tokenizer"
SEED = 0
HARD, FROM_ROWS = 2000, 2000  # strings made here, and strings of the data
FRAGMENTS = [
    *(
        "def f(x):\n    return x",
        "word",
        "B",
        " a",
        "'s",
        "'ll",
        "I'M",
        "123",
        "3.14e-9",
        "__init__",
        "{}",
        "\\n",
        "#" * 9,
    ),
    *(
        " ",
        "   ",
        "\n",
        "\n\n",
        "\n    ",
        "\t",
        "\r\n",
        "\v",
        "\0",
        "\x7f",
        "\xa0",
        "\u2003",
        "\u3000",
        "\u2028",
        "\x85",
    ),
    *("é", "e\u0301", "ﬁ", "ß", "İ", "中文", "한", "हिन्दी", "\u202eعربى", "\u200b", "\ufeff", "\ufffd", "\U0010ffff"),
    *("😀", "👩\u200d👩\u200d👧", "\U0001f1e9\U0001f1ea", "☎\ufe0f", "<|endoftext|>", "</ s>", "</S>", "< pad>", "<s>"),
]
NO_TOKEN = 7  # OPT's embedding has so many rows more than there are tokens
BLOCKS = [(0, 0x80), (0x80, 0xD800), (0xE000, 0x110000)]  # all of Unicode but the halves of a UTF-16 pair


def compare(setting: Setting) -> Iterator[Check]:
    setting.progress("tokenizer: strings to ids and back")
    reference, ours = AutoTokenizer.from_pretrained(setting.model), load_tokenizer(setting.model)
    names = reference.all_special_tokens
    made, from_rows = (300, 100) if setting.quick else (HARD, FROM_ROWS)
    texts = [*dict.fromkeys([*hard_texts(names, made), *texts_of_rows(setting, from_rows)])]
    spelling = sum(any(name in text for name in names) for text in texts)
    on = f"{len(texts):,} different strings, {spelling:,} of them with {' or '.join(names)}"

    expected = [reference(text, split_special_tokens=True).input_ids for text in texts]
    yield check("ids, special tokens' names as text", on, texts, [ours.encode(text) for text in texts], expected)
    expected = [reference(text).input_ids for text in texts]
    found = [ours.encode(as_pieces(text, names)) for text in texts]
    yield check("ids, special tokens' names as tokens", on, texts, found, expected)

    ids = [*expected, *random_ids(len(reference) + NO_TOKEN, len(texts) // 2)]
    on = f"{len(ids):,} lists of ids, {len(ids) - len(texts):,} of them random"
    for skip in (True, False):
        what = f"text of ids, special tokens {'left out' if skip else 'shown'}"
        yield check(what, on, ids, [ours.decode(row, skip) for row in ids], decode_all(reference, ids, skip))


def hard_texts(names: Sequence[str], count: int) -> list[str]:
    """Fragments that BPE and pre-tokenisers trip over, glued at random, and random characters from all of Unicode."""
    rng = random.Random(SEED)
    fragments = [*FRAGMENTS, *names, *names]
    glued = ["".join(rng.choices(fragments, k=rng.randrange(12))) for _ in range(count // 2)]
    codes = [[rng.randrange(*rng.choice(BLOCKS)) for _ in range(rng.randrange(20))] for _ in range(count - count // 2)]
    return [*glued, *("".join(map(chr, code)) for code in codes)]


def texts_of_rows(setting: Setting, count: int) -> list[str]:
    """The first texts of the data, whatever their fields are called."""
    texts = (value for row in load_rows(setting.data) for value in row.values() if isinstance(value, str))
    return [*islice(dict.fromkeys(texts), count)]


def random_ids(size: int, count: int) -> list[list[int]]:
    """Ids that no text gave: halves of characters, special tokens in odd places, ids without a token."""
    rng = random.Random(SEED)
    return [[rng.randrange(size) for _ in range(rng.randrange(1, 30))] for _ in range(count)]


def decode_all(reference: PreTrainedTokenizerBase, ids: Sequence[list[int]], skip: bool) -> list[str]:
    return [reference.decode(row, skip_special_tokens=skip, clean_up_tokenization_spaces=False) for row in ids]


def as_pieces(text: str, names: Sequence[str]) -> list[str]:
    """A text with the special tokens it names as `Special` pieces."""
    parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
    # The first part is plain, "" if need be: a BOS that pieces begin with counts as the one `encode` puts in front.
    return [Special(part) if part in names else part for part in parts]


def check(what: str, on: str, given: Sequence, found: Sequence, expected: Sequence) -> Check:
    wrong = [place for place in range(len(given)) if found[place] != expected[place]]
    note = f"the first: {given[wrong[0]]!r}" if wrong else ""
    return Check(SECTION, what, on, len(wrong), 0, note)
