"""Completion cross entropy against torch's own, row by row with all the logits there are."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minift import losses
from minift.losses import completion_cross_entropy

LENGTHS = (9, 1, 24, 6)
NUM_TOKENS, WIDTH, VOCABULARY = sum(LENGTHS), 5, 37


def problem(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden (N, E), head (V, E), labels (N,), positions (N,); half the labels masked, no row start's."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_TOKENS, WIDTH, generator=generator, dtype=torch.float64) * scale
    head = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCABULARY, (NUM_TOKENS,), generator=generator)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    masked = torch.rand(NUM_TOKENS, generator=generator) < 0.5
    labels[masked & (positions != 0)] = -100
    return hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(), labels, positions


def by_rows(hidden: Tensor, head: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    total, count = hidden.new_zeros(()), 0
    for row, targets in zip(hidden.split(LENGTHS), labels.split(LENGTHS), strict=True):
        logits = row[:-1] @ head.T  # (T - 1, V)
        total = total + F.cross_entropy(logits, targets[1:], reduction="sum")
        count += int((targets[1:] != -100).sum())
    return total, count


def value_and_gradients(hidden: Tensor, head: Tensor, total: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean = total / count
    return mean.detach(), *torch.autograd.grad(mean, (hidden, head))


def assert_close(found, expected, tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert ((one - other).abs().max() / other.abs().max()).item() < tolerance


@pytest.mark.parametrize("chunk", [1, 2, 7, 1024])
def test_value_and_gradients_in_any_chunks(monkeypatch, chunk):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    hidden, head, labels, positions = problem()
    total, count = completion_cross_entropy(hidden, head, labels, positions)
    expected_total, expected_count = by_rows(hidden, head, labels)
    assert count.item() == expected_count > 8
    found = value_and_gradients(hidden, head, total, count)
    assert_close(found, value_and_gradients(hidden, head, expected_total, expected_count), 1e-12)


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 4)
    hidden, head, labels, positions = problem()
    assert torch.autograd.gradcheck(
        lambda *inputs: completion_cross_entropy(*inputs, labels, positions)[0], (hidden, head)
    )


def test_a_row_s_start_is_never_predicted():
    """Whatever its label: the token before it in the list belongs to another document."""
    hidden, head, labels, positions = problem()
    starts = positions == 0
    assert (labels[starts] != -100).all()
    expected, count = completion_cross_entropy(hidden, head, labels, positions)
    for label in (-100, 3):
        changed = labels.masked_fill(starts, label)
        total, same_count = completion_cross_entropy(hidden, head, changed, positions)
        assert torch.equal(total, expected) and torch.equal(count, same_count)
    # Without the row starts the four documents would be one, and three more tokens predicted.
    _, joined = completion_cross_entropy(hidden, head, labels, torch.arange(NUM_TOKENS))
    assert joined == count + 3


@pytest.mark.parametrize("num_tokens", [NUM_TOKENS, 1])
def test_nothing_supervised(num_tokens):
    hidden, head, labels, positions = problem()
    hidden = hidden[:num_tokens].detach().requires_grad_()
    labels = torch.full_like(labels[:num_tokens], -100)
    total, count = completion_cross_entropy(hidden, head, labels, positions[:num_tokens])
    assert total.item() == 0 and count.item() == 0
    total.backward()
    assert not hidden.grad.any() and not head.grad.any()


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_a_frozen_side_costs_no_gradient(frozen):
    hidden, head, labels, positions = problem()
    expected = by_rows(hidden, head, labels)[0]
    tensors = {"hidden": hidden, "head": head}
    learned = tensors["head" if frozen == "hidden" else "hidden"]
    [gradient] = torch.autograd.grad(expected, learned)
    tensors[frozen].requires_grad_(False)
    completion_cross_entropy(hidden, head, labels, positions)[0].backward()
    assert tensors[frozen].grad is None
    assert_close([learned.grad], [gradient], 1e-12)


def test_without_gradients():
    hidden, head, labels, positions = problem()
    expected, _ = completion_cross_entropy(hidden, head, labels, positions)
    with torch.no_grad():
        total, _ = completion_cross_entropy(hidden, head, labels, positions)
    assert torch.equal(total, expected) and not total.requires_grad


def test_logits_of_any_size_stay_finite():
    hidden, head, labels, positions = problem(torch.float32, scale=1000.0)
    found = value_and_gradients(hidden, head, *completion_cross_entropy(hidden, head, labels, positions))
    expected = value_and_gradients(hidden, head, *by_rows(hidden, head, labels))
    assert expected[0] > 500
    assert_close(found, expected, 1e-5)


def test_bf16_autocast():
    hidden, head, labels, positions = problem(torch.float32)
    expected = value_and_gradients(hidden, head, *by_rows(hidden, head, labels))
    with torch.autocast("cpu", torch.bfloat16):
        total, count = completion_cross_entropy(hidden, head, labels, positions)
    assert total.dtype == torch.float32
    found = value_and_gradients(hidden, head, total, count)
    assert_close(found, expected, 0.03)
    # What a projection leaves under autocast is bf16 beside the fp32 embedding.
    with torch.autocast("cpu", torch.bfloat16):
        half, count = completion_cross_entropy(hidden.bfloat16(), head, labels, positions)
    assert torch.equal(half, total)
    assert_close(value_and_gradients(hidden, head, half, count), expected, 0.03)


def test_bf16_weights_add_up_in_fp32():
    hidden, head, labels, positions = problem(torch.bfloat16)
    total, count = completion_cross_entropy(hidden, head, labels, positions)
    assert total.dtype == torch.float32
    found = value_and_gradients(hidden, head, total, count)
    assert {gradient.dtype for gradient in found[1:]} == {torch.bfloat16}
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, head)]
    assert_close(found, value_and_gradients(*exact, *by_rows(*exact, labels)), 0.03)


def test_the_full_logits_never_exist(monkeypatch):
    """No tensor made on the way, forward or backward, is larger than a chunk's logits."""

    class LargestTensor(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            self.numel = max(self.numel, *sizes, 0)
            return result

    hidden, head, labels, positions = problem()
    chunk = 8
    monkeypatch.setattr(losses, "CHUNK", chunk)
    with LargestTensor() as seen:
        total, count = completion_cross_entropy(hidden, head, labels, positions)
        total.backward()
    assert count > 2 * chunk
    assert seen.numel == max(chunk * VOCABULARY, VOCABULARY * WIDTH, NUM_TOKENS * WIDTH) == chunk * VOCABULARY
