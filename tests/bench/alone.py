"""Matrix products alone: a bound for minift's speed, as if nothing else took time.

One product of each kind is repeated, so its weight is in the processor's cache, where a real step finds few of them.
"""

import statistics
import time
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.bench import Work, ours

LEFT = {torch.ops.aten.mm: 0, torch.ops.aten.addmm: 1, torch.ops.mkldnn._linear_pointwise: 0}  # the left matrix
REPEATS = 3


class Products(TorchDispatchMode):
    """Note the matrix products within a block, those of a kind with one example."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Hashable, tuple[Callable[[], Any], int, int]] = {}  # a call, its operations, and how many

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if operation.overloadpacket in LEFT and result.numel():
            left, right = args[LEFT[operation.overloadpacket] :][:2]
            kind = (operation, left.shape, left.stride(), right.shape, right.is_contiguous())
            _, _, count = self.found.get(kind, (None, 0, 0))
            cost = 2 * result.numel() * left.shape[-1]
            self.found[kind] = lambda: operation(*args, **(kwargs or {})), cost, count + 1
        return result


def products_alone(work: Work) -> tuple[int, float]:
    """Return the operations of all matrix products in minift's work, and the least seconds that they take."""
    with Products() as products:
        ours.run(work)
    operations = sum(cost * count for _, cost, count in products.found.values())
    return operations, sum(_median_time(call) * count for call, _, count in products.found.values())


def _median_time(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
