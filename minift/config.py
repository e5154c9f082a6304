"""Every flag of both scripts as one table; recipes; the resolved values printed and saved.

A value comes from the first of: the flag, the recipe, the default. Defaults are trl 1.16's wherever it has one.
"""

import argparse
import math
import re
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from difflib import get_close_matches
from typing import Any, NamedTuple

from minift.errors import CommandParser, UserError

SCRIPTS = {"sft": "train_sft.py", "rm": "train_rm.py"}
SFT, RM = ("sft",), ("rm",)


class Kind(NamedTuple):
    """How a flag's text is read, which values are allowed, and how an error message says so."""

    read: Callable[[str], Any]
    allowed: Callable[[Any], bool]
    expected: str


def _whole(least: int, most: float = math.inf) -> Kind:
    expected = f"a whole number of at least {least}" + ("" if most == math.inf else f" and at most {most}")
    return Kind(int, lambda value: least <= value <= most, expected)


def _choice(*values: str) -> Kind:
    return Kind(str, lambda value: value in values, "one of " + ", ".join(values))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


# NaN fails every comparison, so none of these lets it through.
ABOVE_ZERO = Kind(float, lambda value: 0 < value < math.inf, "a number above 0")
ZERO_OR_MORE = Kind(float, lambda value: 0 <= value < math.inf, "a number of at least 0")
SHARE = Kind(float, lambda value: 0 <= value < 1, "a number of at least 0 and below 1")
TEXT = Kind(str, bool, "some text")
NAMES = Kind(_names, all, "names with commas between them")
DEVICE = Kind(str, lambda value: bool(re.fullmatch(r"auto|cpu|cuda(:\d+)?", value)), "auto, cpu, cuda or cuda:N")
SWITCH = Kind(bool, lambda value: True, "no value")


def _flag(default: Any, kind: Kind, help: str, tasks: tuple[str, ...] = SFT + RM) -> Any:
    return field(default=default, metadata={"kind": kind, "help": help, "tasks": tasks})


@dataclass(frozen=True)
class Config:
    """The resolved values of one run. `None` means what the help text says about leaving the flag out."""

    # fmt: off
    # What is trained on what
    recipe: str = _flag("tiny", _choice("tiny", "course"), "values for all other flags; a flag given beside it wins")
    model: str = _flag("", TEXT, "directory or hub id (owner/name) of an OPT model; if given without --recipe, "
                       "the recipe's optimiser values, which suit its own model, no longer hold")
    revision: str | None = _flag(None, TEXT, "branch, tag or commit of a hub model; main if left out")
    data: str = _flag("", TEXT, "JSON, JSONL or parquet file, or a hub data set (owner/name@revision:split); if "
                      "given, what the recipe says of its own data (--eval-data, --no-input-only) no longer holds")
    eval_data: str | None = _flag(None, TEXT, "file or hub data set of held-out rows; without one, --eval-fraction "
                                  "holds")
    eval_fraction: float = _flag(0.1, SHARE, "share of --data to hold out (if given, the recipe's --eval-data no "
                                 "longer holds); 0 trains on every row")
    no_input_only: bool = _flag(False, SWITCH, "keep only the rows whose input is empty", SFT)
    out: str = _flag("", TEXT, "the run's folder")
    resume: bool = _flag(False, SWITCH, "go on from the last checkpoint in --out")

    # What the model sees
    template: str = _flag("course", TEXT, "course, alpaca, dialogue, none, or a file")
    response_template: str | None = _flag(None, TEXT, "what opens the response in rows that have only `text`", SFT)
    supervise: str = _flag("completion", _choice("completion", "all"),
                           "tokens that count in the loss; all is the control experiment, without a mask", SFT)
    max_length: int = _flag(1024, _whole(2), "tokens a row may have")
    margin_field: str | None = _flag(None, TEXT, "field that holds a pair's margin; no margin if left out", RM)
    center_rewards: float = _flag(0.0, ZERO_OR_MORE, "weight in the loss of a pair's squared sum of rewards", RM)
    group_prompts: bool = _flag(False, SWITCH, "pairs of one prompt and chosen response count as one in --batch-size "
                                "and in the loss", RM)
    lm_weight: float = _flag(0.0, ZERO_OR_MORE, "weight in the loss of -log p(prompt and best response) under the same "
                             "body as a language model", RM)
    shuffle_labels: bool = _flag(False, SWITCH, "forget which side was chosen in training: the control experiment, "
                                 "which should learn nothing; the recipe's --group-prompts and --lm-weight no longer "
                                 "hold", RM)

    # The loop
    epochs: int = _flag(3, _whole(1), "passes over the training rows")
    max_steps: int | None = _flag(None, _whole(1), "optimiser steps in all, in place of --epochs")
    batch_size: int = _flag(8, _whole(1), "rows in one forward pass")
    grad_accum: int = _flag(1, _whole(1), "forward passes in one optimiser step")
    order: str = _flag("shuffled", _choice("shuffled", "sequential"), "of the rows in each epoch")
    seed: int = _flag(42, _whole(0, 2**32 - 1), "of split, order, dropout and initialisation")
    device: str = _flag("auto", DEVICE, "auto takes a GPU if there is one")
    dtype: str = _flag("auto", _choice("auto", "float32", "bfloat16", "float64"), "arithmetic of the forward pass")

    # The optimiser
    lr: float = _flag(2e-5, ABOVE_ZERO, "highest learning rate of the schedule")
    schedule: str = _flag("linear", _choice("linear", "cosine", "constant"), "of the learning rate after the warm-up")
    warmup_steps: int = _flag(0, _whole(0), "steps in which the learning rate rises from 0")
    weight_decay: float = _flag(0.0, ZERO_OR_MORE, "on all but biases and LayerNorms")
    max_grad_norm: float = _flag(1.0, ABOVE_ZERO, "a longer gradient is scaled down to this norm")
    dropout: float | None = _flag(None, SHARE, "in place of what the model's config says")

    # Low-rank adapters
    lora_rank: int = _flag(0, _whole(0), "0 trains all weights")
    lora_alpha: float = _flag(8.0, ABOVE_ZERO, "the adapter's output is scaled by alpha / rank")
    lora_dropout: float = _flag(0.0, SHARE, "on the adapter's input")
    base_dtype: str = _flag("float32", _choice("float32", "float16", "bfloat16"), "of the weights that adapters leave "
                            "frozen, and of arithmetic with them")
    lora_targets: tuple[str, ...] = _flag(("q_proj", "v_proj"), NAMES, "names of the linears that get an adapter")

    # What is written down, and when
    log_every: int = _flag(1, _whole(1), "steps between two lines of metrics.jsonl")
    eval_every: int = _flag(0, _whole(0), "steps between two evaluations; 0 evaluates only at the end")
    save_every: int = _flag(0, _whole(0), "steps between two checkpoints; 0 saves only at the end")
    bleu_samples: int = _flag(100, _whole(0), "held-out rows completed for BLEU; 0 generates nothing", SFT)
    # fmt: on

    sources: dict[str, str] = field(default_factory=dict, repr=False, compare=False)  # name → flag, recipe or default


# The two defaults in which trl's reward trainer differs from its SFT trainer, and the prompts that go with pairs.
RM_DEFAULTS = {"lr": 1e-4, "template": "dialogue"}

# What trl takes (peft, of adapters) where it is not the default here, to be shown beside a recipe's value.
REFERENCE_DEFAULTS = {
    "eval_fraction": "no evaluation",
    "eval_every": "no evaluation",
    "save_every": "500",
    "dropout": "the model's",
    "lora_rank": "8; trl: no adapters",
}
WITHOUT_REFERENCE = "model data eval_data no_input_only out template group_prompts lm_weight bleu_samples".split()

RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "sft": {
        # Minutes on two CPU cores, from what ships in data/.
        "tiny": {
            "model": "data/model",
            "data": "data/instructions.jsonl",
            "eval_data": "data/heldout.jsonl",
            "out": "runs/sft",
            "max_length": 256,
            "max_steps": 400,
            "batch_size": 16,
            "lr": 1e-3,
            "warmup_steps": 20,
            "dropout": 0.0,
            "eval_every": 100,
            "bleu_samples": 402,
        },
        # The course lab's run. `describe` shows what trl takes where the lab chose something else.
        "course": {
            "model": "facebook/opt-350m",
            "data": "sahil2801/CodeAlpaca-20k",
            "no_input_only": True,
            "eval_fraction": 0.2,
            "out": "runs/sft-course",
            "template": "course",
            "max_length": 1024,
            "epochs": 10,
            "batch_size": 2,
            "lr": 5e-5,  # the default of the trl that the lab had
            "lora_rank": 16,
            "lora_alpha": 32.0,
            "lora_dropout": 0.1,
            "lora_targets": ("q_proj", "v_proj"),
            "eval_every": 3906,  # once an epoch: 7,811 rows in batches of two
            "save_every": 3906,
        },
    },
    "rm": {
        "tiny": {
            "model": "data/model",
            "data": "data/pairs.jsonl",
            "eval_data": "data/heldout_pairs.jsonl",
            "out": "runs/rm",
            "max_length": 256,
            "center_rewards": 0.01,
            "group_prompts": True,
            "lm_weight": 0.03,
            "max_steps": 400,
            "batch_size": 10,
            "lr": 1.2e-3,
            "warmup_steps": 20,
            "seed": 1,  # whose fresh head is right for half of the held-out pairs; other seeds' lean to one side
            "dropout": 0.0,
        },
        "course": {
            "model": "facebook/opt-350m",  # the lab: gpt2
            "data": "Dahoas/synthetic-instruct-gptj-pairwise",
            "eval_fraction": 0.2,
            "out": "runs/rm-course",
            "template": "dialogue",
            "max_length": 512,
            "epochs": 3,
            "batch_size": 3,
            "grad_accum": 8,
            "lr": 1.41e-5,
            "lora_rank": 8,
            "lora_alpha": 32.0,
            "lora_dropout": 0.1,
            "lora_targets": ("q_proj", "v_proj"),
            "eval_every": 1105,  # once an epoch: 26,514 of the 33,143 pairs, 3 x 8 at a time
            "save_every": 1105,
        },
    },
}
# Of a recipe: true of its own data, not of anyone else's; beyond the labels, which are all that the control is about;
# found for its own model.
ABOUT_ITS_DATA = ("eval_data", "no_input_only", "group_prompts")
BEYOND_LABELS = ("group_prompts", "lm_weight")
ABOUT_ITS_MODEL = ("epochs", "max_steps", "batch_size", "lr", "warmup_steps", "dropout", "lm_weight", "seed")

# The names under which people coming from trl know a flag, where spelling alone would not find it.
TRL_NAMES = {
    "--learning-rate": "--lr",
    "--lr-scheduler-type": "--schedule",
    "--num-train-epochs": "--epochs",
    "--per-device-train-batch-size": "--batch-size",
    "--gradient-accumulation-steps": "--grad-accum",
    "--model-name-or-path": "--model",
    "--dataset-name": "--data",
    "--output-dir": "--out",
    "--resume-from-checkpoint": "--resume",
    "--bf16": "--dtype",
    "--logging-steps": "--log-every",
    "--eval-steps": "--eval-every",
    "--save-steps": "--save-every",
    "--lora-r": "--lora-rank",
    "--lora-target-modules": "--lora-targets",
    "--center-rewards-coefficient": "--center-rewards",
}


def parse(task: str, argv: list[str] | None = None) -> Config:
    """Flags → the resolved values of a run of `task` (sft or rm); `argv` is the command line's own if None.

    Raises UserError for a flag that is unknown or belongs to the other script, and for a value that is wrong by itself.
    """
    defaults = _defaults(task)
    # All values are read as text here and checked below, so that every message has the same form.
    parser = CommandParser(SCRIPTS[task], argument_default=argparse.SUPPRESS)
    for item in _flags(task):
        kind, default = item.metadata["kind"], defaults[item.name]
        how = {"action": "store_true"} if kind is SWITCH else {"metavar": item.name.split("_")[-1].upper()}
        notes = [kind.expected] if kind not in (SWITCH, TEXT) else []
        notes += [f"default {_show(default)}"] if default not in (None, "") and kind is not SWITCH else []
        about = item.metadata["help"] + (f" ({'; '.join(notes)})" if notes else "")
        parser.add_argument(flag_of(item.name), help=about.replace("%", "%%"), **how)
    texts, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(_about_unknown(unknown[0], task))
    given = {item.name: _value(item, getattr(texts, item.name)) for item in _flags(task) if hasattr(texts, item.name)}

    recipe = dict(RECIPES[task][given.get("recipe", defaults["recipe"])])
    foreign = ("max_steps",) if "epochs" in given else ()
    foreign += ABOUT_ITS_DATA if "data" in given else ()
    foreign += BEYOND_LABELS if "shuffle_labels" in given else ()
    foreign += ABOUT_ITS_MODEL if "model" in given and "recipe" not in given else ()
    recipe = {name: value for name, value in recipe.items() if name not in foreign}
    if given.get("eval_fraction") and "eval_data" in given:
        raise UserError("--eval-fraction: --eval-data already holds the evaluation rows, give one of the two")
    if "eval_fraction" in given:
        recipe.pop("eval_data", None)
    values = defaults | recipe | given
    if values["base_dtype"] != "float32" and not values["lora_rank"]:
        raise UserError(f"--base-dtype {values['base_dtype']}: only frozen weights can be so coarse: give --lora-rank")
    if values["base_dtype"] != "float32" and values["dtype"] != "auto":
        raise UserError(f"--base-dtype {values['base_dtype']}: it is the arithmetic's dtype too, so leave --dtype out")
    if values.get("shuffle_labels") and values["group_prompts"]:
        raise UserError("--group-prompts: with --shuffle-labels no response stays the chosen one to group by")
    sources = {name: "flag" if name in given else "recipe" if name in recipe else "default" for name in values}
    if values["eval_data"] is not None:
        values["eval_fraction"], sources["eval_fraction"] = 0.0, sources["eval_data"]
    return Config(**values, sources=sources)


def length_limit(config: Config, positions: int) -> int:
    """`--max-length` as given; one that was not asked for is no longer than the model's positions."""
    return config.max_length if config.sources.get("max_length") == "flag" else min(config.max_length, positions)


def flag_of(name: str) -> str:
    """`batch_size` → `--batch-size`."""
    return "--" + name.replace("_", "-")


def to_dict(config: Config, task: str) -> dict[str, Any]:
    """The resolved values of `task`'s flags by field name, ready for JSON."""
    values = {item.name: getattr(config, item.name) for item in _flags(task)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def describe(config: Config, task: str) -> str:
    """One line for each flag of `task`: its name, its resolved value, and whether flag, recipe or default set it.

    Beside what a recipe set stands what trl, or peft, would have taken.
    """
    notes = {
        name: f" ({'peft' if name.startswith('lora_') else 'trl'}: {REFERENCE_DEFAULTS.get(name, _show(default))})"
        for name, default in _defaults(task).items()
        if config.sources[name] == "recipe" and name not in WITHOUT_REFERENCE
    }
    sources = {name: source + notes.get(name, "") for name, source in config.sources.items()}
    rows = [(flag_of(name), _show(value), sources[name]) for name, value in to_dict(config, task).items()]
    flag_width, value_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"{flag:{flag_width}}  {value:{value_width}}  {source}" for flag, value, source in rows)


def _flags(task: str) -> list[Field]:
    return [item for item in fields(Config) if task in item.metadata.get("tasks", ())]


def _defaults(task: str) -> dict[str, Any]:
    return {item.name: item.default for item in _flags(task)} | (RM_DEFAULTS if task == "rm" else {})


def _value(item: Field, text: str | bool) -> Any:
    kind = item.metadata["kind"]
    try:
        value = kind.read(text)
        if kind.allowed(value):
            return value
    except ValueError:
        pass  # not even a number: the same message
    raise UserError(f"{flag_of(item.name)}: expected {kind.expected}, got {text!r}")


def _about_unknown(text: str, task: str) -> str:
    if not text.startswith("-"):
        return f"unexpected argument {text!r}: every value follows its flag (see {SCRIPTS[task]} --help)"
    name = text.split("=")[0].replace("_", "-")
    known = [flag_of(item.name) for item in _flags(task)]
    other = "rm" if task == "sft" else "sft"
    if name not in known and name in [flag_of(item.name) for item in _flags(other)]:
        return f"unknown flag {text}: only {SCRIPTS[other]} has it"
    # Without the dashes, which make all flags alike.
    near = get_close_matches(name[2:], [flag[2:] for flag in known], n=1)
    near = TRL_NAMES.get(name, f"--{near[0]}" if near else None)
    return f"unknown flag {text}" + (f", did you mean {near}?" if near else f" (see {SCRIPTS[task]} --help)")


def _show(value: Any) -> str:
    if value is None:
        return "none"
    return ",".join(value) if isinstance(value, list | tuple) else str(value)
