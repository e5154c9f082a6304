"""`python -m tests.experiments`, or `make experiments`: change one thing, train with three seeds, compare.

Each experiment is the run of `make sft` with fewer steps and one change. Some changes are flags of train_sft.py. Others
are mistakes that no flag makes: a function is replaced while the run lasts. Each line of the table has BLEU and pass
rates, the mean over the seeds with the lowest and the highest. A run that is finished is read, not repeated.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import train_sft
from minift.batching import Batch, collate
from minift.beam import beam_search
from minift.commands.cli import CommandParser, run_command, whole_number
from minift.commands.flags import parse
from minift.encode import IGNORE_INDEX, Example, encode_completion
from minift.errors import UserError
from minift.files.datasets import TRAINING_SCHEMAS, load_rows
from minift.files.pretrained import load_language_model
from minift.files.text import say
from minift.generate import Completions, Options
from minift.losses import completion_cross_entropy
from minift.model import OPT
from minift.run import exam
from tests.runs import run

FOLDER = Path("runs/experiments")
GROUPS = ("new combination", "new family")
LORA = "--lr 3e-3 --lora-alpha 32 --lora-targets q_proj,k_proj,v_proj,out_proj,fc1,fc2"  # every matrix of a layer


class Experiment(NamedTuple):
    """A change to the run of `make sft`: flags, and what to replace while it lasts."""

    what: str
    flags: str = ""
    mistake: Callable[[], AbstractContextManager[Any]] = nullcontext


def mean_of_each_row(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Count a batch of one row as one item, however many tokens it has."""
    total, count = completion_cross_entropy(hidden, head, targets)
    return total / count, torch.ones_like(count)


def one_long_row(examples: Sequence[Example]) -> Batch:
    """Pack rows without saying where they end, as far as attention is concerned."""
    alone = [collate([example])[:3] for example in examples]  # rows of one batch would share the start of the template
    input_ids, positions, labels = (torch.cat(parts) for parts in zip(*alone, strict=True))  # (N,)
    return Batch(input_ids, positions, labels, rows=torch.arange(len(input_ids))[None])


def end_unsupervised(*pieces: Any) -> tuple[Example, bool]:
    example, is_joined = encode_completion(*pieces)
    return example._replace(labels=[*example.labels[:-1], IGNORE_INDEX]), is_joined


def five_beams(
    model: OPT, prompts: Sequence[Sequence[int]], options: Options, on_progress: Callable[[int], Any], limits: object
) -> Completions:
    return beam_search(model, prompts, replace(options, num_beams=5), on_progress)


EXPERIMENTS = {
    "plain": Experiment("nothing is changed"),
    "mask": Experiment("no label mask: the prompt is supervised too", "--supervise all"),
    "means": Experiment(
        "the mean of eight rows' means, not of all their tokens", "--batch-size 1 --grad-accum 8",
        lambda: mock.patch.object(train_sft, "completion_cross_entropy", mean_of_each_row),
    ),
    "leak": Experiment(
        "a packed row sees the rows before it", "", lambda: mock.patch.object(train_sft, "collate", one_long_row),
    ),
    "end": Experiment(
        "the end token is not supervised", "",
        lambda: mock.patch("minift.encode.encode_completion", end_unsupervised),
    ),
    "rank-4": Experiment("LoRA of rank 4", f"--lora-rank 4 {LORA}"),
    "rank-16": Experiment("LoRA of rank 16", f"--lora-rank 16 {LORA}"),
    "beams": Experiment("nothing is changed, but 5 beams answer"),
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Run experiments and print a line for each."""
    parser = CommandParser(
        "python -m tests.experiments",
        arguments="[NAME ...] [flags]",
        description="Change one thing, train with three seeds.",
    )
    add = parser.add_argument
    add("names", nargs="?", default=",".join(EXPERIMENTS), help="some of these, with commas (default: %(default)s)")
    add("--seeds", type=whole_number(0), nargs="+", default=[42, 43, 44], help="(default: 42 43 44)")
    add("--steps", type=whole_number(1), default=600, help="optimiser steps of 8 rows (default: %(default)s)")
    add("--flags", default="", help="more flags of train_sft.py, for all runs")
    args = parser.parse_args(arguments)
    names = args.names.split(",")
    if unknown := [name for name in names if name not in EXPERIMENTS]:
        raise UserError(f"{unknown[0]!r} is no experiment, expected some of {','.join(EXPERIMENTS)}")
    say(
        " | ".join(["| what is changed", "BLEU", *(f"pass rate, {group}" for group in GROUPS)])
        + " |\n|---|---|---|---|"
    )
    for name in names:
        flags = f"--max-steps {args.steps} --eval-every 0 {args.flags}"
        found = [results_of(name, seed, args.steps, f"{flags} --seed {seed}".split()) for seed in args.seeds]
        cells = [_cell([results["bleu"]["after"]["all"] for results in found], "{:.1f}")]
        cells += [_cell([results["pass_rate"]["after"][group] for results in found], "{:.1%}") for group in GROUPS]
        say(" | ".join([f"| {EXPERIMENTS[name].what} (`{name}`)", *cells]) + " |")


def results_of(name: str, seed: int, steps: int, flags: list[str]) -> dict[str, Any]:
    """Return the results of an experiment, as run.json has them."""
    if name == "beams":
        results_of("plain", seed, steps, flags)  # so that there is a model
        return answer_by_beams(FOLDER / f"plain-{steps}-{seed}", flags)
    folder = FOLDER / f"{name}-{steps}-{seed}"
    record = folder / "run.json"
    if not record.exists() or "results" not in json.loads(record.read_text(encoding="utf-8")):
        with EXPERIMENTS[name].mistake():
            run("sft", *EXPERIMENTS[name].flags.split(), *flags, "--out", folder)
    return json.loads(record.read_text(encoding="utf-8"))["results"]


def answer_by_beams(folder: Path, flags: list[str]) -> dict[str, Any]:
    """Examine a run's model again, by beam search instead of greedy decoding."""
    loaded, config = load_language_model(folder), parse("sft", flags)
    rows = load_rows(config.eval_data, TRAINING_SCHEMAS)
    max_positions = loaded.model.config.max_position_embeddings
    questions = exam.held_out_prompts(rows, loaded.tokenizer, loaded.template, config, max_positions)
    with mock.patch.object(exam, "generate", five_beams):
        answers = exam.sit_exam(loaded.model, loaded.tokenizer, questions, "5 beams")
    return exam.compare_answers(questions, answers, answers)


def _cell(values: Sequence[float], form: str) -> str:
    """Return the mean of values, with the lowest and the highest."""
    low, mean, high = (form.format(value) for value in (min(values), fmean(values), max(values)))
    return f"{mean} ({low}–{high})"


if __name__ == "__main__":
    run_command(main)
