"""A GPU against the CPU: the same losses, gradients, runs and tokens, and nothing waits for it inside a micro-batch.

Without a GPU these tests are skipped. `MINIFT_TEST_DEVICE=cpu python -m pytest tests/test_gpu.py` runs them on the CPU,
which shows that the tests themselves work.
"""

import copy
import io
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minift import losses
from minift.batching import Batch, Loader, collate
from minift.beam import beam_search
from minift.commands import chat, generate, score
from minift.commands.cli import run_command
from minift.config import Config
from minift.encode import IGNORE_INDEX, Example
from minift.files.weights import save_model
from minift.generate import Completions, Options
from minift.generate import generate as greedy_or_sampled
from minift.lora import add_lora, merge
from minift.model import OPT, RewardModel
from minift.pairs import PairBatch, Ranking, collate_rankings
from minift.rows import _Gather, row_layout
from minift.run.device import machine, pick_device, pick_dtype
from minift.run.folder import Run
from minift.run.setup import set_dropout
from minift.trainer import LossFunction, Progress, Task, train
from tests.loop import MemoryRecorder, rm_loss, sft_loss, write_nothing
from tests.reference import (
    ON_THE_HUB,
    POST_LN,
    PRE_LN,
    assert_gradients_agree,
    difference,
    gradients,
    hidden_states,
    logits_of,
    pack,
    random_examples,
    rewards_of,
    twins,
    varied_twins,
)
from tests.runs import few_rows, opened_run, read_lines, run, task_of, write_lines

DEVICE = os.environ.get("MINIFT_TEST_DEVICE", "cuda")
IS_GPU = DEVICE != "cpu"
pytestmark = pytest.mark.skipif(IS_GPU and not torch.cuda.is_available(), reason="no GPU here")
every_architecture = pytest.mark.parametrize("architecture", ON_THE_HUB)
both_precisions = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])


@pytest.fixture(autouse=True, scope="module")
def one_thread_and_full_precision() -> Iterator[None]:
    """Compute with one thread, as the matrices are small, and without TF32, which some images turn on."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    if torch.cuda.is_available():
        pick_device(DEVICE)  # before the first tensor is there
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


def examples(*lengths: int, seed: int = 0) -> list[Example]:
    """Return random rows of which all but every third begin as in a template; a batch has this start once."""
    rows = random_examples(lengths, seed=seed)
    start = [2, 5, 9, 7]
    return [
        row if number % 3 == 2 else Example(start + row.input_ids, [IGNORE_INDEX] * len(start) + row.labels)
        for number, row in enumerate(rows)
    ]


def rankings(number: int, seed: int = 0) -> list[Ranking]:
    """Return rankings of two, three and four responses, which share a prompt and beginnings."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> list[int]:
        return torch.randint(3, 60, (length,), generator=generator).tolist()

    found = []
    for index in range(number):
        prompt, beginning = [2, *tokens(3 + index % 5)], tokens(2)
        responses = [[*prompt, *beginning, 3 + rank, *tokens(2 + 5 * rank), 2] for rank in range(2 + index % 3)]
        found.append(Ranking(responses, margin=0.5 * (index % 2), best_only=index % 4 == 3))
    return found


ROWS = examples(7, 1, 14, 12, 33, 5, 48)
# More tokens than the 3,072 up to which torch computes the embedding's gradient in another way, and more supervised
# ones than `losses.CHUNK`. In float32, rounding would change the sign of an activation among so many.
MANY_ROWS = examples(*[60, 41, 33, 52, 17, 60, 58] * 13)


def small_model(architecture: str, dtype: torch.dtype, model_class: type = OPT) -> OPT | RewardModel:
    return twins(architecture, dtype, twin=model_class, max_position_embeddings=64)[1]


def on_device(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(DEVICE)


def largest_difference(found: nn.Module, expected: nn.Module) -> float:
    theirs = expected.state_dict()
    return max((tensor.cpu() - theirs[name].cpu()).abs().max().item() for name, tensor in found.state_dict().items())


def waits_are(mode: str) -> None:
    """Let torch ignore operations that wait for the GPU ("default"), warn of them ("warn") or refuse them ("error")."""
    if IS_GPU:
        torch.cuda.set_sync_debug_mode(mode)


@contextmanager
def nothing_waits() -> Iterator[None]:
    waits_are("error")
    try:
        yield
    finally:
        waits_are("default")


def number_of_waits(call: Callable[[], object]) -> int:
    """Return how often a call waits for the GPU."""
    waits_are("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        waits_are("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


# ------------------------------------------------------------------------------------------------ losses and gradients


def assert_losses_and_gradients_agree(
    model: nn.Module, loss_of: Callable[[nn.Module], LossFunction], batch: Batch | PairBatch, tolerance: float
) -> None:
    values, found = [], on_device(model)
    for each in (found, model):
        total, count, metrics = loss_of(each)(batch)
        (total / count).backward()
        values.append(
            {name: value.item() for name, value in {"loss": total.detach(), "count": count, **metrics}.items()}
        )
    assert values[0] == pytest.approx(values[1], rel=tolerance, abs=tolerance)
    its_gradients = gradients(found)
    assert {gradient.device.type for gradient in its_gradients.values()} == {torch.device(DEVICE).type}
    on_cpu = {name: gradient.cpu() for name, gradient in its_gradients.items()}
    assert_gradients_agree(on_cpu, gradients(model), tolerance)


@every_architecture
@both_precisions
def test_logits_loss_and_every_gradient(architecture, dtype, tolerance):
    model = small_model(architecture, dtype)
    batch = collate(ROWS)
    assert len(batch.input_ids) < sum(len(ids) for ids, _ in ROWS), "no prefix is shared"
    with torch.no_grad():
        found, expected = logits_of(on_device(model), ROWS), logits_of(model, ROWS)
    assert found.dtype == dtype and difference(found.cpu(), expected) < tolerance
    assert_losses_and_gradients_agree(model, sft_loss, batch, tolerance)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_many_rows_in_chunks(checkpointing):
    model = small_model(POST_LN, torch.float64).train()
    model.decoder.gradient_checkpointing = checkpointing
    batch = collate(MANY_ROWS)
    assert len(batch.input_ids) > 3072 and (batch.labels != IGNORE_INDEX).sum() > losses.CHUNK + 100
    assert_losses_and_gradients_agree(model, sft_loss, batch, 1e-10)


@every_architecture
@both_precisions
def test_rewards_loss_metrics_and_every_gradient(architecture, dtype, tolerance):
    model = small_model(architecture, dtype, RewardModel)
    ranked = rankings(9)
    rows = [row for ranking in ranked for row in ranking.responses]
    with torch.no_grad():
        found, expected = rewards_of(on_device(model), rows), rewards_of(model, rows)
    assert difference(found.cpu(), expected) < tolerance
    assert_losses_and_gradients_agree(model, partial(rm_loss, center=0.25), collate_rankings(ranked), tolerance)


@pytest.mark.skipif(DEVICE == "cpu", reason="FlashAttention needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_architecture
def test_rows_end_to_end_are_those_in_groups(architecture, dtype):
    """Both round to 16 bits, so they are compared by what they differ from float64, where rows are in groups."""
    model = small_model(architecture, torch.float64)
    batch, half = collate(MANY_ROWS[:40]), on_device(model).to(dtype)
    assert half.decoder._max_groups(40, None) == 0 and on_device(model).decoder._max_groups(40, None) == 2

    def values_of(model: OPT) -> Tensor:
        model.zero_grad()
        total, count, _ = sft_loss(model)(batch)
        (total / count).backward()
        return torch.cat(
            [
                total.detach().cpu().double()[None] / count,
                *(g.flatten().cpu().double() for g in gradients(model).values()),
            ]
        )

    exact, end_to_end = values_of(model), values_of(half)
    with mock.patch("minift.model.can_lie_end_to_end", return_value=False):
        in_groups = values_of(half)
    errors = [((found - exact).norm() / exact.norm()).item() for found in (end_to_end, in_groups)]
    assert errors[0] < 1.5 * errors[1] < 0.2, errors
    assert not torch.equal(end_to_end, in_groups)


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU adds bfloat16 numbers in float32")
def test_a_token_that_many_rows_share_gets_their_whole_gradient_in_bfloat16():
    """bfloat16 has no number between 256 and 258: added one by one, the gradients of 300 rows would stop at 256."""
    rows = torch.cat((torch.zeros(300, 1, dtype=torch.long), torch.arange(1, 301)[:, None]), dim=1)
    flat = torch.zeros(301, 2, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    _Gather.apply(flat, row_layout(rows, 301).to(flat.device)).sum().backward()
    assert flat.grad[0].tolist() == [300, 300] and torch.equal(flat.grad[1:], torch.ones_like(flat.grad[1:]))


# ------------------------------------------------------------------------------------------------ waiting for the GPU


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, list]:
    """Return for each script the flags that name a few of the shipped rows."""
    return {script: few_rows(script, tmp_path_factory.mktemp(script)) for script in ("sft", "rm")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("sft", ["--dropout", 0.1]),
        ("sft", ["--lora-rank", 4, "--lora-dropout", 0.1, "--gradient-checkpointing"]),
        ("rm", []),
        ("rm", ["--lm-weight", 0, "--center-rewards", 0, "--lora-rank", 4]),
    ],
    ids=["sft", "sft with adapters and checkpointing", "rewards and language model", "rewards with adapters"],
)
def test_no_micro_batch_of_a_script_waits_for_the_gpu(script, flags, dtype, data, tmp_path):
    """Run the loss of each script and its backward pass where torch refuses every operation that waits."""
    common = ["--recipe", "tiny", *data[script], "--batch-size", 8, *(["--bleu-samples", 0] if script == "sft" else [])]
    task = task_of(script, tmp_path / "run", *common, "--device", DEVICE, "--dtype", dtype, *flags)
    assert task.dtype == getattr(torch, dtype)
    task.model.train()
    [batch] = task.train_batches.micro_batches(0)

    def micro_batch() -> Tensor:
        with torch.autocast(torch.device(DEVICE).type, torch.bfloat16, enabled=dtype == "bfloat16"):
            total, _, _ = task.loss(batch)
        total.backward()
        return total

    micro_batch()  # loads what is used first
    with nothing_waits():
        total = micro_batch()
        if IS_GPU:
            with pytest.raises(RuntimeError, match="called a synchronizing"):
                total.item()
    assert total.isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_waits_as_often_with_four_micro_batches_as_with_one(dtype):
    def train_two_steps(accumulate: int) -> None:
        model = small_model(POST_LN, torch.float32).to(DEVICE)
        config = Config(max_steps=2, grad_accum=accumulate, batch_size=2)
        batches = Loader(ROWS + ROWS, collate, config.batch_size, config.grad_accum)
        task = Task(model, sft_loss(model), batches, Loader([], collate, 1), write_nothing, "tokens", dtype)
        train(task, config, MemoryRecorder())

    train_two_steps(4)
    waits = [number_of_waits(partial(train_two_steps, accumulate)) for accumulate in (1, 4)]
    assert waits[0] == waits[1]
    assert waits[0] > 0 or not IS_GPU  # the loss of a step is read


# ---------------------------------------------------------------------------------------------------------------- runs


class KilledLoader(Loader):
    """The loader of a run that is killed in its sixth step, or in its fifth, if that makes the sixth's batches."""

    def micro_batches(self, step, *ranks):
        if step == 5:
            raise KeyboardInterrupt
        return super().micro_batches(step, *ranks)


def train_small(
    device: str = DEVICE,
    variant: str = "sft",
    *,
    dtype: torch.dtype = torch.float64,
    arithmetic: str = "float64",
    dropout: float = 0.0,
    folder: Path | None = None,
    loader: type[Loader] = Loader,
    steps: int = 6,
    **values: object,
) -> tuple[nn.Module, list[dict]]:
    """Train a small model from fixed weights, in a run's folder if given; return it and the lines of metrics."""
    values = {"lr": 1e-3, "batch_size": 2, "grad_accum": 3, "max_grad_norm": 0.05, "warmup_steps": 1, **values}
    config = Config(max_steps=steps, device=device, dtype=arithmetic, out=str(folder), **values)
    is_reward = variant == "rewards"
    model = small_model(POST_LN, dtype, RewardModel if is_reward else OPT).to(device)
    set_dropout(model, dropout)
    if variant == "LoRA":
        torch.manual_seed(0)  # draws the adapters
        add_lora(model, rank=2, alpha=4.0, dropout=dropout, targets=["q_proj", "v_proj", "fc1"])
    recorder = MemoryRecorder() if folder is None else opened_run(folder, config)
    collated = collate_rankings if is_reward else collate
    rows, held_out = (rankings(20), rankings(5, seed=1)) if is_reward else (ROWS + ROWS, examples(9, 20, 4, seed=1))
    task = Task(
        model=model,
        loss=rm_loss(model, center=0.1) if is_reward else sft_loss(model),
        train_batches=loader(rows, collated, config.batch_size, config.grad_accum, config.seed, config.order),
        eval_batches=Loader(held_out, collated, 2),
        write_model=partial(save_model, model),
        unit="rankings" if is_reward else "supervised_tokens",
        dtype=pick_dtype(config, pick_device(device)),
    )
    train(task, config, recorder)
    return model, recorder.lines if folder is None else read_lines(folder / "metrics.jsonl")


def assert_same_lines(found: list[dict], expected: list[dict], tolerance: float) -> None:
    """Compare lines of metrics: `split` and every number but the seconds."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["split"] == theirs["split"]
        numbers = [{name: line[name] for name in line.keys() - {"split", "seconds"}} for line in (ours, theirs)]
        assert numbers[0] == pytest.approx(numbers[1], rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("variant", ["sft", "LoRA", "rewards"])
def test_a_run_is_the_cpus(variant):
    """Compare every logged number and all weights, in float64, with accumulation, clipping and ragged last batches."""
    (found, lines), (expected, expected_lines) = (train_small(device, variant) for device in (DEVICE, "cpu"))
    assert any(line["grad_norm"] > 0.05 for line in lines if line["split"] == "train"), "nothing was clipped"
    assert_same_lines(lines, expected_lines, 1e-9)
    assert largest_difference(found, expected) < 1e-8
    assert {parameter.device.type for parameter in found.parameters()} == {torch.device(DEVICE).type}


@pytest.mark.parametrize(("arithmetic", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_a_run_in_single_and_half_precision(arithmetic, tolerance):
    """Compare losses with those of the CPU in float32; autocast leaves the weights in float32."""
    _, expected = train_small("cpu", dtype=torch.float32, arithmetic="float32")
    model, lines = train_small(dtype=torch.float32, arithmetic=arithmetic)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for ours, theirs in zip(lines, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance)
    is_half = arithmetic == "bfloat16"
    assert (abs(lines[0]["loss"] / expected[0]["loss"] - 1) > 1e-5) == is_half  # else autocast does nothing


@pytest.mark.parametrize("variant", ["sft", "LoRA", "rewards"])
def test_dropout_depends_on_the_seed_alone(variant):
    """Compare runs in float64: a GPU adds up the gradient of a token that rows share in any order."""
    first, lines = train_small(variant=variant, dropout=0.1, order="sequential")
    torch.manual_seed(999)
    again, lines_again = train_small(variant=variant, dropout=0.1, order="sequential")
    other, other_lines = train_small(variant=variant, dropout=0.1, order="sequential", seed=43)
    assert_same_lines(lines_again, lines, 1e-10)
    assert largest_difference(again, first) < 1e-10
    assert largest_difference(other, first) > 1e-5
    losses_of = [[line["loss"] for line in each if line["split"] == "train"] for each in (lines, other_lines)]
    assert all(abs(ours - theirs) > 1e-5 for ours, theirs in zip(*losses_of, strict=True))


def test_a_killed_and_resumed_run_is_the_run_that_was_not(tmp_path):
    values = {"dropout": 0.1, "save_every": 2, "eval_every": 3}
    whole, whole_lines = train_small(folder=tmp_path / "whole", **values)
    with pytest.raises(KeyboardInterrupt):
        train_small(folder=tmp_path / "killed", loader=KilledLoader, **values)
    steps = json.loads((tmp_path / "killed" / "checkpoints" / "steps.json").read_text())
    assert steps["last"] == 4
    resumed, lines = train_small(folder=tmp_path / "killed", resume=True, **values)
    assert_same_lines(lines, whole_lines, 1e-10)
    assert largest_difference(resumed, whole) < 1e-10


@pytest.mark.parametrize("devices", [("cpu", DEVICE), (DEVICE, "cpu")], ids=["from the CPU", "to the CPU"])
def test_a_run_goes_on_on_another_device(tmp_path, devices):
    whole, whole_lines = train_small("cpu", folder=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_small(devices[0], folder=tmp_path / "killed", loader=KilledLoader, save_every=2)
    resumed, lines = train_small(devices[1], folder=tmp_path / "killed", resume=True, save_every=2)
    assert_same_lines(lines, whole_lines, 1e-9)
    assert largest_difference(resumed, whole) < 1e-8


# ---------------------------------------------------------------------------------------------------------- generation

PROCESSED = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 4}
SETTINGS = [
    {},
    PROCESSED,
    {"temperature": 1.0, "num_samples": 3},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "num_samples": 2, **PROCESSED},
    {"num_beams": 4, "num_samples": 3},
    {"num_beams": 3, "length_penalty": 0.6, "early_stopping": True, **PROCESSED},
]


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [[2, *torch.randint(3, 40, (length - 1,), generator=generator).tolist()] for length in lengths]


PROMPTS = prompts_of(*[1, 4, 9, 17, 2, 6] * 3)


def complete(model: OPT, prompts: Sequence[list[int]], options: Options, **others: object) -> Completions:
    return (beam_search if options.num_beams > 1 else greedy_or_sampled)(model, prompts, options, **others)


def make_options(**values: object) -> Options:
    return Options(**{"max_new_tokens": 14, "batch_size": 7} | values)


def frequent_token(model: OPT) -> int:
    """Return a token that the model often generates: as EOS it makes completions of all lengths."""
    completions = greedy_or_sampled(model, PROMPTS, make_options())
    return Counter(token for [ids] in completions for token in ids).most_common(2)[1][0]


@pytest.mark.parametrize("architecture", [PRE_LN, POST_LN])
def test_tokens_are_the_cpus(architecture):
    """Rows end at different lengths, so that prompts enter late, whatever the batch size."""
    _, model = varied_twins(architecture, torch.float64)
    there, end = on_device(model), frequent_token(model)
    lengths = Counter()
    for chosen in SETTINGS:
        expected = complete(model, PROMPTS, make_options(eos_token_id=end, **chosen))
        for batch_size, room in ((7, 64), (2, 4), (64, 4)):  # with little room, steps are recorded several times
            options = make_options(eos_token_id=end, batch_size=batch_size, **chosen)
            with mock.patch("minift.cache.MIN_ROOM", room):
                assert complete(there, PROMPTS, options) == expected, (chosen, batch_size)
        lengths.update(len(ids) for samples in expected for ids in samples)
    assert len(lengths) >= 8  # else few completions have ended


def test_each_prompt_has_its_own_limit():
    _, model = varied_twins(PRE_LN, torch.float64)
    limits = [1 + 5 * number % 13 for number in range(len(PROMPTS))]
    found, expected = (
        greedy_or_sampled(each, PROMPTS, make_options(), limits=limits) for each in (on_device(model), model)
    )
    assert found == expected
    assert [len(ids) for [ids] in found] == limits


def test_calls_do_not_affect_each_other():
    """Alternate between models, dtypes, batch sizes and ways to decode: nothing of one call is left in the next."""
    models = [varied_twins(*about)[1] for about in [(PRE_LN, torch.float64), (POST_LN, torch.float64)]]
    models += [varied_twins(POST_LN, torch.float32)[1], varied_twins(PRE_LN, torch.bfloat16)[1]]
    there = [on_device(model) for model in models]
    calls = [
        (index, prompts, make_options(batch_size=batch_size, **chosen))
        for prompts, batch_size, chosen in [
            (PROMPTS[:12], 7, {}),
            (prompts_of(30, 3), 2, {"temperature": 1.0, "num_samples": 2}),
            (PROMPTS[4:10], 6, {"num_beams": 3}),
            (PROMPTS[:1], 1, {"max_new_tokens": 30}),
        ]
        for index in range(len(models))
    ]
    expected = []
    for index, *call in calls:
        is_double = models[index].head.dtype == torch.float64  # others are rounded in another way on the CPU
        expected.append(complete(models[index] if is_double else on_device(models[index]), *call))
    for _ in range(2):
        for (index, *call), tokens in zip(calls, expected, strict=True):
            assert complete(there[index], *call) == tokens, call[1:]


def test_a_call_within_a_call():
    """`on_progress` runs while rows are being decoded, and may use the model too."""
    _, model = varied_twins(POST_LN, torch.float64)
    there, options = on_device(model), make_options(eos_token_id=frequent_token(model))
    inner = greedy_or_sampled(model, PROMPTS[:5], options)
    found = []

    def on_progress(_: int) -> None:
        if len(found) < 5:
            found.append(greedy_or_sampled(there, PROMPTS[:5], options))

    outer = greedy_or_sampled(there, PROMPTS, options, on_progress)
    assert outer == greedy_or_sampled(model, PROMPTS, options)
    assert found == [inner] * 5


@torch.no_grad()
def test_weights_that_change_between_two_calls():
    """The next call decodes with weights changed in place, moved, replaced by adapters, merged."""
    _, model = varied_twins(PRE_LN, torch.float64)
    there, options, seen = on_device(model), make_options(), []

    def both(change: Callable[[OPT], object]) -> None:
        for each in (model, there):
            torch.manual_seed(0)
            change(each)
        seen.append(greedy_or_sampled(model, PROMPTS, options))
        assert greedy_or_sampled(there, PROMPTS, options) == seen[-1]

    def move(each: OPT) -> None:
        for parameter in each.parameters():
            parameter.data = parameter.clone()
        each.decoder.embed_positions.weight.data.mul_(-1.0)

    def adapt(each: OPT) -> None:
        add_lora(each, 2, 4.0, 0.0, ["q_proj", "fc2"])
        for parameter in each.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, dtype=parameter.dtype))

    both(lambda each: None)
    both(lambda each: each.decoder.layers[0].fc1.weight.mul_(-2.0))
    both(move)
    both(adapt)
    both(merge)
    assert seen[4] == seen[3]
    assert all(before != after for before, after in pairwise(seen[:4]))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", [PRE_LN, POST_LN])
def test_half_precision_generates_tokens_that_are_nearly_the_best(architecture, dtype):
    """Compare the logit of each token with the best one, computed from the same weights in float64 on the CPU."""
    _, model = varied_twins(architecture, dtype)
    completions = greedy_or_sampled(on_device(model), PROMPTS, make_options(batch_size=24))
    rows = [prompt + ids for prompt, [ids] in zip(PROMPTS, completions, strict=True)]
    exact, batch = copy.deepcopy(model).double(), pack(rows)
    logits = exact.logits(hidden_states(exact, batch))  # (N, V)
    new = torch.cat([row[row >= 0][-len(ids) - 1 :] for row, [ids] in zip(batch.rows, completions, strict=True)])
    before, after = new.view(len(rows), -1)[:, :-1].flatten(), new.view(len(rows), -1)[:, 1:].flatten()
    chosen = logits[before].gather(1, batch.input_ids[after][:, None]).squeeze(1)
    gap = (logits[before].amax(1) - chosen) / logits.std()  # that of the worst token is about 5
    assert gap.max() < 0.25 and (gap > 0).float().mean() < 0.1


# ------------------------------------------------------------------------------------------------ scripts and commands

STEPS = 4


def flags_of(script: str, data: dict[str, list], *more: object) -> list:
    steps = ["--max-steps", STEPS, "--batch-size", 4, "--warmup-steps", 0]
    return ["--recipe", "tiny", *data[script], *steps, "--device", DEVICE, *more]


def rows_of(data: dict[str, list], script: str) -> list[dict]:
    """Return the held-out rows of the flags."""
    return read_lines(Path(data[script][3]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data) -> dict[str, Path]:
    """Return the folder of a short run of each script, with the dtype that the device gets by itself."""
    folders = {}
    for script in ("sft", "rm"):
        folders[script] = tmp_path_factory.mktemp(script) / "run"
        more = ["--run-checks", "--dropout", 0.1] if script == "sft" else []
        run(script, *flags_of(script, data, *more), "--out", folders[script])
    return folders


@pytest.mark.skipif(DEVICE == "cpu", reason="--compile is refused on a CPU")
def test_a_script_trains_with_compiled_layers(data, tmp_path):
    """The exam, the evaluation and what is saved use the layers as they are."""
    more = ["--dtype", "float32", "--dropout", 0, "--bleu-samples", 4]
    for folder, flags in (("plain", []), ("compiled", ["--compile"])):
        run("sft", *flags_of("sft", data, *more, *flags), "--out", tmp_path / folder)
    found, expected = (read_lines(tmp_path / folder / "metrics.jsonl") for folder in ("compiled", "plain"))
    assert_same_lines(found, expected, 1e-3)


@pytest.mark.parametrize("script", ["sft", "rm"])
def test_a_script_leaves_its_results(script, runs):
    names = {path.name for path in runs[script].iterdir()}
    assert names >= {"config.json", "model.safetensors", "run.json", "metrics.jsonl", "samples.jsonl", "report.html"}
    record = json.loads((runs[script] / "run.json").read_text())
    assert record["machine"] == machine(torch.device(DEVICE)) and record["values"]["device"] == DEVICE
    lines = read_lines(runs[script] / "metrics.jsonl")
    trained = [line["loss"] for line in lines if line["split"] == "train"]
    assert len(trained) == STEPS
    assert record["results"]["eval_loss"] == {"before": lines[0]["loss"], "after": lines[-1]["loss"]}
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_the_dtype_that_a_gpu_gets(data, tmp_path):
    task = task_of("sft", tmp_path / "run", *flags_of("sft", data, "--bleu-samples", 0))
    assert task.dtype == (torch.bfloat16 if IS_GPU and torch.cuda.is_bf16_supported() else torch.float32)
    assert {weight.dtype for weight in task.model.parameters()} == {torch.float32}
    assert {weight.device.type for weight in task.model.parameters()} == {torch.device(DEVICE).type}
    if IS_GPU:
        assert pick_device("auto").type == "cuda" and pick_device("cuda:0").index == 0


def test_a_script_that_was_killed_is_resumed(runs, data, tmp_path):
    save = Run.save

    def save_and_end(recorder: Run, task: Task, optimizer: Optimizer, progress: Progress, **values: bool) -> None:
        save(recorder, task, optimizer, progress, **values)
        if progress.step == 2:
            raise KeyboardInterrupt

    flags = flags_of("sft", data, "--run-checks", "--dropout", 0.1, "--save-every", 1, "--out", tmp_path / "run")
    with mock.patch.object(Run, "save", save_and_end), pytest.raises(KeyboardInterrupt):
        run("sft", *flags)
    assert json.loads((tmp_path / "run" / "checkpoints" / "steps.json").read_text())["last"] == 2
    run("sft", *flags, "--resume")
    found, expected = (read_lines(folder / "metrics.jsonl") for folder in (tmp_path / "run", runs["sft"]))
    assert_same_lines(found, expected, 1e-2)  # in bfloat16 a sum in another order is seen


@pytest.mark.parametrize("base", ["bfloat16", "float16"])
def test_adapters_beside_a_frozen_base_in_half_precision(base, data, tmp_path):
    flags = flags_of("sft", data, "--lora-rank", 4, "--base-dtype", base, "--lr", 0.02, "--bleu-samples", 0)
    run("sft", *flags, "--out", tmp_path / "run")
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


def test_generate_writes_the_cpus_completions(runs, data, tmp_path):
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": row["instruction"]} for row in rows_of(data, "sft")])

    def completions(device: str, *flags: object) -> list[dict]:
        command = ["--model", runs["sft"], "--prompts", prompts, "--out", tmp_path / "out.jsonl", "--device", device]
        generate.main([*map(str, [*command, "--max-new-tokens", 12, "--batch-size", 4, *flags])])
        return read_lines(tmp_path / "out.jsonl")

    for flags in ([], ["--num-beams", 3], ["--top-p", 0.9, "--num-samples", 2]):
        assert completions(DEVICE, "--dtype", "float64", *flags) == completions("cpu", "--dtype", "float64", *flags)
    assert len(completions(DEVICE, "--dtype", "bfloat16")) == len(read_lines(prompts))


def test_score_writes_the_cpus_rewards(runs, data, tmp_path):
    found = []
    for device in (DEVICE, "cpu"):
        flags = ["--model", runs["rm"], "--data", data["rm"][3], "--out", tmp_path / "out.jsonl", "--device", device]
        score.main([*map(str, flags)])
        found.append([[line["score_chosen"], line["score_rejected"]] for line in read_lines(tmp_path / "out.jsonl")])
    assert len(found[0]) == len(rows_of(data, "rm"))
    torch.testing.assert_close(*map(torch.tensor, found), rtol=1e-4, atol=1e-4)


def test_chat_answers_and_its_judge_chooses(runs, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Add one.\n\nReverse it.\n"), encoding="utf-8"))
    flags = ["--model", runs["sft"], "--judge", runs["rm"], "--samples", 3, "--max-new-tokens", 8, "--device", DEVICE]
    chat.main([*map(str, flags)])
    assert capsys.readouterr().out.count(", chosen of 3") == 2


def test_too_little_memory_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: torch.empty(2**50, dtype=torch.uint8, device=DEVICE))
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out, printed.err.count("\n")) == (1, "", 1)
    assert printed.err.startswith("error: out of memory, try a smaller --batch-size")
