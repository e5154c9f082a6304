"""minift's side: its loop, its generation, its BLEU, and train_sft.py itself up to the first step."""

import contextlib
import io
import runpy
import sys
import tempfile
import time
from pathlib import Path

import torch

from minift.batching import Loader, collate
from minift.beam import beam_search
from minift.bleu import corpus_bleu
from minift.config import Config
from minift.encode import encode_rows
from minift.files.datasets import PAIR_SCHEMAS, load_rows
from minift.files.tokenizer import load_tokenizer
from minift.files.weights import load_model, load_reward_model
from minift.generate import Options, generate
from minift.model import OPT, RewardModel
from minift.pairs import collate_rankings, encode_rankings
from minift.prompts import TEMPLATES
from minift.run.device import set_allocator
from minift.run.setup import compile_layers, set_dropout
from minift.trainer import LossFunction, Task, train
from tests.bench import Timing, Work, read_ids
from tests.bench.clock import now, step_ends, time_of_steps
from tests.loop import MemoryRecorder, rm_loss, sft_loss, write_nothing

LR = 1e-5  # of both sides
ROOT = Path(__file__).parents[2]


def run(work: Work) -> Timing:
    return SIDES[work.line](work)


def sft(work: Work) -> Timing:
    rows, tokenizer = load_rows(work.data)[: work.limit], load_tokenizer(Path(work.folder))
    encoded = encode_rows(rows, tokenizer, TEMPLATES["course"], max_length=work.max_length)
    model = load_model(Path(work.folder)).to(work.device)
    return time_training(model, sft_loss(model), Loader(encoded.examples, collate, work.batch_size), work)


def reward(work: Work) -> Timing:
    rows, tokenizer = load_rows(work.data, PAIR_SCHEMAS)[: work.limit], load_tokenizer(Path(work.folder))
    encoded = encode_rankings(rows, tokenizer, TEMPLATES["dialogue"], max_length=work.max_length)
    model = load_reward_model(Path(work.folder), seed=0).to(work.device)
    return time_training(model, rm_loss(model), Loader(encoded.examples, collate_rankings, work.batch_size), work)


def time_training(model: OPT | RewardModel, loss: LossFunction, batches: Loader, work: Work) -> Timing:
    """Time the loop over the rows in order, without the first steps."""
    set_dropout(model, 0.0)
    set_allocator(save_memory=work.keeps_little)
    model.decoder.gradient_checkpointing = work.keeps_little
    if work.is_compiled:
        compile_layers(model)
    no_rows = Loader([], batches.collate, 1)
    task = Task(model, loss, batches, no_rows, write_nothing, "items", dtype=getattr(torch, work.dtype))
    with step_ends(work) as ends:
        train(task, Config(lr=LR, epochs=1), MemoryRecorder())
    return time_of_steps(work, ends)


def generation(work: Work) -> Timing:
    model, prompts = load_model(Path(work.folder), dtype=getattr(torch, work.dtype)).to(work.device), read_ids(work)
    set_allocator(save_memory=False)
    options = Options(
        max_new_tokens=work.new_tokens, num_beams=work.num_beams, eos_token_id=work.eos,
        batch_size=work.batch_size * work.num_beams,
    )  # fmt: skip
    search = beam_search if work.num_beams > 1 else generate
    at_once = [[prompt] for prompt in prompts] if work.line == "single" else [prompts]
    started = now(work.device)
    completions = [samples[0] for some in at_once for samples in search(model, some, options)]
    return Timing(now(work.device) - started, sum(map(len, completions)), completions)


def bleu(work: Work) -> Timing:
    """Score each row's output against the next row's."""
    references = [row["output"] for row in load_rows(work.data)]
    hypotheses = references[1:] + references[:1]
    started = time.perf_counter()
    corpus_bleu(hypotheses, [references])
    return Timing(time.perf_counter() - started, len(references))


def startup(work: Work) -> Timing:
    """Time train_sft.py from the start of its process to the end of its first step, whose loss it then writes."""
    out = Path(tempfile.mkdtemp(dir=work.scratch)) / "run"
    flags = {"model": work.folder, "data": work.data, "out": out, "batch-size": work.batch_size, "max-steps": 1}
    flags |= {"eval-fraction": 0, "device": "cpu", "dtype": work.dtype}
    sys.argv = ["train_sft.py", *(f"--{name}={value}" for name, value in flags.items()), *work.flags]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        runpy.run_path(str(ROOT / "train_sft.py"), run_name="__main__")
    return Timing((out / "metrics.jsonl").stat().st_mtime - work.started, 1)


SIDES = {
    "sft": sft,
    "reward": reward,
    "greedy": generation,
    "beam": generation,
    "single": generation,
    "bleu": bleu,
    "startup": startup,
}
