"""Printing for commands and scripts: labels in colour, pairs, samples, the table of results."""

import shlex
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from os.path import commonprefix
from pathlib import Path
from typing import Any, TextIO

from minift.batching import Loader
from minift.commands.flags import as_text, in_project
from minift.config import Config, flag_of, to_dict
from minift.encode import Example, count_supervised
from minift.files.marks import GREEN, PLAIN, has_colour, mark
from minift.files.text import printable, say
from minift.pairs import Ranking, collate_rankings
from minift.remarks import Encoded
from minift.run.exam import name_responses
from minift.tokenizer import Tokenizer
from minift.trainer import num_steps
from minift.words import words

say_wrapped = partial(say, wraps=True)  # all but tables and commands to copy

MAX_NGRAM = 4  # of BLEU: a text with fewer words has none
SHOWN, MAX_LINES = 3, 12  # examples or samples printed, and lines of each of their texts
LABEL = 30  # characters of the first column
MANY = 4  # equal lines after each other are counted: an untuned model repeats itself
# For a measure: the measures with its counts and its intervals, and what is counted.
COUNTED = {"pass_rate": ("checked", "pass_interval", "answers"), "accuracy": ("pairs", "interval", "pairs")}
PASSED = {True: ": passes its checks", False: ": fails its checks"}
MEASURED_STEPS, MEASURED_RANKINGS = 50, 1000  # how many are collated to measure tokens


def print_values(config: Config, script: str) -> None:
    """Print one line for each flag: its name, its resolved value, and whether flag, recipe or default set it."""
    rows = [(flag_of(name), as_text(value), config.origins[name]) for name, value in to_dict(config, script).items()]
    flag_width, value_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    say("".join(f"{flag:{flag_width}}  {value:{value_width}}  {origin}\n" for flag, value, origin in rows))


def print_summaries(*data_sets: Encoded) -> None:
    """Print what was kept of each data set, and the remarks about its rows."""
    for encoded in data_sets:
        if encoded.num_rows:
            say_wrapped(encoded.summary)
    say("")


def print_plan(batches: Loader, config: Config) -> None:
    """Print how many optimiser steps the run takes, how many tokens a step has, and if the warm-up is too long."""
    total_steps = num_steps(config, batches)
    measured = min(total_steps, MEASURED_STEPS)
    rows = [batch.rows for step in range(measured) for batch in batches.micro_batches(step)]
    tokens = sum(int((each >= 0).sum()) for each in rows) / measured  # as logged: a shared token counts in each row
    say(f"\n{total_steps:,} optimiser steps of about {tokens:,.0f} tokens")
    if config.warmup_steps >= total_steps:
        say_wrapped(
            f"--warmup-steps {config.warmup_steps:,}: the run ends before its learning rate reaches --lr {config.lr}"
        )


def show_labels(
    examples: Sequence[Example], tokenizer: Tokenizer, count: int = SHOWN, stream: TextIO | None = None
) -> None:
    """Print the first examples as text: supervised tokens green, or between ⟦ and ⟧ without colour.

    Special tokens are printed between ⟨ and ⟩, unlike text that spells their names, and line ends as ↵.
    `stream` is by default standard output.
    """
    stream = stream or sys.stdout
    colour = has_colour(stream)
    supervised = f"{GREEN}green{PLAIN}" if colour else "between ⟦ and ⟧"
    lines = [f"What the loss sees: tokens {supervised} are supervised, ⟨…⟩ is a special token, ↵ a line end."]
    for number, example in enumerate(examples[:count], start=1):
        num_supervised = count_supervised(example.labels)
        title = f"\n── example {number} of {len(examples):,}"
        lines.append(f"{title}: {len(example.input_ids)} tokens, {num_supervised} supervised")
        lines.append(mark(example, tokenizer, colour))
    say_wrapped("\n".join(lines), stream, is_escaped=True)  # by `mark`: `say` would escape the colours too


def show_pairs(rankings: Sequence[Ranking], num_pairs: int, tokenizer: Tokenizer, *, are_grouped: bool) -> None:
    """Print how many of `num_pairs` pairs grouping dropped, the first rankings, and how many tokens are saved."""
    if are_grouped:
        repeated = num_pairs - sum(len(ranking.responses) - 1 if ranking.best_only else 1 for ranking in rankings)
        kept = f"{len(rankings):,} prompts with all their pairs"
        say_wrapped(f"training: {kept}, {repeated} pairs dropped: they repeat another one")
    measured = rankings[:MEASURED_RANKINGS]
    tokens = sum(len(response) for ranking in measured for response in ranking.responses)
    saved = 1 - sum(len(collate_rankings([ranking]).input_ids) for ranking in measured) / tokens
    note = f" (measured on the first {len(measured):,})" if len(measured) < len(rankings) else ""
    say_wrapped(
        f"training: {saved:.0%} of the tokens saved: a prefix that responses share is computed once for all{note}"
    )
    show_rankings(rankings, tokenizer)


def show_rankings(rankings: Sequence[Ranking], tokenizer: Tokenizer, count: int = SHOWN) -> None:
    """Print the first rankings as text: the tokens that the responses of each share, then the rest of each response."""
    say_wrapped(
        "\nWhat the loss compares: rewards, read at each response's last token; the chosen one's should be higher."
    )
    for number, ranking in enumerate(rankings[:count], start=1):
        shared = len(commonprefix(ranking.responses))
        prefix = tokenizer.decode(ranking.responses[0][:shared], skip_special_tokens=False)
        noun = "prompt" if ranking.best_only else "pair" if len(ranking.responses) == 2 else "ranking"
        print_text(f"{noun} {number} of {len(rankings):,}: {shared} tokens that all responses share", prefix)
        names = name_responses(len(ranking.responses), best_only=ranking.best_only)
        for name, ids in zip(names, ranking.responses, strict=True):
            print_text(f"{name}: {len(ids) - shared} more", tokenizer.decode(ids[shared:], skip_special_tokens=False))


def print_answers(samples: Sequence[dict[str, Any]]) -> None:
    """Print the first samples of a language model: prompt, answers and reference."""
    for sample in samples[:SHOWN]:
        marks = {exam: PASSED[passed] for exam, passed in sample.get("passed", {}).items()}
        for part in ("prompt", "before", "after", "reference"):
            print_text(part + marks.get(part, ""), sample[part])


def print_rewards(samples: Sequence[dict[str, Any]]) -> None:
    """Print the first samples of a reward model: prompt, responses and their rewards."""
    for sample in samples[:SHOWN]:
        print_text("prompt", sample.get("prompt", "(in the responses)"))
        names = name_responses(len(sample["rewards_after"]))
        for name, before, after in zip(names, sample["rewards_before"], sample["rewards_after"], strict=True):
            print_text(f"{name}: reward {before:.2f} before, {after:.2f} after", sample[name])


def print_results(results: dict[str, dict[str, Any]], folder: Path, samples: Sequence[dict[str, Any]] = ()) -> None:
    """Print a run's results, before and after training, and what it left in its folder."""
    say("")
    print_table(results, samples)
    say_wrapped(f"\nfiles in {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


def print_chat(model: Path) -> None:
    """Print the command that asks a tuned model."""
    say(f"\nask it:\n  {shlex.join([sys.orig_argv[0], '-m', 'minift', 'chat', '--model', str(model)])}")


def print_best_of(judge: Path, recipe: str | None) -> None:
    """Print the command with which a new reward model chooses among the answers of a tuned model.

    That model is `sft` beside the judge, else the project's. Paths are right in the folder that the run started in.
    """
    beside = judge.parent / "sft"
    model = str(beside) if beside.is_dir() else in_project("runs/sft")
    prompts, checks = (in_project("data/heldout.jsonl"), "--run-checks") if recipe == "tiny" else ("PROMPTS.jsonl", "")
    words = [sys.orig_argv[0], "-m", "minift", "best-of", "--model", model, "--judge", str(judge), "--prompts", prompts]
    words += [checks] * bool(checks) + ["--out", str(judge.parent / "best-of.jsonl")]
    say(f"\nlet it choose among a tuned model's answers (of `make sft`, say):\n  {shlex.join(words)}")


def print_table(results: dict[str, dict[str, Any]], samples: Sequence[dict[str, Any]] = ()) -> None:
    """Print one row per measure (and category) and one column per exam ("before", "after").

    `results` maps a measure (`eval_loss`, those of `exam.compare_answers` or `scoring.examine`) to its value in each
    exam. `samples` have the answers that BLEU is of: it is 0 if none of them has four words.
    """
    rows: list[list[str]] = []
    for measure, label in (("bleu", "BLEU"), ("pass_rate", "pass rate"), ("accuracy", "accuracy")):
        exams = results.get(measure, {})
        for category in [*exams.values()][-1] if exams else []:
            name = label if category == "all" else f"  {category}"
            if measure in COUNTED:
                counts, _, noun = COUNTED[measure]
                count = [*results[counts].values()][-1][category]
                name += f", {count:,} {noun if count != 1 else noun.removesuffix('s')}"
            rows.append([name, *(_cell(results, measure, exam, category, samples) for exam in exams)])
    for measure, label, form in (
        ("ties", "ties, counted as wrong", ","),
        ("mean_probability", "mean probability of chosen", ".3f"),
        ("calibration_error", "calibration error", ".3f"),
        ("brier", "Brier score", ".3f"),
        ("eval_loss", "eval loss", ".3f"),
        ("eval_lm_loss", "eval lm loss, per token", ".3f"),
    ):
        if measure in results:
            rows.append([label, *(format(value, form) for value in results[measure].values())])
    columns = [*next(iter(results.values()), {})]
    print_columns([["", *columns], *rows] if any(columns) else rows)


def print_columns(rows: Sequence[Sequence[str]], stream: TextIO | None = None) -> None:
    """Print rows of texts: the first text of each on the left, the others in columns, aligned on the right.

    Columns that do not fit on a terminal beside the others follow below, with the labels again.
    """
    stream = stream or sys.stdout
    widths = [max(map(len, column)) + 4 for column in zip(*rows, strict=True)][1:]
    room = shutil.get_terminal_size().columns - LABEL if stream.isatty() else sum(widths)
    start = 0
    while start < len(widths):
        fitting = [count for count in range(1, len(widths) - start + 1) if sum(widths[start : start + count]) <= room]
        end = start + max(fitting, default=1)
        for label, *cells in rows:
            aligned = [f"{cell:>{width}}" for cell, width in zip(cells[start:end], widths[start:end], strict=True)]
            say(f"{label:{LABEL}}" + "".join(aligned), stream)
        start = end


def _cell(
    results: dict[str, dict[str, Any]], measure: str, exam: str, category: str, samples: Sequence[dict[str, Any]]
) -> str:
    value = results[measure][exam][category]
    if measure == "bleu":
        answers = [sample[exam] for sample in samples if category in ("all", sample["kind"])]
        is_short = value == 0 and answers and all(len(words(answer)) < MAX_NGRAM for answer in answers)
        return f"{value:.1f}" + (" (too few words)" if is_short else "")
    low, high = results[COUNTED[measure][1]][exam][category]
    return f"{value:.1%} ({low:.1%}-{high:.1%})"


def print_text(title: str, text: str) -> None:
    """Print a text of a row or a model under a title, its first lines only; a line that is repeated, once."""
    lines: list[str] = []
    for line, copies in groupby(printable(text).strip("\n").splitlines() or ["(nothing)"]):
        count = len(list(copies))
        lines += [line] * count if count < MANY or not line.strip() else [line, f"… ({count} such lines)"]
    if len(lines) > MAX_LINES:
        lines[MAX_LINES:] = ["…"]
    say_wrapped("\n".join(["", f"── {title}", *lines]))
