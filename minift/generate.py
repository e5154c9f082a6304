"""Completions of prompts by greedy decoding or sampling: ids in, ids out. Beam search is in beam.py.

A prompt's first forward pass is its prefill: all its tokens at once; their keys and values fill a slot of the cache.
Each decode step then feeds one token per row. When a row has finished, it leaves the batch and a waiting prompt enters,
so the batch stays full. Rows do not affect each other, except by the rounding of matrix products.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from minift import processors
from minift.batching import pack
from minift.cache import KVCache, Prefill
from minift.model import OPT, eval_mode, last_tokens
from minift.prepacked import prepacked
from minift.replay import decode

Completions = list[list[list[int]]]  # for each prompt, the new ids of each of its samples
MIN_FREE = 1 / 8  # of the batch before prompts enter: a prefill reads all weights, too slow for a single prompt


@dataclass(frozen=True)
class Options:
    """Options of generation. Raises ValueError for an invalid value; the message starts with the option's name."""

    max_new_tokens: int = 128
    min_new_tokens: int = 0  # no EOS before this many
    eos_token_id: int | None = None
    temperature: float = 0.0  # 0: greedy decoding or beam search; above 0: sampling
    top_k: int = 0  # sample from the k most probable tokens; 0: from all
    top_p: float = 1.0  # sample from the most probable tokens with total probability p
    repetition_penalty: float = 1.0  # for tokens that occurred, in the prompt or after; 1: none
    no_repeat_ngram_size: int = 0  # no n-gram of this size twice; 0: any may repeat
    num_samples: int = 1  # completions of each prompt; with beam search, its best ones
    num_beams: int = 1  # above 1: beam search
    length_penalty: float = 1.0  # beam search divides scores by length to this power
    early_stopping: bool | Literal["never"] = False  # when beam search ends
    batch_size: int = 64  # rows decoded at a time; each beam is a row
    seed: int = 42  # of sampling

    def __post_init__(self) -> None:
        is_beam, is_sampled = self.num_beams > 1, self.temperature > 0
        counts = ("max_new_tokens", "num_samples", "num_beams", "batch_size")
        # NaN fails every comparison. Scores are divided by temperature and penalty: tiny ones would make them infinite.
        for name, is_valid, expected in (
            *((count, 1 <= getattr(self, count) <= 10**9, "1 or more, 1000000000 at most") for count in counts),
            ("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens, "0 to max_new_tokens"),
            ("temperature", self.temperature == 0 or 1e-9 <= self.temperature < math.inf, "0 (greedy) or 1e-9 or more"),
            ("temperature", not (is_beam and is_sampled), "0 with beams: beam search does not sample"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_k", is_sampled or self.top_k == 0, "0 at temperature 0, where nothing is sampled"),
            ("top_p", 0 <= self.top_p <= 1, "0 to 1"),
            ("top_p", is_sampled or self.top_p == 1, "1 at temperature 0, where nothing is sampled"),
            ("num_samples", is_sampled or self.num_samples <= self.num_beams, "at most the beams, or a temperature"),
            ("length_penalty", abs(self.length_penalty) <= 10, "-10 to 10"),
            ("early_stopping", self.early_stopping in (True, False, "never"), "true, false or never"),
            ("repetition_penalty", 1e-9 <= self.repetition_penalty < math.inf, "above 0 (1: none), at least 1e-9"),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "0 (any may repeat) or more"),
            ("seed", self.seed >= 0, "0 or more"),
        ):
            if not is_valid:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {expected}")


@dataclass
class Decoding:
    """One completion in progress: a row of the batch."""

    ids: list[int]  # of the prompt and the new tokens
    random: np.random.Generator
    max_new: int
    num_new: int = 0


@torch.no_grad()
def generate(
    model: OPT, prompts: Sequence[Sequence[int]], options: Options, on_progress: Callable[[int], Any] = lambda _: None,
    limits: Sequence[int] | None = None,
) -> Completions:  # fmt: skip
    """Complete each prompt `num_samples` times; return the new ids, the EOS included where it was produced.

    `limits` replace `max_new_tokens`, one for each prompt. `on_progress` gets the number of completions that have just
    finished. Greedy tokens are those of `generate` in transformers 5.23 with equal options and float32 logits; samples
    have the same distribution. Raises ValueError for `num_beams` above 1, and for a prompt that is empty or too long.
    """
    if options.num_beams > 1:
        raise ValueError(f"num_beams is {options.num_beams}, expected 1: for more, call minift.beam.beam_search")
    limits = limits or [options.max_new_tokens] * len(prompts)
    for number, (ids, limit) in enumerate(zip(prompts, limits, strict=True)):
        check_prompt(ids, f"prompt {number}", limit, model.config.max_position_embeddings)
    decodings = [
        Decoding(list(ids), np.random.default_rng((options.seed, number, sample)), limits[number])
        for number, ids in enumerate(prompts)
        for sample in range(options.num_samples)
    ]
    # Longest first: prompts of similar length enter together, so that prefill pads little.
    waiting = deque(sorted(decodings, key=lambda row: len(row.ids), reverse=True))
    active: list[Decoding] = []
    cache = KVCache(min(options.batch_size, len(decodings)))
    with eval_mode(model), prepacked(model, cache.num_prompts):
        while active or waiting:
            entering = admit(waiting, cache.num_prompts, len(active))
            logits = next_logits(model, cache, [row.ids[-1] for row in active], [row.ids for row in entering])  # (R, V)
            active += entering
            scores = process_logits(logits, [row.ids for row in active], [row.num_new for row in active], options)
            best, tokens = scores.max(1)  # (R,)
            processors.check_scores(best)
            if options.temperature > 0:
                tokens = processors.sample(scores.softmax(1), [row.random.random() for row in active])
            for row, token in zip(active, tokens.tolist(), strict=True):
                row.ids.append(token)
                row.num_new += 1
            stays = [row.num_new < row.max_new and row.ids[-1] != options.eos_token_id for row in active]
            on_progress(stays.count(False))
            if not all(stays):
                kept = compact(stays)
                cache.reorder(kept)
                active = [active[slot] for slot in kept]
    new_ids = [row.ids[-row.num_new :] for row in decodings]
    return [new_ids[start : start + options.num_samples] for start in range(0, len(new_ids), options.num_samples)]


def check_prompt(prompt: Sequence[int], name: str, max_new_tokens: int, max_positions: int) -> None:
    """Raise ValueError if the prompt is empty or leaves no room for the new tokens; `name` is for the message."""
    if not prompt:
        raise ValueError(f"{name} is empty, and this tokenizer adds no BOS: expected at least one token")
    if len(prompt) + max_new_tokens > max_positions:
        tokens = f"{len(prompt)} tokens and {max_new_tokens} new ones may follow, more than the model's"
        raise ValueError(f"{name} has {tokens} {max_positions} positions: shorten it or ask for fewer")


def admit(waiting: deque[Any], capacity: int, num_active: int) -> list[Any]:
    """Remove from `waiting` and return what may enter the batch: nothing, unless enough of the batch is free."""
    free = capacity - num_active
    if num_active and free < MIN_FREE * capacity:
        return []
    return [waiting.popleft() for _ in range(min(free, len(waiting)))]


def compact(stays: Sequence[bool]) -> list[int]:
    """Return for each new slot the old slot to copy: rows at the end move into free slots, the others stay.

    >>> compact([True, False, True, False, True, True])
    [0, 5, 2, 4]
    """
    movable = [slot for slot, stay in enumerate(stays) if stay]  # its last one fills the first free slot
    return [slot if stays[slot] else movable.pop() for slot in range(sum(stays))]


def next_logits(model: OPT, cache: KVCache, newest: list[int], entering: list[list[int]]) -> Tensor:
    """Return float32 logits `(R, V)` of the next token: of the rows in the cache, then of those of entering prompts.

    `newest` holds each cached row's last token, which the cache lacks. An entering prompt has `rows_per_prompt` rows.
    Raises ValueError if the entering ones are not sorted, longest first: in this order they get their slots.
    """
    logits = []
    if newest:
        logits.append(decode(model, cache, newest))
    if entering:
        if any(len(ids) < len(after) for ids, after in pairwise(entering)):
            raise ValueError("the entering prompts are not sorted, expected the longest first")
        input_ids, positions, rows = pack(entering)
        hidden = model(input_ids, positions, rows, Prefill(cache), wanted=last_tokens(rows))  # (prompts, E)
        logits.append(model.logits(hidden).float().repeat_interleave(cache.rows_per_prompt, dim=0))
        cache.enter([len(ids) for ids in entering])
    return logits[0] if len(logits) == 1 else torch.cat(logits)


def process_logits(scores: Tensor, rows: Sequence[Sequence[int]], num_new: Sequence[int], options: Options) -> Tensor:
    """Apply penalties, bans and filters to the scores `(R, V)` of the next token, in the order of transformers 5.23.

    `rows` are the ids so far, prompts included; `num_new` says how many of each are new.
    """
    if options.repetition_penalty != 1:
        scores = processors.penalise_repetition(scores, rows, options.repetition_penalty)
    if options.no_repeat_ngram_size:
        scores = processors.ban_repeated_ngrams(scores, rows, options.no_repeat_ngram_size)
    if options.min_new_tokens and options.eos_token_id is not None:
        is_too_short = [count < options.min_new_tokens for count in num_new]
        scores = processors.ban_token(scores, options.eos_token_id, is_too_short)
    if options.temperature > 0:
        scores = scores / options.temperature
    if options.top_k:
        scores = processors.keep_top_k(scores, options.top_k)
    if options.top_p < 1:
        scores = processors.keep_top_p(scores, options.top_p)
    return scores
