"""OPT (Zhang et al. 2022, arXiv 2205.01068) on packed tokens: padding exists only inside attention.

Two rows, "A B C" and "D E":

    input_ids (N = 5)      A  B  C  D  E      the flat list: all that embeddings, projections, feed-forward and loss see
    positions              0  1  2  0  1
    rows (R = 2, T = 3)    [[0, 1,  2],       where the tokens of each row are in the list, -1 past a row's end.
                            [3, 4, -1]]       A prefix that rows share is in the list once
    attention sees         [[A, B, C],        q, k and v, gathered by rows.py. Pads are on the right, so causal
                            [D, E, ·]]        attention never looks at one. A row never sees another row
    back in the list       A  B  C  D  E      scattered; what was computed for the pads is dropped
    wanted (M = 2)         C  E               the loss may need few tokens: the last layer computes only these

Shapes use the same letters everywhere: N tokens, M wanted tokens, R rows, T row length, S cached row length, H heads,
D head width, C hidden width, E embedding width, V vocabulary, P pairs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minift.rows import RowLayout, attend_end_to_end, can_lie_end_to_end, from_rows, max_groups_on, row_layout, to_rows

Model = TypeVar("Model", "OPT", "RewardModel")  # a function returns the class that it is given
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


class Cache(Protocol):
    """The part of a key/value cache that attention uses; `Prefill` and `DecodeStep` in cache.py implement it."""

    max_groups: int  # of rows, as in `row_layout`

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store the keys and values of a layer's next group of rows; return its attention, `(R, H, T, D)`."""


class Attention(nn.Module):
    """Causal multi-head attention of packed tokens: the only module with rows, and so with padding."""

    def __init__(self, config: OPTConfig, layer: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.layer = layer  # its number in a cache
        self.num_heads, self.head_width = config.num_attention_heads, width // config.num_attention_heads
        self.dropout = config.attention_dropout
        self.q_proj = nn.Linear(width, width, bias=config.enable_bias)
        self.k_proj = nn.Linear(width, width, bias=config.enable_bias)
        self.v_proj = nn.Linear(width, width, bias=config.enable_bias)
        self.out_proj = nn.Linear(width, width, bias=config.enable_bias)

    def project(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Return the queries, keys and values `(N, C)` of tokens `(N, C)`."""
        return self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, cache: Cache | None) -> Tensor:
        """Return the values `(N, C)` that attention mixes for each token, given its projections, `(N, C)` each."""
        queries, keys, values = (to_rows(flat, layout, self.num_heads) for flat in (query, key, value))
        groups = zip(queries, keys, values, strict=True)  # three tensors (R, H, T, D) of each group of rows
        return from_rows([self._mix(q, k, v, layout, cache) for q, k, v in groups], layout)

    def _mix(self, query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, cache: Cache | None) -> Tensor:
        """Return the causal attention of one group of rows: `(R, H, T, D)`, the shape of all three tensors."""
        if cache is not None:
            return cache.attend(self.layer, query, key, value)
        if layout.offsets is not None:  # on a GPU in 16 bits
            return attend_end_to_end(query, key, value, layout)
        # Rows are padded on the right, so the causal mask alone hides the padding from every real query. Without a mask
        # tensor the fast kernels can be used.
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)


class Layer(nn.Module):
    """One decoder layer, with LayerNorm before each half (most sizes) or after its residual sum (350m)."""

    def __init__(self, config: OPTConfig, number: int) -> None:
        super().__init__()
        width, affine = config.hidden_size, config.layer_norm_elementwise_affine
        self.norm_before = config.do_layer_norm_before
        self.dropout = config.dropout
        self.activation = ACTIVATIONS[config.activation_function]
        self.self_attn = Attention(config, number)
        self.self_attn_layer_norm = nn.LayerNorm(width, elementwise_affine=affine)
        self.fc1 = nn.Linear(width, config.ffn_dim, bias=config.enable_bias)
        self.fc2 = nn.Linear(config.ffn_dim, width, bias=config.enable_bias)
        self.final_layer_norm = nn.LayerNorm(width, elementwise_affine=affine)

    def forward(self, hidden: Tensor, layout: RowLayout, cache: Cache | None, wanted: Tensor | None) -> Tensor:
        """Apply attention, then the feed-forward, each with a residual connection: `(N, C)` → `(N, C)`, or `(M, C)`.

        The parts before and after attention are methods of their own, so that torch.compile can fuse each.
        """
        mixed = self.self_attn(*self.before_attention(hidden), layout, cache)  # (N, C)
        if wanted is not None:
            hidden, mixed = hidden.index_select(0, wanted), mixed.index_select(0, wanted)  # (M, C)
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
        update = self.fc2(self.activation(self.fc1(normed)))  # (N, C) -> (N, ffn_dim) -> (N, C)
        hidden = hidden + F.dropout(update, self.dropout, self.training)
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
        self.layers = nn.ModuleList(Layer(config, number) for number in range(config.num_hidden_layers))
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
        layout = row_layout(rows, len(input_ids), self._max_groups(len(rows), cache)).to(device)
        input_ids, positions = input_ids.to(device, non_blocking=True), positions.to(device, non_blocking=True)
        if wanted is not None:
            wanted = wanted.to(device, non_blocking=True)
        hidden = self.project_in(self.embed_tokens(input_ids))  # (N,) -> (N, C)
        hidden = hidden + self.embed_positions(positions + POSITION_OFFSET)
        for layer in self.layers:
            # Other tokens still give the last layer keys and values, but nobody looks at what it would return for them.
            arguments = hidden, layout, cache, wanted if layer is self.layers[-1] else None
            if self.gradient_checkpointing and self.training:
                hidden = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                hidden = layer(*arguments)
        return self.project_out(self.final_layer_norm(hidden))  # (N, E) or (M, E)

    def _max_groups(self, num_rows: int, cache: Cache | None) -> int:
        """Return into how many groups attention may divide the rows; 0: they lie end to end."""
        weight, attention = self.embed_tokens.weight, self.layers[0].self_attn
        assert isinstance(attention, Attention)
        max_groups = max_groups_on(weight.device, num_rows)
        if cache is not None:
            return min(max_groups, cache.max_groups)
        dropout = attention.dropout if self.training else 0.0
        return 0 if can_lie_end_to_end(weight, attention.head_width, dropout) else max_groups


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


def last_tokens(rows: Tensor) -> Tensor:
    """Return the index `(R,)` of the last token of each row in the flat list, given `rows (R, T)`."""
    lengths = (rows >= 0).sum(1, keepdim=True)  # (R, 1)
    return rows.gather(1, lengths - 1).squeeze(1)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode for a block, then back into the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
