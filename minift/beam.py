"""Beam search, with the same cache and the same processing of logits as greedy decoding.

Each search keeps `num_beams` partial completions, its beams. A step extends all of them by every token and keeps the
best. A finished completion is ranked by Σ log p / length^penalty.

Two searches of two beams: A in rows 0 and 1, B in rows 2 and 3. A step finishes A; both new beams of B continue B1:

    advance              A: []  B: [1, 1]    the beam that each new one continues; [] when the search is finished
    compact              [1]                 B moves to the front
    reorder([3, 3])      B1  B1              the row of a beam is slot · num_beams + beam; rows 2 and 3 are free
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minift.cache import KVCache
from minift.generate import Completions, Options, admit, check_prompt, compact, next_logits, process_logits
from minift.model import OPT, eval_mode
from minift.prepacked import prepacked
from minift.processors import check_scores

Candidate = tuple[float, int, int]  # Σ log p, the beam, and the token that continues it

DISABLED = -1e9  # score of beams 2, 3, … before the first token: they are copies of the first one


@dataclass
class Search:
    """The beam search of one prompt."""

    beams: list[list[int]]  # ids of the prompt and the new tokens
    scores: list[float]  # Σ log p of each beam's new tokens
    num_new: int = 0
    finished: list[tuple[float, list[int]]] = field(default_factory=list)  # (Σ log p / length^penalty, new ids), ranked

    def advance(self, candidates: list[Candidate], options: Options) -> list[int]:
        """Append one token per beam; return each new beam's parent, or [] when the search is finished.

        `candidates` are the 2 · num_beams best, best first. At most one per beam ends in the EOS, so num_beams remain.
        """
        self.num_new += 1
        is_last = self.num_new == options.max_new_tokens
        running = []
        for rank, (score, parent, token) in enumerate(candidates):
            ids = [*self.beams[parent], token]
            if not is_last and token != options.eos_token_id:
                running.append((score, parent, ids))
            elif rank < options.num_beams:  # an end ranked lower than that is dropped
                self.finished.append((score / self.num_new**options.length_penalty, ids[-self.num_new :]))
        self.finished.sort(key=lambda scored: -scored[0])
        del self.finished[options.num_beams :]
        if not running:
            return []
        self.scores, parents, self.beams = map(list, zip(*running[: options.num_beams], strict=True))
        return parents if self._may_improve(options) else []

    def _may_improve(self, options: Options) -> bool:
        """Return whether the best beam may still beat the worst finished completion, estimated as in transformers."""
        if len(self.finished) < options.num_beams:
            return True
        if options.early_stopping is True:
            return False
        use_max_length = options.early_stopping == "never" and options.length_penalty > 0
        length = options.max_new_tokens if use_max_length else self.num_new
        return max(self.scores) / length**options.length_penalty > self.finished[-1][0]


@torch.no_grad()
def beam_search(
    model: OPT, prompts: Sequence[Sequence[int]], options: Options, on_progress: Callable[[int], Any] = lambda _: None
) -> Completions:
    """Return the `num_samples` best completions of each prompt, best first; new ids, the EOS included.

    When `num_beams` completions have finished, a search ends at once if `early_stopping` is True, else as soon as its
    best beam is not better than the worst of them. For this, the beam's score is divided by its present length (False),
    or by the longest possible one ("never", if the length penalty is above 0). Tokens are those of `generate` in
    transformers 5.23 with equal options and float32 logits. Raises ValueError like `generate`, and like `check_beams`.
    """
    num_beams = options.num_beams
    for number, prompt in enumerate(prompts):
        check_prompt(prompt, f"prompt {number}", options.max_new_tokens, model.config.max_position_embeddings)
    check_beams(num_beams, model.config.vocab_size)
    searches = [Search([list(ids)] * num_beams, [0.0] + [DISABLED] * (num_beams - 1)) for ids in prompts]
    waiting = deque(sorted(searches, key=lambda search: len(search.beams[0]), reverse=True))
    active: list[Search] = []
    capacity = min(max(options.batch_size // num_beams, 1), len(searches))
    cache = KVCache(capacity, num_beams)
    with eval_mode(model), prepacked(model, capacity * num_beams):
        while active or waiting:
            entering = admit(waiting, capacity, len(active))
            newest = [beam[-1] for search in active for beam in search.beams]
            logits = next_logits(model, cache, newest, [search.beams[0] for search in entering])
            active += entering
            beams = [beam for search in active for beam in search.beams]
            num_new = [search.num_new for search in active for _ in search.beams]
            scores = process_logits(logits.log_softmax(1), beams, num_new, options)  # (R, V)
            candidates = best_continuations(scores, active, num_beams)
            parents = [search.advance(found, options) for search, found in zip(active, candidates, strict=True)]
            stays = [bool(its_parents) for its_parents in parents]
            on_progress(options.num_samples * stays.count(False))
            kept = compact(stays)
            cache.reorder([slot * num_beams + beam for slot in kept for beam in parents[slot]])
            active = [active[slot] for slot in kept]
    return [[ids for _, ids in search.finished[: options.num_samples]] for search in searches]


def check_beams(num_beams: int, vocab_size: int) -> None:
    """Raise ValueError for more beams than half the vocabulary: a first step has only V continuations."""
    if 2 * num_beams > vocab_size:
        raise ValueError(f"num_beams is {num_beams}, expected at most half of {vocab_size} tokens")


def best_continuations(scores: Tensor, searches: list[Search], num_beams: int) -> list[list[Candidate]]:
    """Return the 2 · num_beams best continuations of each search, best first, given log-probabilities `(R, V)`."""
    so_far = torch.tensor([score for search in searches for score in search.scores], device=scores.device)  # (R,)
    of_each = scores.topk(2 * num_beams)  # (R, 2B): a search's best 2B are among the best 2B of each of its B beams
    totals = (of_each.values + so_far[:, None]).view(len(searches), -1)  # (searches, B * 2B)
    best = totals.topk(2 * num_beams)  # (searches, 2B)
    check_scores(best.values[:, 0])
    parents = best.indices // (2 * num_beams)
    tokens = of_each.indices.view(len(searches), -1).gather(1, best.indices)
    found = zip(best.values.tolist(), parents.tolist(), tokens.tolist(), strict=True)
    return [list(zip(*candidates, strict=True)) for candidates in found]
