"""Completions of prompts: greedy, sampled, or by beam search. Ids in, ids out.

The batch stays full: a row leaves as soon as it has finished, and waiting prompts enter in its place. Rows never meet,
so a completion does not depend on the batch it was made in, but for the rounding of matrix products.

Read from the top: the cache, the forward pass, what may follow (`process`), then the two loops, one token a row
(greedy and sampling) and beam search. The command is at the end.
"""

import argparse
import json
import math
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minift.batching import lay_out_rows
from minift.errors import CommandParser, UserError, run_command
from minift.files import check_out, write_text
from minift.model import OPT

OUT_OF_THE_RACE = -1e9  # score of a search's beams 2, 3, … before its first token: they are copies of the first
REFILL_SHARE = 8  # prompts enter when an eighth of the batch is free: entering one by one, each would read all weights


@dataclass(frozen=True)
class Options:
    """How to complete. Raises ValueError, the option's name first, for a value that makes no sense.

    `temperature` 0 is greedy, or beam search where `num_beams` is above 1; above 0 tokens are drawn, `num_samples`
    times for each prompt. Of a beam search `num_samples` is how many finished sequences are wanted, best first.
    `length_penalty` and `early_stopping` are beam search's alone. `batch_size` counts rows, and each beam is one.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    eos_token_id: int | None = None
    num_samples: int = 1
    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0  # 0: any may repeat
    batch_size: int = 64
    seed: int = 42

    def __post_init__(self) -> None:
        beams, drawn = self.num_beams > 1, self.temperature > 0
        # NaN fails every comparison, so none of these lets it through.
        for name, holds, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens, "0 to the most new tokens"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (no sampling) or more"),
            ("temperature", not (beams and drawn), "0 with beams: beam search does not sample"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_k", drawn or self.top_k == 0, "0 at temperature 0, where nothing is drawn"),
            ("top_p", 0 <= self.top_p <= 1, "0 to 1"),
            ("top_p", drawn or self.top_p == 1, "1 at temperature 0, where nothing is drawn"),
            ("num_beams", self.num_beams >= 1, "1 or more"),
            ("num_samples", self.num_samples >= 1, "1 or more"),
            ("num_samples", drawn or self.num_samples <= self.num_beams, "at most the beams, or a temperature above 0"),
            ("length_penalty", abs(self.length_penalty) <= 10, "-10 to 10"),
            ("early_stopping", self.early_stopping in (True, False, "never"), "true, false or never"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0 (1: none)"),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "0 (any may repeat) or more"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
            ("seed", self.seed >= 0, "0 or more"),
        ):
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {expected}")


@torch.no_grad()
def generate(
    model: OPT,
    prompts: Sequence[Sequence[int]],
    options: Options,
    on_progress: Callable[[int], Any] | None = None,
) -> list[list[list[int]]]:
    """Complete prompts: for each, `options.num_samples` lists of new ids, the EOS included where it was produced.

    `on_progress` is called with the number of completions that have just finished. The model runs in eval mode and is
    left in the mode it came in. Tokens are those of transformers' `generate` (5.23) with the options of the same names,
    fp32 logits, `do_sample=False` at temperature 0. Sampled tokens follow the same distribution; each completion has a
    random stream of its own, which follows from (seed, prompt, sample) alone.

    Raises ValueError for a prompt that is empty or has no room for the new tokens, with its number, counted from 0.
    """
    for number, prompt in enumerate(prompts):
        check_prompt(prompt, f"prompt {number}", options.max_new_tokens, model.config.max_position_embeddings)
    check_beams(options.num_beams, model.config.vocab_size)

    run = search_beams if options.num_beams > 1 else choose_tokens
    was_training = model.training
    model.eval()
    try:
        return run(model, prompts, options, on_progress or (lambda finished: None))
    finally:
        model.train(was_training)


def check_prompt(prompt: Sequence[int], name: str, max_new_tokens: int, positions: int) -> None:
    """Raise ValueError, calling the prompt `name`, if it is empty or leaves no room for the new tokens."""
    if not prompt:
        raise ValueError(f"{name} is empty, and this tokenizer puts no BOS in front: expected at least one token")
    if len(prompt) + max_new_tokens > positions:
        raise ValueError(
            f"{name} has {len(prompt)} tokens and {max_new_tokens} new ones may follow, "
            f"more than the model's {positions} positions: shorten it or ask for fewer"
        )


def check_beams(num_beams: int, vocab_size: int) -> None:
    if 2 * num_beams > vocab_size:
        raise ValueError(f"num_beams is {num_beams}, expected at most half of {vocab_size} tokens")


class KVCache:
    """The keys and values of every token so far but each row's newest, one slot for each row of the batch.

    Slots are padded on the right, with whatever was there before; a mask keeps attention to each row's own positions.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.buffers: list[Tensor] = []  # a layer's keys and values: (2, slots, H, capacity, D)
        self.length = 0  # S, positions of the longest row

    def expect_prompts(self, first_slot: int, copies: int, length: int) -> None:
        """The next forward pass brings whole prompts, `copies` slots for each from `first_slot` on."""
        self.first_slot, self.copies, self.mask = first_slot, copies, None
        self.length = max(self.length, length)

    def expect_tokens(self, lengths: list[int], device: torch.device) -> None:
        """The next forward pass brings one token for each of the first R slots, which hold `lengths` tokens."""
        self.length = max(lengths) + 1
        self.ends = torch.tensor(lengths, device=device)  # (R,)
        self.slots = torch.arange(len(lengths), device=device)
        self.mask = (torch.arange(self.length, device=device) <= self.ends[:, None])[:, None, None]  # (R, 1, 1, S)

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """`model.Cache`'s: store `(R, H, T, D)`, give back all that attention should see."""
        keys, values = self._room(layer, key)  # (slots, H, capacity, D)
        if self.mask is None:
            R, T = key.shape[0], key.shape[2]
            entering = slice(self.first_slot, self.first_slot + R * self.copies)
            keys[entering, :, :T] = key.repeat_interleave(self.copies, dim=0)
            values[entering, :, :T] = value.repeat_interleave(self.copies, dim=0)
            return key, value, None
        keys[self.slots, :, self.ends] = key[:, :, 0]  # (R, H, 1, D) -> (R, H, D)
        values[self.slots, :, self.ends] = value[:, :, 0]
        R, S = key.shape[0], self.length
        return keys[:R, :, :S], values[:R, :, :S], self.mask

    def select(self, sources: list[int]) -> None:
        """Let slot r hold what slot `sources[r]` held: rows that move up, beams that go on from another."""
        moves = [(target, source) for target, source in enumerate(sources) if target != source]
        if not moves:
            return
        targets, origins = torch.tensor(moves, device=self.buffers[0].device).T
        for buffer in self.buffers:
            # All sources are read before a slot is written.
            buffer[:, targets, :, : self.length] = buffer[:, origins, :, : self.length]

    def _room(self, layer: int, key: Tensor) -> Tensor:
        if layer == len(self.buffers):
            self.buffers.append(key.new_zeros(2, self.num_slots, key.shape[1], 0, key.shape[3]))
        capacity = self.buffers[layer].shape[3]
        if capacity < self.length:
            # By doubling, so that growing costs no more than filling. With zeros, as masked NaNs would still spread.
            more = max(self.length, 2 * capacity) - capacity
            self.buffers[layer] = F.pad(self.buffers[layer], (0, 0, 0, more))
        return self.buffers[layer]


def next_logits(
    model: OPT, cache: KVCache, live: list[list[int]], entering: list[list[int]], copies: int = 1
) -> Tensor:
    """fp32 logits `(R, V)` of the token after each row: the live ones, then `copies` rows for each entering prompt.

    Live rows are in the cache's first slots but for their newest token. Entering ones are put behind them.
    """
    device = model.head.device
    logits = []
    if live:
        cached = [len(ids) - 1 for ids in live]
        cache.expect_tokens(cached, device)
        input_ids = torch.tensor([ids[-1] for ids in live], device=device)  # (N,), N = R
        rows = torch.arange(len(live), device=device)[:, None]  # (R, 1)
        hidden = model(input_ids, torch.tensor(cached, device=device), rows, cache)  # (R, E)
        logits.append(model.logits(hidden).float())
    if entering:
        lengths = [len(ids) for ids in entering]
        cache.expect_prompts(len(live), copies, max(lengths))
        input_ids = torch.tensor([token for ids in entering for token in ids], device=device)  # (N,)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
        hidden = model(input_ids, positions, lay_out_rows(lengths).to(device), cache)  # (N, E)
        last = torch.tensor(lengths, device=device).cumsum(0) - 1
        logits.append(model.logits(hidden[last]).float().repeat_interleave(copies, dim=0))
    return torch.cat(logits)


def take_entrants(waiting: deque, num_live: int, capacity: int) -> list:
    """Those of the waiting that enter the batch now."""
    free = capacity - num_live
    if num_live and free * REFILL_SHARE < capacity:
        return []
    return [waiting.popleft() for _ in range(min(free, len(waiting)))]


def close_ranks(finished: list[bool]) -> list[int]:
    """Which of the old places fills each new one: finished ones' places go to the last that stay, others keep theirs.

    >>> close_ranks([False, True, False, True, False, False])
    [0, 4, 2, 5]
    """
    staying = [place for place, done in enumerate(finished) if not done]
    moving = (place for place in staying if place >= len(staying))
    return [next(moving) if finished[place] else place for place in range(len(staying))]


def process(scores: Tensor, rows: Sequence[Sequence[int]], num_new: Sequence[int], options: Options) -> Tensor:
    """Scores `(R, V)` of the next token → the same after penalties and bans, −inf for what must not follow.

    `rows` are the ids so far, prompt included, and `num_new` how many of them are new. The order of the steps and what
    each does are those of the `LogitsProcessor` classes in transformers 5.23.
    """
    vocab_size = scores.shape[1]
    if options.repetition_penalty != 1 or options.no_repeat_ngram_size:
        length = max(map(len, rows))
        padded = [[vocab_size] * (length - len(ids)) + list(ids) for ids in rows]
        history = torch.tensor(padded, device=scores.device)  # (R, T), padded on the left with the id V
    if options.repetition_penalty != 1:
        penalty = options.repetition_penalty
        seen = _mark(history, vocab_size)
        scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
    size = options.no_repeat_ngram_size
    if size and size <= length:
        windows = history.unfold(1, size, 1)  # (R, T - size + 1, size)
        ending = history[:, length - size + 1 :]  # (R, size - 1), which the next token makes an n-gram
        repeated = (windows[..., :-1] == ending[:, None]).all(2)
        scores = scores.masked_fill(_mark(windows[..., -1].where(repeated, vocab_size), vocab_size), -math.inf)
    if options.min_new_tokens and options.eos_token_id is not None:
        too_short = torch.tensor(num_new, device=scores.device) < options.min_new_tokens  # (R,)
        scores = scores.clone()
        scores[too_short, options.eos_token_id] = -math.inf
    if options.temperature > 0:
        scores = scores / options.temperature
    if options.top_k:
        least = scores.topk(min(options.top_k, vocab_size)).values[:, -1:]  # (R, 1)
        scores = scores.masked_fill(scores < least, -math.inf)
    if options.top_p < 1:
        rising, order = scores.sort()
        unlikely = rising.softmax(1).cumsum(1) <= 1 - options.top_p
        unlikely[:, -1] = False  # the likeliest always stays
        scores = scores.masked_fill(torch.zeros_like(unlikely).scatter(1, order, unlikely), -math.inf)
    return scores


def _mark(ids: Tensor, vocab_size: int) -> Tensor:
    """`(R, V)`, True at each row's ids `(R, T)`; the id V stands for none."""
    marks = torch.zeros(len(ids), vocab_size + 1, dtype=torch.bool, device=ids.device)
    return marks.scatter_(1, ids, True)[:, :vocab_size]


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens `(R,)` drawn from `(R, V)` by inverting the distribution function at numbers `(R,)` out of [0, 1)."""
    cumulative = probabilities.double().cumsum(1)
    places = uniforms.to(cumulative) * cumulative[:, -1]
    # right=True steps over tokens of probability 0.
    return torch.searchsorted(cumulative, places[:, None], right=True).squeeze(1)


@dataclass
class Row:
    """A completion in the making."""

    prompt: int
    sample: int
    ids: list[int]  # of the prompt and the new tokens
    num_new: int
    random: np.random.Generator


def choose_tokens(
    model: OPT, prompts: Sequence[Sequence[int]], options: Options, on_progress: Callable[[int], Any]
) -> list[list[list[int]]]:
    """Greedy decoding and sampling: see `generate`."""
    waiting = deque(
        Row(prompt, sample, list(ids), 0, np.random.default_rng((options.seed, prompt, sample)))
        for prompt, ids in enumerate(prompts)
        for sample in range(options.num_samples)
    )
    completions: list[list[list[int]]] = [[[] for _ in range(options.num_samples)] for _ in prompts]
    capacity = min(options.batch_size, len(waiting))
    cache = KVCache(capacity)
    live: list[Row] = []  # the row in each slot
    while live or waiting:
        entrants = take_entrants(waiting, len(live), capacity)
        logits = next_logits(model, cache, [row.ids for row in live], [row.ids for row in entrants])
        live += entrants
        scores = process(logits, [row.ids for row in live], [row.num_new for row in live], options)  # (R, V)
        _check_choice(scores.amax(1))
        if options.temperature > 0:
            tokens = draw(scores.softmax(1), torch.tensor([row.random.random() for row in live], dtype=torch.float64))
        else:
            tokens = scores.argmax(1)
        finished = []
        for row, token in zip(live, tokens.tolist(), strict=True):
            row.ids.append(token)
            row.num_new += 1
            finished.append(token == options.eos_token_id or row.num_new == options.max_new_tokens)
            if finished[-1]:
                completions[row.prompt][row.sample] = row.ids[-row.num_new :]
        staying = close_ranks(finished)
        cache.select(staying)
        live = [live[slot] for slot in staying]
        if any(finished):
            on_progress(sum(finished))
    return completions


@dataclass
class Search:
    """The beam search of one prompt."""

    prompt: int
    num_new: int
    beams: list[list[int]]  # ids of the prompt and the new tokens, best first
    scores: list[float]  # Σ log p of each beam's new tokens
    finished: list[tuple[float, list[int]]]  # (Σ log p / length^penalty, new ids), best first, at most num_beams

    def advance(self, candidates: list[tuple[float, int, int]], options: Options) -> tuple[list[int], bool]:
        """Take a token: (which beam each new beam goes on from, whether the search is over).

        `candidates` are the 2 · num_beams best continuations, (Σ log p, beam, token), best first: at most num_beams
        of them can end in the EOS, so as many are left to go on with.
        """
        self.num_new += 1
        at_the_end = self.num_new == options.max_new_tokens
        open_ones = []
        for rank, (score, parent, token) in enumerate(candidates):
            if not at_the_end and token != options.eos_token_id:
                open_ones.append((score, parent, token))
            elif rank < options.num_beams:  # an end that is ranked lower is dropped
                ids = [*self.beams[parent], token]
                self.finished.append((score / self.num_new**options.length_penalty, ids[-self.num_new :]))
        self.finished.sort(key=lambda scored: -scored[0])
        del self.finished[options.num_beams :]
        if at_the_end:
            return [], True

        self.scores, parents, tokens = map(list, zip(*open_ones[: options.num_beams], strict=True))
        self.beams = [[*self.beams[parent], token] for parent, token in zip(parents, tokens, strict=True)]
        return parents, len(self.finished) == options.num_beams and not self._worth_going_on(options)

    def _worth_going_on(self, options: Options) -> bool:
        """Whether the best running beam might still beat the worst finished sequence, as the reference guesses it."""
        if options.early_stopping is True:
            return False
        longest = options.early_stopping == "never" and options.length_penalty > 0
        length = options.max_new_tokens if longest else self.num_new
        return self.scores[0] / length**options.length_penalty > self.finished[-1][0]


def search_beams(
    model: OPT, prompts: Sequence[Sequence[int]], options: Options, on_progress: Callable[[int], Any]
) -> list[list[list[int]]]:
    """Beam search: see `generate`. The beams of a prompt have neighbouring slots."""
    num_beams = options.num_beams
    scores_at_first = [0.0] + [OUT_OF_THE_RACE] * (num_beams - 1)
    waiting = deque(
        Search(number, 0, [list(ids)] * num_beams, scores_at_first, []) for number, ids in enumerate(prompts)
    )
    completions: list[list[list[int]]] = [[] for _ in prompts]
    capacity = min(max(options.batch_size // num_beams, 1), len(waiting))
    cache = KVCache(capacity * num_beams)
    live: list[Search] = []
    while live or waiting:
        entrants = take_entrants(waiting, len(live), capacity)
        live_rows = [ids for search in live for ids in search.beams]
        logits = next_logits(model, cache, live_rows, [search.beams[0] for search in entrants], copies=num_beams)
        live += entrants
        rows = [ids for search in live for ids in search.beams]
        num_new = [search.num_new for search in live for _ in search.beams]
        so_far = torch.tensor([score for search in live for score in search.scores], device=logits.device)
        scores = process(logits.log_softmax(1), rows, num_new, options) + so_far[:, None]  # (R, V)
        best = scores.view(len(live), -1).topk(2 * num_beams)  # of (searches, num_beams * V)
        _check_choice(best.values[:, 0])

        parents, over = [], []
        for search, values, places in zip(live, best.values.tolist(), best.indices.tolist(), strict=True):
            candidates = [(value, *divmod(place, scores.shape[1])) for value, place in zip(values, places, strict=True)]
            came_from, is_over = search.advance(candidates, options)
            parents.append(came_from)
            over.append(is_over)
            if is_over:
                completions[search.prompt] = [ids for _, ids in search.finished[: options.num_samples]]
                on_progress(options.num_samples)
        staying = close_ranks(over)
        cache.select([place * num_beams + parent for place in staying for parent in parents[place]])
        live = [live[place] for place in staying]
    return completions


def _check_choice(best: Tensor) -> None:
    if not best.isfinite().all():
        raise ValueError("no token can follow: all are banned (no_repeat_ngram_size), or the model's logits are NaN")


def main(arguments: list[str] | None = None) -> None:
    """The command: prompts in, completions out, in the prompts' order."""
    from huggingface_hub.utils import tqdm

    from minift.datasets import PROMPT_KINDS, load_rows
    from minift.prompts import load_template, render_prompt
    from minift.tokenizer import check_fits, load_tokenizer
    from minift.trainer import pick_device
    from minift.weights import load_model, resolve

    args = _parser().parse_args(arguments)
    options = _options(args)
    check_out(args.out, "--prompts", args.prompts)
    template = load_template(args.template)
    rows = load_rows(args.prompts, PROMPT_KINDS, mixed=True)
    device = pick_device(args.device)
    folder = resolve(args.model)
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, dtype=getattr(torch, args.dtype)).to(device)
    check_fits(tokenizer, model.config.vocab_size, args.model)

    options = replace(options, eos_token_id=tokenizer.eos_token_id)
    positions = model.config.max_position_embeddings
    prompts = []
    for row in rows:
        try:
            prompts.append(tokenizer.encode(render_prompt(row, template, tokenizer.eos_token, tokenizer.bos_token)))
            check_prompt(prompts[-1], "the prompt", options.max_new_tokens, positions)
        except (ValueError, UserError) as error:
            raise UserError(f"{args.prompts}: {row.place}: {error}") from None
    try:
        # Here too, as a message should not come after a progress bar.
        check_beams(options.num_beams, model.config.vocab_size)
        with tqdm(total=len(prompts) * options.num_samples, desc="completions") as bar:
            completions = generate(model, prompts, options, bar.update)
    except ValueError as error:
        raise _about_flag(error) from None

    lines = []
    for row, samples in zip(rows, completions, strict=True):
        for sample, token_ids in enumerate(samples):
            line = row | {"completion": tokenizer.decode(token_ids), "token_ids": token_ids}
            lines.append(json.dumps(line | {"sample": sample} if options.num_samples > 1 else line) + "\n")
    if args.out is None:
        sys.stdout.write("".join(lines))
    else:
        write_text(args.out, "".join(lines))


FLAGS = {  # of `Options`, and what --help says of them
    "max_new_tokens": "the most tokens of a completion",
    "min_new_tokens": "no end token before that many",
    "num_beams": "above 1: beam search",
    "length_penalty": "of beam search: scores are divided by length to this power",
    "top_k": "draw from the k likeliest tokens; 0: from all",
    "top_p": "draw from the likeliest tokens that together have probability p",
    "repetition_penalty": "for tokens that occurred, in the prompt or after; 1: none",
    "no_repeat_ngram_size": "no n tokens in a row twice; 0: any may",
    "num_samples": "lines of --out for each prompt, numbered by `sample`; with beams, the best so many of them",
    "batch_size": "rows at a time; each beam is one",
    "seed": "of drawing",
}


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser("python -m minift.generate", description="Completes prompts.")
    add = parser.add_argument
    add("--model", required=True, help="a model's directory or hub id")
    add("--prompts", required=True, help='JSONL: {"prompt": …}, or {"instruction": …, "input": …} for the template')
    add("--out", help="JSONL: the same lines with `completion` and `token_ids` (stdout if left out)")
    add("--template", default="course", help="course, alpaca, dialogue, none, or a file (%(default)s)")
    for name, about in FLAGS.items():
        default = getattr(Options(), name)
        add(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"{about} ({default})")
    add("--early-stopping", choices=("true", "false", "never"), default="false", help="of beam search (%(default)s)")
    add("--temperature", type=float, help="0 is greedy, above 0 tokens are drawn (0, or 1 where --top-k, --top-p or "
        "--num-samples without beams ask for drawing)")  # fmt: skip
    add("--device", default="auto", help="cpu, cuda, cuda:N; auto takes a GPU if there is one")
    add("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32", help="(%(default)s)")
    return parser


def _options(args: argparse.Namespace) -> Options:
    values = {name: value for name, value in vars(args).items() if name in Options.__dataclass_fields__}
    values["early_stopping"] = {"true": True, "false": False}.get(args.early_stopping, args.early_stopping)
    if args.temperature is None:
        drawn = args.num_beams == 1 and (args.top_k != 0 or args.top_p != 1 or args.num_samples > 1)
        values["temperature"] = 1.0 if drawn else 0.0
    try:
        return Options(**values)
    except ValueError as error:
        raise _about_flag(error) from None


def _about_flag(error: ValueError) -> UserError:
    name, rest = str(error).split(" ", 1)
    return UserError(f"--{name.replace('_', '-')} {rest}" if name in Options.__dataclass_fields__ else str(error))


if __name__ == "__main__":
    run_command(main)
