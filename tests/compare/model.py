"""The model against transformers' `OPTForCausalLM`: forward and backward, on three architectures and the setting's own.

Both sides read the same folder. A difference is the largest of a tensor's entries, relative to its largest entry; every
layer's hidden states and every parameter's gradient are compared, and the largest of their differences is shown.

Two computations in float32 may be as far apart as both are from the exact one. So where the reference's own float32 is
further than half the tolerance from its float64, twice that is the tolerance; in float64 it is the same for all models.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from minift.batching import collate
from minift.datasets import load_rows
from minift.encode import UNSUPERVISED, Example, encode_rows
from minift.losses import completion_cross_entropy
from minift.model import set_dropout
from minift.prompts import TEMPLATES
from minift.tokenizer import load_tokenizer
from minift.weights import load_model, read_config
from tests.compare import Check, Setting
from tests.compare.training import quiet

SECTION = "model"
SIZES = {
    "vocab_size": 600,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "ffn_dim": 128,
    "word_embed_proj_dim": 64,
    "max_position_embeddings": 96,
    "dropout": 0.0,
}
ARCHITECTURES = {
    "pre-LN (125m)": {},
    "post-LN, projections (350m)": {"do_layer_norm_before": False, "word_embed_proj_dim": 24},
    "gelu, no biases (Galactica)": {
        "activation_function": "gelu",
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
        "bos_token_id": 0,
    },
}
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0}
ROUNDING_ONLY = "k_proj.bias"  # softmax does not see a shift of all keys, so its gradient is 0
SEED = 0
FLOAT32, FLOAT64 = 1e-5, 1e-9
LONGEST = 256  # tokens of a row of the setting's own data


class Outcome(NamedTuple):
    """All that one side computes, by name."""

    hidden: dict[str, Tensor]  # after each layer and at the end, each (N, C) or (N, E)
    logits: dict[str, Tensor]  # (N, V)
    loss: dict[str, Tensor]
    gradients: dict[str, Tensor]  # of every parameter, as minift names them


def compare(setting: Setting) -> Iterator[Check]:
    for name, folder, examples in models_and_rows(setting):
        setting.progress(f"model: {name}")
        on = f"{name}: {len(examples)} rows, {sum(len(ids) for ids, _ in examples):,} tokens"
        yield from compare_model(folder, examples, on)


def models_and_rows(setting: Setting) -> Iterator[tuple[str, Path, list[Example]]]:
    """(name, folder, rows): of each architecture with random weights, and random rows; then of the setting's own."""
    rows = 4 if setting.quick else 16
    for name, changes in ARCHITECTURES.items():
        folder = setting.scratch / name
        save_random_model(changes, folder)
        yield name, folder, random_examples(rows)
    positions = read_config(setting.model / "config.json").max_position_embeddings
    tokenizer = load_tokenizer(setting.model)
    max_length = min(LONGEST, positions)
    chosen = load_rows(setting.data)[: 4 * rows]  # some may be dropped
    examples, _, _ = encode_rows(chosen, tokenizer, TEMPLATES["course"], max_length=max_length)
    yield "/".join(setting.model.absolute().parts[-2:]), setting.model, examples[:rows]


@quiet()
def save_random_model(changes: dict, folder: Path) -> None:
    """Write the reference with weights that leave nothing trivial: no bias is 0 and no LayerNorm the identity."""
    model = transformers.OPTForCausalLM(transformers.OPTConfig(**(SIZES | changes)))
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if "embed" in name else 0.3 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
            parameter.normal_(0.0, scale, generator=generator)
            if "layer_norm.weight" in name:
                parameter.add_(1.0)
    model.save_pretrained(folder)


def random_examples(count: int) -> list[Example]:
    """Ragged rows, the longest as long as there are positions, the shortest one token; a third is not supervised."""
    generator = torch.Generator().manual_seed(SEED)
    longest = SIZES["max_position_embeddings"]
    lengths = [longest, 1, *torch.randint(2, longest, (count - 2,), generator=generator).tolist()]
    examples = []
    for length in lengths:
        ids = torch.randint(3, SIZES["vocab_size"], (length,), generator=generator)
        ids[length // 2 :: 7] = 1  # pad ids in the text: looked up like any other, without a gradient to the table
        labels = torch.where(torch.arange(length) < length // 3, UNSUPERVISED, ids)
        examples.append(Example(ids.tolist(), labels.tolist()))
    return examples


def compare_model(folder: Path, examples: list[Example], on: str) -> Iterator[Check]:
    found, expected = ours(folder, examples, torch.float32), reference(folder, examples, torch.float32)
    exact = reference(folder, examples, torch.float64)
    for what, name in (
        ("hidden states after every layer", "hidden"),
        ("logits", "logits"),
        ("loss", "loss"),
        ("every parameter's gradient", "gradients"),
    ):
        difference, where = largest(getattr(found, name), getattr(expected, name))
        rounding, _ = largest(getattr(expected, name), getattr(exact, name))
        note = f"the largest: {where}; " if difference and where != what else ""
        note += f"the reference is {rounding:.1e} from its own float64"
        yield Check(SECTION, what, on, difference, FLOAT32, note)
    rounding = [noise(outcome.gradients) for outcome in (found, expected)]
    if any(rounding):
        note = "softmax does not see a shift of all keys, so it is rounding; relative to k_proj.weight's"
        yield Check(SECTION, "k_proj.bias's gradient, which is 0", on, max(rounding), FLOAT32, note)
    differences = [largest(*pair) for pair in zip(ours(folder, examples, torch.float64), exact, strict=True)]
    difference, where = max(differences)
    yield Check(SECTION, "all of it in float64", on, difference, FLOAT64, f"the largest: {where}")


def ours(folder: Path, examples: list[Example], dtype: torch.dtype) -> Outcome:
    """minift's own pass over the rows, packed."""
    model = load_model(folder, dtype=dtype)
    set_dropout(model, 0.0)
    hidden = record_layers(model.decoder.layers)
    batch = collate(examples)
    hidden["at the end"] = model(batch.input_ids, batch.positions, batch.rows)  # (N, E)
    total, count = completion_cross_entropy(hidden["at the end"], model.head, batch.labels, batch.positions)
    (total / count).backward()
    logits = model.logits(hidden["at the end"])  # (N, V)
    return outcome(hidden, logits, total / count, dict(model.named_parameters()))


@quiet()
def reference(folder: Path, examples: list[Example], dtype: torch.dtype) -> Outcome:
    """The reference's pass over the same rows, padded on the right; of its outputs the real tokens' are kept."""
    model = transformers.OPTForCausalLM.from_pretrained(folder, dtype=dtype, **NO_DROPOUT)
    layers = record_layers(model.model.decoder.layers)
    length = max(len(ids) for ids, _ in examples)
    ids = torch.tensor([ids + [model.config.pad_token_id] * (length - len(ids)) for ids, _ in examples])  # (R, T)
    labels = torch.tensor([labels + [UNSUPERVISED] * (length - len(labels)) for _, labels in examples])
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in examples])
    last = model.model(input_ids=ids, attention_mask=mask).last_hidden_state  # (R, T, E)
    logits = model.lm_head(last)  # (R, T, V)
    if dtype == torch.float64:  # the reference's own loss rounds its logits to float32
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    else:
        loss = model.loss_function(logits=logits, labels=labels, vocab_size=model.config.vocab_size)
    loss.backward()
    parameters = {name.removeprefix("model."): parameter for name, parameter in model.named_parameters()}
    real = mask.bool()
    hidden = {name: states[real] for name, states in (layers | {"at the end": last}).items()}  # (N, C)
    return outcome(hidden, logits[real], loss, parameters)


def record_layers(layers: torch.nn.ModuleList) -> dict[str, Tensor]:
    """A dictionary that the model's next pass fills: the hidden states after each layer."""
    hidden = {}
    for index, layer in enumerate(layers):

        def keep(module, given, output, name=f"after layer {index + 1}"):
            hidden[name] = output[0] if isinstance(output, tuple) else output

        layer.register_forward_hook(keep)
    return hidden


def outcome(hidden: dict[str, Tensor], logits: Tensor, loss: Tensor, parameters: dict[str, Tensor]) -> Outcome:
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    hidden = {name: states.detach() for name, states in hidden.items()}
    return Outcome(hidden, {"logits": logits.detach()}, {"loss": loss.detach()}, gradients)


def largest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference between two tensors of one name, and the name; infinite where there are no two."""
    if found.keys() != expected.keys():
        return math.inf, f"only one side has {', '.join(sorted(found.keys() ^ expected.keys()))}"
    names = [name for name in found if not name.endswith(ROUNDING_ONLY)]
    return max((relative(found[name], expected[name]), name) for name in names)


def relative(found: Tensor, expected: Tensor) -> float:
    """max|a − b| / max|b|; infinite if a number is NaN or the shapes differ."""
    if found.shape != expected.shape:
        return math.inf
    difference = ((found - expected).abs().max() / (expected.abs().max() or 1.0)).item()
    return math.inf if math.isnan(difference) else difference


def noise(gradients: dict[str, Tensor]) -> float:
    """The largest entry of a k_proj.bias's gradient, relative to its k_proj.weight's; 0 where there is no bias."""
    weights = {name: name.replace("bias", "weight") for name in gradients if name.endswith(ROUNDING_ONLY)}
    ratios = (gradients[bias].abs().max() / gradients[weight].abs().max() for bias, weight in weights.items())
    return max((ratio.item() for ratio in ratios), default=0.0)
