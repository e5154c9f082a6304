"""Reward modelling against trl's `RewardTrainer`: as `sft`, with accuracy, margin and scores; margins and centring on.

trl averages the means of a step's micro-batches, minift averages all its pairs. That is the same unless their sizes
differ, so each epoch here ends in a step of one short micro-batch.
"""

import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, OPTForSequenceClassification
from trl import RewardTrainer

from minift.errors import UserError
from minift.files.datasets import PAIR_SCHEMAS, Row
from minift.files.tokenizer import load_tokenizer
from minift.files.weights import load_reward_model
from minift.pairs import Ranking, collate_rankings, encode_rankings, responses_of
from minift.prompts import TEMPLATES, render
from minift.scoring import score_rows
from minift.tokenizer import Tokenizer
from tests.compare import Check, Setting
from tests.compare.training import (
    DTYPES,
    SEED,
    TOLERANCE,
    Outcome,
    Plan,
    compare_outcomes,
    compare_prepared,
    extent_of,
    largest_absolute,
    length_limit,
    plain_rows,
    plans,
    reference_model,
    train_minift,
    train_reference,
    with_rounding,
)
from tests.loop import rm_loss
from tests.reference import reference_rewards

ROWS, QUICK_ROWS = 81, 5  # an epoch ends in a step of one pair
# A fifth of trl's. At trl's own rate training amplifies rounding: on two threads trl's float32 scores ended up to 0.013
# from its float64 scores.
LR = 2e-5
CENTER = 0.01
MARGINS = (0.0, 0.25, 0.5, 1.0)  # of the pairs in turn
TEMPLATE = TEMPLATES["dialogue"]

Texts = tuple[tuple[str, str, str, float], ...]  # prompt, chosen, rejected and margin of each pair


def compare(setting: Setting) -> Iterator[Check]:
    setting.progress("reward: reading and encoding pairs")
    rankings, texts = encode_for_both(setting)
    rows = [row for ranking in rankings for row in ranking.responses]
    reference = remembered if setting.quick else train_trl
    exact: dict[str, Outcome] = {}
    for number, plan in enumerate(plans(len(rankings), LR, quick=setting.quick)):
        setting.progress(f"reward: trl trains, {plan.name}")
        theirs, prepared = reference(setting.model, texts, plan, length_limit(setting))
        if number == 0:
            yield compare_prepared("reward", "ids and margins that are trained on", "pairs", rankings, prepared)
        setting.progress(f"reward: minift trains, {plan.name}")
        model = load_reward_model(setting.model, seed=SEED, dtype=DTYPES[plan.dtype])
        ours = train_minift(model, plan, rankings, collate_rankings, rm_loss(model, CENTER), "pairs")
        ours = ours._replace(scores=score_rows(model, rows, 8))
        on = extent_of(plan, len(rankings), "pairs")
        true = exact.setdefault(plan.order, theirs)  # float64 comes first
        yield from compare_outcomes(setting, "reward", plan, on, ours, theirs, true)
        yield from compare_metrics(plan, on, ours, theirs, true)


def compare_metrics(plan: Plan, on: str, minift: Outcome, reference: Outcome, exact: Outcome) -> Iterator[Check]:
    """Compare what trl logs about the pairs of each step, and the scores of all responses after training."""
    ours, theirs, true = (metrics(outcome) for outcome in (minift, reference, exact))
    for name in ours:
        difference, where = largest_absolute(ours[name], theirs[name])
        if name == "accuracy":  # trl's are float32 numbers for any model
            yield Check("reward", f"{name} in each step, {plan.name}", on, difference, 1e-6, where)
            continue
        what, how_many = f"{name} in each step, {plan.name}", on
        if name == "scores":
            what, how_many, where = f"scores at the end, {plan.name}", f"{len(ours[name])} responses", ""
        check = Check("reward", what, how_many, difference, TOLERANCE[plan.dtype], where)
        yield with_rounding(check, plan, *(largest_absolute(side[name], true[name])[0] for side in (ours, theirs)))


def metrics(outcome: Outcome) -> dict[str, list[float]]:
    """Return what the table compares by name, from minift's steps or trl's."""
    return {
        "accuracy": [step["accuracy"] for step in outcome.steps],
        "mean margin": [step["margin"] for step in outcome.steps],
        "mean score": [
            step["mean_reward"] if "mean_reward" in step else (step["reward_chosen"] + step["reward_rejected"]) / 2
            for step in outcome.steps
        ],
        "scores": [*outcome.scores],
    }


def encode_for_both(setting: Setting) -> tuple[list[Ranking], Texts]:
    """Return the first pairs that have something to learn: encoded by minift, and as texts and margins for trl."""
    tokenizer = load_tokenizer(setting.model)
    # trl does not take rankings of more than two responses.
    rows = [row for row in plain_rows(setting, setting.pairs, PAIR_SCHEMAS) if len(responses_of(row)) == 2]
    if not rows:
        raise UserError(f"{setting.pairs}: no row with two responses, expected pairs of chosen and rejected")
    count = QUICK_ROWS if setting.quick else ROWS
    rows = rows[: 2 * count]  # some may be dropped
    for number, row in enumerate(rows):
        row["margin"] = MARGINS[number % len(MARGINS)]
    limit = length_limit(setting)
    encoded = encode_rankings(
        rows, tokenizer, TEMPLATE, max_length=limit, margin_field="margin", source=str(setting.pairs)
    )
    texts = [(*texts_of(row, tokenizer), row["margin"]) for row in encoded.rows[:count]]
    return encoded.examples[:count], tuple(texts)


def texts_of(row: Row, tokenizer: Tokenizer) -> list[str]:
    """Return a pair's prompt, chosen and rejected text as trl takes them: it adds the end token itself."""
    prompt = row.get("prompt")
    if prompt is None:
        return ["", *responses_of(row)]
    fields = [{"instruction": prompt, "output": response} for response in responses_of(row)]
    sides = [render(field, TEMPLATE, tokenizer) for field in fields]
    return ["".join(sides[0][0]), *("".join(completion) for _, completion in sides)]


def train_trl(folder: Path, texts: Texts, plan: Plan, limit: int) -> tuple[Outcome, list[Ranking]]:
    """Train with trl; return the outcome with both scores of each pair, and the pairs as trl prepared them."""
    names = ("prompt", "chosen", "rejected", "margin")
    rows = [dict(zip(names, text, strict=True)) for text in texts]
    model = start_model(folder, plan.dtype)
    outcome, prepared = train_reference(
        RewardTrainer, model, folder, rows, plan, max_length=limit, center_rewards_coefficient=CENTER
    )
    pairs = [Ranking([row["chosen_ids"], row["rejected_ids"]], row["margin"]) for row in prepared]
    model.eval()
    with torch.no_grad():
        scores = [reference_rewards(model, [row]).item() for pair in pairs for row in pair.responses]
    return outcome._replace(scores=scores), pairs


# A fault planted in minift does not change what trl does.
remembered = functools.cache(train_trl)


def start_model(folder: Path, dtype: str) -> OPTForSequenceClassification:
    """Return transformers' body of the language model under the head that minift draws."""
    body = reference_model(AutoModelForCausalLM, folder, dtype)
    config = body.config
    config.num_labels = 1
    model = OPTForSequenceClassification(config).to(DTYPES[dtype])
    model.model.load_state_dict(body.model.state_dict())
    head = load_reward_model(folder, seed=SEED, dtype=DTYPES[dtype]).score.weight
    model.score.weight.data.copy_(head.data)
    return model
