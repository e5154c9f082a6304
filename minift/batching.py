"""ids → packed batches with their row layout, and which rows each optimiser step sees."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """A packed batch: the flat list of its real tokens, and where each row's tokens lie in it. All int64."""

    input_ids: Tensor  # (N,)
    positions: Tensor  # (N,) from 0 in each row
    labels: Tensor  # (N,) aligned with input_ids, -100 where unsupervised
    rows: Tensor  # (R, T) indices into the flat list, -1 past a row's end

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


def collate(examples: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Batch:
    """Lay (input_ids, labels) pairs end to end.

    >>> batch = collate([([2, 10, 11], [-100, -100, 11]), ([2, 12], [-100, 12])])
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
    lengths = [len(input_ids) for input_ids, _ in examples]
    return Batch(
        input_ids=torch.tensor([token for input_ids, _ in examples for token in input_ids]),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        labels=torch.tensor([label for _, labels in examples for label in labels]),
        rows=lay_out_rows(lengths),
    )


def lay_out_rows(lengths: Sequence[int]) -> Tensor:
    """The `rows (R, T)` of rows of these lengths that follow each other in the flat list, −1 past each row's end."""
    length = torch.tensor(lengths)[:, None]  # (R, 1)
    offset = torch.arange(int(length.max()))  # (T,)
    start = length.cumsum(0) - length  # (R, 1)
    return torch.where(offset < length, start + offset, -1)


class Sampler(NamedTuple):
    """Which rows each optimiser step sees, as a pure function of the step: the place in the data is the step itself.

    An epoch is every row once, in the order of `torch.randperm` seeded with seed + epoch (trl's order, REFERENCE.md) or
    as they lie in the file. Micro-batches that are left over at an epoch's end make an optimiser step of their own.
    """

    num_rows: int
    batch_size: int
    grad_accum: int
    seed: int
    shuffled: bool = True

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_rows // (self.batch_size * self.grad_accum))

    def micro_batches(self, step: int) -> Iterator[list[int]]:
        """The row numbers of each micro-batch of optimiser step `step`, counted from 0 over all epochs."""
        epoch, place = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(self.num_rows, generator=generator) if self.shuffled else torch.arange(self.num_rows)
        rows_a_step = self.batch_size * self.grad_accum
        rows = order[place * rows_a_step : (place + 1) * rows_a_step].tolist()
        for start in range(0, len(rows), self.batch_size):
            yield rows[start : start + self.batch_size]
