"""Rewards, the Bradley–Terry loss and rankings against transformers' classifier and the formula by hand."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from minift.batching import Loader, share_prefixes
from minift.encode import IGNORE_INDEX
from minift.files.weights import load_model, load_reward_model, save_model
from minift.losses import bradley_terry, preference_metrics
from minift.model import OPT, RewardModel
from minift.pairs import PairBatch, Ranking, collate_rankings
from minift.trainer import Task, accumulate_gradient
from tests.loop import rm_loss, write_nothing
from tests.reference import (
    POST_LN,
    PRE_LN,
    SMALL,
    assert_gradients_agree,
    difference,
    gradients,
    mean_loss,
    pack,
    reference_model,
    reference_preference_loss,
    reference_rewards,
    rewards_of,
    twin_of,
    twins,
)
from tests.runs import user_error

FILLER = SMALL["vocab_size"] - 1  # a token in none of the rows here
EOS = 2
MARGINS, CENTER = (0.5, 0.0, -2.0), 0.25
both_architectures = pytest.mark.parametrize("name", [PRE_LN, POST_LN])
both_precisions = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])


def our_model(name: str, dtype: torch.dtype = torch.float32) -> RewardModel:
    return twin_of(reference_model(name, dtype, twin=RewardModel))


def tokens(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, FILLER, (length,), generator=generator).tolist()


def responses(prompt_length: int, *lengths: int, seed: int = 0) -> list[list[int]]:
    """Return whole rows: BOS, a prompt, responses that differ from their first token on, EOS."""
    prompt = [2, *tokens(prompt_length, seed)]
    return [[*prompt, 3 + rank, *tokens(length, seed * 100 + rank), EOS] for rank, length in enumerate(lengths)]


# With seed 3 for the last pair, a bias's gradient is a sum that nearly cancels, and most of what is left is rounding.
PAIRS = [responses(7, 4, 9, seed=1), responses(2, 5, 0, seed=2), responses(11, 3, 1, seed=5)]
ROWS = [row for pair in PAIRS for row in pair]
RANKINGS = [Ranking(pair) for pair in PAIRS]


# ----------------------------------------------------------------------------------------------------- the reference


def with_a_pad_inside(rows):
    return [[row[:3] + [1] + row[4:] for row in pair] for pair in rows]


def with_a_pad_at_the_end(rows):
    return [[row[:-1] + [1] for row in pair] for pair in rows]


TEXTS = {  # a change to the rows, and the pad id of config.json; tests/compare/reward.py has unchanged rows
    "a pad id inside": (with_a_pad_inside, 1),
    "a pad id at the end": (with_a_pad_at_the_end, 1),
    "EOS is the pad": (list, EOS),
}


@both_architectures
@both_precisions
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("text", TEXTS)
def test_rewards_loss_and_every_gradient(name, dtype, tolerance, side, text):
    change, pad = TEXTS[text]
    pairs = change(PAIRS)
    reference, model = twins(name, dtype, twin=RewardModel, pad_token_id=pad)
    rows = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
    padding = {"side": side, "length": max(map(len, rows)) + 1}
    # The reference reads the last token that is not the pad. If a text ends in the pad id, it is given another pad.
    ends_in_pad = pairs[0][0][-1] == pad
    misread = reference_rewards(reference, rows, **padding).detach()
    reference.config.pad_token_id = FILLER if ends_in_pad else pad
    expected = reference_rewards(reference, rows, **padding)

    batch = collate_rankings([Ranking(pair, margin) for pair, margin in zip(pairs, MARGINS, strict=True)])
    rewards = model(batch.input_ids, batch.positions, batch.rows)
    found = torch.cat([rewards[batch.chosen], rewards[batch.rejected]])
    assert difference(found, expected) < tolerance
    assert not ends_in_pad or difference(found, misread) > 0.1, "the reference is right: this text tests nothing"

    loss = mean_loss(rm_loss(model, CENTER), batch)
    expected_loss = reference_preference_loss(*expected.chunk(2), torch.tensor(MARGINS, dtype=dtype), CENTER)
    assert loss.dtype == dtype and difference(loss, expected_loss) < tolerance
    loss.backward(), expected_loss.backward()
    assert_gradients_agree(gradients(model), gradients(reference), tolerance)


def test_rewards_do_not_depend_on_company_or_order():
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        model = our_model(POST_LN, dtype)
        rows = [*ROWS, [2], tokens(20, 9)]
        alone = torch.cat([rewards_of(model, [row]) for row in rows])
        assert len({round(reward, 3) for reward in alone.tolist()}) == len(rows)
        for order in ([0, 1, 2, 3, 4, 5, 6, 7], [7, 3, 1, 5, 0, 6, 2, 4]):
            assert difference(rewards_of(model, [rows[number] for number in order]), alone[order]) < tolerance


def test_rewards_and_loss_under_autocast_are_float32():
    model = our_model(PRE_LN)
    batch = collate_rankings(RANKINGS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.decoder(batch.input_ids, batch.positions, batch.rows, None)
        rewards = model(batch.input_ids, batch.positions, batch.rows)
        total, _, _ = rm_loss(model)(batch)
    assert rewards.dtype == total.dtype == torch.float32
    # Not a bfloat16 number in a float32: the head itself is not rounded, as the hidden states were.
    last = (batch.rows >= 0).sum(1) - 1
    hidden = hidden[batch.rows[torch.arange(6), last]].float()
    assert difference(rewards, (hidden * model.score.weight).sum(1)) < 1e-6
    assert not torch.equal(rewards, rewards.bfloat16().float())


# --------------------------------------------------------------------------------------- a shared prompt, once or twice


@both_architectures
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_a_shared_prompt_is_two_separate_rows(name, dtype, tolerance):
    # Beside plain pairs: three responses, two of which share more; a row that is another's prefix; nothing in common.
    shared_further = [[2, 9, 9, 9, 5, EOS], [2, 9, 9, 9, 6, 6, EOS], [2, 9, 7, EOS]]
    groups = [*PAIRS, shared_further, [[2, 9, 8], [2, 9, 8, 7, EOS]], [[5, 6, 7], [8, 9]]]
    batch, twice = collate_rankings([Ranking(rows) for rows in groups]), pack([row for rows in groups for row in rows])
    assert len(batch.input_ids) < len(twice.input_ids)

    def step(model: RewardModel, packed) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        rewards = model(packed.input_ids, packed.positions, packed.rows)
        # Centred: otherwise the gradient of what shifts all rewards alike is only rounding.
        pairs = rewards[batch.chosen], rewards[batch.rejected]
        total, count = bradley_terry(*pairs, batch.margins, batch.weights, CENTER)
        (total / count).backward()
        return rewards, total, gradients(model)

    rewards, total, found = step(our_model(name, dtype), batch)
    expected_rewards, expected_total, expected = step(our_model(name, dtype), twice)
    assert difference(rewards, expected_rewards) < tolerance
    assert difference(total, expected_total) < tolerance
    assert_gradients_agree(found, expected, tolerance)


def test_every_row_and_pair_can_be_read_back():
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    rankings = []
    for _ in range(200):  # only tokens 0 and 1: rows that agree by chance, are prefixes of each other, or are equal
        prompt = [draw(0, 2) for _ in range(draw(0, 4))]
        rows = [prompt + [draw(0, 2) for _ in range(draw(1, 5))] for _ in range(draw(2, 5))]
        rankings.append(Ranking(rows, draw(-3, 4) / 4))
    batch = collate_rankings(rankings)
    flat = [row for ranking in rankings for row in ranking.responses]
    assert batch.rows.shape == (len(flat), max(map(len, flat)))
    for row, ids in zip(batch.rows, flat, strict=True):
        where = row[: len(ids)]
        assert (where >= 0).all() and (row[len(ids) :] == -1).all()
        assert batch.input_ids[where].tolist() == ids
        assert batch.positions[where].tolist() == list(range(len(ids)))
    # tests/test_batching.py checks what a tree shares; different rankings share nothing.
    trees = [share_prefixes(rows, [len(row) - 1 for row in rows]) for rows, _, _ in rankings]
    assert batch.input_ids.tolist() == [token for ids, _, _ in trees for token in ids]

    labels = torch.full_like(batch.input_ids, IGNORE_INDEX)  # only the best row's tokens are supervised
    expected, first = [], 0
    for rows, margin, _ in rankings:
        best = batch.rows[first][: len(rows[0])]
        labels[best] = batch.input_ids[best]
        assert torch.equal(best.diff(), torch.ones_like(best[1:])), "a token is predicted from the one before it"
        pairs = [*itertools.combinations(range(first, first + len(rows)), 2)]
        expected += [(chosen, rejected, margin, 1 / len(pairs)) for chosen, rejected in pairs]
        first += len(rows)
    assert torch.equal(batch.labels, labels)
    found = (batch.chosen, batch.rejected, batch.margins, batch.weights)
    assert list(zip(*(tensor.tolist() for tensor in found), strict=True)) == expected
    for name, tensor in batch._asdict().items():
        assert tensor.dtype == (torch.float64 if name in ("margins", "weights") else torch.int64), name


def test_only_the_first_response_may_be_known_to_be_better():
    rows = [[2, 5, 6], [2, 5, 7], [2, 8], [2, 5, 7, 9]]
    batch = collate_rankings([Ranking(rows, 0.5, best_only=True), Ranking(rows[:2], 1.0)])
    assert (batch.chosen.tolist(), batch.rejected.tolist()) == ([0, 0, 0, 4], [1, 2, 3, 5])
    assert batch.weights.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1])
    assert batch.margins.tolist() == [0.5, 0.5, 0.5, 1.0]


def test_the_pairs_of_a_batch_move():
    """Its tokens stay on the CPU: index lists are made from them, without waiting for a GPU."""
    batch = collate_rankings([Ranking([[2, 10], [2, 11]], 1)]).to(torch.device("meta"))
    assert isinstance(batch, PairBatch)
    assert [tensor.device.type for tensor in batch] == 4 * ["cpu"] + 4 * ["meta"]


@pytest.mark.parametrize("rows", [[], [[2, 10]], [[2, 10], []], [[], []]])
def test_rankings_of_too_few_rows(rows):
    with pytest.raises(ValueError, match="expected two rows or more, none empty"):
        collate_rankings([Ranking(rows)])


# --------------------------------------------------------------------------------------------------- the loss by itself


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_loss_by_hand():
    """Strengths 3 : 1 are preferred 3 times in 4; with margin ln 3 it is an even bet; equal rewards cost ln 2."""
    chosen, rejected = vector(math.log(3), math.log(3), 5.0), vector(0.0, 0.0, 5.0)
    margins, weights = vector(0.0, math.log(3), 0.0), vector(1.0, 1.0, 1.0)
    total, count = bradley_terry(chosen, rejected, margins, weights)
    assert total.item() == pytest.approx(-math.log(3 / 4) + 2 * math.log(2), abs=1e-14)
    assert count.item() == 3 and count.dtype == torch.int64
    centred, _ = bradley_terry(chosen, rejected, margins, weights, center=0.1)
    assert (centred - total).item() == pytest.approx(0.1 * (2 * math.log(3) ** 2 + 100), abs=1e-12)
    halved, count = bradley_terry(chosen[:2], rejected[:2], margins[:2], weights[:2] / 2, center=0.1)
    assert halved.item() == pytest.approx((-math.log(3 / 4) + math.log(2)) / 2 + 0.1 * math.log(3) ** 2, abs=1e-14)
    assert count.item() == 1


def test_metrics_by_hand():
    """Weighted sums, of which a tie is wrong; they take no part in the gradient."""
    chosen, rejected = vector(3.0, 1.0, -2.0).requires_grad_(), vector(1.0, 1.0, 0.5).requires_grad_()
    metrics = preference_metrics(chosen, rejected, vector(1.0, 0.5, 0.5))
    expected = {
        "accuracy": 1.0,
        "margin": 2 + 0 - 1.25,
        "reward_chosen": 3 + 0.5 - 1,
        "reward_rejected": 1 + 0.5 + 0.25,
    }
    assert {name: value.item() for name, value in metrics.items()} == expected
    assert not any(value.requires_grad for value in metrics.values())


def test_gradcheck():
    chosen, rejected = vector(0.3, -1.0, 2.0).requires_grad_(), vector(0.1, 1.5, 2.0).requires_grad_()
    margins, weights = vector(0.0, 1.0, -0.5), vector(1.0, 0.5, 0.5)
    assert torch.autograd.gradcheck(lambda c, r: bradley_terry(c, r, margins, weights, 0.1)[0], (chosen, rejected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_differences_of_any_size_are_finite(dtype):
    """A sure and right pair has loss and gradient 0; a sure and wrong one has the whole difference as loss, slope 1.

    Rewards in half precision are subtracted in float32: ±6e4 are float16 numbers, their difference is not.
    """
    for size in (1e4, 6e4):
        chosen = torch.tensor([size, -size, size, -size, 0.0], dtype=dtype, requires_grad=True)
        rejected = torch.tensor([-size, size, 0.0, 0.0, 0.0], dtype=dtype, requires_grad=True)
        exact = float(torch.tensor(size, dtype=dtype))
        total, _ = bradley_terry(chosen, rejected, torch.zeros(5), torch.ones(5))
        assert total.dtype == torch.promote_types(dtype, torch.float32)
        assert total.item() == pytest.approx(3 * exact + math.log(2), rel=1e-6)
        total.backward()
        assert chosen.grad.tolist() == [0, -1, 0, -1, -0.5]
        assert rejected.grad.tolist() == [0, 1, 0, 1, 0.5]
        centred, _ = bradley_terry(chosen, chosen, torch.zeros(5), torch.ones(5), center=0.01)
        assert centred.item() == pytest.approx(5 * math.log(2) + 0.01 * 16 * exact**2, rel=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_model_that_is_far_too_sure_still_has_finite_gradients(sign):
    model = our_model(PRE_LN)
    with torch.no_grad():
        model.score.weight.mul_(sign * 1e5)
    rewards = rewards_of(model, ROWS)
    gaps = rewards[0::2] - rewards[1::2]
    assert gaps.abs().max() > 1e4
    total, _, _ = rm_loss(model)(collate_rankings(RANKINGS))
    total.backward()
    assert total.item() == pytest.approx(-gaps.clamp(max=0).sum().item(), rel=1e-5)
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_margins_do_not_broadcast():
    """Each pair has its own: trl 0.11 takes margins (P,) from rewards (P, 1) and averages P × P numbers."""
    chosen, rejected = vector(1.0, 2.0, 3.0).requires_grad_(), vector(0.5, 2.5, 0.0)
    margins, weights = vector(0.0, 3.0, -1.0), vector(1.0, 1.0, 1.0)
    total, _ = bradley_terry(chosen, rejected, margins, weights)
    assert total.item() == pytest.approx(sum(math.log1p(math.exp(-x)) for x in (0.5, -3.5, 4.0)), abs=1e-12)
    [before] = torch.autograd.grad(total, chosen)
    changed, _ = bradley_terry(chosen, rejected, vector(0.0, -3.0, -1.0), weights)
    [after] = torch.autograd.grad(changed, chosen)
    assert (before != after).tolist() == [False, True, False]


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("shape", [(3, 1), (1,), (), (2,)])
def test_shapes_that_would_broadcast_are_refused(index, shape):
    values = [torch.ones(3)] * 4
    values[index] = torch.ones(shape)
    with pytest.raises(ValueError, match="shapes"):
        bradley_terry(*values)
    with pytest.raises(ValueError, match="shapes"):
        bradley_terry(*[torch.ones(3, 1)] * 4)


# ---------------------------------------------------------------------------------------------- more than two responses


def test_a_ranking_is_the_mean_over_its_pairs():
    rows = responses(6, 2, 5, 1, 4, seed=4)
    pairs = [Ranking([*pair], 0.5) for pair in itertools.combinations(rows, 2)]

    def step(rankings: list[Ranking], count: int) -> tuple[Tensor, dict[str, Tensor]]:
        model = our_model(POST_LN, torch.float64)
        batch = collate_rankings(rankings)
        total, found, _ = rm_loss(model, 0.1)(batch)
        assert found.item() == count and len(batch.chosen) == 6
        (total / count).backward()
        return total / count, gradients(model)

    (found, found_gradients), (expected, expected_gradients) = step([Ranking(rows, 0.5)], 1), step(pairs, 6)
    assert difference(found, expected) < 1e-12
    assert_gradients_agree(found_gradients, expected_gradients, 1e-12)


def test_a_prompt_counts_once_however_many_responses_it_has():
    loss = rm_loss(our_model(PRE_LN, torch.float64))
    three, five = responses(4, 3, 2, 5, seed=5), responses(3, 1, 2, 3, 4, 5, seed=6)
    rankings = [Ranking(three), Ranking(PAIRS[0], 1.0), Ranking(five, 0.25)]
    totals, counts, _ = zip(*(loss(collate_rankings([ranking])) for ranking in rankings), strict=True)
    assert [count.item() for count in counts] == [1, 1, 1]
    for order in itertools.permutations(rankings):
        total, count, _ = loss(collate_rankings(order))
        assert count.item() == 3
        assert difference(total, sum(totals)) < 1e-12


@pytest.mark.parametrize("num_prompts", [1, 7, 64])
def test_prompts_are_counted_exactly(num_prompts):
    """The weights of a prompt may add up to slightly less than 1; a count that is rounded down would lose it."""
    for size in range(2, 12):
        batch = collate_rankings([Ranking([[2, 5 + rank] for rank in range(size)])] * num_prompts)
        zeros = torch.zeros(len(batch.chosen))
        assert int(bradley_terry(zeros, zeros, batch.margins, batch.weights)[1]) == num_prompts


def test_accumulating_micro_batches_is_the_big_batch():
    """Through the loop's own function, with prompts of two, three and four responses."""
    rankings = [*RANKINGS, Ranking(responses(4, 3, 2, 5, seed=5), 0.5), Ranking(responses(2, 1, 3, 1, 6))]

    def step(batch_size: int) -> tuple[dict[str, float], dict[str, Tensor]]:
        model = our_model(POST_LN, torch.float64)
        loader = Loader(rankings, collate_rankings, batch_size, grad_accum=5)
        task = Task(model, rm_loss(model, CENTER), loader, loader, write_nothing, "prompts", torch.float64)
        return accumulate_gradient(task, 0, 0), gradients(model)

    expected, expected_gradients = step(5)
    assert expected["count"] == 5
    for batch_size in (1, 3, 4):
        sums, found = step(batch_size)
        assert sums == pytest.approx(expected, rel=1e-12)
        assert_gradients_agree(found, expected_gradients, 1e-12)


def test_swapped_labels_and_a_head_of_the_other_sign_give_the_opposite_rewards():
    """Why the control with swapped labels is right for half of the pairs on average over seeds, whatever it learns."""
    rewards = []
    for sign, pairs in ((1, PAIRS), (-1, [pair[::-1] for pair in PAIRS])):
        model = our_model(POST_LN, torch.float64)
        model.score.weight.data *= sign
        optimizer = torch.optim.SGD(model.parameters(), lr=0.003)
        for _ in range(10):
            mean_loss(rm_loss(model, CENTER), collate_rankings([Ranking(pair) for pair in pairs])).backward()
            optimizer.step()
            optimizer.zero_grad()
        rewards.append(rewards_of(model, ROWS).detach())
    start = rewards_of(our_model(POST_LN, torch.float64), ROWS)
    assert difference(rewards[0], start.detach()) > 0.1, "nothing was learned"
    assert difference(rewards[1], -rewards[0]) < 1e-12


# -------------------------------------------------------------------------------------------------------------- files


def saved_language_model(name: str, folder: Path) -> OPT:
    _, model = twins(name)
    save_model(model, folder)
    return model


# tests/compare/files.py does the same for the other architecture, in float32.
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_transformers_loads_a_saved_model(tmp_path, dtype):
    model = our_model(PRE_LN)
    save_model(model, tmp_path, dtype)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["architectures"] == ["OPTForSequenceClassification"] and values["pad_token_id"] == 1
    names = set(load_file(tmp_path / "model.safetensors"))
    assert "score.weight" in names and all(name.startswith("model.decoder.") for name in names - {"score.weight"})

    loader = transformers.AutoModelForSequenceClassification
    reference, loading = loader.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    assert type(reference) is transformers.OPTForSequenceClassification and reference.config.num_labels == 1
    assert reference.dtype == (dtype or torch.float32)
    model = model.to(dtype).float() if dtype else model
    assert difference(rewards_of(model, ROWS), reference_rewards(reference.float().eval(), ROWS)) < 1e-5

    again = load_reward_model(tmp_path)
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_shards_that_transformers_saved_are_loaded(tmp_path):
    reference = reference_model(PRE_LN, twin=RewardModel)
    reference.save_pretrained(tmp_path, max_shard_size="8KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    random_state = torch.get_rng_state()
    model = load_reward_model(tmp_path).eval()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert difference(rewards_of(model, ROWS), reference_rewards(reference, ROWS)) < 1e-5
    for dtype in (torch.float16, torch.float64):
        assert {tensor.dtype for tensor in load_reward_model(tmp_path, dtype=dtype).state_dict().values()} == {dtype}


@both_architectures
def test_a_new_reward_model_is_the_body_and_a_fresh_head(tmp_path, name):
    body = saved_language_model(name, tmp_path)
    random_state = torch.get_rng_state()
    model = load_reward_model(tmp_path, seed=0)
    assert torch.equal(torch.get_rng_state(), random_state), "a run would depend on what it started from"
    assert model.state_dict().keys() == body.state_dict().keys() | {"score.weight"}
    for name, tensor in body.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert all(parameter.requires_grad for parameter in model.parameters())

    head = model.score.weight
    assert torch.equal(load_reward_model(tmp_path, seed=0).score.weight, head)
    assert not torch.equal(load_reward_model(tmp_path, seed=1).score.weight, head)
    double = load_reward_model(tmp_path, seed=0, dtype=torch.float64)
    assert {tensor.dtype for tensor in double.state_dict().values()} == {torch.float64}
    assert torch.equal(double.score.weight, head.double())
    heads = torch.cat([load_reward_model(tmp_path, seed=seed).score.weight.flatten() for seed in range(100)])
    assert heads.std().item() == pytest.approx(model.config.init_std, rel=0.1)
    assert abs(heads.mean().item()) < 0.1 * model.config.init_std


def test_a_new_reward_model_from_a_tied_save_and_from_a_reward_model(tmp_path):
    body = saved_language_model(PRE_LN, tmp_path / "language")
    path = tmp_path / "language" / "model.safetensors"
    state = load_file(path)
    state["lm_head.weight"] = state.pop("model.decoder.embed_tokens.weight")  # as in the hub's conversions
    save_file(state, path, {"format": "pt"})
    assert torch.equal(load_reward_model(tmp_path / "language", seed=0).decoder.embed_tokens.weight, body.head)

    model = our_model(PRE_LN)
    save_model(model, tmp_path / "reward")
    assert torch.equal(load_reward_model(tmp_path / "reward", seed=0).score.weight, model.score.weight)


def assert_refused(load, folder: Path, *words: str) -> None:
    message = user_error(load, folder)
    for word in words:
        assert word in message


def test_a_language_model_given_for_a_reward_model_and_the_reverse(tmp_path):
    saved_language_model(PRE_LN, tmp_path / "language")
    words = ("language", "no score.weight", "this is a language model", "train_rm.py")
    assert_refused(load_reward_model, tmp_path / "language", *words)
    save_model(our_model(PRE_LN), tmp_path / "ours")
    reference_model(PRE_LN, twin=RewardModel).save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        assert_refused(load_model, folder, "config.json", "this is a reward model", "language model")


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        # of two labels
        ("score.weight", torch.ones(2, 32), ("1 of another shape, first score.weight", "[2, 32] for [1, 32]")),
        ("score.weight", torch.full((1, 32), torch.nan), ("score.weight holds NaN",)),
        ("score.bias", torch.ones(1), ("1 unexpected, first score.bias",)),
        ("model.decoder.layers.0.fc1.weight", None, ("1 missing, first decoder.layers.0.fc1.weight",)),
    ],
)
@pytest.mark.parametrize("load", [load_reward_model, lambda folder: load_reward_model(folder, seed=0)])
def test_weights_that_do_not_fit(tmp_path, load, name, tensor, words):
    save_model(our_model(PRE_LN), tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path) | {name: tensor}
    save_file({key: value for key, value in state.items() if value is not None}, path, {"format": "pt"})
    assert_refused(load, tmp_path, str(path), *words)


def test_folders_without_a_reward_model(tmp_path):
    for load in (load_reward_model, lambda folder: load_reward_model(folder, seed=0)):
        assert_refused(load, tmp_path / "nowhere", "nowhere", "config.json", "no such file")
        assert_refused(load, tmp_path, "config.json", "no such file")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert_refused(load_reward_model, tmp_path, "config.json", "gpt2")
    save_model(our_model(PRE_LN), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert_refused(load_reward_model, tmp_path, str(path), "truncated or damaged")
