"""Oracles for tests and tests/compare: transformers' OPT, minift's twins of it, and the same rows for both.

A twin has the weights of the model it is a twin of. transformers' models are called the reference here.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from minift.batching import Batch, collate
from minift.encode import IGNORE_INDEX, Example
from minift.files.weights import parse_config
from minift.model import OPT, RewardModel
from minift.pairs import PairBatch
from minift.trainer import LossFunction

SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "max_position_embeddings": 20,
    "dropout": 0.0,
}
PRE_LN, POST_LN, GALACTICA = "pre-LN (125m)", "post-LN, projected (350m)", "Galactica"
PROJECTED = {"word_embed_proj_dim": 12}
ARCHITECTURES = {  # name → what differs from SMALL; the first three are those on the hub
    PRE_LN: {},
    POST_LN: {"do_layer_norm_before": False} | PROJECTED,
    GALACTICA: {
        "activation_function": "gelu",
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
        "bos_token_id": 0,
    },
    "pre-LN, no final LayerNorm": {"_remove_final_layer_norm": True},
    "pre-LN, projected": PROJECTED,
    "post-LN": {"do_layer_norm_before": False},
    "biases without affine": {"layer_norm_elementwise_affine": False},
    "affine without biases": {"enable_bias": False, "do_layer_norm_before": False},
}
ON_THE_HUB = (PRE_LN, POST_LN, GALACTICA)
REFERENCE_CLASS = {OPT: transformers.OPTForCausalLM, RewardModel: transformers.OPTForSequenceClassification}
Model = OPT | RewardModel
Reference = transformers.OPTForCausalLM | transformers.OPTForSequenceClassification

# ------------------------------------------------------------------------------------------------------------- models


def reference_model(
    architecture: str, dtype: torch.dtype = torch.float32, *, twin: type[Model] = OPT, **changes: Any
) -> Reference:
    """Return a small random model of transformers in eval mode, of the class that `twin` is minift's version of.

    `changes` are values of its config, such as `pad_token_id=2` or `hidden_size=64`.
    """
    values = SMALL | ARCHITECTURES[architecture] | changes
    config = transformers.OPTConfig(**values, num_labels=1)
    model = REFERENCE_CLASS[twin]._from_config(config, attn_implementation="sdpa").to(dtype)
    return randomise(model).eval()  # drawn in their dtype: float64 weights are not float32 numbers


def twin_of(reference: Reference) -> Model:
    """Return minift's model with the config, weights, dtype and mode of a transformers model."""
    twin = next(ours for ours, theirs in REFERENCE_CLASS.items() if isinstance(reference, theirs))
    model = twin(parse_config(reference.config.to_dict())).to(reference.dtype)
    state = {own_name(name): tensor for name, tensor in reference.state_dict().items()}
    state.pop("lm_head.weight", None)  # tied to the embedding
    model.load_state_dict(state)
    return model.train(reference.training)


def twins(
    architecture: str, dtype: torch.dtype = torch.float32, *, twin: type[Model] = OPT, **changes: Any
) -> tuple[Reference, Model]:
    """Return a random model of transformers and minift's twin of it; arguments as for `reference_model`."""
    reference = reference_model(architecture, dtype, twin=twin, **changes)
    return reference, twin_of(reference)


@torch.no_grad()
def varied_twins(architecture: str, dtype: torch.dtype = torch.float32) -> tuple[Reference, Model]:
    """Return language models, as `twins` does, whose completions vary and do not echo the prompt."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 40, "max_position_embeddings": 64, "dropout": 0.1}
    config = transformers.OPTConfig(**SMALL | ARCHITECTURES[architecture] | sizes)
    reference = transformers.OPTForCausalLM(config).to(dtype).eval()
    for name, parameter in reference.named_parameters():
        if parameter.dim() > 1:
            parameter *= {PRE_LN: (20, 4), POST_LN: (8, 6)}[architecture]["embed" in name]
    return reference, twin_of(reference)


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 1) -> nn.Module:
    """Draw weights that make nothing trivial: biases are not 0 and LayerNorms not the identity. Return the model."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        scale = 1.0 if "embed" in name else 0.3 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
        parameter.normal_(0.0, scale, generator=generator)
        if "layer_norm.weight" in name:
            parameter.add_(1.0)
    return model


def own_name(name: str) -> str:
    """Return minift's name for a parameter of transformers or peft, which calls an adapter "default"."""
    name = name.removeprefix("base_model.model.").removeprefix("model.")
    return name.replace(".modules_to_save.default", "").replace(".default", "")


# --------------------------------------------------------------------------------------------------------------- rows


def random_examples(lengths: Sequence[int], *, vocab_size: int = SMALL["vocab_size"], seed: int = 0) -> list[Example]:
    """Return rows of random ids whose first half is not supervised, except the first token, which is never predicted.

    Each row of more than one token has a pad id inside: it is looked up like any other, but gets no gradient.
    """
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for length in lengths:
        ids = torch.randint(3, vocab_size, (length,), generator=generator)
        if length > 1:
            ids[length // 3] = 1
        labels = ids.clone()
        labels[1 : length // 2] = IGNORE_INDEX
        examples.append(Example(ids.tolist(), labels.tolist()))
    return examples


def pad_rows(
    rows: Sequence[Sequence[int]], filler: int, *, side: Literal["left", "right"] = "right", length: int = 0
) -> Tensor:
    """Return rows of ids, labels or mask values as one tensor `(R, T)`; T is the longest row's, or `length` if longer.

    >>> pad_rows([[2, 7], [2]], 1)
    tensor([[2, 7],
            [2, 1]])
    """
    length = max(length, *map(len, rows))
    pads = [[filler] * (length - len(row)) for row in rows]
    return torch.tensor([[*pad, *row] if side == "left" else [*row, *pad] for pad, row in zip(pads, rows, strict=True)])


def padded(
    rows: Sequence[Sequence[int]], pad: int = 1, *, side: Literal["left", "right"] = "right", length: int = 0
) -> dict[str, Tensor]:
    """Return rows of ids as transformers takes them: `input_ids` and `attention_mask`, both `(R, T)`."""
    mask = [[1] * len(row) for row in rows]
    return {
        "input_ids": pad_rows(rows, pad, side=side, length=length),
        "attention_mask": pad_rows(mask, 0, side=side, length=length),
    }


# ---------------------------------------------------------------------------------------------- what the reference says


def reference_logits(reference: nn.Module, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return the logits `(N, V)` of the rows' tokens, in the order in which minift packs them."""
    inputs = padded(rows, reference.config.pad_token_id)
    return reference(**inputs).logits[inputs["attention_mask"].bool()]


def reference_rewards(reference: nn.Module, rows: Sequence[Sequence[int]], **padding: Any) -> Tensor:
    """Return the rewards `(R,)` of rows; `padding` as for `padded`.

    The reference reads a reward at the last token that is not the config's pad.
    """
    return reference(**padded(rows, reference.config.pad_token_id, **padding)).logits.squeeze(1)


def reference_loss(reference: nn.Module, examples: Sequence[Example]) -> Tensor:
    """Return the mean next-token cross entropy of the supervised tokens.

    Not by the reference's own `labels=`, which rounds float64 logits to float32.
    """
    logits = reference(**padded([ids for ids, _ in examples], reference.config.pad_token_id)).logits  # (R, T, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = pad_rows([labels for _, labels in examples], IGNORE_INDEX)  # (R, T)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)


def reference_preference_loss(
    chosen: Tensor, rejected: Tensor, margins: Tensor | float = 0.0, center: float = 0.0
) -> Tensor:
    """Return trl's loss of reward modelling: the mean over pairs `(P,)`, with margins and centring."""
    return -F.logsigmoid(chosen - rejected - margins).mean() + center * ((chosen + rejected) ** 2).mean()


# ------------------------------------------------------------------------------------------------- what minift computes


def pack(rows: Sequence[Sequence[int]]) -> Batch:
    """Return a batch of rows of ids, every token supervised."""
    return collate([Example([*row], [*row]) for row in rows])


def hidden_states(model: OPT, batch: Batch) -> Tensor:
    """Return the last hidden states `(N, E)` of a batch."""
    return model(batch.input_ids, batch.positions, batch.rows)


def logits_of(model: OPT, examples: Sequence[Example]) -> Tensor:
    """Return the logits `(tokens, V)` of each example in turn; those of a shared prefix are repeated."""
    batch = collate(examples)
    return model.logits(hidden_states(model, batch)[batch.rows[batch.rows >= 0]])


def rewards_of(model: RewardModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return the rewards `(R,)` of packed rows of ids."""
    batch = pack(rows)
    return model(batch.input_ids, batch.positions, batch.rows)


def mean_loss(loss: LossFunction, batch: Batch | PairBatch) -> Tensor:
    """Return sum / count of a batch."""
    total, count, _ = loss(batch)
    return total / count


# ---------------------------------------------------------------------------------------------------------- comparing


def difference(found: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    """Return max|a − b| / max|b|: relative to a tensor's largest entry, or to that of `scale`."""
    assert found.shape == expected.shape
    scale = expected if scale is None else scale
    return ((found - expected).abs().max() / scale.abs().max()).item()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters of a model of minift, transformers or peft, by minift's names."""
    return {own_name(name): weight for name, weight in model.named_parameters() if weight.requires_grad}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradient of every trained parameter, by minift's names."""
    return {name: weight.grad for name, weight in trained(model).items()}


def assert_gradients_agree(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compare gradients by name; none may be 0."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # Softmax ignores a shift of all keys, so the gradient of their bias is 0 except for rounding. The gradient of
        # the weight beside it tells how much rounding there may be.
        scale = expected[name.replace("bias", "weight")] if name.endswith("k_proj.bias") else gradient
        assert scale.abs().max() > 0, name
        assert difference(found[name], gradient, scale) < tolerance, name
