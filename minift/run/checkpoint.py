"""Save and restore everything a run needs to resume exactly. Writes are atomic.

A run's `checkpoints/` holds folders `step-000120/` and two links to them, `last` and `best`. A folder is a model that
anyone can load, `training.safetensors` (the trained parameters and AdamW's moments, as they are in memory) and
`progress.json`. Order, dropout and learning rate follow from the seed and the step, so no generator state is saved.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from minift.errors import UserError
from minift.files.text import fsync, read_json, write_json
from minift.trainer import Progress

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def save(
    checkpoints: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    write_model: Callable[[Path], None],
    *,
    is_best: bool,
) -> None:
    """Write a checkpoint, point `last` (and `best`) to it, and delete the checkpoints that no link points to.

    The folder is renamed only after everything is on disk, and so is a link. A crash at any moment leaves the previous
    checkpoint as it was.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    folder = checkpoints / f"step-{progress.step:06d}"
    unfinished = checkpoints / f".{folder.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir()
        write_model(unfinished)
        save_file(_training_tensors(model, optimizer), unfinished / "training.safetensors")
        write_json(unfinished / "progress.json", asdict(progress))
        for path in unfinished.rglob("*"):
            fsync(path)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        fsync(checkpoints)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)

    # `best` first: a resumed run continues from `last`.
    for name in ("best", "last") if is_best else ("last",):
        link = checkpoints / f".{name}.new"
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name)
        link.replace(checkpoints / name)
    wanted = {(checkpoints / name).resolve() for name in ("last", "best")}
    for old in checkpoints.glob("step-*"):
        if old.resolve() not in wanted:
            shutil.rmtree(old)


def load(checkpoints: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Put the last checkpoint's parameters and moments into model and optimiser; return its progress.

    Raises UserError if there is no checkpoint, or if it is damaged or of another model.
    """
    folder = checkpoints / "last"
    if not folder.exists():
        raise UserError(f"--resume: {folder} does not exist, expected a checkpoint; leave --resume out to start afresh")
    try:
        progress = Progress(**read_json(folder / "progress.json", "how far a run is"))
        tensors = load_file(folder / "training.safetensors")
    except (UserError, OSError, TypeError, SafetensorError) as error:
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
