"""`python -m tests.bench`, or `make bench`: minift and what it replaces, timed in turn on the same work, as ratios.

In each round both sides do the same rows in the same batches in float32, one after the other, so that other load on the
machine affects both. A line shows the medians, their ratio, and the smallest and largest ratio of a round, which say
how far to trust it. The times are never asserted.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")

import sacrebleu
import torch
import torch.nn.functional as F
import transformers
import trl
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerCallback

from data.make.pretrain import initialise
from minift.batching import Loader, collate
from minift.beam import beam_search
from minift.bleu import corpus_bleu
from minift.commands.cli import CommandParser, run_command, whole_number
from minift.config import Config
from minift.encode import IGNORE_INDEX, encode_prompt, encode_rows
from minift.files.datasets import PAIR_SCHEMAS, load_rows
from minift.files.tokenizer import load_tokenizer, save_tokenizer
from minift.files.weights import load_model, load_reward_model, save_model
from minift.generate import Options, generate
from minift.model import OPT, OPTConfig, RewardModel
from minift.pairs import collate_rankings, encode_rankings
from minift.prompts import TEMPLATES
from minift.run.setup import set_dropout
from minift.trainer import LossFunction, Task, train
from tests.compare import reward, sft
from tests.compare.training import Plan, make_trainer, quiet, reference_model, reference_tokenizer
from tests.loop import MemoryRecorder, rm_loss, sft_loss, write_nothing
from tests.reference import padded

DATA = Path(__file__).parents[1] / "data"
SHAPES = {  # of facebook's models: layers, width, heads, feed-forward width, embedding width, pre-LN
    "125m": (12, 768, 12, 3072, 768, True),
    "350m": (24, 1024, 16, 4096, 512, False),
}
VOCABULARY, POSITIONS = 50_272, 2048
MAX_LENGTH = 256
PLAN = Plan("float32", "sequential", lr=1e-5, epochs=1)
SEGMENTS = 2000


class Timing(NamedTuple):
    """One side's work in one round."""

    seconds: float
    items: int  # rows, pairs, tokens or segments


class Line(NamedTuple):
    """The work that both sides do."""

    what: str
    minift: Callable[[], Timing]
    reference: Callable[[], Timing]
    operations: float = 0  # in matrix products, floating-point, for each item; 0 if not counted


def main() -> None:
    """Time both sides of each line in turn; print rates, their ratio and its range."""
    args = _parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="minift-bench-") as scratch:
        folder = model_folder(args.shape, Path(scratch))
        width = json.loads((folder / "config.json").read_text())["hidden_size"]
        rate = matrix_rate(width)
        print(
            f"{args.shape} shape, batches of {args.batch_size}, float32, {torch.get_num_threads()} threads "
            f"({rate / 1e9:.0f} GFLOP/s of matrix products); "
            f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}"
        )
        print(f"{'a second':34}{'minift':>10}{'reference':>11}{'ratio':>8}   of {args.rounds} rounds")
        for line in lines(folder, args, Path(scratch)):
            rounds = []
            for _ in range(args.rounds):
                with quiet():
                    rounds.append((line.minift(), line.reference()))
            ours, theirs = ([timing.items / timing.seconds for timing in side] for side in zip(*rounds, strict=True))
            ratios = [mine / its for mine, its in zip(ours, theirs, strict=True)]
            median, its_median = statistics.median(ours), statistics.median(theirs)
            fraction = f"; {median * line.operations / rate:.0%} of the matrix rate" if line.operations else ""
            print(
                f"{line.what:34}{median:10.1f}{its_median:11.1f}{median / its_median:7.2f}x   "
                f"{min(ratios):.2f} to {max(ratios):.2f}{fraction}",
                flush=True,
            )


def model_folder(shape: str, scratch: Path) -> Path:
    """Return the shipped model, or one of a larger shape with random weights and the shipped tokenizer."""
    if shape == "tiny":
        return DATA / "model"
    layers, width, heads, feed_forward, embedding, pre_ln = SHAPES[shape]
    config = OPTConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=POSITIONS,
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        ffn_dim=feed_forward,
        word_embed_proj_dim=embedding,
        do_layer_norm_before=pre_ln,
    )
    model = OPT(config)
    initialise(model, 0)
    save_model(model, scratch / "model")
    save_tokenizer(load_tokenizer(DATA / "model"), scratch / "model")
    return scratch / "model"


def matrix_rate(width: int) -> float:
    """Measure the floating-point operations a second of `(1024, width)` times `(width, width)` products."""
    hidden, weight = torch.ones(1024, width), torch.ones(width, width)
    F.linear(hidden, weight)  # the first one starts the threads
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < 1:
        F.linear(hidden, weight)
        done += 1
    return done * 2 * hidden.numel() * width / (time.perf_counter() - started)


def products(model: OPT) -> tuple[int, int]:
    """Return the operations of training for each token, and those for each supervised token only.

    A weight W of n numbers takes 2n in W x, 2n for the gradient of x, and 2n for its own. The last layer's output,
    its feed-forward and the head are computed for supervised tokens only.
    """
    last = model.decoder.layers[-1]
    late = [last.self_attn.out_proj, last.fc1, last.fc2, model.decoder.project_out]
    linears = [module for module in model.decoder.modules() if isinstance(module, nn.Linear)]
    for_all = sum(6 * linear.weight.numel() for linear in linears if linear not in late)
    return for_all, sum(6 * linear.weight.numel() for linear in linears if linear in late) + 6 * model.head.numel()


def lines(folder: Path, args: argparse.Namespace, scratch: Path) -> Iterator[Line]:
    """Yield the lines in the order of the table."""
    yield sft_line(folder, args, scratch)
    yield reward_line(folder, args, scratch)
    prompts = prompts_of(folder, args.prompts)
    yield generation_line("tokens, greedy", folder, prompts, args.new_tokens, 1)
    yield generation_line("tokens, 4 beams", folder, prompts[: len(prompts) // 4], args.new_tokens, 4)
    yield bleu_line()


# ---- training ----


def sft_line(folder: Path, args: argparse.Namespace, scratch: Path) -> Line:
    """Time rows of instruction tuning."""
    tokenizer = load_tokenizer(folder)
    rows = load_rows(DATA / "instructions.jsonl")[: args.steps * args.batch_size]
    encoded = encode_rows(rows, tokenizer, sft.TEMPLATE, max_length=MAX_LENGTH)
    assert len(encoded.rows) == len(rows)

    def minift() -> Timing:
        model = load_model(folder)
        batches = Loader(encoded.examples, collate, args.batch_size)
        return time_minift(model, sft_loss(model), batches, "supervised_tokens")

    def reference() -> Timing:
        model = reference_model(AutoModelForCausalLM, folder, "float32")
        texts = sft.trl_rows(sft.texts_of(row, tokenizer) for row in rows)
        return time_reference(trl.SFTTrainer, model, texts, folder, args, scratch)

    for_all, for_supervised = products(load_model(folder))
    supervised = sum(label != IGNORE_INDEX for example in encoded.examples for label in example.labels)
    return Line("rows, SFT", minift, reference, (for_all * encoded.tokens + for_supervised * supervised) / len(rows))


def reward_line(folder: Path, args: argparse.Namespace, scratch: Path) -> Line:
    """Time pairs of training a reward model."""
    tokenizer = load_tokenizer(folder)
    rows = load_rows(DATA / "pairs.jsonl", PAIR_SCHEMAS)[: args.steps * args.batch_size]
    encoded = encode_rankings(rows, tokenizer, reward.TEMPLATE, max_length=MAX_LENGTH)
    assert len(encoded.rows) == len(rows)

    def minift() -> Timing:
        model = load_reward_model(folder, seed=0)
        batches = Loader(encoded.examples, collate_rankings, args.batch_size)
        return time_minift(model, rm_loss(model), batches, "pairs")

    def reference() -> Timing:
        names = ("prompt", "chosen", "rejected")
        texts = [dict(zip(names, reward.texts_of(row, tokenizer), strict=True)) for row in rows]
        return time_reference(trl.RewardTrainer, reward.start_model(folder, "float32"), texts, folder, args, scratch)

    return Line("pairs, reward model", minift, reference)


def time_minift(model: OPT | RewardModel, loss: LossFunction, batches: Loader, unit: str) -> Timing:
    """Time minift's loop over the rows in order, without the first step, in which memory is first allocated."""
    set_dropout(model, 0.0)
    recorder = MemoryRecorder()
    task = Task(model, loss, batches, Loader([], batches.collate, 1), write_nothing, unit)
    train(task, Config(lr=PLAN.lr, epochs=PLAN.epochs), recorder)
    first, *_, last = recorder.lines
    return Timing(last["seconds"] - first["seconds"], (last["step"] - first["step"]) * batches.batch_size)


def time_reference(
    trainer_class: type[Trainer],
    model: PreTrainedModel,
    texts: list[dict[str, str]],
    folder: Path,
    args: argparse.Namespace,
    scratch: Path,
) -> Timing:
    """Time trl's trainer over the same rows, from the end of its first step to the end of its last."""
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    values = {"per_device_train_batch_size": args.batch_size, "gradient_accumulation_steps": 1}
    values |= {"logging_strategy": "no", "max_length": MAX_LENGTH}
    with tempfile.TemporaryDirectory(dir=scratch) as run:
        trainer = make_trainer(trainer_class, model, reference_tokenizer(folder), texts, run, PLAN, **values)
        trainer.add_callback(Clock())
        trainer.train()
    assert len(ends) == args.steps
    return Timing(ends[-1] - ends[0], (args.steps - 1) * args.batch_size)


# ---- generation and BLEU ----


def prompts_of(folder: Path, count: int) -> list[list[int]]:
    tokenizer = load_tokenizer(folder)
    return [encode_prompt(row, tokenizer, TEMPLATES["course"]) for row in load_rows(DATA / "heldout.jsonl")[:count]]


def generation_line(what: str, folder: Path, prompts: Sequence[list[int]], new_tokens: int, beams: int) -> Line:
    """Time new tokens, all prompts in one batch. Without an EOS, all completions have the same length."""

    def minift() -> Timing:
        model = load_model(folder)
        search = beam_search if beams > 1 else generate
        batch_size = len(prompts) * beams
        options = Options(max_new_tokens=new_tokens, num_beams=beams, batch_size=batch_size, eos_token_id=None)
        started = time.perf_counter()
        search(model, prompts, options)
        return Timing(time.perf_counter() - started, len(prompts) * new_tokens)

    def reference() -> Timing:
        model = reference_model(AutoModelForCausalLM, folder, "float32").eval()
        model.generation_config = transformers.GenerationConfig()
        inputs = padded(prompts, side="left")
        started = time.perf_counter()
        model.generate(**inputs, max_new_tokens=new_tokens, num_beams=beams, do_sample=False, pad_token_id=1)
        return Timing(time.perf_counter() - started, len(prompts) * new_tokens)

    return Line(what, minift, reference)


def bleu_line() -> Line:
    """Time segments of corpus BLEU; the hypothesis for each row is the next row's answer."""
    references = [row["output"] for row in load_rows(DATA / "instructions.jsonl")[:SEGMENTS]]
    hypotheses = references[1:] + references[:1]

    def minift() -> Timing:
        started = time.perf_counter()
        corpus_bleu(hypotheses, [references])
        return Timing(time.perf_counter() - started, SEGMENTS)

    def reference() -> Timing:
        started = time.perf_counter()
        sacrebleu.corpus_bleu(hypotheses, [references])
        return Timing(time.perf_counter() - started, SEGMENTS)

    return Line("segments, BLEU", minift, reference)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser("python -m tests.bench", description="time minift and what it replaces, in turn")
    add = parser.add_argument
    add("--shape", choices=("tiny", *SHAPES), default="tiny", help="the shipped model, or random weights (%(default)s)")
    add("--rounds", type=whole_number(1), default=5, help="how often both sides do their work (%(default)s)")
    add(
        "--steps",
        type=whole_number(2),
        default=20,
        help="steps in a round, the first not timed (%(default)s)",
    )
    add("--batch-size", type=whole_number(1), default=8, help="rows or pairs in a step (%(default)s)")
    add("--prompts", type=whole_number(4), default=32, help="prompts in a batch; a quarter with beams (%(default)s)")
    add("--new-tokens", type=whole_number(1), default=32, help="tokens of each completion (%(default)s)")
    return parser


if __name__ == "__main__":
    run_command(main)
