"""What the sections that train share: minift's loop and trl's, from the same weights over the same rows."""

import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
import transformers
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer_callback import PrinterCallback

from minift.batching import Batch, PairBatch, Sampler
from minift.config import Config
from minift.trainer import LossFunction, Task, train
from tests.compare import Check, Setting

DTYPES = {"float32": torch.float32, "float64": torch.float64}
TOLERANCE = {"float32": 1e-5, "float64": 1e-9}
SEED = 42
BATCH_SIZE, GRAD_ACCUM = 2, 2
LEAST_STEPS = 60
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0}
# Softmax ignores what a constant in all keys adds to a query's scores.
IMMATERIAL = "k_proj.bias"


class Plan(NamedTuple):
    """How both sides train; the defaults are trl's."""

    dtype: str  # float32 or float64
    order: str  # sequential or shuffled
    lr: float
    epochs: int
    schedule: str = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    is_smooth: bool = False  # GELU in the place of ReLU, whose gradient jumps

    @property
    def name(self) -> str:
        return f"{self.dtype}, {self.order}" + (", GELU" if self.is_smooth else "")


class Outcome(NamedTuple):
    """What one side's training left behind."""

    steps: list[dict[str, float]]  # of each optimiser step: loss, grad_norm, lr and the task's metrics
    before: dict[str, Tensor]  # the trained parameters, by minift's names
    after: dict[str, Tensor]


def plans(rows: int, lr: float, *, quick: bool, smooth: bool = False) -> list[Plan]:
    """Both orders, first in float64; the shuffled ones with warm-up, a cosine and weight decay beside.

    If `smooth`, also once in float32 with a GELU, which leaves no excuse for a difference.
    """
    steps_per_epoch = math.ceil(rows / (BATCH_SIZE * GRAD_ACCUM))
    epochs = 2 if quick else max(2, math.ceil(LEAST_STEPS / steps_per_epoch))
    varied = {"schedule": "cosine", "warmup_steps": 2 if quick else 6, "weight_decay": 0.01}
    both = [
        Plan(dtype, order, lr, epochs, **(varied if order == "shuffled" else {}))
        for dtype in (("float64",) if quick else ("float64", "float32"))
        for order in ("sequential", "shuffled")
    ]
    return both if quick or not smooth else [*both, Plan("float32", "sequential", lr, epochs, is_smooth=True)]


def model_folder(setting: Setting, plan: Plan) -> Path:
    """The setting's model, or a copy of it with GELU as its activation."""
    if not plan.is_smooth:
        return setting.model
    folder = setting.scratch / "smooth"
    if not folder.exists():
        shutil.copytree(setting.model.resolve(), folder, copy_function=os.symlink)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(config | {"activation_function": "gelu"}), encoding="utf-8")
    return folder


def how_much(plan: Plan, rows: int, noun: str = "rows") -> str:
    return f"{plan.epochs * math.ceil(rows / (BATCH_SIZE * GRAD_ACCUM))} steps, {plan.epochs} epochs of {rows} {noun}"


# ---- minift's side ----


def train_minift(
    model: nn.Module,
    plan: Plan,
    rows: int,
    collated: Callable[[list[int]], Batch | PairBatch],
    loss: LossFunction,
    counted: str,
    folder: Path,
) -> Outcome:
    """Train `model` through minift's own loop; `collated` turns row numbers into a batch. As in train_sft.py."""
    folder.mkdir(parents=True, exist_ok=True)
    config = Config(
        lr=plan.lr,
        epochs=plan.epochs,
        batch_size=BATCH_SIZE,
        grad_accum=GRAD_ACCUM,
        order=plan.order,
        schedule=plan.schedule,
        warmup_steps=plan.warmup_steps,
        weight_decay=plan.weight_decay,
        seed=SEED,
        device="cpu",
        dtype=plan.dtype,
    )
    sampler = Sampler(rows, config.batch_size, config.grad_accum, config.seed, config.order == "shuffled")

    def micro_batches(step: int) -> Iterable[Batch | PairBatch]:
        return (collated(numbers) for numbers in sampler.micro_batches(step))

    before = trained(model)
    with quiet():
        train(
            Task(
                model=model,
                loss=loss,
                micro_batches=micro_batches,
                eval_batches=lambda: (),
                total_steps=config.epochs * sampler.steps_per_epoch,
                write_model=lambda folder: None,
                counted=counted,
            ),
            config,
            folder,
        )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return Outcome([line for line in lines if line["split"] == "train"], before, trained(model))


# ---- the reference's side ----


def reference_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def reference_model(kind: type[PreTrainedModel], folder: Path, dtype: str, **config: Any) -> PreTrainedModel:
    """A transformers model from a local folder, without dropout."""
    return kind.from_pretrained(folder, dtype=DTYPES[dtype], local_files_only=True, **NO_DROPOUT, **config)


def reference_values(plan: Plan, folder: Path) -> dict[str, Any]:
    """trl's arguments for a plan: only what must be said, so that its own defaults are what is compared."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH_SIZE,
        "gradient_accumulation_steps": GRAD_ACCUM,
        "num_train_epochs": plan.epochs,
        "learning_rate": plan.lr,
        "lr_scheduler_type": plan.schedule,
        "warmup_steps": plan.warmup_steps,
        "weight_decay": plan.weight_decay,
        "train_sampling_strategy": "sequential" if plan.order == "sequential" else "random",
        "seed": SEED,
        "use_cpu": True,
        "bf16": False,  # what trl takes unless told not to
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def train_reference(trainer_class: type[Trainer], **arguments: Any) -> tuple[Outcome, datasets.Dataset]:
    """Train with one of trl's trainers; give what it did in each step, and the data set as it prepared it."""

    class Recorder(trainer_class):
        """trl's trainer, noting each step's loss before the trainer adds it up in float32, whatever the model's."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.pending: list[float] = []
            self.steps: list[dict[str, float]] = []

        def _send_telemetry(self) -> None:
            """To nobody."""

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)
            self.pending.append(loss.item())
            return loss

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            super().log(logs, *args, **kwargs)  # adds the task's metrics to `logs`
            if "learning_rate" in logs:
                self.steps.append({**logs, "lr": logs["learning_rate"], "loss": sum(self.pending)})
                self.pending.clear()

    trainer = Recorder(**arguments)
    trainer.remove_callback(PrinterCallback)
    before = trained(trainer.model)
    trainer.train()
    return Outcome(trainer.steps, before, trained(trainer.model)), trainer.train_dataset


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that are trained, by minift's names for them."""
    return {own_name(name): each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}


def own_name(name: str) -> str:
    """minift's name for a parameter of transformers' or peft's, which calls an adapter "default"."""
    return name.removeprefix("base_model.model.").removeprefix("model.").replace(".default.", ".")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' progress bars, warnings and advice: the table is what is to be read."""
    bars = not are_progress_bars_disabled()
    verbosity = transformers.logging.get_verbosity()
    disable_progress_bars()
    datasets.disable_progress_bars()
    datasets.disable_caching()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)
        transformers.logging.set_verbosity(verbosity)
        if bars:
            enable_progress_bars()


# ---- what is compared ----


def compare_outcomes(
    section: str, plan: Plan, on: str, minift: Outcome, reference: Outcome, exact: Outcome
) -> Iterator[Check]:
    """The loss, gradient norm and learning rate of each step, and the weights at the end.

    A ReLU's gradient jumps at 0. Once in some ten thousand tokens float32 rounds an input to one side of 0 here and to
    the other there; from then on gradients and weights are apart by more than roundings, and Adam makes the most of it.
    So where these disagree in float32, how far each side is from `exact`, the reference's training in float64, is told.
    """
    tolerance = TOLERANCE[plan.dtype]
    ours, theirs, true = (
        {name: [step[name] for step in outcome.steps] for name in ("loss", "grad_norm", "lr")}
        for outcome in (minift, reference, exact)
    )
    loss, where = largest_relative(ours["loss"], theirs["loss"])
    yield Check(section, f"loss of each step, {plan.name}", on, loss, tolerance, where)

    norm, where = largest_relative(ours["grad_norm"], theirs["grad_norm"])
    rounding = [largest_relative(side["grad_norm"], true["grad_norm"])[0] for side in (ours, theirs)]
    check = Check(section, f"gradient norm of each step, {plan.name}", on, norm, tolerance, where)
    yield with_rounding(check, plan, *rounding)

    lr, where = largest_relative(ours["lr"], theirs["lr"])
    yield Check(section, f"learning rate of each step, {plan.name}", on, lr, 1e-12, where)

    what = f"weights at the end, {plan.name}"
    unmatched = sorted(minift.after.keys() ^ reference.after.keys())
    if unmatched:
        yield Check(section, what, "their names", len(unmatched), 0, f"only one side has {unmatched[0]}")
        return
    # In float64 the noise in a gradient of zero is too small to move anything, so nothing is set apart.
    immaterial = [name for name in minift.after if name.endswith(IMMATERIAL) and plan.dtype == "float32"]
    material = [name for name in minift.after if name not in immaterial]
    difference, where = largest_between(minift.after, reference.after, material)
    rounding = [largest_between(side.after, exact.after, material)[0] for side in (minift, reference)]
    check = Check(section, what, extent(minift, material), difference, tolerance, where)
    yield with_rounding(check, plan, *rounding)
    if immaterial:
        # Adam makes steps of the learning rate's size out of any gradient, noise included.
        bound = 2 * sum(ours["lr"])
        difference, _ = largest_between(minift.after, reference.after, immaterial)
        note = "gradient 0 but for rounding, which Adam follows; softmax ignores what it adds to all keys"
        what = f"{IMMATERIAL} at the end, {plan.name}"
        yield Check(section, what, extent(minift, immaterial), difference, bound, note)


def with_rounding(check: Check, plan: Plan, minift: float, reference: float) -> Check:
    """In float32, a check that disagrees with a note of both sides' distances from float64."""
    if plan.dtype != "float32" or check.agrees:
        return check
    rounding = f"minift is {minift:.1e} from float64, the reference {reference:.1e}"
    return check._replace(note=f"{check.note}; {rounding}" if check.note else rounding)


def extent(outcome: Outcome, names: list[str]) -> str:
    moved, _ = largest_between(outcome.after, outcome.before, names)
    return f"{sum(outcome.after[name].numel() for name in names):,} numbers, moved by up to {moved:.0e}"


def largest_between(ours: dict[str, Tensor], theirs: dict[str, Tensor], names: list[str]) -> tuple[float, str]:
    """The largest difference between tensors of one name, and that name. NaN is larger than any number."""
    differences = {name: float((ours[name].double() - theirs[name].double()).abs().max()) for name in names}
    worst = max(differences, key=lambda name: (math.isnan(differences[name]), differences[name]))
    return differences[worst], worst if differences[worst] else ""


def largest_relative(ours: list[float], theirs: list[float]) -> tuple[float, str]:
    """The largest |a - b| / |b| and the step where it is; infinite where one side made more steps."""
    scaled = [(a, b) if a == b or b == 0 else (a / abs(b), b / abs(b)) for a, b in zip(ours, theirs, strict=False)]
    return largest_absolute([a for a, _ in scaled], [b for _, b in scaled], len(ours) - len(theirs))


def largest_absolute(ours: list[float], theirs: list[float], surplus: int = 0) -> tuple[float, str]:
    """The largest |a - b| and where it is; infinite where one side has more numbers."""
    if surplus or len(ours) != len(theirs):
        return math.inf, "one side made more steps"
    differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    worst = max(differences, key=lambda difference: (math.isnan(difference), difference))
    return worst, f"in step {differences.index(worst) + 1}" if worst else ""
