"""Generation against transformers' `generate` and `LogitsProcessor`s, and against forward passes without a cache."""

import json
import math
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.generation import logits_process

from minift import processors, replay
from minift.beam import beam_search
from minift.cache import DecodeStep, Group, KVCache
from minift.commands import generate as command
from minift.errors import UserError
from minift.files.templates import save_template
from minift.files.tokenizer import save_tokenizer
from minift.files.weights import save_model
from minift.generate import Completions, Options, compact, generate, next_logits, process_logits
from minift.lora import adapters_of, add_lora
from minift.model import OPT, Cache, OPTConfig
from minift.prepacked import can_prepack, prepacked
from minift.prompts import Template
from minift.tokenizer import Tokenizer
from tests.compare.generation import PROCESSORS, SEARCHES, complete, reference_completions
from tests.reference import POST_LN, PRE_LN, difference, hidden_states, pack, varied_twins
from tests.runs import mistake, read_lines, write_lines

VOCAB = 40  # of `varied_twins`
MAX_NEW = 12
LENGTHS = (1, 4, 9)
both_architectures = pytest.mark.parametrize("architecture", [PRE_LN, POST_LN])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Compute with one thread: for matrices this small, more of them are several times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ragged_prompts(each: int, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [[2, *torch.randint(3, VOCAB, (n - 1,), generator=generator).tolist()] for _ in range(each) for n in lengths]


def make_options(**values: object) -> Options:
    return Options(**{"max_new_tokens": MAX_NEW} | values)


def frequent_token(model: OPT, prompts: list[list[int]]) -> int:
    """Return a token that the model often generates: as EOS it makes completions of all lengths."""
    completions = generate(model, prompts, make_options())
    return Counter(token for [ids] in completions for token in ids).most_common(2)[1][0]


PROCESSED = {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "min_new_tokens": 5}
# Beside those of `make compare`, of which tests/test_compare.py runs some, on one architecture.
SETTINGS = [
    *[{}, {"no_repeat_ngram_size": 1}, PROCESSED, *PROCESSORS, *SEARCHES],
    {"num_beams": 2, **PROCESSED},
    {"num_beams": 5, **PROCESSED, "early_stopping": True},
    {"num_beams": 3, "length_penalty": -1.0, "early_stopping": "never"},
]


@both_architectures
def test_tokens_are_those_of_transformers(architecture: str) -> None:
    reference, model = varied_twins(architecture)
    prompts = ragged_prompts(each=4)
    end = frequent_token(model, prompts)
    lengths = Counter()
    for chosen in SETTINGS:
        # 17 rows: some prompts enter late, and 5 beams do not divide it.
        options = make_options(eos_token_id=end, batch_size=17, **chosen)
        completions = [ids for (ids,) in complete(model, prompts, options)]
        assert completions == reference_completions(reference, prompts, options), chosen
        lengths.update(map(len, completions))
    assert len(lengths) >= 8  # else few completions have ended


def test_several_samples_of_beam_search_are_its_best() -> None:
    reference, model = varied_twins(POST_LN)
    prompts = ragged_prompts(each=4)
    options = make_options(eos_token_id=frequent_token(model, prompts), num_beams=4, num_samples=3, batch_size=17)
    for prompt, samples in zip(prompts, complete(model, prompts, options), strict=True):
        expected = reference.generate(
            torch.tensor([prompt]),
            do_sample=False,
            num_beams=4,
            num_return_sequences=3,
            max_new_tokens=MAX_NEW,
            eos_token_id=options.eos_token_id,
            pad_token_id=1,
        )
        found = torch.ones_like(expected)  # transformers pads completions that have ended
        for row, ids in enumerate(samples):
            found[row, : len(prompt) + len(ids)] = torch.tensor(prompt + ids)
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "chosen",
    [
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 3},
        {"min_new_tokens": 3},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 0.3, "top_k": 99, "top_p": 0.95, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
def test_processors_are_those_of_transformers(chosen: dict) -> None:
    options = Options(eos_token_id=7, **chosen)
    generator = torch.Generator().manual_seed(3)
    # Few different ids, so that n-grams repeat; rows of different lengths share a call of ours.
    rows = [torch.randint(0, 4, (n,), generator=generator).tolist() for n in (1, 2, 9, 30, 30, 17)]
    num_new = [0, 1, 2, 3, 4, 5]
    scores = 3 * torch.randn(len(rows), VOCAB, generator=generator)
    before = scores.clone()
    ours = process_logits(scores, rows, num_new, options)
    assert torch.equal(scores, before)
    assert not torch.equal(ours, before)
    for row, (ids, new) in enumerate(zip(rows, num_new, strict=True)):
        expected = scores[row : row + 1]
        for processor in reference_processors(options, prompt_length=len(ids) - new):
            expected = processor(torch.tensor([ids]), expected)
        assert torch.equal(ours[row].isinf(), expected[0].isinf())
        torch.testing.assert_close(ours[row].softmax(0), expected[0].softmax(0), rtol=0, atol=1e-6)
        torch.testing.assert_close(ours[row], expected[0])


def reference_processors(options: Options, prompt_length: int) -> list[logits_process.LogitsProcessor]:
    """Return them in the order of transformers' `_get_logits_processor`."""
    chosen: list[logits_process.LogitsProcessor] = []
    if options.repetition_penalty != 1:
        chosen.append(logits_process.RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    if options.no_repeat_ngram_size:
        chosen.append(logits_process.NoRepeatNGramLogitsProcessor(options.no_repeat_ngram_size))
    if options.min_new_tokens:
        chosen.append(logits_process.MinNewTokensLengthLogitsProcessor(prompt_length, options.min_new_tokens, 7))
    if options.temperature:
        chosen.append(logits_process.TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        chosen.append(logits_process.TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        chosen.append(logits_process.TopPLogitsWarper(options.top_p))
    return chosen


def test_top_p_keeps_the_fewest_tokens_with_probability_p() -> None:
    """Keep 0.5 and 0.3 of 0.5, 0.3, 0.15, 0.05: the two most probable sum to at least 0.7."""
    scores = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    kept = processors.keep_top_p(scores, 0.7).softmax(1)
    torch.testing.assert_close(kept, torch.tensor([[0, 0.625, 0, 0.375]]))


def test_sampling_inverts_the_distribution_function() -> None:
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]]).expand(6, -1)
    uniforms = [0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53]
    assert processors.sample(probabilities, uniforms).tolist() == [1, 1, 3, 3, 4, 4]


SAMPLED = {"temperature": 3.0, "top_p": 0.95, "num_samples": 3}
STRATEGIES = [{}, PROCESSED, SAMPLED, {"num_beams": 5, "num_samples": 5}]


@pytest.mark.parametrize("chosen", STRATEGIES, ids=["greedy", "processed", "sampled", "beams"])
@both_architectures
def test_the_batch_changes_nothing(architecture: str, chosen: dict) -> None:
    _, model = varied_twins(architecture, torch.float64)
    prompts = ragged_prompts(each=4, lengths=(1, 3, 9, 6))
    end = frequent_token(model, prompts)
    alone, seven, all_at_once = (
        complete(model, prompts, make_options(eos_token_id=end, batch_size=size, **chosen)) for size in (1, 7, 64)
    )
    assert alone == seven == all_at_once
    assert len({tuple(ids) for samples in alone for ids in samples}) > len(prompts) / 2


def test_each_sample_has_a_generator_of_its_own() -> None:
    _, model = varied_twins(POST_LN, torch.float64)
    prompts = ragged_prompts(each=2)
    many = make_options(**SAMPLED)
    three = generate(model, prompts, many)
    assert generate(model, prompts[:2], many) == three[:2]  # other prompts do not matter
    one = make_options(**SAMPLED | {"num_samples": 1})
    assert [samples[:1] for samples in three] == generate(model, prompts, one)  # nor do other samples
    assert generate(model, prompts, make_options(seed=43, **SAMPLED)) != three
    same_prompt = generate(model, [prompts[0], prompts[0]], many)
    assert len({tuple(ids) for samples in same_prompt for ids in samples}) == 6


# ---- prepacked weights ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_adapters", [False, True], ids=["plain", "LoRA"])
@both_architectures
def test_prepacked_weights_compute_the_same(architecture: str, has_adapters: bool, dtype: torch.dtype) -> None:
    """Within the block the products are oneDNN's; after it, also after an error, the model is as before."""
    if not can_prepack(torch.zeros(1, dtype=dtype)):
        pytest.skip(f"oneDNN does not multiply {dtype} on this processor")
    _, model = varied_twins(architecture)
    model = model.to(dtype)
    if has_adapters:
        add_lora(model, 2, 4.0, 0.0, ["q_proj", "fc1"])
        for adapter in adapters_of(model).values():
            torch.nn.init.normal_(adapter.lora_B.weight, std=0.1)
    batch = pack(ragged_prompts(each=2))
    attributes = [{*vars(module)} for module in model.modules()]
    with torch.no_grad():
        expected = model.logits(hidden_states(model, batch))
        with prepacked(model, 1 if dtype == torch.float32 else 0):  # too few rows
            assert [{*vars(module)} for module in model.modules()] == attributes
        with pytest.raises(KeyError), prepacked(model, 4):
            methods = [
                name for module in model.modules() for name in ("logits", "project", "forward") if name in vars(module)
            ]
            found = model.logits(hidden_states(model, batch))
            raise KeyError
    # The head; out_proj, fc1 and fc2 of two layers; q, k and v at once, or each of them where q has an adapter.
    projections = 2 if architecture == POST_LN else 0
    assert len(methods) == 1 + 2 * 3 + (2 * (3 + 2 * 2) if has_adapters else 2) + projections
    assert [{*vars(module)} for module in model.modules()] == attributes
    assert difference(found, expected) < (1e-5 if dtype == torch.float32 else 0.05) * expected.abs().max()


def test_on_a_gpu_queries_keys_and_values_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = varied_twins(PRE_LN, torch.float64)
    batch = pack(ragged_prompts(each=2))
    seen: list[Tensor] = []
    watched = model.decoder.layers[1].self_attn.q_proj
    watched.register_forward_hook(lambda module, inputs, output: seen.append(output))
    monkeypatch.setattr("minift.prepacked.is_on_gpu", lambda weight: True)
    attributes = [{*vars(module)} for module in model.modules()]
    with torch.no_grad():
        expected = hidden_states(model, batch)
        with prepacked(model, 1):
            changed = [{*vars(module)} for module in model.modules()]
            with prepacked(model, 1):
                found = hidden_states(model, batch)
            assert [{*vars(module)} for module in model.modules()] == changed
    added = [after - before for before, after in zip(attributes, changed, strict=True) if before != after]
    assert added == [{"project"}] and len(seen) == 2
    assert difference(found, expected) < 1e-12
    assert [{*vars(module)} for module in model.modules()] == attributes


def test_what_is_changed_or_watched_is_not_prepacked() -> None:
    """A subclass and a hook used to be passed over; nested blocks and autocast used to end in an error."""

    class Doubled(torch.nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return 2 * super().forward(hidden)

    _, model = varied_twins(PRE_LN)
    first, second = model.decoder.layers
    first.fc2.__class__ = Doubled
    second.fc1.forward = changed = lambda hidden: 3 * torch.nn.Linear.forward(second.fc1, hidden)
    seen: list[Tensor] = []
    second.self_attn.q_proj.register_forward_hook(lambda module, inputs, output: seen.append(output))
    batch = pack(ragged_prompts(each=2))
    attributes = [{*vars(module)} for module in model.modules()]
    with torch.no_grad():
        expected = model.logits(hidden_states(model, batch))
        with torch.autocast("cpu", dtype=torch.bfloat16), prepacked(model, 4):
            assert [{*vars(module)} for module in model.modules()] == attributes
        with prepacked(model, 4):
            with prepacked(model, 4):
                inner = model.logits(hidden_states(model, batch))
            assert "forward" in vars(first.fc1)
            outer = model.logits(hidden_states(model, batch))
    for found in (inner, outer):
        assert difference(found, expected) < 1e-5 * expected.abs().max()
    assert len(seen) == 3 and second.fc1.forward is changed
    assert [{*vars(module)} for module in model.modules()] == attributes


# ---- the cache ----


class RecordedOnCPU:
    """In place of a CUDA graph: it computes the step again, in the memory of the first time."""

    def __init__(self, model: OPT, cache: KVCache, inputs: Tensor, is_seen: Tensor, groups: list[Group]) -> None:
        self.cache, self.groups, self.memory = cache, groups, self.addresses(cache)
        self.step = partial(replay.decode_step, model, cache, inputs, is_seen, groups)
        self.logits = torch.full((inputs.shape[1], model.config.vocab_size), math.nan)

    @staticmethod
    def addresses(cache: KVCache) -> list[int]:
        return [layer.data_ptr() for layer in cache.layers]

    def replay(self) -> None:
        assert self.addresses(self.cache) == self.memory
        self.logits.copy_(self.step())


class OneDevice(TorchDispatchMode):
    """Refuse operations that copy between devices, which no recorded step may do. On meta, reading is an error too."""

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = operation(*arguments, **(options or {}))
        devices = {found.device.type for found in tree_leaves((arguments, result)) if isinstance(found, Tensor)}
        assert len(devices) < 2, operation
        return result


@both_architectures
@pytest.mark.parametrize("rows_per_prompt", [1, 3])
@torch.no_grad()
def test_a_decode_step_stays_on_its_device(architecture: str, rows_per_prompt: int) -> None:
    """Let torch trace it on its meta device, which computes no values."""
    model = varied_twins(architecture)[1].to("meta")
    cache, prompts = KVCache(20, rows_per_prompt), sorted(ragged_prompts(each=6), key=len, reverse=True)
    next_logits(model, cache, [], prompts)
    inputs = torch.zeros(3, 20 * rows_per_prompt, dtype=torch.long, device="meta")
    is_seen = cache.is_seen.to("meta")
    with OneDevice():
        logits = replay.decode_step(model, cache, inputs, is_seen, cache.groups_with_room())
    assert logits.shape == (20 * rows_per_prompt, VOCAB) and logits.device.type == "meta"
    with pytest.raises(AssertionError), OneDevice():
        torch.zeros(2).to("meta")


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[RecordedOnCPU]:
    """Record decode steps as on a GPU, and list them."""
    made: list[RecordedOnCPU] = []

    def capture(*about: Any) -> tuple[RecordedOnCPU, Tensor]:
        made.append(RecordedOnCPU(*about))
        return made[-1], made[-1].logits

    monkeypatch.setattr(replay, "can_record", lambda weight: True)
    monkeypatch.setattr(replay, "capture", capture)
    return made


@torch.no_grad()
@both_architectures
@pytest.mark.parametrize("is_recorded", [False, True])
@pytest.mark.parametrize(
    ("rows_per_prompt", "moves"),
    [
        (1, {2: [0, 5, 2, 3, 4], 3: [0, 1, 2], 6: [3, 3, 0, 3, 1], 9: [4, 1]}),
        (2, {2: [1, 0, 3, 3, 8, 8, 10, 11], 3: [6, 7], 6: [3, 3, 0, 1, 4, 5], 9: [4, 4]}),
    ],
)
def test_cached_logits_are_those_of_the_whole_row(
    architecture: str, is_recorded: bool, rows_per_prompt: int, moves: dict[int, list[int]],
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Let prompts enter, each for one row or for two, reorder rows and grow buffers, and compare after each step."""
    monkeypatch.setattr("minift.cache.MIN_ROOM", 4)
    monkeypatch.setattr("minift.cache.MIN_DIVIDED", 8)
    recordings = request.getfixturevalue("recordings") if is_recorded else []
    _, model = varied_twins(architecture, torch.float64)
    generator = torch.Generator().manual_seed(4)
    cache = KVCache(8, rows_per_prompt)
    active: list[list[int]] = []
    entrances = {0: ragged_prompts(each=2), 4: [[2, 6, 7], [2, 5]], 10: ragged_prompts(each=1)}
    for step in range(30):
        entering = sorted(entrances.get(step, []), key=len, reverse=True)
        logits = next_logits(model, cache, [ids[-1] for ids in active], entering)
        active = active + [list(prompt) for prompt in entering for _ in range(rows_per_prompt)]
        for row, ids in enumerate(active):
            whole = model.logits(hidden_states(model, pack([ids]))[-1:])
            torch.testing.assert_close(logits[row].double(), whole[0], rtol=1e-6, atol=1e-6)
        active = [[*ids, int(torch.randint(0, VOCAB, (), generator=generator))] for ids in active]
        parents = moves.get(step, list(range(len(active))))
        cache.reorder(parents)
        active = [list(active[parent]) for parent in parents]
    assert len(active) == len(moves[9]) + 3 * rows_per_prompt
    # A step is recorded anew when a row has outgrown its group, not in each of the 29 decode steps.
    assert len(recordings) == ({1: 4, 2: 6}[rows_per_prompt] if is_recorded else 0)
    assert all(len(recording.groups) == 2 for recording in recordings)


@torch.no_grad()
def test_columns_that_no_row_sees_are_used_again() -> None:
    """Let three rows continue the same one in each step: one column is added in each, and two are used again."""
    _, model = varied_twins(PRE_LN, torch.float64)
    cache, prompt = KVCache(2, 3), [2, 5, 9]
    logits = next_logits(model, cache, [], [prompt, prompt[:2]])
    rows = [list(ids) for ids in (prompt, prompt[:2]) for _ in range(3)]
    for step in range(1, 8):
        tokens = logits.topk(3).indices[::3]  # (prompts, 3)
        rows = [[*ids, token] for ids, token in zip(rows, tokens.flatten().tolist(), strict=True)]
        logits = next_logits(model, cache, [ids[-1] for ids in rows], [])
        for row, ids in enumerate(rows):
            whole = model.logits(hidden_states(model, pack([ids]))[-1:])
            torch.testing.assert_close(logits[row].double(), whole[0], rtol=1e-6, atol=1e-6)
        assert cache.widths() == [len(prompt) + step + 2, len(prompt) - 1 + step + 2]
        parents = [1, 1, 1, 5, 5, 5]
        cache.reorder(parents)
        rows, logits = [list(rows[parent]) for parent in parents], logits[parents]


def test_a_move_copies_no_more_columns_than_the_moved_slot_has() -> None:
    """A long prompt in another slot made each move copy as many columns as it has."""
    cache = KVCache(3)
    cache.make_room(50)
    cache.layers = [torch.arange(2 * 3 * cache.room).double().view(2, 3, 1, cache.room, 1)]
    cache.enter([50, 8, 6])
    before = cache.layers[0].clone()
    cache.reorder([0, 2])
    assert torch.equal(cache.layers[0][:, 1, :, :6], before[:, 2, :, :6])
    assert torch.equal(cache.layers[0][:, 1, :, 6:], before[:, 1, :, 6:])
    assert cache.positions == [50, 6] and cache.widths() == [50, 6]


@both_architectures
def test_recorded_steps_generate_the_same(architecture: str, request: pytest.FixtureRequest) -> None:
    """All slots take part in a recorded step: those never used, those left, and those with new rows."""
    _, model = varied_twins(architecture, torch.float64)
    prompts = ragged_prompts(each=8)
    settings = [{"batch_size": 17}, {}, {"num_beams": 3}, {"temperature": 1.0, "num_samples": 3, "batch_size": 20}]
    settings += [{"repetition_penalty": 1.3}]
    end = frequent_token(model, prompts)
    options = [make_options(**{"eos_token_id": end, "batch_size": 7} | some) for some in settings]
    searches = [beam_search if some.num_beams > 1 else generate for some in options]
    expected = [search(model, prompts, some) for search, some in zip(searches, options, strict=True)]
    recordings = request.getfixturevalue("recordings")
    assert [search(model, prompts, some) for search, some in zip(searches, options, strict=True)] == expected
    assert len(recordings) == len(settings)  # MIN_ROOM is more than all new tokens, and later prompts are shorter
    assert {len(recording.groups) for recording in recordings} == {1, 2}


@torch.no_grad()
def test_a_recording_does_not_outlive_the_buffers(
    recordings: list[RecordedOnCPU], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt makes them grow and leaves at once, so that the recorded groups would still fit."""
    _, model = varied_twins(PRE_LN, torch.float64)
    monkeypatch.setattr("minift.cache.MIN_ROOM", 4)
    cache = KVCache(2)
    next_logits(model, cache, [], [[2, 5, 9]])
    next_logits(model, cache, [7], [])
    next_logits(model, cache, [4], [[2] * 30])
    cache.reorder([0])
    [found] = next_logits(model, cache, [8], [])
    whole = model.logits(hidden_states(model, pack([[2, 5, 9, 7, 4, 8]]))[-1:])
    torch.testing.assert_close(found.double(), whole[0], rtol=1e-6, atol=1e-6)
    assert len(recordings) == 2


def test_steps_are_recorded_as_seldom_as_possible(
    recordings: list[RecordedOnCPU], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step of a kind is run once before it is recorded. No other step is computed twice."""
    _, model = varied_twins(POST_LN)
    monkeypatch.setattr(replay, "_run_before", set())
    monkeypatch.setattr("minift.cache.MIN_ROOM", 4)
    steps: list[int] = []
    forward = model.forward

    def counted(input_ids: Tensor, positions: Tensor, rows: Tensor, cache: Cache, **options: Any) -> Tensor:
        if isinstance(cache, DecodeStep):
            steps.append(len(rows))
        return forward(input_ids, positions, rows, cache, **options)

    monkeypatch.setattr(model, "forward", counted)
    prompts = ragged_prompts(each=8)
    for number_of_steps in (MAX_NEW, MAX_NEW - 1):
        generate(model, prompts, make_options(batch_size=24))
        assert steps == [24] * number_of_steps
        assert [[group.width for group in recording.groups] for recording in recordings] == [[16, 16], [24, 24]]
        steps.clear()
        recordings.clear()


@torch.no_grad()
def test_interleaved_caches_and_models_do_not_affect_each_other() -> None:
    """Interleave decoding: a model keeps no state of a cache, which is an argument of each forward pass."""

    def decode(model: OPT, prompts: list[list[int]]) -> Iterator[Tensor]:
        cache, rows = KVCache(len(prompts)), []
        for step in range(MAX_NEW):
            entering = prompts[step : step + 1]  # the others decode meanwhile
            logits = next_logits(model, cache, [ids[-1] for ids in rows], entering)
            rows = [*rows, *entering]
            rows = [[*ids, token] for ids, token in zip(rows, logits.argmax(1).tolist(), strict=True)]
            yield logits

    (_, first), (_, second) = varied_twins(PRE_LN), varied_twins(POST_LN)
    prompts = ragged_prompts(each=2)
    runs = [(first, prompts), (second, prompts), (first, prompts[::-1]), (second, prompts[2:])]
    steps = list(zip(*(decode(*run) for run in runs), strict=True))  # a step of each run in turn
    for run, interleaved in zip(runs, zip(*steps, strict=True), strict=True):
        assert all(map(torch.equal, interleaved, decode(*run)))
    batch = pack(prompts)
    without_cache = hidden_states(first, batch)
    generate(first, prompts, make_options())
    assert torch.equal(hidden_states(first, batch), without_cache)


def test_the_cache_is_used_and_the_batch_stays_full(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = varied_twins(POST_LN)
    prompts = ragged_prompts(each=16)
    end = frequent_token(model, prompts)
    calls: list[tuple[int, bool]] = []
    forward = model.forward

    def counted(input_ids: Tensor, positions: Tensor, rows: Tensor, cache: Cache, **options: Any) -> Tensor:
        calls.append((len(rows), isinstance(cache, DecodeStep)))
        return forward(input_ids, positions, rows, cache, **options)

    monkeypatch.setattr(model, "forward", counted)
    completions = generate(model, prompts, make_options(eos_token_id=end, batch_size=8))
    lengths = [len(ids) for [ids] in completions]
    decoding = [rows for rows, decodes in calls if decodes]
    assert max(rows for rows, _ in calls) == 8
    assert sum(decoding) == sum(length - 1 for length in lengths)  # each token but a row's last is fed once
    # Without rows that enter late, each batch of eight would last as long as its longest row.
    entered = [length for _, length in sorted(zip(map(len, prompts), lengths, strict=True), key=lambda each: -each[0])]
    static_steps = sum(max(entered[start : start + 8]) for start in range(0, len(entered), 8))
    assert len(decoding) < 0.9 * static_steps


def test_each_prompt_has_its_own_limit() -> None:
    """Give each prompt its limit: one with little room used to shorten the answers to all others."""
    _, model = varied_twins(PRE_LN)
    prompts = [[3 + token % 37 for token in range(length)] for length in (4, 9, 60)]
    alone = generate(model, prompts[:2], Options(max_new_tokens=MAX_NEW, batch_size=2))
    for size in (1, 3):
        completions = generate(model, prompts, Options(batch_size=size), limits=[MAX_NEW, MAX_NEW, 4])
        assert completions[:2] == alone and len(completions[2][0]) == 4
    with pytest.raises(ValueError, match="prompt 2 has 60 tokens and 5 new ones may follow"):
        generate(model, prompts, Options(), limits=[MAX_NEW, MAX_NEW, 5])


def test_compacting_moves_only_into_free_slots() -> None:
    assert compact([]) == compact([False, False]) == []
    assert compact([True, True, False]) == [0, 1]
    rng = random.Random(0)
    for _ in range(100):
        stays = [rng.random() < 0.6 for _ in range(rng.randint(1, 9))]
        kept = compact(stays)
        assert sorted(kept) == [slot for slot, stay in enumerate(stays) if stay]
        assert all(old == new for new, old in enumerate(kept) if stays[new])


# ---- ends, progress, wrong values ----


@pytest.mark.parametrize("chosen", [{}, SAMPLED, {"num_beams": 3}], ids=["greedy", "sampled", "beams"])
def test_the_end_token(chosen: dict) -> None:
    _, model = varied_twins(POST_LN)
    prompts = ragged_prompts(each=4)
    end = frequent_token(model, prompts)

    def completions(**changes: int | None) -> list[list[int]]:
        options = make_options(**{"eos_token_id": end} | chosen | changes)
        return [ids for samples in complete(model, prompts, options) for ids in samples]

    ended = completions()
    assert all(end not in ids[:-1] and (len(ids) == MAX_NEW or ids[-1] == end) for ids in ended)
    assert len({len(ids) for ids in ended}) > 2
    assert min(map(len, ended)) < 6 <= min(map(len, completions(min_new_tokens=5)))
    assert all(len(ids) == MAX_NEW for ids in completions(eos_token_id=None))
    assert all(len(ids) == 1 for ids in completions(max_new_tokens=1))


def test_mode_and_progress() -> None:
    _, model = varied_twins(PRE_LN)
    model.train()
    finished = []
    for chosen in (SAMPLED, {"num_beams": 3, "num_samples": 3}):
        options = Options(max_new_tokens=4, batch_size=4, **chosen)
        completions = complete(model, ragged_prompts(each=1), options, finished.append)
        assert sum(finished) == 9 and len(completions) == 3
        finished.clear()
    assert model.training
    # Dropout 0.1 is off while generating, or two runs would differ.
    first, second = (generate(model, ragged_prompts(each=4), Options(max_new_tokens=8)) for _ in range(2))
    assert first == second
    assert complete(model, [], Options()) == complete(model, [], Options(num_beams=2)) == []


WRONG_OPTIONS = [
    ("num_beams", 0),
    ("top_p", 2.0),
    ("top_p", math.nan),
    ("temperature", -1.0),
    ("temperature", math.inf),
    ("temperature", 1e-39),
    ("repetition_penalty", 1e-39),
    ("max_new_tokens", 10**400),
    ("num_samples", 10**24),
    ("top_k", -1),
    ("top_k", 5),  # at temperature 0
    ("num_samples", 0),
    ("num_samples", 2),  # two greedy completions would be equal
    ("max_new_tokens", 0),
    ("min_new_tokens", 129),
    ("repetition_penalty", 0.0),
    ("no_repeat_ngram_size", -1),
    ("length_penalty", math.nan),
    ("early_stopping", "always"),
    ("batch_size", 0),
    ("seed", -1),
]


@pytest.mark.parametrize(("name", "value"), WRONG_OPTIONS)
def test_wrong_options_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name} is {value}, expected"):
        Options(**{name: value})


def test_prompts_and_options_that_do_not_suit_the_model() -> None:
    _, model = varied_twins(PRE_LN)
    for num_beams in (1, 2):
        four = Options(max_new_tokens=4, num_beams=num_beams)
        with pytest.raises(ValueError, match="^prompt 1 is empty"):
            complete(model, [[2], []], four)
        with pytest.raises(ValueError, match="^prompt 0 has 61 tokens.*64 positions"):
            complete(model, [[2] * 61], four)
        assert len(complete(model, [[2] * 60], four)[0][0]) == 4
        with pytest.raises(ValueError, match="no_repeat_ngram_size"):
            banned = Options(no_repeat_ngram_size=1, max_new_tokens=4, num_beams=num_beams)
            complete(model, [list(range(VOCAB))], banned)
    with pytest.raises(ValueError, match="^num_beams is 21, expected at most half of 40"):
        beam_search(model, [[2]], Options(num_beams=21, max_new_tokens=4))
    with pytest.raises(ValueError, match="^num_beams is 2, expected 1.*beam_search"):
        generate(model, [[2]], Options(num_beams=2))
    with pytest.raises(ValueError, match="temperature.*does not sample"):
        Options(num_beams=2, temperature=1.0)


# ---- minift generate ----


@pytest.fixture(scope="module")
def model_directory(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = OPTConfig(512, 16, 2, 2, 32, 16, max_position_embeddings=64, do_layer_norm_before=False)
    save_model(OPT(config), directory)
    save_tokenizer(tokenizer, directory)
    return directory


PROMPTS = [
    {"prompt": "def add(first", "id": 7},
    {"instruction": "Write a list.", "input": "1, 2", "id": 8},
    {"instruction": "Write a function.", "output": "from the data set", "checks": [{"expression": "1 / 0"}]},
]


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "prompts.jsonl", PROMPTS)


def run(model: Path, prompts: Path, *more: str) -> None:
    command.main(["--model", str(model), "--prompts", str(prompts), "--max-new-tokens", "6", *more])


def test_command(
    model_directory: Path, prompts_file: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    out = prompts_file.with_name("out.jsonl")
    run(model_directory, prompts_file, "--out", str(out))
    assert capsys.readouterr().out == ""
    lines = read_lines(out)
    reference = transformers.OPTForCausalLM.from_pretrained(model_directory).eval()
    texts = [
        "def add(first",
        "### Instruction:\nWrite a list.\n\n### Input:\n1, 2\n\n### Response:\n",
        "### Instruction:\nWrite a function.\n\n### Response:\n",
    ]
    prompts = [tokenizer.encode(text) for text in texts]
    expected = reference_completions(reference, prompts, Options(max_new_tokens=6, eos_token_id=2))
    assert [line["token_ids"] for line in lines] == expected
    for line, row in zip(lines, PROMPTS, strict=True):
        assert line == row | {"completion": tokenizer.decode(line["token_ids"]), "token_ids": line["token_ids"]}

    run(model_directory, prompts_file)
    assert capsys.readouterr().out == out.read_text()
    assert [path.name for path in sorted(out.parent.iterdir())] == ["out.jsonl", "prompts.jsonl"]


def test_the_template_is_that_of_the_model_unless_named(
    model_directory: Path, prompts_file: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def record(language_model: object, prompts: list[list[int]], *_: object) -> Completions:
        asked.append([tokenizer.decode(ids) for ids in prompts])
        return [[[2]] for _ in prompts]

    monkeypatch.setattr(command, "complete", record)
    model = shutil.copytree(model_directory, tmp_path / "tuned")
    save_template(Template("own.txt", "{input}? {instruction}!{response}", "{instruction}!{response}"), model)
    run(model, prompts_file)
    run(model, prompts_file, "--template", "none")
    assert asked == [
        ["def add(first", "1, 2? Write a list.!", "Write a function.!"],
        ["def add(first", "Write a list.\n\n1, 2", "Write a function."],
    ]


def test_command_writes_a_line_for_each_sample(model_directory: Path, prompts_file: Path) -> None:
    out = prompts_file.with_name("out.jsonl")
    for flags in (["--num-samples", "3"], ["--num-samples", "3", "--num-beams", "4", "--early-stopping", "true"]):
        run(model_directory, prompts_file, "--out", str(out), *flags)
        lines = read_lines(out)
        assert [line["sample"] for line in lines] == [0, 1, 2] * 3
        assert [line.get("id") for line in lines] == [7] * 3 + [8] * 3 + [None] * 3
        assert len({tuple(line["token_ids"]) for line in lines[:3]}) == 3


@pytest.mark.parametrize(
    ("flags", "sampled"),
    [
        ([], False),
        (["--top-k", "3"], True),
        (["--top-p", "0.9"], True),
        (["--temperature", "0.5"], True),
        (["--temperature", "0"], False),
        (["--num-samples", "2"], True),
        (["--num-samples", "2", "--num-beams", "2"], False),
        (["--top-p", "1.0", "--top-k", "0"], False),
    ],
    ids=str,
)
def test_flags_that_ask_for_sampling(flags: list[str], sampled: bool) -> None:
    arguments = command._parser().parse_args(["--model", "m", "--prompts", "p", *flags])
    assert (command._options(arguments).temperature > 0) == sampled


WRONG_COMMANDS = [
    (["--num-beams", "0"], "--num-beams is 0, expected 1 or more"),
    (["--temperature", "1e-39"], "--temperature is 1e-39, expected 0 (greedy) or 1e-9 or more"),
    (["--num-beams", "two"], "--num-beams: invalid int value: 'two'"),
    (["--top-p", "2"], "--top-p is 2.0, expected 0 to 1"),
    (["--temperature", "-1"], "--temperature is -1.0"),
    (["--temperature", "0", "--top-k", "5"], "--top-k is 5, expected 0 at temperature 0"),
    (["--early-stopping", "maybe"], "--early-stopping"),
    (["--num-beams", "400"], "--num-beams is 400, expected at most half"),
    (["--no-such-flag", "1"], "--no-such-flag"),
    (["--template", "nowhere.txt"], "--template nowhere.txt"),
    (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--model", "nowhere"], "nowhere"),
    (["--max-new-tokens", "60"], "prompts.jsonl: line 1: the prompt has"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG_COMMANDS, ids=str)
def test_a_wrong_command_is_one_line(
    flags: list[str], message: str, model_directory: Path, prompts_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = prompts_file.with_name("out.jsonl")
    given = ["--model", str(model_directory), "--prompts", str(prompts_file), "--out", str(out)]
    assert message in mistake(command.main, [*given, "--max-new-tokens", "6", *flags], capsys)
    assert [path.name for path in out.parent.iterdir()] == ["prompts.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        # tests/test_datasets.py has the other messages about rows.
        ('{"prompt": "a"', ":2:15: malformed JSON"),
        ('{"text": "a"}', ":2: no field of a row in it, expected 'instruction', or 'prompt'"),
        (json.dumps({"prompt": "word " * 80}), ": line 2: the prompt has"),
        ('{"prompt": "a", "completion": "b"}', ": line 2: the row has a field 'completion', which is to be added"),
        ('{"prompt": "a", "token_ids": []}', ": line 2: the row has a field 'token_ids'"),
        ('{"prompt": "a", "id": "\\ud800"}', ": line 2: field 'id' has a lone surrogate"),
        ('{"instruction": "a", "prompt": 3}', ":2: field 'prompt' is 3, expected a string"),
        ('{"question": "a"}', ":2: no field of a row in it"),
    ],
    ids=str,
)
def test_a_wrong_prompt_is_named_by_its_line(
    line: str, message: str, model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wrong.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    given = ["--model", str(model_directory), "--prompts", str(path), "--max-new-tokens", "6"]
    assert f"{path}{message}" in mistake(command.main, given, capsys)


def test_a_sample_is_refused_where_samples_are_numbered(
    model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "a", "sample": 3}])
    run(model_directory, path)
    assert json.loads(capsys.readouterr().out)["sample"] == 3
    monkeypatch.setattr(command, "load_language_model", None)  # refused before any work
    given = ["--model", str(model_directory), "--prompts", str(path), "--num-samples", "2"]
    assert "line 1: the row has a field 'sample'" in mistake(command.main, given, capsys)


def test_null_is_absent_and_a_prompt_that_is_wrapped_twice_is_counted(
    model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"instruction": "Add.", "prompt": None, "input": None, "completion": None},
        {"instruction": "Human: Hi\n\nAssistant:"},
        {"prompt": "Human: Hi\n\nAssistant:", "input": 1},
    ]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    run(model_directory, path)
    printed = capsys.readouterr()
    assert [json.loads(line).keys() - {"token_ids"} for line in printed.out.splitlines()] == [
        {"instruction", "completion"}, {"instruction", "completion"}, {"prompt", "input", "completion"}
    ]  # fmt: skip
    assert "1 row whose question is a prompt already" in printed.err and "(line 2)" in printed.err
    assert "1 row whose 'input' is not read (line 3)" in printed.err
    run(model_directory, path, "--template", "none")
    assert "already" not in capsys.readouterr().err


def test_files_without_prompts(model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, binary = tmp_path / "empty.jsonl", tmp_path / "binary.jsonl"
    empty.write_text("\n")
    binary.write_bytes(b"\xff\xfe\x00")
    for path, message in ((empty, "no rows"), (binary, "not UTF-8"), (tmp_path, "a directory")):
        assert message in mistake(command.main, ["--model", str(model_directory), "--prompts", str(path)], capsys)


def test_models_that_cannot_generate(
    model_directory: Path, gpt2_tokenizer_directory: Path, prompts_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((model_directory / "config.json").read_text())
    model = prompts_file.parent / "model"
    model.mkdir()
    for name in ("model.safetensors", "vocab.json", "merges.txt", "tokenizer_config.json"):
        (model / name).write_bytes((model_directory / name).read_bytes())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["OPTForSequenceClassification"]}))
    arguments = ["--model", str(model), "--prompts", str(prompts_file)]
    assert "reward model" in mistake(command.main, arguments, capsys)

    # A tokenizer that adds no BOS encodes "" as no token.
    (model / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((gpt2_tokenizer_directory / name).read_bytes())
    prompts_file.write_text('{"prompt": ""}\n')
    message = mistake(command.main, [*arguments, "--max-new-tokens", "6"], capsys)
    assert f"{prompts_file}: line 1: the prompt is empty" in message


def test_a_wrong_flag_is_a_user_error() -> None:
    with pytest.raises(UserError):
        command.main(["--model"])
