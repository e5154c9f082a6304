"""Examples → packed batches, and the batches of each optimiser step.

A batch holds no padding: it is the flat list of its real tokens. `rows` says where in the list each row's tokens are.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from minift.encode import Example


class Batch(NamedTuple):
    """A packed batch: N real tokens of R rows, the longest of T tokens. All tensors are int64."""

    input_ids: Tensor  # (N,)
    positions: Tensor  # (N,) from 0 in each row
    labels: Tensor  # (N,) aligned with input_ids, IGNORE_INDEX where unsupervised
    rows: Tensor  # (R, T) indices into the flat list, -1 past a row's end

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


def collate(examples: Sequence[Example]) -> Batch:
    """Lay examples end to end.

    >>> batch = collate([Example([2, 10, 11], [-100, -100, 11]), Example([2, 12], [-100, 12])])
    >>> batch.input_ids
    tensor([ 2, 10, 11,  2, 12])
    >>> batch.positions
    tensor([0, 1, 2, 0, 1])
    >>> batch.labels
    tensor([-100, -100,   11, -100,   12])
    >>> batch.rows
    tensor([[ 0,  1,  2],
            [ 3,  4, -1]])
    """
    input_ids, positions, rows = pack([example.input_ids for example in examples])
    labels = torch.tensor([label for example in examples for label in example.labels])
    return Batch(input_ids, positions, labels, rows)


def pack(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Lay sequences of ids end to end; return the `input_ids`, `positions` and `rows` that a model takes."""
    lengths = [len(ids) for ids in sequences]
    rows = [range(end - length, end) for end, length in zip(accumulate(lengths), lengths, strict=True)]
    input_ids = torch.tensor([token for ids in sequences for token in ids])
    return input_ids, torch.cat([torch.arange(length) for length in lengths]), pad_rows(rows)


def pad_rows(rows: Sequence[Sequence[int]]) -> Tensor:
    """Return the indices of each row's tokens in the flat list as `rows (R, T)`, -1 past a row's end."""
    length = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (length - len(row))] for row in rows])


@lru_cache(maxsize=1)  # a step takes a few of its indices, and drawing a million takes longer than a small step
def epoch_order(count: int, seed: int) -> Tensor:
    """Return the numbers below `count` in the order of an epoch; `seed` is the run's plus the epoch's number."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


AnyBatch = TypeVar("AnyBatch", covariant=True)


@dataclass(frozen=True)
class Loader(Generic[AnyBatch]):
    """The batches of a data set: those of each optimiser step for training, or all of them in order for evaluation.

    The batches of a step depend only on the seed and the step, so resuming needs no loader state. An epoch is every
    example once, in file order or in that of `torch.randperm` seeded with seed + epoch (as transformers'
    Trainer). The last step of an epoch may have fewer micro-batches.
    """

    examples: Sequence[Any]
    collate: Callable[[Sequence[Any]], AnyBatch]
    batch_size: int
    grad_accum: int = 1
    seed: int = 0
    order: Literal["shuffled", "sequential"] = "sequential"

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of optimiser steps in one pass over the examples."""
        return -(-len(self.examples) // (self.batch_size * self.grad_accum))

    def micro_batches(self, step: int, first: int = 0, every: int = 1) -> Iterator[AnyBatch]:
        """Yield the micro-batches `first`, `first + every`, … of a step, which is counted from 0 over all epochs.

        Raises ValueError without examples.
        """
        if not self.examples:
            raise ValueError("no examples, so no optimiser step can be made")
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        per_step = self.batch_size * self.grad_accum
        begin, end = step_in_epoch * per_step, min((step_in_epoch + 1) * per_step, len(self.examples))
        indices: Sequence[int] = range(begin, end)
        if self.order == "shuffled":
            indices = epoch_order(len(self.examples), self.seed + epoch)[begin:end].tolist()
        for start in range(first * self.batch_size, len(indices), every * self.batch_size):
            yield self.collate([self.examples[index] for index in indices[start : start + self.batch_size]])

    def __iter__(self) -> Iterator[AnyBatch]:
        """Yield the batches of one pass over all examples, in order."""
        for start in range(0, len(self.examples), self.batch_size):
            yield self.collate(self.examples[start : start + self.batch_size])
