"""Instruction tuning against trl's `SFTTrainer`: every step's loss, gradient norm and learning rate; final weights."""

import functools
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from minift.batching import Batch, collate
from minift.datasets import load_rows
from minift.encode import Example, encode_rows, split_row
from minift.losses import completion_cross_entropy
from minift.model import OPT, set_dropout
from minift.prompts import TEMPLATES
from minift.tokenizer import Tokenizer, load_tokenizer
from minift.weights import load_model, read_config
from tests.compare import Check, Setting
from tests.compare.training import (
    DTYPES,
    Outcome,
    Plan,
    compare_outcomes,
    how_much,
    model_folder,
    plans,
    quiet,
    reference_model,
    reference_tokenizer,
    reference_values,
    train_minift,
    train_reference,
)

# No multiple of 4 rows, so that every epoch ends in a step of its own: two micro-batches, of 2 rows and of 1.
ROWS, QUICK_ROWS = 83, 7
LR = 2e-5  # trl's
TEMPLATE = TEMPLATES["course"]
LONGEST = 1024  # trl's


def compare(setting: Setting) -> Iterator[Check]:
    setting.progress("sft: reading and encoding rows")
    limit = min(LONGEST, read_config(setting.model / "config.json").max_position_embeddings)
    examples, texts = material(setting, load_tokenizer(setting.model), limit)
    reference = remembered if setting.quick else train_trl
    exact: dict[str, Outcome] = {}
    for number, plan in enumerate(plans(len(examples), LR, quick=setting.quick, smooth=True)):
        setting.progress(f"sft: trl trains, {plan.name}")
        folder = model_folder(setting, plan)
        theirs, prepared = reference(folder, texts, plan, limit)
        if number == 0:
            wrong = sum(a != b for a, b in zip(examples, prepared, strict=False)) + abs(len(examples) - len(prepared))
            yield Check("sft", "ids and labels that are trained on", f"{len(examples)} rows", wrong, 0)
        setting.progress(f"sft: minift trains, {plan.name}")
        model = load_model(folder, dtype=DTYPES[plan.dtype])
        ours = train_own(model, examples, plan, setting.scratch / "sft" / plan.name)
        setting.curves[f"SFT, {plan.name}"] = {
            "minift": [step["loss"] for step in ours.steps],
            "trl": [step["loss"] for step in theirs.steps],
        }
        exact.setdefault(plan.order, theirs)  # float64 comes first
        yield from compare_outcomes("sft", plan, how_much(plan, len(examples)), ours, theirs, exact[plan.order])


def material(setting: Setting, tokenizer: Tokenizer, limit: int) -> tuple[list[Example], tuple[tuple[str, str], ...]]:
    """The first rows that can be learned from: as minift encodes them, and as prompt and completion for trl.

    Rows that spell a special token are left to the sections that are about them.
    """
    special = reference_tokenizer(setting.model).all_special_tokens
    rows = [row for row in load_rows(setting.data) if not any(token in str(row) for token in special)]
    wanted = TEMPLATE.response_template
    count = QUICK_ROWS if setting.quick else ROWS
    rows = rows[: 2 * count]  # some may have nothing to learn from
    examples, kept, _ = encode_rows(rows, tokenizer, TEMPLATE, max_length=limit, source=str(setting.data))
    texts = []
    for index in kept[:count]:
        prompt, completion = split_row(rows[index], tokenizer, TEMPLATE, wanted)
        texts.append(("".join(prompt), "".join(completion[:-1])))  # trl adds the end token itself
    return examples[:count], tuple(texts)


def train_own(model: OPT, examples: list[Example], plan: Plan, scratch: Path) -> Outcome:
    """The wiring of train_sft.py."""
    set_dropout(model, 0.0)

    def loss(batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        hidden = model(batch.input_ids, batch.positions, batch.rows)
        return *completion_cross_entropy(hidden, model.head, batch.labels, batch.positions), {}

    def collated(numbers: list[int]) -> Batch:
        return collate([examples[number] for number in numbers])

    return train_minift(model, plan, len(examples), collated, loss, "supervised_tokens", scratch)


def train_trl(
    folder: Path, texts: tuple[tuple[str, str], ...], plan: Plan, limit: int
) -> tuple[Outcome, list[tuple[list[int], list[int]]]]:
    """trl's training, and the ids and labels it prepared."""
    with quiet(), TemporaryDirectory() as scratch:
        outcome, prepared = train_reference(
            SFTTrainer if plan.dtype == "float32" else Float64Trainer,
            model=reference_model(AutoModelForCausalLM, folder, plan.dtype),
            processing_class=reference_tokenizer(folder),
            train_dataset=Dataset.from_list([{"prompt": prompt, "completion": text} for prompt, text in texts]),
            args=SFTConfig(**reference_values(plan, Path(scratch)), max_length=limit),
        )
    return outcome, [(row["input_ids"], row["labels"]) for row in prepared]


# Planting a fault in minift leaves trl as it was.
remembered = functools.cache(train_trl)


class Float64Trainer(SFTTrainer):
    """trl's trainer with the cross entropy in float64: its own kernel computes in float32 whatever it is given."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        labels = inputs.pop("labels")
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        assert logits.dtype == torch.float64
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch
