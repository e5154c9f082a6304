"""Adapters: they change nothing at first, only they are trained, merging keeps the function; all is as in peft."""

import copy
import json
import math
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minift.batching import collate
from minift.files.adapters import adapter_state, load_adapters, save_adapters
from minift.files.weights import SCORE
from minift.lora import LoRALinear, add_lora, merge, unmerge
from minift.model import OPT, OPTConfig, RewardModel
from minift.optim import adamw
from minift.pairs import Ranking, collate_rankings
from tests.loop import rm_loss, sft_loss
from tests.reference import (
    POST_LN,
    PRE_LN,
    SMALL,
    Model,
    difference,
    logits_of,
    mean_loss,
    random_examples,
    reference_logits,
    reference_loss,
    reference_model,
    reference_preference_loss,
    reference_rewards,
    rewards_of,
    trained,
    twins,
)
from tests.runs import user_error

TARGETS = ("q_proj", "v_proj")
ALL_LINEARS = ("fc1", "fc2", "k_proj", "out_proj", "project_in", "project_out", "q_proj", "v_proj")
EXAMPLES = random_examples((6, 8, 7))
PAIRS = [[[2, 9, 8, 30, 31, 2], [2, 9, 8, 32, 2]], [[2, 14, 15, 2], [2, 14, 16, 17, 18, 19, 2]]]
ROWS = [row for pair in PAIRS for row in pair]
both_architectures = pytest.mark.parametrize("name", [PRE_LN, POST_LN])
both_models = pytest.mark.parametrize("twin", [OPT, RewardModel])


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def small_model(twin: type[Model] = OPT, dtype: torch.dtype = torch.float64) -> Model:
    return twins(POST_LN, dtype, twin=twin)[1]


def our_output(model: Model) -> Tensor:
    """Return the logits `(N, V)` of the examples, or the rewards `(R,)` of the pairs."""
    return rewards_of(model, ROWS) if isinstance(model, RewardModel) else logits_of(model, EXAMPLES)


def their_output(twin: type[Model], model: nn.Module) -> Tensor:
    """Return the same for a model of transformers, with or without peft around it."""
    return reference_rewards(model, ROWS) if twin is RewardModel else reference_logits(model, [x for x, _ in EXAMPLES])


def our_loss(model: Model, examples=EXAMPLES) -> Tensor:
    if isinstance(model, RewardModel):
        return mean_loss(rm_loss(model), collate_rankings([Ranking(pair) for pair in PAIRS]))
    return mean_loss(sft_loss(model), collate(examples))


def fill(model: nn.Module) -> None:
    """Change what is trained, as training would: B is not zero, the head has moved."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in sorted(trained(model).items()):
            if "lora_A" not in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


# ----------------------------------------------------------------------------------------------------- the arithmetic


def test_an_example_worked_by_hand():
    linear = nn.Linear(2, 1).double()
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 2.0]]))
        linear.bias.fill_(0.5)
    adapter = LoRALinear(linear, rank=2, alpha=6.0, dropout=0.0)
    with torch.no_grad():
        adapter.lora_A.weight.copy_(torch.tensor([[1.0, 0.0], [2.0, -1.0]]))
        adapter.lora_B.weight.copy_(torch.tensor([[10.0, 100.0]]))
    # x = (3, 4): W x + b = 11.5; A x = (3, 2); B A x = 230; alpha / rank = 3.
    assert adapter(torch.tensor([3.0, 4.0]).double()).item() == 11.5 + 3 * 230
    assert adapter.merged().weight.tolist() == [[1.0 + 3 * 210, 2.0 - 3 * 100]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@both_models
def test_at_first_nothing_changes(twin, dtype):
    model = small_model(twin, dtype)
    before = our_output(model)
    add_lora(model, 3, 7.0, 0.5, ALL_LINEARS)
    model.train()
    after = our_output(model)
    if twin is RewardModel and dtype.itemsize == 2:  # the head is float32 now
        assert after.dtype == torch.float32
        torch.testing.assert_close(after, before.float(), rtol=2**-7, atol=2**-7)
    else:
        assert after.dtype == dtype and torch.equal(after, before)
    fill(model)
    assert not torch.allclose(our_output(model), after, rtol=0.01)


@both_models
def test_gradients_reach_the_adapters_and_the_head_alone(twin):
    model = small_model(twin)
    add_lora(model, 3, 7.0, 0.0, TARGETS)
    fill(model)
    expected = {f"decoder.layers.{n}.self_attn.{t}.lora_{p}.weight" for n in (0, 1) for t in TARGETS for p in "AB"}
    expected |= {"score.weight"} if twin is RewardModel else set()
    assert trained(model).keys() == adapter_state(model).keys() == expected
    our_loss(model).backward()
    for name, weight in model.named_parameters():
        assert weight.grad.abs().sum() > 0 if name in expected else weight.grad is None, name


def test_gradients_of_an_adapter_by_formula():
    linear = nn.Linear(5, 4).double()
    adapter = LoRALinear(linear, rank=2, alpha=3.0, dropout=0.0)
    nn.init.normal_(adapter.lora_B.weight)
    hidden, upstream = torch.randn(6, 5).double(), torch.randn(6, 4).double()
    (adapter(hidden) * upstream).sum().backward()
    a, b = adapter.lora_A.weight.detach(), adapter.lora_B.weight.detach()
    torch.testing.assert_close(adapter.lora_B.weight.grad, 1.5 * upstream.T @ (hidden @ a.T), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(adapter.lora_A.weight.grad, 1.5 * (upstream @ b).T @ hidden, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@both_models
def test_merged_is_the_same_function_in_plain_linears_and_unmerge_is_exact(twin, dtype):
    model = small_model(twin, dtype)
    plain = {name: (weight.shape, weight.dtype) for name, weight in model.decoder.state_dict().items()}
    add_lora(model, 3, 7.0, 0.5, TARGETS)
    fill(model)
    adapted, state = our_output(model), copy.deepcopy(model.state_dict())
    adapters = merge(model)
    assert len(adapters) == 4
    assert {name: (weight.shape, weight.dtype) for name, weight in model.decoder.state_dict().items()} == plain
    tolerance = {torch.float16: 0.02, torch.bfloat16: 0.1, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    assert difference(our_output(model).double(), adapted.double()) < tolerance
    assert adapter_state(model).keys() <= {SCORE} and not any(
        weight.requires_grad for weight in model.decoder.parameters()
    )
    unmerge(model, adapters)
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())
    assert torch.equal(our_output(model), adapted)


def test_dropout_is_on_the_adapters_input_and_only_in_training():
    linear = nn.Linear(40, 3)
    adapter = LoRALinear(linear, rank=2, alpha=2.0, dropout=0.25)
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
        model = small_model()
        torch.manual_seed(seed)
        add_lora(model, 3, 7.0, 0.0, TARGETS)
        states.append(adapter_state(model))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    a_names = [name for name in states[0] if "lora_A" in name]
    assert not any(torch.equal(states[0][name], states[2][name]) for name in a_names)
    assert not any(states[0][name].any() for name in states[0] if "lora_B" in name)

    torch.manual_seed(1)
    wide = LoRALinear(nn.Linear(400, 7), 50, 1.0, 0.0).lora_A.weight
    reference = nn.init.kaiming_uniform_(torch.empty(50, 400), a=math.sqrt(5))
    assert wide.abs().max().item() == pytest.approx(reference.abs().max().item(), rel=1e-3)
    assert wide.std().item() == pytest.approx(reference.std().item(), rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_of_half_precision_weights_are_float32(dtype):
    linear = nn.Linear(8, 4).to(dtype)
    adapter = LoRALinear(linear, rank=2, alpha=2.0, dropout=0.0)
    nn.init.normal_(adapter.lora_B.weight)
    hidden = torch.randn(3, 8, dtype=dtype)
    update = hidden.float() @ adapter.lora_A.weight.T @ adapter.lora_B.weight.T
    assert torch.equal(adapter(hidden), (linear(hidden).float() + update).to(dtype))  # rounded once
    assert adapter.merged().weight.dtype == dtype

    model = small_model(RewardModel, dtype)
    add_lora(model, 2, 2.0, 0.0, TARGETS)
    assert {weight.dtype for weight in trained(model).values()} == {torch.float32}
    frozen = {weight.dtype for name, weight in model.named_parameters() if name not in trained(model)}
    assert frozen == {dtype}


def test_the_labs_adapters_on_opt_350m_have_1572864_parameters():
    shape = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "ffn_dim": 4096}
    with torch.device("meta"):
        model = OPT(OPTConfig(**shape, word_embed_proj_dim=512, do_layer_norm_before=False))
    add_lora(model, 16, 32.0, 0.1, TARGETS)
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
        (2, ("score",), "no linear is named score"),  # a reward model's head is trained as a whole
        (2, (), "no targets given"),
    ],
)
def test_what_cannot_be_adapted_is_refused_and_nothing_is_frozen(rank, targets, message):
    model = small_model(RewardModel)
    with pytest.raises(ValueError, match=message):
        add_lora(model, rank, 2.0, 0.0, targets)
    assert all(weight.requires_grad for weight in model.parameters())


def test_adapters_are_not_added_twice_and_none_are_not_saved(tmp_path):
    model = small_model()
    with pytest.raises(ValueError, match="no adapters"):
        save_adapters(model, tmp_path)
    add_lora(model, 2, 2.0, 0.0, TARGETS)
    with pytest.raises(ValueError, match="already"):
        add_lora(model, 2, 2.0, 0.0, ("fc1",))


# ------------------------------------------------------------------------------------------------- peft: same training


# tests/compare/lora.py has a language model.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@both_architectures
def test_training_a_reward_model_is_pefts(tmp_path, name, dtype, tolerance):
    reference, ours = twins(name, dtype, twin=RewardModel)
    add_lora(ours, 3, 7.0, 0.0, ("q_proj", "v_proj", "fc1"))
    save_adapters(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(reference, tmp_path, is_trainable=True)
    expected = trained(theirs)
    assert {key: weight.shape for key, weight in trained(ours).items()} == {k: w.shape for k, w in expected.items()}
    our_optimizer = adamw(ours, 0.01, weight_decay=0.1)
    their_optimizer = torch.optim.AdamW(expected.values(), lr=0.01, weight_decay=0.1)
    ours.train(), theirs.train()
    losses = []
    for _ in range(6):
        rewards = reference_rewards(theirs, ROWS)
        loss, their = our_loss(ours), reference_preference_loss(rewards[0::2], rewards[1::2])
        assert abs(loss - their).item() < tolerance
        losses.append(loss.item())
        loss.backward(), their.backward()
        for key, parameter in trained(ours).items():
            if len(losses) == 1 and "lora_A" in key:
                assert not parameter.grad.any() and not expected[key].grad.any(), key  # while B is 0
            else:
                assert difference(parameter.grad, expected[key].grad) < 10 * tolerance, key
        our_optimizer.step(), their_optimizer.step()
        our_optimizer.zero_grad(), their_optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.05
    for key, parameter in trained(ours).items():
        assert difference(parameter, expected[key]) < 10 * tolerance, key


def test_dropout_is_pefts(tmp_path):
    """Compare one row: it has no padding, so both sides draw the same numbers for the same tokens."""
    reference, ours = twins(PRE_LN, torch.float64)
    add_lora(ours, 3, 7.0, 0.3, TARGETS)
    fill(ours)
    save_adapters(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(reference, tmp_path, is_trainable=True)
    ours.train(), theirs.train()
    losses = set()
    for seed in range(3):
        torch.manual_seed(seed)
        loss = our_loss(ours, EXAMPLES[1:2])
        torch.manual_seed(seed)
        assert abs(loss - reference_loss(theirs, EXAMPLES[1:2])).item() < 1e-10
        losses.add(loss.item())
    assert len(losses) == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("base", [torch.float32, None])
def test_half_precision_is_pefts_under_autocast(tmp_path, dtype, base):
    """Compare one row, which has no padding, with a base in float32 or in autocast's own dtype.

    The two sides scale at different times: queries by (head width)^-½, the loss by 1 / (supervised tokens). With heads
    of width 4 and 4 supervised tokens that is exact.
    """
    build = partial(twins, POST_LN, base or dtype, num_attention_heads=8)
    reference, ours = build()
    add_lora(ours, 4, 8.0, 0.0, TARGETS)
    fill(ours)
    save_adapters(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(reference, tmp_path, is_trainable=True)
    exact = our_loss(ours.float(), EXAMPLES[1:2]).item()
    _, ours = build()
    load_adapters(ours, tmp_path)
    with torch.autocast("cpu", dtype=dtype):
        loss, their = our_loss(ours, EXAMPLES[1:2]), reference_loss(theirs, EXAMPLES[1:2])
    loss.backward(), their.backward()
    assert abs(loss - their).item() < 1e-5
    expected = trained(theirs)
    for key, parameter in trained(ours).items():
        assert parameter.grad.dtype == torch.float32
        assert difference(parameter.grad, expected[key].grad) < torch.finfo(dtype).eps, key
    assert 0 < abs(loss.item() - exact) < 0.05  # it was half precision


# ---------------------------------------------------------------------------------------------------- peft: same files


@both_architectures
@both_models
def test_peft_loads_what_is_saved(tmp_path, twin, name):
    reference, ours = twins(name, torch.float64, twin=twin)
    plain = their_output(twin, reference)
    targets = [target for target in ALL_LINEARS if name == POST_LN or "project" not in target]
    add_lora(ours, 3, 7.5, 0.25, targets)
    fill(ours)
    save_adapters(ours, tmp_path / "adapter", base="some/model", revision="abc")
    theirs = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter")
    assert difference(our_output(ours), their_output(twin, theirs)) < 1e-12
    assert difference(our_output(ours), plain) > 0.01
    settings = theirs.peft_config["default"]
    assert (settings.r, settings.lora_alpha, settings.lora_dropout) == (3, 7.5, 0.25)
    assert settings.target_modules == set(targets)
    assert (settings.base_model_name_or_path, settings.revision) == ("some/model", "abc")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["modules_to_save"] == (["score"] if twin is RewardModel else None)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    merge(ours)
    expected = theirs.merge_and_unload().model.state_dict()
    for key, weight in ours.decoder.state_dict().items():
        torch.testing.assert_close(weight, expected[f"decoder.{key}"], rtol=0, atol=1e-12)


@both_models
def test_peft_finds_the_model_by_itself(tmp_path, twin):
    reference, ours = twins(PRE_LN, twin=twin)
    reference.save_pretrained(tmp_path / "model")
    add_lora(ours, 3, 7.0, 0.0, TARGETS)
    fill(ours)
    save_adapters(ours, tmp_path / "adapter", base=str(tmp_path / "model"))
    load = peft.AutoPeftModelForCausalLM.from_pretrained
    if twin is RewardModel:
        load = partial(peft.AutoPeftModelForSequenceClassification.from_pretrained, num_labels=1)
    assert difference(our_output(ours), their_output(twin, load(tmp_path / "adapter"))) < 1e-5


@pytest.mark.parametrize(
    "options",  # tests/compare/lora.py has peft's defaults
    [
        {"target_modules": ["fc2", "k_proj", "out_proj"], "lora_alpha": 5, "use_rslora": True},
        {"target_modules": "all-linear", "init_lora_weights": "gaussian", "lora_dropout": 0.1},
    ],
)
@both_architectures
@both_models
def test_what_peft_saves_is_loaded(tmp_path, twin, name, options):
    reference, ours = twins(name, torch.float64, twin=twin)
    plain = our_output(ours)
    task = "SEQ_CLS" if twin is RewardModel else "CAUSAL_LM"
    theirs = peft.get_peft_model(reference, peft.LoraConfig(r=4, task_type=task, **options))
    fill(theirs)
    theirs.save_pretrained(tmp_path)
    load_adapters(ours, tmp_path)
    expected = their_output(twin, theirs.eval())
    assert difference(our_output(ours), expected) < 1e-12
    assert difference(plain, expected) > 0.01
    assert trained(ours).keys() == trained(theirs).keys()
    merge(ours)
    assert difference(our_output(ours), expected) < 1e-12


@both_models
def test_adapters_that_peft_saved_as_bin_are_loaded(tmp_path, twin):
    reference, ours = twins(PRE_LN, torch.float64, twin=twin)
    task = "SEQ_CLS" if twin is RewardModel else "CAUSAL_LM"
    theirs = peft.get_peft_model(reference, peft.LoraConfig(r=4, task_type=task, target_modules=["q_proj"]))
    fill(theirs)
    theirs.save_pretrained(tmp_path, safe_serialization=False)
    assert [path.name for path in tmp_path.glob("*model*")] == ["adapter_model.bin"]
    load_adapters(ours, tmp_path)
    assert difference(our_output(ours), their_output(twin, theirs.eval())) < 1e-12


@both_models
def test_adapters_come_back_bit_for_bit(tmp_path, twin):
    _, ours = twins(PRE_LN, twin=twin)
    _, again = twins(PRE_LN, twin=twin)
    add_lora(ours, 3, 7.0, 0.25, TARGETS)
    fill(ours)
    save_adapters(ours, tmp_path / "a")
    load_adapters(again, tmp_path / "a")
    assert torch.equal(our_output(again), our_output(ours))
    save_adapters(again, tmp_path / "b")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a folder with adapters of rank 3 on q_proj and v_proj of `small_model`, as peft writes them."""
    return write_peft_adapters(tmp_path)


def write_peft_adapters(folder: Path, **options) -> Path:
    settings = peft.LoraConfig(r=3, task_type="CAUSAL_LM", target_modules=list(TARGETS), **options)
    peft.get_peft_model(reference_model(POST_LN, torch.float64), settings).save_pretrained(folder)
    return folder


def assert_refused(model: nn.Module, folder: Path, *words: str) -> None:
    """Check that loading fails with one line that holds `words`, and leaves the model unchanged."""
    before = copy.deepcopy(model)
    message = user_error(load_adapters, model, folder)
    for word in (str(folder), *words):
        assert word in message
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in before.state_dict().items())
    assert trained(model).keys() == trained(before).keys()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("peft_type", "LOHA", ["peft_type is 'LOHA', expected 'LORA'"]),
        ("peft_type", None, ["peft_type is None"]),
        ("use_dora", True, ["use_dora is True"]),
        ("bias", "all", ["bias is 'all'"]),
        ("lora_bias", True, ["lora_bias is True"]),
        ("init_lora_weights", "pissa", ["init_lora_weights is 'pissa'"]),
        ("rank_pattern", {"fc1": 2}, ["rank_pattern"]),
        ("alpha_pattern", {"q_proj": 2}, ["alpha_pattern"]),
        ("layers_to_transform", [1], ["layers_to_transform is [1]"]),
        ("fan_in_fan_out", True, ["fan_in_fan_out"]),
        ("not_invented_yet", 1, ["not_invented_yet"]),
        ("r", 0, ["rank of at least 1", "r 0"]),
        ("r", True, ["r True"]),
        ("r", "3", ["r '3'"]),
        ("r", 10**30, ["rank is 10", f"expected 1 to {SMALL['hidden_size']}"]),
        ("use_rslora", "false", ["use_rslora is 'false'"]),
        ("lora_alpha", None, ["lora_alpha None"]),
        ("lora_alpha", math.inf, ["lora_alpha inf"]),
        ("lora_alpha", math.nan, ["lora_alpha nan"]),
        ("lora_alpha", 10**400, ["lora_alpha 1000"]),
        ("lora_dropout", 1.0, ["lora_dropout 1.0"]),
        ("target_modules", ".*q_proj", ["a list of names", "'.*q_proj'"]),
        ("target_modules", [["q_proj"]], ["a list of names"]),
        ("target_modules", [], ["no targets given"]),
        ("target_modules", ["q_proj", "c_attn"], ["no linear is named c_attn", "this model has fc1"]),
        ("target_modules", ["q_proj", "embed_tokens"], ["no linear is named embed_tokens"]),
        ("target_modules", ["q_proj"], ["4 unexpected", "layers.0.self_attn.v_proj.lora_A.weight"]),
        ("target_modules", ["q_proj", "v_proj", "fc1"], ["4 missing", "layers.0.fc1.lora_A.weight"]),
    ],
)
def test_settings_that_ask_for_something_else(folder, name, value, words):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    file = "adapter_model.safetensors" if words[0].startswith(("4 ", "of another")) else "adapter_config.json"
    assert_refused(small_model(), folder, file, *words)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True}])
def test_peft_s_adapters_that_are_not_plain_lora(tmp_path, options):
    write_peft_adapters(tmp_path, **options)
    assert_refused(small_model(), tmp_path, "adapter_config.json", next(iter(options)), "merge this adapter with peft")


def test_weights_that_do_not_fit(folder):
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    key = min(state)
    assert key == "base_model.model.model.decoder.layers.0.self_attn.q_proj.lora_A.weight"

    def refused(changed: dict[str, Tensor], *words: str) -> None:
        save_file(changed, path)
        assert_refused(small_model(), folder, path.name, *words)

    refused({name: weight for name, weight in state.items() if name != key}, "1 missing, first", key)
    refused(state | {"base_model.model.model.decoder.embed_tokens.weight": torch.ones(2)}, "1 unexpected")
    refused(state | {key: state[key].T.contiguous()}, "1 of another shape", key)
    refused(state | {key: state[key][:2].clone()}, "of another shape", key)
    refused(state | {key: torch.full_like(state[key], math.nan)}, key.removeprefix("base_model.model.model."), "NaN")
    refused(state | {key: state[key].long()}, "whole numbers")
    save_file(state, path)
    load_adapters(small_model(), folder)  # nothing else was wrong


def test_files_that_are_absent_or_damaged(folder, tmp_path):
    assert_refused(small_model(), folder / "nowhere", "adapter_config.json", "no such file")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert_refused(small_model(), folder, path.name, "truncated or damaged")
    path.unlink()
    assert_refused(small_model(), folder, path.name, "no such file")
    for text in ("{", "[]", "3"):
        (folder / "adapter_config.json").write_text(text)
        assert_refused(small_model(), folder, "adapter_config.json", "a JSON object")


def test_adapters_of_the_other_model_class_or_on_top_of_others(folder, tmp_path):
    assert_refused(small_model(RewardModel), folder, "no score.weight: these adapters are of a language model")
    rewarding = small_model(RewardModel)
    add_lora(rewarding, 3, 8, 0.0, TARGETS)
    save_adapters(rewarding, tmp_path / "rewarding")
    assert_refused(small_model(), tmp_path / "rewarding", "has score.weight: these adapters are of a reward model")
    adapted = small_model()
    add_lora(adapted, 3, 8, 0.0, TARGETS)
    assert_refused(adapted, folder, "adapters already")


def test_a_reward_model_can_keep_its_head(folder):
    model = small_model(RewardModel)
    head = model.score.weight.clone()
    load_adapters(model, folder, keep_reward_head=True)
    assert torch.equal(model.score.weight, head)
    state = load_file(folder / "adapter_model.safetensors")
    for name, weight in trained(model).items():
        assert name == "score.weight" or torch.equal(weight, state[f"base_model.model.model.{name}"].double())
