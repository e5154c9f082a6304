"""The training loop: accumulate, clip, step, evaluate, log, save.

The loop does not know the loss or the files. A `Task` gives it the model, the batches and the loss; a `Recorder` keeps
metrics and checkpoints.
"""

import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TextIO

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor, nn

from minift.batching import Loader
from minift.config import Config
from minift.errors import UserError
from minift.model import eval_mode
from minift.optim import adamw, learning_rate

PLAIN_SECONDS = 10  # between two lines of progress that no terminal shows

# From a batch to the sum of its losses, the number of items (tokens, pairs) in the sum, and the sums of its metrics.
LossFunction = Callable[[Any], tuple[Tensor, Tensor, dict[str, Tensor]]]


class Task(NamedTuple):
    """A model to train, its batches and its loss."""

    model: nn.Module
    loss: LossFunction
    train_batches: Loader
    eval_batches: Loader
    write_model: Callable[[Path], None]  # writes the model into a folder, as other libraries read it
    unit: str  # the item that the loss counts: "supervised_tokens", "pairs" or "prompts"
    dtype: torch.dtype = torch.float32  # of the forward pass: bfloat16 means autocast


@dataclass
class Progress:
    """The state of a run. With the parameters and AdamW's moments, this is everything needed to resume it."""

    step: int = 0  # optimiser steps done
    tokens: int = 0
    items: int = 0  # of `Task.unit`
    seconds: float = 0.0
    best_loss: float | None = None  # the lowest evaluation loss after a step
    sums: dict[str, float] = field(default_factory=dict)  # of the steps since the last logged line


class Recorder(Protocol):
    """Interface for keeping a run's metrics and checkpoints; `run.folder.Run` implements it for the scripts."""

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        """Return the progress of a resumed run, its parameters and moments put back; else a new `Progress`."""

    def log(self, line: dict[str, Any]) -> None:
        """Keep one line of metrics."""

    def save(self, task: Task, optimizer: torch.optim.Optimizer, progress: Progress, *, is_best: bool) -> None:
        """Keep a checkpoint; `is_best` says that its evaluation loss is the lowest so far."""

    def guard(self) -> AbstractContextManager[list[int]]:
        """Return a context for the loop; it yields a list, empty until the run must stop after its step."""


class DivergedError(UserError):
    """A loss or gradient that is not finite."""


def train(task: Task, config: Config, recorder: Recorder) -> None:
    """Train `task.model` in place for `config.max_steps` optimiser steps, or `config.epochs` passes over the data.

    The gradient of an optimiser step is that of sum / count over all its micro-batches: of the mean over every item of
    the step. So it does not depend on how the items are divided into micro-batches. Everything random in a step is
    seeded by (seed, step), so neither evaluating more often nor resuming changes anything. Raises DivergedError if the
    loss or gradient is not finite, and what `recorder.guard` raises after a signal.
    """
    model = task.model
    optimizer = adamw(model, config.weight_decay)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total_steps = num_steps(config, task.train_batches)
    progress = recorder.restore(model, optimizer)
    if progress.step == 0:
        _log(recorder, task, progress, "eval", evaluate(task))

    sums = Counter(progress.sums)
    clock = time.perf_counter() - progress.seconds
    tokens_before, started = progress.tokens, time.perf_counter()
    with progress_bar(total_steps, "training", "step", progress.step) as bar, recorder.guard() as signals:
        for step in range(progress.step, total_steps):
            torch.manual_seed((config.seed << 32) + step)  # dropout
            step_sums = accumulate_gradient(task, step)
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            torch._foreach_div_(gradients, step_sums["count"])
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item()
            _check_finite(config, step, step_sums["loss"] + grad_norm)
            lr = learning_rate(step, config.lr, config.schedule, config.warmup_steps, total_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()

            sums.update(step_sums)
            progress.step = step + 1
            progress.tokens += int(step_sums["tokens"])
            progress.items += int(step_sums["count"])
            progress.seconds = time.perf_counter() - clock
            is_last = progress.step == total_steps
            if progress.step % config.log_every == 0 or is_last:
                means = _means(sums)
                _log(recorder, task, progress, "train", {**means, "lr": lr, "grad_norm": grad_norm})
                rate = (progress.tokens - tokens_before) / (time.perf_counter() - started)
                bar.set_postfix_str(f"loss {means['loss']:.3f}, {rate:,.0f} tokens/s", refresh=False)
                sums = Counter()
            progress.sums = dict(sums)
            bar.update()

            is_best = False
            if is_last or (config.eval_every and progress.step % config.eval_every == 0):
                means = evaluate(task)
                _check_finite(config, step, means.get("loss", 0.0))
                _log(recorder, task, progress, "eval", means)
                if means:
                    shown = ", ".join(f"{name} {means[name]:.3f}" for name in ("loss", "accuracy") if name in means)
                    with bar.external_write_mode():  # above the bar
                        print(f"step {progress.step:,}: held-out {shown}", flush=True)
                is_best = "loss" in means and (progress.best_loss is None or means["loss"] < progress.best_loss)
                progress.best_loss = means["loss"] if is_best else progress.best_loss
            stop = bool(signals)  # read once: a signal during `save` stops after the next step
            if stop or is_last or is_best or (config.save_every and progress.step % config.save_every == 0):
                recorder.save(task, optimizer, progress, is_best=is_best)
            if stop:
                break


class PlainLines:
    """A stream for a progress bar that is not shown on a terminal: plain lines instead of one that is rewritten."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        """Write the text of one update as a line."""
        if text.strip():
            print(text.strip(), file=self.stream, flush=True)


def progress_bar(total: int, description: str, unit: str, initial: int = 0) -> tqdm:
    """Return a progress bar on stderr; where that is a file or a pipe, a line every ten seconds and at the end."""
    options: dict[str, Any] = {"total": total, "desc": description, "unit": unit, "initial": initial}
    if sys.stderr.isatty():
        return tqdm(**options, mininterval=0.5)
    form = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    return tqdm(**options, file=PlainLines(sys.stderr), bar_format=form, mininterval=PLAIN_SECONDS, miniters=1)


def num_steps(config: Config, train_batches: Loader) -> int:
    """Return the number of optimiser steps of a run."""
    return config.max_steps or config.epochs * train_batches.steps_per_epoch


def accumulate_gradient(task: Task, step: int) -> dict[str, float]:
    """Leave the gradient of a step's summed loss in `.grad`; return the sums of loss, count, tokens and metrics."""
    task.model.train()
    device = _device_of(task.model)
    sums: Counter = Counter()
    for batch in task.train_batches.micro_batches(step):
        with _autocast(device, task.dtype):
            loss, count, metrics = task.loss(batch.to(device))
        loss.backward()
        # Tensors are added, not floats: a float would make the loop wait for the device in every micro-batch.
        sums.update({"loss": loss.detach(), "count": count, **metrics})
        sums["tokens"] += len(batch.input_ids)
    return {name: float(value) for name, value in sums.items()}


@torch.no_grad()
def evaluate(task: Task) -> dict[str, float]:
    """Return the mean loss and metrics over all items of the evaluation batches; {} if there are none."""
    device = _device_of(task.model)
    sums: Counter = Counter()
    with eval_mode(task.model), _autocast(device, task.dtype):
        for batch in task.eval_batches:
            loss, count, metrics = task.loss(batch.to(device))
            sums.update({"loss": float(loss), "count": int(count), **{name: float(v) for name, v in metrics.items()}})
    return _means(sums)


def _log(recorder: Recorder, task: Task, progress: Progress, split: str, values: dict[str, float]) -> None:
    """Log one line, if there are values; tokens, items and seconds count from the start of the run."""
    if values:
        counters = {"tokens": progress.tokens, task.unit: progress.items, "seconds": progress.seconds}
        recorder.log({"step": progress.step, "split": split, **values, **counters})


def _check_finite(config: Config, step: int, value: float) -> None:
    # Checked before anything is written, so that the last checkpoint stays a good one.
    if not math.isfinite(value):
        raise DivergedError(
            f"--lr {config.lr}: the loss or its gradient is {value} in step {step + 1}, try a lower one"
        )


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def _means(sums: Counter) -> dict[str, float]:
    """Divide the sums by the count; {} if nothing was counted."""
    if not sums["count"]:
        return {}
    return {name: value / sums["count"] for name, value in sums.items() if name not in ("count", "tokens")}
