"""`minift winrate`: two language models answer the same prompts; a reward model says how often each one wins."""

import math
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from minift.commands.cli import CommandParser, add_device_flags, add_judging_flags, check_out, whole_number
from minift.commands.generate import complete, encode_prompts, texts_of
from minift.errors import UserError
from minift.files.datasets import PROMPT_SCHEMAS, Row, check_added, load_rows, print_remarks
from minift.files.language_model import LanguageModel
from minift.files.pretrained import find_model, load_for_prompts, load_for_sft, load_judge
from minift.files.text import say, to_json, write_json_lines
from minift.generate import Options
from minift.prompts import question_of
from minift.remarks import Encoded, name_first, unread
from minift.run.device import placement
from minift.scoring import Judge, score_rows, win_rate

ADDED = ("answer_a", "answer_b", "score_a", "score_b")  # to the rows, with --out


def main(arguments: list[str] | None = None) -> None:
    """Let both models answer and the judge score; count the wins, with their interval."""
    args = _parser().parse_args(arguments)
    placed = placement(args.device, args.dtype)
    check_out(args.out, "--prompts", args.prompts)
    rows = load_rows(args.prompts, PROMPT_SCHEMAS, mixed=True)[: args.limit]
    if args.out is not None:
        check_added(rows, ADDED, args.prompts)
    judge = load_judge(args.judge, template=args.judge_template, flag="--judge-template", **placed)
    questions = questions_of(rows, judge, args.prompts)
    models = {"a": find_model(args.model_a), "b": find_model(args.model_b)}
    readers = {side: load_for_prompts(files, template=args.template) for side, files in models.items()}
    prompts = {  # both are checked before either answers
        side: encode_prompts(questions, *reader, args.max_new_tokens, f"{args.prompts}: --model-{side}")
        for side, reader in readers.items()
    }
    columns: dict[str, list[Any]] = {}

    def add(name: str, values: list[Any]) -> None:
        """Add a column and write all so far: whatever stops the command later, the answers are kept."""
        columns[name] = values
        if args.out is not None:
            added = (dict(zip(columns, line, strict=True)) for line in zip(*columns.values(), strict=True))
            write_json_lines(args.out, (row.given | its for row, its in zip(rows, added, strict=True)))

    for side, files in models.items():
        loaded, _ = load_for_sft(files, dtype=placed["dtype"])
        tokenizer, template, _ = readers[side]
        model = LanguageModel(loaded.to(placed["device"]), tokenizer, template)
        options = Options(args.max_new_tokens, batch_size=args.batch_size)
        completions = complete(model, prompts[side], options, f"--model-{side}")
        add(f"answer_{side}", [text for (text,) in texts_of(questions, completions, model)])
        del loaded, model  # its memory is free before the next one is loaded

    rewards = rewards_of(judge, questions, [*zip(columns["answer_a"], columns["answer_b"], strict=True)])
    judged = [pair for pair in rewards if -math.inf not in pair]
    if not judged:
        raise UserError(f"--judge {args.judge}: it can read no pair of answers; ask for fewer --max-new-tokens")
    for number, side in enumerate(models):
        add(f"score_{side}", [None if -math.inf in pair else pair[number] for pair in rewards])
    _print_wins(args, judged, len(rows))


def questions_of(rows: Sequence[Row], judge: Judge, source: str) -> list[Row]:
    """Return each row's question as an instruction, for the templates of the models and of the judge.

    Prints which fields are not read. Raises UserError, which calls the rows `source`, if the judge can't read one.
    """
    seen: Encoded[Row] = Encoded(source, "row", len(rows))
    for row in rows:
        for remark in unread(row):
            seen.remark(remark, row.location)
    print_remarks(seen, sys.stderr)
    questions = [Row(question_of(row) or {}, row.location) for row in rows]
    for row in questions:
        try:
            judge.encode(row, "")
        except (ValueError, UserError) as error:
            raise UserError(f"{source}: {row.location}: the question alone: {error}") from None
    return questions


def rewards_of(judge: Judge, questions: Sequence[Row], answers: Sequence[Sequence[str]]) -> list[list[float]]:
    """Return the rewards of the answers to each question, -inf for one that the judge cannot read; say how many."""
    encoded: list[list[int] | None] = []
    too_long = []
    for question, texts in zip(questions, answers, strict=True):
        for text in texts:
            try:
                encoded.append(judge.encode(question, text))
            except ValueError:
                encoded.append(None)
                too_long.append(question.location)
    if too_long:
        named = name_first(list(dict.fromkeys(too_long)))
        say(f"{len(too_long):,} of {len(encoded):,} answers, too long for the judge, are left out: {named}", sys.stderr)
    scored = iter(score_rows(judge.model, [ids for ids in encoded if ids is not None], judge.batch_size))
    rewards = iter([-math.inf if ids is None else next(scored) for ids in encoded])
    return [[next(rewards) for _ in texts] for texts in answers]


def _print_wins(args: Namespace, rewards: Sequence[Sequence[float]], num_prompts: int) -> None:
    """Print the win rate and what belongs to it as JSON, and a sentence about it on stderr."""
    rate = win_rate([a - b for a, b in rewards])
    scores_a, scores_b = zip(*rewards, strict=True)
    wins_b = rate.pairs - rate.wins - rate.ties
    found = {
        "model_a": args.model_a, "model_b": args.model_b, "judge": args.judge,
        "prompts": rate.pairs, "left_out": num_prompts - rate.pairs,
        "wins_a": rate.wins, "wins_b": wins_b, "ties": rate.ties,
        "win_rate_a": rate.rate, "interval_95": [rate.low, rate.high],
        "mean_score_a": sum(scores_a) / rate.pairs, "mean_score_b": sum(scores_b) / rate.pairs,
    }  # fmt: skip
    say(to_json(found))
    say(
        f"{args.model_a} wins {rate.rate:.1%} of {rate.pairs:,} prompts (95%: {rate.low:.1%} to {rate.high:.1%}), "
        f"{args.model_b} {wins_b / rate.pairs:.1%}, {rate.ties} ties",
        sys.stderr,
    )


def _parser() -> CommandParser:
    about = "Two language models answer the same prompts greedily; a reward model says how often each one wins."
    parser = CommandParser(
        "minift winrate", arguments="--model-a A --model-b B --judge JUDGE --prompts FILE [flags]", description=about,
        examples=(
            "--model-a runs/sft --model-b data/model --judge runs/rm --prompts data/heldout.jsonl",
            "--model-a runs/sft --model-b runs/mine --judge runs/rm --prompts p.csv --limit 100",
            "--model-a runs/sft --model-b runs/mine --judge runs/rm --prompts p.csv --out won.jsonl",
        ),
    )  # fmt: skip
    add = parser.add_argument_group("models").add_argument
    add("--model-a", required=True, help="a language model's folder or hub id, such as runs/sft")
    add("--model-b", required=True, help="another one's, such as data/model")
    add("--template", help="template of the language models (default: that of each one's training run, or course)")
    add("--batch-size", type=whole_number(1), default=64, help="prompts answered at a time (default: %(default)s)")
    add_judging_flags(parser)
    add = parser.add_argument_group("results").add_argument
    add("--out", metavar="FILE", help="JSONL: the prompts with `answer_a`, `answer_b`, `score_a` and `score_b`")
    add_device_flags(parser, half=False)
    return parser
