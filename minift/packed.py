"""Matrix products of few rows, as in decoding: by weights that are packed once instead of at each product.

`F.linear` lays a weight out anew for each product, in blocks as the processor reads them. That is nothing beside a
product of thousands of rows, and takes as long as one of eight. oneDNN can keep the packed copy.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minift.model import OPT, Attention

MIN_ROWS = {torch.float32: 4, torch.bfloat16: 1}  # from which packed weights are faster, as measured in tests/speed.md
EXPECTED_ROWS = 64  # what oneDNN packs for; any number is correct, and about as fast


@contextmanager
def packed(model: OPT, num_rows: int) -> Iterator[None]:
    """Let a model multiply by packed copies of its weights within the block, where that is faster for so many rows.

    Queries, keys and values become one product. The copies take as much memory as the weights, on a CPU only.
    """
    if num_rows < MIN_ROWS.get(model.head.dtype, num_rows + 1) or not can_pack(model.head):
        yield
        return
    replaced: list[tuple[nn.Module, str]] = []

    def replace(module: nn.Module, method: str, function: Callable[[Tensor], Any]) -> None:
        setattr(module, method, function)  # hides the class's own
        replaced.append((module, method))

    try:
        replace(model, "logits", product(model.head, None))
        done: set[nn.Module] = set()
        for module in model.modules():
            if isinstance(module, Attention):
                linears = [module.q_proj, module.k_proj, module.v_proj]
                if all(isinstance(linear, nn.Linear) for linear in linears):  # no adapters
                    replace(module, "project", joint_product(linears))
                    done.update(linears)
            elif isinstance(module, nn.Linear) and module not in done:
                replace(module, "forward", product(module.weight, module.bias))
        yield
    finally:
        for module, method in replaced:
            delattr(module, method)


def can_pack(weight: Tensor) -> bool:
    """Return whether oneDNN is in this build of torch and multiplies numbers of this dtype on this processor.

    It cannot for a sharded model: its weights are here only while a pass needs them.
    """
    is_there = weight.device.type == "cpu" and not hasattr(weight, "to_local") and torch.backends.mkldnn.is_available()
    is_half = weight.dtype == torch.bfloat16
    return is_there and (not is_half or torch.ops.mkldnn._is_mkldnn_bf16_supported())


@torch.no_grad()
def product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Return the function x `(N, in)` → x Wᵀ + b `(N, out)` with a packed copy of W, as torch's compiler calls it."""
    copy = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), EXPECTED_ROWS)
    return lambda hidden: torch.ops.mkldnn._linear_pointwise(hidden, copy, bias, "none", [], "")


@torch.no_grad()
def joint_product(linears: list[nn.Linear]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Return the function that applies several linears of the same input by one product."""
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    multiply = product(torch.cat([linear.weight for linear in linears]), bias)
    widths = [linear.out_features for linear in linears]
    return lambda hidden: multiply(hidden).split(widths, dim=1)
