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


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Σ cross entropy of `hidden (M, E) @ head.T` against `targets (M,)`, in chunks.

    The gradient with respect to the logits, softmax − one-hot, is at hand as soon as a chunk's logits are, so both
    matrix gradients are taken there and then, and the chunk is forgotten.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, keep_gradient: bool) -> Tensor:
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
        grad_hidden, grad_head = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad_total.to(grad_hidden.dtype),
            None if grad_head is None else grad_head * grad_total.to(grad_head.dtype),
            None,
            None,
        )
