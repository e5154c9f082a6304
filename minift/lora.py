"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): W stays as it is, B·A is trained beside it.

    y = W x + b + (alpha / rank) · B A dropout(x)          A (rank, in), B (out, rank)

B starts at zero, so a model that has just got its adapters computes what it did before.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCORE = "score.weight"  # a reward model's head, which is new and so trains beside the adapters


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
    ValueError, `rank` or `targets` first, for a rank above a linear's width and for a target that no linear has; and
    for a model that has adapters already.
    """
    linears = targeted(model, targets, rank)
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
    adapters = adapters_of(model)
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


def targeted(model: nn.Module, targets: Sequence[str], rank: int) -> dict[str, nn.Linear]:
    """The decoder's linears that `targets` name, by their whole names. ValueError as `add_lora`."""
    if adapters_of(model):
        raise ValueError("the model has adapters already")
    modules = model.decoder.named_modules(prefix="decoder")
    linears = {name: module for name, module in modules if isinstance(module, nn.Linear)}
    last_names = {last_name(name) for name in linears}
    unknown = sorted(set(targets) - last_names)
    if unknown or not targets:
        what = f"no linear is named {', '.join(unknown)}" if unknown else "no targets given"
        raise ValueError(f"targets: {what}; this model has {', '.join(sorted(last_names))}")
    chosen = {name: linear for name, linear in linears.items() if last_name(name) in targets}
    narrowest = min(min(linear.weight.shape) for linear in chosen.values())
    if not 1 <= rank <= narrowest:
        raise ValueError(f"rank is {rank}, expected 1 to {narrowest}, the width of the narrowest linear")
    return chosen


def last_name(name: str) -> str:
    return name.rpartition(".")[2]


def adapters_of(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def _at_least_float32(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear around this weight; on "meta" it draws no start values of its own, which would cost time and seed."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight, linear.bias = nn.Parameter(weight), bias
    return linear
