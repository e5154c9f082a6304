"""Instruction tuning against trl's `SFTTrainer`: every step's loss, gradient norm and learning rate; final weights."""

import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import SFTTrainer

from minift.batching import collate
from minift.encode import Example, encode_rows, split_row
from minift.files.tokenizer import load_tokenizer
from minift.files.weights import load_model
from minift.prompts import TEMPLATES
from minift.tokenizer import Tokenizer
from tests.compare import Check, Setting
from tests.compare.training import (
    DTYPES,
    Outcome,
    Plan,
    compare_outcomes,
    compare_prepared,
    extent_of,
    length_limit,
    model_folder,
    plain_rows,
    plans,
    reference_model,
    train_minift,
    train_reference,
)
from tests.loop import sft_loss

# Not a multiple of 4 rows, so that every epoch ends in a smaller step: two micro-batches, of 2 rows and of 1.
ROWS, QUICK_ROWS = 83, 7
LR = 2e-5  # trl's
TEMPLATE = TEMPLATES["course"]

Texts = tuple[tuple[str, str], ...]  # prompt and completion of each row


def compare(setting: Setting) -> Iterator[Check]:
    setting.progress("sft: reading and encoding rows")
    examples, texts = encode_for_both(setting)
    limit = length_limit(setting)
    reference = remembered if setting.quick else train_trl
    exact: dict[str, Outcome] = {}
    for number, plan in enumerate(plans(len(examples), LR, quick=setting.quick, smooth=True)):
        setting.progress(f"sft: trl trains, {plan.name}")
        folder = model_folder(setting, plan)
        theirs, prepared = reference(folder, texts, plan, limit)
        if number == 0:
            yield compare_prepared("sft", "ids and labels that are trained on", "rows", examples, prepared)
        setting.progress(f"sft: minift trains, {plan.name}")
        model = load_model(folder, dtype=DTYPES[plan.dtype])
        ours = train_minift(model, plan, examples, collate, sft_loss(model), "supervised_tokens")
        true = exact.setdefault(plan.order, theirs)  # float64 comes first
        yield from compare_outcomes(setting, "sft", plan, extent_of(plan, len(examples)), ours, theirs, true)


def encode_for_both(setting: Setting) -> tuple[list[Example], Texts]:
    """Return the first rows that have something to learn: encoded by minift, and as prompts and completions for trl."""
    tokenizer = load_tokenizer(setting.model)
    count = QUICK_ROWS if setting.quick else ROWS
    rows = plain_rows(setting, setting.data)[: 2 * count]  # some may be dropped
    encoded = encode_rows(rows, tokenizer, TEMPLATE, max_length=length_limit(setting), source=str(setting.data))
    return encoded.examples[:count], tuple(texts_of(row, tokenizer) for row in encoded.rows[:count])


def texts_of(row: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[str, str]:
    """Return a row's prompt and completion as trl takes them: it adds the end token itself."""
    prompt, completion = split_row(row, tokenizer, TEMPLATE, TEMPLATE.marker)
    return "".join(prompt), "".join(completion[:-1])


def trl_rows(texts: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"prompt": prompt, "completion": completion} for prompt, completion in texts]


def train_trl(
    folder: Path, texts: Texts, plan: Plan, limit: int, model: PreTrainedModel | None = None
) -> tuple[Outcome, list[Example]]:
    """Train a model, by default that of the folder, with trl; return the outcome, and the rows as trl prepared them."""
    model = model or reference_model(AutoModelForCausalLM, folder, plan.dtype)
    trainer_class = SFTTrainer if plan.dtype == "float32" else Float64Trainer
    outcome, prepared = train_reference(trainer_class, model, folder, trl_rows(texts), plan, max_length=limit)
    return outcome, [Example(row["input_ids"], row["labels"]) for row in prepared]


# A fault planted in minift does not change what trl does.
remembered = functools.cache(train_trl)


class Float64Trainer(SFTTrainer):
    """trl's trainer with its cross entropy in float64: its own kernel computes in float32 for any model."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        labels = inputs.pop("labels")
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        assert logits.dtype == torch.float64
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch
