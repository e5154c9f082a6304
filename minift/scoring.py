"""A reward model in use: score, compare, win rate, best of n; how well its choices agree with what was preferred."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minift.batching import collate
from minift.encode import encode_response
from minift.errors import UserError
from minift.model import RewardModel
from minift.prompts import Template, template_of
from minift.tokenizer import Tokenizer, check_fits, load_tokenizer
from minift.weights import load_reward_model

NORMAL_95 = 1.959963984540054  # 95% of a normal distribution lie within so many standard deviations
BINS = 10
MOST_KINDS = 20  # a field that tells more kinds than this is no kind


class WinRate(NamedTuple):
    """How many of some pairs the first side won, a tie being no win, with the 95% interval of its share."""

    wins: int
    ties: int
    pairs: int
    rate: float
    low: float
    high: float


@dataclass(frozen=True)
class Judge:
    """A reward model with what it reads text by.

    Equal texts get equal scores, and the order in which texts are given changes nothing, bit for bit; scored in other
    company, a text's score differs by rounding only. A `query` is what the template takes as an instruction; None says
    that the response is a whole dialogue.
    """

    model: RewardModel
    tokenizer: Tokenizer
    template: Template
    batch_size: int = 32

    def score(self, query: str | None, response: str) -> float:
        """The reward of `response` as an answer to `query`. Raises ValueError as `encode`."""
        return self.scores([(query, response)])[0]

    def scores(self, answers: Sequence[tuple[str | None, str]]) -> list[float]:
        """The rewards of (query, response)s. Raises ValueError as `encode`."""
        return score_rows(self.model, [self.encode(*answer) for answer in answers], self.batch_size)

    def encode(self, query: str | None, response: str) -> list[int]:
        """The ids that are scored. Raises ValueError if they exceed the model's positions, or can't be made."""
        ids = encode_response(query, response, self.tokenizer, self.template)
        positions = self.model.config.max_position_embeddings
        if len(ids) > positions:
            raise ValueError(f"{len(ids)} tokens, more than the reward model's {positions} positions: shorten it")
        return ids

    def compare(self, query: str | None, a: str, b: str) -> float:
        """The probability that `a` is the better response, by Bradley and Terry's model: σ(reward of a − of b)."""
        reward_a, reward_b = self.scores([(query, a), (query, b)])
        return sigmoid(reward_a - reward_b)

    def win_rate(self, pairs: Sequence[tuple[str | None, str, str]]) -> WinRate:
        """Of (query, a, b)s: how often `a` has the higher reward."""
        rewards = self.scores([(query, response) for query, *responses in pairs for response in responses])
        return win_rate(a - b for a, b in zip(rewards[::2], rewards[1::2], strict=True))

    def best_of(self, query: str | None, responses: Sequence[str]) -> int:
        """The index of the response with the highest reward, the first where several have it. ValueError for none."""
        if not responses:
            raise ValueError("no responses to choose from")
        rewards = self.scores([(query, response) for response in responses])
        return rewards.index(max(rewards))


def load_judge(
    folder: str | Path,
    template: str | None = None,
    *,
    flag: str = "--template",
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Judge:
    """The reward model in a folder, reading by `template`: by name or file, or its run's own, or `dialogue`.

    Raises UserError for a language model's folder, which has no head to score with, and as `load_reward_model` does.
    """
    form = template_of(template, folder, "dialogue", flag)
    tokenizer = load_tokenizer(folder)
    model = load_reward_model(folder, dtype=dtype).to(device).eval()
    check_fits(tokenizer, model.config.vocab_size, str(folder))
    return Judge(model, tokenizer, form, batch_size)


@torch.no_grad()
def score_rows(model: RewardModel, rows: Sequence[Sequence[int]], batch_size: int) -> list[float]:
    """The rewards of rows of ids. Rows of like length are scored together, equal ones once.

    The model runs in eval mode and is left in the mode it came in. Raises UserError for a reward that is no number.
    """
    device = model.score.weight.device
    distinct = sorted({tuple(row) for row in rows}, key=lambda row: (len(row), row))
    rewards: dict[tuple[int, ...], float] = {}
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(distinct), batch_size):
            part = distinct[start : start + batch_size]
            batch = collate([(row, row) for row in part]).to(device)
            scored = model(batch.input_ids, batch.positions, batch.rows)  # (R,)
            rewards.update(zip(part, scored.tolist(), strict=True))
    finally:
        model.train(was_training)
    if not all(map(math.isfinite, rewards.values())):
        raise UserError("the reward model gives rewards that are no finite numbers: its weights don't fit this dtype")
    return [rewards[tuple(row)] for row in rows]


def win_rate(differences: Iterable[float]) -> WinRate:
    """Of the differences of rewards of some pairs, first side less second. Raises ValueError if there are none."""
    differences = list(differences)
    if not differences:
        raise ValueError("no pairs to count")
    wins, ties = sum(difference > 0 for difference in differences), differences.count(0)
    return WinRate(wins, ties, len(differences), wins / len(differences), *wilson_interval(wins, len(differences)))


def wilson_interval(wins: int, n: int) -> tuple[float, float]:
    """The 95% interval of a share of which `wins` in `n` were seen, the n being independent (Wilson 1927).

    The shares p that lie within z standard deviations √(p(1 − p) / n) of what was seen. Unlike wins / n ± z·s it stays
    within 0 and 1, and is no point where all or none won.
    """
    share, z2 = wins / n, NORMAL_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    reach = NORMAL_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # Rounding must not put 0 of n outside its own interval.
    return max(0.0, min(share, centre - reach)), min(1.0, max(share, centre + reach))


def calibration(differences: Sequence[float]) -> tuple[float, float]:
    """How far σ(chosen − rejected) can be taken at its word: (expected calibration error, Brier score), 0 is best.

    The model names as better the side of higher reward, with the confidence σ(|difference|) of 0.5 to 1. The error is
    the gap between mean confidence and share named rightly, in `BINS` bins of equal width, averaged over the pairs (Guo
    et al. 2017, arXiv 1706.04599, eq. 3). The Brier score is the mean of (1 − σ(chosen − rejected))².
    """
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    for difference in differences:
        confidence = sigmoid(abs(difference))
        place = min(int((confidence - 0.5) * 2 * BINS), BINS - 1)
        bins[place].append((confidence, difference > 0))
    gaps = [abs(sum(confidence for confidence, _ in held) - sum(right for _, right in held)) for held in bins]
    brier = sum(sigmoid(-difference) ** 2 for difference in differences)
    return sum(gaps) / len(differences), brier / len(differences)


def examine(rewards: Sequence[Sequence[float]], kinds: Sequence[Any]) -> dict[str, Any]:
    """What is reported of some pairs: accuracy of all and by kind, with 95% intervals; ties; calibration; and the mean
    of σ(chosen − rejected), which stays near 0.5 where a model has no opinion and the accuracy is that of tiny signs.

    `rewards` holds for each row those of its two responses, the chosen one first, or of K ranked ones, which make
    K(K - 1)/2 pairs. `kinds` says what each row's kind is; only text counts as one. The intervals take the pairs for
    independent, which those of one prompt are not quite.
    """
    groups: dict[str, list[float]] = {"all": []}
    told_apart = len({kind for kind in kinds if isinstance(kind, str)}) <= MOST_KINDS
    for its_rewards, kind in zip(rewards, kinds, strict=True):
        differences = [better - worse for better, worse in combinations(its_rewards, 2)]
        for name in {"all", kind} if isinstance(kind, str) and told_apart else {"all"}:
            groups.setdefault(name, []).extend(differences)
    rates = {name: win_rate(groups[name]) for name in ["all", *sorted(groups.keys() - {"all"})]}
    error, brier = calibration(groups["all"])
    return {
        "accuracy": {name: rate.rate for name, rate in rates.items()},
        "interval": {name: [rate.low, rate.high] for name, rate in rates.items()},
        "pairs": {name: rate.pairs for name, rate in rates.items()},
        "ties": rates["all"].ties,
        "mean_probability": sum(map(sigmoid, groups["all"])) / len(groups["all"]),
        "calibration_error": error,
        "brier": brier,
    }


def table(exams: dict[str, dict[str, Any]]) -> list[str]:
    """Lines for people: what `examine` found, a column for each exam under its name."""
    last = [*exams.values()][-1]
    lines = [f"{'':30}" + "".join(f"{name:>24}" for name in exams)] if any(exams) else []
    for kind, pairs in last["pairs"].items():
        name = "accuracy" if kind == "all" else f"  {kind}"
        cells = []
        for exam in exams.values():
            low, high = exam["interval"][kind]
            cells.append(f"{exam['accuracy'][kind]:.1%} ({low:.1%}-{high:.1%})")
        lines.append(f"{f'{name}, {pairs:,} pairs':30}" + "".join(f"{cell:>24}" for cell in cells))
    lines.append(f"{'ties, counted as wrong':30}" + "".join(f"{exam['ties']:>24,}" for exam in exams.values()))
    for key, name in (
        ("mean_probability", "mean probability of chosen"),
        ("calibration_error", "calibration error"),
        ("brier", "Brier score"),
    ):
        lines.append(f"{name:30}" + "".join(f"{exam[key]:>24.3f}" for exam in exams.values()))
    return lines


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
