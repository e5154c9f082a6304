r"""BLEU: how much of a text's wording its references have too. Equal to sacreBLEU 2.6.0's to the last digit.

    BLEU = BP * exp(mean over n = 1..4 of log p_n)              in percent, 0 to 100
    p_n  = n-grams of the hypotheses that their references have too / n-grams of the hypotheses
    BP   = 1 if c >= r, else exp(1 - r / c)                     c tokens in the hypotheses, r in the references

An n-gram counts at most as often as it occurs in the one reference that has it most often. With several references, r
is the length nearest to the hypothesis's. Counts and lengths are summed over the corpus before anything is divided, so
corpus BLEU is not the mean of the sentences' BLEUs.

Sources: Papineni et al. 2002 (aclanthology.org/P02-1040) for the formula; Chen & Cherry 2014 (W14-3346) for smoothing;
Post 2018 (W18-6319) for tokenisers and signature; NIST's mteval-v13a.pl and mteval-v14.pl for the tokenisers' rules.
"""

import argparse
import functools
import json
import logging
import math
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import NamedTuple

from minift.errors import CommandParser, UserError, run_command
from minift.files import json_lines, read_text

# A signature says "this version of sacreBLEU, so set, gives this score". That is what is promised here (the tests hold
# it), so the version is sacreBLEU's and signatures of both can be compared as strings.
SACREBLEU_VERSION = "2.6.0"

SMOOTHING_DEFAULTS = {"none": None, "floor": 0.1, "add-k": 1, "exp": None}
TOKENIZERS = ("13a", "none", "char", "intl")


class BLEU(NamedTuple):
    """A score and what it was made of. Lists hold one entry for each n = 1..max_ngram_order."""

    score: float  # 0 to 100
    counts: list[float]  # n-grams found in the references; whole numbers, plus k for n > 1 under add-k
    totals: list[float]  # n-grams of the hypotheses; the same
    precisions: list[float]  # percent, smoothed
    bp: float
    sys_len: int
    ref_len: int
    signature: str


def corpus_bleu(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str | None]],
    *,
    smooth_method: str = "exp",
    smooth_value: float | None = None,
    force: bool = False,
    lowercase: bool = False,
    tokenize: str = "13a",
    use_effective_order: bool = False,
    max_ngram_order: int = 4,
) -> BLEU:
    """BLEU of a corpus, as sacreBLEU's function of this name.

    references: one or more streams, each as long as `hypotheses`: references[k][i] is the k-th reference of
        hypotheses[i], or None where segment i has fewer. An empty string is a reference without words.
    smooth_method: what an order without a match counts as. "none": 0; "floor": `smooth_value` matches; "exp": 1/2
        match for the first such order, 1/4 for the second, ... "add-k" adds `smooth_value` to counts and totals of
        n > 1. A corpus without any match scores 0 under all of them. `smooth_value` is for floor (0.1) and add-k (1).
    force: don't warn of 100 or more hypotheses that end in " .", the mark of text already split into tokens.
    tokenize: "13a", "intl", "char" or "none", see `tokens`.
    use_effective_order: leave out orders for which the hypotheses are too short. Without it, a corpus that has no
        4-gram scores 0, even against itself.

    Raises ValueError for an unknown or impossible setting, and ValueError or TypeError for what makes no corpus: no
    segments, streams of different lengths, a segment without references, something that is no string.
    """
    if smooth_method not in SMOOTHING_DEFAULTS:
        raise ValueError(f"smooth_method must be one of {[*SMOOTHING_DEFAULTS]}; got {smooth_method!r}")
    if max_ngram_order < 1:
        raise ValueError(f"max_ngram_order must be 1 or more; got {max_ngram_order}")
    if smooth_value is not None and not 0 <= smooth_value < math.inf:
        raise ValueError(f"smooth_value must be a number of 0 or more; got {smooth_value}")
    _check_corpus(hypotheses, references)
    if not force and sum(hypothesis.endswith(" .") for hypothesis in hypotheses) >= 100:
        logging.getLogger(__name__).warning("100 or more lines end in ' .': BLEU wants text not split into tokens")

    counts, totals = [0] * max_ngram_order, [0] * max_ngram_order
    sys_len = ref_len = 0
    num_references = set()
    for hypothesis, *segment_references in zip(hypotheses, *references, strict=True):
        hypothesis_tokens = tokens(hypothesis, tokenize, lowercase)
        reference_tokens = [tokens(text, tokenize, lowercase) for text in segment_references if text is not None]
        num_references.add(len(reference_tokens))
        sys_len += len(hypothesis_tokens)
        # The nearest length; of two as near, the shorter.
        ref_len += min(map(len, reference_tokens), key=lambda length: (abs(length - len(hypothesis_tokens)), length))
        first, *others = reference_tokens
        allowed = _ngrams(first, max_ngram_order)  # how often the references let each n-gram count
        for reference in others:
            allowed |= _ngrams(reference, max_ngram_order)
        found = _ngrams(hypothesis_tokens, max_ngram_order)
        for ngram in found.keys() & allowed.keys():
            counts[len(ngram) - 1] += min(found[ngram], allowed[ngram])
        for n in range(1, max_ngram_order + 1):
            totals[n - 1] += max(len(hypothesis_tokens) - n + 1, 0)

    bp = 1.0
    if sys_len < ref_len:
        bp = math.exp(1 - ref_len / sys_len) if sys_len > 0 else 0.0
    score, precisions = 0.0, [0.0] * max_ngram_order
    if smooth_value is None:
        smooth_value = SMOOTHING_DEFAULTS[smooth_method]
    if any(counts):
        counts, totals, precisions = _smoothed(counts, totals, smooth_method, smooth_value)
        order = sum(total > 0 for total in totals) if use_effective_order else max_ngram_order
        if all(precisions[:order]):
            score = bp * math.exp(sum(map(math.log, precisions[:order])) / order)

    nrefs = str(num_references.pop()) if len(num_references) == 1 else "var"
    smooth = smooth_method if SMOOTHING_DEFAULTS[smooth_method] is None else f"{smooth_method}[{smooth_value:.2f}]"
    case, eff = "lc" if lowercase else "mixed", "yes" if use_effective_order else "no"
    signature = f"nrefs:{nrefs}|case:{case}|eff:{eff}|tok:{tokenize}|smooth:{smooth}|version:{SACREBLEU_VERSION}"
    return BLEU(score, counts, totals, precisions, bp, sys_len, ref_len, signature)


def _ngrams(words: list[str], max_ngram_order: int) -> Counter[tuple[str, ...]]:
    orders = range(1, max_ngram_order + 1)
    return Counter(chain.from_iterable(zip(*(words[start:] for start in range(n)), strict=False) for n in orders))


def _smoothed(counts: list[float], totals: list[float], method: str, value: float | None) -> tuple[list[float], ...]:
    """Counts and totals, which add-k alone changes, and p_n in percent; 0 for orders without an n-gram."""
    if method == "add-k":
        counts = counts[:1] + [count + value for count in counts[1:]]
        totals = totals[:1] + [total + value for total in totals[1:]]
    precisions = []
    half = 1.0
    for count, total in zip(counts, totals, strict=True):
        if count == 0 and total > 0:
            half /= 2
            count = {"exp": half, "floor": value}.get(method, 0)
        precisions.append(100 * count / total if total > 0 else 0.0)
    return counts, totals, precisions


def _check_corpus(hypotheses: Sequence[str], references: Sequence[Sequence[str | None]]) -> None:
    # sacreBLEU takes a string among the streams for its characters: a wrong score without a word.
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
            raise TypeError(f"segment {index} holds something that is no string")


def sentence_bleu(
    hypothesis: str, references: Sequence[str | None], *, use_effective_order: bool = True, **settings
) -> BLEU:
    """BLEU of one text against one or more references; the settings are `corpus_bleu`'s.

    The effective order is on, as in sacreBLEU's function of this name: a text of three tokens can't have a 4-gram.
    """
    if isinstance(references, str):
        raise TypeError("references must be a sequence of strings, one per reference; got one string")
    streams = [[reference] for reference in references]
    return corpus_bleu([hypothesis], streams, use_effective_order=use_effective_order, **settings)


def tokens(text: str, tokenize: str = "13a", lowercase: bool = False) -> list[str]:
    """What BLEU takes for the words of `text`.

    "13a": the default, for Western languages: splits off ASCII punctuation, but for marks inside numbers, ' and -.
    "intl": splits off Unicode's punctuation, but for marks inside numbers, and Unicode's symbols.
    "char": every character that is no white space. "none": what white space separates.
    """
    if tokenize not in TOKENIZERS:
        raise ValueError(f"tokenize must be one of {[*TOKENIZERS]}; got {tokenize!r}")
    # The order of these two steps shows: "<SKIPPED>" is lowered and then dropped; "-\n" at a text's end is not, as its
    # newline is stripped first.
    text = (text.lower() if lowercase else text).rstrip()
    rules = []
    if tokenize == "13a":
        text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
        # "&amp;" before "&lt;", as mteval has it: "&amp;lt;" becomes "<".
        for entity, character in ("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"):
            text = text.replace(entity, character)
        text = f" {text} "  # so that a mark at either end has a neighbour that is no digit
        rules = RULES_13A
    elif tokenize == "intl":
        rules = _rules_intl()
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    words = text.split()
    return list("".join(words)) if tokenize == "char" else words


# Each rule sees the text that the rule before it left, and matches of one rule never overlap: "a..5" becomes a . .5 but
# "a...5" becomes a . . . 5
RULES_13A = [
    (re.compile(r"([!-&(-+/:-@\[-`{-~])"), r" \1 "),  # ASCII punctuation without ' , - .
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
]


@functools.cache
def _rules_intl() -> list[tuple[re.Pattern, str]]:
    r"""mteval-v14's rules: \p{P}, \p{S} and \p{N} spelt out as ranges, as Python's `re` has no Unicode categories.

    Characters younger than the running Python's Unicode (unicodedata.unidata_version) count as none of the three.
    """
    kinds = "".join(unicodedata.category(chr(code))[0] for code in range(sys.maxunicode + 1))
    punctuation, symbol, number = (
        "".join(f"\\U{run.start():08x}-\\U{run.end() - 1:08x}" for run in re.finditer(f"{kind}+", kinds))
        for kind in "PSN"
    )
    return [
        (re.compile(f"([^{number}])([{punctuation}])"), r"\1 \2 "),
        (re.compile(f"([{punctuation}])([^{number}])"), r" \1 \2"),
        (re.compile(f"([{symbol}])"), r" \1 "),
    ]


def main(arguments: list[str] | None = None) -> None:
    """The command: prints sacreBLEU's JSON fields, the score with all its digits, and the counts behind it."""
    args = _parser().parse_intermixed_args(arguments)  # flags may stand between the files
    if args.jsonl and args.files:
        raise UserError(f"--jsonl {args.jsonl}: expected no other file, got {args.files[0]}; leave out one of them")
    if not args.jsonl and len(args.files) < 2:
        raise UserError("expected HYP REF [REF ...] or --jsonl FILE: at least one file of references, see --help")
    if args.smooth_value is not None and not 0 <= args.smooth_value < math.inf:
        raise UserError(f"--smooth-value {args.smooth_value}: expected a number of 0 or more")
    if args.jsonl:
        hypotheses, references = _read_jsonl(args.jsonl, args.hypothesis_field, args.reference_field)
    else:
        hypotheses, *references = _read_segments(args.files)
    settings = {name: getattr(args, name) for name in ("smooth_method", "smooth_value", "lowercase", "tokenize")}
    if args.sentence_level:
        segments = zip(hypotheses, *references, strict=True)
        scores = [sentence_bleu(hypothesis, texts, **settings) for hypothesis, *texts in segments]
    else:
        scores = [corpus_bleu(hypotheses, references, use_effective_order=args.effective_order, **settings)]
    for bleu in scores:
        print(json.dumps(_fields(bleu)))


def _fields(bleu: BLEU) -> dict:
    """sacreBLEU's JSON fields in its order, then what the score was made of."""
    precisions = "/".join(f"{precision:.1f}" for precision in bleu.precisions)
    ratio = bleu.sys_len / bleu.ref_len if bleu.ref_len else 0
    lengths = f"(BP = {bleu.bp:.3f} ratio = {ratio:.3f} hyp_len = {bleu.sys_len} ref_len = {bleu.ref_len})"
    fields = {"name": "BLEU", "score": bleu.score, "signature": bleu.signature}
    fields["verbose_score"] = f"{precisions} {lengths}"
    return fields | dict(setting.split(":") for setting in bleu.signature.split("|")) | bleu._asdict()


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser("python -m minift.bleu", description="sacreBLEU's BLEU.")
    add = parser.add_argument
    add("files", nargs="*", metavar="HYP REF", help="one segment a line; more than one REF may follow")
    add("--jsonl", metavar="FILE", help="instead of HYP REF: one JSON object a line")
    add("--hypothesis-field", default="completion", help="default: %(default)s")
    add("--reference-field", default="output", help="a string or a list of them; default: %(default)s")
    add("--tokenize", choices=TOKENIZERS, default="13a", help="default: %(default)s")
    add("--smooth-method", choices=SMOOTHING_DEFAULTS, default="exp", help="default: %(default)s")
    add("--smooth-value", type=float, help="for floor (default 0.1) and add-k (default 1)")
    add("--lowercase", action="store_true")
    add("--effective-order", action="store_true", help="leave out orders the text is too short for")
    add("--sentence-level", action="store_true", help="one line per segment, with effective order")
    return parser


def _read_segments(paths: list[str]) -> list[list[str]]:
    r"""The files' lines, cut at "\n" and nothing else: a form feed or U+2028 is text, and so is a byte order mark."""
    files = []
    for path in paths:
        text = read_text(path, "one segment a line", encoding="utf-8")
        if not text:
            raise UserError(f"{path}: empty, expected one segment a line")
        lines = text.removesuffix("\n").split("\n")
        files.append(lines)
        if len(lines) != len(files[0]):
            raise UserError(f"{path} has {len(lines)} lines, {paths[0]} has {len(files[0])}; expected the same number")
    return files


def _read_jsonl(path: str, hypothesis_field: str, reference_field: str) -> tuple[list[str], list[list[str | None]]]:
    """Hypotheses, and streams of references filled up with None where a line has fewer than another."""
    hypotheses, references = [], []
    for number, row in json_lines(read_text(path, "one JSON object a line"), path):
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, got {json.dumps(row)[:40]}")
        for flag, field in ("--hypothesis-field", hypothesis_field), ("--reference-field", reference_field):
            if field not in row:
                raise UserError(f"{path}:{number}: no field {field!r}; name another with {flag}")
        if not isinstance(row[hypothesis_field], str):
            raise UserError(f"{path}:{number}: field {hypothesis_field!r} must be a string")
        texts = row[reference_field]
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{path}:{number}: field {reference_field!r} must be a string or a list of strings")
        hypotheses.append(row[hypothesis_field])
        references.append(texts)
    if not hypotheses:
        raise UserError(f"{path}: no rows in it, expected one JSON object a line")
    return hypotheses, [list(stream) for stream in zip_longest(*references)]


if __name__ == "__main__":
    run_command(main)
