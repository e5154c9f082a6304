"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): W stays as it is, B·A is trained beside it.

    y = W x + b + (alpha / rank) · B A dropout(x)          A (rank, in), B (out, rank)

B starts at zero, so a model that has just got its adapters computes what it did before. Adapters are written and read
as peft's two files: a small folder that turns the model it was trained on into the tuned one.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minift.errors import UserError
from minift.files import read_text, write_text, written_whole

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SCORE = "score.weight"  # a reward model's head, which is new and so trains beside the adapters

# peft has dozens of settings. These are read:
READ = ("peft_type", "use_rslora", "r", "lora_alpha", "lora_dropout", "target_modules")
# these say nothing about the function computed (the modules that were trained whole show in the weights):
WITHOUT_EFFECT = (
    "auto_mapping base_model_name_or_path inference_mode megatron_core modules_to_save peft_version qalora_group_size "
    "revision task_type"
).split()
# and neither do these values, though other ways to start would: they alter the frozen weights. All else must be off.
PLAIN = (["bias", "none"], *(["init_lora_weights", start] for start in (True, "gaussian", "orthogonal")))


class LoRALinear(nn.Module):
    """A frozen linear with an adapter beside it; the parts are named as peft names them.

    The linear keeps its dtype. The adapter is float32, or float64 beside a float64 linear: a half-precision weight
    would swallow the small updates that it is there to collect.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.base_layer = linear
        self.alpha = alpha
        self.scale = alpha / rank
        self.dropout = dropout
        # Drawn on the CPU, so that one seed gives one adapter whatever the device. ±in^−½ is Kaiming's range at a = √5.
        dtype = _at_least_float32(linear.weight)
        bound = linear.in_features**-0.5
        down = torch.empty(rank, linear.in_features, dtype=dtype).uniform_(-bound, bound)
        up = torch.zeros(linear.out_features, rank, dtype=dtype)
        self.lora_A = _linear(down.to(linear.weight.device))
        self.lora_B = _linear(up.to(linear.weight.device))

    def forward(self, hidden: Tensor) -> Tensor:
        """`(…, in)` → `(…, out)`, in the dtype of the frozen linear's result. Equal to peft's `lora.Linear`."""
        result = self.base_layer(hidden)
        dropped = F.dropout(hidden.to(self.lora_A.weight.dtype), self.dropout, self.training)
        update = self.lora_B(self.lora_A(dropped))  # (…, in) -> (…, rank) -> (…, out)
        return (result + self.scale * update).to(result.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A new, frozen linear of weight W + (alpha / rank) · B A, rounded once to W's dtype."""
        weight, bias = self.base_layer.weight, self.base_layer.bias
        update = self.scale * (self.lora_B.weight @ self.lora_A.weight)  # (out, rank) @ (rank, in) -> (out, in)
        linear = _linear((weight.to(update.dtype) + update).to(weight.dtype), bias)
        return linear.requires_grad_(False).train(self.training)


def add_lora(model: nn.Module, rank: int, alpha: float, dropout: float, targets: Sequence[str]) -> None:
    """Freeze the `decoder` of an `OPT` or `RewardModel` and put an adapter beside each linear that `targets` name.

    A target is a linear's last name: `q_proj`, `v_proj`, …. What trains afterwards is the adapters and a reward model's
    head, in float32 even if the decoder is stored in half precision. torch's global generator draws A. Raises
    ValueError for a rank below 1, a target that no linear has, or a model that has adapters already.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}, expected at least 1")
    linears = _targeted(model, targets)
    model.decoder.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(_at_least_float32(parameter))
    for name, linear in linears.items():
        model.set_submodule(name, LoRALinear(linear, rank, alpha, dropout).train(linear.training))


def merge(model: nn.Module) -> dict[str, LoRALinear]:
    """Replace every adapted linear by a plain one of the same function, and give back what was replaced, by name.

    Plain again, the model is as fast as it was without adapters and is saved as any other. The frozen weights
    themselves are not touched, so `unmerge` restores the model bit for bit.
    """
    adapters = _adapters(model)
    for name, adapter in adapters.items():
        model.set_submodule(name, adapter.merged())
    return adapters


def unmerge(model: nn.Module, adapters: dict[str, LoRALinear]) -> None:
    """Put back what `merge` gave, to go on training."""
    for name, adapter in adapters.items():
        model.set_submodule(name, adapter.train(model.training))


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """What LoRA trains, by name: `….lora_A.weight` (rank, in), `….lora_B.weight` (out, rank), a reward model's head."""
    return {name: weight for name, weight in model.state_dict().items() if ".lora_" in name or name == SCORE}


def num_adapter_parameters(model: nn.Module) -> int:
    """How many numbers the adapters hold, a reward model's head left out."""
    return sum(weight.numel() for name, weight in adapter_state(model).items() if name != SCORE)


def save_adapters(model: nn.Module, folder: str | Path, base: str | None = None, revision: str | None = None) -> None:
    """Write the adapters, and a reward model's head, as peft's `PeftModel.from_pretrained(model, folder)` reads them.

    peft's `model` is what was frozen here, as `OPTForCausalLM` or `OPTForSequenceClassification` with one label. `base`
    and `revision` say where it is (hub id or folder, commit) to readers who look there for it, such as peft's
    `AutoPeftModel`. Give the adapters a folder of their own: where transformers finds a model beside them, it adds them
    to that, merged or not. Each file is written whole or not at all. Raises ValueError for a model without adapters.
    """
    adapters = _adapters(model)
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
        "target_modules": sorted({_last(name) for name in adapters}),
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
        linears = _targeted(model, targets)
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
    try:
        settings: dict[str, Any] = json.loads(read_text(path, "a folder that peft wrote"))
        kind, is_rank_stabilised, rank, alpha, dropout, targets = (settings.get(name) for name in READ)
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: expected a JSON object with peft's settings ({error})") from None
    if kind != "LORA":
        raise UserError(f"{path}: peft_type is {kind!r}, expected 'LORA'")
    for name, value in settings.items():
        if value and name not in (*READ, *WITHOUT_EFFECT) and [name, value] not in PLAIN:
            raise UserError(f"{path}: {name} is {value!r}, expected plain LoRA: merge this adapter with peft instead")
    numbers = type(rank) is int and all(type(value) in (int, float) for value in (alpha, dropout))
    names = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    if not (numbers and names and rank > 0 and 0 <= alpha < 1e9 and 0 <= dropout < 1):  # NaN is outside as well
        found = ", ".join(f"{name} {settings.get(name)!r}" for name in READ[2:])
        raise UserError(f"{path}: expected a rank of at least 1, two numbers and a list of names, found {found}")
    # Rank-stabilised LoRA divides alpha by √rank instead (Kalajdzievski 2023, arXiv 2312.03732). For "all-linear" peft
    # lists whole paths; whether they are all the linears of that last name shows in the weights.
    alpha = alpha * math.sqrt(rank) if is_rank_stabilised else alpha
    return rank, alpha, dropout, sorted({_last(target) for target in targets})


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


def _targeted(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The decoder's linears that `targets` name; ValueError if one names none, or if there are adapters already."""
    if _adapters(model):
        raise ValueError("the model has adapters already")
    modules = model.decoder.named_modules(prefix="decoder")
    linears = {name: module for name, module in modules if isinstance(module, nn.Linear)}
    last_names = {_last(name) for name in linears}
    unknown = sorted(set(targets) - last_names)
    if unknown or not targets:
        what = f"no linear is named {', '.join(unknown)}" if unknown else "no targets given"
        raise ValueError(f"{what}; this model has {', '.join(sorted(last_names))}")
    return {name: linear for name, linear in linears.items() if _last(name) in targets}


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _peft_name(name: str) -> str:
    return f"base_model.model.{name}" if name == SCORE else f"base_model.model.model.{name}"


def _adapters(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def _at_least_float32(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear around this weight; on "meta" it draws no start values of its own, which would cost time and seed."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight, linear.bias = nn.Parameter(weight), bias
    return linear
