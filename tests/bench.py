"""`python -m tests.bench`, or `make bench`: minift and what it replaces, timed in turn on the same work, as ratios.

Both sides of a line do the same rows in the same batches in float32, one after the other, and again, so that whatever
else the machine does falls on both. Told are the medians, their ratio, and the least and largest ratio of a round,
which say how far to trust it. Times are told, never asserted.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")

import sacrebleu
import torch
import transformers
import trl
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from minift.batching import Batch, PairBatch, Sampler, collate, collate_rankings
from minift.bleu import corpus_bleu
from minift.config import Config
from minift.cost import matrix_rate, products
from minift.datasets import PAIR_KINDS, load_rows
from minift.encode import encode_rankings, encode_rows, prompt_ids_and_reference, split_row
from minift.errors import CommandParser, run_command, whole_number
from minift.generate import Options, generate
from minift.losses import bradley_terry, completion_cross_entropy
from minift.model import OPT, OPTConfig, RewardModel, initialise, set_dropout
from minift.prompts import TEMPLATES
from minift.tokenizer import load_tokenizer
from minift.trainer import LossFunction, Task, train
from minift.weights import load_model, new_reward_model, save_model
from tests.compare.reward import start_model
from tests.compare.training import Plan, quiet, reference_model, reference_tokenizer, reference_values

DATA = Path(__file__).parents[1] / "data"
SHAPES = {  # of facebook's models: layers, width, heads, feed-forward width, embedding width, pre-LN
    "125m": (12, 768, 12, 3072, 768, True),
    "350m": (24, 1024, 16, 4096, 512, False),
}
VOCABULARY, POSITIONS = 50_272, 2048
LONGEST = 256
LR = 1e-5
SEGMENTS = 2000


class Timing(NamedTuple):
    """One side's work, done once."""

    seconds: float
    things: int  # rows, pairs, tokens, segments


class Line(NamedTuple):
    """What both sides do. `operations` are the floating-point operations of matrix products in one thing, 0 if none."""

    what: str
    minift: Callable[[], Timing]
    reference: Callable[[], Timing]
    operations: float = 0


def main() -> None:
    """Time both sides of each line in turn; print rates, their ratio and its spread."""
    args = _parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="minift-bench-") as scratch:
        folder = model_folder(args.shape, Path(scratch))
        width = json.loads((folder / "config.json").read_text())["hidden_size"]
        rate = matrix_rate(1024, width, torch.float32, seconds=1)
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
            ours, theirs = ([timing.things / timing.seconds for timing in side] for side in zip(*rounds, strict=True))
            ratios = [mine / its for mine, its in zip(ours, theirs, strict=True)]
            median, its_median = statistics.median(ours), statistics.median(theirs)
            share = f"; {median * line.operations / rate:.0%} of the matrix rate" if line.operations else ""
            print(
                f"{line.what:34}{median:10.1f}{its_median:11.1f}{median / its_median:7.2f}x   "
                f"{min(ratios):.2f} to {max(ratios):.2f}{share}",
                flush=True,
            )


def model_folder(shape: str, scratch: Path) -> Path:
    """The shipped model, or one of a larger shape with random weights and the shipped tokenizer."""
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
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(DATA / "model" / name, scratch / "model")
    return scratch / "model"


def lines(folder: Path, args: argparse.Namespace, scratch: Path) -> Iterator[Line]:
    yield sft_line(folder, args, scratch)
    yield reward_line(folder, args, scratch)
    prompts = prompts_of(folder, args.prompts)
    yield generation_line("tokens, greedy", folder, prompts, args.new_tokens, 1)
    yield generation_line("tokens, 4 beams", folder, prompts[: len(prompts) // 4], args.new_tokens, 4)
    yield bleu_line()


# ---- training ----


def sft_line(folder: Path, args: argparse.Namespace, scratch: Path) -> Line:
    """Rows a second in training, the reference's with its own defaults but for the batch and what it reports."""
    tokenizer, template = load_tokenizer(folder), TEMPLATES["course"]
    rows = load_rows(DATA / "instructions.jsonl")[: args.steps * args.batch_size]
    examples, _, _ = encode_rows(rows, tokenizer, template, max_length=LONGEST)
    assert len(examples) == len(rows)

    def collated(numbers: list[int]) -> Batch:
        return collate([examples[number] for number in numbers])

    def minift() -> Timing:
        model = load_model(folder)

        def loss(batch: Batch) -> tuple:
            hidden = model(batch.input_ids, batch.positions, batch.rows)
            return *completion_cross_entropy(hidden, model.head, batch.labels, batch.positions), {}

        return time_own(model, loss, collated, "supervised_tokens", args, scratch)

    def reference() -> Timing:
        texts = []
        for row in rows:
            prompt, completion = split_row(row, tokenizer, template, "")
            texts.append({"prompt": "".join(prompt), "completion": "".join(completion[:-1])})  # trl adds the end token
        model = reference_model(AutoModelForCausalLM, folder, "float32")
        return time_reference(trl.SFTTrainer, trl.SFTConfig, model, texts, folder, args, scratch)

    model = load_model(folder)
    in_body, in_head = products(model)
    tokens = sum(len(example.input_ids) for example in examples)
    supervised = sum(label >= 0 for example in examples for label in example.labels)
    return Line("rows, SFT", minift, reference, (in_body * tokens + in_head * supervised) / len(rows))


def reward_line(folder: Path, args: argparse.Namespace, scratch: Path) -> Line:
    """Pairs a second in training a reward model."""
    tokenizer, template = load_tokenizer(folder), TEMPLATES["dialogue"]
    rows = load_rows(DATA / "pairs.jsonl", PAIR_KINDS)[: args.steps * args.batch_size]
    rankings, _, _ = encode_rankings(rows, tokenizer, template, max_length=LONGEST, positions=LONGEST)
    assert len(rankings) == len(rows)

    def collated(numbers: list[int]) -> PairBatch:
        return collate_rankings([rankings[number] for number in numbers])

    def minift() -> Timing:
        model = new_reward_model(folder, seed=0)

        def loss(batch: PairBatch) -> tuple:
            rewards = model(batch.input_ids, batch.positions, batch.rows)
            return *bradley_terry(rewards[batch.better], rewards[batch.worse], batch.margins, batch.weights), {}

        return time_own(model, loss, collated, "pairs", args, scratch)

    def reference() -> Timing:
        texts = []
        for row in rows:
            prompt, _ = split_row({"instruction": row["prompt"], "output": ""}, tokenizer, template, "")
            texts.append({"prompt": "".join(prompt), "chosen": row["chosen"], "rejected": row["rejected"]})
        model = start_model(folder, "float32")
        return time_reference(trl.RewardTrainer, trl.RewardConfig, model, texts, folder, args, scratch)

    return Line("pairs, reward model", minift, reference)


def time_own(
    model: OPT | RewardModel,
    loss: LossFunction,
    collated: Callable[[list[int]], Batch | PairBatch],
    counted: str,
    args: argparse.Namespace,
    scratch: Path,
) -> Timing:
    """minift's loop over the rows in their order; the first step, in which memory is first taken, is not timed."""
    set_dropout(model, 0.0)
    sampler = Sampler(args.steps * args.batch_size, args.batch_size, 1, 0, False)
    task = Task(
        model=model,
        loss=loss,
        micro_batches=lambda step: (collated(numbers) for numbers in sampler.micro_batches(step)),
        eval_batches=lambda: (),
        total_steps=args.steps,
        write_model=lambda folder: None,
        counted=counted,
    )
    with tempfile.TemporaryDirectory(dir=scratch) as run:
        train(task, Config(lr=LR, batch_size=args.batch_size, device="cpu", dtype="float32"), Path(run))
        text = Path(run, "metrics.jsonl").read_text()
    seconds = [json.loads(line)["seconds"] for line in text.splitlines()]
    return Timing(seconds[-1] - seconds[0], (args.steps - 1) * args.batch_size)


def time_reference(
    trainer_class: type[Trainer],
    config_class: type,
    model: nn.Module,
    texts: list[dict[str, str]],
    folder: Path,
    args: argparse.Namespace,
    scratch: Path,
) -> Timing:
    """trl's trainer over the same rows, timed from the end of its first step to that of its last."""
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory(dir=scratch) as run:
        values = reference_values(Plan("float32", "sequential", LR, 1), Path(run))
        values |= {"per_device_train_batch_size": args.batch_size, "gradient_accumulation_steps": 1}
        values |= {"logging_strategy": "no", "max_length": LONGEST}
        trainer_class._send_telemetry = lambda self: None
        trainer = trainer_class(
            model=model,
            processing_class=reference_tokenizer(folder),
            train_dataset=Dataset.from_list(texts),
            args=config_class(**values),
            callbacks=[Clock()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    assert len(ends) == args.steps
    return Timing(ends[-1] - ends[0], (args.steps - 1) * args.batch_size)


# ---- generation and BLEU ----


def prompts_of(folder: Path, how_many: int) -> list[list[int]]:
    tokenizer, template = load_tokenizer(folder), TEMPLATES["course"]
    rows = load_rows(DATA / "heldout.jsonl")[:how_many]
    return [prompt_ids_and_reference(row, tokenizer, template)[0] for row in rows]


def generation_line(what: str, folder: Path, prompts: Sequence[list[int]], new_tokens: int, beams: int) -> Line:
    """New tokens a second, all prompts in one batch, each of one length: no end token comes before."""

    def minift() -> Timing:
        model = load_model(folder)
        options = Options(
            max_new_tokens=new_tokens, num_beams=beams, batch_size=len(prompts) * beams, eos_token_id=None
        )
        started = time.perf_counter()
        generate(model, prompts, options)
        return Timing(time.perf_counter() - started, len(prompts) * new_tokens)

    def reference() -> Timing:
        model = reference_model(AutoModelForCausalLM, folder, "float32").eval()
        model.generation_config = transformers.GenerationConfig()
        longest = max(map(len, prompts))
        ids = torch.tensor([[1] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        started = time.perf_counter()
        model.generate(
            ids, attention_mask=mask, max_new_tokens=new_tokens, num_beams=beams, do_sample=False, pad_token_id=1
        )
        return Timing(time.perf_counter() - started, len(prompts) * new_tokens)

    return Line(what, minift, reference)


def bleu_line() -> Line:
    """Segments a second of corpus BLEU, the hypotheses being the rows' neighbours' answers."""
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
    parser = CommandParser("python -m tests.bench", description="minift and what it replaces, timed in turn")
    add = parser.add_argument
    add("--shape", choices=("tiny", *SHAPES), default="tiny", help="the shipped model, or random weights (%(default)s)")
    add("--rounds", type=whole_number(1), default=5, help="times that both sides do their work (%(default)s)")
    add("--steps", type=whole_number(2), default=20, help="of training in a round, the first not timed (%(default)s)")
    add("--batch-size", type=whole_number(1), default=8, help="rows or pairs in a step (%(default)s)")
    add("--prompts", type=whole_number(4), default=32, help="completed at a time; with beams a quarter (%(default)s)")
    add("--new-tokens", type=whole_number(1), default=32, help="of each completion (%(default)s)")
    return parser


if __name__ == "__main__":
    run_command(main)
