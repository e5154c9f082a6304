"""`minift winrate`: two language models answer the same prompts; a reward model says how often each one wins."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch

from minift.commands import terminal
from minift.commands.cli import CommandParser, add_device_flags, add_judging_flags, check_out, whole_number
from minift.commands.generate import complete, encode_prompts, texts_of
from minift.errors import UserError
from minift.files.datasets import PROMPT_SCHEMAS, Row, check_added, load_rows
from minift.files.pretrained import LanguageModel, find_model, load_for_prompts, load_for_sft, load_judge
from minift.files.text import say, to_json, write_json_lines
from minift.generate import Options
from minift.prompts import question_of
from minift.remarks import Encoded, name_first, unread
from minift.run.device import pick_device
from minift.scoring import Judge, score_rows, win_rate

ADDED = ("answer_a", "answer_b", "score_a", "score_b")  # to the rows, with --out


def main(arguments: list[str] | None = None) -> None:
    """Let both models answer and the judge score; count the wins, with their interval."""
    args = _parser().parse_args(arguments)
    placement = {"device": pick_device(args.device), "dtype": getattr(torch, args.dtype)}
    check_out(args.out, "--prompts", args.prompts)
    rows = load_rows(args.prompts, PROMPT_SCHEMAS, mixed=True)[: args.limit]
    if args.out is not None:
        check_added(rows, ADDED, args.prompts)
    judge = load_judge(args.judge, template=args.judge_template, flag="--judge-template", **placement)
    questions = questions_of(rows, judge, args.prompts)
    models = {"a": find_model(args.model_a), "b": find_model(args.model_b)}
    prompts, texts = {}, {}
    for side, files in models.items():  # both are checked before either answers
        tokenizer, template, max_positions = load_for_prompts(files, template=args.template)
        texts[side] = tokenizer, template
        source = f"{args.prompts}: --model-{side}"
        prompts[side] = encode_prompts(questions, tokenizer, template, max_positions, args.max_new_tokens, source)
    columns: dict[str, list[Any]] = {}

    def add(name: str, values: list[Any]) -> None:
        """Add a column and write all so far: whatever stops the command later, the answers are kept."""
        columns[name] = values
        if args.out is not None:
            added = (dict(zip(columns, line, strict=True)) for line in zip(*columns.values(), strict=True))
            write_json_lines(args.out, (row | its for row, its in zip(rows, added, strict=True)))

    for side, files in models.items():
        loaded, _ = load_for_sft(files, dtype=placement["dtype"])
        model = LanguageModel(loaded.to(placement["device"]), *texts[side])
        options = Options(args.max_new_tokens, eos_token_id=model.tokenizer.eos_token_id, batch_size=args.batch_size)
        completions = complete(model, prompts[side], options, f"--model-{side}")
        add(f"answer_{side}", [text for (text,) in texts_of(questions, completions, model)])
        del loaded, model  # its memory is free before the next one is loaded

    encoded = _encode_pairs(judge, questions, columns)
    judged = [both for both in encoded if both is not None]
    if not judged:
        raise UserError(f"--judge {args.judge}: it can read no pair of answers; ask for fewer --max-new-tokens")
    scores = score_rows(judge.model, [ids for both in judged for ids in both], judge.batch_size)
    scores_a, scores_b = scores[::2], scores[1::2]
    for name, values in (("score_a", scores_a), ("score_b", scores_b)):
        found = iter(values)
        add(name, [None if both is None else next(found) for both in encoded])
    _print_wins(args, scores_a, scores_b, len(rows))


def questions_of(rows: Sequence[Row], judge: Judge, source: str) -> list[Row]:
    """Return each row's question as an instruction, for the templates of the models and of the judge.

    Prints which fields are not read. Raises UserError if the judge can't read one; `source` is what messages call the
    rows.
    """
    seen: Encoded[Row] = Encoded(source, "row", len(rows))
    for row in rows:
        for remark in unread(row):
            seen.remark(remark, row.location)
    terminal.print_remarks(seen, sys.stderr)
    questions = [Row(question_of(row) or {}, row.location) for row in rows]
    for row in questions:
        try:
            judge.encode(row, "")
        except (ValueError, UserError) as error:
            raise UserError(f"{source}: {row.location}: the question alone: {error}") from None
    return questions


def _print_wins(args: Namespace, scores_a: list[float], scores_b: list[float], num_prompts: int) -> None:
    """Print the win rate and what belongs to it as JSON, and a sentence about it on stderr."""
    rate = win_rate([a - b for a, b in zip(scores_a, scores_b, strict=True)])
    wins_b = rate.pairs - rate.wins - rate.ties
    found = {
        "model_a": args.model_a,
        "model_b": args.model_b,
        "judge": args.judge,
        "prompts": rate.pairs,
        "left_out": num_prompts - rate.pairs,
        "wins_a": rate.wins,
        "wins_b": wins_b,
        "ties": rate.ties,
        "win_rate_a": rate.rate,
        "interval_95": [rate.low, rate.high],
        "mean_score_a": sum(scores_a) / rate.pairs,
        "mean_score_b": sum(scores_b) / rate.pairs,
    }
    say(to_json(found))
    say(
        f"{args.model_a} wins {rate.rate:.1%} of {rate.pairs:,} prompts (95%: {rate.low:.1%} to {rate.high:.1%}), "
        f"{args.model_b} {wins_b / rate.pairs:.1%}, {rate.ties} ties",
        sys.stderr,
    )


def _encode_pairs(judge: Judge, rows: Sequence[Row], columns: dict[str, list[Any]]) -> list[list[list[int]] | None]:
    """Return the ids of both answers to each row; None, and a message, where one is too long for the judge."""
    encoded, left_out = list[list[list[int]] | None](), list[str]()
    for row, *both in zip(rows, columns["answer_a"], columns["answer_b"], strict=True):
        try:
            encoded.append([judge.encode(row, text) for text in both])
        except ValueError as error:
            encoded.append(None)
            left_out.append(f"{row.location} ({error})")
    if left_out:
        named = name_first(left_out)
        say(f"{len(left_out):,} of {len(rows):,} prompts left out, an answer is too long: {named}", sys.stderr)
    return encoded


def _parser() -> CommandParser:
    about = "Two language models answer the same prompts greedily; a reward model says how often each one wins."
    parser = CommandParser("minift winrate", description=about)
    add = parser.add_argument
    add("--model-a", required=True, help="a language model's folder or hub id, such as runs/sft")
    add("--model-b", required=True, help="another one's, such as data/model")
    add_judging_flags(parser)
    add("--out", help="JSONL: the prompts with `answer_a`, `answer_b`, `score_a` and `score_b`")
    add("--template", help="template of the language models (default: that of each one's training run, or course)")
    add("--batch-size", type=whole_number(1), default=64, help="prompts answered at a time (default: %(default)s)")
    add_device_flags(parser, half=False)
    return parser
