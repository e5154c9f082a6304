"""Learning-rate schedules and weight-decay groups against transformers' own."""

import math

import pytest
import torch
import transformers

from minift.optim import adamw, learning_rate, total_norm
from tests.reference import POST_LN, PRE_LN, own_name, twins


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (3, 10), (1, 1), (10, 10), (12, 10)])
def test_learning_rate_is_the_reference_schedulers(schedule, warmup, total):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    reference = transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        ours = learning_rate(step, peak=2e-3, schedule=schedule, warmup_steps=warmup, total_steps=total)
        assert ours == pytest.approx(reference.get_last_lr()[0], rel=1e-12, abs=1e-18)
        optimizer.step()
        reference.step()


def test_learning_rate_by_hand():
    def rates(schedule, warmup):
        return [learning_rate(s, peak=1.0, schedule=schedule, warmup_steps=warmup, total_steps=4) for s in range(4)]

    assert rates("linear", 0) == [1.0, 0.75, 0.5, 0.25]
    assert rates("linear", 2) == [0.0, 0.5, 1.0, 0.5]
    assert rates("constant", 2) == [0.0, 0.5, 1.0, 1.0]
    assert rates("cosine", 0)[2] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="schedule is 'linaer'"):
        rates("linaer", 0)


@pytest.mark.parametrize("name", [PRE_LN, POST_LN])
def test_decay_acts_on_what_the_reference_trainer_decays(name):
    reference, model = twins(name)
    names = transformers.Trainer.get_decay_parameter_names(None, reference)  # self is not used
    expected = {own_name(name) for name in names if name != "lm_head.weight"}  # the embedding, tied
    optimizer = adamw(model, 1e-3, weight_decay=0.1)
    decayed = {id(parameter) for group in optimizer.param_groups[:1] for parameter in group["params"]}
    assert {name for name, parameter in model.named_parameters() if id(parameter) in decayed} == expected
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.9, 0.999), 1e-8)}


def test_frozen_parameters_are_left_out():
    _, model = twins(PRE_LN)
    model.requires_grad_(False)
    fc1 = model.decoder.layers[0].fc1.requires_grad_(True)
    groups = adamw(model, 1e-3).param_groups
    assert [[id(p) for p in group["params"]] for group in groups] == [[id(fc1.weight)], [id(fc1.bias)]]


def test_the_norm_of_a_large_gradient():
    """torch's own, in float32, is 0.3% too low."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(2**15, 1024, generator=generator), torch.randn(7, generator=generator)]
    exact = math.sqrt(sum(gradient.double().square().sum() for gradient in gradients))
    assert total_norm(gradients).item() == pytest.approx(exact, rel=1e-6)
