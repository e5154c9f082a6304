"""`minift score`: the rewards of responses, or of both sides of preference pairs."""

import sys
from statistics import fmean

from minift.commands import terminal
from minift.commands.cli import CommandParser, add_device_flags, check_out, whole_number
from minift.errors import UserError
from minift.files.datasets import SCORE_SCHEMAS, check_added, load_rows, print_remarks
from minift.files.pretrained import load_judge
from minift.files.text import say, write_json_lines
from minift.prompts import question_of
from minift.remarks import Encoded, about_preferences, category_of
from minift.run.device import placement
from minift.scoring import examine, score_rows


def main(arguments: list[str] | None = None) -> None:
    """Score every response; print a summary, for pairs the accuracy by category."""
    args = _parser().parse_args(arguments)
    placed = placement(args.device, args.dtype)
    check_out(args.out, "--data", args.data)
    rows = load_rows(args.data, SCORE_SCHEMAS)
    are_pairs = "chosen" in rows[0] and "rejected" in rows[0]
    fields = {"score_chosen": "chosen", "score_rejected": "rejected"} if are_pairs else {"score": "response"}
    if args.out is not None:
        check_added(rows, [*fields], args.data)
    judge = load_judge(args.model, template=args.template, batch_size=args.batch_size, **placed)

    encoded: Encoded[list[int]] = Encoded(args.data, "pair" if are_pairs else "row", len(rows))
    for number, row in enumerate(rows):
        for name in fields.values():
            try:
                encoded.keep(judge.encode(question_of(row), row[name]), row, number)
            except ValueError as error:
                raise UserError(f"{args.data}: {row.location}: {name}: {error}") from None
        for remark in about_preferences(row, encoded.examples[-len(fields) :], judge.tokenizer, judge.template):
            encoded.remark(remark, row.location)
    print_remarks(encoded, sys.stdout)
    rewards = iter(score_rows(judge.model, encoded.examples, judge.batch_size))
    scored = [{field: next(rewards) for field in fields} for _ in rows]

    if args.out is not None:
        write_json_lines(args.out, (row.given | its_rewards for row, its_rewards in zip(rows, scored, strict=True)))
    if are_pairs:
        exam = examine([[*its_rewards.values()] for its_rewards in scored], [category_of(row) for row in rows])
        terminal.print_table({measure: {"": value} for measure, value in exam.items()})
    else:
        ranked = sorted(its_rewards["score"] for its_rewards in scored)
        spread = f"lowest {ranked[0]:.3f}, median {ranked[len(ranked) // 2]:.3f}, highest {ranked[-1]:.3f}"
        say(f"{len(ranked):,} responses: {spread}, mean {fmean(ranked):.3f}")


def _parser() -> CommandParser:
    parser = CommandParser(
        "minift score", arguments="--model MODEL --data FILE [flags]",
        description="Score responses, or both sides of preference pairs.",
        examples=(
            "--model runs/rm --data data/heldout_pairs.jsonl",
            "--model runs/rm --data data/heldout_pairs.jsonl --out scores.jsonl",
            "--model runs/rm --data dialogues.csv --template none",
        ),
    )  # fmt: skip
    add = parser.add_argument_group("model and rows").add_argument
    add("--model", required=True, help="a reward model's folder or hub id, such as runs/rm, or adapters of one")
    add("--data", required=True, metavar="FILE", help='file or hub data set of {"prompt": …, "response": …} or '
        '{"prompt": …, "chosen": …, "rejected": …}; "instruction", "input" can replace "prompt"; pairs of whole '
        "dialogues have neither")  # fmt: skip
    add("--out", metavar="FILE", help="JSONL: the same rows with `score`, or `score_chosen` and `score_rejected`")
    add("--template", help="template the model was trained with (default: that of the training run, or dialogue)")
    add("--batch-size", type=whole_number(1), default=32, help="rows scored at a time (default: %(default)s)")
    add_device_flags(parser, half=False)
    return parser
