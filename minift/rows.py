"""Rows inside attention: the vectors of the flat list of tokens → rows with pads, and back.

Padding all rows to the longest one would waste much of attention's work. So rows are sorted by length and divided into
groups, each padded to its own longest row. Four rows, of which the first two share the token A:

    flat list    A B C D E F G H
    rows         A B C D     A E     F     G H
    cells        A B C D  A E · ·  |  G H  F ·       two groups; a pad, ·, repeats token 0
    groups       (2, 4)               (2, 2)

On a GPU in 16 bits rows lie end to end instead, as a single row without pads: FlashAttention is told where each starts.
Shapes use the letters of model.py.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_GROUPS = 8  # of rows of similar length; fewer for few rows: one for every two
GPU_ROWS = 32  # on a GPU one group for every 32 rows, as a small one would not fill it


class RowLayout(NamedTuple):
    """Index lists that gather the flat list into cells and scatter it back, made once per forward pass."""

    gather: Tensor  # (cells,) the token in each cell of the rows; pads repeat token 0
    scatter: Tensor  # (N,) one cell of each token
    repeats: Tensor  # (K,) the other cells of tokens that several rows share
    shared: Tensor  # (U,) these tokens, each once
    shared_index: Tensor  # (K,) for each of these cells, the index of its token in `shared`
    groups: list[tuple[int, int]]  # (R, T) of each group of rows; a group's cells follow those of the one before
    is_flat: bool  # the cells are the tokens in their order, as in a decode step: nothing needs to be moved
    offsets: Tensor | None  # (R + 1,) int32, of rows end to end: the cell where each starts, and the number of cells
    longest: int  # T of the longest row

    def to(self, device: torch.device) -> "RowLayout":
        """Return the layout with its lists on a device. A decode step reads none, and may be recorded without them."""
        if self.is_flat and self.offsets is None:
            return self
        lists: dict[str, Any] = {name: value for name, value in self._asdict().items() if isinstance(value, Tensor)}
        return self._replace(**{name: value.to(device, non_blocking=True) for name, value in lists.items()})


def max_groups_on(device: torch.device, num_rows: int) -> int:
    """Return into how many groups a device's attention should divide rows at most."""
    return MAX_GROUPS if device.type == "cpu" else min(MAX_GROUPS, -(-num_rows // GPU_ROWS))


def row_layout(rows: Tensor, num_tokens: int, max_groups: int = MAX_GROUPS) -> RowLayout:
    """Turn `rows (R, T)`, -1 past each row's end, into the index lists that attention needs.

    Groups are sorted by length, longest first; a single one keeps the rows' order. With `max_groups` 0, rows lie end to
    end. A token that several rows share is read back from one of them: its value is the same in all.
    """
    groups, lengths = [rows], (rows >= 0).sum(1)
    num_groups = min(max_groups, -(-len(rows) // 2))
    if num_groups == 0:
        groups = [rows[rows >= 0][None]]  # (1, cells)
    elif num_groups > 1:
        order = lengths.argsort(descending=True, stable=True)
        groups = [rows[part, : int(lengths[part[0]])] for part in order.chunk(num_groups)]
    flat = torch.cat([group.flatten() for group in groups])  # (cells,)
    cells = (flat >= 0).nonzero().squeeze(1)
    scatter = torch.zeros(num_tokens, dtype=torch.long)
    # Take the smallest cell: with plain assignment the winner, and so the rounding, would depend on threads.
    scatter.scatter_reduce_(0, flat[cells], cells, "amin", include_self=False)
    repeats = cells[scatter[flat[cells]] != cells]
    shared, shared_index = flat[repeats].unique(return_inverse=True)
    return RowLayout(
        gather=flat.clamp(min=0),
        scatter=scatter,
        repeats=repeats,
        shared=shared,
        shared_index=shared_index,
        groups=[(len(group), group.shape[1]) for group in groups],
        is_flat=torch.equal(flat, torch.arange(num_tokens)),
        offsets=None if num_groups else F.pad(lengths.cumsum(0), (1, 0)).int(),
        longest=rows.shape[1],
    )


def to_rows(flat: Tensor, layout: RowLayout, num_heads: int) -> list[Tensor]:
    """Gather the vectors of tokens `(N, C)` into the rows of each group, divided into heads: `(R, H, T, D)`."""
    cells = flat if layout.is_flat else _Gather.apply(flat, layout)  # (cells, C)
    parts = cells.split([num_rows * length for num_rows, length in layout.groups])
    return [part.view(*group, num_heads, -1).transpose(1, 2) for part, group in zip(parts, layout.groups, strict=True)]


def from_rows(groups: Sequence[Tensor], layout: RowLayout) -> Tensor:
    """Return the vectors of tokens, `(N, C)`, given those in the rows of each group, `(R, H, T, D)`."""
    parts = [group.transpose(1, 2).flatten(2).flatten(0, 1) for group in groups]  # (R * T, C)
    cells = torch.cat(parts) if len(parts) > 1 else parts[0]  # (cells, C)
    return cells if layout.is_flat else _Scatter.apply(cells, layout)


class _Gather(torch.autograd.Function):
    """Copy the vectors of tokens `(N, C)` into the cells `(cells, C)` of a layout.

    A token's gradient is that of its cell, or the sum over its cells if rows share it. The backward pass of
    `index_select` adds all cells, pads too, to a tensor of zeros, which takes a quarter longer.
    """

    @staticmethod
    def forward(ctx: Any, flat: Tensor, layout: RowLayout) -> Tensor:
        """Return the vectors in the cells."""
        ctx.layout = layout
        return flat.index_select(0, layout.gather)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_cells: Tensor) -> tuple[Tensor, None]:
        """Return the gradient `(N, C)`, given that of the cells; a pad's is zero, as nothing is computed from it."""
        layout: RowLayout = ctx.layout
        grad = grad_cells.index_select(0, layout.scatter)
        if len(layout.repeats):  # hundreds of rows may share a token: in bfloat16 most of the sum would be lost
            sums = grad.index_select(0, layout.shared).to(torch.promote_types(grad.dtype, torch.float32))  # (U, C)
            sums.index_add_(0, layout.shared_index, grad_cells.index_select(0, layout.repeats).to(sums.dtype))
            grad.index_copy_(0, layout.shared, sums.to(grad.dtype))
        return grad, None


class _Scatter(torch.autograd.Function):
    """Take the vectors of tokens `(N, C)` from their cells `(cells, C)` of a layout.

    Only one cell of each token is read, so gradients are copied into zeros, not added as `index_select` does.
    """

    @staticmethod
    def forward(ctx: Any, cells: Tensor, layout: RowLayout) -> Tensor:
        """Return the tokens' vectors."""
        ctx.layout = layout
        return cells.index_select(0, layout.scatter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_tokens: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the cells, given that of the tokens `(N, C)`."""
        layout: RowLayout = ctx.layout
        grad = grad_tokens.new_zeros(len(layout.gather), grad_tokens.shape[1])
        return grad.index_copy_(0, layout.scatter, grad_tokens), None


def can_lie_end_to_end(weight: Tensor, head_width: int, dropout: float) -> bool:
    """Return whether attention can do without padding: in 16 bits, on an NVIDIA GPU since Ampere, without dropout."""
    if not weight.is_cuda or torch.cuda.get_device_capability(weight.device) < (8, 0):
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else weight.dtype
    fits = head_width % 8 == 0 and head_width <= 256
    return dtype in (torch.bfloat16, torch.float16) and fits and dropout == 0


def attend_end_to_end(query: Tensor, key: Tensor, value: Tensor, layout: RowLayout) -> Tensor:
    """Return causal attention `(1, H, cells, D)` of rows that lie end to end, by FlashAttention (arXiv 2307.08691)."""
    from torch.nn.attention.varlen import varlen_attn  # importing it takes 0.9 s, which only a run on a GPU needs

    assert layout.offsets is not None
    offsets, longest = layout.offsets, layout.longest
    query, key, value = (heads.squeeze(0).transpose(0, 1) for heads in (query, key, value))  # (cells, H, D)
    attention = varlen_attn(query, key, value, offsets, offsets, longest, longest, window_size=(-1, 0))
    assert isinstance(attention, Tensor)  # a tuple only if more is asked for
    return attention.transpose(0, 1)[None]
