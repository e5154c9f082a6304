"""Losses as (sum, count). The only place that shifts labels."""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
CHUNK = 1024  # supervised positions whose logits exist at a time


def completion_cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Next-token cross entropy over the supervised tokens of a packed batch: (sum of nats, number of tokens).

    `hidden (N, E)` are the model's last hidden states, `head (V, E)` its output matrix, `labels (N,)` int64 aligned
    with the tokens and unshifted, −100 where unsupervised, `positions (N,)` int64. The token at n + 1 is predicted from
    n, unless it starts a row (position 0): nothing before it in the list is its own past. Only the supervised positions
    meet the vocabulary, `CHUNK` of them at a time, so `(N, V)` logits never exist.
    Equal to the reference's `ForCausalLMLoss` summed instead of averaged.
    """
    supervised = (labels[1:] != IGNORED) & (positions[1:] != 0)  # (N - 1,)
    where = supervised.nonzero().squeeze(1)  # (M,)
    targets = labels[1:].index_select(0, where)
    keep_gradient = torch.is_grad_enabled()
    total = _ChunkedCrossEntropy.apply(hidden.index_select(0, where), head, targets, keep_gradient)
    return total, torch.tensor(len(where), device=hidden.device)


def bradley_terry(
    better: Tensor, worse: Tensor, margins: Tensor, weights: Tensor, center: float = 0.0
) -> tuple[Tensor, Tensor]:
    """How badly rewards explain which of two responses was preferred: (sum of nats, number of prompts).

    Bradley & Terry (1952): a response of strength s > 0 is preferred to another with probability s / (s + s'). With
    s = exp(reward) that is 1 / (1 + exp(r' - r)) = σ(r - r'), so a preference costs -log σ(r - r') nats (Ouyang et al.
    2022, arXiv 2203.02155, equation 1). A margin is how much better it was said to be: -log σ(r - r' - margin) asks for
    that much more (Touvron et al. 2023, arXiv 2307.09288, equation 2). Only differences count, so all rewards may drift
    together; `center` adds center · (r + r')², which holds them around 0 (Eisenstein et al. 2023, arXiv 2312.09244).

    Rewards, margins and weights are all `(P,)`, one of each for every pair; ValueError if they are not, since a
    `(P, 1)` among them would make `(P, P)` pairs without a word. A prompt's weights add up to 1, and a prompt with many
    pairs counts as much as one with a single pair. Computed in float32 at least; finite whatever the difference.
    """
    shapes = {tuple(values.shape) for values in (better, worse, margins, weights)}
    if len(shapes) > 1 or better.dim() != 1:
        raise ValueError(f"shapes {sorted(shapes)}, expected one (pairs,) for rewards, margins and weights")
    dtype = torch.promote_types(better.dtype, torch.float32)
    better, worse, margins, weights = (values.to(dtype) for values in (better, worse, margins, weights))
    nats = -F.logsigmoid(better - worse - margins) + center * (better + worse).square()  # (P,)
    return (weights * nats).sum(), weights.sum().round().long()  # three weights of 1/3 may fall just short of 1


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Σ cross entropy of `hidden (M, E) @ head.T` against `targets (M,)`, in chunks.

    The gradient with respect to the logits, softmax − one-hot, is at hand as soon as a chunk's logits are, so both
    matrix gradients are taken there and then, and the chunk is forgotten.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, keep_gradient: bool) -> Tensor:
        """The sum `()`, in float32 at least; keeps the two gradients if they will be asked for."""
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        want_hidden, want_head = (keep_gradient and wanted for wanted in ctx.needs_input_grad[:2])
        grad_hidden = torch.zeros_like(hidden) if want_hidden else None
        grad_head = torch.zeros_like(head) if want_head else None
        for start in range(0, hidden.shape[0], CHUNK):
            chunk = hidden[start : start + CHUNK]  # (M', E)
            target = targets[start : start + CHUNK, None]  # (M', 1)
            logits = F.linear(chunk, head)  # (M', V)
            log_probabilities = logits.to(total.dtype).log_softmax(1)
            total -= log_probabilities.gather(1, target).sum()
            if want_hidden or want_head:
                slope = log_probabilities.exp_()
                slope.scatter_add_(1, target, torch.full_like(slope[:, :1], -1.0))  # softmax - one-hot
            if want_hidden:
                grad_hidden[start : start + CHUNK] = slope.to(head.dtype) @ head
            if want_head:
                grad_head += (slope.to(chunk.dtype).T @ chunk).to(head.dtype)
        ctx.save_for_backward(grad_hidden, grad_head)
        return total

    @staticmethod
    def backward(ctx, grad_total: Tensor):
        """The kept gradients, scaled by the one that arrives."""
        grad_hidden, grad_head = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad_total.to(grad_hidden.dtype),
            None if grad_head is None else grad_head * grad_total.to(grad_head.dtype),
            None,
            None,
        )
