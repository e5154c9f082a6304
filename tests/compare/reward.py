"""Reward modelling against trl's `RewardTrainer`: as `sft`, and accuracy, margin and scores; margins and centring on.

trl averages the means of an update's micro-batches, minift all its pairs: the same unless their sizes differ, so the
rows here make an epoch end in an update of one short micro-batch.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, OPTForSequenceClassification
from trl import RewardConfig, RewardTrainer

from minift.batching import PairBatch, collate_rankings
from minift.datasets import PAIR_KINDS, load_rows
from minift.encode import Ranking, encode_rankings, responses_of, split_row
from minift.errors import UserError
from minift.losses import bradley_terry
from minift.model import RewardModel, set_dropout
from minift.prompts import TEMPLATES
from minift.scoring import score_rows
from minift.tokenizer import Tokenizer, load_tokenizer
from minift.weights import new_reward_model, read_config
from tests.compare import Check, Setting
from tests.compare.training import (
    DTYPES,
    SEED,
    TOLERANCE,
    Outcome,
    Plan,
    compare_outcomes,
    how_much,
    largest_absolute,
    plans,
    quiet,
    reference_model,
    reference_tokenizer,
    reference_values,
    train_minift,
    train_reference,
    with_rounding,
)

ROWS, QUICK_ROWS = 81, 5  # an epoch ends in an update of one pair
# A fifth of trl's. With trl's own, training amplifies rounding: on two threads trl in float32 ended up to 0.013 of a
# score from trl in float64.
LR = 2e-5
CENTER = 0.01
MARGINS = (0.0, 0.25, 0.5, 1.0)  # of the pairs in turn
TEMPLATE = TEMPLATES["dialogue"]
LONGEST = 1024  # trl's


def compare(setting: Setting) -> Iterator[Check]:
    setting.progress("reward: reading and encoding pairs")
    limit = min(LONGEST, read_config(setting.model / "config.json").max_position_embeddings)
    rankings, texts = material(setting, load_tokenizer(setting.model), limit)
    reference = remembered if setting.quick else train_trl
    exact: dict[str, tuple[Outcome, list[float]]] = {}
    for number, plan in enumerate(plans(len(rankings), LR, quick=setting.quick)):
        setting.progress(f"reward: trl trains, {plan.name}")
        theirs, prepared, their_scores = reference(setting.model, texts, plan, limit)
        if number == 0:
            ours = [(*ranking.responses, ranking.margin) for ranking in rankings]
            wrong = sum(a != b for a, b in zip(ours, prepared, strict=False)) + abs(len(ours) - len(prepared))
            yield Check("reward", "ids and margins that are trained on", f"{len(ours)} pairs", wrong, 0)
        setting.progress(f"reward: minift trains, {plan.name}")
        model = new_reward_model(setting.model, seed=SEED, dtype=DTYPES[plan.dtype])
        ours = train_own(model, rankings, plan, setting.scratch / "reward" / plan.name)
        setting.curves[f"Reward model, {plan.name}"] = {
            "minift": [step["loss"] for step in ours.steps],
            "trl": [step["loss"] for step in theirs.steps],
        }
        on = how_much(plan, len(rankings), "pairs")
        true, true_scores = exact.setdefault(plan.order, (theirs, their_scores))  # float64 comes first
        yield from compare_outcomes("reward", plan, on, ours, theirs, true)
        yield from compare_metrics(plan, on, ours, theirs, true)
        scores = score_rows(model, [row for ranking in rankings for row in ranking.responses], 8)
        difference, _ = largest_absolute(scores, their_scores)
        rounding = [largest_absolute(side, true_scores)[0] for side in (scores, their_scores)]
        what, on = f"scores at the end, {plan.name}", f"{len(scores)} responses"
        check = Check("reward", what, on, difference, TOLERANCE[plan.dtype])
        yield with_rounding(check, plan, *rounding)


def compare_metrics(plan: Plan, on: str, minift: Outcome, reference: Outcome, exact: Outcome) -> Iterator[Check]:
    """What trl logs of each step about its pairs: the share that is ranked rightly, mean margin and mean score."""
    ours, theirs, true = (metrics(outcome) for outcome in (minift, reference, exact))
    for name in ours:
        difference, where = largest_absolute(ours[name], theirs[name])
        # trl's shares are float32 numbers whatever the model's.
        allowed = 1e-6 if name == "accuracy" else TOLERANCE[plan.dtype]
        check = Check("reward", f"{name} in each step, {plan.name}", on, difference, allowed, where)
        rounding = [largest_absolute(side[name], true[name])[0] for side in (ours, theirs)]
        yield check if name == "accuracy" else with_rounding(check, plan, *rounding)


def metrics(outcome: Outcome) -> dict[str, list[float]]:
    """By a name for people, from minift's steps or trl's."""
    return {
        "accuracy": [step["accuracy"] for step in outcome.steps],
        "mean margin": [step["margin"] for step in outcome.steps],
        "mean score": [
            step["mean_reward"] if "mean_reward" in step else (step["reward_chosen"] + step["reward_rejected"]) / 2
            for step in outcome.steps
        ],
    }


def material(setting: Setting, tokenizer: Tokenizer, limit: int) -> tuple[list[Ranking], tuple[tuple, ...]]:
    """The first pairs that can be learned from: as minift encodes them, and as texts and a margin for trl.

    Pairs that spell a special token are left to the sections that are about them; trl takes no rankings of more.
    """
    special = reference_tokenizer(setting.model).all_special_tokens
    rows = [
        row
        for row in load_rows(setting.pairs, PAIR_KINDS)
        if len(responses_of(row)) == 2 and not any(token in str(row) for token in special)
    ]
    if not rows:
        raise UserError(f"{setting.pairs}: no row of two responses, expected pairs of chosen and rejected")
    count = QUICK_ROWS if setting.quick else ROWS
    # Some may have nothing to learn from.
    rows = [{**row, "margin": MARGINS[number % len(MARGINS)]} for number, row in enumerate(rows[: 2 * count])]
    rankings, kept, _ = encode_rankings(
        rows,
        tokenizer,
        TEMPLATE,
        max_length=limit,
        positions=limit,
        margin_field="margin",
        source=str(setting.pairs),
    )
    texts = []
    for row in [rows[index] for index in kept[:count]]:
        sides = []
        for response in responses_of(row):
            prompt = row.get("prompt")
            asked = {"prompt": "", "completion": response}
            if prompt is not None:
                asked = {"instruction": prompt, "output": response}
            before, after = split_row(asked, tokenizer, TEMPLATE, "")
            sides.append("".join(after[:-1]))  # trl adds the end token itself
        texts.append(("".join(before), *sides, row["margin"]))
    return rankings[:count], tuple(texts)


def train_own(model: RewardModel, rankings: list[Ranking], plan: Plan, scratch: Path) -> Outcome:
    """The wiring of train_rm.py."""
    set_dropout(model, 0.0)

    def loss(batch: PairBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        rewards = model(batch.input_ids, batch.positions, batch.rows)  # (R,)
        better, worse = rewards[batch.better], rewards[batch.worse]  # (P,)
        metrics = {
            "accuracy": better > worse,
            "margin": better - worse,
            "reward_chosen": better,
            "reward_rejected": worse,
        }
        sums = {name: (batch.weights * values.detach()).sum() for name, values in metrics.items()}
        return *bradley_terry(better, worse, batch.margins, batch.weights, CENTER), sums

    def collated(numbers: list[int]) -> PairBatch:
        return collate_rankings([rankings[number] for number in numbers])

    return train_minift(model, plan, len(rankings), collated, loss, "pairs", scratch)


def train_trl(
    folder: Path, texts: tuple[tuple, ...], plan: Plan, limit: int
) -> tuple[Outcome, list[tuple[list[int], list[int], float]], list[float]]:
    """trl's training, the ids and margins it prepared, and the scores it then gives both sides of every pair."""
    names = ("prompt", "chosen", "rejected", "margin")
    with quiet(), TemporaryDirectory() as scratch:
        values = reference_values(plan, Path(scratch))
        model = start_model(folder, plan.dtype)
        outcome, prepared = train_reference(
            RewardTrainer,
            model=model,
            processing_class=reference_tokenizer(folder),
            train_dataset=Dataset.from_list([dict(zip(names, text, strict=True)) for text in texts]),
            args=RewardConfig(**values, max_length=limit, center_rewards_coefficient=CENTER),
        )
    model.eval()
    scores = []
    with torch.no_grad():
        for row in prepared:
            for side in ("chosen_ids", "rejected_ids"):
                scores.append(model(input_ids=torch.tensor([row[side]])).logits.item())
    return outcome, [(row["chosen_ids"], row["rejected_ids"], row["margin"]) for row in prepared], scores


# Planting a fault in minift leaves trl as it was.
remembered = functools.cache(train_trl)


def start_model(folder: Path, dtype: str) -> OPTForSequenceClassification:
    """transformers' body of the language model under the very head that minift draws."""
    body = reference_model(AutoModelForCausalLM, folder, dtype)
    config = body.config
    config.num_labels = 1
    model = OPTForSequenceClassification(config).to(DTYPES[dtype])
    model.model.load_state_dict(body.model.state_dict())
    head = new_reward_model(folder, seed=SEED, dtype=DTYPES[dtype]).score.weight
    model.score.weight.data.copy_(head.data)
    return model
