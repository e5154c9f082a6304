"""A reward model over responses or pairs: `python -m minift.score --model M --data F.jsonl --out O.jsonl`."""

import argparse
import json

from minift.errors import CommandParser, UserError, run_command, whole_number
from minift.files import check_out, write_text


def main(arguments: list[str] | None = None) -> None:
    """The command: a score for every response, and a summary over pairs."""
    import torch

    from minift.datasets import SCORE_KINDS, load_rows
    from minift.scoring import examine, load_judge, score_rows, table
    from minift.trainer import pick_device
    from minift.weights import resolve

    args = _parser().parse_args(arguments)
    device = pick_device(args.device)
    check_out(args.out, "--data", args.data)
    rows = load_rows(args.data, SCORE_KINDS)
    folder, dtype = resolve(args.model), getattr(torch, args.dtype)
    judge = load_judge(folder, args.template, batch_size=args.batch_size, device=device, dtype=dtype)

    names = ("chosen", "rejected") if "chosen" in rows[0] and "rejected" in rows[0] else ("response",)
    encoded = []
    for row in rows:
        for name in names:
            try:
                encoded.append(judge.encode(row.get("prompt"), row[name]))
            except ValueError as error:
                raise UserError(f"{args.data}: {row.place}: {name}: {error}") from None
    scores = iter(score_rows(judge.model, encoded, judge.batch_size))
    scored = [[next(scores) for _ in names] for _ in rows]

    fields = ("score_chosen", "score_rejected") if len(names) == 2 else ("score",)
    lines = [json.dumps(row | dict(zip(fields, its, strict=True))) for row, its in zip(rows, scored, strict=True)]
    if args.out is not None:
        write_text(args.out, "".join(f"{line}\n" for line in lines))
    if len(names) == 2:
        print(*table({"": examine(scored, [row.get("kind") for row in rows])}), sep="\n")
    else:
        _print_spread([its[0] for its in scored])


def _print_spread(scores: list[float]) -> None:
    ranked = sorted(scores)
    mean = sum(ranked) / len(ranked)
    print(f"{len(ranked):,} responses: lowest {ranked[0]:.3f}, median {ranked[len(ranked) // 2]:.3f}, "
          f"highest {ranked[-1]:.3f}, mean {mean:.3f}")  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser("python -m minift.score", description="Scores responses, or both sides of pairs.")
    add = parser.add_argument
    add("--model", required=True, help="a reward model's directory or hub id, such as runs/rm")
    add("--data", required=True, help='file or hub data set of {"prompt": …, "response": …} or {"prompt": …, '
        '"chosen": …, "rejected": …}; pairs of whole dialogues have no prompt')  # fmt: skip
    add("--out", help="JSONL: the same rows with `score`, or `score_chosen` and `score_rejected`")
    add("--template", help="the one the model was trained with (what its run.json says, or dialogue)")
    add("--batch-size", type=whole_number(1), default=32, help="rows scored at a time (%(default)s)")
    add("--device", default="auto", help="cpu, cuda, cuda:N; auto takes a GPU if there is one")
    add("--dtype", choices=("float32", "bfloat16", "float64"), default="float32", help="(%(default)s)")
    return parser


if __name__ == "__main__":
    run_command(main)
