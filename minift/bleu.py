r"""BLEU: a score for how many of a text's n-grams also occur in its reference texts. Equals sacreBLEU 2.6.0's.

    BLEU = 100 * BP * exp(mean over n = 1..4 of log p_n)
    p_n  = n-grams of the hypotheses that match a reference / n-grams of the hypotheses
    BP   = 1 if c >= r, else exp(1 - r / c)                     c words in the hypotheses, r in the references

An n-gram matches at most as often as it occurs in one reference, the one that has it most often. With several
references, r is the length closest to the hypothesis's. Counts and lengths are summed over the corpus before the
division, so corpus BLEU is not the mean of sentence BLEUs.

The formula is from Papineni et al. 2002 (aclanthology.org/P02-1040), smoothing from Chen & Cherry 2014 (W14-3346), the
signature from Post 2018 (W18-6319). words.py splits text into words.
"""

import functools
import logging
import math
import operator
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

from minift.words import words

SACREBLEU_VERSION = "2.6.0"  # in signatures: they promise this version's score, and the tests check that
SMOOTHING_DEFAULTS = {"none": None, "floor": 0.1, "add-k": 1, "exp": None}


class BLEU(NamedTuple):
    """A score and its parts. Lists have one entry for each n = 1..max_ngram_order."""

    score: float  # 0 to 100
    counts: list[float]  # matching n-grams: whole numbers, plus k for n > 1 under add-k
    totals: list[float]  # n-grams of the hypotheses, plus k for n > 1 under add-k
    precisions: list[float]  # p_n in percent, smoothed
    bp: float
    sys_len: int  # c
    ref_len: int  # r
    signature: str


def corpus_bleu(
    hypotheses: Sequence[str], references: Sequence[Sequence[str | None]], *, smooth_method: str = "exp",
    smooth_value: float | None = None, force: bool = False, lowercase: bool = False, tokenize: str = "13a",
    use_effective_order: bool = False, max_ngram_order: int = 4,
) -> BLEU:  # fmt: skip
    """Return the BLEU of a corpus, as sacreBLEU's function of the same name.

    references: one or more streams, each as long as `hypotheses`: references[k][i] is the k-th reference of
        hypotheses[i], or None if segment i has fewer. An empty string is a reference without words.
    smooth_method: the count that replaces 0 for an n without a match. "none": 0; "floor": `smooth_value`; "exp": 1/2
        for the first such n, 1/4 for the second, ... "add-k" adds `smooth_value` to counts and totals of n > 1
        instead. A corpus without any match scores 0 under all four.
    force: don't warn about 100 or more hypotheses that end in " .", the mark of text already split into tokens.
    tokenize: "13a", "intl", "char" or "none", see `words`.
    use_effective_order: leave out each n for which the hypotheses are too short. Without it, a corpus that has no
        4-gram scores 0, even against itself.

    Raises ValueError for an unknown or impossible setting, no segments, streams of different lengths or a segment
    without references; TypeError for a segment that is not a string, and for a string where a sequence is expected.
    """
    _check_settings(smooth_method, smooth_value, max_ngram_order)
    _check_corpus(hypotheses, references)
    if not force and sum(hypothesis.endswith(" .") for hypothesis in hypotheses) >= 100:
        logging.getLogger(__name__).warning("100 or more lines end in ' .': BLEU expects text not split into tokens")

    counts: list[float] = [0] * max_ngram_order
    totals: list[float] = [0] * max_ngram_order
    sys_len = ref_len = 0
    num_references = set()
    for hypothesis, *segment_references in zip(hypotheses, *references, strict=True):
        hypothesis_words = words(hypothesis, tokenize, lowercase)
        reference_words = [words(text, tokenize, lowercase) for text in segment_references if text is not None]
        num_references.add(len(reference_words))
        sys_len += len(hypothesis_words)
        # The closest length; of two equally close, the shorter.
        ref_len += min(map(len, reference_words), key=lambda length: (abs(length - len(hypothesis_words)), length))
        # The union of Counters keeps the larger count of each n-gram, the intersection the smaller.
        allowed = functools.reduce(operator.ior, (_ngrams(each, max_ngram_order) for each in reference_words))
        for ngram, count in (_ngrams(hypothesis_words, max_ngram_order) & allowed).items():
            counts[len(ngram) - 1] += count
        for n in range(1, max_ngram_order + 1):
            totals[n - 1] += max(len(hypothesis_words) - n + 1, 0)

    bp = 1.0
    if sys_len < ref_len:
        bp = math.exp(1 - ref_len / sys_len) if sys_len > 0 else 0.0
    score, precisions = 0.0, [0.0] * max_ngram_order
    smooth_value = SMOOTHING_DEFAULTS[smooth_method] if smooth_value is None else smooth_value
    if any(counts):
        counts, totals, precisions = _smoothed(counts, totals, smooth_method, smooth_value or 0)
        order = sum(total > 0 for total in totals) if use_effective_order else max_ngram_order
        if all(precisions[:order]):
            score = bp * math.exp(sum(map(math.log, precisions[:order])) / order)

    nrefs = str(num_references.pop()) if len(num_references) == 1 else "var"
    smooth = smooth_method if SMOOTHING_DEFAULTS[smooth_method] is None else f"{smooth_method}[{smooth_value:.2f}]"
    case, eff = "lc" if lowercase else "mixed", "yes" if use_effective_order else "no"
    signature = f"nrefs:{nrefs}|case:{case}|eff:{eff}|tok:{tokenize}|smooth:{smooth}|version:{SACREBLEU_VERSION}"
    return BLEU(score, counts, totals, precisions, bp, sys_len, ref_len, signature)


def sentence_bleu(
    hypothesis: str, references: Sequence[str | None], *, use_effective_order: bool = True, **settings: Any
) -> BLEU:
    """Return the BLEU of one text against one or more references; the settings are `corpus_bleu`'s.

    The effective order is on, as in sacreBLEU's function of the same name: a text of three tokens can't have a 4-gram.
    """
    if isinstance(references, str):
        raise TypeError("references must be a sequence of strings, one per reference; got one string")
    streams = [[reference] for reference in references]
    return corpus_bleu([hypothesis], streams, use_effective_order=use_effective_order, **settings)


def _check_settings(smooth_method: str, smooth_value: float | None, max_ngram_order: int) -> None:
    if smooth_method not in SMOOTHING_DEFAULTS:
        raise ValueError(f"smooth_method must be one of {[*SMOOTHING_DEFAULTS]}; got {smooth_method!r}")
    if max_ngram_order < 1:
        raise ValueError(f"max_ngram_order must be 1 or more; got {max_ngram_order}")
    if smooth_value is not None and not 0 <= smooth_value < math.inf:
        raise ValueError(f"smooth_value must be a number of 0 or more; got {smooth_value}")


def _check_corpus(hypotheses: Sequence[str], references: Sequence[Sequence[str | None]]) -> None:
    # sacreBLEU takes a string among the streams for a list of its characters: a wrong score without a warning.
    if any(isinstance(stream, str) for stream in [hypotheses, references, *references]):
        raise TypeError("hypotheses must be a sequence of strings, references a sequence of such; found one string")
    if not hypotheses or not references:
        raise ValueError("BLEU needs at least one hypothesis and one stream of references")
    for number, stream in enumerate(references):
        if len(stream) != len(hypotheses):
            raise ValueError(f"references[{number}] has {len(stream)} segments, hypotheses {len(hypotheses)}")
    for index, (hypothesis, *segment_references) in enumerate(zip(hypotheses, *references, strict=True)):
        given = [reference for reference in segment_references if reference is not None]
        if not given:
            raise ValueError(f"segment {index} has no reference")
        if not all(isinstance(text, str) for text in [hypothesis, *given]):
            raise TypeError(f"segment {index}: expected strings only")


def _ngrams(text: list[str], max_ngram_order: int) -> Counter[tuple[str, ...]]:
    """Count the n-grams of a text's words, n = 1..max_ngram_order: zip pairs each word with the n - 1 after it."""
    orders = range(1, max_ngram_order + 1)
    return Counter(chain.from_iterable(zip(*(text[start:] for start in range(n)), strict=False) for n in orders))


def _smoothed(
    counts: list[float], totals: list[float], method: str, value: float
) -> tuple[list[float], list[float], list[float]]:
    """Return counts and totals, which only add-k changes, and p_n in percent; 0 for an n without n-grams."""
    if method == "add-k":
        counts = counts[:1] + [count + value for count in counts[1:]]
        totals = totals[:1] + [total + value for total in totals[1:]]
    precisions, half = [], 1.0
    for count, total in zip(counts, totals, strict=True):
        if count == 0 and total > 0:
            half /= 2
            count = {"exp": half, "floor": value}.get(method, 0)
        precisions.append(100 * count / total if total > 0 else 0.0)
    return counts, totals, precisions
