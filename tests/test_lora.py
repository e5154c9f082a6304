"""Adapters: nothing changes at first, only they learn, and merged is the same function."""

import copy
import math

import pytest
import torch
from torch import nn

from minift.lora import LoRALinear, adapter_state, add_lora, merge, num_adapter_parameters, unmerge
from minift.model import OPT, OPTConfig, initialise

TARGETS = ("q_proj", "v_proj")
IDS = torch.tensor([2, 9, 8, 7, 2, 5])
POSITIONS = torch.tensor([0, 1, 2, 3, 0, 1])
ROWS = torch.tensor([[0, 1, 2, 3], [4, 5, -1, -1]])


def small_model() -> OPT:
    config = OPTConfig(
        vocab_size=19,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=12,
        word_embed_proj_dim=6,
        max_position_embeddings=8,
        do_layer_norm_before=False,
    )
    model = OPT(config).double()
    initialise(model, seed=3)
    return model.eval()


def logits(model: OPT) -> torch.Tensor:
    return model.logits(model(IDS, POSITIONS, ROWS))


def fill_b(model: nn.Module, seed: int = 5) -> None:
    """Stands for training: B away from zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in adapter_state(model).items():
        if "lora_B" in name:
            weight.normal_(generator=generator)  # shares its memory with the parameter


def test_an_example_worked_by_hand():
    linear = nn.Linear(2, 1).double()
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 2.0]]))
        linear.bias.fill_(0.5)
    adapter = LoRALinear(linear, rank=2, alpha=6.0, dropout=0.0, generator=None)
    with torch.no_grad():
        adapter.lora_A.weight.copy_(torch.tensor([[1.0, 0.0], [2.0, -1.0]]))
        adapter.lora_B.weight.copy_(torch.tensor([[10.0, 100.0]]))
    # x = (3, 4): W x + b = 11.5; A x = (3, 2); B A x = 230; alpha / rank = 3.
    assert adapter(torch.tensor([3.0, 4.0]).double()).item() == 11.5 + 3 * 230
    assert adapter.merged().weight.tolist() == [[1.0 + 3 * 210, 2.0 - 3 * 100]]


def test_at_first_nothing_changes():
    model = small_model()
    before = logits(model)
    add_lora(model, 3, 7.0, 0.5, TARGETS)
    assert torch.equal(logits(model), before)
    fill_b(model)
    assert not torch.allclose(logits(model), before)


def test_gradients_reach_the_adapters_alone():
    model = small_model()
    add_lora(model, 3, 7.0, 0.0, TARGETS)
    fill_b(model)
    assert sorted(name for name, weight in model.named_parameters() if weight.requires_grad) == sorted(
        adapter_state(model)
    )
    logits(model).square().sum().backward()
    for name, weight in model.named_parameters():
        if name in adapter_state(model):
            assert weight.grad.abs().sum() > 0, name
        else:
            assert weight.grad is None, name


def test_gradients_of_an_adapter_by_formula():
    linear = nn.Linear(5, 4).double()
    adapter = LoRALinear(linear, rank=2, alpha=3.0, dropout=0.0, generator=None)
    nn.init.normal_(adapter.lora_B.weight)
    hidden, upstream = torch.randn(6, 5).double(), torch.randn(6, 4).double()
    (adapter(hidden) * upstream).sum().backward()
    a, b = adapter.lora_A.weight.detach(), adapter.lora_B.weight.detach()
    torch.testing.assert_close(adapter.lora_B.weight.grad, 1.5 * upstream.T @ (hidden @ a.T), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(adapter.lora_A.weight.grad, 1.5 * (upstream @ b).T @ hidden, rtol=1e-12, atol=1e-12)


def test_merged_is_the_same_function_in_plain_linears_and_unmerge_is_exact():
    model = small_model()
    plain_keys = set(model.state_dict())
    add_lora(model, 3, 7.0, 0.5, TARGETS)
    fill_b(model)
    adapted, state = logits(model), copy.deepcopy(model.state_dict())
    adapters = merge(model)
    assert len(adapters) == 4
    assert set(model.state_dict()) == plain_keys
    assert (logits(model) - adapted).abs().max() < 1e-10
    assert not adapter_state(model)
    unmerge(model, adapters)
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())
    assert torch.equal(logits(model), adapted)


def test_dropout_is_on_the_adapters_input_and_only_in_training():
    linear = nn.Linear(40, 3)
    adapter = LoRALinear(linear, rank=2, alpha=2.0, dropout=0.25, generator=None)
    nn.init.normal_(adapter.lora_B.weight)
    hidden = torch.ones(1, 40)
    adapter.eval()
    assert torch.equal(adapter(hidden), adapter(hidden))
    adapter.train()
    torch.manual_seed(1)
    noisy = adapter(hidden)
    torch.manual_seed(1)
    kept = nn.functional.dropout(hidden, 0.25)
    assert 0 < (kept == 0).sum() < 40
    expected = linear(hidden) + kept @ adapter.lora_A.weight.T @ adapter.lora_B.weight.T
    torch.testing.assert_close(noisy, expected)


@pytest.mark.parametrize("mode", [True, False])
def test_adding_and_merging_keep_the_mode(mode):
    model = small_model().train(mode)
    add_lora(model, 2, 2.0, 0.5, TARGETS)
    assert all(module.training == mode for module in model.modules())
    adapters = merge(model)
    assert all(module.training == mode for module in model.modules())
    model.train(not mode)
    unmerge(model, adapters)
    assert all(module.training != mode for module in model.modules())


def test_start_values_follow_the_seed_and_kaimings_range():
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(100 + len(states))  # must not matter
        model = small_model()
        stream = torch.get_rng_state()
        add_lora(model, 3, 7.0, 0.0, TARGETS, torch.Generator().manual_seed(seed))
        assert torch.equal(torch.get_rng_state(), stream)  # the dropout that follows is not moved
        states.append(adapter_state(model))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    a_names = [name for name in states[0] if "lora_A" in name]
    assert not any(torch.equal(states[0][name], states[2][name]) for name in a_names)
    assert not any(states[0][name].any() for name in states[0] if "lora_B" in name)

    wide = LoRALinear(nn.Linear(400, 7), 50, 1.0, 0.0, torch.Generator().manual_seed(1)).lora_A.weight
    reference = nn.init.kaiming_uniform_(torch.empty(50, 400), a=math.sqrt(5))
    assert wide.abs().max().item() == pytest.approx(reference.abs().max().item(), rel=1e-3)
    assert wide.std().item() == pytest.approx(reference.std().item(), rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_beside_half_precision_the_adapter_is_float32(dtype):
    linear = nn.Linear(8, 4).to(dtype)
    adapter = LoRALinear(linear, rank=2, alpha=2.0, dropout=0.0, generator=None)
    nn.init.normal_(adapter.lora_B.weight)
    assert adapter.lora_A.weight.dtype == adapter.lora_B.weight.dtype == torch.float32
    hidden = torch.randn(3, 8, dtype=dtype)
    update = hidden.float() @ adapter.lora_A.weight.T @ adapter.lora_B.weight.T
    assert torch.equal(adapter(hidden), linear(hidden) + update.to(dtype))
    assert adapter.merged().weight.dtype == dtype


def test_the_labs_adapters_on_opt_350m_have_1572864_parameters():
    shape = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "ffn_dim": 4096}
    with torch.device("meta"):
        model = OPT(OPTConfig(**shape, word_embed_proj_dim=512, do_layer_norm_before=False))
    add_lora(model, 16, 32.0, 0.1, TARGETS)
    assert num_adapter_parameters(model) == 1_572_864
    assert sum(weight.numel() for weight in model.parameters() if weight.requires_grad) == 1_572_864
    shapes = {name: tuple(weight.shape) for name, weight in adapter_state(model).items()}
    assert len(shapes) == 96
    assert shapes["decoder.layers.23.self_attn.v_proj.lora_A.weight"] == (16, 1024)
    assert shapes["decoder.layers.23.self_attn.v_proj.lora_B.weight"] == (1024, 16)


@pytest.mark.parametrize(
    "rank, targets, message",
    [
        (0, ("q_proj",), "rank is 0"),
        (2, ("q_proj", "query"), "no linear is named query; this model has fc1, fc2, k_proj, out_proj, project_in"),
        (2, ("embed_tokens",), "no linear is named embed_tokens"),
        (2, (), "no targets given"),
    ],
)
def test_what_cannot_be_adapted_is_refused_and_nothing_is_frozen(rank, targets, message):
    model = small_model()
    with pytest.raises(ValueError, match=message):
        add_lora(model, rank, 2.0, 0.0, targets)
    assert all(weight.requires_grad for weight in model.parameters())


def test_adapters_are_not_added_twice():
    model = small_model()
    add_lora(model, 2, 2.0, 0.0, TARGETS)
    with pytest.raises(ValueError, match="already"):
        add_lora(model, 2, 2.0, 0.0, ("fc1",))


def test_peft_computes_the_same():
    peft = pytest.importorskip("peft")
    ours = small_model()
    theirs = copy.deepcopy(ours)
    add_lora(ours, 3, 7.0, 0.0, TARGETS)
    fill_b(ours)
    settings = peft.LoraConfig(r=3, lora_alpha=7, lora_dropout=0.0, target_modules=list(TARGETS))
    theirs = peft.inject_adapter_in_model(settings, theirs, adapter_name="default")
    state = {name.replace(".weight", ".default.weight"): weight for name, weight in adapter_state(ours).items()}
    assert not theirs.load_state_dict(state, strict=False).unexpected_keys
    assert (logits(ours) - logits(theirs)).abs().max() < 1e-10
