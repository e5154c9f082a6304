"""`minift bleu`: the BLEU of text files or of a file of JSON lines, printed as JSON."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from minift.bleu import BLEU, SMOOTHING_DEFAULTS, corpus_bleu, sentence_bleu
from minift.commands.cli import CommandParser
from minift.errors import UserError
from minift.files.text import read_json_lines, read_text, say, to_json
from minift.words import TOKENIZERS

Corpus = tuple[list[str], Sequence[Sequence[str | None]]]  # hypotheses and streams of references


def main(arguments: list[str] | None = None) -> None:
    """Print sacreBLEU's JSON fields, the score with all its digits, and the counts it was computed from."""
    args = _parser().parse_intermixed_args(arguments)  # allows flags between the files
    if args.jsonl and args.files:
        raise UserError(f"--jsonl {args.jsonl}: expected no other file, got {args.files[0]}; leave out one of them")
    if not args.jsonl and len(args.files) < 2:
        raise UserError("expected HYP REF [REF ...] or --jsonl FILE: at least one file of references, see --help")
    if args.smooth_value is not None and not 0 <= args.smooth_value < math.inf:
        raise UserError(f"--smooth-value {args.smooth_value}: expected a number of 0 or more")
    if args.jsonl:
        if args.hypothesis_field == args.reference_field:
            raise UserError(f"--reference-field {args.reference_field}: it is --hypothesis-field too; name another one")
        hypotheses, references = _read_jsonl(args.jsonl, args.hypothesis_field, args.reference_field)
    else:
        hypotheses, references = _read_segments(args.files)
    settings = {name: getattr(args, name) for name in ("smooth_method", "smooth_value", "lowercase", "tokenize")}
    if args.sentence_level:
        segments = zip(hypotheses, *references, strict=True)
        scores = [sentence_bleu(hypothesis, texts, **settings) for hypothesis, *texts in segments]
    else:
        scores = [corpus_bleu(hypotheses, references, use_effective_order=args.effective_order, **settings)]
    for bleu in scores:
        if not all(bleu.totals) and not (args.effective_order or args.sentence_level):
            say("too few words: BLEU is 0 if no text has four in a row; --effective-order scores these", sys.stderr)
        say(to_json(_fields(bleu)))


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "minift bleu", arguments="(HYP REF [REF ...] | --jsonl FILE) [flags]", description="sacreBLEU's BLEU, as JSON.",
        examples=(
            "answers.txt references.txt",
            "--jsonl answers.jsonl",
            "--jsonl answers.jsonl --reference-field target --sentence-level",
        ),
    )  # fmt: skip
    add = parser.add_argument_group("texts").add_argument
    add("files", nargs="*", metavar="HYP REF", help="one segment a line; more than one REF may follow")
    add("--jsonl", metavar="FILE", help="instead of HYP REF: one JSON object a line")
    add("--hypothesis-field", default="completion", help="default: %(default)s")
    add("--reference-field", default="output", help="holds a string or a list of strings; default: %(default)s")
    add = parser.add_argument_group("how it is computed").add_argument
    add("--tokenize", choices=TOKENIZERS, default="13a", help="default: %(default)s")
    add("--smooth-method", choices=SMOOTHING_DEFAULTS, default="exp", help="default: %(default)s")
    add("--smooth-value", type=float, help="for floor (default 0.1) and add-k (default 1)")
    add("--lowercase", action="store_true")
    add("--effective-order", action="store_true", help="leave out each n for which the text is too short")
    add("--sentence-level", action="store_true", help="one line per segment, with effective order")
    return parser


def _read_segments(paths: list[str]) -> Corpus:
    r"""Read hypotheses and streams of references, one segment a line.

    Lines end at "\n" only: a form feed or U+2028 is text, and so is a byte order mark.
    """
    files: list[list[str]] = []
    for path in paths:
        text = read_text(path, "one segment a line", encoding="utf-8")
        if not text:
            raise UserError(f"{path}: empty, expected one segment a line")
        files.append(text.removesuffix("\n").split("\n"))
        if len(files[-1]) != len(files[0]):
            lengths = f"{path} has {len(files[-1])} lines, {paths[0]} has {len(files[0])}"
            raise UserError(f"{lengths}; expected the same number")
    return files[0], files[1:]


def _read_jsonl(path: str, hypothesis_field: str, reference_field: str) -> Corpus:
    """Read hypotheses and streams of references; None where a line has fewer references than another."""
    hypotheses, references = [], []
    for number, row in read_json_lines(path):
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


def _fields(bleu: BLEU) -> dict[str, Any]:
    """Return sacreBLEU's JSON fields in its order, then the score's parts."""
    precisions = "/".join(f"{precision:.1f}" for precision in bleu.precisions)
    ratio = bleu.sys_len / bleu.ref_len if bleu.ref_len else 0
    lengths = f"(BP = {bleu.bp:.3f} ratio = {ratio:.3f} hyp_len = {bleu.sys_len} ref_len = {bleu.ref_len})"
    fields = {"name": "BLEU", "score": bleu.score, "signature": bleu.signature}
    fields["verbose_score"] = f"{precisions} {lengths}"
    return fields | dict(setting.split(":") for setting in bleu.signature.split("|")) | bleu._asdict()
