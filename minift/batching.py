"""ids → packed batches with their row layout, and which rows each optimiser step sees."""

from collections.abc import Iterator, Sequence
from itertools import combinations
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


class PairBatch(NamedTuple):
    """Packed rows and the pairs among them: which row was preferred to which. int64 but for margins and weights."""

    input_ids: Tensor  # (N,)
    positions: Tensor  # (N,) from 0 in each row
    labels: Tensor  # (N,) the tokens of each ranking's best row, -100 elsewhere
    rows: Tensor  # (R, T) indices into the flat list, -1 past a row's end; rows of a ranking share what they begin with
    better: Tensor  # (P,) the row that was preferred in each pair
    worse: Tensor  # (P,) the other one
    margins: Tensor  # (P,) float64, by how much
    weights: Tensor  # (P,) float64, adding up to 1 for each prompt

    def to(self, device: torch.device) -> "PairBatch":
        return PairBatch(*(tensor.to(device, non_blocking=True) for tensor in self))


def collate_rankings(rankings: Sequence[tuple]) -> PairBatch:
    """Lay rankings end to end: (the ids of K >= 2 whole rows, prompt and response, best first; the pairs' margin).

    A beginning that rows of a ranking have in common stands in the flat list once, and in each of these rows: causal
    attention gives its tokens the same values in all, so they are computed once and their gradients add up by
    themselves (arXiv 2410.20305). A row's last token is always its own: its reward is read there.

    A ranking is all its K(K - 1)/2 pairs, each of weight 1 / that. A third item that is true says that only the first
    row is known to be better than the others, so that it is K - 1 pairs. Raises ValueError for a ranking of one row, or
    with a row of no tokens.

    >>> batch = collate_rankings([([[2, 10, 11, 20, 2], [2, 10, 11, 2]], 0.5)])
    >>> batch.input_ids
    tensor([ 2, 10, 11, 20,  2,  2])
    >>> batch.positions
    tensor([0, 1, 2, 3, 4, 3])
    >>> batch.labels
    tensor([   2,   10,   11,   20,    2, -100])
    >>> batch.rows
    tensor([[ 0,  1,  2,  3,  4],
            [ 0,  1,  2,  5, -1]])
    >>> batch.better, batch.worse
    (tensor([0]), tensor([1]))
    >>> batch.margins, batch.weights
    (tensor([0.5000], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """
    input_ids: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    rows: list[list[int]] = []
    pairs: list[tuple[int, int, float, float]] = []  # better, worse, margin, weight
    for responses, margin, *best_only in rankings:
        if len(responses) < 2 or not all(responses):
            raise ValueError(f"a ranking of rows of {[len(row) for row in responses]} tokens, expected 2 rows or more")
        numbers = range(len(rows), len(rows) + len(responses))
        known: dict[tuple[int, int], int] = {}  # a token's predecessor in its row, and its id -> its place in the list
        for row in responses:
            places: list[int] = []
            for position, token in enumerate(row):
                step = (places[-1] if places else -1, token)
                place = known.get(step, len(input_ids)) if position < len(row) - 1 else len(input_ids)
                if place == len(input_ids):
                    input_ids.append(token)
                    positions.append(position)
                    labels.append(token if len(rows) == numbers[0] else -100)
                    if position < len(row) - 1:
                        known[step] = place
                places.append(place)
            rows.append(places)
        both = [(numbers[0], worse) for worse in numbers[1:]] if any(best_only) else [*combinations(numbers, 2)]
        pairs.extend((better, worse, margin, 1 / len(both)) for better, worse in both)
    better, worse, margins, weights = zip(*pairs, strict=True)
    length = max(len(row) for row in rows)
    return PairBatch(
        input_ids=torch.tensor(input_ids),
        positions=torch.tensor(positions),
        labels=torch.tensor(labels),
        rows=torch.tensor([row + [-1] * (length - len(row)) for row in rows]),
        better=torch.tensor(better),
        worse=torch.tensor(worse),
        margins=torch.tensor(margins, dtype=torch.float64),
        weights=torch.tensor(weights, dtype=torch.float64),
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
