"""All that a run needs to go on exactly, written whole or not at all.

A run's `checkpoints/` holds `step-000120/` folders and two links into them, `last` and `best`. A folder is the model as
anyone can load it, `training.safetensors` (the trained parameters and AdamW's moments, as they are in memory) and
`progress.json` (the step and the loop's counters). Order, dropout and learning rate follow from the seed and the step,
so there is no generator state to keep.
"""

import itertools
import json
import os
import platform
import re
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from minift.errors import UserError
from minift.files import flush, write_text

PACKAGES = ("minift", "torch", "tokenizers", "safetensors", "numpy", "huggingface_hub")
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
MAY_DIFFER = {"recipe", "out", "resume", "device", "log_every", "eval_every", "save_every", "bleu_samples"}


def open_run(folder: Path, record: dict[str, Any], *, resume: bool) -> Path:
    """Make a run's folder with `record`, its resolved values and fingerprints, in run.json.

    A run that was there before is kept beside it, as `<folder>-1` or the first number that is free. With `resume` the
    folder stays as it is, and must have been made with the same values, data and weights. Raises UserError if it was
    not, if the folder holds something else, or if it can't be made.
    """
    before = folder / "run.json"
    if resume:
        if not before.exists():
            raise UserError(f"--resume: {before} does not exist, expected a run to go on with; leave --resume out")
        if not (folder / "checkpoints" / "last").exists():
            raise UserError(f"--resume: {folder} has no checkpoint to go on from; leave --resume out to start afresh")
        try:
            earlier = json.loads(before.read_text(encoding="utf-8"))
            earlier["values"].items(), earlier["fingerprints"].items(), earlier["template"].items()
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"--resume: {before} is damaged; leave --resume out to start afresh") from None
        for part in ("values", "fingerprints", "template"):
            for name, value in record[part].items():
                if name not in MAY_DIFFER and earlier[part].get(name) != value:
                    of = {"fingerprints": "the ", "template": "the template's "}
                    what = f"--{name.replace('_', '-')}" if part == "values" else f"{of[part]}{name}"
                    raise UserError(f"--resume: {what} was {earlier[part].get(name)} in {folder}, and is now {value}")
        return folder
    try:
        if folder.exists() and any(folder.iterdir()):
            if not before.exists():
                raise UserError(f"--out {folder}: not empty and no earlier run, expected a new folder or a run's")
            names = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(1))
            previous = next(name for name in names if not name.exists())
            folder.rename(previous)
            print(f"the run before is kept in {previous}")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}, expected a folder that can be made") from None
    write_text(before, json.dumps(record, indent=1) + "\n")
    return folder


def recorded_commits(folder: Path, values: dict[str, Any]) -> dict[str, str]:
    """The commits of a run's `data`, `eval_data` and `weights`, of those that the resolved `values` still name.

    None if run.json is not there or is damaged, which `open_run` tells.
    """
    try:
        recorded = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        flags = {name: "model" if name == "weights" else name for name in recorded["commits"]}
        same = [name for name, flag in flags.items() if recorded["values"][flag] == values[flag]]
        commits = {name: recorded["commits"][name] for name in same}
        return {name: commit for name, commit in commits.items() if re.fullmatch("[0-9a-f]{40}", commit or "")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def versions() -> dict[str, str]:
    """Of Python and the packages that a run's numbers depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def save(
    checkpoints: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
    write_model: Callable[[Path], None],
    *,
    is_best: bool,
) -> None:
    """Write the checkpoint of `progress["step"]`, point `last` (and `best`) at it, drop those nothing points at.

    The folder appears under its name only when all of it is on disk, and the links are replaced in one move each: a
    crash at any moment leaves the previous checkpoint as it was.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    folder = checkpoints / f"step-{progress['step']:06d}"
    unfinished = checkpoints / f".{folder.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir()
        write_model(unfinished)
        save_file(_training_tensors(model, optimizer), unfinished / "training.safetensors")
        (unfinished / "progress.json").write_text(json.dumps(progress, indent=1) + "\n", encoding="utf-8")
        for path in unfinished.iterdir():
            flush(path)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        flush(checkpoints)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)

    # `best` first: `last` is what a resumed run believes.
    for name in ("best", "last") if is_best else ("last",):
        link = checkpoints / f".{name}.new"
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name)
        os.replace(link, checkpoints / name)
    wanted = {(checkpoints / name).resolve() for name in ("last", "best")}
    for old in checkpoints.glob("step-*"):
        if old.resolve() not in wanted:
            shutil.rmtree(old)


def load(checkpoints: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put the last checkpoint's parameters and moments back where they were, and give its progress.

    Raises UserError when there is none, or when it is damaged or of another model.
    """
    folder = checkpoints / "last"
    if not folder.exists():
        raise UserError(f"--resume: {folder} does not exist, expected a checkpoint; leave --resume out to start afresh")
    try:
        progress = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "training.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"--resume: {folder} is damaged ({error}); start afresh without --resume") from None
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {f"parameter.{name}": parameter.shape for name, parameter in trained.items()}
    found = {name: tensor.shape for name, tensor in tensors.items() if name.startswith("parameter.")}
    if expected != found:
        odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise UserError(f"--resume: {folder} is of another model: {len(odd)} parameters differ, first {odd[0]}")
    for name, parameter in trained.items():
        parameter.data.copy_(tensors[f"parameter.{name}"])
        optimizer.state[parameter] = {
            moment: tensors[f"{moment}.{name}"].to(parameter.device)
            for moment in MOMENTS
            if f"{moment}.{name}" in tensors
        }
    return progress


def _training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[f"parameter.{name}"] = parameter.data
            tensors.update({f"{moment}.{name}": tensor for moment, tensor in optimizer.state[parameter].items()})
    return tensors
