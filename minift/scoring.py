"""Use a reward model: score, compare, win rate, best of n; measure how well it agrees with held-out preferences."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any, NamedTuple

import torch

from minift.batching import pack
from minift.errors import UserError
from minift.model import RewardModel, eval_mode
from minift.pairs import Ranking, encode_response
from minift.prompts import Template
from minift.remarks import by_category
from minift.tokenizer import Tokenizer

Z_95 = 1.959963984540054  # 95% of a normal distribution are within this many standard deviations
BINS = 10  # of the calibration error

Question = str | Mapping[str, str] | None  # an instruction, with or without input; None: the response has it


class WinRate(NamedTuple):
    """How many of some pairs the first side won (a tie is not a win), with the rate's 95% interval."""

    wins: int
    ties: int
    pairs: int
    rate: float
    low: float
    high: float


@dataclass(frozen=True, repr=False)
class Judge:
    """A reward model with the tokenizer and template to read text with.

    Equal texts get equal rewards. The other texts of a call, not their order, can change a reward by rounding.
    """

    model: RewardModel
    tokenizer: Tokenizer
    template: Template
    batch_size: int = 32
    name: str = ""  # the folder or hub id that it was loaded from

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.model.parameters())
        return f"Judge({self.name}: {count:,} parameters, template {self.template.name})"

    def score(self, question: Question, response: str) -> float:
        """Return the reward of `response` as an answer to `question`. Raises ValueError like `encode`."""
        return self.scores([(question, response)])[0]

    def scores(self, answers: Sequence[tuple[Question, str]]) -> list[float]:
        """Return the rewards of (question, response)s. Raises ValueError like `encode`."""
        return score_rows(self.model, [self.encode(*answer) for answer in answers], self.batch_size)

    def encode(self, question: Question, response: str) -> list[int]:
        """Return the ids to score. Raises ValueError if the model has too few positions or the text is not Unicode."""
        question = {"instruction": question} if isinstance(question, str) else question
        ids = encode_response(question, response, self.tokenizer, self.template)
        max_positions = self.model.config.max_position_embeddings
        if len(ids) > max_positions:
            raise ValueError(f"{len(ids)} tokens, more than the reward model's {max_positions} positions: shorten it")
        return ids

    def compare(self, question: Question, a: str, b: str) -> float:
        """Return the probability under Bradley–Terry that `a` is better than `b`: σ(reward of a − reward of b)."""
        reward_a, reward_b = self.scores([(question, a), (question, b)])
        return sigmoid(reward_a - reward_b)

    def best_of(self, question: Question, responses: Sequence[str]) -> int:
        """Return the index of the highest reward, the first of equal ones. Raises ValueError without responses."""
        if not responses:
            raise ValueError("no responses to choose from")
        rewards = self.scores([(question, response) for response in responses])
        return rewards.index(max(rewards))


@torch.no_grad()
def score_rows(model: RewardModel, rows: Sequence[Sequence[int]], batch_size: int) -> list[float]:
    """Return the reward of each row of ids, each distinct row scored once. UserError if one is NaN or infinite."""
    distinct = sorted({tuple(row) for row in rows})  # answers to one prompt are neighbours, so a batch has it once
    rewards: dict[tuple[int, ...], float] = {}
    with eval_mode(model):
        for start in range(0, len(distinct), batch_size):
            chunk = distinct[start : start + batch_size]
            scored = model(*pack(chunk))  # (R,)
            rewards.update(zip(chunk, scored.tolist(), strict=True))
    if not all(map(math.isfinite, rewards.values())):
        raise UserError("the reward model's rewards are NaN or infinite: its weights do not suit this dtype")
    return [rewards[tuple(row)] for row in rows]


def score_rankings(model: RewardModel, rankings: Sequence[Ranking], batch_size: int) -> list[list[float]]:
    """Return the rewards of each ranking's responses. Raises UserError like `score_rows`."""
    rewards = iter(score_rows(model, [row for ranking in rankings for row in ranking.responses], batch_size))
    return [[next(rewards) for _ in ranking.responses] for ranking in rankings]


def win_rate(differences: Sequence[float]) -> WinRate:
    """Return the win rate given the rewards' differences, first side − second side. Raises ValueError if empty."""
    if not differences:
        raise ValueError("no pairs to count")
    wins, ties = sum(difference > 0 for difference in differences), differences.count(0)
    return WinRate(wins, ties, len(differences), wins / len(differences), *wilson_interval(wins, len(differences)))


def vote(texts: Sequence[str], rewards: Sequence[float]) -> int:
    """Return the index of the text with the largest Σ exp(reward) over its copies, the first of equal ones.

    With equal rewards this is majority voting, or self-consistency (Wang et al. 2022, arXiv 2203.11171); weighted by a
    judge, Li et al. 2022, arXiv 2206.02336. A text's copies estimate its probability π, so the winner estimates the
    mode of π · exp(reward). No distribution has a higher mean reward minus KL divergence from π (Korbak et al. 2022,
    arXiv 2205.11275). The highest reward alone forgets how often the model gave an answer.
    """
    totals: dict[str, float] = {}
    highest = max(rewards)  # subtracted, so that no exp overflows
    for text, reward in zip(texts, rewards, strict=True):
        totals[text] = totals.get(text, 0.0) + math.exp(reward - highest)
    return texts.index(max(totals, key=lambda text: totals[text]))


def mean_best_of(values: Sequence[float], rewards: Sequence[float], k: int) -> float:
    """Return the value of the best of k samples, averaged over all subsets of k of the n samples, in closed form.

    The best sample of a subset has its highest reward, the first of equal ones. Let v₁ … vₙ be the values, best sample
    first. vᵢ is a subset's best if the k − 1 others come after it, which C(n − i, k − 1) of the C(n, k) subsets do:

        Σᵢ vᵢ C(n − i, k − 1) / C(n, k)      (Nakano et al. 2021, arXiv 2112.09332, appendix I)

    With the values themselves as rewards this is pass@k (Chen et al. 2021, arXiv 2107.03374, equation 1).
    """
    n = len(values)
    ranked = sorted(range(n), key=lambda sample: rewards[sample], reverse=True)  # stable: equal ones stay in order
    total = sum(values[sample] * math.comb(n - rank, k - 1) for rank, sample in enumerate(ranked, start=1))
    return total / math.comb(n, k)


def wilson_interval(wins: float, n: int) -> tuple[float, float]:
    """Return the 95% interval of a proportion, given `wins` in `n` independent trials (Wilson 1927).

    It has every p with |p − wins / n| ≤ z √(p(1 − p) / n), so it stays within 0 and 1 and has a width even if all won.
    `wins` may be a sum of values from 0 to 1. With mean p they vary by p(1 − p) at most: the interval is wide enough.
    """
    proportion, z2 = wins / n, Z_95**2
    centre = (proportion + z2 / (2 * n)) / (1 + z2 / n)
    radius = Z_95 / (1 + z2 / n) * math.sqrt(proportion * (1 - proportion) / n + z2 / (4 * n * n))
    # Rounding must not put 0 of n outside its own interval.
    return max(0.0, min(proportion, centre - radius)), min(1.0, max(proportion, centre + radius))


def confidence_bins(differences: Sequence[float]) -> list[list[tuple[float, bool]]]:
    """Return each pair's confidence and whether the choice was right, in `BINS` bins of equal width.

    The model's choice is the side with the higher reward, its confidence σ(|difference|) from 0.5 to 1.
    """
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    for difference in differences:
        confidence = sigmoid(abs(difference))
        number = min(int((confidence - 0.5) * 2 * BINS), BINS - 1)
        bins[number].append((confidence, difference > 0))
    return bins


def calibration(differences: Sequence[float]) -> tuple[float, float]:
    """Return expected calibration error and Brier score of σ(chosen − rejected) as a probability; 0 is best for both.

    The error is the difference of mean confidence and accuracy in each of the `confidence_bins`, averaged over the
    pairs (Guo et al. 2017, arXiv 1706.04599, equation 3). The Brier score is the mean of (1 − σ(chosen − rejected))².
    """
    bins = confidence_bins(differences)
    gaps = [abs(sum(confidence for confidence, _ in each) - sum(right for _, right in each)) for each in bins]
    brier = sum(sigmoid(-difference) ** 2 for difference in differences)
    return sum(gaps) / len(differences), brier / len(differences)


def examine(rewards: Sequence[Sequence[float]], categories: Sequence[str | None]) -> dict[str, Any]:
    """Measure how rewards agree with rankings: accuracy by category with 95% intervals, ties, calibration.

    `rewards` holds those of each row's responses, best first; K responses make K(K - 1)/2 pairs. Accuracy is the win
    rate of the chosen response. The intervals treat pairs as independent, but pairs of one prompt are correlated.
    """
    differences = [[chosen - rejected for chosen, rejected in combinations(ranked, 2)] for ranked in rewards]
    groups = {name: [*chain(*group)] for name, group in by_category(differences, categories).items()}
    rates = {name: win_rate(group) for name, group in groups.items()}
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


def sigmoid(x: float) -> float:
    """Return 1 / (1 + e^-x), without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
