"""The model against transformers' `OPTForCausalLM`: forward and backward, on three architectures and the setting's own.

Both sides read the same folder. A difference is the largest of a tensor's entries, relative to its largest entry. Every
layer's hidden states and every parameter's gradient are compared; the table shows the largest of their differences.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import OPTForCausalLM

from minift.batching import collate
from minift.encode import IGNORE_INDEX, Example, encode_rows
from minift.files.datasets import load_rows
from minift.files.tokenizer import load_tokenizer
from minift.files.weights import load_model, read_config
from minift.model import OPT
from minift.prompts import TEMPLATES
from minift.run.setup import set_dropout
from tests.compare import Check, Setting
from tests.compare.training import NO_DROPOUT, WITHOUT_EFFECT, quiet
from tests.loop import sft_loss
from tests.reference import (
    ARCHITECTURES,
    ON_THE_HUB,
    difference,
    gradients,
    hidden_states,
    mean_loss,
    pad_rows,
    padded,
    random_examples,
    reference_loss,
    reference_model,
)

SECTION = "model"
SIZES = {
    "vocab_size": 600,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "ffn_dim": 128,
    "word_embed_proj_dim": 64,
    "max_position_embeddings": 96,
}
SEED = 0
FLOAT32, FLOAT64 = 1e-5, 1e-9
MAX_LENGTH = 256  # tokens of a row of the setting's own data


class Outcome(NamedTuple):
    """Everything that one side computes, by name."""

    hidden: dict[str, Tensor]  # after each layer and at the end, each (N, C) or (N, E)
    logits: dict[str, Tensor]  # (N, V)
    loss: dict[str, Tensor]
    gradients: dict[str, Tensor]  # of every parameter, by minift's names


def compare(setting: Setting) -> Iterator[Check]:
    for name, folder, examples in models_and_rows(setting):
        setting.progress(f"model: {name}")
        on = f"{name}: {len(examples)} rows, {sum(len(ids) for ids, _ in examples):,} tokens"
        yield from compare_model(folder, examples, on)


def models_and_rows(setting: Setting) -> Iterator[tuple[str, Path, list[Example]]]:
    """Yield name, folder and rows: of each architecture with random weights and rows, then of the setting's own."""
    rows = 8 if setting.quick else 16  # of fewer, the q_proj gradients nearly cancel, and rounding is most of them
    longest = SIZES["max_position_embeddings"]
    generator = torch.Generator().manual_seed(SEED)
    lengths = [longest, 1, *torch.randint(2, longest, (rows - 2,), generator=generator).tolist()]
    for name in ON_THE_HUB:
        folder = setting.scratch / name
        with quiet():
            reference_model(name, **(SIZES | ARCHITECTURES[name])).save_pretrained(folder)
        yield name, folder, random_examples(lengths, vocab_size=SIZES["vocab_size"])
    encoded = encode_rows(
        load_rows(setting.data)[: 4 * rows],  # some may be dropped
        load_tokenizer(setting.model),
        TEMPLATES["course"],
        max_length=min(MAX_LENGTH, read_config(setting.model)[0].max_position_embeddings),
    )
    yield "/".join(setting.model.absolute().parts[-2:]), setting.model, encoded.examples[:rows]


def compare_model(folder: Path, examples: list[Example], on: str) -> Iterator[Check]:
    found, expected = ours(folder, examples, torch.float32), reference(folder, examples, torch.float32)
    exact = reference(folder, examples, torch.float64)
    for what, name in (
        ("hidden states after every layer", "hidden"),
        ("logits", "logits"),
        ("loss", "loss"),
        ("every parameter's gradient", "gradients"),
    ):
        apart, where = largest(getattr(found, name), getattr(expected, name))
        rounding, _ = largest(getattr(expected, name), getattr(exact, name))
        note = f"the largest: {where}; " if apart and where != what else ""
        note += f"the reference is {rounding:.1e} from its own float64"
        yield Check(SECTION, what, on, apart, FLOAT32, note)
    rounding = [noise(outcome.gradients) for outcome in (found, expected)]
    if any(rounding):
        note = "rounding only, as a constant added to all keys changes no softmax; relative to k_proj.weight's"
        yield Check(SECTION, f"{WITHOUT_EFFECT}'s gradient, which is 0", on, max(rounding), FLOAT32, note)
    differences = [largest(*pair) for pair in zip(ours(folder, examples, torch.float64), exact, strict=True)]
    apart, where = max(differences)
    yield Check(SECTION, "all of it in float64", on, apart, FLOAT64, f"the largest: {where}")


def ours(folder: Path, examples: list[Example], dtype: torch.dtype) -> Outcome:
    model = load_model(folder, dtype=dtype)
    set_dropout(model, 0.0)
    return run_minift(model, examples)


@quiet()
def reference(folder: Path, examples: list[Example], dtype: torch.dtype) -> Outcome:
    return run_reference(OPTForCausalLM.from_pretrained(folder, dtype=dtype, **NO_DROPOUT), examples)


def run_minift(model: OPT, examples: list[Example]) -> Outcome:
    """Run minift's forward and backward pass on the packed rows."""
    layers = record_layers(model.decoder.layers)
    batch = collate(examples)
    loss = mean_loss(sft_loss(model), batch)
    loss.backward()
    last = hidden_states(model, batch)  # (N, E)
    tokens = batch.rows[batch.rows >= 0]  # of each row in turn; those of a shared prefix are repeated
    hidden = {name: states[tokens] for name, states in (layers | {"at the end": last}).items()}
    return outcome(hidden, model.logits(last)[tokens], loss, model)


def run_reference(model: OPTForCausalLM, examples: list[Example]) -> Outcome:
    """Run the reference's forward and backward pass on the same rows, padded on the right; keep the real tokens."""
    layers = record_layers(model.model.decoder.layers)
    inputs = padded([ids for ids, _ in examples], model.config.pad_token_id)
    labels = pad_rows([labels for _, labels in examples], IGNORE_INDEX)  # (R, T)
    last = model.model(**inputs).last_hidden_state  # (R, T, E)
    logits = model.lm_head(last)  # (R, T, V)
    real = inputs["attention_mask"].bool()
    hidden = {name: states[real] for name, states in (layers | {"at the end": last}).items()}  # (N, C)
    if logits.dtype == torch.float64:  # the reference's own loss rounds its logits to float32
        loss = reference_loss(model, examples)
    else:
        loss = model.loss_function(logits=logits, labels=labels, vocab_size=model.config.vocab_size)
    loss.backward()
    return outcome(hidden, logits[real], loss, model)


def outcome(hidden: dict[str, Tensor], logits: Tensor, loss: Tensor, model: nn.Module) -> Outcome:
    hidden = {name: states.detach() for name, states in hidden.items()}
    return Outcome(hidden, {"logits": logits.detach()}, {"loss": loss.detach()}, gradients(model))


def record_layers(layers: nn.ModuleList) -> dict[str, Tensor]:
    """Return a dictionary that each pass of the model fills with the hidden states after each layer."""
    hidden = {}
    for index, layer in enumerate(layers):

        def keep(module: nn.Module, given: tuple, output: Tensor, name: str = f"after layer {index + 1}") -> None:
            hidden[name] = output[0] if isinstance(output, tuple) else output

        layer.register_forward_hook(keep)
    return hidden


def largest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest difference between two tensors of one name, and the name; infinite if the names differ."""
    if found.keys() != expected.keys():
        return math.inf, f"only one side has {', '.join(sorted(found.keys() ^ expected.keys()))}"
    names = [name for name in found if not name.endswith(WITHOUT_EFFECT)]
    return max((relative(found[name], expected[name]), name) for name in names)


def relative(found: Tensor, expected: Tensor) -> float:
    """Return `difference`; infinite if the shapes differ, a number is NaN, or all expected ones are 0."""
    value = difference(found, expected) if found.shape == expected.shape else math.nan
    return math.inf if math.isnan(value) else value


def noise(gradients: dict[str, Tensor]) -> float:
    """Return the largest entry of a k_proj.bias's gradient, relative to its k_proj.weight's; 0 if there is no bias."""
    weights = {name: name.replace("bias", "weight") for name in gradients if name.endswith(WITHOUT_EFFECT)}
    ratios = (gradients[bias].abs().max() / gradients[weight].abs().max() for bias, weight in weights.items())
    return max((ratio.item() for ratio in ratios), default=0.0)
