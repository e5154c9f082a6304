"""The loop: accumulate, clip, step, evaluate, log, save. It knows batches and sums, never what is being learned."""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor, nn

from minift import checkpoint
from minift.batching import Batch, PairBatch
from minift.config import Config
from minift.errors import UserError
from minift.files import write_text
from minift.optim import adamw, learning_rate

# A batch -> its loss and its metrics as sums, and how many items (tokens, pairs) they are sums over.
LossFunction = Callable[[Batch | PairBatch], tuple[Tensor, Tensor, dict[str, Tensor]]]


class Task(NamedTuple):
    """What a script hands the loop."""

    model: nn.Module
    loss: LossFunction
    micro_batches: Callable[[int], Iterable[Batch | PairBatch]]  # optimiser step, from 0 -> what it accumulates
    eval_batches: Callable[[], Iterable[Batch | PairBatch]]
    total_steps: int
    write_model: Callable[[Path], None]  # a folder -> the model in it, as the ecosystem's files
    counted: str  # what the loss counts: "supervised_tokens" or "pairs"


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one; a GPU asked for by name must exist."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = {"cpu", "cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))}
    if name not in known or (name == "cuda" and len(known) == 2):
        raise UserError(f"--device {name}: expected auto, cpu or a GPU of the {len(known) - 2} here, as in cuda:0")
    return torch.device(name)


def pick_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The dtype of the forward pass: `auto` is that of the frozen weights, if they are in half precision; else bfloat16
    autocast on a GPU that has it, float32 on a CPU.

    The weights being trained stay in float32 (float64 when asked for): an AdamW step is often smaller than bfloat16 can
    tell from nothing.
    """
    if config.base_dtype != "float32":
        return getattr(torch, config.base_dtype)
    if config.dtype == "auto":
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if has_bfloat16 else torch.float32
    return getattr(torch, config.dtype)


def weights_dtype(config: Config) -> torch.dtype:
    """The dtype in which the weights are loaded: the arithmetic's if it is float64, else that of the frozen base."""
    return torch.float64 if config.dtype == "float64" else getattr(torch, config.base_dtype)


def train(task: Task, config: Config, folder: Path) -> None:
    """Train `task.model` where it is for `task.total_steps` optimiser steps; leave metrics and checkpoints in `folder`.

    Each optimiser step follows the gradient of sum / count over all its micro-batches: the mean over every item of the
    step, however the items are spread over micro-batches. Everything random in a step is seeded by (seed, step), so
    evaluating more often or resuming changes nothing.
    """
    model = task.model
    device = next(model.parameters()).device
    dtype = pick_dtype(config, device)
    optimizer = adamw(model, config.weight_decay)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    metrics_file = folder / "metrics.jsonl"
    progress: dict[str, Any] = {"step": 0, "tokens": 0, task.counted: 0, "seconds": 0.0, "best": None, "sums": {}}
    if config.resume:
        progress = checkpoint.load(folder / "checkpoints", model, optimizer)
        _keep_lines_until(metrics_file, progress["step"])
    else:
        metrics_file.write_text("")
        _log(metrics_file, progress, task.counted, "eval", evaluate(task, device, dtype))

    sums = Counter(progress["sums"])  # of the steps since the last line in metrics.jsonl
    clock = time.perf_counter() - progress["seconds"]
    tokens_before = progress["tokens"]
    started = time.perf_counter()
    with tqdm(total=task.total_steps, initial=progress["step"], unit="step", mininterval=0.5) as bar:
        for step in range(progress["step"], task.total_steps):
            torch.manual_seed((config.seed << 32) + step)  # dropout
            step_sums = accumulate_gradient(task, step, device, dtype)
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            torch._foreach_div_(gradients, step_sums["count"])
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item()
            _refuse_divergence(config, step, step_sums["loss"] + grad_norm)
            lr = learning_rate(
                step,
                peak=config.lr,
                schedule=config.schedule,
                warmup_steps=config.warmup_steps,
                total_steps=task.total_steps,
            )
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()

            done = step + 1
            last = done == task.total_steps
            sums.update(step_sums)
            progress["tokens"] += step_sums["tokens"]
            progress[task.counted] += step_sums["count"]
            progress.update(step=done, seconds=time.perf_counter() - clock)
            if done % config.log_every == 0 or last:
                means = _means(sums)
                _log(metrics_file, progress, task.counted, "train", {**means, "lr": lr, "grad_norm": grad_norm})
                rate = (progress["tokens"] - tokens_before) / (time.perf_counter() - started)
                bar.set_postfix_str(f"loss {means['loss']:.3f}, {rate:,.0f} tokens/s", refresh=False)
                sums = Counter()
            bar.update()

            is_best = False
            if last or (config.eval_every and done % config.eval_every == 0):
                means = evaluate(task, device, dtype)
                _refuse_divergence(config, step, means.get("loss", 0.0))
                _log(metrics_file, progress, task.counted, "eval", means)
                is_best = bool(means) and (progress["best"] is None or means["loss"] < progress["best"])
                progress["best"] = means["loss"] if is_best else progress["best"]
            if last or is_best or (config.save_every and done % config.save_every == 0):
                progress["sums"] = dict(sums)
                checkpoint.save(folder / "checkpoints", model, optimizer, progress, task.write_model, is_best=is_best)


def accumulate_gradient(task: Task, step: int, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Leave the gradient of the step's summed loss in `.grad`, and give the sums of loss, count, tokens and metrics."""
    task.model.train()
    sums: Counter = Counter()
    for batch in task.micro_batches(step):
        with _arithmetic(device, dtype):
            loss, count, metrics = task.loss(batch.to(device))
        loss.backward()
        sums.update({"loss": loss.detach(), "count": count, **metrics})
        sums["tokens"] += len(batch.input_ids)
    return {name: float(value) if name not in ("count", "tokens") else int(value) for name, value in sums.items()}


@torch.no_grad()
def evaluate(task: Task, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Mean loss and metrics over all items of the evaluation batches; empty if there are none."""
    task.model.eval()
    sums: Counter = Counter()
    for batch in task.eval_batches():
        with _arithmetic(device, dtype):
            loss, count, metrics = task.loss(batch.to(device))
        sums.update({"loss": float(loss), "count": int(count), **{name: float(v) for name, v in metrics.items()}})
    return _means(sums)


def _refuse_divergence(config: Config, step: int, value: float) -> None:
    # Before anything is written: the last checkpoint stays a good one.
    if not math.isfinite(value):
        raise UserError(f"--lr {config.lr}: the loss or its gradient is {value} in step {step + 1}, try a lower one")


def _arithmetic(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def _means(sums: Counter) -> dict[str, float]:
    """Empty where nothing was counted."""
    if not sums["count"]:
        return {}
    return {name: value / sums["count"] for name, value in sums.items() if name not in ("count", "tokens")}


def _log(path: Path, progress: dict[str, Any], counted: str, split: str, values: dict[str, float]) -> None:
    """Append one line. `tokens`, `supervised_tokens` (or `pairs`) and `seconds` count from the run's start."""
    if values:
        counters = {name: progress[name] for name in ("tokens", counted)}
        line = {"step": progress["step"], "split": split, **values, **counters, "seconds": progress["seconds"]}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _keep_lines_until(path: Path, step: int) -> None:
    """Drop what a killed run logged after its last checkpoint: those steps are about to be taken again."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    write_text(path, "".join(kept))
