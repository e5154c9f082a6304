"""LoRA against peft's under trl's `SFTTrainer`: training as in `sft`, merged weights, each other's adapter files."""

from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from minift.batching import collate
from minift.files.adapters import adapter_state, load_adapters, save_adapters
from minift.files.weights import load_model
from minift.lora import add_lora, merge
from tests.compare import Check, Setting
from tests.compare.sft import Texts, encode_for_both, train_trl
from tests.compare.training import (
    DTYPES,
    SEED,
    TOLERANCE,
    Outcome,
    Plan,
    compare_outcomes,
    extent_of,
    largest_between,
    length_limit,
    plans,
    quiet,
    reference_model,
    train_minift,
)
from tests.loop import sft_loss

LR = 2e-4  # ten times that of full training, as trl's guide recommends
RANK, ALPHA, TARGETS = 4, 16.0, ("q_proj", "v_proj", "fc1")


def compare(setting: Setting) -> Iterator[Check]:
    setting.progress("lora: reading and encoding rows")
    examples, texts = encode_for_both(setting)
    exact = None
    for plan in plans(len(examples), LR, quick=setting.quick):
        if plan.order == "sequential":
            continue  # adapters do not depend on the order
        dtype = DTYPES[plan.dtype]
        model = load_model(setting.model, dtype=dtype)
        torch.manual_seed(SEED)
        add_lora(model, RANK, ALPHA, 0.0, TARGETS)
        start, end = (setting.scratch / "lora" / plan.dtype / name for name in ("start", "end"))
        save_adapters(model, start)

        setting.progress(f"lora: trl and peft train, {plan.name}")
        theirs, merged, count = train_peft(setting.model, start, end, texts, plan, length_limit(setting))
        difference = abs(sum(weight.numel() for weight in adapter_state(model).values()) - count)
        yield Check("lora", f"trained numbers, {plan.name}", f"rank {RANK} on {', '.join(TARGETS)}", difference, 0)

        setting.progress(f"lora: minift trains, {plan.name}")
        ours = train_minift(model, plan, examples, collate, sft_loss(model), "supervised_tokens")
        exact = exact or theirs  # float64 comes first
        yield from compare_outcomes(setting, "lora", plan, extent_of(plan, len(examples)), ours, theirs, exact)

        # From here on both sides have peft's adapters, so that only their use can differ.
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
    folder: Path, start: Path, end: Path, texts: Texts, plan: Plan, limit: int
) -> tuple[Outcome, dict[str, Tensor], int]:
    """Train the adapters in `start`, saved by minift, with peft and trl; save the trained ones in `end`.

    Return the outcome, the merged weights, and how many numbers peft trains.
    """
    with quiet():
        base = reference_model(AutoModelForCausalLM, folder, plan.dtype)
        model = PeftModel.from_pretrained(base, start, is_trainable=True)
        count, _ = model.get_nb_trainable_parameters()
        outcome, _ = train_trl(folder, texts, plan, limit, model)
        model.save_pretrained(end)
        merged = model.merge_and_unload().model.state_dict()
    return outcome, merged, count
