"""Functions that filter or change the scores of the next token, one for each `LogitsProcessor` of transformers.

Scores are `(R, V)`: logits, or the log-probabilities of beam search. A token with score -inf must not follow.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from minift.errors import UserError


def penalise_repetition(scores: Tensor, rows: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Lower the scores of tokens that occur in their row: divide positive ones by `penalty`, multiply negative ones."""
    penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
    return torch.where(_mark(_pad(rows, scores), scores), penalised, scores)


def ban_repeated_ngrams(scores: Tensor, rows: Sequence[Sequence[int]], size: int) -> Tensor:
    """Ban every token that would complete an n-gram of this size that its row already has."""
    ids = _pad(rows, scores)  # (R, T)
    length = ids.shape[1]
    if size > length:
        return scores
    windows = ids.unfold(1, size, 1)  # (R, T - size + 1, size)
    ending = ids[:, length - size + 1 :]  # (R, size - 1), which the next token completes to an n-gram
    repeated = (windows[..., :-1] == ending[:, None]).all(2)
    completing = windows[..., -1].where(repeated, scores.shape[1])  # (R, T - size + 1): ids, or V, which marks nothing
    return scores.masked_fill(_mark(completing, scores), -math.inf)


def ban_token(scores: Tensor, token: int, banned: Sequence[bool]) -> Tensor:
    """Ban one token in those rows where `banned` is true."""
    scores = scores.clone()
    scores[torch.tensor(banned, device=scores.device), token] = -math.inf
    return scores


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """Ban all but the k most probable tokens; ties with the last of them stay."""
    least = scores.topk(min(k, scores.shape[1])).values[:, -1:]  # (R, 1)
    return scores.masked_fill(scores < least, -math.inf)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """Keep the most probable tokens that together reach probability p; the most probable token always stays."""
    ascending, order = scores.sort()
    improbable = ascending.softmax(1).cumsum(1) <= 1 - p
    improbable[:, -1] = False
    return scores.masked_fill(torch.zeros_like(improbable).scatter(1, order, improbable), -math.inf)


def sample(probabilities: Tensor, uniforms: Sequence[float]) -> Tensor:
    """Sample one token `(R,)` for each row of probabilities `(R, V)`, given one number in [0, 1) per row."""
    device = probabilities.device
    wide = probabilities.to("cpu" if device.type == "mps" else device).double()  # Apple's GPU lacks float64
    cumulative = wide.cumsum(1)
    thresholds = torch.tensor(uniforms, dtype=torch.float64).to(cumulative) * cumulative[:, -1]
    # right=True skips tokens of probability 0.
    return torch.searchsorted(cumulative, thresholds[:, None], right=True).squeeze(1).to(device)


def check_scores(best: Tensor) -> None:
    """Raise ValueError unless each row has a token that may follow; UserError if its score is NaN or infinite."""
    if best.isfinite().all():  # a GPU is waited for only once
        return
    if not (best < math.inf).all():
        raise UserError("the model's logits are NaN or infinite: its weights do not suit this dtype")
    raise ValueError("no token can follow: all are banned (no_repeat_ngram_size)")


def _pad(rows: Sequence[Sequence[int]], scores: Tensor) -> Tensor:
    """Return rows of ids as `(R, T)`, padded on the left with the id V, which is not a token."""
    length = max(map(len, rows))
    padded = [[scores.shape[1]] * (length - len(ids)) + list(ids) for ids in rows]
    return torch.tensor(padded, device=scores.device)


def _mark(ids: Tensor, scores: Tensor) -> Tensor:
    """Return `(R, V)`, True at each row's ids `(R, T)`; the id V marks nothing."""
    marks = torch.zeros(scores.shape[0], scores.shape[1] + 1, dtype=torch.bool, device=ids.device)
    return marks.scatter_(1, ids, True)[:, :-1]
