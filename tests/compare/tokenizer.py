"""The tokenizer against transformers' `AutoTokenizer` of the same folder: ids of texts, and texts of ids.

minift reads a special token's name in a text as text. The reference does so with `split_special_tokens=True`; by
default it reads the token, for which minift has `Special` pieces. Both ways are compared.
"""

import random
import re
from collections.abc import Iterator, Sequence
from itertools import islice

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from minift.files.datasets import load_rows
from minift.files.tokenizer import load_tokenizer
from minift.tokenizer import Special, Tokenizer
from tests.compare import Check, Setting

SECTION = "tokenizer"
SEED = 0
HARD, FROM_ROWS = 2000, 2000  # random strings, and strings of the data
# fmt: off
FRAGMENTS = [
    "def f(x):\n    return x", "word", "B", " a", "'s", "'ll", "I'M", "123", "3.14e-9", "__init__", "{}", "\\n",
    "#" * 9,
    " ", "   ", "\n", "\n\n", "\n    ", "\t", "\r\n", "\v", "\0", "\x7f",
    "\xa0", "\u2003", "\u3000", "\u2028", "\x85",
    "é", "e\u0301", "ﬁ", "ß", "İ", "中文", "한", "हिन्दी", "\u202eعربى", "\u200b", "\ufeff", "\ufffd", "\U0010ffff",
    "😀", "👩\u200d👩\u200d👧", "\U0001f1e9\U0001f1ea", "☎\ufe0f",
    "<|endoftext|>", "</ s>", "</S>", "< pad>", "<s>",
]
# fmt: on
NO_TOKEN = 7  # OPT's embedding has this many more rows than there are tokens
BLOCKS = [(0, 0x80), (0x80, 0xD800), (0xE000, 0x110000)]  # all of Unicode except the halves of UTF-16 pairs


def compare(setting: Setting) -> Iterator[Check]:
    setting.progress("tokenizer: strings to ids and back")
    reference, ours = AutoTokenizer.from_pretrained(setting.model), load_tokenizer(setting.model)
    made, from_rows = (300, 100) if setting.quick else (HARD, FROM_ROWS)
    texts = [*hard_texts(reference.all_special_tokens, made), *texts_of_rows(setting, from_rows)]
    yield from compare_tokenizers(reference, ours, texts)


def compare_tokenizers(reference: PreTrainedTokenizerBase, ours: Tokenizer, texts: Sequence[str]) -> Iterator[Check]:
    """Compare the ids of texts; and the texts of these ids, and of random ids."""
    names = reference.all_special_tokens
    texts = [*dict.fromkeys(texts)]
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


def hard_texts(more: Sequence[str], count: int) -> list[str]:
    """Return random sequences of fragments that are difficult for BPE and pre-tokenisers, and of any characters.

    `more` are fragments too, such as the names of special tokens.
    """
    rng = random.Random(SEED)
    fragments = [*FRAGMENTS, *more, *more]
    glued = ["".join(rng.choices(fragments, k=rng.randrange(12))) for _ in range(count // 2)]
    codes = [[rng.randrange(*rng.choice(BLOCKS)) for _ in range(rng.randrange(20))] for _ in range(count - count // 2)]
    return [*glued, *("".join(map(chr, code)) for code in codes)]


def texts_of_rows(setting: Setting, count: int) -> list[str]:
    """Return the first texts of the data, from any field."""
    texts = (value for row in load_rows(setting.data) for value in row.values() if isinstance(value, str))
    return [*islice(dict.fromkeys(texts), count)]


def random_ids(size: int, count: int) -> list[list[int]]:
    """Return ids that no text encodes to: halves of characters, special tokens anywhere, ids without a token."""
    rng = random.Random(SEED)
    return [[rng.randrange(size) for _ in range(rng.randrange(1, 30))] for _ in range(count)]


def decode_all(reference: PreTrainedTokenizerBase, ids: Sequence[list[int]], skip: bool) -> list[str]:
    return [reference.decode(row, skip_special_tokens=skip, clean_up_tokenization_spaces=False) for row in ids]


def as_pieces(text: str, names: Sequence[str]) -> list[str]:
    """Return a text as pieces: `Special` for the special tokens that it spells."""
    parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
    # The first piece is plain, perhaps "": `encode` does not add a BOS if the first piece is the BOS.
    return [Special(part) if part in names else part for part in parts]


def check(what: str, on: str, given: Sequence, found: Sequence, expected: Sequence) -> Check:
    wrong = [number for number in range(len(given)) if found[number] != expected[number]]
    note = f"the first: {given[wrong[0]]!r}" if wrong else ""
    return Check(SECTION, what, on, len(wrong), 0, note)
