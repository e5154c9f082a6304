"""`minift winrate`: two language models answer the same prompts; a reward model says how often each one wins."""

import sys

import torch

from minift.commands.cli import CommandParser, add_device_flags, check_out, whole_number
from minift.commands.generate import complete, encode_prompts
from minift.errors import UserError
from minift.files.datasets import PROMPT_SCHEMAS, Row, check_added, load_rows
from minift.files.pretrained import load_judge, load_language_model
from minift.files.text import to_json, write_json_lines
from minift.generate import Options
from minift.prompts import question_of
from minift.run.device import pick_device
from minift.scoring import score_rows, win_rate

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
    # Every prompt goes through the models' templates, as an instruction.
    questions = [Row(question_of(row) or {}, row.location) for row in rows]

    def encode(row: Row, text: str, what: str) -> list[int]:
        """Return the ids that the judge scores; raise UserError naming the row."""
        try:
            return judge.encode(row, text)
        except (ValueError, UserError) as error:
            raise UserError(f"{args.prompts}: {row.location}: {what}: {error}") from None

    for row in questions:
        encode(row, "", "the question alone")  # before any work

    def answer(name: str, flag: str) -> list[str]:
        """Return one model's greedy answers; its memory is free before the next model is loaded."""
        language_model = load_language_model(name, template=args.template, **placement)
        prompts = encode_prompts(language_model, questions, f"{args.prompts}: {flag}", args.max_new_tokens)
        tokenizer = language_model.tokenizer
        options = Options(
            max_new_tokens=args.max_new_tokens, eos_token_id=tokenizer.eos_token_id, batch_size=args.batch_size
        )
        return [tokenizer.decode(ids) for (ids,) in complete(language_model, prompts, options, flag)]

    answers_a, answers_b = answer(args.model_a, "--model-a"), answer(args.model_b, "--model-b")
    encoded = [
        encode(row, text, f"--model-{side}'s answer")
        for row, *answers in zip(questions, answers_a, answers_b, strict=True)
        for side, text in zip("ab", answers, strict=True)
    ]
    scores = score_rows(judge.model, encoded, judge.batch_size)
    scores_a, scores_b = scores[::2], scores[1::2]

    rate = win_rate(a - b for a, b in zip(scores_a, scores_b, strict=True))
    wins_b = rate.pairs - rate.wins - rate.ties
    if args.out is not None:
        columns = zip(rows, answers_a, answers_b, scores_a, scores_b, strict=True)
        write_json_lines(args.out, (row | dict(zip(ADDED, added, strict=True)) for row, *added in columns))
    found = {
        "model_a": args.model_a,
        "model_b": args.model_b,
        "judge": args.judge,
        "prompts": rate.pairs,
        "wins_a": rate.wins,
        "wins_b": wins_b,
        "ties": rate.ties,
        "win_rate_a": rate.rate,
        "interval_95": [rate.low, rate.high],
        "mean_score_a": sum(scores_a) / len(rows),
        "mean_score_b": sum(scores_b) / len(rows),
    }
    print(to_json(found))
    print(
        f"{args.model_a} wins {rate.rate:.1%} of {rate.pairs:,} prompts (95%: {rate.low:.1%} to {rate.high:.1%}), "
        f"{args.model_b} {wins_b / rate.pairs:.1%}, {rate.ties} ties",
        file=sys.stderr,
    )


def _parser() -> CommandParser:
    about = "Two language models answer the same prompts greedily; a reward model says how often each one wins."
    parser = CommandParser("minift winrate", description=about)
    add = parser.add_argument
    add("--model-a", required=True, help="a language model's folder or hub id, such as runs/sft")
    add("--model-b", required=True, help="another one's, such as data/model")
    add("--judge", required=True, help="a reward model's folder or hub id, such as runs/rm")
    add("--prompts", required=True, help='JSON or JSONL: {"prompt": …} or {"instruction": …, "input": …}; both go '
        "through the templates")  # fmt: skip
    add("--out", help="JSONL: the prompts with `answer_a`, `answer_b`, `score_a` and `score_b`")
    add("--limit", type=whole_number(1), help="only that many prompts, the first ones")
    add("--template", help="template of the language models (default: that of each one's training run, or course)")
    add("--judge-template", help="template of the reward model (default: that of its training run, or dialogue)")
    add(
        "--max-new-tokens", type=whole_number(1), default=128, help="tokens of an answer at most (default: %(default)s)"
    )
    add("--batch-size", type=whole_number(1), default=64, help="prompts answered at a time (default: %(default)s)")
    add_device_flags(parser, half=False)
    return parser
