"""One training run and its folder. This is the only module that knows a run's files.

run.json        resolved values, template, versions, fingerprints, commits; after training, the results
metrics.jsonl   one object per logged step or evaluation
samples.jsonl   held-out rows with the model's answers or rewards before and after
report.html     all of this as one page
checkpoints/    see checkpoint.py
"""

import itertools
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minift.config import Config, flag_of, to_dict
from minift.errors import UserError
from minift.files.hub import at_commit, commit_of, data_files
from minift.files.pretrained import ModelFiles, find_model
from minift.files.text import parse_json_lines, read_json, read_text, sha256, to_json, write_json, write_json_lines
from minift.prompts import Template
from minift.run import checkpoint
from minift.run.device import pick_device, pick_dtype, weights_dtype
from minift.run.report import write_report
from minift.trainer import Progress, Task

PACKAGES = ("minift", "torch", "tokenizers", "safetensors", "numpy", "huggingface_hub")
# Options that may differ on --resume: what is learned does not depend on them.
MAY_DIFFER = {"recipe", "out", "resume", "device", "log_every", "eval_every", "save_every", "bleu_samples"}
A_RUN = "the folder of a run, such as runs/sft"


class Run:
    """A run of train_sft.py or train_rm.py; a `trainer.Recorder`. Nothing in its folder is touched before `open`.

    A resumed run uses the commits of model and data that it began with: the hub's branches may have moved since.
    """

    def __init__(self, script: str, config: Config) -> None:
        self.script = script  # "sft" or "rm"
        self.config = config
        self.folder = Path(config.out)
        self.device = pick_device(config.device)
        self.dtype = pick_dtype(config, self.device)  # of the forward pass
        self.weights_dtype = weights_dtype(config)
        self.metrics: list[dict[str, Any]] = []
        self._commits = _recorded_commits(self.folder, to_dict(config, script)) if config.resume else {}
        files = {"data": config.data, "eval_data": config.eval_data}
        self.data = {name: at_commit(file, self._commits.get(name)) for name, file in files.items() if file}

    def find_model(self) -> ModelFiles:
        """Resolve the run's model, fetching it from the hub if necessary. Raises like `pretrained.find_model`."""
        self.model_files = find_model(self.config.model, self._commits.get("weights") or self.config.revision)
        return self.model_files

    def open(self, template: Template) -> None:
        """Make the run's folder and write run.json; with --resume, check that it is the same run instead.

        An earlier run in the folder is kept as `<folder>-1`, or with the first free number. Raises UserError if the
        folder holds something else or cannot be made; with --resume, if values, data, weights or template differ.
        """
        fingerprints = {name: sha256(data_files(file)) for name, file in self.data.items()}
        commits = {name: commit_of(data_files(file)[0]) for name, file in self.data.items()}
        self.record = {
            "task": self.script,
            "values": to_dict(self.config, self.script),
            "template": asdict(template),
            "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
            "fingerprints": fingerprints | {"weights": self.model_files.fingerprint()},
            "commits": commits | {"weights": commit_of(self.model_files.own)},
        }
        if self.config.resume:
            _check_same_run(self.folder, self.record)
        else:
            _make_folder(self.folder)
            write_json(self.folder / "run.json", self.record)

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        """Return the progress so far; with --resume, restore the last checkpoint and drop the metrics after it."""
        metrics_file = self.folder / "metrics.jsonl"
        progress = Progress()
        if self.config.resume:
            progress = checkpoint.load(self.folder / "checkpoints", model, optimizer)
            text = read_text(metrics_file, A_RUN) if metrics_file.exists() else ""
            complete = text[: text.rfind("\n") + 1]  # a kill can cut the last line
            self.metrics = [line for line in _parse_metrics(complete, metrics_file) if line["step"] <= progress.step]
        write_json_lines(metrics_file, self.metrics)
        return progress

    def log(self, line: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        self.metrics.append(line)
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(to_json(line) + "\n")

    def save(self, task: Task, optimizer: torch.optim.Optimizer, progress: Progress, *, is_best: bool) -> None:
        """Write a checkpoint."""
        checkpoints = self.folder / "checkpoints"
        checkpoint.save(checkpoints, task.model, optimizer, progress, task.write_model, is_best=is_best)

    def finish(self, results: dict[str, Any], samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Write the results to run.json, the samples, and report.html; return the results with the evaluation losses.

        `results` maps a measure to its values "before" and "after" training.
        """
        losses = [line["loss"] for line in self.metrics if line["split"] == "eval"]
        if losses:
            results = {"eval_loss": {"before": losses[0], "after": losses[-1]}} | results
        if samples:
            write_json_lines(self.folder / "samples.jsonl", samples)
        self.record["results"] = results
        write_json(self.folder / "run.json", self.record)
        write_report(self.folder, self.record, self.metrics, samples)
        return results


def read_run(folder: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the record, metrics and samples in a run's folder.

    Raises UserError if run.json or metrics.jsonl is missing, or a file is not what a run writes.
    """
    folder = Path(folder)
    metrics_file, samples_file = folder / "metrics.jsonl", folder / "samples.jsonl"
    metrics = _parse_metrics(read_text(metrics_file, A_RUN), metrics_file)
    samples = _parse_objects(read_text(samples_file, A_RUN), samples_file) if samples_file.exists() else []
    return read_json(folder / "run.json", A_RUN), metrics, [sample for _, sample in samples]


def _parse_metrics(text: str, path: Path) -> list[dict[str, Any]]:
    lines = _parse_objects(text, path)
    for number, line in lines:
        step = line.get("step")
        if not isinstance(step, int | float) or isinstance(step, bool) or line.get("split") not in ("train", "eval"):
            expected = "expected a number as `step` and train or eval as `split`"
            raise UserError(f"{path}:{number}: {expected}; correct or remove it")
    return [line for _, line in lines]


def _parse_objects(text: str, path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return the number and object of each line; UserError for a line that a run does not write."""
    lines = list(parse_json_lines(text, path, "a JSON object, as a run writes it", allow_nan=True))
    for number, value in lines:
        if not isinstance(value, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, as a run writes it; correct or remove it")
    return lines


def _make_folder(folder: Path) -> None:
    try:
        if folder.exists() and any(folder.iterdir()):
            if not (folder / "run.json").exists():
                raise UserError(f"--out {folder}: not empty and not an earlier run, expected a new folder or a run's")
            names = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(1))
            previous = next(name for name in names if not name.exists())
            folder.rename(previous)
            print(f"the earlier run is kept in {previous}")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}, expected a folder that can be made") from None


def _check_same_run(folder: Path, record: dict[str, Any]) -> None:
    path = folder / "run.json"
    if not path.exists():
        raise UserError(f"--resume: {path} does not exist, expected a run to continue; leave --resume out")
    if not (folder / "checkpoints" / "last").exists():
        raise UserError(f"--resume: {folder} has no checkpoint to continue from; leave --resume out to start afresh")
    try:
        earlier = read_json(path, A_RUN)
        parts = {part: dict(earlier[part]) for part in ("values", "fingerprints", "template")}
    except (UserError, ValueError, KeyError, TypeError):
        raise UserError(f"--resume: {path} is damaged; leave --resume out to start afresh") from None
    for part, recorded in parts.items():
        for name, value in record[part].items():
            if name not in MAY_DIFFER and recorded.get(name) != value:
                owner = {"fingerprints": "the fingerprint of ", "template": "the template's "}
                subject = flag_of(name) if part == "values" else owner[part] + name
                raise UserError(f"--resume: {subject} was {recorded.get(name)} in {folder}, and is now {value}")


def _recorded_commits(folder: Path, values: dict[str, Any]) -> dict[str, str]:
    """Return the recorded commits of `data`, `eval_data` and `weights`, if the flags that name them have not changed.

    Return {} if run.json is missing or damaged: `open` reports that.
    """
    try:
        recorded = read_json(folder / "run.json", A_RUN)
        flags = {name: "model" if name == "weights" else name for name in recorded["commits"]}
        same = [name for name, flag in flags.items() if recorded["values"][flag] == values[flag]]
        commits = {name: recorded["commits"][name] for name in same}
        return {name: commit for name, commit in commits.items() if re.fullmatch("[0-9a-f]{40}", commit or "")}
    except (UserError, KeyError, TypeError):
        return {}
