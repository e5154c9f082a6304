"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): W is frozen, and the product B·A is trained.

    y = W x + b + (alpha / rank) · B A dropout(x)          A (rank, in), B (out, rank)

B starts at zero, so adding adapters does not change what a model computes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minift.model import OPT, RewardModel


class LoRALinear(nn.Module):
    """A frozen linear layer and its adapter, with peft's names for the parts.

    The adapter is float32 even for a linear in half precision, which would lose its small updates.
    """

    def __init__(
        self, linear: nn.Linear, rank: int, alpha: float, dropout: float, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.base_layer = linear
        self.alpha = alpha
        self.scale = alpha / rank
        self.dropout = dropout
        # Drawn on the CPU, so that a seed gives the same values on every device, in the range of kaiming_uniform(a=√5).
        dtype = torch.promote_types(dtype or linear.weight.dtype, torch.float32)
        bound = linear.in_features**-0.5
        down = torch.empty(rank, linear.in_features, dtype=dtype).uniform_(-bound, bound)
        self.lora_A = _linear(down.to(linear.weight.device))
        self.lora_B = _linear(linear.weight.new_zeros(linear.out_features, rank, dtype=dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `(…, in)` to `(…, out)`, in the dtype of the frozen linear's result. Equal to peft's `lora.Linear`."""
        result = self.base_layer(hidden)
        dropped = F.dropout(hidden.to(self.lora_A.weight.dtype), self.dropout, self.training)
        update = self.lora_B(self.lora_A(dropped))  # (…, in) -> (…, rank) -> (…, out)
        return (result + self.scale * update).to(result.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return a new, frozen linear of weight W + (alpha / rank) · B A, rounded once to W's dtype."""
        weight, bias = self.base_layer.weight, self.base_layer.bias
        update = self.scale * (self.lora_B.weight @ self.lora_A.weight)  # (out, rank) @ (rank, in) -> (out, in)
        linear = _linear((weight.to(update.dtype) + update).to(weight.dtype), bias)
        return linear.requires_grad_(False).train(self.training)


def add_lora(
    model: OPT | RewardModel, rank: int, alpha: float, dropout: float, targets: Sequence[str],
    dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Freeze the model's `decoder` and add an adapter to each linear that `targets` name.

    A target is the last part of a linear's name: `q_proj`, `v_proj`, …. Adapters and a reward model's head are trained,
    in float32 at least. `dtype` is that of the frozen weights, if they are converted to it later, as --fsdp does.
    torch's global generator initialises A. Raises ValueError, its message starting with `rank` or `targets`, for a rank
    above a linear's width, a target that no linear has, and a model that already has adapters.
    """
    linears = targeted(model, targets, rank)
    model.decoder.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    for name, linear in linears.items():
        model.set_submodule(name, LoRALinear(linear, rank, alpha, dropout, dtype).train(linear.training))


def merge(model: nn.Module) -> dict[str, LoRALinear]:
    """Replace every adapted linear by a plain one that computes the same; return what was replaced, by name.

    The frozen weights are not changed, so `unmerge` restores the model bit for bit.
    """
    adapters = adapters_of(model)
    for name, adapter in adapters.items():
        model.set_submodule(name, adapter.merged())
    return adapters


def unmerge(model: nn.Module, adapters: dict[str, LoRALinear]) -> None:
    """Put back what `merge` returned, to continue training."""
    for name, adapter in adapters.items():
        model.set_submodule(name, adapter.train(model.training))


def targeted(model: OPT | RewardModel, targets: Sequence[str], rank: int) -> dict[str, nn.Linear]:
    """Return the decoder's linears that `targets` name, by their full names. Raises ValueError like `add_lora`."""
    if adapters_of(model):
        raise ValueError("targets: the model has adapters already")
    modules = model.decoder.named_modules(prefix="decoder")
    linears = {name: module for name, module in modules if isinstance(module, nn.Linear)}
    last_names = {last_name(name) for name in linears}
    unknown = sorted(set(targets) - last_names)
    if unknown or not targets:
        problem = f"no linear is named {', '.join(unknown)}" if unknown else "no targets given"
        raise ValueError(f"targets: {problem}; this model has {', '.join(sorted(last_names))}")
    chosen = {name: linear for name, linear in linears.items() if last_name(name) in targets}
    narrowest = min(min(linear.weight.shape) for linear in chosen.values())
    if not 1 <= rank <= narrowest:
        raise ValueError(f"rank is {rank}, expected 1 to {narrowest}, the width of the narrowest linear")
    return chosen


def last_name(name: str) -> str:
    """Return the last part of a module's name: `decoder.layers.0.fc1` → `fc1`."""
    return name.rpartition(".")[2]


def adapters_of(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the model's adapted linears by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def _linear(weight: Tensor, bias: nn.Parameter | None = None) -> nn.Linear:
    """Return a linear with this weight; "meta" skips its initialisation."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    linear.register_parameter("bias", bias)
    return linear
