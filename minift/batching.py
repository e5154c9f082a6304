"""Examples → packed batches, and the batches of each optimiser step.

A batch holds no padding: it is the flat list of its real tokens. `rows` says where in the list each row's tokens are.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from minift.encode import IGNORE_INDEX, Example
from minift.pairs import Ranking


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
    lengths = [len(example.input_ids) for example in examples]
    return Batch(
        input_ids=torch.tensor([token for example in examples for token in example.input_ids]),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        labels=torch.tensor([label for example in examples for label in example.labels]),
        rows=lay_out_rows(lengths),
    )


class PairBatch(NamedTuple):
    """Packed rows and P pairs of them. All tensors are int64 but margins and weights, which are float64."""

    input_ids: Tensor  # (N,)
    positions: Tensor  # (N,) from 0 in each row
    labels: Tensor  # (N,) the tokens of each ranking's best row, IGNORE_INDEX elsewhere
    rows: Tensor  # (R, T) indices into the flat list, -1 past a row's end; rows of a ranking share their prefixes
    chosen: Tensor  # (P,) the preferred row of each pair
    rejected: Tensor  # (P,) the other one
    margins: Tensor  # (P,) by how much it is preferred
    weights: Tensor  # (P,) with sum 1 over the pairs of each ranking

    def to(self, device: torch.device) -> "PairBatch":
        """Return the batch on a device."""
        return PairBatch(*(tensor.to(device, non_blocking=True) for tensor in self))


def collate_rankings(rankings: Sequence[Ranking]) -> PairBatch:
    """Lay rankings end to end, each shared prefix once.

    A ranking of K responses gives K(K - 1)/2 pairs, with `best_only` the K - 1 pairs of its first response. Their
    weights are equal and sum to 1. Raises ValueError for a ranking of one response, or with an empty one.

    >>> batch = collate_rankings([Ranking([[2, 10, 11, 20, 2], [2, 10, 11, 2]], margin=0.5)])
    >>> batch.input_ids
    tensor([ 2, 10, 11, 20,  2,  2])
    >>> batch.positions
    tensor([0, 1, 2, 3, 4, 3])
    >>> batch.labels
    tensor([   2,   10,   11,   20,    2, -100])
    >>> batch.rows
    tensor([[ 0,  1,  2,  3,  4],
            [ 0,  1,  2,  5, -1]])
    >>> batch.chosen, batch.rejected
    (tensor([0]), tensor([1]))
    >>> batch.margins, batch.weights
    (tensor([0.5000], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """
    input_ids: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    rows: list[list[int]] = []
    pairs: list[tuple[int, int, float, float]] = []  # chosen row, rejected row, margin, weight
    for responses, margin, best_only in rankings:
        if len(responses) < 2 or not all(responses):
            raise ValueError(f"a ranking of rows of {[len(row) for row in responses]} tokens, expected 2 rows or more")
        tree_ids, tree_positions, tree_rows = share_prefixes(responses)
        numbers = range(len(rows), len(rows) + len(responses))
        its_pairs = [(numbers[0], other) for other in numbers[1:]] if best_only else [*combinations(numbers, 2)]
        pairs.extend((chosen, rejected, margin, 1 / len(its_pairs)) for chosen, rejected in its_pairs)
        start, best_length = len(input_ids), len(responses[0])  # the best row's tokens are the first of the tree
        input_ids += tree_ids
        positions += tree_positions
        labels += tree_ids[:best_length] + [IGNORE_INDEX] * (len(tree_ids) - best_length)
        rows += [[start + index for index in row] for row in tree_rows]
    chosen, rejected, margins, weights = zip(*pairs, strict=True)
    length = max(len(row) for row in rows)
    return PairBatch(
        input_ids=torch.tensor(input_ids),
        positions=torch.tensor(positions),
        labels=torch.tensor(labels),
        rows=torch.tensor([row + [-1] * (length - len(row)) for row in rows]),
        chosen=torch.tensor(chosen),
        rejected=torch.tensor(rejected),
        margins=torch.tensor(margins, dtype=torch.float64),
        weights=torch.tensor(weights, dtype=torch.float64),
    )


def share_prefixes(sequences: Sequence[Sequence[int]]) -> tuple[list[int], list[int], list[list[int]]]:
    """Merge sequences into a prefix tree, a prefix that several of them share stored once.

    Return the tree's ids, their positions, and for each sequence the indices of its tokens in the tree. Causal
    attention gives a shared token the same value in every sequence, so it is computed once. The gradients of all its
    sequences add up in it (prefix sharing, arXiv 2410.20305). A sequence's last token is never shared: its reward is
    read there.

    >>> share_prefixes([[2, 10, 20], [2, 10, 21]])
    ([2, 10, 20, 21], [0, 1, 2, 2], [[0, 1, 2], [0, 1, 3]])
    """
    ids: list[int] = []
    positions: list[int] = []
    indices: list[list[int]] = []
    children: dict[tuple[int, int], int] = {}  # (index of the previous token, id) -> index of the token
    for sequence in sequences:
        path: list[int] = []
        for position, token in enumerate(sequence):
            edge = (path[-1] if path else -1, token)
            is_last = position == len(sequence) - 1
            index = len(ids) if is_last else children.setdefault(edge, len(ids))
            if index == len(ids):
                ids.append(token)
                positions.append(position)
            path.append(index)
        indices.append(path)
    return ids, positions, indices


def lay_out_rows(lengths: Sequence[int]) -> Tensor:
    """Return `rows (R, T)` for rows of these lengths, laid end to end in the flat list; -1 past each row's end."""
    length = torch.tensor(lengths)[:, None]  # (R, 1)
    offset = torch.arange(int(length.max()))  # (T,)
    start = length.cumsum(0) - length  # (R, 1)
    return torch.where(offset < length, start + offset, -1)


Item = TypeVar("Item")
AnyBatch = TypeVar("AnyBatch", Batch, PairBatch, covariant=True)


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

    def micro_batches(self, step: int) -> Iterator[AnyBatch]:
        """Yield the micro-batches of optimiser step `step`, counted from 0 over all epochs."""
        for numbers in self.examples_of(step):
            yield self.collate([self.examples[number] for number in numbers])

    def examples_of(self, step: int) -> Iterator[list[int]]:
        """Yield the indices of the examples in each micro-batch of a step."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        count = len(self.examples)
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(count, generator=generator) if self.order == "shuffled" else torch.arange(count)
        per_step = self.batch_size * self.grad_accum
        numbers = order[step_in_epoch * per_step : (step_in_epoch + 1) * per_step].tolist()
        for start in range(0, len(numbers), self.batch_size):
            yield numbers[start : start + self.batch_size]

    def __iter__(self) -> Iterator[AnyBatch]:
        """Yield the batches of one pass over all examples, in order."""
        for start in range(0, len(self.examples), self.batch_size):
            yield self.collate(self.examples[start : start + self.batch_size])
