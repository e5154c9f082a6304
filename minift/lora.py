"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): W stays as it is, B·A is trained beside it.

    y = W x + b + (alpha / rank) · B A dropout(x)          A (rank, in), B (out, rank)

B starts at zero, so a model that has just got its adapters computes what it did before.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRALinear(nn.Module):
    """A frozen linear with an adapter beside it; the parts are named as peft names them.

    The linear keeps its dtype. The adapter is float32, or float64 beside a float64 linear: a half-precision weight
    would swallow the small updates that it is there to collect.
    """

    def __init__(
        self, linear: nn.Linear, rank: int, alpha: float, dropout: float, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.base_layer = linear
        self.scale = alpha / rank
        self.dropout = dropout
        # Drawn on the CPU, so that one seed gives one adapter whatever the device. ±in^−½ is Kaiming's range at a = √5.
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        bound = linear.in_features**-0.5
        down = torch.empty(rank, linear.in_features, dtype=dtype).uniform_(-bound, bound, generator=generator)
        up = torch.zeros(linear.out_features, rank, dtype=dtype)
        self.lora_A = _linear(down.to(linear.weight.device))
        self.lora_B = _linear(up.to(linear.weight.device))

    def forward(self, hidden: Tensor) -> Tensor:
        """`(…, in)` → `(…, out)`, in the dtype of the frozen linear's result."""
        result = self.base_layer(hidden)
        dropped = F.dropout(hidden.to(self.lora_A.weight.dtype), self.dropout, self.training)
        update = self.lora_B(self.lora_A(dropped))  # (…, in) -> (…, rank) -> (…, out)
        return result + (self.scale * update).to(result.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A new, frozen linear of weight W + (alpha / rank) · B A, rounded once to W's dtype."""
        weight, bias = self.base_layer.weight, self.base_layer.bias
        update = self.scale * (self.lora_B.weight @ self.lora_A.weight)  # (out, rank) @ (rank, in) -> (out, in)
        linear = _linear((weight.to(update.dtype) + update).to(weight.dtype), bias)
        return linear.requires_grad_(False).train(self.training)


def add_lora(
    model: nn.Module,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str],
    generator: torch.Generator | None = None,
) -> None:
    """Freeze `model` and put an adapter beside every linear whose last name is in `targets` (`q_proj`, `v_proj`, …).

    Afterwards the adapters are all that has `requires_grad`. `generator`, a CPU one, draws A; without it torch's global
    one does. Raises ValueError for a rank below 1, a target that no linear has, or a model that has adapters already.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}, expected at least 1")
    if _adapters(model):
        raise ValueError("the model has adapters already")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    last_names = {name.split(".")[-1] for name in linears}
    unknown = sorted(set(targets) - last_names)
    if unknown or not targets:
        what = f"no linear is named {', '.join(unknown)}" if unknown else "no targets given"
        raise ValueError(f"{what}; this model has {', '.join(sorted(last_names))}")
    model.requires_grad_(False)
    for name, linear in linears.items():
        if name.split(".")[-1] in targets:
            adapter = LoRALinear(linear, rank, alpha, dropout, generator)
            model.set_submodule(name, adapter.train(linear.training))


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
    """The adapters' weights by name, `….q_proj.lora_A.weight` (rank, in) and `….q_proj.lora_B.weight` (out, rank)."""
    return {
        f"{name}.{part}.weight": getattr(adapter, part).weight.detach()
        for name, adapter in _adapters(model).items()
        for part in ("lora_A", "lora_B")
    }


def num_adapter_parameters(model: nn.Module) -> int:
    return sum(weight.numel() for weight in adapter_state(model).values())


def _adapters(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear around this weight; on "meta" it draws no start values of its own, which would cost time and seed."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight, linear.bias = nn.Parameter(weight), bias
    return linear
