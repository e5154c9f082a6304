"""Two language models answer the same prompts, and a reward model says which one wins how often.

`python -m minift.winrate --model-a A --model-b B --judge RM --prompts F`
"""

import argparse
import json
import sys
from typing import Any

from minift.errors import CommandParser, UserError, run_command, whole_number
from minift.files import check_out, write_text


def main(arguments: list[str] | None = None) -> None:
    """The command: both models answer, the judge scores, and the wins are counted with their interval."""
    import torch
    from huggingface_hub.utils import tqdm

    from minift.answers import load_and_prompt
    from minift.datasets import PROMPT_KINDS, Row, load_rows
    from minift.generate import Options, generate
    from minift.scoring import load_judge, score_rows, win_rate
    from minift.trainer import pick_device
    from minift.weights import resolve

    args = _parser().parse_args(arguments)
    device, dtype = pick_device(args.device), getattr(torch, args.dtype)
    check_out(args.out, "--prompts", args.prompts)
    rows = load_rows(args.prompts, PROMPT_KINDS, mixed=True)[: args.limit]
    judge = load_judge(resolve(args.judge), args.judge_template, flag="--judge-template", device=device, dtype=dtype)

    def answer_all(name: str, flag: str) -> list[str]:
        """One model's greedy answers to all prompts; it is gone before the other one is loaded."""
        model, tokenizer, prompts = load_and_prompt(
            name,
            [row if "instruction" in row else Row({"instruction": row["prompt"]}, row.place) for row in rows],
            args.template,
            source=f"{args.prompts}: {flag}",
            max_new_tokens=args.max_new_tokens,
            device=device,
            dtype=dtype,
        )
        options = Options(
            max_new_tokens=args.max_new_tokens, eos_token_id=tokenizer.eos_token_id, batch_size=args.batch_size
        )
        with tqdm(total=len(prompts), desc=flag, unit="answer") as bar:
            return [tokenizer.decode(ids) for (ids,) in generate(model, prompts, options, bar.update)]

    answers = {"a": answer_all(args.model_a, "--model-a"), "b": answer_all(args.model_b, "--model-b")}
    encoded = []
    for number, row in enumerate(rows):
        for side in ("a", "b"):
            try:
                encoded.append(judge.encode(_query(row), answers[side][number]))
            except ValueError as error:
                raise UserError(f"{args.prompts}: {row.place}: --model-{side}'s answer: {error}") from None
    scores = score_rows(judge.model, encoded, judge.batch_size)
    score_a, score_b = scores[::2], scores[1::2]

    rate = win_rate(a - b for a, b in zip(score_a, score_b, strict=True))
    found = {
        "model_a": args.model_a,
        "model_b": args.model_b,
        "judge": args.judge,
        "prompts": rate.pairs,
        "wins_a": rate.wins,
        "wins_b": rate.pairs - rate.wins - rate.ties,
        "ties": rate.ties,
        "win_rate_a": rate.rate,
        "interval_95": [rate.low, rate.high],
        "mean_score_a": sum(score_a) / len(rows),
        "mean_score_b": sum(score_b) / len(rows),
    }
    if args.out is not None:
        columns = zip(rows, answers["a"], answers["b"], score_a, score_b, strict=True)
        names = ("answer_a", "answer_b", "score_a", "score_b")
        lines = [json.dumps(row | dict(zip(names, rest, strict=True))) + "\n" for row, *rest in columns]
        write_text(args.out, "".join(lines))
    print(json.dumps(found))
    print(
        f"{args.model_a} wins {rate.rate:.1%} of {rate.pairs:,} prompts (95%: {rate.low:.1%} to {rate.high:.1%}), "
        f"{args.model_b} {found['wins_b'] / rate.pairs:.1%}, {rate.ties} ties",
        file=sys.stderr,
    )


def _query(row: dict[str, Any]) -> str:
    """What the judge is told was asked: the instruction, and its input after a blank line, as `dialogue` has it."""
    if "instruction" not in row:
        return row["prompt"]
    return row["instruction"] + (f"\n\n{row['input']}" if row.get("input") else "")


def _parser() -> argparse.ArgumentParser:
    about = "Two language models answer the same prompts greedily; a reward model says which wins how often."
    parser = CommandParser("python -m minift.winrate", description=about)
    add = parser.add_argument
    add("--model-a", required=True, help="a language model's directory or hub id, such as runs/sft")
    add("--model-b", required=True, help="another one's, such as data/model")
    add("--judge", required=True, help="a reward model's directory or hub id, such as runs/rm")
    add("--prompts", required=True, help='JSON or JSONL: {"prompt": …} or {"instruction": …, "input": …}; both go '
        "through the templates")  # fmt: skip
    add("--out", help="JSONL: the prompts with `answer_a`, `answer_b`, `score_a` and `score_b`")
    add("--limit", type=whole_number(1), help="only the first so many prompts")
    add("--template", help="what the language models were tuned with (what each one's run.json says, or course)")
    add("--judge-template", help="what the reward model was trained with (what its run.json says, or dialogue)")
    add("--max-new-tokens", type=whole_number(1), default=128, help="the most tokens of an answer (%(default)s)")
    add("--batch-size", type=whole_number(1), default=64, help="prompts answered at a time (%(default)s)")
    add("--device", default="auto", help="cpu, cuda, cuda:N; auto takes a GPU if there is one")
    add("--dtype", choices=("float32", "bfloat16", "float64"), default="float32", help="(%(default)s)")
    return parser


if __name__ == "__main__":
    run_command(main)
