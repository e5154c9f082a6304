"""Adapters as peft's two files: a small folder that turns the model it was trained on into the tuned one."""

import json
import math
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minift.errors import UserError
from minift.files import read_json, write_text, written_whole
from minift.lora import SCORE, adapter_state, adapters_of, add_lora, last_name, targeted

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# peft has dozens of settings. These are read:
READ = ("peft_type", "use_rslora", "r", "lora_alpha", "lora_dropout", "target_modules")
# these say nothing about the function computed (the modules that were trained whole show in the weights):
WITHOUT_EFFECT = (
    "auto_mapping base_model_name_or_path inference_mode megatron_core modules_to_save peft_version qalora_group_size "
    "revision task_type"
).split()
# and neither do these values, though other ways to start would: they alter the frozen weights. All else must be off.
PLAIN = (["bias", "none"], *(["init_lora_weights", start] for start in (True, "gaussian", "orthogonal")))


def save_adapters(model: nn.Module, folder: str | Path, base: str | None = None, revision: str | None = None) -> None:
    """Write the adapters, and a reward model's head, as peft's `PeftModel.from_pretrained(model, folder)` reads them.

    peft's `model` is what was frozen here, as `OPTForCausalLM` or `OPTForSequenceClassification` with one label. `base`
    and `revision` say where it is (hub id or folder, commit) to readers who look there for it, such as peft's
    `AutoPeftModel`. Give the adapters a folder of their own: where transformers finds a model beside them, it adds them
    to that, merged or not. Each file is written whole or not at all. Raises ValueError for a model without adapters.
    """
    adapters = adapters_of(model)
    if not adapters:
        raise ValueError("the model has no adapters to save")
    first = next(iter(adapters.values()))
    state = {_peft_name(name): weight.cpu().contiguous() for name, weight in adapter_state(model).items()}
    is_reward_model = _peft_name(SCORE) in state
    settings = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if is_reward_model else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": first.lora_A.out_features,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "target_modules": sorted({last_name(name) for name in adapters}),
        "modules_to_save": ["score"] if is_reward_model else None,
        "bias": "none",
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / WEIGHTS) as path:
        save_file(state, path, metadata={"format": "pt"})
    write_text(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")


def load_adapters(model: nn.Module, folder: str | Path) -> None:
    """Give `model` the adapters that `save_adapters` or peft's `save_pretrained` wrote, to train on, or to `merge`.

    `model` is the one they were trained on, a `RewardModel` if a head is among them. Raises UserError, leaving the
    model as it was, when a file is absent or damaged, when it asks for something other than plain LoRA on linears, and
    when a weight is missing, left over, of another shape, NaN or infinite.
    """
    folder = Path(folder)
    rank, alpha, dropout, targets = _read_settings(folder / SETTINGS)
    try:
        linears = targeted(model, targets, rank)
    except ValueError as error:
        raise UserError(f"{folder / SETTINGS}: {error}") from None
    expected = {SCORE: tuple(model.score.weight.shape)} if hasattr(model, "score") else {}
    for name, linear in linears.items():
        expected[f"{name}.lora_A.weight"] = (rank, linear.in_features)
        expected[f"{name}.lora_B.weight"] = (linear.out_features, rank)
    loaded = _read_weights(folder / WEIGHTS, expected)
    add_lora(model, rank, alpha, dropout, targets)
    for name, weight in adapter_state(model).items():
        weight.copy_(loaded[name])


def _read_settings(path: Path) -> tuple[int, float, float, list[str]]:
    """Rank, alpha, dropout and targets; UserError for a setting that would make the model another function."""
    settings = read_json(path, "a folder that peft wrote")
    kind, is_rank_stabilised, rank, alpha, dropout, targets = (settings.get(name) for name in READ)
    if kind != "LORA":
        raise UserError(f"{path}: peft_type is {kind!r}, expected 'LORA'")
    for name, value in settings.items():
        if value and name not in (*READ, *WITHOUT_EFFECT) and [name, value] not in PLAIN:
            raise UserError(f"{path}: {name} is {value!r}, expected plain LoRA: merge this adapter with peft instead")
    if not isinstance(is_rank_stabilised, bool | None):
        raise UserError(f"{path}: use_rslora is {is_rank_stabilised!r}, expected true or false")
    numbers = type(rank) is int and all(type(value) in (int, float) for value in (alpha, dropout))
    names = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    if not (numbers and names and rank > 0 and 0 <= alpha < 1e9 and 0 <= dropout < 1):  # NaN is outside as well
        found = ", ".join(f"{name} {settings.get(name)!r}" for name in READ[2:])
        raise UserError(f"{path}: expected a rank of at least 1, two numbers and a list of names, found {found}")
    # Rank-stabilised LoRA divides alpha by √rank instead (Kalajdzievski 2023, arXiv 2312.03732). For "all-linear" peft
    # lists whole paths; whether they are all the linears of that last name shows in the weights.
    alpha = alpha * math.sqrt(rank) if is_rank_stabilised else alpha
    return rank, alpha, dropout, sorted({last_name(target) for target in targets})


def _read_weights(path: Path, expected: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The weights of the expected names and shapes; the file's header is compared with them before any is read."""
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected a folder that peft wrote")
    shapes = {_peft_name(name): shape for name, shape in expected.items()}
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            for what, names in (
                ("missing", shapes.keys() - found.keys()),
                ("unexpected", found.keys() - shapes.keys()),
                ("of another shape", {name for name in shapes if found.get(name) != shapes[name]}),
            ):
                if names:
                    problem = f"{len(names)} {what}, first {min(names)}"
                    raise UserError(f"{path}: weights do not fit the model, expected this model's adapters: {problem}")
            weights = {name: file.get_tensor(_peft_name(name)) for name in expected}
    except SafetensorError as error:
        raise UserError(f"{path}: unreadable, truncated or damaged: copy it again ({error})") from None
    for name, weight in weights.items():
        if not weight.is_floating_point() or not weight.double().isfinite().all():
            raise UserError(f"{path}: {name} holds NaN, infinite or whole numbers, expected trained weights")
    return weights


def _peft_name(name: str) -> str:
    return f"base_model.model.{name}" if name == SCORE else f"base_model.model.model.{name}"
