"""One training run and its folder. Other modules write only what `Run` asks them to.

run.json        resolved values, template, versions, fingerprints, commits; after training, the results
metrics.jsonl   one object per logged step or evaluation
samples.jsonl   held-out rows with the model's answers or rewards before and after
row.json        one row as the loss sees it: its tokens, with their losses or the rewards after training
before.json     the answers or rewards before training, and which answers passed, for --resume
report.html     all of this as one page
checkpoints/    see checkpoint.py
.lock           locked by the process that trains; a killed one leaves it behind, unlocked
"""

import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import date
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minift.config import Config, to_dict
from minift.errors import UserError
from minift.files.hub import at_commit, commit_of, data_files
from minift.files.pretrained import ModelFiles, find_model
from minift.files.text import (
    append_json_line,
    name_errors,
    parse_json_lines,
    read_json,
    read_text,
    say,
    sha256,
    write_json,
    write_json_lines,
)  # fmt: skip
from minift.prompts import Template
from minift.run import checkpoint, interrupts, lock, resume
from minift.run.device import machine, pick_device, pick_dtype, weights_dtype
from minift.run.distributed import barrier, join, leave, rank_0_first
from minift.run.ranks import RANK, WORLD_SIZE
from minift.run.report import write_report
from minift.run.resume import A_RUN
from minift.trainer import DivergedError, Progress, Task

PACKAGES = ("minift", "torch", "tokenizers", "safetensors", "numpy", "huggingface_hub")


class Run:
    """A run of train_sft.py or train_rm.py; a `trainer.Recorder`. Nothing in its folder is touched before `open`.

    A resumed run uses the commits of model and data that it began with: the hub's branches may have moved since. Raises
    UserError if the folder cannot be used; with --resume, if the folder has no checkpoint, or if values differ.
    """

    model_files: ModelFiles  # from `find_model` on
    record: dict[str, Any]  # the object in run.json; from `open` on

    def __init__(self, script: str, config: Config) -> None:
        self.script = script  # "sft" or "rm"
        self.config = config
        self.folder = Path(config.out)
        self.device = pick_device(config.device)
        self.grad_accum = config.grad_accum * WORLD_SIZE  # of all ranks together
        self.dtype = pick_dtype(config, self.device)  # of the forward pass
        self.weights_dtype = weights_dtype(config)
        self.metrics: list[dict[str, Any]] = []
        self.first_step = 0  # optimiser steps done before this process
        self._values = to_dict(config, script) | {"grad_accum": self.grad_accum}
        self._earlier: dict[str, Any] = {}  # the record of the run to resume
        self._commits: dict[str, str] = {}
        # Before the model is loaded, which can take minutes.
        if config.resume:
            self._earlier = resume.read_earlier(self.folder)
            may_differ = {"lr"} if config.origins.get("lr") == "flag" else set()
            resume.check_values(self.folder, self._earlier, script, self._values, may_differ)
            self._commits = resume.recorded_commits(self._earlier, self._values)
        if RANK == 0:
            (lock.check_free if config.resume else lock.check_folder)(self.folder)
        files = {"data": config.data, "eval_data": config.eval_data}
        self.data = {name: at_commit(file, self._commits.get(name)) for name, file in files.items() if file}

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Return the SHA-256 of the files of --data and --eval-data."""
        return {name: sha256(data_files(file)) for name, file in self.data.items()}

    def find_model(self) -> ModelFiles:
        """Resolve the run's model, fetching it from the hub if necessary. Raises like `pretrained.find_model`."""
        self.model_files = find_model(self.config.model, self._commits.get("weights") or self.config.revision)
        return self.model_files

    def open(self, template: Template) -> None:
        """Make the run's folder and write run.json; with --resume, check that data, model and template are the same.

        An earlier run in the folder is kept as `<folder>-1`, or with the first free number. Raises UserError like
        `Run`, and if they are not the same.
        """
        join(self.device)
        if RANK > 0:
            self.record = {}
            return
        fingerprints = self.fingerprints | self.model_files.fingerprints()
        commits = {name: commit_of(data_files(file)[0]) for name, file in self.data.items()}
        # None: minift runs from its folder and has no metadata.
        versions = {name: next((it.version for it in metadata.distributions(name=name)), None) for name in PACKAGES}
        self.record = {
            "task": self.script,
            "values": self._values,
            "template": asdict(template),
            "versions": {"python": platform.python_version()} | versions,
            "fingerprints": fingerprints,
            "commits": commits | {"weights": commit_of(self.model_files.own)},
            "command": resume.command_of_run(),
            "machine": machine(self.device),
            "date": date.today().isoformat(),
        }
        first = {name: self._earlier.get(name) for name in ("command", "date")}  # those of the run's first start stay
        self.record |= {name: value for name, value in first.items() if isinstance(value, str)}
        if self.config.resume:
            resume.check_contents(self.folder, self._earlier, fingerprints, asdict(template))
            with name_errors(f"--resume: {self.folder}", "expected a folder that can be written"):
                lock.hold(self.folder)
            earlier_lr = self._earlier["values"].get("lr")
            if earlier_lr == self.config.lr:
                return  # run.json stays as it is until `finish`
            say(f"--lr was {earlier_lr}; from the last checkpoint on it is {self.config.lr}")
        else:
            lock.make_folder(self.folder)
        write_json(self.folder / "run.json", self.record)

    def before_training(self, exam: Callable[[], list[Any]], count: int) -> list[Any]:
        """Return what `exam` returns for `count` rows before training; a resumed run reads it from before.json.

        The model is untrained here, with --resume too: `restore` puts the checkpoint into it, at the start of `train`.
        """
        path = self.folder / "before.json"
        if self.config.resume:
            # If --bleu-samples or --run-checks has changed, or the file is damaged, the exam is held again.
            with suppress(UserError, KeyError, TypeError):
                kept = read_json(path, A_RUN)
                is_same = len(kept["before"]) == count and kept["run_checks"] == self.config.run_checks
                if is_same and kept["sha256"] == _digest(kept["before"]):
                    return kept["before"]
        before = exam()
        if RANK == 0:
            write_json(path, {"before": before, "run_checks": self.config.run_checks, "sha256": _digest(before)})
        return before

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        """Return the progress so far; with --resume, restore the last checkpoint and drop the metrics after it."""
        metrics_file = self.folder / "metrics.jsonl"
        progress = Progress()
        if self.config.resume:
            with rank_0_first():  # it deletes what a killed process left
                progress = checkpoint.load(self.folder / "checkpoints", model, optimizer)
            text = read_text(metrics_file, A_RUN) if metrics_file.exists() else ""
            complete = text[: text.rfind("\n") + 1]  # a kill can cut the last line
            self.metrics = [line for line in _parse_metrics(complete, metrics_file) if line["step"] <= progress.step]
        if RANK == 0:
            write_json_lines(metrics_file, self.metrics)
        self.first_step = progress.step
        return progress

    def log(self, line: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        self.metrics.append(line)
        if RANK == 0:
            append_json_line(self.folder / "metrics.jsonl", line)

    def save(self, task: Task, optimizer: torch.optim.Optimizer, progress: Progress, *, is_best: bool) -> None:
        """Write a checkpoint; return on all ranks when it is complete."""
        folder = self.folder / "checkpoints"
        checkpoint.save(folder, task.model, optimizer, progress, task.write_model, is_best=is_best)
        barrier()  # if a rank ended after a signal, torchrun would end rank 0 while it writes

    @contextmanager
    def guard(self) -> Iterator[list[int]]:
        """Yield the signals received while the loop runs; say how to continue after one, and after divergence.

        Raises KeyboardInterrupt if the block ends after a signal. From then on, until `finish`, a signal does so too.
        """
        with interrupts.deferred() as received:
            try:
                yield received
            except DivergedError as error:
                raise self._explain(error) from None
        handler = interrupts.interrupt_with(f"; all steps are saved, continue with: {resume.command()}")
        if received:
            handler(received[0], None)
        interrupts.on_signals(handler)

    def finish(
        self, results: dict[str, Any], samples: Sequence[dict[str, Any]], seen: dict[str, Any]
    ) -> dict[str, Any]:
        """Write `results` (measure → before and after), samples, `seen` (row.json) and report.html.

        Return the results with the evaluation losses.
        """
        losses = {}
        for name in ("loss", "lm_loss"):
            values = [line[name] for line in self.metrics if line["split"] == "eval" and line.get(name) is not None]
            if values:
                losses[f"eval_{name}"] = {"before": values[0], "after": values[-1]}
        self.record["results"] = results = losses | results
        if RANK > 0:
            leave()
            return results
        if samples:
            write_json_lines(self.folder / "samples.jsonl", samples)
        write_json(self.folder / "row.json", seen)
        write_json(self.folder / "run.json", self.record)
        write_report(self.folder, self.record, self.metrics, samples, seen)
        interrupts.on_signals(interrupts.interrupt_with())
        lock.release(self.folder)
        leave()
        return results

    def _explain(self, error: DivergedError) -> UserError:
        """Return the error with its cause, if that is not the learning rate, or with the way to continue."""
        problem = error.problem
        if error.steps > self.first_step:
            if checkpoint.find(self.folder / "checkpoints") is None:
                return error
            lower = resume.command("--lr", f"{self.config.lr / 10:g}")
            return UserError(f"{error}, from the last checkpoint on: {lower}")
        if self.config.resume:
            return UserError(f"--resume: {problem} at the checkpoint: start afresh, at a lower --lr")
        cause = "its weights are damaged"
        if self.config.base_dtype == "float16":
            cause = "numbers above 65,504 overflow in --base-dtype float16, expected float32 or bfloat16"
        return UserError(f"--model {self.config.model}: {problem} before training: {cause}")


def read_run(
    folder: str | Path,
) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """Return the record, metrics, samples and row in a run's folder; UserError if they are not as a run writes them.

    Runs of earlier versions have no row.json: it is then {}.
    """
    folder = Path(folder)
    record = read_json(folder / "run.json", A_RUN)  # first: without it, the folder is not a run's
    metrics_file, samples_file, row_file = (folder / name for name in ("metrics.jsonl", "samples.jsonl", "row.json"))
    metrics = _parse_metrics(read_text(metrics_file, A_RUN), metrics_file)
    samples = _parse_objects(read_text(samples_file, A_RUN), samples_file) if samples_file.exists() else []
    seen = read_json(row_file, A_RUN) if row_file.exists() else {}
    return record, metrics, [sample for _, sample in samples], seen


def _parse_metrics(text: str, path: Path) -> list[dict[str, Any]]:
    lines = _parse_objects(text, path)
    for number, line in lines:
        wrong = "" if isinstance(line.get("loss"), int | float | None) else "a number as `loss`"  # null: not finite
        if type(line.get("step")) not in (int, float) or line.get("split") not in ("train", "eval"):
            wrong = "a number as `step` and train or eval as `split`"
        if wrong:
            raise UserError(f"{path}:{number}: expected {wrong}; correct or remove it")
    return [line for _, line in lines]


def _parse_objects(text: str, path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return the number and object of each line; UserError for a line that a run does not write."""
    expected = "a JSON object, as a run writes it; correct or remove it"
    lines = list(parse_json_lines(text, path, expected, allow_nan=True))
    for number, value in lines:
        if not isinstance(value, dict):
            raise UserError(f"{path}:{number}: expected {expected}")
    return lines


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
