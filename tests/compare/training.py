"""Training for the sections that train: minift's loop and trl's trainers, from the same weights, on the same rows."""

import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import datasets
import torch
import transformers
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer_callback import PrinterCallback
from trl import RewardConfig, RewardTrainer, SFTConfig

from minift.batching import Loader
from minift.config import Config
from minift.files.datasets import TRAINING_SCHEMAS, Row, load_rows
from minift.files.weights import read_config
from minift.run.setup import set_dropout
from minift.trainer import LossFunction, Task, train
from tests.compare import Check, Setting
from tests.compare.relu import Sides, steps_that_jump, watch
from tests.loop import MemoryRecorder, write_nothing
from tests.reference import trained

DTYPES = {"float32": torch.float32, "float64": torch.float64}
TOLERANCE = {"float32": 1e-5, "float64": 1e-9}
SEED = 42
BATCH_SIZE, GRAD_ACCUM = 2, 2
MIN_STEPS = 60
MAX_LENGTH = 1024  # trl's default
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0}
# A constant added to all keys does not change a softmax, so the exact gradient of this bias is 0.
WITHOUT_EFFECT = "k_proj.bias"
TITLES = {"sft": "SFT", "lora": "LoRA", "reward": "Reward model"}  # of the loss curves


class Plan(NamedTuple):
    """How both sides train; the defaults are trl's."""

    dtype: str  # float32 or float64
    order: str  # sequential or shuffled
    lr: float
    epochs: int
    schedule: str = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    is_smooth: bool = False  # with GELU instead of ReLU, whose gradient jumps

    @property
    def name(self) -> str:
        return f"{self.dtype}, {self.order}" + (", GELU" if self.is_smooth else "")


ONE_EPOCH = Plan("float32", "sequential", 2e-5, 1)


class Outcome(NamedTuple):
    """What one side's training produced."""

    # Of each optimiser step: loss, grad_norm, lr and the task's metrics. trl's grad_norm is that of its gradient in
    # float64, and logged_grad_norm the one that it logs.
    steps: list[dict[str, float]]
    before: dict[str, Tensor]  # the trained parameters, by minift's names
    after: dict[str, Tensor]
    sides: Mapping[int, Sides]  # of ReLU inputs near 0, by step
    scores: Sequence[float] = ()  # of a reward model after training


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' progress bars, warnings and advice, which would be printed between the table's lines."""
    bars = not are_progress_bars_disabled()
    disabled, verbosity = logging.root.manager.disable, transformers.logging.get_verbosity()
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
        logging.disable(disabled)
        transformers.logging.set_verbosity(verbosity)
        if bars:
            enable_progress_bars()


def plans(rows: int, lr: float, *, quick: bool, smooth: bool = False) -> list[Plan]:
    """Return a plan for each order and dtype, float64 first; the shuffled ones add warm-up, a cosine and weight decay.

    `smooth` adds one in float32 with GELU, where no jump of a gradient can explain a difference.
    """
    steps_per_epoch = math.ceil(rows / (BATCH_SIZE * GRAD_ACCUM))
    epochs = 2 if quick else max(2, math.ceil(MIN_STEPS / steps_per_epoch))
    varied = {"schedule": "cosine", "warmup_steps": 2 if quick else 6, "weight_decay": 0.01}
    both = [
        Plan(dtype, order, lr, epochs, **(varied if order == "shuffled" else {}))
        for dtype in (("float64",) if quick else ("float64", "float32"))
        for order in ("sequential", "shuffled")
    ]
    return both if quick or not smooth else [*both, Plan("float32", "sequential", lr, epochs, is_smooth=True)]


def model_folder(setting: Setting, plan: Plan) -> Path:
    """Return the setting's model, or a copy of it with GELU as its activation."""
    if not plan.is_smooth:
        return setting.model
    folder = setting.scratch / "smooth"
    if not folder.exists():
        shutil.copytree(setting.model.resolve(), folder, copy_function=os.symlink)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(config | {"activation_function": "gelu"}), encoding="utf-8")
    return folder


def length_limit(setting: Setting) -> int:
    """Return the most tokens that a row may have: trl's default, or the model's positions."""
    return min(MAX_LENGTH, read_config(setting.model)[0].max_position_embeddings)


def plain_rows(setting: Setting, data: Path, schemas: Mapping[str, tuple[str, ...]] = TRAINING_SCHEMAS) -> list[Row]:
    """Return the rows that do not spell a special token; other sections compare those that do."""
    special = reference_tokenizer(setting.model).all_special_tokens
    return [row for row in last_turns(data, schemas) if not any(token in str(row) for token in special)]


def last_turns(data: Path, schemas: Mapping[str, tuple[str, ...]] = TRAINING_SCHEMAS) -> list[Row]:
    """Return rows, of a conversation only the last turn: trl has no mask by turn for a prompt and its completion.

    tests/test_layouts.py compares the mask by turn with that of a chat template.
    """
    rows = load_rows(data, schemas)
    for row in rows:
        row.pop("history", None)
    return rows


def extent_of(plan: Plan, rows: int, noun: str = "rows") -> str:
    return f"{plan.epochs * math.ceil(rows / (BATCH_SIZE * GRAD_ACCUM))} steps, {plan.epochs} epochs of {rows} {noun}"


# ---- minift's side ----


def train_minift(
    model: nn.Module, plan: Plan, examples: Sequence[Any], collate: Callable, loss: LossFunction, unit: str
) -> Outcome:
    """Train `model` with minift's own loop, without dropout."""
    config = Config(
        lr=plan.lr,
        epochs=plan.epochs,
        schedule=plan.schedule,
        warmup_steps=plan.warmup_steps,
        weight_decay=plan.weight_decay,
        seed=SEED,
    )
    set_dropout(model, 0.0)
    before = copies(model)
    train_batches = Loader(examples, collate, BATCH_SIZE, GRAD_ACCUM, SEED, plan.order)
    eval_batches = Loader([], collate, BATCH_SIZE)
    recorder = MemoryRecorder()
    with quiet(), watch(model, recorder.lines) as sides:
        train(Task(model, loss, train_batches, eval_batches, write_nothing, unit), config, recorder)
    return Outcome(recorder.lines, before, copies(model), sides)


# ---- the reference's side ----


def reference_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@quiet()
def reference_model(kind: type[PreTrainedModel], folder: Path, dtype: str, **config: Any) -> PreTrainedModel:
    """Return a transformers model from a local folder, without dropout."""
    return kind.from_pretrained(folder, dtype=DTYPES[dtype], local_files_only=True, **(NO_DROPOUT | config))


def make_trainer(
    trainer_class: type[Trainer],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]] | datasets.Dataset,
    scratch: str | Path,
    plan: Plan = ONE_EPOCH,
    **values: Any,
) -> Trainer:
    """Return one of trl's trainers for some rows: silent, and with all of trl's defaults that the plan leaves alone."""
    config_class = RewardConfig if issubclass(trainer_class, RewardTrainer) else SFTConfig
    arguments = {
        "output_dir": str(scratch),
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
        "bf16": False,  # trl's default is True
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    silent_class = type(trainer_class.__name__, (trainer_class,), {"_send_telemetry": lambda trainer: None})
    trainer = silent_class(
        model=model,
        processing_class=tokenizer,
        train_dataset=rows if isinstance(rows, datasets.Dataset) else datasets.Dataset.from_list(rows),
        args=config_class(**arguments | values),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train_reference(
    trainer_class: type[Trainer],
    model: PreTrainedModel,
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    plan: Plan,
    **values: Any,
) -> tuple[Outcome, datasets.Dataset]:
    """Train with one of trl's trainers; return the outcome, and the data set as the trainer prepared it."""

    class Recorder(trainer_class):
        """trl's trainer; records each step's loss before the trainer adds it up in float32 for any model.

        It also takes the gradient's norm in float64 before the trainer clips it: transformers' callbacks come too late.
        """

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.pending: list[float] = []
            self.steps: list[dict[str, float]] = []

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)
            self.pending.append(loss.item())
            self.norm = float64_norm(self.model)  # clipping comes after the last micro-batch of a step
            return loss

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            super().log(logs, *args, **kwargs)  # adds the task's metrics to `logs`
            if "learning_rate" in logs:
                step = {"lr": logs["learning_rate"], "loss": sum(self.pending), "grad_norm": self.norm}
                self.steps.append({**logs, **step, "logged_grad_norm": logs["grad_norm"]})
                self.pending.clear()

    with quiet(), TemporaryDirectory() as scratch:
        trainer = make_trainer(Recorder, model, reference_tokenizer(folder), rows, scratch, plan, **values)
        before = copies(trainer.model)
        with watch(trainer.model, trainer.steps) as sides:
            trainer.train()
    return Outcome(trainer.steps, before, copies(trainer.model), sides), trainer.train_dataset


def float64_norm(model: nn.Module) -> float:
    """Return the norm of a model's gradient, of all parameters together, summed in float64."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))


def copies(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the trained parameters, by minift's names."""
    return {name: weight.detach().clone() for name, weight in trained(model).items()}


# ---- the comparison ----


def compare_prepared(section: str, what: str, noun: str, ours: Sequence, theirs: Sequence) -> Check:
    """Count the examples that trl prepared differently."""
    wrong = sum(a != b for a, b in zip(ours, theirs, strict=False)) + abs(len(ours) - len(theirs))
    return Check(section, what, f"{len(ours)} {noun}", wrong, 0)


def compare_outcomes(
    setting: Setting, section: str, plan: Plan, on: str, minift: Outcome, reference: Outcome, exact: Outcome
) -> Iterator[Check]:
    """Compare the loss, gradient norm and learning rate of each step, and the final weights; keep the loss curves.

    A ReLU's gradient jumps at 0. About once in ten thousand tokens, float32 rounds an input to different sides of 0 on
    the two sides. From then on gradients and weights differ by more than rounding, and Adam amplifies it. So where they
    disagree in float32, a note gives the distance of each side from `exact`, the reference's training in float64.
    """
    tolerance = TOLERANCE[plan.dtype]
    ours, theirs, true = (
        {name: [step[name] for step in outcome.steps] for name in ("loss", "grad_norm", "lr")}
        for outcome in (minift, reference, exact)
    )
    setting.curves[f"{TITLES[section]}, {plan.name}"] = {"minift": ours["loss"], "trl": theirs["loss"]}
    loss, where = largest_relative(ours["loss"], theirs["loss"])
    yield Check(section, f"loss of each step, {plan.name}", on, loss, tolerance, where)

    rounding = [largest_relative(side["grad_norm"], true["grad_norm"])[0] for side in (ours, theirs)]
    yield with_rounding(compare_norms(section, plan, on, minift, reference), plan, *rounding)

    lr, where = largest_relative(ours["lr"], theirs["lr"])
    yield Check(section, f"learning rate of each step, {plan.name}", on, lr, 1e-12, where)

    what = f"weights at the end, {plan.name}"
    unmatched = sorted(minift.after.keys() ^ reference.after.keys())
    if unmatched:
        yield Check(section, what, "their names", len(unmatched), 0, f"only one side has {unmatched[0]}")
        return
    # In float64 the noise in a gradient of zero is too small to move a weight, so nothing needs a separate check.
    separate = [name for name in minift.after if name.endswith(WITHOUT_EFFECT) and plan.dtype == "float32"]
    others = [name for name in minift.after if name not in separate]
    difference, where = largest_between(minift.after, reference.after, others)
    rounding = [largest_between(side.after, exact.after, others)[0] for side in (minift, reference)]
    check = Check(section, what, extent(minift, others), difference, tolerance, where)
    yield with_rounding(check, plan, *rounding)
    if separate:
        # Adam turns any gradient, noise included, into steps of the size of the learning rate.
        bound = 2 * sum(ours["lr"])
        difference, _ = largest_between(minift.after, reference.after, separate)
        note = "its gradient is 0 up to rounding, which Adam follows; a constant added to all keys changes no softmax"
        what = f"{WITHOUT_EFFECT} at the end, {plan.name}"
        yield Check(section, what, extent(minift, separate), difference, bound, note)


def compare_norms(section: str, plan: Plan, on: str, minift: Outcome, reference: Outcome) -> Check:
    """Compare minift's gradient norm of each step with the float64 norm of trl's gradient, for any dtype.

    The norm that trl logs is torch's. In float32 its own error can be larger than the tolerance; the note gives it.
    Every step counts. The note also names those in which the gradient of a ReLU is found to jump.
    """
    ours, theirs = ([step["grad_norm"] for step in outcome.steps] for outcome in (minift, reference))
    logged, _ = largest_relative([step["logged_grad_norm"] for step in reference.steps], theirs)
    notes = [f"from the float64 norm of trl's gradient; the norm that trl logs is {logged:.1e} from it"]
    if jumps := steps_that_jump(minift.sides, reference.sides):
        rest = [step for step in range(len(theirs)) if step not in jumps]
        steps = ", ".join(f"step {step + 1}" for step in jumps)
        notes.append(f"rounding puts a ReLU's input on different sides of 0 in {steps}")
        if rest:  # in a large model all steps may be such
            others, _ = largest_relative([ours[step] for step in rest], [theirs[step] for step in rest])
            notes[-1] += f" (other steps: {others:.1e})"
    norm, where = largest_relative(ours, theirs)
    note = "; ".join([f"{where}, {notes[0]}" if where else notes[0], *notes[1:]])
    return Check(section, f"gradient norm of each step, {plan.name}", on, norm, TOLERANCE[plan.dtype], note)


def with_rounding(check: Check, plan: Plan, minift: float, reference: float) -> Check:
    """Add both sides' distances from float64, in which only ReLU is trained, to the note of a check that disagrees."""
    if plan.dtype != "float32" or plan.is_smooth or check.agrees:
        return check
    rounding = f"minift is {minift:.1e} from float64, the reference {reference:.1e}"
    return check._replace(note=f"{check.note}; {rounding}" if check.note else rounding)


def extent(outcome: Outcome, names: list[str]) -> str:
    moved, _ = largest_between(outcome.after, outcome.before, names)
    return f"{sum(outcome.after[name].numel() for name in names):,} numbers, moved by up to {moved:.0e}"


def largest_between(ours: dict[str, Tensor], theirs: dict[str, Tensor], names: list[str]) -> tuple[float, str]:
    """Return the largest difference between tensors of one name, and that name. NaN is larger than any number."""
    differences = {name: float((ours[name].double() - theirs[name].double()).abs().max()) for name in names}
    worst = max(differences, key=lambda name: (math.isnan(differences[name]), differences[name]))
    return differences[worst], worst if differences[worst] else ""


def largest_relative(ours: list[float], theirs: list[float]) -> tuple[float, str]:
    """Return the largest |a - b| / |b| and its step; infinite if one side made more steps."""
    scaled = [(a, b) if a == b or b == 0 else (a / abs(b), b / abs(b)) for a, b in zip(ours, theirs, strict=False)]
    return largest_absolute([a for a, _ in scaled], [b for _, b in scaled], len(ours) - len(theirs))


def largest_absolute(ours: list[float], theirs: list[float], surplus: int = 0) -> tuple[float, str]:
    """Return the largest |a - b| and its step; infinite if one side has more numbers."""
    if surplus or len(ours) != len(theirs):
        return math.inf, "one side made more steps"
    differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    worst = max(differences, key=lambda difference: (math.isnan(difference), difference))
    return worst, f"in step {differences.index(worst) + 1}" if worst else ""
