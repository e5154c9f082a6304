"""The reference's side of training: trl's trainers, up to the first step too."""

import tempfile
from typing import Any

import trl
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer

from minift.files.datasets import PAIR_SCHEMAS, load_rows
from minift.files.tokenizer import load_tokenizer
from tests.bench import Timing, Work
from tests.bench.clock import step_ends, time_of_steps
from tests.bench.ours import LR
from tests.compare import reward as compare_reward
from tests.compare import sft as compare_sft
from tests.compare.training import Plan, make_trainer, reference_model, reference_tokenizer

Texts = list[dict[str, str]] | Dataset
PLAN = Plan("float32", "sequential", lr=LR, epochs=1)


def run(work: Work) -> Timing:
    return {"sft": sft, "reward": reward, "startup": startup}[work.line](work)


def sft(work: Work) -> Timing:
    tokenizer = load_tokenizer(work.folder)
    rows = load_rows(work.data)[: work.limit]
    texts = compare_sft.trl_rows(compare_sft.texts_of(row, tokenizer) for row in rows)
    model = reference_model(AutoModelForCausalLM, work.folder, "float32")
    return time_training(trl.SFTTrainer, model, texts, work)


def reward(work: Work) -> Timing:
    tokenizer = load_tokenizer(work.folder)
    names = ("prompt", "chosen", "rejected")
    rows = load_rows(work.data, PAIR_SCHEMAS)[: work.limit]
    texts = [dict(zip(names, compare_reward.texts_of(row, tokenizer), strict=True)) for row in rows]
    return time_training(trl.RewardTrainer, compare_reward.start_model(work.folder, "float32"), texts, work)


def time_training(trainer_class: type[Trainer], model: PreTrainedModel, texts: Texts, work: Work) -> Timing:
    """Time a trainer over the rows in order, without the first steps."""
    return time_of_steps(work, train(trainer_class, model, texts, work))


def train(
    trainer_class: type[Trainer],
    model: PreTrainedModel,
    texts: list[dict[str, str]] | Dataset,
    work: Work,
    **values: Any,
) -> list[float]:
    """Train for one epoch; return when each step ended."""
    on_gpu = work.device == "cuda"
    values |= {"use_cpu": not on_gpu, "dataloader_pin_memory": on_gpu, "bf16": work.dtype == "bfloat16"}
    values |= {"per_device_train_batch_size": work.batch_size, "gradient_accumulation_steps": 1}
    values |= {"logging_strategy": "no", "max_length": work.max_length}
    with tempfile.TemporaryDirectory(dir=work.scratch) as folder:
        trainer = make_trainer(trainer_class, model, reference_tokenizer(work.folder), texts, folder, PLAN, **values)
        with step_ends(work) as ends:
            trainer.train()
    return ends


def startup(work: Work) -> Timing:
    """Time SFTTrainer from the start of its process to the end of its first step."""
    rows = load_dataset("json", data_files=work.data, split="train", cache_dir=work.scratch)
    model = reference_model(AutoModelForCausalLM, work.folder, "float32")
    [end] = train(trl.SFTTrainer, model, rows, work, max_steps=1)
    return Timing(end - work.started, 1)
