"""OPT (Zhang et al. 2022, arXiv 2205.01068) on packed tokens: padding exists only inside attention.

Two rows, "A B C" and "D E":

    input_ids (N = 5)      A  B  C  D  E      the flat list: all that embeddings, projections, feed-forward and loss see
    positions              0  1  2  0  1
    rows (R = 2, T = 3)    [[0, 1,  2],       where the tokens of each row are in the list, -1 past a row's end.
                            [3, 4, -1]]       A prefix that rows share is in the list once
    attention sees         [[A, B, C],        q, k and v, gathered. Pads are on the right, so causal attention never
                            [D, E, ·]]        looks at one. A row never sees another row. Rows are sorted by length
                                              and divided into groups, each padded to its own longest row. In 16 bits
                                              on a GPU rows lie end to end instead: FlashAttention needs no padding
    back in the list       A  B  C  D  E      scattered; what was computed for the pads is dropped
    wanted (M = 2)         C  E               the loss may need few tokens: the last layer computes only these

Shapes use the same letters everywhere: N tokens, M wanted tokens, R rows, T row length, S cached row length, H heads,
D head width, C hidden width, E embedding width, V vocabulary, P pairs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

Model = TypeVar("Model", "OPT", "RewardModel")  # a function returns the class that it is given
MAX_GROUPS = 8  # of rows of similar length inside attention; fewer for few rows: one for every two
GPU_ROWS = 32  # on a GPU one for every 32
POSITION_OFFSET = 2  # the first two rows of OPT's position table are not used
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu_, "gelu": F.gelu}  # relu_: in place


@dataclass(frozen=True)
class OPTConfig:
    """The fields of a hub `config.json` that change the computation, with transformers' names and defaults."""

    vocab_size: int = 50272
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    ffn_dim: int = 3072
    word_embed_proj_dim: int = 768
    max_position_embeddings: int = 2048
    do_layer_norm_before: bool = True
    _remove_final_layer_norm: bool = False
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    activation_function: str = "relu"
    dropout: float = 0.1
    attention_dropout: float = 0.0
    init_std: float = 0.02
    pad_token_id: int = 1
    bos_token_id: int = 2
    eos_token_id: int = 2


class RowLayout(NamedTuple):
    """Index lists that gather the flat list into attention's rows and scatter it back, made once per forward pass."""

    gather: Tensor  # (cells,) the token in each cell of the padded rows; cells past a row's end repeat token 0
    scatter: Tensor  # (N,) one cell of each token
    repeats: Tensor  # (K,) the other cells of tokens that several rows share
    shared: Tensor  # (U,) these tokens, each once
    shared_index: Tensor  # (K,) for each of these cells, the index of its token in `shared`
    groups: list[tuple[int, int]]  # (R, T) of each group of rows; a group's cells follow those of the one before
    offsets: Tensor  # (R + 1,) int32: without padding, the cell in which each row starts, and the number of cells
    longest: int  # T of the longest row
    is_flat: bool  # the cells are the tokens in their order, as in a decode step: nothing needs to be moved
    wanted: Tensor | None = None  # (M,) the tokens that a layer returns; None: all

    def to(self, device: torch.device) -> "RowLayout":
        """Return the layout with the lists that are read on a device: none in a decode step, as it may be recorded."""
        names: tuple[str, ...] = () if self.is_flat else ("gather", "scatter", "repeats", "shared", "shared_index")
        names += () if self.groups else ("offsets",)
        return self._replace(**{name: getattr(self, name).to(device, non_blocking=True) for name in names})


class Cache(Protocol):
    """The part of a key/value cache that attention uses; `Prefill` and `DecodeStep` in cache.py implement it."""

    max_groups: int  # of rows, as in `row_layout`

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store the keys and values of a layer's next group of rows; return its attention, `(R, H, T, D)`."""


def row_layout(rows: Tensor, num_tokens: int, max_groups: int = MAX_GROUPS) -> RowLayout:
    """Turn `rows (R, T)`, -1 past each row's end, into the index lists that attention needs.

    Rows are sorted by length, longest first, and divided into groups; each group is padded only to its longest row. A
    single group keeps the rows' order. With no groups at all, rows lie end to end and nothing is padded. A token that
    several rows share, as in a pair's prompt, is read back from one of them: its value is the same in all.
    """
    groups, lengths = [rows], (rows >= 0).sum(1)
    num_groups = min(max_groups, -(-len(rows) // 2))
    if num_groups > 1:
        order = lengths.argsort(descending=True, stable=True)
        groups = [rows[part, : int(lengths[part[0]])] for part in order.chunk(num_groups)]
    flat = torch.cat([group.flatten() for group in groups])  # (cells,)
    if not num_groups:
        groups, flat = [], flat[flat >= 0]
    cells = (flat >= 0).nonzero().squeeze(1)
    scatter = torch.zeros(num_tokens, dtype=torch.long)
    # Take the smallest cell: with plain assignment the winner, and so the rounding, would depend on threads.
    scatter.scatter_reduce_(0, flat[cells], cells, "amin", include_self=False)
    repeats = cells[scatter[flat[cells]] != cells]
    shared, shared_index = flat[repeats].unique(return_inverse=True)
    shapes = [(group.shape[0], group.shape[1]) for group in groups]
    offsets = F.pad(lengths.cumsum(0), (1, 0)).int()
    is_flat = torch.equal(flat, torch.arange(num_tokens))
    return RowLayout(flat.clamp(min=0), scatter, repeats, shared, shared_index, shapes, offsets, rows.shape[1], is_flat)


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


def last_tokens(rows: Tensor) -> Tensor:
    """Return the index `(R,)` of the last token of each row in the flat list, given `rows (R, T)`."""
    lengths = (rows >= 0).sum(1, keepdim=True)  # (R, 1)
    return rows.gather(1, lengths - 1).squeeze(1)


def attend_end_to_end(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """Return causal attention `(cells, H, D)` of rows that lie end to end, by FlashAttention (arXiv 2307.08691)."""
    from torch.nn.attention.varlen import varlen_attn  # importing it takes 0.9 s, which only a run on a GPU needs

    attention = varlen_attn(query, key, value, offsets, offsets, longest, longest, window_size=(-1, 0))
    assert isinstance(attention, Tensor)  # a tuple only if more is asked for
    return attention


class Attention(nn.Module):
    """Causal multi-head attention of packed tokens: the only module with rows, and so with padding."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads, self.head_width = config.num_attention_heads, width // config.num_attention_heads
        self.dropout = config.attention_dropout
        self.q_proj = nn.Linear(width, width, bias=config.enable_bias)
        self.k_proj = nn.Linear(width, width, bias=config.enable_bias)
        self.v_proj = nn.Linear(width, width, bias=config.enable_bias)
        self.out_proj = nn.Linear(width, width, bias=config.enable_bias)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, layer: int, cache: Cache | None
    ) -> Tensor:
        """Return the causal attention of tokens `(N, C)`, or of the wanted ones, `(M, C)`.

        `Layer` applies the projections, so that they can be compiled. `layer` is the layer's number in the cache.
        """
        vectors = [flat if layout.is_flat else _Gather.apply(flat, layout) for flat in (query, key, value)]
        if layout.groups:
            rows = [self._to_rows(cells, layout) for cells in vectors]  # 3 · (cells, C) -> 3 · groups · (R, H, T, D)
            groups = [
                self._mix(q, k, v, layer, cache).transpose(1, 2).reshape(-1, query.shape[1])  # (R * T, C)
                for q, k, v in zip(*rows, strict=True)
            ]
            mixed = torch.cat(groups) if len(groups) > 1 else groups[0]  # (cells, C)
        else:
            q, k, v = (cells.view(len(cells), self.num_heads, -1) for cells in vectors)  # (cells, H, D)
            mixed = attend_end_to_end(q, k, v, layout.offsets, layout.longest).flatten(1)
        if layout.wanted is not None:
            return mixed.index_select(0, layout.wanted if layout.is_flat else layout.scatter[layout.wanted])  # (M, C)
        return mixed if layout.is_flat else _Scatter.apply(mixed, layout)  # (N, C)

    def project(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Return the queries, keys and values `(N, C)` of tokens `(N, C)`."""
        return self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)

    def _to_rows(self, cells: Tensor, layout: RowLayout) -> list[Tensor]:
        """Divide the vectors of cells `(cells, C)` into the padded rows of each group, and heads: `(R, H, T, D)`."""
        parts = cells.split([num_rows * length for num_rows, length in layout.groups])
        return [
            part.view(num_rows, length, self.num_heads, -1).transpose(1, 2)
            for part, (num_rows, length) in zip(parts, layout.groups, strict=True)
        ]

    def _mix(self, query: Tensor, key: Tensor, value: Tensor, layer: int, cache: Cache | None) -> Tensor:
        """Return the attention of one group of rows: `(R, H, T, D)`, the shape of `query`, `key` and `value`."""
        if cache is not None:
            return cache.attend(layer, query, key, value)
        # Rows are padded on the right, so the causal mask alone hides the padding from every real query. Without a mask
        # tensor the fast kernels can be used.
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)


class Layer(nn.Module):
    """One decoder layer, with LayerNorm before each half (most sizes) or after its residual sum (350m)."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        width, affine = config.hidden_size, config.layer_norm_elementwise_affine
        self.norm_before = config.do_layer_norm_before
        self.dropout = config.dropout
        self.activation = ACTIVATIONS[config.activation_function]
        self.self_attn = Attention(config)
        self.self_attn_layer_norm = nn.LayerNorm(width, elementwise_affine=affine)
        self.fc1 = nn.Linear(width, config.ffn_dim, bias=config.enable_bias)
        self.fc2 = nn.Linear(config.ffn_dim, width, bias=config.enable_bias)
        self.final_layer_norm = nn.LayerNorm(width, elementwise_affine=affine)

    def forward(self, hidden: Tensor, layout: RowLayout, layer: int, cache: Cache | None) -> Tensor:
        """Apply attention, then the feed-forward, each with a residual connection: `(N, C)` → `(N, C)`, or `(M, C)`."""
        mixed = self.self_attn(*self.before_attention(hidden), layout, layer, cache)
        if layout.wanted is not None:
            hidden = hidden.index_select(0, layout.wanted)  # (M, C)
        return self.after_attention(hidden, mixed)

    def before_attention(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Return the queries, keys and values `(N, C)` of tokens `(N, C)`."""
        return self.self_attn.project(self.self_attn_layer_norm(hidden) if self.norm_before else hidden)

    def after_attention(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        """Project the mixed values, add them, apply the feed-forward: two times `(N, C)` → `(N, C)`."""
        hidden = hidden + F.dropout(self.self_attn.out_proj(mixed), self.dropout, self.training)
        if not self.norm_before:
            hidden = self.self_attn_layer_norm(hidden)

        normed = self.final_layer_norm(hidden) if self.norm_before else hidden
        mixed = self.fc2(self.activation(self.fc1(normed)))
        hidden = hidden + F.dropout(mixed, self.dropout, self.training)
        return hidden if self.norm_before else self.final_layer_norm(hidden)


class Decoder(nn.Module):
    """Embeddings, layers and projections: from ids to hidden states of the embedding's width."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        width, embedding_width = config.hidden_size, config.word_embed_proj_dim
        # A pad id inside a text is looked up like any other, but its embedding gets no gradient, as in transformers.
        self.embed_tokens = nn.Embedding(config.vocab_size, embedding_width, padding_idx=config.pad_token_id)
        self.embed_positions = nn.Embedding(config.max_position_embeddings + POSITION_OFFSET, width)
        if embedding_width != width:
            self.project_in: nn.Module = nn.Linear(embedding_width, width, bias=False)
            self.project_out: nn.Module = nn.Linear(width, embedding_width, bias=False)
        else:
            self.project_in = self.project_out = nn.Identity()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False  # keep each layer's input only; compute the rest again (arXiv 1604.06174)
        self.final_layer_norm: nn.Module = nn.Identity()
        if config.do_layer_norm_before and not config._remove_final_layer_norm:
            self.final_layer_norm = nn.LayerNorm(width, elementwise_affine=config.layer_norm_elementwise_affine)

    def forward(
        self, input_ids: Tensor, positions: Tensor, rows: Tensor,
        cache: Cache | None = None, wanted: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the last hidden states of packed tokens, `(N, E)`, or of the wanted ones; arguments as for `OPT`."""
        device = self.embed_tokens.weight.device
        max_groups = MAX_GROUPS if cache is None else cache.max_groups
        if cache is None and self.needs_no_padding():
            max_groups = 0
        elif device.type != "cpu":  # a small group of rows would not fill a GPU
            max_groups = min(max_groups, -(-len(rows) // GPU_ROWS))
        layout = row_layout(rows, input_ids.shape[0], max_groups).to(device)
        input_ids, positions = input_ids.to(device, non_blocking=True), positions.to(device, non_blocking=True)
        # Other tokens still give the last layer keys and values, but nobody looks at what it would return for them.
        last = layout if wanted is None else layout._replace(wanted=wanted.to(device, non_blocking=True))
        hidden = self.project_in(self.embed_tokens(input_ids))  # (N,) -> (N, C)
        hidden = hidden + self.embed_positions(positions + POSITION_OFFSET)
        for index, layer in enumerate(self.layers):
            arguments = hidden, last if index == len(self.layers) - 1 else layout, index, cache
            if self.gradient_checkpointing and self.training:
                hidden = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                hidden = layer(*arguments)
        return self.project_out(self.final_layer_norm(hidden))  # (N, E) or (M, E)

    def needs_no_padding(self) -> bool:
        """Return whether rows can lie end to end in attention: in 16 bits, on an NVIDIA GPU since Ampere."""
        weight, attention = self.embed_tokens.weight, self.layers[0].self_attn
        assert isinstance(attention, Attention)
        if not weight.is_cuda or torch.cuda.get_device_capability(weight.device) < (8, 0):
            return False
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else weight.dtype
        has_dropout = self.training and attention.dropout > 0  # which varlen_attn does not have
        fits = attention.head_width % 8 == 0 and attention.head_width <= 256
        return dtype in (torch.bfloat16, torch.float16) and fits and not has_dropout


class OPT(nn.Module):
    """An OPT language model, its parameters named as on the hub but without the leading `model.`."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = Decoder(config)

    def forward(
        self, input_ids: Tensor, positions: Tensor, rows: Tensor,
        cache: Cache | None = None, wanted: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the last hidden states `(N, E)` of packed tokens, which the head turns into logits.

        All arguments are int64: `input_ids (N,)`; `positions (N,)`, from 0 in each row; `rows (R, T)`, see the figure.
        `wanted (M,)` are indices of the tokens whose hidden states are needed; then only these, `(M, E)`, are returned.
        `rows` are on the CPU, so that nothing waits for a GPU; the others may be on either device.
        """
        return self.decoder(input_ids, positions, rows, cache, wanted)

    @property
    def head(self) -> Tensor:
        """Return the output matrix `(V, E)`: it is the token embedding, not a parameter of its own."""
        return self.decoder.embed_tokens.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits `(M, V)` of M hidden states `(M, E)`."""
        return F.linear(hidden, self.head)


class RewardModel(nn.Module):
    """OPT with one output, the reward of a whole row, instead of logits (Stiennon et al. 2020, arXiv 2009.01325).

    Parameters are named as in transformers' `OPTForSequenceClassification`, but without the leading `model.`.
    """

    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = Decoder(config)
        self.score = nn.Linear(config.word_embed_proj_dim, 1, bias=False)

    def forward(self, input_ids: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        """Return the rewards `(R,)` of packed rows, each read at its row's last token; arguments as for `OPT`.

        transformers reads at the last token that is not a pad. If a text ends in the pad id, that is an earlier token.
        """
        return self.rewards(self.decoder(input_ids, positions, rows, wanted=last_tokens(rows)))

    def rewards(self, hidden: Tensor) -> Tensor:
        """Return the rewards `(R,)` given the last hidden states `(R, E)` of the rows' last tokens."""
        # In float32 at least: bfloat16 has no number between 10 and 10.0625, so close rewards would be ties.
        dtype = torch.promote_types(self.score.weight.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(dtype), self.score.weight.to(dtype)).squeeze(1)  # (R,)

    @property
    def head(self) -> Tensor:
        """Return the output matrix `(V, E)` of the body as a language model. It is not the reward head, `score`."""
        return self.decoder.embed_tokens.weight


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode for a block, then back into the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
