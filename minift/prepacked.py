"""Matrix products of few rows, as in decoding, by prepacked weights.

To pack a weight is to copy it into blocks, in the order in which the processor reads them. `F.linear` does so in each
product. With thousands of rows that hardly counts, but it takes as long as a product with eight rows. oneDNN, torch's
library for products on a CPU, can keep the packed copy. The weight is then called prepacked.

Queries, keys and values become one product, which is faster than three. On a GPU that is all: nothing is prepacked.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minift.model import OPT, Attention

MIN_ROWS = {torch.float32: 4, torch.bfloat16: 1}  # with fewer rows, prepacked weights are not faster
EXPECTED_ROWS = 64  # the number of rows that oneDNN chooses the blocks for; products with any other are correct too


@contextmanager
def prepacked(model: OPT, num_rows: int) -> Iterator[None]:
    """Let a model multiply by prepacked copies of its weights within the block, if that is faster for `num_rows` rows.

    Queries, keys and values become one product; on a GPU nothing else changes. The copies take as much memory as the
    weights. Under autocast and within another such block nothing changes.
    """
    only_joins = is_on_gpu(model.head)
    is_fast = only_joins or (can_prepack(model.head) and num_rows >= MIN_ROWS[model.head.dtype])
    is_prepacked = "logits" in vars(model)
    if not is_fast or is_prepacked or torch.is_autocast_enabled(model.head.device.type):
        yield
        return
    replaced: list[tuple[nn.Module, str]] = []

    def replace(module: nn.Module, method: str, function: Callable[[Tensor], Any]) -> None:
        setattr(module, method, function)  # found before the method of the class
        replaced.append((module, method))

    try:
        if not only_joins:
            replace(model, "logits", product(model.head, None))
        done: set[nn.Module] = set()
        for module in model.modules():
            if isinstance(module, Attention) and "project" not in vars(module):
                linears = [module.q_proj, module.k_proj, module.v_proj]
                if all(map(is_plain, linears)):  # none with an adapter
                    replace(module, "project", joint_product(linears))
                    done.update(linears)
            elif not only_joins and is_plain(module) and module not in done:
                replace(module, "forward", product(module.weight, module.bias))
        yield
    finally:
        for module, method in replaced:
            delattr(module, method)


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether a module is a linear whose weight can be prepacked or joined. Others are left as they are."""
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    has_hooks = module._forward_hooks or module._forward_pre_hooks
    return not has_hooks and (is_on_gpu(module.weight) or can_prepack(module.weight))


def can_prepack(weight: Tensor) -> bool:
    """Return whether oneDNN is in this build of torch and multiplies numbers of this dtype on this processor.

    A sharded weight cannot be prepacked: all of it is here only while a pass needs it.
    """
    if weight.dtype not in MIN_ROWS or weight.device.type != "cpu" or hasattr(weight, "to_local"):
        return False
    is_there = torch.backends.mkldnn.is_available()
    return is_there and (weight.dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported())


def is_on_gpu(weight: Tensor) -> bool:
    """Return whether a weight is on a CUDA GPU, and not sharded."""
    return weight.is_cuda and not hasattr(weight, "to_local")


@torch.no_grad()
def product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Return the function x `(N, in)` → x Wᵀ + b `(N, out)` with a prepacked copy of W; on a GPU with W itself."""
    if is_on_gpu(weight):
        return lambda hidden: F.linear(hidden, weight, bias)
    # These operations of torch are not public. Its compiler, Inductor, calls them in the same way.
    copy = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), EXPECTED_ROWS)
    return lambda hidden: torch.ops.mkldnn._linear_pointwise(hidden, copy, bias, "none", [], "")


@torch.no_grad()
def joint_product(linears: list[nn.Linear]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Return a function that applies several linears to the same input by one product."""
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    multiply = product(torch.cat([linear.weight for linear in linears]), bias)
    widths = [linear.out_features for linear in linears]
    return lambda hidden: multiply(hidden).split(widths, dim=1)
