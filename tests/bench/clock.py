"""The time at which a device has done its work, and the time that optimiser steps take."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.bench import Timing, Work


def now(device: str) -> float:
    """Return the time in seconds, on a GPU after all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.time()


@contextmanager
def step_ends(work: Work) -> Iterator[list[float]]:
    """Yield the times at which the steps of any optimiser end; on a GPU only those of two steps, which are read."""
    ends: list[float] = []
    # To wait for a GPU after each step would leave it idle until the next batch is there.
    read = (work.warm_up, math.ceil(len(work.counts[: work.limit]) / work.batch_size))

    def note(*_: Any) -> None:
        ends.append(now(work.device if len(ends) + 1 in read else "cpu"))

    handle = register_optimizer_step_post_hook(note)
    try:
        yield ends
    finally:
        handle.remove()


def time_of_steps(work: Work, ends: list[float]) -> Timing:
    """Return the time of an epoch's steps after the warm-up, in which memory is allocated and layers are compiled."""
    later = work.counts[work.warm_up * work.batch_size : work.limit]
    assert len(ends) == work.warm_up + math.ceil(len(later) / work.batch_size)  # each step was noted once
    return Timing(ends[-1] - ends[work.warm_up - 1], sum(later))
