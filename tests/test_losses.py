"""Completion cross entropy against its definition, and against torch's own, row by row.

Two oracles, since one of them shares the shift of the labels with what it checks: `plain_cross_entropy` has all logits
at once, and torch's `linear_cross_entropy` is given labels that are shifted here.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minift import losses
from minift.encode import IGNORE_INDEX
from minift.losses import completion_cross_entropy, next_token_targets, plain_cross_entropy

LENGTHS = (9, 1, 24, 6)
NUM_TOKENS, WIDTH, VOCABULARY = sum(LENGTHS), 5, 37
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])


def problem(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden (N, E), head (V, E), labels (N,), positions (N,); half the labels masked, but no row's first."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_TOKENS, WIDTH, generator=generator, dtype=torch.float64) * scale
    head = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCABULARY, (NUM_TOKENS,), generator=generator)
    masked = torch.rand(NUM_TOKENS, generator=generator) < 0.5
    labels[masked & (POSITIONS != 0)] = IGNORE_INDEX
    return hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(), labels, POSITIONS


def by_chunks(hidden: Tensor, head: Tensor, labels: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    wanted, targets = next_token_targets(labels, positions)
    return completion_cross_entropy(hidden[wanted], head, targets)


def by_definition(hidden: Tensor, head: Tensor, labels: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    wanted, targets = next_token_targets(labels, positions)
    return plain_cross_entropy(hidden[wanted], head, targets)


def torch_cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    total, count = hidden.new_zeros(()), 0
    for row, targets in zip(hidden.split(LENGTHS), labels.split(LENGTHS), strict=True):
        if len(row) > 1:
            options = torch.nn.LinearCrossEntropyOptions()  # not computed from all logits, but in chunks
            total = total + F.linear_cross_entropy(row[:-1], head, targets[1:], reduction="sum", options=options)
        count += (targets[1:] != IGNORE_INDEX).sum()
    return total, count


def value_and_gradients(loss, hidden: Tensor, head: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total, count = loss(hidden, head, *rest)
    mean = total / count
    return mean.detach(), *torch.autograd.grad(mean, (hidden, head))


def assert_close(found, expected, tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert ((one - other).abs().max() / other.abs().max()).item() < tolerance


@pytest.mark.parametrize("oracle", [by_definition, torch_cross_entropy])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("chunk", [1, 2, 7, 1024])
def test_value_and_gradients_in_any_chunks(monkeypatch, oracle, dtype, tolerance, chunk):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    inputs = problem(dtype)
    total, count = by_chunks(*inputs)
    assert total.dtype == dtype and count == oracle(*inputs)[1] > 8
    expected = value_and_gradients(oracle, *inputs)
    assert_close(value_and_gradients(by_chunks, *inputs), expected, tolerance)


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 2)
    hidden, head, *rest = problem()
    rest = [values[:10] for values in rest]
    assert torch.autograd.gradcheck(lambda *inputs: by_chunks(*inputs, *rest)[0], (hidden[:10], head))


def test_a_second_derivative_is_refused():
    """The saved gradients are constants, so it would be wrong."""
    hidden, head, *rest = problem()
    total, _ = by_chunks(hidden, head, *rest)
    (gradient,) = torch.autograd.grad(total.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_the_start_of_a_row_is_never_predicted():
    """Its label does not matter: the token before it in the list belongs to another document."""
    hidden, head, labels, positions = problem()
    starts = positions == 0
    assert (labels[starts] != IGNORE_INDEX).all()
    expected, count = by_chunks(hidden, head, labels, positions)
    for label in (IGNORE_INDEX, 3):
        changed = labels.masked_fill(starts, label)
        total, same_count = by_chunks(hidden, head, changed, positions)
        assert torch.equal(total, expected) and torch.equal(count, same_count)
    # Without the row starts the four documents would be one, and three more tokens predicted.
    _, joined = by_chunks(hidden, head, labels, torch.arange(NUM_TOKENS))
    assert joined == count + 3


@pytest.mark.parametrize("num_tokens", [NUM_TOKENS, 1])
def test_nothing_supervised(num_tokens):
    hidden, head, labels, positions = problem()
    hidden = hidden[:num_tokens].detach().requires_grad_()
    labels = torch.full_like(labels[:num_tokens], IGNORE_INDEX)
    total, count = by_chunks(hidden, head, labels, positions[:num_tokens])
    assert total.item() == 0 and count.item() == 0
    total.backward()
    assert not hidden.grad.any() and head.grad is None


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_a_frozen_side_costs_no_gradient(frozen):
    hidden, head, labels, positions = problem()
    tensors = {"hidden": hidden, "head": head}
    learned = tensors["head" if frozen == "hidden" else "hidden"]
    [gradient] = torch.autograd.grad(by_definition(hidden, head, labels, positions)[0], learned)
    tensors[frozen].requires_grad_(False)
    by_chunks(hidden, head, labels, positions)[0].backward()
    assert tensors[frozen].grad is None
    assert_close([learned.grad], [gradient], 1e-12)


def test_without_gradients():
    inputs = problem()
    expected, _ = by_chunks(*inputs)
    with torch.no_grad():
        total, _ = by_chunks(*inputs)
    assert torch.equal(total, expected) and not total.requires_grad


def test_logits_of_any_size_stay_finite():
    inputs = problem(torch.float32, scale=1000.0)
    expected = value_and_gradients(by_definition, *inputs)
    assert expected[0] > 500
    assert_close(value_and_gradients(by_chunks, *inputs), expected, 1e-5)


def test_bf16_autocast():
    hidden, *rest = problem(torch.float32)
    expected = value_and_gradients(by_definition, hidden, *rest)

    def under_autocast(hidden: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return by_chunks(hidden, *rest)

    assert under_autocast(hidden, *rest)[0].dtype == torch.float32
    found = value_and_gradients(under_autocast, hidden, *rest)
    assert_close(found, expected, 0.03)
    # Under autocast a projection's result is bf16, next to the fp32 embedding.
    half = value_and_gradients(lambda hidden, *rest: under_autocast(hidden.bfloat16(), *rest), hidden, *rest)
    assert torch.equal(half[0], found[0])
    assert_close(half, expected, 0.03)


def test_bf16_weights_add_up_in_fp32():
    hidden, head, *rest = problem(torch.bfloat16)
    assert by_chunks(hidden, head, *rest)[0].dtype == torch.float32
    found = value_and_gradients(by_chunks, hidden, head, *rest)
    assert {gradient.dtype for gradient in found[1:]} == {torch.bfloat16}
    exact = (tensor.detach().double().requires_grad_() for tensor in (hidden, head))
    assert_close(found, value_and_gradients(by_definition, *exact, *rest), 0.03)


def test_the_full_logits_never_exist(monkeypatch):
    """No tensor made on the way, forward or backward, is larger than a chunk's logits."""

    class LargestTensor(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            self.numel = max(self.numel, *sizes, 0)
            return result

    inputs = problem()
    chunk = 8
    monkeypatch.setattr(losses, "CHUNK", chunk)
    with LargestTensor() as seen:
        total, count = by_chunks(*inputs)
        total.backward()
    assert count > 2 * chunk
    assert seen.numel == max(chunk * VOCABULARY, VOCABULARY * WIDTH, NUM_TOKENS * WIDTH) == chunk * VOCABULARY
