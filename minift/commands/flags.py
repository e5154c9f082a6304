"""Flags of both scripts → `Config`. A value comes from the first of: the flag, the recipe, the default."""

import argparse
import reprlib
from dataclasses import Field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from minift.commands.cli import CommandParser
from minift.commands.recipes import DROPPED_BY, RECIPES
from minift.config import GROUPS, MOST, SWITCH, TEXT, Config, defaults_of, flag_of, options_of
from minift.errors import UserError
from minift.run import sandbox
from minift.run.ranks import NUM_RESTARTS, WORLD_SIZE
from minift.run.resume import is_unfinished

PROJECT = Path(__file__).resolve().parents[2]
SCRIPTS = {"sft": "train_sft.py", "rm": "train_rm.py"}

EXAMPLES = {
    "sft": (
        "--max-steps 200 --out runs/short",
        "--model facebook/opt-125m --data rows.jsonl --epochs 1 --out runs/mine",
        "--model runs/sft --data rows.csv --lora-rank 16 --lora-alpha 32 --lr 1e-4",
    ),
    "rm": (
        "--max-steps 200 --out runs/short",
        "--model facebook/opt-125m --data pairs.jsonl --epochs 1 --out runs/judge",
        "--model runs/sft --data pairs.csv --eval-data heldout.csv --lm-weight 0.1",
    ),
}

# The names under which people coming from trl know a flag, where they are not spelled alike.
TRL_NAMES = {
    "--learning-rate": "--lr", "--lr-scheduler-type": "--schedule", "--num-train-epochs": "--epochs",
    "--per-device-train-batch-size": "--batch-size", "--gradient-accumulation-steps": "--grad-accum",
    "--model-name-or-path": "--model", "--dataset-name": "--data", "--output-dir": "--out",
    "--resume-from-checkpoint": "--resume", "--bf16": "--dtype",
    "--logging-steps": "--log-every", "--eval-steps": "--eval-every", "--save-steps": "--save-every",
    "--lora-r": "--lora-rank", "--lora-target-modules": "--lora-targets",
    "--center-rewards-coefficient": "--center-rewards",
}  # fmt: skip


def parse(script: str, argv: list[str] | None = None) -> Config:
    """Resolve the values of a run of `script` (sft or rm) from its flags; `argv` is the command line's if None.

    Raises UserError for an unknown flag, a flag of the other script, a wrong value, and values that contradict.
    """
    texts, unknown = _parser(script).parse_known_args(argv)
    if unknown:
        raise UserError(_explain_unknown(unknown[0], script))
    options = {option.name: option for option in options_of(script)}
    given = {name: _read(options[name], text) for name, text in vars(texts).items()}
    config = _resolve(script, given)
    half = f"--base-dtype {config.base_dtype}" if config.base_dtype != "float32" else ""
    for is_wrong, problem in (
        (given.get("eval_fraction") and "eval_data" in given,
         "--eval-fraction: --eval-data already holds the evaluation rows, give one of the two"),
        (half and not config.lora_rank,
         f"{half}: only frozen weights can be in half precision: give --lora-rank"),
        (half and config.dtype != "auto",
         f"{half}: it also sets the dtype of the forward pass: leave --dtype out"),
        (config.shuffle_labels and config.group_prompts,
         "--group-prompts: pairs are grouped by their chosen response, and --shuffle-labels swaps that: leave one out"),
        (config.fsdp and WORLD_SIZE == 1,
         "--fsdp: there is only one process: start two or more by torchrun --nproc-per-node=2 " + SCRIPTS[script]),
        (config.fsdp and config.compile,
         "--compile: does not work with the sharded weights of --fsdp: leave one of the two out"),
    ):  # fmt: skip
        if is_wrong:
            raise UserError(problem)
    if NUM_RESTARTS > 0 and is_unfinished(Path(config.out)):
        config = replace(config, resume=True)
    if config.run_checks:
        sandbox.check_available()
    return config


def _resolve(script: str, given: dict[str, Any]) -> Config:
    """Fill in the values that the given flags leave to a recipe or to the defaults."""
    # A recipe never leaks into a run with the user's own model or data, unless it is named.
    own = "model" in given or "data" in given
    name = given.get("recipe", None if own else "tiny")
    recipe = {} if name is None else {"recipe": name, **RECIPES[script][name]}
    dropped = {option for flag in DROPPED_BY.keys() & given.keys() for option in DROPPED_BY[flag]}
    dropped |= set() if sandbox.IS_AVAILABLE else {"run_checks"}  # as a flag it is refused
    recipe = {option: value for option, value in recipe.items() if option not in dropped}

    values = defaults_of(script) | recipe | given
    for name in {"model", "data", "eval_data"} - given.keys():
        if str(values[name]).startswith("data/"):  # in the project's folder, which need not be the current one
            values[name] = in_project(values[name])
    origins = {option: "flag" if option in given else "recipe" if option in recipe else "default" for option in values}
    if values["eval_data"] is not None:
        values["eval_fraction"], origins["eval_fraction"] = 0.0, origins["eval_data"]
    return Config(**values, origins=origins)


def in_project(name: str) -> str:
    """Return the path of a file in the project's folder: `name` if this is the current folder, else the whole path."""
    path = PROJECT / name
    return name if path.resolve() == Path(name).resolve() else str(path)


def _parser(script: str) -> CommandParser:
    # Values are read as text here and checked by `_read`, so that every message has the same form.
    about = f"`make {script}` runs this script without flags, with the values of the recipe tiny."
    parser = CommandParser(
        SCRIPTS[script], examples=EXAMPLES[script], description=about, argument_default=argparse.SUPPRESS
    )
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for option in options_of(script):
        domain = option.metadata["domain"]
        metavar = option.name.split("_")[-1].upper()
        settings: dict[str, Any] = {"action": "store_true"} if domain is SWITCH else {"metavar": metavar}
        groups[option.metadata["group"]].add_argument(flag_of(option.name), help=_help(option, script), **settings)
    return parser


def _help(option: Field, script: str) -> str:
    """Return an option's meaning, the values allowed, its default, and its value in `make sft` or `make rm`."""
    domain, default = option.metadata["domain"], defaults_of(script)[option.name]
    notes = [domain.expected.removesuffix(f" and at most {MOST}")] if domain not in (SWITCH, TEXT) else []
    notes += [f"default {as_text(default)}"] if default is not None and domain is not SWITCH else []
    tiny = getattr(_resolve(script, {}), option.name)
    notes += [f"`make {script}`: {'on' if tiny is True else as_text(tiny)}"] if tiny != default else []
    text = option.metadata["meaning"] + (f" ({'; '.join(notes)})" if notes else "")
    return text.replace("%", "%%")


def _read(option: Field, text: str | bool) -> Any:
    domain = option.metadata["domain"]
    try:
        value = domain.read(text)
        if domain.allows(value):
            return value
    except ValueError:
        pass  # not even a number: the same message
    raise UserError(f"{flag_of(option.name)}: expected {domain.expected}, got {reprlib.repr(text)}")


def _explain_unknown(text: str, script: str) -> str:
    if not text.startswith("-"):
        return f"unexpected argument {text!r}: every value follows its flag (see {SCRIPTS[script]} --help)"
    name = text.split("=")[0].replace("_", "-")
    known = [flag_of(option.name) for option in options_of(script)]
    other = "rm" if script == "sft" else "sft"
    if name not in known and name in [flag_of(option.name) for option in options_of(other)]:
        return f"unknown flag {text}: only {SCRIPTS[other]} has it"
    # Compared without the dashes, which all flags share.
    near = get_close_matches(name[2:], [flag[2:] for flag in known], n=1)
    guess = TRL_NAMES.get(name, f"--{near[0]}" if near else None)
    return f"unknown flag {text}" + (f", did you mean {guess}?" if guess else f" (see {SCRIPTS[script]} --help)")


def as_text(value: Any) -> str:
    """Return an option's value as text."""
    if value is None:
        return "none"
    return ",".join(value) if isinstance(value, list | tuple) else str(value)
