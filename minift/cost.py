"""What training on a CPU is about to cost, before it starts: time by counting products, memory by counting numbers.

Meant to be right within a factor of 2. Steps of few tokens, where AdamW's pass over all weights shows, take longer than
told, and so do rows of thousands of tokens, where attention's own products do: T tokens add T / 12C of the rest.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minift.losses import CHUNK

SHARE = 0.7  # of the rate of bare matrix products that training reaches, measured
LOOKED_AT = 50  # of a run's optimiser steps
PYTHON = 0.4e9  # bytes that Python and torch take before there is a model
DAY = 86400


def announce(
    model: nn.Module,
    micro_batches: Callable[[int], Iterable[Any]],
    total_steps: int,
    dtype: torch.dtype,
    *,
    uses_head: bool = True,
) -> str:
    """Two lines: how many steps of how many tokens, how long they take here, and the memory that they need.

    Tokens are those of the first steps' batches themselves; `uses_head` says that labels meet the vocabulary.
    """
    looked_at = min(total_steps, LOOKED_AT)
    batches = [batch for step in range(looked_at) for batch in micro_batches(step)]
    tokens = [len(batch.input_ids) for batch in batches]
    supervised = [int((batch.labels >= 0).sum()) if uses_head else 0 for batch in batches]
    per_token, per_supervised = products(model)
    work = total_steps / looked_at * (per_token * sum(tokens) + per_supervised * sum(supervised))
    rate = matrix_rate(sum(tokens) // len(tokens), model.config.hidden_size, dtype)
    sizes = zip(tokens, (batch.rows.numel() for batch in batches), supervised, strict=True)
    gigabytes, mean = max(memory(model, *size) for size in sizes) / 1e9, sum(tokens) / looked_at
    return (
        f"\nOn this CPU training will take about {duration(work / rate / SHARE)} and {gigabytes:.1f} GB of memory: "
        f"{total_steps:,} steps of\nabout {mean:,.0f} tokens, {work / 1e12:,.1f} TFLOP at {SHARE:.0%} "
        f"of the {rate / 1e9:,.0f} GFLOP/s of matrix products here; evaluation comes on top"
    )


def products(model: nn.Module) -> tuple[int, int]:
    """Floating-point operations of training, for each token in the body and for each supervised one in the head.

    A weight W of n numbers takes 2n in W x and 2n for the gradient of x; only one that trains, 2n for its own.
    """

    def of(weight: Tensor) -> int:
        return weight.numel() * (6 if weight.requires_grad else 4)

    linears = [module for module in model.decoder.modules() if isinstance(module, nn.Linear)]
    return sum(of(linear.weight) for linear in linears), of(model.head)


def memory(model: nn.Module, tokens: int, slots: int, supervised: int) -> float:
    """Bytes at the peak of a step with a micro-batch of so many tokens in R·T slots, in the weights' own precision.

    A weight that trains has a gradient and AdamW's two moments beside it. For the backward pass each layer keeps about
    8C + F numbers a token: the inputs of two LayerNorms; two dropouts' masks, kept as numbers; four more (each linear's
    input, or with adapters on q_proj and v_proj their inputs before and after dropout); and ReLU's result. And 4C
    numbers a slot: q, k, v and attention's result. A chunk's logits exist twice.
    """
    weights = sum(parameter.nbytes for parameter in model.parameters())
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    config, size = model.config, model.head.element_size()
    kept = tokens * (8 * config.hidden_size + config.ffn_dim) + slots * 4 * config.hidden_size
    logits = 2 * min(supervised, CHUNK) * config.vocab_size * size
    return PYTHON + weights + 3 * trained + kept * config.num_hidden_layers * size + logits


def matrix_rate(tokens: int, width: int, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Floating-point operations a second in products of `(tokens, width)` and `(width, width)` matrices, measured.

    Large ones are cut down: where a CPU only emulates bfloat16, a single product could take minutes.
    """
    width = min(width, 1024)
    tokens = max(1, min(tokens, 2**28 // width**2))
    hidden, weight = torch.ones(tokens, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
    F.linear(hidden, weight)  # the first one starts the threads
    done, started = 0, time.perf_counter()
    while not done or time.perf_counter() - started < seconds:
        F.linear(hidden, weight)
        done += 1
    return done * 2 * tokens * width**2 / (time.perf_counter() - started)


def duration(seconds: float) -> str:
    """In the largest unit of which there are two."""
    for unit, name in ((DAY, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f}".removesuffix(".0") + f" {name}"
    return f"{max(1, round(seconds))} s"
