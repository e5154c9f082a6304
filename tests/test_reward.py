"""Rewards, the Bradley-Terry loss and pairs of rows against the reference's classifier and the formula by hand."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from minift.batching import PairBatch, collate, collate_rankings
from minift.errors import UserError
from minift.losses import bradley_terry
from minift.model import OPT, OPTConfig, RewardModel, initialise
from minift.trainer import Task, accumulate_gradient
from minift.weights import load_model, load_reward_model, new_reward_model, save_model

SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "max_position_embeddings": 20,
    "dropout": 0.0,
}
VARIANTS = {
    "pre-LN": {},
    "post-LN, projected (350m)": {"do_layer_norm_before": False, "word_embed_proj_dim": 12},
}
PROJECTED = "post-LN, projected (350m)"
FILLER = 59  # a token that no text here has
EOS = 2
MARGINS, CENTER = (0.5, 0.0, -2.0), 0.25  # exact in float32, as batches hold margins
every_variant = pytest.mark.parametrize("variant", VARIANTS)
both_precisions = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])

Reference = transformers.OPTForSequenceClassification


def reference_model(variant: str, dtype: torch.dtype = torch.float32, **changes) -> Reference:
    """The reference with one label, and weights that leave nothing trivial."""
    config = transformers.OPTConfig(**(SMALL | VARIANTS[variant] | changes), num_labels=1)
    model = Reference._from_config(config, attn_implementation="sdpa").to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if "embed" in name else 0.3 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
            parameter.normal_(0.0, scale, generator=generator)
            if "layer_norm.weight" in name:
                parameter.add_(1.0)
    return model.eval()


def our_model(variant: str, dtype: torch.dtype = torch.float32, **changes) -> RewardModel:
    model = RewardModel(OPTConfig.from_dict(SMALL | VARIANTS[variant] | changes)).to(dtype)
    state = reference_model(variant, dtype, **changes).state_dict()
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()})
    return model.eval()


def tokens(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, FILLER, (length,), generator=generator).tolist()


def ranking(prompt_length: int, *lengths: int, seed: int = 0) -> list[list[int]]:
    """Whole rows: BOS, a prompt, responses that differ from their first token on, EOS."""
    prompt = [2, *tokens(prompt_length, seed)]
    return [[*prompt, 3 + place, *tokens(length, seed * 100 + place), EOS] for place, length in enumerate(lengths)]


PAIRS = [ranking(7, 4, 9, seed=1), ranking(2, 5, 0, seed=2), ranking(11, 3, 1, seed=3)]


def our_rewards(model: RewardModel, batch) -> Tensor:
    return model(batch.input_ids, batch.positions, batch.rows)  # (R,)


def our_loss(model: RewardModel, batch: PairBatch, center: float = 0.0) -> tuple[Tensor, Tensor]:
    rewards = our_rewards(model, batch)
    return bradley_terry(rewards[batch.better], rewards[batch.worse], batch.margins, batch.weights, center)


def difference(found: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    """max|a - b| / max|b|: relative to a tensor's largest entry, or to that of another one."""
    assert found.shape == expected.shape
    scale = expected if scale is None else scale
    return ((found - expected).abs().max() / scale.abs().max()).item()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("model."): parameter.grad for name, parameter in model.named_parameters()}


def assert_gradients_agree(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys() and "score.weight" in found
    for name, gradient in expected.items():
        # The softmax does not see a shift of all keys, so the gradient of their bias is 0 but for rounding: that of the
        # weight beside it tells how much rounding there may be.
        scale = expected[name.replace("bias", "weight")] if name.endswith("k_proj.bias") else gradient
        assert scale.abs().max() > 0, name
        assert difference(found[name], gradient, scale) < tolerance, name


# ----------------------------------------------------------------------------------------------------- the reference


def as_they_are(rows):
    return rows


def with_a_pad_inside(rows):
    return [[row[:3] + [1] + row[4:] for row in responses] for responses in rows]


def with_a_pad_at_the_end(rows):
    return [[row[:-1] + [1] for row in responses] for responses in rows]


TEXTS = {  # rows, and what the pad id is called in config.json
    "plain": (as_they_are, 1),
    "a pad id inside": (with_a_pad_inside, 1),
    "a pad id at the end": (with_a_pad_at_the_end, 1),
    "EOS is the pad": (as_they_are, EOS),
}


def reference_rewards(reference: Reference, rows: list[list[int]], side: str, filler: int) -> Tensor:
    """`rows` padded with `filler` on one side, and `filler` made known as what the reference looks for from the end."""
    length = max(len(row) for row in rows) + 1
    pads = [[filler] * (length - len(row)) for row in rows]
    ids = [pad + row if side == "left" else row + pad for row, pad in zip(rows, pads, strict=True)]
    ones = [[0] * len(pad) + [1] * len(row) for row, pad in zip(rows, pads, strict=True)]
    mask = [one if side == "left" else one[::-1] for one in ones]
    reference.config.pad_token_id = filler
    return reference(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.squeeze(1)


@every_variant
@both_precisions
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("text", TEXTS)
def test_scores_loss_and_every_gradient(variant, dtype, tolerance, side, text):
    change, pad = TEXTS[text]
    pairs = change(PAIRS)
    reference = reference_model(variant, dtype, pad_token_id=pad)
    model = our_model(variant, dtype, pad_token_id=pad)
    # The reference takes the last token that is not the pad. Where a text ends in the pad id it is given another one.
    ends_in_pad = pairs[0][0][-1] == pad
    rows = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
    expected = reference_rewards(reference, rows, side, FILLER if ends_in_pad else pad)

    batch = collate_rankings(list(zip(pairs, MARGINS, strict=True)))
    rewards = our_rewards(model, batch)
    found = torch.cat([rewards[batch.better], rewards[batch.worse]])
    assert difference(found, expected) < tolerance
    if ends_in_pad:
        misread = reference_rewards(reference, rows, side, pad)
        assert difference(found, misread) > 0.1, "the reference reads what it should: this text tests nothing"

    chosen, rejected = expected.chunk(2)
    margins = torch.tensor(MARGINS, dtype=dtype)
    expected_loss = -F.logsigmoid(chosen - rejected - margins).mean() + CENTER * ((chosen + rejected) ** 2).mean()
    expected_loss.backward()
    total, count = our_loss(model, batch, CENTER)
    assert count.item() == 3 and total.dtype == dtype
    (total / count).backward()
    assert difference(total / count, expected_loss) < tolerance
    assert_gradients_agree(gradients(model), gradients(reference), tolerance)


def test_rewards_do_not_depend_on_company_or_order():
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        model = our_model(PROJECTED, dtype)
        rows = [row for pair in PAIRS for row in pair] + [[2], tokens(20, 9)]
        alone = torch.cat([our_rewards(model, collate([(row, row)])) for row in rows])
        assert len({round(reward, 3) for reward in alone.tolist()}) == len(rows)
        for order in ([0, 1, 2, 3, 4, 5, 6, 7], [7, 3, 1, 5, 0, 6, 2, 4]):
            together = our_rewards(model, collate([(rows[place], rows[place]) for place in order]))
            assert difference(together, alone[order]) < tolerance


def test_rewards_and_loss_under_autocast_are_float32():
    model = our_model("pre-LN")
    batch = collate_rankings([(pair, 0.0) for pair in PAIRS])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.decoder(batch.input_ids, batch.positions, batch.rows, None)
        rewards = our_rewards(model, batch)
        total, _ = our_loss(model, batch)
    assert rewards.dtype == total.dtype == torch.float32
    # Not a bfloat16 number in a float32: the head itself is not rounded, whatever the hidden states were.
    last = (batch.rows >= 0).sum(1) - 1
    hidden = hidden[batch.rows[torch.arange(6), last]].float()
    assert difference(rewards, (hidden * model.score.weight).sum(1)) < 1e-6
    assert not torch.equal(rewards, rewards.bfloat16().float())


# --------------------------------------------------------------------------------------- a shared prompt, once or twice


@every_variant
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_a_shared_prompt_is_two_separate_rows(variant, dtype, tolerance):
    # Beside plain pairs: three responses, of which two agree further; a row that begins another; nothing in common.
    shared_further = [[2, 9, 9, 9, 5, EOS], [2, 9, 9, 9, 6, 6, EOS], [2, 9, 7, EOS]]
    rankings = [*PAIRS, shared_further, [[2, 9, 8], [2, 9, 8, 7, EOS]], [[5, 6, 7], [8, 9]]]
    shared, separate = our_model(variant, dtype), our_model(variant, dtype)
    batch = collate_rankings([(rows, 0.0) for rows in rankings])
    flat = [row for rows in rankings for row in rows]
    twice = collate([(row, row) for row in flat])
    assert len(batch.input_ids) < len(twice.input_ids)

    rewards = our_rewards(shared, batch)
    expected = our_rewards(separate, twice)
    assert difference(rewards, expected) < tolerance
    for model, values in ((shared, rewards), (separate, expected)):
        # Centred: without, the gradient of what shifts all rewards alike is nothing but rounding.
        better, worse = values[batch.better], values[batch.worse]
        total, count = bradley_terry(better, worse, batch.margins, batch.weights, CENTER)
        (total / count).backward()
        if model is shared:
            found = total.detach()
    assert difference(found, total.detach()) < tolerance
    assert_gradients_agree(gradients(shared), gradients(separate), tolerance)


def beginnings(rows: list[list[int]]) -> int:
    """How many different beginnings rows have, their own last tokens left out."""
    return len({tuple(row[:end]) for row in rows for end in range(1, len(row))})


def test_every_row_and_pair_can_be_read_back():
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    rankings = []
    for _ in range(200):  # tokens 0 and 1 alone: rows that agree by chance, begin each other, or are the same
        prompt = [draw(0, 2) for _ in range(draw(0, 4))]
        rows = [prompt + [draw(0, 2) for _ in range(draw(1, 5))] for _ in range(draw(2, 5))]
        rankings.append((rows, draw(-3, 4) / 4))
    batch = collate_rankings(rankings)
    flat = [row for rows, _ in rankings for row in rows]
    assert batch.rows.shape == (len(flat), max(map(len, flat)))
    for row, ids in zip(batch.rows, flat, strict=True):
        where = row[: len(ids)]
        assert (where >= 0).all() and (row[len(ids) :] == -1).all()
        assert batch.input_ids[where].tolist() == ids
        assert batch.positions[where].tolist() == list(range(len(ids)))
    assert set(batch.rows[batch.rows >= 0].tolist()) == set(range(len(batch.input_ids)))
    ends = [row[len(ids) - 1].item() for row, ids in zip(batch.rows, flat, strict=True)]
    assert all((batch.rows == end).sum() == 1 for end in ends), "a reward would be read at another row's token"

    assert len(batch.input_ids) == sum(beginnings(rows) + len(rows) for rows, _ in rankings)
    assert len(batch.input_ids) < 0.8 * sum(map(len, flat))

    labels = torch.full_like(batch.input_ids, -100)  # the best row's tokens alone
    first = 0
    for rows, _ in rankings:
        best = batch.rows[first][: len(rows[0])]
        labels[best] = batch.input_ids[best]
        assert torch.equal(best.diff(), torch.ones_like(best[1:])), "a token is predicted from the one before it"
        first += len(rows)
    assert torch.equal(batch.labels, labels)

    expected, first = [], 0
    for rows, margin in rankings:
        numbers = range(first, first + len(rows))
        pairs = [(better, worse) for better in numbers for worse in numbers if better < worse]
        expected += [(better, worse, margin, 1 / len(pairs)) for better, worse in pairs]
        first += len(rows)
    found = (batch.better, batch.worse, batch.margins, batch.weights)
    assert list(zip(*(tensor.tolist() for tensor in found), strict=True)) == expected
    for name, tensor in batch._asdict().items():
        assert tensor.dtype == (torch.float64 if name in ("margins", "weights") else torch.int64), name


def test_only_the_first_may_be_known_to_be_better():
    rows = [[2, 5, 6], [2, 5, 7], [2, 8], [2, 5, 7, 9]]
    batch = collate_rankings([(rows, 0.5, True), (rows[:2], 1.0, False)])
    assert (batch.better.tolist(), batch.worse.tolist()) == ([0, 0, 0, 4], [1, 2, 3, 5])
    assert batch.weights.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1])
    assert batch.margins.tolist() == [0.5, 0.5, 0.5, 1.0]


def test_a_batch_moves_as_a_whole():
    batch = collate_rankings([([[2, 10], [2, 11]], 1)]).to(torch.device("meta"))
    assert isinstance(batch, PairBatch) and {tensor.device.type for tensor in batch} == {"meta"}


@pytest.mark.parametrize("rows", [[], [[2, 10]], [[2, 10], []], [[], []]])
def test_what_is_no_ranking(rows):
    with pytest.raises(ValueError, match="expected 2 rows or more"):
        collate_rankings([(rows, 0.0)])


# --------------------------------------------------------------------------------------------------- the loss by itself


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_loss_by_hand():
    """Strengths 3 : 1 are preferred 3 times in 4; with margin ln 3 it is an even bet; equal rewards cost ln 2."""
    better, worse = vector(math.log(3), math.log(3), 5.0), vector(0.0, 0.0, 5.0)
    margins, weights = vector(0.0, math.log(3), 0.0), vector(1.0, 1.0, 1.0)
    total, count = bradley_terry(better, worse, margins, weights)
    assert total.item() == pytest.approx(-math.log(3 / 4) + 2 * math.log(2), abs=1e-14)
    assert count.item() == 3 and count.dtype == torch.int64
    centred, _ = bradley_terry(better, worse, margins, weights, center=0.1)
    assert (centred - total).item() == pytest.approx(0.1 * (2 * math.log(3) ** 2 + 100), abs=1e-12)
    halved, count = bradley_terry(better[:2], worse[:2], margins[:2], weights[:2] / 2, center=0.1)
    assert halved.item() == pytest.approx((-math.log(3 / 4) + math.log(2)) / 2 + 0.1 * math.log(3) ** 2, abs=1e-14)
    assert count.item() == 1


def test_gradcheck():
    better, worse = vector(0.3, -1.0, 2.0).requires_grad_(), vector(0.1, 1.5, 2.0).requires_grad_()
    margins, weights = vector(0.0, 1.0, -0.5), vector(1.0, 0.5, 0.5)
    assert torch.autograd.gradcheck(lambda b, w: bradley_terry(b, w, margins, weights, 0.1)[0], (better, worse))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_differences_of_any_size_are_finite(dtype):
    """A pair that is sure and right costs nothing and teaches nothing; sure and wrong, the whole difference at slope 1.

    Rewards of half precision are taken apart in float32: ±6e4 are float16 numbers, their difference is not.
    """
    for size in (1e4, 6e4):
        better = torch.tensor([size, -size, size, -size, 0.0], dtype=dtype, requires_grad=True)
        worse = torch.tensor([-size, size, 0.0, 0.0, 0.0], dtype=dtype, requires_grad=True)
        exact = float(torch.tensor(size, dtype=dtype))
        total, _ = bradley_terry(better, worse, torch.zeros(5), torch.ones(5))
        assert total.dtype == torch.promote_types(dtype, torch.float32)
        assert total.item() == pytest.approx(3 * exact + math.log(2), rel=1e-6)
        total.backward()
        assert better.grad.tolist() == [0, -1, 0, -1, -0.5]
        assert worse.grad.tolist() == [0, 1, 0, 1, 0.5]
        centred, _ = bradley_terry(better, better, torch.zeros(5), torch.ones(5), center=0.01)
        assert centred.item() == pytest.approx(5 * math.log(2) + 0.01 * 16 * exact**2, rel=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_model_that_is_far_too_sure_still_has_finite_gradients(sign):
    model = our_model("pre-LN")
    with torch.no_grad():
        model.score.weight.mul_(sign * 1e5)
    batch = collate_rankings([(pair, 0.0) for pair in PAIRS])
    rewards = our_rewards(model, batch)
    gaps = rewards[batch.better] - rewards[batch.worse]
    assert gaps.abs().max() > 1e4
    total, _ = our_loss(model, batch)
    total.backward()
    assert total.item() == pytest.approx(-gaps.clamp(max=0).sum().item(), rel=1e-5)
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_margins_do_not_broadcast():
    """Each pair has its own: the old reference takes margins (P,) from rewards (P, 1) and averages P × P numbers."""
    better, worse = vector(1.0, 2.0, 3.0).requires_grad_(), vector(0.5, 2.5, 0.0)
    margins, weights = vector(0.0, 3.0, -1.0), vector(1.0, 1.0, 1.0)
    total, _ = bradley_terry(better, worse, margins, weights)
    assert total.item() == pytest.approx(sum(math.log1p(math.exp(-x)) for x in (0.5, -3.5, 4.0)), abs=1e-12)
    [before] = torch.autograd.grad(total, better)
    changed, _ = bradley_terry(better, worse, vector(0.0, -3.0, -1.0), weights)
    [after] = torch.autograd.grad(changed, better)
    assert (before != after).tolist() == [False, True, False]


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("shape", [(3, 1), (1,), (), (2,)])
def test_shapes_that_would_broadcast_are_refused(place, shape):
    values = [torch.ones(3)] * 4
    values[place] = torch.ones(shape)
    with pytest.raises(ValueError, match="shapes"):
        bradley_terry(*values)
    with pytest.raises(ValueError, match="shapes"):
        bradley_terry(*[torch.ones(3, 1)] * 4)


# ---------------------------------------------------------------------------------------------- more than two responses


def test_a_ranking_is_the_mean_over_its_pairs():
    model = our_model(PROJECTED, torch.float64)
    ranked = ranking(6, 2, 5, 1, 4, seed=4)
    batch = collate_rankings([(ranked, 0.5)])
    total, count = our_loss(model, batch, 0.1)
    assert count.item() == 1 and len(batch.better) == 6
    total.backward()
    found = gradients(model)

    other = our_model(PROJECTED, torch.float64)
    pairs = collate_rankings([([better, worse], 0.5) for better, worse in itertools.combinations(ranked, 2)])
    expected, count = our_loss(other, pairs, 0.1)
    assert count.item() == 6
    (expected / 6).backward()
    assert difference(total, expected / 6) < 1e-7  # 1/6 is kept as a float32
    assert_gradients_agree(found, gradients(other), 1e-7)


def test_a_prompt_counts_once_whatever_its_responses():
    model = our_model("pre-LN", torch.float64)
    rankings = [(ranking(4, 3, 2, 5, seed=5), 0.0), (PAIRS[0], 1.0), (ranking(3, 1, 2, 3, 4, 5, seed=6), 0.25)]
    losses = [our_loss(model, collate_rankings([one])) for one in rankings]
    assert [count.item() for _, count in losses] == [1, 1, 1]
    for order in itertools.permutations(rankings):
        total, count = our_loss(model, collate_rankings(order))
        assert count.item() == 3
        assert difference(total, sum(loss for loss, _ in losses)) < 1e-12


@pytest.mark.parametrize("num_prompts", [1, 7, 64])
def test_prompts_are_counted_exactly(num_prompts):
    """In float32 a prompt's weights may add up to a little less than 1, of which a rounded-down count loses all."""
    for size in range(2, 12):
        batch = collate_rankings([([[2, 5 + place] for place in range(size)], 0.0)] * num_prompts)
        nothing = torch.zeros(len(batch.better))
        assert int(bradley_terry(nothing, nothing, batch.margins, batch.weights)[1]) == num_prompts


def test_accumulating_micro_batches_is_the_big_batch():
    """Through the loop's own function, with prompts of two, three and four responses."""
    rankings = [(pair, 0.0) for pair in PAIRS] + [(ranking(4, 3, 2, 5, seed=5), 0.5), (ranking(2, 1, 3, 1, 6), 0.0)]

    def step(sizes: list[int]) -> tuple[dict[str, float], dict[str, Tensor]]:
        model = our_model(PROJECTED, torch.float64)
        remaining = iter(rankings)
        batches = [collate_rankings([*itertools.islice(remaining, size)]) for size in sizes]
        task = Task(model, lambda batch: (*our_loss(model, batch, CENTER), {}), lambda _: batches, list, 1, print, "")
        return accumulate_gradient(task, 0, torch.device("cpu"), torch.float64), gradients(model)

    expected, expected_gradients = step([5])
    assert expected["count"] == 5
    for sizes in ([1, 1, 1, 1, 1], [2, 3], [4, 1]):
        sums, found = step(sizes)
        assert sums["count"] == 5 and sums["tokens"] == expected["tokens"]
        assert sums["loss"] == pytest.approx(expected["loss"], rel=1e-12)
        assert_gradients_agree(found, expected_gradients, 1e-12)


# -------------------------------------------------------------------------------------------------------------- files


def language_model(variant: str, folder: Path) -> OPT:
    model = OPT(OPTConfig.from_dict(SMALL | VARIANTS[variant]))
    initialise(model, seed=3)
    save_model(model, folder)
    return model


@every_variant
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_transformers_loads_what_is_saved(tmp_path, variant, dtype):
    model = our_model(variant)
    save_model(model, tmp_path, dtype)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["architectures"] == ["OPTForSequenceClassification"] and values["pad_token_id"] == 1
    names = set(load_file(tmp_path / "model.safetensors"))
    assert "score.weight" in names and all(name.startswith("model.decoder.") for name in names - {"score.weight"})

    loader = transformers.AutoModelForSequenceClassification
    reference, loading = loader.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    assert type(reference) is Reference and reference.config.num_labels == 1
    assert reference.dtype == (dtype or torch.float32)
    rows = [row for pair in PAIRS for row in pair]
    model = model.to(dtype).float() if dtype else model
    expected = reference_rewards(reference.float().eval(), rows, "right", 1)
    assert difference(our_rewards(model, collate([(row, row) for row in rows])), expected) < 1e-5

    again = load_reward_model(tmp_path)
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@every_variant
@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "8KB"}])
def test_what_transformers_saves_is_loaded(tmp_path, variant, shards):
    reference = reference_model(variant)
    reference.save_pretrained(tmp_path, **shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(shards)
    random_state = torch.get_rng_state()
    model = load_reward_model(tmp_path).eval()
    assert torch.equal(torch.get_rng_state(), random_state)
    rows = [row for pair in PAIRS for row in pair]
    expected = reference_rewards(reference, rows, "right", 1)
    assert difference(our_rewards(model, collate([(row, row) for row in rows])), expected) < 1e-5
    for dtype in (torch.float16, torch.float64):
        assert {tensor.dtype for tensor in load_reward_model(tmp_path, dtype=dtype).state_dict().values()} == {dtype}


@every_variant
def test_a_new_reward_model_is_the_body_and_a_fresh_head(tmp_path, variant):
    body = language_model(variant, tmp_path)
    random_state = torch.get_rng_state()
    model = new_reward_model(tmp_path, seed=0)
    assert torch.equal(torch.get_rng_state(), random_state), "a run would depend on what it started from"
    assert model.state_dict().keys() == body.state_dict().keys() | {"score.weight"}
    for name, tensor in body.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert all(parameter.requires_grad for parameter in model.parameters())

    head = model.score.weight
    assert torch.equal(new_reward_model(tmp_path, seed=0).score.weight, head)
    assert not torch.equal(new_reward_model(tmp_path, seed=1).score.weight, head)
    double = new_reward_model(tmp_path, seed=0, dtype=torch.float64)
    assert {tensor.dtype for tensor in double.state_dict().values()} == {torch.float64}
    assert torch.equal(double.score.weight, head.double())
    heads = torch.cat([new_reward_model(tmp_path, seed=seed).score.weight.flatten() for seed in range(100)])
    assert heads.std().item() == pytest.approx(model.config.init_std, rel=0.1)
    assert abs(heads.mean().item()) < 0.1 * model.config.init_std


def test_a_new_reward_model_from_a_tied_save_and_from_a_reward_model(tmp_path):
    body = language_model("pre-LN", tmp_path / "language")
    path = tmp_path / "language" / "model.safetensors"
    state = load_file(path)
    state["lm_head.weight"] = state.pop("model.decoder.embed_tokens.weight")  # as the conversions on the hub have it
    save_file(state, path, {"format": "pt"})
    assert torch.equal(new_reward_model(tmp_path / "language", seed=0).decoder.embed_tokens.weight, body.head)

    model = our_model("pre-LN")
    save_model(model, tmp_path / "reward")
    assert torch.equal(new_reward_model(tmp_path / "reward", seed=0).score.weight, model.score.weight)


def test_fresh_weights_cover_the_head():
    model = RewardModel(OPTConfig.from_dict(SMALL))
    with torch.no_grad():
        model.score.weight.fill_(torch.nan)
    initialise(model, seed=0)
    assert model.score.weight.isfinite().all() and model.score.weight.any()


def assert_refused(load, folder: Path, *words: str, **options) -> None:
    with pytest.raises(UserError) as refusal:
        load(folder, **options)
    message = str(refusal.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_one_kind_of_model_given_for_the_other(tmp_path):
    language_model("pre-LN", tmp_path / "language")
    words = ("language", "no score.weight", "this is a language model", "train_rm.py")
    assert_refused(load_reward_model, tmp_path / "language", *words)
    for layout in ("ours", "theirs"):
        if layout == "ours":
            save_model(our_model("pre-LN"), tmp_path / layout)
        else:
            reference_model("pre-LN").save_pretrained(tmp_path / layout)
        assert_refused(load_model, tmp_path / layout, "config.json", "this is a reward model", "language model")


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("score.weight", torch.ones(2, 32), ("1 misshapen (score.weight", "[2, 32] for [1, 32]")),  # two labels
        ("score.weight", torch.full((1, 32), torch.nan), ("score.weight holds NaN",)),
        ("score.bias", torch.ones(1), ("1 unexpected (score.bias)",)),
        ("model.decoder.layers.0.fc1.weight", None, ("1 missing (decoder.layers.0.fc1.weight)",)),
    ],
)
@pytest.mark.parametrize("load", [load_reward_model, lambda folder: new_reward_model(folder, seed=0)])
def test_weights_that_do_not_fit(tmp_path, load, name, tensor, words):
    save_model(our_model("pre-LN"), tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path) | {name: tensor}
    save_file({key: value for key, value in state.items() if value is not None}, path, {"format": "pt"})
    assert_refused(load, tmp_path, str(path), *words)


def test_folders_that_are_no_reward_model(tmp_path):
    for load in (load_reward_model, lambda folder: new_reward_model(folder, seed=0)):
        assert_refused(load, tmp_path / "nowhere", "nowhere", "no such folder")
        assert_refused(load, tmp_path, "config.json", "no such file")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert_refused(load_reward_model, tmp_path, "config.json", "gpt2")
    save_model(our_model("pre-LN"), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert_refused(load_reward_model, tmp_path, str(path), "truncated or damaged")
    assert_refused(load_reward_model, tmp_path, "--revision", revision="main")


def test_labels_turned_round_and_a_head_of_the_other_sign_give_the_opposite_rewards():
    """Why the control with shuffled labels is right for half of the pairs on average over seeds, whatever it learns."""
    rewards = []
    for sign, pairs in ((1, PAIRS), (-1, [pair[::-1] for pair in PAIRS])):
        model = our_model(PROJECTED, torch.float64)
        model.score.weight.data *= sign
        optimizer = torch.optim.SGD(model.parameters(), lr=0.003)
        for _ in range(10):
            loss, count = our_loss(model, collate_rankings([(pair, 0.0) for pair in pairs]), CENTER)
            (loss / count).backward()
            optimizer.step()
            optimizer.zero_grad()
        rewards.append(our_rewards(model, collate([(row, row) for pair in PAIRS for row in pair])).detach())
    start = our_rewards(our_model(PROJECTED, torch.float64), collate([(row, row) for pair in PAIRS for row in pair]))
    assert difference(rewards[0], start.detach()) > 0.1, "nothing was learned"
    assert difference(rewards[1], -rewards[0]) < 1e-12
