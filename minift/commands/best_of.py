"""`minift best-of`: sample answers to each prompt; a reward model chooses one, and checks say how often it passes."""

import math
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TextIO

from minift.commands import terminal
from minift.commands.cli import CommandParser, add_device_flags, add_judging_flags, check_out, whole_number
from minift.commands.generate import complete, encode_prompts, texts_of
from minift.commands.winrate import questions_of, rewards_of
from minift.errors import UserError
from minift.files.datasets import PROMPT_SCHEMAS, check_added, load_rows
from minift.files.pretrained import load_judge, load_language_model
from minift.files.text import write_json_lines
from minift.generate import Options
from minift.progress import progress_bar
from minift.remarks import by_category, category_of
from minift.run.device import placement
from minift.run.sandbox import Check, check_answers, check_available, checks_of
from minift.scoring import Z_95, mean_best_of, vote, wilson_interval

ADDED = ("samples", "rewards", "best")  # to the rows
CHECKED = ("passed", "greedy", "greedy_passed")  # too, with --run-checks; None in rows without checks
MINUS_GREEDY = ", less greedy"  # ends the label of a difference


def main(arguments: list[str] | None = None) -> None:
    """Sample answers, let the judge score them, write them and the best one; print how often it passes its checks."""
    args = _parser().parse_args(arguments)
    placed = placement(args.device, args.dtype)
    _check_flags(args)
    rows = load_rows(args.prompts, PROMPT_SCHEMAS, mixed=True)[: args.limit]
    check_added(rows, (*ADDED, *(CHECKED if args.run_checks else ())), args.prompts)
    checks: list[list[Check]] = [[] for _ in rows]
    if args.run_checks:
        check_available()
        checks = [checks_of(row, f"{args.prompts}: {row.location}") or [] for row in rows]
        if not any(checks):
            raise UserError(f"--run-checks: no row of {args.prompts} has 'checks', leave the flag out")

    judge = load_judge(args.judge, template=args.judge_template, flag="--judge-template", **placed)
    questions = questions_of(rows, judge, args.prompts)
    model = load_language_model(args.model, template=args.template, **placed)
    max_positions = model.model.config.max_position_embeddings
    prompts = encode_prompts(
        questions, model.tokenizer, model.template, max_positions, args.max_new_tokens, args.prompts
    )

    def answer(numbers: Sequence[int], temperature: float, num_samples: int) -> list[list[str]]:
        """Return answers to the prompts with these numbers."""
        options = Options(args.max_new_tokens, temperature=temperature, num_samples=num_samples,
                          batch_size=args.batch_size, seed=args.seed)  # fmt: skip
        completions = complete(model, [prompts[n] for n in numbers], options, "samples" if temperature else "greedy")
        return texts_of([questions[n] for n in numbers], completions, model)

    def keep() -> None:
        """Write the lines so far: whatever stops the command later, the samples are kept."""
        if args.out is not None:
            write_json_lines(args.out, lines)

    samples = answer(range(len(rows)), args.temperature, args.samples)
    lines: list[dict[str, Any]] = [row.given | {"samples": texts} for row, texts in zip(rows, samples, strict=True)]
    keep()
    all_rewards = rewards_of(judge, questions, samples)
    if max(map(max, all_rewards)) == -math.inf:
        raise UserError("--judge: it can read none of the samples; ask for fewer --max-new-tokens")
    for line, rewards in zip(lines, all_rewards, strict=True):
        favourite = vote(line["samples"], rewards) if args.vote else rewards.index(max(rewards))  # the first of equals
        line |= {"rewards": rewards, "best": None if max(rewards) == -math.inf else line["samples"][favourite]}
    keep()
    if args.rows is not None:
        favourites = [question | {"output": line["best"]} for question, line in zip(questions, lines, strict=True)]
        write_json_lines(args.rows, (row for row in favourites if row["output"] is not None))
    examined = [number for number, its_checks in enumerate(checks) if its_checks]
    if args.run_checks:
        answers = [[text, *samples[n]] for n, (text,) in zip(examined, answer(examined, 0.0, 1), strict=True)]
        verdicts = _run(answers, [checks[number] for number in examined])
        lines = [line | dict.fromkeys(CHECKED) for line in lines]
        for number, (text, *_), (greedy_passed, *passed) in zip(examined, answers, verdicts, strict=True):
            lines[number] |= {"passed": passed, "greedy": text, "greedy_passed": greedy_passed}
    write_json_lines(args.out, lines)
    if args.run_checks:  # where the lines are printed, standard output has nothing else
        _print_table([lines[number] for number in examined], sys.stderr if args.out is None else sys.stdout)


def _check_flags(args: Namespace) -> None:
    if not 1e-9 <= args.temperature < math.inf:
        raise UserError(f"--temperature {args.temperature}: expected a number of at least 1e-9: samples must differ")
    check_out(args.out, "--prompts", args.prompts, hint="; without --out the lines are printed")
    check_out(args.rows, "--prompts", args.prompts, own_flag="--rows")
    if args.out is not None and args.rows is not None and Path(args.out).resolve() == Path(args.rows).resolve():
        raise UserError(f"--rows {args.rows}: this is the file of --out, expected another one")


def _run(answers: Sequence[Sequence[str]], checks: Sequence[Sequence[Check]]) -> list[list[bool]]:
    """Return which answers of each row pass its checks; equal answers to a row run once."""
    distinct = list(dict.fromkeys((number, text) for number, texts in enumerate(answers) for text in texts))
    with progress_bar(len(distinct), "checks", "answer") as bar:
        found = check_answers([text for _, text in distinct], [checks[number] for number, _ in distinct], bar.update)
    passed = dict(zip(distinct, found, strict=True))
    return [[bool(passed[number, text]) for text in texts] for number, texts in enumerate(answers)]


def _print_table(lines: Sequence[dict[str, Any]], stream: TextIO) -> None:
    """Print the pass rates of the rows that were checked, of all and by category, each with its 95% interval."""
    groups = by_category(lines, [category_of(line) for line in lines])
    rates = [rates_by_label(group) for group in groups.values()]
    head = ["pass rate", *(f"{name}, {len(group):,} prompts" for name, group in groups.items())]
    cells = [[label, *(_cell(of_group[label], label) for of_group in rates)] for label in rates[0]]
    terminal.print_columns([head, *cells], stream)


def rates_by_label(lines: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Return the rows of the table: for each label one number per prompt, whose mean is the rate."""
    num_samples = len(lines[0]["samples"])
    greedy = [float(line["greedy_passed"]) for line in lines]
    rates = {"greedy": greedy}
    for k in sorted({2**power for power in range(num_samples.bit_length())} | {num_samples}):
        best = [mean_best_of(line["passed"], line["rewards"], k) for line in lines]
        rates["mean of the samples: best of 1" if k == 1 else f"best of {k}"] = best
    rates[f"majority of {num_samples}"] = _passed_by_vote(lines, weighted=False)
    voted = _passed_by_vote(lines, weighted=True)
    rates[f"vote of {num_samples}, by e^reward"] = voted
    rates[f"any of {num_samples}"] = [float(any(line["passed"])) for line in lines]
    for name, values in (("best", best), ("vote", voted)):
        rates[f"{name} of {num_samples}{MINUS_GREEDY}"] = [a - b for a, b in zip(values, greedy, strict=True)]
    return rates


def _passed_by_vote(lines: Sequence[dict[str, Any]], *, weighted: bool) -> list[float]:
    """Return 1 for each prompt whose voted answer passes, else 0; unweighted, each sample has one vote."""
    rewards = [line["rewards"] if weighted else [0.0] * len(line["samples"]) for line in lines]
    return [float(line["passed"][vote(line["samples"], its)]) for line, its in zip(lines, rewards, strict=True)]


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95% interval of the mean of independent values, mean ± z·s / √n; infinite for a single one."""
    radius = Z_95 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return fmean(values) - radius, fmean(values) + radius


def _cell(values: Sequence[float], label: str) -> str:
    """Return a mean and its 95% interval; prompts are independent, and both sides of a difference answer the same."""
    if label.endswith(MINUS_GREEDY):
        low, high = mean_interval(values)
        return f"{fmean(values):+.1%} ({low:+.1%} to {high:+.1%})"
    low, high = wilson_interval(sum(values), len(values))
    return f"{fmean(values):.1%} ({low:.1%}-{high:.1%})"


def _parser() -> CommandParser:
    about = "Sample several answers to each prompt; a reward model chooses one (best of n)."
    parser = CommandParser(
        "minift best-of", arguments="--model MODEL --judge JUDGE --prompts FILE [flags]", description=about,
        examples=(
            "--model runs/sft --judge runs/rm --prompts data/heldout.jsonl --run-checks",
            "--model runs/sft --judge runs/rm --prompts p.csv --samples 8 --vote --out best.jsonl",
            "--model runs/sft --judge runs/rm --prompts p.csv --rows rows-to-train-on.jsonl",
        ),
    )  # fmt: skip
    add = parser.add_argument_group("model and sampling").add_argument
    add("--model", required=True, help="a language model's folder or hub id, such as runs/sft")
    add("--template", help="template of the language model (default: that of its training run, or course)")
    add("--samples", type=whole_number(1), default=16, help="answers to each prompt (default: %(default)s)")
    add("--temperature", type=float, default=0.7, help="of sampling (default: %(default)s)")
    add("--seed", type=whole_number(0), default=42, help="of sampling (default: %(default)s)")
    add("--batch-size", type=whole_number(1), default=64, help="answers sampled at a time (default: %(default)s)")
    add_judging_flags(parser)
    add = parser.add_argument_group("choice and results").add_argument
    add("--vote", action="store_true", help="choose the answer whose copies have the largest sum of e^reward, not "
        "the one with the highest reward")  # fmt: skip
    add("--out", metavar="FILE", help="JSONL: the prompts with `samples`, `rewards` and the `best` one (default: "
        "standard output)")  # fmt: skip
    add("--rows", metavar="FILE", help="JSONL: the prompts with the best sample as `output`: rows to train on")
    add("--run-checks", action="store_true", help="run the samples, and a greedy answer, against the `checks` of rows "
        "that have some, and print how often each passes; only for rows that you trust")  # fmt: skip
    add_device_flags(parser, half=False)
    return parser
