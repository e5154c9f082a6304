"""Completions of prompts: greedy, sampled, or by beam search. Ids in, ids out.

The batch stays full: a search leaves as soon as it has finished, and waiting ones enter in its place. Rows never meet,
so a completion does not depend on the batch it was made in, but for the rounding of matrix products.

Read from the top: the options; the loop (`complete`); what may follow (`process`); what is chosen of it, by greedy
decoding and sampling (`choose_tokens`) or by beam search (`best_continuations`, `Search`); the cache; the command.
"""

import argparse
import json
import math
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minift.batching import collate
from minift.errors import CommandParser, UserError, run_command
from minift.files import check_out, write_text
from minift.model import OPT

Completions = list[list[list[int]]]  # of each prompt, each sample's new ids
Candidate = tuple[float, int, int]  # a beam and the token that may follow it: (Σ log p, beam, token)

OUT_OF_THE_RACE = -1e9  # score of a search's beams 2, 3, … before its first token: they are copies of the first
REFILL_SHARE = 8  # searches enter when an eighth of the batch is free: entering one by one, each would read all weights


def option(default: Any, about: str) -> Any:
    """A field of `Options` that is also a flag, and what --help says of it."""
    return field(default=default, metadata={"about": about})


@dataclass(frozen=True)
class Options:
    """How to complete. Raises ValueError, the option's name first, for a value that makes no sense."""

    max_new_tokens: int = option(128, "the most tokens of a completion")
    min_new_tokens: int = option(0, "no end token before that many")
    eos_token_id: int | None = None
    temperature: float = 0.0  # 0: greedy, or beam search; above: tokens are drawn
    early_stopping: bool | Literal["never"] = False  # of beam search: how to tell that it is over
    num_beams: int = option(1, "above 1: beam search")
    length_penalty: float = option(1.0, "of beam search: scores are divided by length to this power")
    top_k: int = option(0, "draw from the k likeliest tokens; 0: from all")
    top_p: float = option(1.0, "draw from the likeliest tokens that together have probability p")
    repetition_penalty: float = option(1.0, "for tokens that occurred, in the prompt or after; 1: none")
    no_repeat_ngram_size: int = option(0, "no n tokens in a row twice; 0: any may")
    num_samples: int = option(1, "lines of --out for each prompt, numbered by `sample`; with beams, the best ones")
    batch_size: int = option(64, "rows at a time; each beam is one")
    seed: int = option(42, "of drawing")

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
) -> Completions:
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

    was_training = model.training
    model.eval()
    try:
        return complete(model, prompts, options, on_progress or (lambda finished: None))
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


@dataclass
class Search:
    """A completion in the making, or several, by the beam search of a prompt. Without beam search there is one beam."""

    prompt: int
    random: np.random.Generator
    beams: list[list[int]]  # ids of the prompt and the new tokens, best first
    scores: list[float]  # Σ log p of each beam's new tokens
    num_new: int = 0
    finished: list[tuple[float, list[int]]] = field(default_factory=list)  # (Σ log p / length^penalty, new ids), ranked

    def advance(self, candidates: list[Candidate], options: Options) -> list[int]:
        """Take a token: which beam each new beam goes on from, none of them when the search is over.

        `candidates` are, best first, the one token chosen, or the 2 · num_beams best continuations of a beam search:
        at most num_beams of them can end in the EOS, so as many are left to go on with.
        """
        self.num_new += 1
        at_the_end = self.num_new == options.max_new_tokens
        open_ones = []
        for rank, (score, parent, token) in enumerate(candidates):
            ids = [*self.beams[parent], token]
            if not at_the_end and token != options.eos_token_id:
                open_ones.append((score, parent, ids))
            elif rank < options.num_beams:  # an end that is ranked lower is dropped
                self.finished.append((score / self.num_new**options.length_penalty, ids[-self.num_new :]))
        self.finished.sort(key=lambda scored: -scored[0])
        del self.finished[options.num_beams :]
        if not open_ones:
            return []
        self.scores, parents, self.beams = map(list, zip(*open_ones[: options.num_beams], strict=True))
        return parents if self._worth_going_on(options) else []

    def _worth_going_on(self, options: Options) -> bool:
        """Whether the best running beam might still beat the worst finished sequence, as the reference guesses it."""
        if len(self.finished) < options.num_beams:
            return True
        if options.early_stopping is True:
            return False
        longest = options.early_stopping == "never" and options.length_penalty > 0
        length = options.max_new_tokens if longest else self.num_new
        return self.scores[0] / length**options.length_penalty > self.finished[-1][0]


def complete(model: OPT, prompts: Sequence[Sequence[int]], options: Options, on_progress: Callable) -> Completions:
    """The loop of `generate`: one token for every row of the batch, time and again. A search's beams are neighbours."""
    num_beams = options.num_beams
    choose = best_continuations if num_beams > 1 else choose_tokens
    answers = options.num_samples if num_beams > 1 else 1  # of each search
    scores_at_first = [0.0] + [OUT_OF_THE_RACE] * (num_beams - 1)
    searches = [
        Search(number, np.random.default_rng((options.seed, number, sample)), [list(ids)] * num_beams, scores_at_first)
        for number, ids in enumerate(prompts)
        for sample in range(options.num_samples // answers)
    ]
    waiting, live = deque(searches), []
    capacity = min(max(options.batch_size // num_beams, 1), len(searches))
    cache = KVCache(capacity * num_beams)
    while live or waiting:
        entrants = []
        free = capacity - len(live)
        if not live or free * REFILL_SHARE >= capacity:
            entrants = [waiting.popleft() for _ in range(min(free, len(waiting)))]
        live_rows = [ids for search in live for ids in search.beams]
        logits = next_logits(model, cache, live_rows, [search.beams[0] for search in entrants], copies=num_beams)
        live += entrants

        rows = [ids for search in live for ids in search.beams]
        num_new = [search.num_new for search in live for _ in search.beams]
        scores = process(logits.log_softmax(1) if num_beams > 1 else logits, rows, num_new, options)  # (R, V)
        candidates = choose(scores, live, options)
        parents = [search.advance(found, options) for search, found in zip(live, candidates, strict=True)]

        is_over = [not beams for beams in parents]
        if any(is_over):
            on_progress(answers * sum(is_over))
        staying = close_ranks(is_over)
        cache.select([place * num_beams + beam for place in staying for beam in parents[place]])
        live = [live[place] for place in staying]

    completions: Completions = [[] for _ in prompts]
    for search in searches:
        completions[search.prompt] += [ids for _, ids in search.finished[:answers]]
    return completions


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


def choose_tokens(scores: Tensor, searches: list[Search], options: Options) -> list[list[Candidate]]:
    """Greedy decoding and sampling: of scores `(R, V)`, one token for each search."""
    _check_choice(scores.amax(1))
    if options.temperature > 0:
        uniforms = torch.tensor([search.random.random() for search in searches], dtype=torch.float64)
        tokens = draw(scores.softmax(1), uniforms)
    else:
        tokens = scores.argmax(1)
    return [[(0.0, 0, token)] for token in tokens.tolist()]


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens `(R,)` drawn from `(R, V)` by inverting the distribution function at numbers `(R,)` out of [0, 1)."""
    cumulative = probabilities.double().cumsum(1)
    places = uniforms.to(cumulative) * cumulative[:, -1]
    # right=True steps over tokens of probability 0.
    return torch.searchsorted(cumulative, places[:, None], right=True).squeeze(1)


def best_continuations(scores: Tensor, searches: list[Search], options: Options) -> list[list[Candidate]]:
    """Beam search: of log-probabilities `(R, V)`, the 2 · num_beams best continuations of each search, best first."""
    vocab_size = scores.shape[1]
    so_far = torch.tensor([score for search in searches for score in search.scores], device=scores.device)  # (R,)
    totals = (scores + so_far[:, None]).view(len(searches), -1)  # (searches, num_beams * V)
    best = totals.topk(2 * options.num_beams)
    _check_choice(best.values[:, 0])
    return [
        [(score, *divmod(place, vocab_size)) for score, place in zip(*found, strict=True)]
        for found in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def _check_choice(best: Tensor) -> None:
    if not best.isfinite().all():
        raise ValueError("no token can follow: all are banned (no_repeat_ngram_size), or the model's logits are NaN")


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
        self.slots = torch.arange(len(lengths), device=device)  # (R,)
        self.ends = torch.tensor(lengths, device=device)  # (R,)
        self.mask = (torch.arange(self.length, device=device) <= self.ends[:, None])[:, None, None]  # (R, 1, 1, S)

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """`model.Cache`'s: store `(R, H, T, D)`, give back all that attention should see."""
        R, _, T, _ = key.shape
        keys, values = self._room(layer, key)  # (slots, H, capacity, D)
        if self.mask is None:
            entering = slice(self.first_slot, self.first_slot + R * self.copies)
            keys[entering, :, :T] = key.repeat_interleave(self.copies, dim=0)
            values[entering, :, :T] = value.repeat_interleave(self.copies, dim=0)
            return key, value, None
        keys[self.slots, :, self.ends] = key[:, :, 0]  # (R, H, 1, D) -> (R, H, D)
        values[self.slots, :, self.ends] = value[:, :, 0]
        return keys[:R, :, : self.length], values[:R, :, : self.length], self.mask  # (R, H, S, D), (R, 1, 1, S)

    def select(self, sources: list[int]) -> None:
        """Let slot r hold what slot `sources[r]` held: rows that move up, beams that go on from another."""
        moves = [(target, source) for target, source in enumerate(sources) if target != source]
        if not moves:
            return
        targets, origins = torch.tensor(moves, device=self.buffers[0].device).T
        for buffer in self.buffers:  # all sources are read before a slot is written
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
        cache.expect_tokens([len(ids) - 1 for ids in live], device)
        newest = torch.tensor([ids[-1] for ids in live], device=device)  # (N,), N = R
        hidden = model(newest, cache.ends, cache.slots[:, None], cache)  # (R, E)
        logits.append(model.logits(hidden).float())
    if entering:
        batch = collate([(ids, []) for ids in entering]).to(device)
        cache.expect_prompts(len(live), copies, batch.rows.shape[1])
        hidden = model(batch.input_ids, batch.positions, batch.rows, cache)  # (N, E)
        last = batch.rows.amax(1)  # (R,), as −1 stands past a row's end
        logits.append(model.logits(hidden[last]).float().repeat_interleave(copies, dim=0))
    return torch.cat(logits)


def main(arguments: list[str] | None = None) -> None:
    """The command: prompts in, completions out, in the prompts' order."""
    from huggingface_hub.utils import tqdm

    from minift.answers import load_and_prompt
    from minift.datasets import PROMPT_KINDS, load_rows
    from minift.trainer import pick_device

    args = _parser().parse_args(arguments)
    options = _options(args)
    check_out(args.out, "--prompts", args.prompts)
    rows = load_rows(args.prompts, PROMPT_KINDS, mixed=True)
    model, tokenizer, prompts = load_and_prompt(
        args.model,
        rows,
        args.template,
        source=args.prompts,
        max_new_tokens=options.max_new_tokens,
        device=pick_device(args.device),
        dtype=getattr(torch, args.dtype),
    )
    options = replace(options, eos_token_id=tokenizer.eos_token_id)
    try:
        check_beams(options.num_beams, model.config.vocab_size)  # here too, as no message should follow a progress bar
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


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser("python -m minift.generate", description="Completes prompts.")
    add = parser.add_argument
    add("--model", required=True, help="a model's directory or hub id")
    add("--prompts", required=True, help='JSONL: {"prompt": …}, or {"instruction": …, "input": …} for the template')
    add("--out", help="JSONL: the same lines with `completion` and `token_ids` (stdout if left out)")
    add("--template", help="course, alpaca, dialogue, none, or a file (what the model's run.json says, or course)")
    for each in fields(Options):
        if about := each.metadata.get("about"):
            flag = f"--{each.name.replace('_', '-')}"
            add(flag, type=type(each.default), default=each.default, help=f"{about} ({each.default})")
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
