"""LoRA against peft's under trl's `SFTTrainer`: training as in `sft`, merged weights, each other's adapter files."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from minift.adapters import load_adapters, save_adapters
from minift.lora import adapter_state, add_lora, merge, num_adapter_parameters
from minift.tokenizer import load_tokenizer
from minift.weights import load_model, read_config
from tests.compare import Check, Setting
from tests.compare.sft import LONGEST, Float64Trainer, material, train_own
from tests.compare.training import (
    DTYPES,
    SEED,
    TOLERANCE,
    Outcome,
    Plan,
    compare_outcomes,
    how_much,
    largest_between,
    plans,
    quiet,
    reference_model,
    reference_tokenizer,
    reference_values,
    train_reference,
)

LR = 2e-4  # ten times that of all weights, as trl's guide has it
RANK, ALPHA, TARGETS = 4, 16.0, ("q_proj", "v_proj", "fc1")


def compare(setting: Setting) -> Iterator[Check]:
    setting.progress("lora: reading and encoding rows")
    limit = min(LONGEST, read_config(setting.model / "config.json").max_position_embeddings)
    examples, texts = material(setting, load_tokenizer(setting.model), limit)
    exact = None
    for plan in plans(len(examples), LR, quick=setting.quick):
        if plan.order == "sequential":
            continue  # adapters have nothing to do with it
        dtype = DTYPES[plan.dtype]
        model = load_model(setting.model, dtype=dtype)
        torch.manual_seed(SEED)
        add_lora(model, RANK, ALPHA, 0.0, TARGETS)
        start, end = (setting.scratch / "lora" / plan.dtype / name for name in ("start", "end"))
        save_adapters(model, start)

        setting.progress(f"lora: trl and peft train, {plan.name}")
        theirs, merged, count = train_peft(setting.model, start, end, texts, plan, limit)
        difference = abs(num_adapter_parameters(model) - count)
        yield Check("lora", f"numbers to train, {plan.name}", f"rank {RANK} on {', '.join(TARGETS)}", difference, 0)

        setting.progress(f"lora: minift trains, {plan.name}")
        ours = train_own(model, examples, plan, setting.scratch / "lora" / plan.dtype)
        setting.curves[f"LoRA, {plan.name}"] = {
            "minift": [step["loss"] for step in ours.steps],
            "trl": [step["loss"] for step in theirs.steps],
        }
        exact = exact or theirs  # float64 comes first
        yield from compare_outcomes("lora", plan, how_much(plan, len(examples)), ours, theirs, exact)

        # From here on with peft's adapters on both sides, so that only what is done with them can differ.
        model = load_model(setting.model, dtype=dtype)
        load_adapters(model, end)
        read = adapter_state(model)
        unequal = sum(name not in read or not torch.equal(read[name], theirs.after[name]) for name in theirs.after)
        unequal += len(read.keys() - theirs.after.keys())
        yield Check("lora", f"adapters that peft saved, {plan.name}", f"{len(read)} tensors", unequal, 0)
        merge(model)
        own = model.state_dict()
        difference, where = largest_between(own, merged, [*own])
        allowed = TOLERANCE[plan.dtype]
        yield Check("lora", f"merged weights, {plan.name}", f"{len(own)} tensors", difference, allowed, where)


def train_peft(
    folder: Path, start: Path, end: Path, texts: tuple[tuple[str, str], ...], plan: Plan, limit: int
) -> tuple[Outcome, dict[str, Tensor], int]:
    """peft's training from the adapters that minift saved: its outcome, its merged weights, how many numbers it trains.

    The trained adapters are left in the folder `end`.
    """
    with quiet(), TemporaryDirectory() as scratch:
        base = reference_model(AutoModelForCausalLM, folder, plan.dtype)
        model = PeftModel.from_pretrained(base, start, is_trainable=True)
        count, _ = model.get_nb_trainable_parameters()
        outcome, _ = train_reference(
            SFTTrainer if plan.dtype == "float32" else Float64Trainer,
            model=model,
            processing_class=reference_tokenizer(folder),
            train_dataset=Dataset.from_list([{"prompt": prompt, "completion": text} for prompt, text in texts]),
            args=SFTConfig(**reference_values(plan, Path(scratch)), max_length=limit),
        )
        model.save_pretrained(end)
        merged = model.merge_and_unload().model.state_dict()
    return outcome, merged, count
