"""Adapters as peft's two files: a small folder that turns the model it was trained on into the tuned one."""

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minift.errors import UserError
from minift.files.text import read_json, write_json
from minift.files.weights import SCORE, read_state, write_tensors
from minift.lora import adapters_of, add_lora, last_name, targeted
from minift.model import OPT, RewardModel

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LAYOUTS = (ADAPTER_WEIGHTS, "adapter_model.bin")  # the first of these that a folder or repository holds
EXPECTED = "a folder that peft wrote"

# Of the dozens of settings in peft's adapter_config.json, these are read:
READ = ("peft_type", "use_rslora", "r", "lora_alpha", "lora_dropout", "target_modules")
# These do not change what the adapters compute. (The weights show which modules were trained as a whole.)
WITHOUT_EFFECT = ("auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "modules_to_save",
    "peft_version", "qalora_group_size", "revision", "task_type")  # fmt: skip
# Nor do these values. (Other initialisations change the frozen weights.) Any other setting must be off.
PLAIN = (["bias", "none"], *(["init_lora_weights", start] for start in (True, "gaussian", "orthogonal")))


def save_adapters(
    model: OPT | RewardModel, folder: str | Path, base: str | None = None, revision: str | None = None
) -> None:
    """Write the adapters, and a reward model's head, as peft's `PeftModel.from_pretrained(model, folder)` reads them.

    `base` (hub id or folder) and `revision` (commit) name the frozen model. In `folder` there must be no model, because
    transformers would add the adapters to it. Each write is atomic. Raises ValueError for a model without adapters.
    """
    adapters = adapters_of(model)
    if not adapters:
        raise ValueError("the model has no adapters to save")
    first = next(iter(adapters.values()))
    state = {_peft_name(name): weight.cpu().contiguous() for name, weight in adapter_state(model).items()}
    is_reward_model = isinstance(model, RewardModel)
    settings = {
        "peft_type": "LORA", "task_type": "SEQ_CLS" if is_reward_model else "CAUSAL_LM",
        "base_model_name_or_path": base, "revision": revision, "inference_mode": True,
        "r": first.lora_A.out_features, "lora_alpha": first.alpha, "lora_dropout": first.dropout,
        "target_modules": sorted({last_name(name) for name in adapters}),
        "modules_to_save": ["score"] if is_reward_model else None, "bias": "none",
    }  # fmt: skip
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / ADAPTER_WEIGHTS, state)
    write_json(folder / ADAPTER_CONFIG, settings)


def load_adapters(model: OPT | RewardModel, folder: str | Path, *, keep_reward_head: bool = False) -> None:
    """Add the adapters that `save_adapters` or peft's `save_pretrained` wrote, to train on or to `merge`.

    `model` must be the one they were trained on. With `keep_reward_head` a reward model keeps its own head if the
    adapters have none, like those of a language model. Raises UserError, leaving the model unchanged, if a file is
    absent or damaged, asks for anything but plain LoRA on linears, or has weights that do not fit (`read_state`).
    """
    folder = Path(folder)
    rank, alpha, dropout, targets = _read_settings(folder / ADAPTER_CONFIG)
    try:
        linears = targeted(model, targets, rank)
    except ValueError as error:
        raise UserError(f"{folder / ADAPTER_CONFIG}: {error}") from None
    score = {_peft_name(SCORE): model.score.weight.detach()} if isinstance(model, RewardModel) else {}
    shapes: dict[str, Sequence[int]] = {name: weight.shape for name, weight in score.items()}
    for name, linear in linears.items():
        shapes[_peft_name(f"{name}.lora_A.weight")] = (rank, linear.in_features)
        shapes[_peft_name(f"{name}.lora_B.weight")] = (linear.out_features, rank)
    # float64 holds every stored dtype exactly; `copy_` rounds to the adapters' own.
    state = read_state([adapter_weights(folder)], shapes, torch.float64, fresh=score if keep_reward_head else {})
    add_lora(model, rank, alpha, dropout, targets)
    for name, weight in adapter_state(model).items():
        weight.copy_(state[_peft_name(name)])


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained weights: `….lora_A.weight` (rank, in), `….lora_B.weight` (out, rank), a reward head."""
    return {name: weight for name, weight in model.state_dict().items() if ".lora_" in name or name == SCORE}


def pick_adapter_weights(names: Collection[str]) -> str:
    """Return which of a folder's or repository's files has the adapters' weights; without any, peft's name for it."""
    return next((layout for layout in LAYOUTS if layout in names), ADAPTER_WEIGHTS)


def adapter_weights(folder: Path) -> Path:
    """Return the file that holds the weights of a folder's adapters; UserError if there is none."""
    path = folder / pick_adapter_weights([path.name for path in folder.glob("*")])
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected {EXPECTED}")
    return path


def read_base(folder: str | Path) -> tuple[str, str | None]:
    """Return the name (hub id or folder) and revision of the model that a folder's adapters were trained on."""
    path = Path(folder, ADAPTER_CONFIG)
    settings = read_json(path, EXPECTED)
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not base or not isinstance(base, str) or not isinstance(revision, str | None):
        found = f"base_model_name_or_path is {base!r} and revision {revision!r}"
        raise UserError(f"{path}: {found}, expected the model they were trained on, and its revision or null")
    return base, revision or None


def _read_settings(path: Path) -> tuple[int, float, float, list[str]]:
    """Return rank, alpha, dropout and targets; raise UserError for a setting that would compute something else."""
    settings = read_json(path, EXPECTED)
    values: list[Any] = [settings.get(name) for name in READ]
    peft_type, is_rank_stabilised, rank, alpha, dropout, targets = values
    if peft_type != "LORA":
        raise UserError(f"{path}: peft_type is {peft_type!r}, expected 'LORA'")
    if not isinstance(is_rank_stabilised, bool | None):
        raise UserError(f"{path}: use_rslora is {is_rank_stabilised!r}, expected true or false")
    for name, value in settings.items():
        if value and name not in (*READ, *WITHOUT_EFFECT) and [name, value] not in PLAIN:
            raise UserError(f"{path}: {name} is {value!r}, expected plain LoRA: merge this adapter with peft instead")
    numbers = type(rank) is int and all(type(value) in (int, float) for value in (alpha, dropout))
    names = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    if not (numbers and names and rank > 0 and 0 <= alpha < 1e9 and 0 <= dropout < 1):  # NaN is outside as well
        found = ", ".join(f"{name} {settings.get(name)!r}" for name in READ[2:])
        raise UserError(f"{path}: expected a rank of at least 1, two numbers and a list of names, found {found}")
    # Rank-stabilised LoRA divides alpha by √rank instead (Kalajdzievski 2023, arXiv 2312.03732). For "all-linear" peft
    # lists whole paths; if those are not all the linears of that last name, the weights' names won't fit.
    alpha = alpha * math.sqrt(rank) if is_rank_stabilised else alpha
    return rank, alpha, dropout, sorted({last_name(target) for target in targets})


def _peft_name(name: str) -> str:
    return f"base_model.model.{name}" if name == SCORE else f"base_model.model.model.{name}"
