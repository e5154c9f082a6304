"""Save and restore everything a run needs to resume exactly. Writes are atomic.

A run's `checkpoints/` holds folders `step-000120/`, and `steps.json` with the steps of the `last` and the `best` one.
A folder holds a model that anyone can load, `progress.json`, and `training.safetensors`: the trained parameters and
AdamW's moments, as they are in memory. A sharded model has a folder `training/` instead, with files of each rank. Any
number of ranks can resume from either. Order, dropout and learning rate follow from the seed and the step, so no
generator state is saved. Nothing is a symbolic link: network drives and copies lack them.
"""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from minift.errors import UserError
from minift.files.text import MACHINE_ERRORS, check_not_pointer, fsync, read_json, write_json
from minift.run.distributed import is_sharded
from minift.run.ranks import RANK
from minift.run.sharding import read_parts, write_parts
from minift.trainer import Progress

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
WHOLE, PARTS = "training.safetensors", "training"  # a file, or a folder with files of each rank of a sharded model
STEPS = "steps.json"
NAMES = ("last", "best")


def save(
    checkpoints: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress,
    write_model: Callable[[Path], None], *, is_best: bool,
) -> None:  # fmt: skip
    """Write a checkpoint, name it in steps.json, and delete those that are no longer named there.

    The folder is renamed only after everything is on disk: a crash at any moment leaves the previous checkpoint. All
    ranks must call it: each writes its parts of a sharded model, and rank 0 everything else.
    """
    if RANK > 0 and not is_sharded(model):
        return
    checkpoints.mkdir(parents=True, exist_ok=True)
    folder = _step_folder(checkpoints, progress.step)
    unfinished = checkpoints / f".{folder.name}.unfinished"
    try:
        if RANK == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
        write_model(unfinished)
        tensors = {}
        for name, parameter in _trained(model).items():
            tensors[f"parameter.{name}"] = parameter.data
            tensors |= {f"{moment}.{name}": tensor for moment, tensor in optimizer.state[parameter].items()}
        if is_sharded(model):
            write_parts(tensors, unfinished / PARTS)
        else:
            save_file(tensors, unfinished / WHOLE)
        if RANK > 0:
            return
        write_json(unfinished / "progress.json", asdict(progress))
        for path in (unfinished, *unfinished.rglob("*")):
            fsync(path)
        best = _read_steps(checkpoints).get("best")
        _delete(folder)
        unfinished.rename(folder)
        fsync(checkpoints)
    finally:
        if RANK == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
    best = folder if is_best else best
    _write_steps(checkpoints, {"last": folder} | ({"best": best} if best else {}))


def find(checkpoints: Path) -> Path | None:
    """Return the folder of the last checkpoint; the newest one if steps.json names none that exists."""
    return _read_steps(checkpoints).get("last")


def load(checkpoints: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Put the last checkpoint's parameters and moments into model and optimiser; return its progress.

    Delete what a killed process left. Raises UserError without a checkpoint, and for a damaged or unsuitable one.
    """
    steps = _read_steps(checkpoints)
    folder = steps.get("last")
    if folder is None:
        raise UserError(f"--resume: {checkpoints} has no checkpoint; leave --resume out to start afresh")
    with _damage_named(checkpoints, folder / "progress.json") as file:
        progress = _read_progress(file)
    with _damage_named(checkpoints, folder / (PARTS if (folder / PARTS).is_dir() else WHOLE)) as file:
        trained = _trained(model)
        tensors = _read_tensors(file, model)
        expected = {f"parameter.{name}": parameter.shape for name, parameter in trained.items()}
        found = {name: tensor.shape for name, tensor in tensors.items() if name.startswith("parameter.")}
        if odd := sorted(name for name, _ in expected.items() ^ found.items()):
            problem = f"{len({*odd})} of its parameters differ, first {odd[0]}"
            raise UserError(f"--resume: {folder} is of another model: {problem}")
        states = {name: _read_moments(name, parameter, tensors) for name, parameter in trained.items()}
    for name, parameter in trained.items():
        parameter.data.copy_(tensors[f"parameter.{name}"])
        optimizer.state[parameter] = states[name]
    if RANK == 0:  # two ranks that write one file disturb each other
        _write_steps(checkpoints, steps)
    return progress


@contextmanager
def _damage_named(checkpoints: Path, file: Path) -> Iterator[Path]:
    """Yield a checkpoint's file; say how to continue if it turns out to be damaged."""
    try:
        yield file
    except (ValueError, OSError, SafetensorError) as error:
        if getattr(error, "errno", None) in MACHINE_ERRORS:
            raise
        earlier = [path.name for path in _all_folders(checkpoints) if path != file.parent]
        way = f"delete {file.parent} to continue from {earlier[-1]}" if earlier else "start afresh without --resume"
        problem = getattr(error, "strerror", None) or error
        raise UserError(f"--resume: {file} is damaged ({problem}); {way}") from None


def _read_tensors(file: Path, model: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and moments of `WHOLE` or `PARTS`; of a sharded model, this rank's part of each."""
    if file.name == PARTS:
        return read_parts(file, _trained(model))
    check_not_pointer(file)
    if is_sharded(model):
        return read_parts(file.parent, _trained(model))
    return load_file(file)


def _read_progress(path: Path) -> Progress:
    """Read progress.json; raise ValueError if it is not what `save` wrote."""
    try:
        values = read_json(path, "how far a run is")
    except UserError as error:
        raise ValueError(str(error).removeprefix(f"{path}:").strip()) from None
    if values.keys() != {field.name for field in fields(Progress)}:
        raise ValueError(f"its names are {', '.join(values) or 'missing'}")
    progress = Progress(**values)
    for name in ("step", "tokens", "items"):
        if type(values[name]) is not int or values[name] < 1:
            raise ValueError(f"{name} is {values[name]!r}")
    if path.parent.name.startswith("step-") and path.parent != _step_folder(path.parent.parent, progress.step):
        raise ValueError(f"step is {progress.step!r:.40}, unlike its folder's")
    best_loss = 0.0 if progress.best_loss is None else progress.best_loss
    sums = progress.sums.values() if isinstance(progress.sums, dict) else [None]
    if not all(type(value) in (int, float) for value in (progress.seconds, best_loss, *sums)):
        raise ValueError("seconds, best_loss and sums are not all numbers")
    return progress


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _read_moments(name: str, parameter: nn.Parameter, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a parameter's moments, {} if it never had a gradient; raise ValueError for any but AdamW's own."""
    state = {moment: tensors[f"{moment}.{name}"] for moment in MOMENTS if f"{moment}.{name}" in tensors}
    if state and len(state) < len(MOMENTS):
        raise ValueError(f"{name} has only the moments {', '.join(state)}")
    for moment, tensor in {"parameter": tensors[f"parameter.{name}"], **state}.items():
        shape, dtype = (torch.Size(), tensor.dtype) if moment == "step" else (parameter.shape, parameter.dtype)
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_floating_point():
            raise ValueError(f"{moment}.{name} is {tensor.dtype} {[*tensor.shape]}, expected {dtype} {[*shape]}")
    return {moment: tensor.to(parameter.device) for moment, tensor in state.items()}


def _step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:06d}"


def _all_folders(checkpoints: Path) -> list[Path]:
    """Return the folders of all checkpoints, oldest first."""
    found = [path for path in checkpoints.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[len("step-") :]))


def _read_steps(checkpoints: Path) -> dict[str, Path]:
    """Return the folders of the last and the best checkpoint, of those that exist."""
    try:
        steps = read_json(checkpoints / STEPS, "the steps of the checkpoints")
    except UserError:
        steps = _read_links(checkpoints)
    folders = {name: _step_folder(checkpoints, steps[name]) for name in NAMES if type(steps.get(name)) is int}
    existing = {name: folder for name, folder in folders.items() if folder.is_dir()}
    newest = [checkpoints / "last", *_all_folders(checkpoints)][-1]  # `last`: see `_read_links`
    return {"last": newest} | existing if newest.is_dir() else existing


def _write_steps(checkpoints: Path, named: Mapping[str, Path]) -> None:
    """Write steps.json; delete the checkpoints that are not in `named`, and what earlier deletions or versions left."""
    if checkpoints / "last" in named.values():
        return  # a copy that has only this folder; the next checkpoint replaces it
    write_json(checkpoints / STEPS, {name: int(folder.name[len("step-") :]) for name, folder in named.items()})
    for folder in set(_all_folders(checkpoints)) - set(named.values()):
        _delete(folder)
    for path in [*checkpoints.glob(".step-*"), *checkpoints.glob(".*.new"), *(checkpoints / name for name in NAMES)]:
        if path.is_symlink() or path.is_file():  # a file: how some programs copy a link
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


def _read_links(checkpoints: Path) -> dict[str, Any]:
    """Return the steps by the links of earlier versions, `last` and `best`; a copy can have made folders of them."""
    steps: dict[str, Any] = {}
    for name in NAMES:
        with suppress(UserError, KeyError):
            steps[name] = read_json(checkpoints / name / "progress.json", "how far a run is")["step"]
    return steps


def _delete(folder: Path) -> None:
    """Delete a checkpoint, if it exists. It is renamed first: half of one must not look like a whole one."""
    if folder.is_dir():
        removed = folder.with_name(f".{folder.name}.removed")
        shutil.rmtree(removed, ignore_errors=True)
        folder.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)
