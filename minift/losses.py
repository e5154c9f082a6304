"""Losses as (sum, count), never means: cross entropy of the completions, and Bradley–Terry for preferences.

`plain_cross_entropy` is the definition, in two lines. `completion_cross_entropy` computes the same without ever holding
the logits of all tokens. torch's `F.linear_cross_entropy` does so too; here one can read how. The tests compare with
both.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minift.encode import IGNORE_INDEX

CHUNK = 1024  # supervised positions whose logits exist at the same time


def next_token_targets(labels: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens whose next token is supervised, `(M,)` indices, and the ids of these next tokens, `(M,)`.

    `labels (N,)` and `positions (N,)` are those of a `Batch`. Labels are shifted here and nowhere else: the vector of
    token i predicts token i + 1. If that one is of another row, it is not predicted: its position is 0 or, after a
    shared prefix, its label IGNORE_INDEX.

    >>> next_token_targets(torch.tensor([-100, -100, 11, -100, 12]), torch.tensor([0, 1, 2, 0, 1]))
    (tensor([1, 3]), tensor([11, 12]))
    """
    is_predicted = (labels[1:] != IGNORE_INDEX) & (positions[1:] != 0)
    wanted = is_predicted.nonzero().squeeze(1)  # (M,)
    return wanted, labels[wanted + 1]


def plain_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `completion_cross_entropy` returns, by the definition: for reading, and for tests."""
    return F.cross_entropy(F.linear(hidden, head), targets, reduction="sum"), torch.tensor(len(targets))


def completion_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed cross entropy of the supervised tokens and their number.

    `hidden (M, E)` are the last hidden states of the tokens before them and `targets (M,)` their ids, both by
    `next_token_targets`; `head (V, E)` is the model's output matrix. The logits exist for `CHUNK` tokens at a time. The
    sum is in float32 at least; equal to transformers' `ForCausalLMLoss`, summed instead of averaged.
    """
    # Gradients are always off inside an autograd function, so whether they are needed is passed to it.
    targets = targets.to(hidden.device, non_blocking=True)
    loss = _ChunkedCrossEntropy.apply(hidden, head, targets, torch.is_grad_enabled())
    return loss, torch.tensor(len(targets))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Σ cross entropy of `hidden (M, E) @ head.T` against `targets (M,)`, in chunks.

    The gradient of the logits is softmax − one-hot, so those of `hidden` and `head` are computed as soon as a chunk's
    logits are, and the chunk is discarded.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, keep_gradient: bool) -> Tensor:
        """Return the sum; save the gradients if they will be needed. The head is frozen beside adapters."""
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        grad_hidden = torch.zeros_like(hidden) if keep_gradient else None
        grad_head: Tensor | None = None
        dtype = F.linear(hidden[:0], head).dtype  # of products: autocast's, if it is on
        for start in range(0, hidden.shape[0], CHUNK):
            chunk = hidden[start : start + CHUNK]  # (M', E)
            target = targets[start : start + CHUNK, None]  # (M', 1)
            # The logits have no name, so their memory is free again before the head's gradient needs some.
            log_probabilities = F.linear(chunk, head).log_softmax(1, dtype=total.dtype)  # (M', V)
            total -= log_probabilities.gather(1, target).sum()
            if grad_hidden is not None:
                grad_logits = log_probabilities.exp_()
                grad_logits.scatter_add_(1, target, torch.full_like(grad_logits[:, :1], -1.0))  # softmax - one-hot
                grad_logits = grad_logits.to(dtype)
                grad_hidden[start : start + CHUNK] = grad_logits @ head
                if ctx.needs_input_grad[1]:
                    product = (grad_logits.T @ chunk).to(head.dtype)  # (V, E), often the only one
                    grad_head = product if grad_head is None else grad_head.add_(product)
        ctx.save_for_backward(grad_hidden, grad_head)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the saved gradients by the incoming one."""
        grads = ctx.saved_tensors
        # It is usually 1. Then multiplying would only copy, and the head's gradient is the largest of the model. On a
        # GPU the comparison would wait for the device.
        if grad_total.device.type != "cpu" or grad_total != 1:
            grads = [None if grad is None else grad * grad_total.to(grad.dtype) for grad in grads]
        return *grads, None, None  # targets and keep_gradient have none


def bradley_terry(
    chosen: Tensor, rejected: Tensor, margins: Tensor, weights: Tensor, center: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the summed negative log-likelihood of the preferences under Bradley–Terry, and the number of rankings.

    Bradley & Terry (1952): a response of strength s > 0 is preferred to another with probability s / (s + s'). With
    s = exp(reward) this is 1 / (1 + exp(r' - r)) = σ(r - r'), so the loss of one preference is -log σ(r - r') (Ouyang
    et al. 2022, arXiv 2203.02155, equation 1). A margin says by how much it was preferred: -log σ(r - r' - margin)
    (Touvron et al. 2023, arXiv 2307.09288, equation 2). Only differences of rewards count, so all rewards could drift
    together; `center` adds center · (r + r')², which keeps them near 0 (Eisenstein et al. 2023, arXiv 2312.09244).

    All four tensors are `(P,)`, one entry per pair. Raises ValueError if they are not: a `(P, 1)` among them would be
    broadcast to `(P, P)`. The weights of a ranking's pairs sum to 1, so every ranking counts the same. Computed in
    float32 at least; finite for any difference.
    """
    shapes = {tuple(values.shape) for values in (chosen, rejected, margins, weights)}
    if len(shapes) > 1 or chosen.dim() != 1:
        raise ValueError(f"shapes {sorted(shapes)}, expected one (pairs,) for rewards, margins and weights")
    dtype = torch.promote_types(chosen.dtype, torch.float32)
    chosen, rejected, margins, weights = (values.to(dtype) for values in (chosen, rejected, margins, weights))
    losses = -F.logsigmoid(chosen - rejected - margins) + center * (chosen + rejected).square()  # (P,)
    return (weights * losses).sum(), weights.sum().round().long()  # three weights of 1/3 may sum to just under 1


def preference_metrics(chosen: Tensor, rejected: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Return weighted sums over pairs `(P,)`: accuracy (a tie counts as wrong), both rewards, their difference.

    The difference is logged as `margin`; the margins of `bradley_terry` are given by the rows.
    """
    metrics = {
        "accuracy": chosen > rejected,
        "margin": chosen - rejected,
        "reward_chosen": chosen,
        "reward_rejected": rejected,
    }
    return {name: (weights * values.detach()).sum() for name, values in metrics.items()}
