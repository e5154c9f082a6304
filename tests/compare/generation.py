"""minift's `generate` and `beam_search` against transformers' `generate`: the same weights, the same prompts.

Tokens, in float32: greedy decoding, and beam search over a grid of options. If two completions differ because of scores
that are closer than 1e-5 to each other, rounding decided, and the difference is only noted.
Sampling: the probabilities that tokens are drawn from, and the drawn tokens by a chi-squared test.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor

from minift import processors
from minift.beam import Search, beam_search
from minift.files.datasets import load_rows
from minift.files.tokenizer import load_tokenizer
from minift.files.weights import load_model
from minift.generate import Completions, Options, generate, process_logits
from minift.model import OPT
from minift.prompts import TEMPLATES
from minift.run.exam import prompt_and_reference
from tests.compare import Check, Setting
from tests.compare.training import DTYPES, reference_model
from tests.reference import padded

PROMPTS, NEW_TOKENS = 200, 10
PROMPTS_EACH = 20  # for each combination of a search and a processor: 72 settings
TIE = 1e-5
REFERENCE_BATCH = 50

Chosen = dict[str, Any]  # values for `Options`
PROCESSORS: list[Chosen] = [
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2},
    {"min_new_tokens": 6},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 6},
]
SEARCHES: list[Chosen] = [
    {"num_beams": beams, "length_penalty": penalty, "early_stopping": stopping}
    for beams, penalty, stopping in product((2, 5), (0.6, 1.0, 2.0), (True, False, "never"))
]
SAMPLINGS: list[Chosen] = [
    {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    for temperature, top_k, top_p in product((0.5, 1.0, 1.7), (0, 5, 50), (1.0, 0.9, 0.5))
]
PROCESSED: Chosen = {"temperature": 0.8, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.3}
DRAWS: list[Chosen] = [
    {"temperature": 1.0},
    {"temperature": 1.7, "top_k": 50},
    {"temperature": 1.2, "top_p": 0.9},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.95},
]


def compare(setting: Setting) -> Iterator[Check]:
    model, reference = load_both(setting, "float32")
    prompts = prompts_of_rows(setting, 8 if setting.quick else PROMPTS, model.config.max_position_embeddings)
    setting.progress(f"generation: how completions of {len(prompts)} prompts end")
    end, remark = end_token(model, load_tokenizer(setting.model).eos_token_id, prompts)

    crossed = [search | processor for search, processor in product(SEARCHES, PROCESSORS)]
    starts = [PROMPTS_EACH * number % len(prompts) for number in range(len(crossed))]
    for what, runs in (
        ("greedy tokens", [(chosen, prompts) for chosen in [{}, *PROCESSORS]]),
        ("tokens of 2 beams", [(chosen, prompts) for chosen in SEARCHES[:9]]),
        ("tokens of 5 beams", [(chosen, prompts) for chosen in SEARCHES[9:]]),
        (
            "tokens of beams with penalties and bans",
            [(chosen, prompts[start : start + PROMPTS_EACH]) for chosen, start in zip(crossed, starts, strict=True)],
        ),
    ):
        if setting.quick:
            runs = runs[:: math.ceil(len(runs) / 3)]
        differ, ties, where = 0, 0, ""
        for chosen, asked in runs:
            setting.progress(f"generation: {what}, {described(chosen)}")
            options = Options(max_new_tokens=NEW_TOKENS, eos_token_id=end, **chosen)
            for number, gap in decisive_gaps(model, reference, asked, options).items():
                if gap < TIE:
                    ties += 1
                else:
                    differ += 1
                    where = where or f"prompt {number + 1} with {described(chosen)}: scores differ by {gap:.1e}"
        explained = f"{ties} more differ where scores are equal within {TIE:g}" if ties else ""
        on = f"{sum(len(asked) for _, asked in runs):,} completions, {len(runs)} settings"
        note = "; ".join(part for part in (where, explained, remark) if part)
        yield Check("generation", what, on, differ, 0, note)

    yield from compare_sampling(setting, prompts)


def compare_sampling(setting: Setting, prompts: list[list[int]]) -> Iterator[Check]:
    # float64 weights: in float32, rounding at the edge of a top-p adds or removes a whole token.
    model, reference = load_both(setting, "float64")
    asked = prompts[:: math.ceil(len(prompts) / (4 if setting.quick else 16))]
    asked.sort(key=len, reverse=True)  # as they enter the batch
    samplings = [*(SAMPLINGS[::5] if setting.quick else SAMPLINGS), PROCESSED]
    apart = []
    for chosen in samplings:
        setting.progress(f"generation: probabilities, {described(chosen)}")
        options = Options(max_new_tokens=1, **chosen)
        ours, theirs = probabilities(model, asked, options), reference_probabilities(reference, asked, options)
        apart.append((ours - theirs).abs().max())
    worst = int(torch.stack(apart).argmax())  # a NaN, if there is one
    on = f"{len(samplings)} settings of temperature, top-k, top-p; {len(asked)} prompts each"
    yield Check(
        "generation", "probabilities of the next token", on, float(apart[worst]), 1e-6, described(samplings[worst])
    )

    # Short ones, because every draw needs a pass over its prompt.
    model, reference = load_both(setting, "float32")
    asked = [prompt[:1] + prompt[-3:] for prompt in asked[: 2 if setting.quick else 8]]
    draws = 400 if setting.quick else 1000
    statistic, freedom = 0.0, 0
    for chosen in DRAWS:
        setting.progress(f"generation: drawing, {described(chosen)}")
        options = Options(max_new_tokens=1, num_samples=draws, batch_size=500, **chosen)
        expected = draws * reference_probabilities(reference, asked, options)  # (prompts, V)
        for samples, wanted in zip(generate(model, asked, options), expected, strict=True):
            drawn = torch.tensor([ids[0] for ids in samples]).bincount(minlength=len(wanted))
            its_statistic, its_freedom = chi_squared(drawn, wanted)
            statistic, freedom = statistic + its_statistic, freedom + its_freedom
    on = f"{len(DRAWS) * len(asked) * draws:,} draws, {freedom} degrees of freedom"
    p = chi_squared_tail(statistic, freedom)
    note = f"exceeded by chance with probability {p:.2g}; the tolerance with 0.001"
    yield Check("generation", "chi-squared of drawn tokens", on, statistic, chi_squared_limit(freedom, 0.001), note)


# ---- models and prompts ----


def load_both(setting: Setting, dtype: str) -> tuple[OPT, transformers.OPTForCausalLM]:
    reference = reference_model(transformers.OPTForCausalLM, setting.model, dtype)
    # Without the options of the folder's generation_config.json: here all of them are arguments.
    reference.generation_config = transformers.GenerationConfig()
    return load_model(setting.model, dtype=DTYPES[dtype]), reference


def prompts_of_rows(setting: Setting, count: int, max_positions: int) -> list[list[int]]:
    """Return prompts from all parts of the data, some with the beginning of their answer.

    One in ten is whole; of the others the last 1 to 40 tokens are kept.
    """
    tokenizer, template = load_tokenizer(setting.model), TEMPLATES["course"]
    rows = load_rows(setting.data)
    count = min(count, len(rows))
    start = tokenizer.encode("")
    room = max_positions - NEW_TOKENS - len(start)
    prompts = []
    for number in range(count):
        row = rows[number * len(rows) // count]
        prompt, _, reference = prompt_and_reference(row, tokenizer, template)
        answer = tokenizer.encode(reference)[len(start) :]
        ids = [*prompt, *answer[: len(answer) * (number % 4) // 4]][len(start) :]
        prompts.append([*start, *ids[-min(room, 1 + number % 40 if number % 10 else len(ids)) :]])
    return prompts


def end_token(model: OPT, eos: int, prompts: list[list[int]]) -> tuple[int, str]:
    """Return a token that ends some completions and not others, and a remark if it is not the model's own EOS."""
    completions = [set(ids) for (ids,) in generate(model, prompts, Options(max_new_tokens=NEW_TOKENS))]
    ended = Counter(token for ids in completions for token in ids)
    if 4 * ended[eos] >= len(prompts):
        return eos, ""
    token = min(ended, key=lambda token: (abs(ended[token] - len(prompts) / 2), token))
    return token, f"token {token} is the EOS here: the model's own ends {ended[eos]} of {len(prompts)}"


def described(chosen: Chosen) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in chosen.items()) or "plain"


# ---- tokens ----


def complete(model: OPT, prompts: Sequence[list[int]], options: Options, *on_progress: Callable) -> Completions:
    """Complete prompts by the search that `options` ask for."""
    return (beam_search if options.num_beams > 1 else generate)(model, prompts, options, *on_progress)


def decisive_gaps(
    model: OPT, reference: transformers.OPTForCausalLM, prompts: Sequence[list[int]], options: Options
) -> dict[int, float]:
    """Return which prompts' completions differ, and the gap between the scores that decided so."""
    ours = [ids for (ids,) in complete(model, prompts, options)]
    theirs = reference_completions(reference, prompts, options)
    differing = [number for number in range(len(prompts)) if ours[number] != theirs[number]]
    if not differing:
        return {}
    exact = copy.deepcopy(reference).double()
    if options.num_beams == 1:
        return {n: gap_of_tokens(exact, prompts[n], ours[n], theirs[n], options) for n in differing}
    # Run both again, recording the beams: both are deterministic.
    our_beams, finished = watched_searches(model, prompts, options)
    their_beams: dict[int, list[list[list[int]]]] = {}
    reference_completions(reference, prompts, options, watch=their_beams)
    return {
        n: gap_of_beams(exact, prompts[n], our_beams[n], finished[n], their_beams[n], (ours[n], theirs[n]), options)
        for n in differing
    }


def reference_completions(
    reference: transformers.OPTForCausalLM,
    prompts: Sequence[list[int]],
    options: Options,
    watch: dict[int, list[list[list[int]]]] | None = None,
) -> list[list[int]]:
    """Return transformers' completions; prompts of similar length share a batch, padded on the left.

    `watch` receives, for each prompt, the new ids of its beams after 0, 1, … tokens.
    """
    by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    found: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(by_length), REFERENCE_BATCH):
        numbers = by_length[start : start + REFERENCE_BATCH]
        inputs = padded([prompts[number] for number in numbers], reference.config.pad_token_id, side="left")
        width = inputs["input_ids"].shape[1]

        def record(ids: Tensor, scores: Tensor, numbers: list[int] = numbers, width: int = width) -> Tensor:
            if watch is not None:
                for number, beams in zip(numbers, ids[:, width:].unflatten(0, (len(numbers), -1)), strict=True):
                    watch.setdefault(number, []).append(beams.tolist())
            return scores

        together = reference.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=options.max_new_tokens,
            min_new_tokens=options.min_new_tokens or None,
            num_beams=options.num_beams,
            length_penalty=options.length_penalty,
            early_stopping=options.early_stopping,
            repetition_penalty=options.repetition_penalty,
            no_repeat_ngram_size=options.no_repeat_ngram_size,
            eos_token_id=options.eos_token_id,
            pad_token_id=reference.config.pad_token_id,
            logits_processor=[record],
        )
        for number, ids in zip(numbers, together[:, width:].tolist(), strict=True):
            end = ids.index(options.eos_token_id) + 1 if options.eos_token_id in ids else len(ids)
            found[number] = ids[:end]
    return found


def watched_searches(
    model: OPT, prompts: Sequence[list[int]], options: Options
) -> tuple[dict[int, list[list[list[int]]]], dict[int, list[list[list[int]]]]]:
    """Run minift's beam searches; return the beams and the finished completions of each prompt after each token."""
    beams: dict[int, list[list[list[int]]]] = {}
    finished: dict[int, list[list[list[int]]]] = {}
    numbers: dict[int, int] = {}  # id of a search → number of its prompt: searches begin in the order of the prompts
    advance = Search.advance

    def record(search: Search, *arguments: Any) -> list[int]:
        number = numbers.setdefault(id(search), len(numbers))
        answer = advance(search, *arguments)
        beams.setdefault(number, []).append([ids[len(prompts[number]) :] for ids in search.beams])
        finished.setdefault(number, []).append([ids for _, ids in search.finished])
        return answer

    with mock.patch.object(Search, "advance", record):
        beam_search(model, prompts, options)
    return beams, finished


@torch.no_grad()
def scores_along(
    exact: transformers.OPTForCausalLM, prompt: list[int], ids: list[int], options: Options
) -> list[float]:
    """Return the processed score, in float64, of each new id given those before it."""
    logits = exact(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]  # (new, V)
    scores = logits if options.num_beams == 1 else logits.log_softmax(1)
    return [
        float(process_logits(scores[index, None], [prompt + ids[:index]], [index], options)[0, token])
        for index, token in enumerate(ids)
    ]


def gap_of_tokens(
    exact: transformers.OPTForCausalLM, prompt: list[int], ours: list[int], theirs: list[int], options: Options
) -> float:
    """Return the gap between the scores of the first two tokens in which two greedy completions differ."""
    length = next(length for length, (a, b) in enumerate(zip(ours, theirs, strict=False), 1) if a != b)
    ours, theirs = (scores_along(exact, prompt, ids[:length], options) for ids in (ours, theirs))
    return abs(ours[-1] - theirs[-1])


def gap_of_beams(
    exact: transformers.OPTForCausalLM,
    prompt: list[int],
    our_beams: list[list[list[int]]],
    finished: list[list[list[int]]],
    their_beams: list[list[list[int]]],
    answers: tuple[list[int], list[int]],
    options: Options,
) -> float:
    """Return the gap between the scores that made two beam searches differ.

    It is at the first step with different beams; if there is none, it is where a completion ends: at the end of the
    search, or when either of the two answers was a beam.
    """

    def total(ids: list[int]) -> float:
        return sum(scores_along(exact, prompt, ids, options))

    def final(ids: list[int]) -> float:
        return total(ids) / len(ids) ** options.length_penalty

    # The reference also records its beams before the first token; after the last one there are none.
    for mine, yours in zip(our_beams[:-1], their_beams[1:], strict=False):
        only_mine = sorted(total(ids) for ids in mine if ids not in yours)
        only_yours = sorted(total(ids) for ids in yours if ids not in mine)
        if only_mine or only_yours:
            return max(abs(a - b) for a, b in zip(only_mine, only_yours, strict=True))
    gaps = [abs(final(answers[0]) - final(answers[1]))]
    for mine, done in zip(our_beams[:-1], finished, strict=False):
        if len(done) == options.num_beams:
            gaps.append(abs(max(map(final, mine)) - min(map(final, done))))
        gaps += [abs(total(ids) - total(beam)) for ids in answers if len(ids) == len(mine[0]) for beam in mine]
    return min(gaps)


# ---- sampling ----


def probabilities(model: OPT, prompts: Sequence[list[int]], options: Options) -> Tensor:
    """Return the probabilities `(R, V)` that minift draws each prompt's next token from."""
    with mock.patch.object(processors, "sample", wraps=processors.sample) as sample:
        generate(model, prompts, options)
    return torch.cat([call.args[0] for call in sample.call_args_list])


def reference_probabilities(
    reference: transformers.OPTForCausalLM, prompts: Sequence[list[int]], options: Options
) -> Tensor:
    """Return the probabilities `(R, V)` that transformers draws each prompt's next token from."""
    answer = reference.generate(
        **padded(prompts, reference.config.pad_token_id, side="left"),
        do_sample=True,
        max_new_tokens=1,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        repetition_penalty=options.repetition_penalty,
        pad_token_id=reference.config.pad_token_id,
        output_scores=True,
        return_dict_in_generate=True,
    )
    return answer.scores[0].softmax(1)


def chi_squared(drawn: Tensor, expected: Tensor) -> tuple[float, int]:
    """Return Pearson's statistic of counts `(V,)` and its degrees of freedom; cells with fewer than 5 are pooled."""
    if drawn[expected == 0].any():
        return math.inf, 0
    rare = expected < 5
    drawn = torch.cat([drawn[~rare], drawn[rare].sum()[None]]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]]).double()
    if expected[-1] < 5 and len(expected) > 1:
        last, drawn, expected = (drawn[-1], expected[-1]), drawn[:-1].clone(), expected[:-1].clone()
        drawn[-1] += last[0]
        expected[-1] += last[1]
    return float(((drawn - expected) ** 2 / expected).sum()), len(expected) - 1


def chi_squared_tail(statistic: float, freedom: int) -> float:
    """Return the probability of a statistic at least as large."""
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def chi_squared_limit(freedom: int, probability: float) -> float:
    """Return the statistic that is exceeded with this probability, by bisection."""
    low, high = 0.0, 10.0 * freedom + 100.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if chi_squared_tail(middle, freedom) > probability else (low, middle)
    return high
