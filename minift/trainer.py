"""The training loop: accumulate, clip, step, evaluate, log, save.

The loop does not know the loss or the files. A `Task` gives it the model, the batches and the loss; a `Recorder` keeps
metrics and checkpoints.
"""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from signal import SIGTERM
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from minift.batching import Loader
from minift.config import Config
from minift.errors import UserError
from minift.model import eval_mode
from minift.optim import adamw, learning_rate, total_norm
from minift.progress import print_above, progress_bar

PRINTED = ("loss", "lm_loss", "accuracy")  # the metrics that are printed after an evaluation

# From a batch to the sum to minimise, its number of items (tokens, pairs), and the sums of its metrics. The sum is
# logged as `loss`, unless a metric `loss` replaces it. A metric is divided by the number of items, or by a count of its
# own: `lm_loss` by `lm_loss_count`.
LossFunction = Callable[[Any], tuple[Tensor, Tensor, dict[str, Tensor]]]


class Ranks(NamedTuple):
    """The processes that train one model together, by default one; `run.distributed` has those of torchrun."""

    rank: int = 0
    world_size: int = 1
    sum_values: Callable[[dict[str, float]], dict[str, float]] = dict  # over the ranks
    # A context for a number of backward passes: at its end, `.grad` has the sums over the ranks.
    summed_gradients: Callable[[nn.Module, int], AbstractContextManager[None]] = lambda model, passes: nullcontext()
    own_part: Callable[[Tensor], Tensor] = lambda tensor: tensor  # of a sharded parameter or moment


class Task(NamedTuple):
    """A model to train, its batches and its loss."""

    model: nn.Module
    loss: LossFunction
    train_batches: Loader
    eval_batches: Loader
    write_model: Callable[[Path], None]  # writes the model into a folder, as other libraries read it
    unit: str  # the item that the loss counts: "supervised_tokens", "pairs", "prompts" or "rankings"
    dtype: torch.dtype = torch.float32  # of the forward pass: bfloat16 means autocast
    ranks: Ranks = Ranks()


@dataclass
class Progress:
    """The state of a run: with the parameters and AdamW's moments, all that resuming needs."""

    step: int = 0  # optimiser steps done
    tokens: int = 0
    items: int = 0  # of `Task.unit`
    seconds: float = 0.0
    best_loss: float | None = None  # the lowest evaluation loss after a step
    sums: dict[str, float] = field(default_factory=dict)  # of loss, count, … over the steps since the last logged line


class Recorder(Protocol):
    """Interface for keeping a run's metrics and checkpoints; `run.folder.Run` implements it for the scripts."""

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        """Put a resumed run's parameters and moments back and return its progress; else return a new `Progress`."""

    def log(self, line: dict[str, Any]) -> None:
        """Keep one line of metrics."""

    def save(self, task: Task, optimizer: torch.optim.Optimizer, progress: Progress, *, is_best: bool) -> None:
        """Keep a checkpoint; `is_best` says that its evaluation loss is the lowest so far."""

    def guard(self) -> AbstractContextManager[list[int]]:
        """Return a context for the loop; it yields a list, empty until the run must stop after its step."""


def train(task: Task, config: Config, recorder: Recorder) -> None:
    """Train `task.model` in place for `config.max_steps` optimiser steps, or `config.epochs` passes over the data.

    Dropout is seeded by seed and micro-batch, the order by seed and epoch, so neither evaluating more often nor
    resuming changes anything. Raises DivergedError if the loss or gradient is not finite, and like `recorder.guard`
    after a signal.
    """
    optimizer = adamw(task.model, config.lr, config.weight_decay)
    total_steps = num_steps(config, task.train_batches)
    progress = recorder.restore(task.model, optimizer)
    if progress.step == 0:
        _log_evaluation(recorder, task, progress, evaluate(task))

    clock = time.perf_counter() - progress.seconds
    with progress_bar(total_steps, "training", "step", progress.step) as bar, recorder.guard() as signals:
        for step in range(progress.step, total_steps):
            lr = learning_rate(step, config.lr, config.schedule, config.warmup_steps, total_steps)
            sums, grad_norm = optimizer_step(task, optimizer, config, step, lr)
            _add(progress.sums, sums)
            progress.step = step + 1
            progress.tokens += int(sums["tokens"])
            progress.items += int(sums["count"])
            progress.seconds = time.perf_counter() - clock

            if _is_due(config.log_every, progress.step, total_steps):
                means = _means(progress.sums)
                _log(recorder, task, progress, "train", {**means, "lr": lr, "grad_norm": grad_norm})
                rate = progress.tokens / progress.seconds
                bar.set_postfix_str(f"loss {means['loss']:.3f}, {rate:,.0f} tokens/s", refresh=False)
                progress.sums = {}
            bar.update()

            is_best = False
            if _is_due(config.eval_every, progress.step, total_steps):
                means = evaluate(task)
                _check_finite(config, progress.step, means.get("loss", 0.0))
                _log_evaluation(recorder, task, progress, means, bar)
                if means and (progress.best_loss is None or means["loss"] < progress.best_loss):
                    progress.best_loss, is_best = means["loss"], True

            # Read once: a signal during `save` stops after the next step. All ranks stop if one has a signal.
            stop = task.ranks.sum_values({"signals": len(signals)})["signals"] > 0
            if stop and not signals:
                signals.append(SIGTERM)
            if stop or is_best or _is_due(config.save_every, progress.step, total_steps):
                _check_finite(config, progress.step, _loss_after(task, optimizer, step))
                recorder.save(task, optimizer, progress, is_best=is_best)
            if stop:
                break


def num_steps(config: Config, train_batches: Loader) -> int:
    """Return the number of optimiser steps of a run."""
    return config.max_steps or config.epochs * train_batches.steps_per_epoch


def optimizer_step(
    task: Task, optimizer: torch.optim.Optimizer, config: Config, step: int, lr: float
) -> tuple[dict[str, float], float]:
    """Update the weights once; return the step's sums, and the gradient's norm before clipping.

    The gradient is that of the mean loss over all items of the step, however they are divided into micro-batches.
    """
    sums = accumulate_gradient(task, config.seed, step)
    gradients = [parameter.grad for parameter in task.model.parameters() if parameter.grad is not None]
    grad_norm = total_norm(gradients).item() / sums["count"]
    _check_finite(config, step, sums["loss"] + grad_norm)
    clip = min(1.0, config.max_grad_norm / (grad_norm + 1e-6))  # as in torch's clip_grad_norm_
    torch._foreach_mul_(gradients, clip / sums["count"])  # the mean and the clipping, in one pass
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return sums, grad_norm


def accumulate_gradient(task: Task, seed: int, step: int) -> dict[str, float]:
    """Leave the gradient of a step's summed loss in `.grad`; return the sums of loss, count, tokens and metrics.

    Rank r of K computes the step's micro-batches r, r + K, …; gradient and sums are those of all ranks.
    """
    task.model.train()
    rank, world_size = task.ranks.rank, task.ranks.world_size
    batches = [*task.train_batches.micro_batches(step, rank, world_size)]
    sums: dict[str, Any] = {}
    with task.ranks.summed_gradients(task.model, len(batches)):
        for index, batch in enumerate(batches):
            number = step * task.train_batches.grad_accum + rank + index * world_size  # of all micro-batches of the run
            torch.manual_seed(micro_batch_seed(seed, number))  # dropout, whichever rank computes it
            loss, values = _losses_of(task, batch)
            loss.backward()
            # Tensors are added, not floats: a float would make the loop wait for the device in every micro-batch.
            _add(sums, {**values, "tokens": (batch.rows >= 0).sum()})  # a shared one counts in each row
    if next(task.model.parameters()).device.type != "cpu":  # the next batches are made while the device still computes
        task.train_batches.make_ready(step + 1, rank, world_size)
    return task.ranks.sum_values({name: float(value) for name, value in sums.items()})


def micro_batch_seed(seed: int, number: int) -> int:
    """Return a seed made of the run's seed and a micro-batch's number.

    On a CPU torch reads its low 32 bits only, and those of `(seed << 32) + number` do not depend on the run's seed.
    """
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0])


@torch.no_grad()
def evaluate(task: Task) -> dict[str, float]:
    """Return the mean loss and metrics over all items of the evaluation batches; {} if there are none."""
    sums: dict[str, float] = {}
    with eval_mode(task.model):
        for batch in islice(task.eval_batches, task.ranks.rank, None, task.ranks.world_size):
            _, values = _losses_of(task, batch)
            _add(sums, {name: float(value) for name, value in values.items()})
    return _means(task.ranks.sum_values(sums))


@torch.no_grad()
def _loss_after(task: Task, optimizer: torch.optim.Optimizer, step: int) -> float:
    """Return the loss of a step's first micro-batch after the update; NaN if a parameter or a moment is not finite.

    A checkpoint for which this is not finite must not be saved: at no learning rate could a run continue from it.
    """
    tensors = [*task.model.parameters(), *(moment for state in optimizer.state.values() for moment in state.values())]
    parts = [part for part in map(task.ranks.own_part, tensors) if part.numel()]
    are_finite = torch.stack([limit.isfinite() for part in parts for limit in part.aminmax()]).all()
    with eval_mode(task.model):
        loss, _ = _losses_of(task, next(task.train_batches.micro_batches(step)))
    # Summed over the ranks it is NaN if a part of one is: then all of them raise the error.
    return task.ranks.sum_values({"loss": float(loss) if are_finite else math.nan})["loss"]


def _losses_of(task: Task, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a batch's summed loss, and that value with the count and the metrics by name."""
    device = next(task.model.parameters()).device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=task.dtype == torch.bfloat16):
        loss, count, metrics = task.loss(batch)
    return loss, {"loss": loss.detach(), "count": count, **metrics}


def _add(sums: dict[str, Any], values: dict[str, Any]) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0) + value


def _means(sums: dict[str, float]) -> dict[str, float]:
    """Divide each sum by its own count, or by that of the items; {} if nothing was counted."""
    if not sums.get("count"):
        return {}
    return {
        name: value / sums.get(f"{name}_count", sums["count"])
        for name, value in sums.items()
        if name != "tokens" and not name.endswith("count")
    }


def _is_due(every: int, step: int, total_steps: int) -> bool:
    """Return whether to do something after a step: after every so many steps, unless that is 0, and after the last."""
    return step == total_steps or (every > 0 and step % every == 0)


def _log_evaluation(
    recorder: Recorder, task: Task, progress: Progress, means: dict[str, float], bar: Any = None
) -> None:
    """Log and print what an evaluation found, if it had batches; the printed line is above the bar if there is one."""
    if means:
        _log(recorder, task, progress, "eval", means)
        shown = ", ".join(f"{name} {means[name]:.3f}" for name in PRINTED if name in means)
        print_above(bar, f"step {progress.step:,}: held-out {shown}")


def _log(recorder: Recorder, task: Task, progress: Progress, split: str, values: dict[str, float]) -> None:
    """Log one line; tokens, items and seconds count from the start of the run."""
    counters = {"tokens": progress.tokens, task.unit: progress.items, "seconds": progress.seconds}
    recorder.log({"step": progress.step, "split": split, **values, **counters})


class DivergedError(UserError):
    """A loss or gradient that is not finite after some optimiser steps."""

    def __init__(self, lr: float, value: float, steps: int) -> None:
        self.problem, self.steps = f"the loss or its gradient is {value}", steps
        super().__init__(f"--lr {lr}: {self.problem} after step {steps}, try a lower one")


def _check_finite(config: Config, steps: int, value: float) -> None:
    """Raise DivergedError if a value is not: before anything is written, so that the last checkpoint stays good."""
    if not math.isfinite(value):
        raise DivergedError(config.lr, value, steps)
