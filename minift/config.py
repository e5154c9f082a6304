"""Every value of a training run: one table with defaults, meanings and the values allowed.

Defaults are those of trl 1.16's SFTTrainer wherever it has the option; the reward model's differ in `RM_DEFAULTS`. How
flags are read is in commands/flags.py, the recipes are in commands/recipes.py.
"""

import re
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal, NamedTuple

from minift.prompts import TEMPLATES

SFT, RM = ("sft",), ("rm",)

DATA = "model and data"
ENCODING = "what the model sees"
PREFERENCES = "preference loss"
LOOP = "training loop"
OPTIMISER = "optimiser"
LORA = "low-rank adapters"
RECORD = "logging and evaluation"
GROUPS = (DATA, ENCODING, PREFERENCES, LOOP, OPTIMISER, LORA, RECORD)

MOST = 10**9  # of a whole number without a limit of its own


class Domain(NamedTuple):
    """How an option's text is read, which values are allowed, and how messages describe them."""

    read: Callable[[str], Any]
    allows: Callable[[Any], bool]
    expected: str


def _whole(least: int, most: int = MOST) -> Domain:
    return Domain(int, lambda value: least <= value <= most, f"a whole number of at least {least} and at most {most}")


def _choice(*values: str) -> Domain:
    return Domain(str, lambda value: value in values, "one of " + ", ".join(values))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


# NaN fails every comparison, so none of these allows it.
POSITIVE = Domain(float, lambda value: 0 < value < 1e30, "a number above 0 and below 1e30")
NOT_NEGATIVE = Domain(float, lambda value: 0 <= value < 1e30, "a number of at least 0 and below 1e30")
ALPHA = Domain(float, lambda value: 0 < value < 1e9, "a number above 0 and below 1e9")
FRACTION = Domain(float, lambda value: 0 <= value < 1, "a number of at least 0 and below 1")
TEXT = Domain(str, bool, "some text")
NAMES = Domain(_names, all, "names with commas between them")
DEVICE = Domain(
    str, lambda value: bool(re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value)), "auto, cpu, mps, cuda or cuda:N"
)
SWITCH = Domain(bool, lambda value: True, "no value")


def _option(default: Any, domain: Domain, group: str, meaning: str, scripts: tuple[str, ...] = SFT + RM) -> Any:
    metadata = {"domain": domain, "group": group, "meaning": meaning, "scripts": scripts}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """The options of one run. Each option's text says what `None` means for it."""

    # fmt: off
    recipe: str | None = _option(None, _choice("tiny", "course"), DATA, "named values for the other flags; a flag "
                                 "overrides them; tiny if neither --model nor --data is given, else none")
    model: str = _option("data/model", TEXT, DATA, "folder or hub id (owner/name) of an OPT model, or of peft adapters")
    revision: str | None = _option(None, TEXT, DATA, "branch, tag or commit of a hub model; main if left out")
    data: str = _option("data/instructions.jsonl", TEXT, DATA, "JSON, JSONL, CSV or parquet file, or a hub data set "
                        "(owner/name@revision:split)")
    eval_data: str | None = _option(None, TEXT, DATA, "file or hub data set of held-out rows; without one, "
                                    "--eval-fraction of --data is held out")
    eval_fraction: float = _option(0.1, FRACTION, DATA, "fraction of --data to hold out; 0 trains on every row")
    no_input_only: bool = _option(False, SWITCH, DATA, "keep only the rows whose input is empty", SFT)
    encoded_cache: str | None = _option(None, TEXT, DATA, "folder in which to keep the encoded rows, for data larger "
                                        "than memory and for a quick start; without one they are in memory")
    out: str = _option("runs/sft", TEXT, DATA, "the run's folder")
    resume: bool = _option(False, SWITCH, DATA, "continue from the last checkpoint in --out")

    template: str = _option("course", TEXT, ENCODING, ", ".join(TEMPLATES) + ", or a file")
    response_template: str | None = _option(None, TEXT, ENCODING, "text before the response in rows that have only "
                                            "`text`; the template's own if left out", SFT)
    supervise: Literal["completion", "all"] = _option("completion", _choice("completion", "all"), ENCODING,
                                                      "tokens that count in the loss; all is the control experiment, "
                                                      "without a mask", SFT)
    max_length: int = _option(1024, _whole(2), ENCODING, "tokens kept of a row")

    margin_field: str | None = _option(None, TEXT, PREFERENCES, "field with a pair's margin; none if left out", RM)
    center_rewards: float = _option(0.0, NOT_NEGATIVE, PREFERENCES, "weight in the loss of (reward_chosen + "
                                    "reward_rejected)²", RM)
    group_prompts: bool = _option(False, SWITCH, PREFERENCES, "count the pairs of one prompt and chosen response as "
                                  "one in --batch-size and in the loss", RM)
    lm_weight: float = _option(0.0, NOT_NEGATIVE, PREFERENCES, "language-modelling loss of the same body: each pair "
                               "(with --group-prompts, each prompt) adds this times -log p(prompt and best response), "
                               "summed over tokens, not averaged", RM)
    shuffle_labels: bool = _option(False, SWITCH, PREFERENCES, "swap the sides of half the training pairs: the "
                                   "control experiment, which should learn nothing; a recipe's --group-prompts and "
                                   "--lm-weight are then ignored", RM)

    epochs: int = _option(3, _whole(1), LOOP, "passes over the training rows")
    max_steps: int | None = _option(None, _whole(1), LOOP, "optimiser steps in total, instead of --epochs")
    batch_size: int = _option(8, _whole(1), LOOP, "rows, or rankings of a reward model, in one forward pass")
    grad_accum: int = _option(1, _whole(1), LOOP, "forward passes in one optimiser step")
    order: Literal["shuffled", "sequential"] = _option("shuffled", _choice("shuffled", "sequential"), LOOP,
                                                       "order of the rows in each epoch")
    seed: int = _option(42, _whole(0, 2**32 - 1), LOOP, "seed of split, order, dropout and initialisation")
    device: str = _option("auto", DEVICE, LOOP, "auto takes a GPU if there is one; mps is Apple's")
    dtype: str = _option("auto", _choice("auto", "float32", "bfloat16", "float64"), LOOP, "dtype of the forward pass; "
                         "auto is bfloat16 on a GPU that has it, else float32")

    lr: float = _option(2e-5, POSITIVE, OPTIMISER, "peak learning rate")
    schedule: str = _option("linear", _choice("linear", "cosine", "constant"), OPTIMISER, "learning rate after the "
                            "warm-up")
    warmup_steps: int = _option(0, _whole(0), OPTIMISER, "steps in which the learning rate rises from 0")
    weight_decay: float = _option(0.0, NOT_NEGATIVE, OPTIMISER, "on all parameters but biases and LayerNorms")
    max_grad_norm: float = _option(1.0, POSITIVE, OPTIMISER, "gradients with a larger norm are scaled down to this")
    dropout: float | None = _option(None, FRACTION, OPTIMISER, "instead of the dropout in the model's config; "
                                    "attention dropout is at most this")
    gradient_checkpointing: bool = _option(False, SWITCH, OPTIMISER, "keep only each layer's input for the backward "
                                           "pass, and compute the rest again: slower, but in less memory")
    compile: bool = _option(False, SWITCH, OPTIMISER, "on an NVIDIA GPU: let torch.compile fuse operations; the first "
                            "step then takes about 15 seconds")
    fsdp: bool = _option(False, SWITCH, OPTIMISER, "with torchrun: each process keeps only a part of the weights, "
                         "gradients and moments, for models that do not fit; slower")

    lora_rank: int = _option(0, _whole(0), LORA, "rank of the adapters; 0: no adapters, all weights are trained")
    lora_alpha: float = _option(8.0, ALPHA, LORA, "an adapter's output is scaled by alpha / rank")
    lora_dropout: float = _option(0.0, FRACTION, LORA, "dropout on an adapter's input")
    lora_targets: tuple[str, ...] = _option(("q_proj", "v_proj"), NAMES, LORA, "names of the linears that get adapters")
    base_dtype: str = _option("float32", _choice("float32", "float16", "bfloat16"), LORA, "dtype of the weights that "
                              "adapters leave frozen, and of the forward pass")

    log_every: int = _option(1, _whole(1), RECORD, "steps between two lines of metrics.jsonl")
    eval_every: int = _option(0, _whole(0), RECORD, "steps between two evaluations; 0 evaluates only at the end")
    save_every: int = _option(0, _whole(0), RECORD, "steps between two checkpoints; 0 saves only at the end")
    bleu_samples: int = _option(100, _whole(0), RECORD, "held-out rows answered for BLEU; 0 generates nothing", SFT)
    run_checks: bool = _option(False, SWITCH, RECORD, "run the answers to held-out rows that have checks, and count "
                               "those that pass; only for rows that you trust", SFT)
    # fmt: on

    # name → flag, recipe or default, filled in by commands/flags.py
    origins: dict[str, str] = field(default_factory=dict, repr=False, compare=False)


# Where the reward model's defaults differ. lr is trl's: its reward trainer differs from its SFT trainer in that.
RM_DEFAULTS = {"data": "data/pairs.jsonl", "out": "runs/rm", "template": "dialogue", "lr": 1e-4}


def options_of(script: str) -> list[Field]:
    """Return the options of a script, "sft" or "rm", in the table's order."""
    return [option for option in fields(Config) if script in option.metadata.get("scripts", ())]


def defaults_of(script: str) -> dict[str, Any]:
    """Return the default of each option of a script."""
    return {option.name: option.default for option in options_of(script)} | (RM_DEFAULTS if script == "rm" else {})


def flag_of(name: str) -> str:
    """Return the flag of an option: `batch_size` → `--batch-size`."""
    return "--" + name.replace("_", "-")


def to_dict(config: Config, script: str) -> dict[str, Any]:
    """Return the resolved values of a script's options by name, ready for JSON."""
    values = {option.name: getattr(config, option.name) for option in options_of(script)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
