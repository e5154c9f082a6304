"""The losses of both scripts, and a recorder that writes nothing: for tests that train with minift's loop.

Nothing here imports transformers, so that tests/bench can measure the memory of minift alone.
"""

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minift.batching import Batch
from minift.losses import bradley_terry, completion_cross_entropy, next_token_targets, preference_metrics
from minift.model import OPT, RewardModel
from minift.pairs import PairBatch
from minift.trainer import LossFunction, Progress, Task


def sft_loss(model: OPT) -> LossFunction:
    """Return the loss of train_sft.py."""

    def loss(batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        wanted, targets = next_token_targets(batch.labels, batch.positions)
        hidden = model(batch.input_ids, batch.positions, batch.rows, wanted=wanted)
        return *completion_cross_entropy(hidden, model.head, targets), {}

    return loss


def rm_loss(model: RewardModel, center: float = 0.0) -> LossFunction:
    """Return the loss of train_rm.py with --lm-weight 0."""

    def loss(batch: PairBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        rewards = model(batch.input_ids, batch.positions, batch.rows)  # (R,)
        batch = batch.to(rewards.device)
        chosen, rejected = rewards[batch.chosen], rewards[batch.rejected]  # (P,), (P,)
        metrics = preference_metrics(chosen, rejected, batch.weights)
        return *bradley_terry(chosen, rejected, batch.margins, batch.weights, center), metrics

    return loss


class MemoryRecorder:
    """A `trainer.Recorder` that keeps the lines in memory and no checkpoints."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        return Progress()

    def log(self, line: dict[str, Any]) -> None:
        self.lines.append(line)

    def save(self, task: Task, optimizer: torch.optim.Optimizer, progress: Progress, *, is_best: bool) -> None:
        pass

    def guard(self) -> contextlib.AbstractContextManager[list[int]]:
        return contextlib.nullcontext([])


def write_nothing(folder: Path) -> None:
    """Write no model: the `write_model` of a task whose model is not kept."""
