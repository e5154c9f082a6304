"""OPT against transformers' forward and backward passes, and against itself where two ways must agree."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers

from data.make.pretrain import initialise
from minift.batching import collate
from minift.encode import IGNORE_INDEX, Example
from minift.files.weights import parse_config
from minift.losses import bradley_terry, preference_metrics
from minift.model import OPT, eval_mode, last_tokens
from minift.pairs import Ranking, collate_rankings
from minift.rows import _Gather, row_layout
from minift.run.setup import compile_layers
from tests.compare.model import largest, run_minift, run_reference
from tests.loop import sft_loss
from tests.reference import (
    ARCHITECTURES,
    ON_THE_HUB,
    POST_LN,
    PRE_LN,
    PROJECTED,
    SMALL,
    assert_gradients_agree,
    difference,
    gradients,
    hidden_states,
    logits_of,
    pack,
    padded,
    random_examples,
    reference_logits,
    reference_model,
    twin_of,
    twins,
)
from tests.runs import SMALL_OPT

LENGTHS = (7, 1, 20, 12)  # one token alone, and one row as long as there are positions
EXAMPLES = random_examples(LENGTHS)
ROWS = [ids for ids, _ in EXAMPLES]
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def our_model(name: str, dtype: torch.dtype = torch.float32, **changes) -> OPT:
    return twin_of(reference_model(name, dtype, **changes))


# ----------------------------------------------------------------------------------------------------- the reference


# tests/compare/model.py has the architectures on the hub.
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in ON_THE_HUB])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_logits_loss_and_every_gradient(name, dtype, tolerance):
    reference, model = twins(name, dtype)
    found, expected = run_minift(model, EXAMPLES), run_reference(reference, EXAMPLES)
    for part in ("hidden", "logits", "loss"):
        assert largest(getattr(found, part), getattr(expected, part))[0] < tolerance, part
    assert_gradients_agree(found.gradients, expected.gradients, tolerance)


@pytest.fixture
def visible_dropout(monkeypatch):
    """Make dropout deterministic: it multiplies by 1 + p, so the numbers show where it acts and at which rate."""

    def dropout(hidden, p=0.5, training=True, inplace=False):
        return hidden * (1 + p) if training else hidden

    attention = F.scaled_dot_product_attention

    def scaled_dot_product_attention(*args, dropout_p=0.0, **options):
        return attention(*args, **options) * (1 + dropout_p)

    monkeypatch.setattr(F, "dropout", dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", scaled_dot_product_attention)


@every_architecture
@pytest.mark.parametrize("training", [True, False])
def test_dropout_acts_where_the_reference_has_it(visible_dropout, name, training):
    reference, model = twins(name, torch.float64, dropout=0.3, attention_dropout=0.2)
    without = logits_of(model, EXAMPLES)
    found = logits_of(model.train(training), EXAMPLES)
    assert difference(found, reference_logits(reference.train(training), ROWS)) < 1e-10
    assert torch.equal(found, without) != training


@pytest.mark.parametrize("rate", ["dropout", "attention_dropout"])
def test_dropout_is_random_in_training_only(rate):
    model = our_model(POST_LN, **{"dropout": 0.0, rate: 0.5})
    expected = logits_of(model, EXAMPLES)
    assert torch.equal(logits_of(model, EXAMPLES), expected)
    model.train()
    torch.manual_seed(0)
    first, second = logits_of(model, EXAMPLES), logits_of(model, EXAMPLES)
    torch.manual_seed(0)
    assert torch.equal(logits_of(model, EXAMPLES), first)
    assert not torch.equal(first, second) and not torch.equal(first, expected)


def test_parameters_of_the_hub_s_configs():
    folder = os.environ.get("MINIFT_REAL_DATA")
    if folder is None:
        pytest.skip("MINIFT_REAL_DATA does not name a folder with opt_configs.json")
    for values in json.loads((Path(folder) / "opt_configs.json").read_text())["configs"].values():
        with torch.device("meta"):  # takes no memory
            model = OPT(parse_config(values))
            reference = transformers.OPTForCausalLM(transformers.OPTConfig(**values))
        found = {f"model.{name}": tensor.shape for name, tensor in model.named_parameters()}
        assert found == {name: tensor.shape for name, tensor in reference.named_parameters()}


# ------------------------------------------------------------------------------------------------- two ways, one result


@every_architecture
def test_packed_is_alone_is_padded(name):
    model = our_model(name, torch.float64)
    packed = logits_of(model, EXAMPLES)  # (N, V)
    alone = torch.cat([logits_of(model, [example]) for example in EXAMPLES])
    assert difference(packed, alone) < 1e-12

    ids, mask = padded(ROWS).values()  # every pad as a token, as in other code
    slots = torch.arange(ids.numel()).view(ids.shape)  # (R, T)
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    logits = model.logits(model(ids.flatten(), positions.flatten(), slots))
    assert difference(packed, logits[mask.flatten().bool()]) < 1e-12


@every_architecture
@pytest.mark.parametrize("changed", range(4))
def test_documents_never_see_each_other(name, changed):
    """Compare bit for bit. The first document matters most: padding repeats its first token."""
    model = our_model(name)
    before = logits_of(model, EXAMPLES).split(LENGTHS)
    examples = [*EXAMPLES]
    examples[changed] = random_examples(LENGTHS, seed=1)[changed]
    after = logits_of(model, examples).split(LENGTHS)
    for number, (one, other) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(one, other) == (number != changed)


@every_architecture
def test_tokens_never_see_the_future(name):
    model = our_model(name)
    before = logits_of(model, EXAMPLES)
    ids, labels = EXAMPLES[2]
    start = sum(LENGTHS[:2])
    changed = EXAMPLES[2]._replace(input_ids=ids[:11] + [ids[11] ^ 1] + ids[12:])
    same = (logits_of(model, [*EXAMPLES[:2], changed, EXAMPLES[3]]) == before).all(1)  # (N,)
    assert same[: start + 11].all() and same[start + 20 :].all()
    assert not same[start + 11 : start + 20].any()


@every_architecture
@pytest.mark.parametrize("wanted", [[17, 3, 3, 0], [*range(sum(LENGTHS))], []])
def test_wanted_tokens_are_those_of_the_whole_list(name, wanted):
    """Values and gradients; the last layer's feed-forward, where most of its time goes, sees the wanted tokens only."""
    model, batch = our_model(name, torch.float64), collate(EXAMPLES)
    expected = hidden_states(model, batch)[wanted]  # (M, E)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (expected * weight).sum().backward()
    expected_gradients = gradients(model)
    model.zero_grad()

    rows_seen = []
    model.decoder.layers[-1].fc1.register_forward_pre_hook(lambda _, inputs: rows_seen.append(len(inputs[0])))
    found = model(batch.input_ids, batch.positions, batch.rows, wanted=torch.tensor(wanted, dtype=torch.long))
    (found * weight).sum().backward()
    assert rows_seen == [len(wanted)]
    assert found.shape == expected.shape and torch.allclose(found, expected, rtol=0, atol=1e-12)
    if wanted:
        assert_gradients_agree(gradients(model), expected_gradients, 1e-12)


@every_architecture
def test_gradient_checkpointing_changes_no_bit(name):
    """With dropout: what is computed again draws the same numbers. Without it each layer runs once."""
    model, batch = our_model(name), collate(EXAMPLES)
    for layer in model.decoder.layers:
        layer.dropout = 0.3
    calls = []
    model.decoder.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    found = []
    for model.decoder.gradient_checkpointing in (False, True):
        for is_training in (True, False):
            calls.clear()
            model.train(is_training).zero_grad()
            torch.manual_seed(0)
            hidden = hidden_states(model, batch)
            hidden.square().sum().backward()
            assert len(calls) == (2 if is_training and model.decoder.gradient_checkpointing else 1)
            found.append((hidden.detach(), *gradients(model).values()))
    plain, evaluated, checkpointed, evaluated_too = found
    assert not torch.equal(plain[0], evaluated[0])
    for ours, theirs in ((checkpointed, plain), (evaluated_too, evaluated)):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_layers_are_compiled_for_training_only():
    model, batch, calls = our_model(POST_LN), collate(EXAMPLES), []

    def backend(graph: torch.fx.GraphModule, _: list) -> Callable:
        return lambda *inputs: calls.append(1) or graph(*inputs)

    compile_layers(model, backend)
    layers = model.config.num_hidden_layers
    for is_training in (True, False, True):
        calls.clear()
        hidden_states(model.train(is_training), batch)
        assert len(calls) == 2 * layers * is_training
    other = copy.deepcopy(model.eval())
    for parameter in other.parameters():
        parameter.data.mul_(2)
    assert not torch.equal(hidden_states(other, batch), hidden_states(model, batch))
    first, second = (each.decoder.layers[0].before_attention.__self__ for each in (model, other))
    assert first is model.decoder.layers[0] and second is other.decoder.layers[0]


@pytest.mark.parametrize(("num_rows", "expected"), [(1, 1), (32, 1), (33, 2), (65, 3), (300, 8)])
def test_groups_of_rows_fill_a_gpu(num_rows, expected, monkeypatch):
    """On torch's meta device, which has no values: what is not a CPU is taken for a GPU."""
    model, asked = our_model(PRE_LN).to("meta"), []
    monkeypatch.setattr("minift.model.row_layout", lambda *given: asked.append(given[2]) or row_layout(*given))
    hidden_states(model, collate([Example([2, 3], [IGNORE_INDEX, 3])] * num_rows))
    assert asked == [expected]


def one_row_at_a_time(query, key, value, layout):
    """In place of FlashAttention, which a CPU lacks: the rows are those that `attend_end_to_end` is given."""
    offsets, lengths = layout.offsets, layout.offsets.diff()
    assert offsets.dtype == torch.int32 and layout.longest == lengths.max() and offsets[-1] == query.shape[2]
    rows = zip(*(heads.split(lengths.tolist(), dim=2) for heads in (query, key, value)), strict=True)  # (1, H, T, D)
    return torch.cat([F.scaled_dot_product_attention(*row, is_causal=True) for row in rows], dim=2)


@pytest.mark.parametrize("shares", [False, True])
@every_architecture
def test_rows_end_to_end_are_those_in_groups(name, shares, monkeypatch):
    examples = [
        Example([2, 7, 8, *ids], [IGNORE_INDEX] * 3 + labels) for ids, labels in random_examples((7, 1, 15, 12))
    ]
    model, batch = our_model(name, torch.float64), collate(examples if shares else EXAMPLES)
    assert (len(batch.input_ids) < (batch.rows >= 0).sum()) == shares

    def values_of() -> list[torch.Tensor]:
        model.zero_grad()
        value, *_ = sft_loss(model)(batch)
        value.backward()
        return [value.detach(), hidden_states(model, batch).detach(), *gradients(model).values()]

    expected = values_of()
    monkeypatch.setattr("minift.model.attend_end_to_end", one_row_at_a_time)
    monkeypatch.setattr("minift.model.can_lie_end_to_end", lambda weight, head_width, dropout: True)
    for ours, theirs in zip(values_of(), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    layout = row_layout(batch.rows, len(batch.input_ids), 0)
    assert len(layout.gather) == (batch.rows >= 0).sum() and layout.is_flat == (not shares)


@pytest.mark.parametrize(("name", "is_checkpointed"), [(PRE_LN, False), (POST_LN, False), (POST_LN, True)])
def test_compiled_layers_compute_the_same(name, is_checkpointed):
    """Trace and differentiate as for torch.compile's own code, but run torch's operators: that takes no minutes."""
    model, batches = our_model(name, torch.float64), [collate(EXAMPLES), collate(EXAMPLES[2:]), collate(EXAMPLES[:3])]
    model.decoder.gradient_checkpointing = is_checkpointed

    def values_of() -> list[torch.Tensor]:
        found = []
        for batch in batches:
            model.train().zero_grad()
            value, *_ = sft_loss(model)(batch)
            value.backward()
            with eval_mode(model):
                found += [value.detach(), hidden_states(model, batch).detach(), *gradients(model).values()]
        return found

    expected = values_of()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_layers(model, "aot_eager")
    for ours, theirs in zip(values_of(), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    # Two pieces of code for all layers and for batches of all sizes; the first layer's input may need a third.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] in (2, 3)


def test_the_order_of_the_flat_list_does_not_matter():
    model = our_model(POST_LN, torch.float64)
    batch = collate(EXAMPLES)
    order = torch.randperm(sum(LENGTHS), generator=torch.Generator().manual_seed(0))
    rows = torch.where(batch.rows < 0, -1, order.argsort()[batch.rows])
    shuffled = model(batch.input_ids[order], batch.positions[order], rows)
    assert difference(shuffled, hidden_states(model, batch)[order]) < 1e-12


@every_architecture
def test_a_shared_prompt_computed_once(name):
    """Compare a prompt shared by two rows with two separate rows; its gradients must add up."""
    model = our_model(name, torch.float64)
    prompt, left, right = (ids for ids, _ in random_examples((5, 3, 6)))
    weight = torch.randn(14, model.config.word_embed_proj_dim, generator=torch.Generator().manual_seed(0)).double()

    separate = hidden_states(model, pack([prompt + left, prompt + right]))
    separate = torch.cat([separate[:8], separate[13:]])  # without the second prompt: (14, E)
    (separate * weight).sum().backward()
    expected = gradients(model)
    model.zero_grad()

    positions = torch.tensor([*range(5), *range(5, 8), *range(5, 11)])
    rows = torch.tensor([[*range(5), 5, 6, 7, -1, -1, -1], [*range(5), *range(8, 14)]])
    shared = model(torch.tensor(prompt + left + right), positions, rows)
    (shared * weight).sum().backward()
    assert difference(shared, separate) < 1e-12
    assert_gradients_agree(gradients(model), expected, 1e-12)


def test_nothing_is_read_back_from_the_device():
    """Reading back waits for a GPU. On torch's meta device it is an error, as tensors there have no values."""
    model = OPT(SMALL_OPT).to("meta")
    total, _, _ = sft_loss(model)(collate(random_examples((7, 5, 3))))
    total.backward()
    rankings = collate_rankings([Ranking([[2, 5, 6], [2, 5, 7, 8]]), Ranking([[2, 9], [2, 5]])])
    hidden = model(rankings.input_ids, rankings.positions, rankings.rows, wanted=last_tokens(rankings.rows))
    pairs = rankings.to(hidden.device)
    rewards = hidden.sum(1)
    chosen, rejected = rewards[pairs.chosen], rewards[pairs.rejected]
    loss, _ = bradley_terry(chosen, rejected, pairs.margins, pairs.weights)
    loss.backward()
    preference_metrics(chosen, rejected, pairs.weights)
    assert {weight.grad.device.type for weight in model.parameters()} == {"meta"}


@every_architecture
def test_rows_in_one_template_are_separate_rows(name):
    """A batch that has the start of its prompts once gives the loss and gradients of one row at a time."""
    loss = sft_loss(model := our_model(name, torch.float64))
    own = random_examples((7, 1, 14, 12))
    rows = [Example([2, 5, 9, 1, *ids], [IGNORE_INDEX] * 5 + labels[1:]) for ids, labels in own]
    rows.append(Example([2, 5, 8, 7, 6], [IGNORE_INDEX] * 3 + [7, 6]))
    batch = collate(rows)
    assert len(batch.input_ids) == sum(len(ids) for ids, _ in rows) - 4 * (len(own) - 1) - 2
    alone = [loss(collate([row])) for row in rows]
    sum(total for total, _, _ in alone).backward()
    expected = gradients(model)
    model.zero_grad()

    total, count, _ = loss(batch)
    total.backward()
    assert count == sum(count for _, count, _ in alone)
    assert difference(total, sum(total for total, _, _ in alone)) < 1e-12
    assert difference(logits_of(model, rows), torch.cat([logits_of(model, [row]) for row in rows])) < 1e-12
    assert_gradients_agree(gradients(model), expected, 1e-12)


def test_a_shared_token_is_read_back_from_its_first_row():
    rows = torch.tensor([[0, 1, 2, -1], [0, 1, 3, 4], [5, 6, -1, -1], [0, 7, -1, -1]])
    layout = row_layout(rows, 8, max_groups=1)
    assert layout.scatter.tolist() == [0, 1, 2, 6, 7, 8, 9, 13]
    assert layout.repeats.tolist() == [4, 5, 12]  # tokens 0 and 1 in the second row, 0 in the last


@pytest.mark.parametrize("max_groups", [1, 2, 3])
def test_the_gradient_of_gathering_is_that_of_index_select(max_groups):
    rows = torch.tensor([[0, 1, 2, -1], [0, 1, 3, 4], [5, 6, -1, -1], [0, 7, -1, -1], [8, -1, -1, -1]])
    layout = row_layout(rows, 9, max_groups)
    flat = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(layout.gather), 3, dtype=torch.float64)
    is_token = torch.zeros(len(layout.gather), dtype=torch.bool)
    is_token[layout.scatter] = is_token[layout.repeats] = True
    assert is_token.sum() == (rows >= 0).sum()
    weight[~is_token] = 0  # nobody looks at a pad
    [expected] = torch.autograd.grad((flat.index_select(0, layout.gather) * weight).sum(), flat)
    [found] = torch.autograd.grad((_Gather.apply(flat, layout) * weight).sum(), flat)
    torch.testing.assert_close(found, expected, rtol=1e-15, atol=1e-15)


def test_rows_of_similar_length_are_padded_together():
    rows = torch.tensor([[0, 1, 2, 3, 4], [5, 6, -1, -1, -1], [7, 8, 9, -1, -1], [10, 11, -1, -1, -1]])
    layout = row_layout(rows, 12)
    assert layout.groups == [(2, 5), (2, 2)]  # lengths 5 and 3, 2 and 2
    assert layout.gather.tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 0, 0, 5, 6, 10, 11]
    assert layout.gather[layout.scatter].tolist() == list(range(12))


def test_positions_are_looked_up_two_rows_further():
    model = our_model(PRE_LN)
    table = model.decoder.embed_positions.weight
    assert table.shape == (22, 32)
    logits_of(model, random_examples((5, 9))).sum().backward()
    assert model.head.grad.any(1).all()  # through the tied head, tokens that were never read included
    assert table.grad.any(1).nonzero().flatten().tolist() == list(range(2, 11))


def test_one_token_at_a_time_through_a_cache():
    class Cache:
        """Two rows of one length: every query looks at all keys."""

        max_groups = 1

        def __init__(self):
            self.layers = []
            self.held = {}

        def attend(self, layer, query, key, value):
            self.layers.append(layer)
            if layer in self.held:
                key, value = (torch.cat(pair, 2) for pair in zip(self.held[layer], (key, value), strict=True))
            self.held[layer] = key, value  # (R, H, S, D)
            return F.scaled_dot_product_attention(query, key, value)

    model = our_model(POST_LN, torch.float64)
    batch = collate(random_examples((6, 6)))
    expected = hidden_states(model, batch).view(2, 6, -1)
    cache = Cache()
    for position in range(6):
        ids = batch.input_ids[batch.rows[:, position]]
        hidden = model(ids, torch.tensor([position, position]), torch.tensor([[0], [1]]), cache)
        assert difference(hidden, expected[:, position]) < 1e-12
    assert cache.layers == [0, 1] * 6


# ------------------------------------------------------------------------------------------------------ initialisation


def test_fresh_weights():
    config = parse_config(SMALL | PROJECTED | {"vocab_size": 500, "hidden_size": 64, "ffn_dim": 256})
    models = [OPT(config) for _ in range(3)]
    before = torch.get_rng_state()
    for model, seed in zip(models, (5, 5, 6), strict=True):
        initialise(model, seed)
    assert torch.equal(torch.get_rng_state(), before)
    first, again, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["decoder.project_in.weight"], other["decoder.project_in.weight"])

    for name, tensor in first.items():
        if "layer_norm.weight" in name:
            assert (tensor == 1).all(), name
        elif name.endswith("bias"):
            assert (tensor == 0).all(), name
        else:
            scale = tensor.shape[1] ** -0.5
            if name.endswith(("out_proj.weight", "fc2.weight")):  # what four branches add to the residual stream
                scale /= 2
            assert tensor.std().item() == pytest.approx(scale, rel=0.1), name
            assert abs(tensor.mean().item()) < 0.1 * scale, name
    assert not first["decoder.embed_tokens.weight"][config.pad_token_id].any()
