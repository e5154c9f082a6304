"""Examples → packed batches, and the batches of each optimiser step.

A batch holds no padding: it is the flat list of its real tokens, and a prefix that rows share is in it once. `rows`
says where in the list each row's tokens are. A batch stays on the CPU; the model copies what it needs to its device.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import takewhile
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from minift.encode import IGNORE_INDEX, Example


class Batch(NamedTuple):
    """A packed batch: N real tokens of R rows, the longest of T tokens. All tensors are int64."""

    input_ids: Tensor  # (N,)
    positions: Tensor  # (N,) from 0 in each row
    labels: Tensor  # (N,) aligned with input_ids, IGNORE_INDEX where unsupervised
    rows: Tensor  # (R, T) indices into the flat list, -1 past a row's end


def collate(examples: Sequence[Example]) -> Batch:
    """Lay examples end to end; a prefix that their prompts share, such as the template's start, is stored once.

    >>> batch = collate([Example([2, 9, 10, 11], [-100, -100, -100, 11]), Example([2, 9, 12], [-100, -100, 12])])
    >>> batch.input_ids
    tensor([ 2,  9, 10, 11,  9, 12])
    >>> batch.positions
    tensor([0, 1, 2, 3, 1, 2])
    >>> batch.labels
    tensor([-100, -100, -100,   11, -100,   12])
    >>> batch.rows
    tensor([[ 0,  1,  2,  3],
            [ 0,  4,  5, -1]])
    """
    prompt_lengths = [sum(1 for _ in takewhile(lambda label: label == IGNORE_INDEX, labels)) for _, labels in examples]
    # A prompt's last token is not shared: `next_token_targets` expects the first supervised one right after it.
    limits = [length - 1 for length in prompt_lengths]
    input_ids, positions, paths = share_prefixes([example.input_ids for example in examples], limits)
    labels = [IGNORE_INDEX] * len(input_ids)
    for example, path in zip(examples, paths, strict=True):
        for index, label in zip(path, example.labels, strict=True):
            labels[index] = label
    return Batch(to_tensor(input_ids), to_tensor(positions), to_tensor(labels), pad_rows(paths))


def pack(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Lay sequences of ids end to end, shared prefixes once; return the model's `input_ids`, `positions` and `rows`.

    A sequence's last token, where its reward or next token is read, is not shared.
    """
    input_ids, positions, paths = share_prefixes(sequences, [len(sequence) - 1 for sequence in sequences])
    return to_tensor(input_ids), to_tensor(positions), pad_rows(paths)


def share_prefixes(
    sequences: Sequence[Sequence[int]], limits: Sequence[int]
) -> tuple[list[int], list[int], list[list[int]]]:
    """Merge sequences into a prefix tree: a prefix that several of them share is stored once.

    Only the tokens before a sequence's limit are shared. Return the tree's ids, their positions, and for each
    sequence the indices of its tokens in the tree. Causal attention gives a shared token the same value in every
    sequence, and their gradients add up in it (prefix sharing, arXiv 2410.20305). Only dropout sees a difference: it
    draws once for a shared token.

    >>> share_prefixes([[2, 10, 20], [2, 10, 21]], limits=[2, 2])
    ([2, 10, 20, 21], [0, 1, 2, 2], [[0, 1, 2], [0, 1, 3]])
    """
    ids: list[int] = []
    positions: list[int] = []
    paths: list[list[int]] = []
    children: dict[tuple[int, int], int] = {}  # (index of the previous token, id) -> index of the token
    for sequence, limit in zip(sequences, limits, strict=True):
        path: list[int] = []
        for position, token in enumerate(sequence):
            index = len(ids)  # of a new token, unless the tree has it already
            if position < limit:
                index = children.setdefault((path[-1] if path else -1, token), index)
            if index == len(ids):
                ids.append(token)
                positions.append(position)
            path.append(index)
        paths.append(path)
    return ids, positions, paths


def pad_rows(rows: Sequence[Sequence[int]]) -> Tensor:
    """Return the indices of each row's tokens in the flat list as `rows (R, T)`, -1 past a row's end."""
    padded = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int64)
    for row, indices in zip(padded, rows, strict=True):
        row[: len(indices)] = indices
    return torch.from_numpy(padded)


def to_tensor(numbers: Sequence[int]) -> Tensor:
    """Return whole numbers as an int64 tensor; torch.tensor would take several times as long."""
    return torch.from_numpy(np.array(numbers, dtype=np.int64))


@lru_cache(maxsize=1)  # a step takes a few of its indices, and drawing a million takes longer than a small step
def epoch_order(count: int, seed: int) -> Tensor:
    """Return the numbers below `count` in the order of an epoch; `seed` is the run's plus the epoch's number."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


AnyBatch = TypeVar("AnyBatch", covariant=True)


@dataclass(frozen=True)
class Loader(Generic[AnyBatch]):
    """The batches of a data set: those of each optimiser step for training, or all of them in order for evaluation.

    The batches of a step depend only on the seed and the step, so resuming needs no loader state. An epoch is every
    example once, in file order or in that of `torch.randperm` seeded with seed + epoch (as transformers' Trainer). The
    last step of an epoch may have fewer micro-batches.
    """

    examples: Sequence[Any]
    collate: Callable[[Sequence[Any]], AnyBatch]
    batch_size: int
    grad_accum: int = 1
    seed: int = 0
    order: Literal["shuffled", "sequential"] = "sequential"
    _ready: dict[tuple[int, int, int], list] = field(default_factory=dict, init=False, repr=False, compare=False)

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
        if (step, first, every) in self._ready:
            yield from self._ready.pop((step, first, every))
            return
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        per_step = self.batch_size * self.grad_accum
        part = slice(step_in_epoch * per_step, (step_in_epoch + 1) * per_step)
        indices: Sequence[int] = range(len(self.examples))[part]
        if self.order == "shuffled":
            indices = epoch_order(len(self.examples), self.seed + epoch)[part].tolist()
        for start in range(first * self.batch_size, len(indices), every * self.batch_size):
            yield self.collate([self.examples[index] for index in indices[start : start + self.batch_size]])

    def make_ready(self, step: int, first: int = 0, every: int = 1) -> None:
        """Collate the micro-batches of a step now, for the next call of `micro_batches` with the same arguments."""
        self._ready.clear()
        self._ready[step, first, every] = [*self.micro_batches(step, first, every)]

    def __iter__(self) -> Iterator[AnyBatch]:
        """Yield the batches of one pass over all examples, in order."""
        for start in range(0, len(self.examples), self.batch_size):
            yield self.collate(self.examples[start : start + self.batch_size])
