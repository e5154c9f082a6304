"""OPT (Zhang et al. 2022, arXiv 2205.01068) on packed tokens.

A batch is the flat list of its real tokens. Everything but attention works on `(N, C)` and never meets a pad; attention
gathers the tokens of each row, attends causally, and scatters back. Shapes are written in the same letters everywhere:
N tokens, R rows, T row length, S cached row length, H heads, D head width, C hidden width, E embedding width,
V vocabulary.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POSITION_OFFSET = 2  # OPT's position table starts with two rows that no position uses
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


@dataclass(frozen=True)
class OPTConfig:
    """The fields of a hub `config.json` that change the computation, with the reference's names and defaults."""

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

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "OPTConfig":
        """Read a parsed `config.json`; keys this class lacks are ignored, as the hub's files hold many.

        Raises ValueError when a value has the wrong type or asks for something OPT's forward pass here does not do.
        """
        known = {field.name: field.type for field in fields(cls)}
        # "word_embed_proj_dim": null means "as wide as the layers" in the reference.
        values = {name: value for name, value in values.items() if value is not None}
        values.setdefault("word_embed_proj_dim", values.get("hidden_size", cls.hidden_size))
        for name, kind in known.items():
            accepted = (int, float) if kind is float else kind
            value = values.get(name, getattr(cls, name))
            if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
                raise ValueError(f"{name} is {value!r}, expected {kind.__name__}")
            if kind is int and value < (0 if name.endswith("_token_id") else 1):
                raise ValueError(f"{name} is {value}, expected a positive number")
        config = cls(**{name: value for name, value in values.items() if name in known})
        if values.get("model_type", "opt") != "opt":
            raise ValueError(f"model_type is {values['model_type']!r}, expected 'opt'")
        if not values.get("tie_word_embeddings", True):
            raise ValueError("tie_word_embeddings is false, expected a head tied to the embedding")
        if values.get("layerdrop", 0.0):
            raise ValueError(f"layerdrop is {values['layerdrop']}, expected 0")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(config, name) <= 1:
                raise ValueError(f"{name} is {getattr(config, name)}, expected a probability")
        if config.pad_token_id >= config.vocab_size:
            raise ValueError(f"pad_token_id is {config.pad_token_id}, expected it below vocab_size {config.vocab_size}")
        if config.activation_function not in ACTIVATIONS:
            raise ValueError(f"activation_function is {config.activation_function!r}, expected one of {[*ACTIVATIONS]}")
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(f"hidden_size {config.hidden_size} is not divisible by {config.num_attention_heads} heads")
        return config

    def to_dict(self) -> dict[str, Any]:
        """The `config.json` of a causal language model, as transformers reads it."""
        return {"model_type": "opt", "architectures": ["OPTForCausalLM"], "tie_word_embeddings": True, **asdict(self)}


class RowLayout(NamedTuple):
    """Where the tokens of each row lie, worked out once a forward pass."""

    gather: Tensor  # (R * T,) the token in each slot of the padded rows; slots past a row's end repeat token 0
    scatter: Tensor  # (N,) a slot that holds each token
    num_rows: int


class Cache(Protocol):
    """What attention asks of a key/value cache; `generate.py` has one."""

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append `(R, H, T, D)` to a layer's rows and give all of it, `(R, H, S, D)`, with a mask `(R, 1, T, S)`.

        The mask is True where a query may look; None stands for plain causal attention over the T new positions.
        """
        ...


def row_layout(rows: Tensor, num_tokens: int) -> RowLayout:
    """Turn `rows (R, T)`, −1 past each row's end, into the two index lists that attention needs.

    A token that stands in several rows (a prompt shared by two responses) is read back from one of them: causal
    attention gives it the same value in each.
    """
    flat = rows.flatten()  # (R * T,)
    slots = (flat >= 0).nonzero().squeeze(1)
    scatter = torch.zeros(num_tokens, dtype=torch.long, device=rows.device)
    # The first of them: plain assignment leaves it to the threads which one, and so how a sum of floats is rounded.
    scatter.scatter_reduce_(0, flat[slots], slots, "amin", include_self=False)
    return RowLayout(flat.clamp(min=0), scatter, rows.shape[0])


class Attention(nn.Module):
    """Causal multi-head attention of packed tokens: the only place where rows, and so padding, exist."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_dropout
        self.q_proj = nn.Linear(width, width, bias=config.enable_bias)
        self.k_proj = nn.Linear(width, width, bias=config.enable_bias)
        self.v_proj = nn.Linear(width, width, bias=config.enable_bias)
        self.out_proj = nn.Linear(width, width, bias=config.enable_bias)

    def forward(self, hidden: Tensor, layout: RowLayout, layer: int, cache: Cache | None) -> Tensor:
        """`(N, C)` → `(N, C)`: each token mixed with those before it in its row. `layer` is its number in the cache."""
        query = self._to_rows(self.q_proj(hidden), layout)  # (N, C) -> (R, H, T, D)
        key = self._to_rows(self.k_proj(hidden), layout)
        value = self._to_rows(self.v_proj(hidden), layout)
        mask = None
        if cache is not None:
            key, value, mask = cache.extend(layer, key, value)  # (R, H, S, D)
        # Rows are padded on the right, so the causal mask alone hides the padding from every real query, and without a
        # mask tensor the fast kernels stay available.
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=self.dropout if self.training else 0.0,
        )
        flat = mixed.transpose(1, 2).flatten(0, 1).flatten(1)  # (R, H, T, D) -> (R * T, C)
        return self.out_proj(flat.index_select(0, layout.scatter))  # (N, C)

    def _to_rows(self, flat: Tensor, layout: RowLayout) -> Tensor:
        rows = flat.index_select(0, layout.gather)  # (N, C) -> (R * T, C)
        return rows.view(layout.num_rows, -1, self.num_heads, flat.shape[1] // self.num_heads).transpose(1, 2)


class Layer(nn.Module):
    """One decoder layer; LayerNorm before each half (most sizes) or after its residual sum (350m)."""

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
        """`(N, C)` → `(N, C)`: attention, then the feed-forward, each added to what it was given."""
        normed = self.self_attn_layer_norm(hidden) if self.norm_before else hidden  # (N, C)
        mixed = self.self_attn(normed, layout, layer, cache)
        hidden = hidden + F.dropout(mixed, self.dropout, self.training)
        if not self.norm_before:
            hidden = self.self_attn_layer_norm(hidden)

        normed = self.final_layer_norm(hidden) if self.norm_before else hidden
        mixed = self.fc2(self.activation(self.fc1(normed)))
        hidden = hidden + F.dropout(mixed, self.dropout, self.training)
        return hidden if self.norm_before else self.final_layer_norm(hidden)


class Decoder(nn.Module):
    """Embeddings, layers and projections: ids in, hidden states of the embedding's width out."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        width, embedding_width = config.hidden_size, config.word_embed_proj_dim
        # A pad id inside a text is looked up like any other, but its row gets no gradient, as in the reference.
        self.embed_tokens = nn.Embedding(config.vocab_size, embedding_width, padding_idx=config.pad_token_id)
        self.embed_positions = nn.Embedding(config.max_position_embeddings + POSITION_OFFSET, width)
        if embedding_width != width:
            self.project_in = nn.Linear(embedding_width, width, bias=False)
            self.project_out = nn.Linear(width, embedding_width, bias=False)
        else:
            self.project_in = self.project_out = nn.Identity()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        if config.do_layer_norm_before and not config._remove_final_layer_norm:
            self.final_layer_norm = nn.LayerNorm(width, elementwise_affine=config.layer_norm_elementwise_affine)
        else:
            self.final_layer_norm = nn.Identity()

    def forward(self, input_ids: Tensor, positions: Tensor, rows: Tensor, cache: Cache | None) -> Tensor:
        layout = row_layout(rows, input_ids.shape[0])
        hidden = self.project_in(self.embed_tokens(input_ids))  # (N,) -> (N, C)
        hidden = hidden + self.embed_positions(positions + POSITION_OFFSET)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, layout, index, cache)
        return self.project_out(self.final_layer_norm(hidden))  # (N, E)


class OPT(nn.Module):
    """An OPT language model whose parameters are named as on the hub, less a leading `model.`.

    The head is the token embedding itself, so there is no `lm_head` parameter.
    """

    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = Decoder(config)

    def forward(self, input_ids: Tensor, positions: Tensor, rows: Tensor, cache: Cache | None = None) -> Tensor:
        """The last hidden states of packed tokens, `(N, E)`: what the head turns into logits.

        `input_ids (N,)` and `positions (N,)` are int64, positions counting from 0 in each row; `rows (R, T)` int64 says
        where each row's tokens lie in the flat list, −1 past a row's end. Tokens of different rows never meet.
        """
        return self.decoder(input_ids, positions, rows, cache)

    @property
    def head(self) -> Tensor:
        """The tied output matrix `(V, E)`."""
        return self.decoder.embed_tokens.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `(M, V)` of the hidden states `(M, E)` chosen by the caller."""
        return F.linear(hidden, self.head)


class RewardModel(nn.Module):
    """OPT with one number in place of logits: how good a whole row is (Stiennon et al. 2020, arXiv 2009.01325).

    Parameters are named as in the reference's `OPTForSequenceClassification` with one label, less a leading `model.`.
    """

    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = Decoder(config)
        self.score = nn.Linear(config.word_embed_proj_dim, 1, bias=False)

    def forward(self, input_ids: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        """The rewards `(R,)` of packed rows, each read at its row's last token; arguments as for `OPT`.

        The last token follows from the row's length, never from a search for pads: the reference takes the last token
        that is not a pad, which is the wrong one when a text ends in that id, as every text does if EOS serves as pad.
        """
        return self.rewards(self.decoder(input_ids, positions, rows, None), rows)

    def rewards(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """The same from the last hidden states `(N, E)`, for a loss that wants these too."""
        lengths = (rows >= 0).sum(1, keepdim=True)  # (R, 1)
        last = rows.gather(1, lengths - 1).squeeze(1)  # (R,)
        # In float32 at least: near 10 bfloat16 knows no number between 10 and 10.0625, so close rewards would be ties.
        dtype = torch.promote_types(self.score.weight.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.index_select(0, last).to(dtype), self.score.weight.to(dtype)).squeeze(1)  # (R,)

    @property
    def head(self) -> Tensor:
        """The body's output matrix `(V, E)` as a language model, tied to its embedding."""
        return self.decoder.embed_tokens.weight


def set_dropout(model: nn.Module, dropout: float) -> None:
    """Train with this dropout after attention and feed-forward, and at most this much inside attention.

    0 turns every dropout off. (trl's `disable_dropout` leaves OPT's on: it looks for modules, and OPT's is a function.)
    """
    for module in model.modules():
        if isinstance(module, Layer):
            module.dropout = dropout
            module.self_attn.dropout = min(dropout, module.self_attn.dropout)


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Draw fresh weights: N(0, 1 / fan-in) for matrices, N(0, 1 / width) for embeddings, biases 0, LayerNorms 1.

    The last matrix of each residual branch is smaller by √(2 · layers), as in GPT-2 (Radford et al. 2019, section 2.3).
    The reference draws everything from N(0, 0.02²). In a narrow model with a projected embedding the token then reaches
    the first layer far smaller than its position does (√128 · 0.02² against 0.02), and post-LN training starts badly.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            ends_residual_branch = name.endswith(("out_proj", "fc2"))
            scale = (2 * model.config.num_hidden_layers) ** -0.5 if ends_residual_branch else 1.0
            module.weight.normal_(0.0, scale * module.in_features**-0.5, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(0.0, module.embedding_dim**-0.5, generator=generator)
            if module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
