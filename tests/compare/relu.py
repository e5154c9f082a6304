"""Inputs of a ReLU that rounding puts on different sides of 0: there two models' gradients differ by a jump."""

import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

NEAR = 1e-5  # the tolerance of float32; other inputs are about 1

# Whether an input is positive, by (prefix, layer, unit), of those nearer 0 than NEAR. The prefix is a hash of a token
# and all tokens before it: that is all that it sees, whatever the batch, the padding and the library.
Sides = Mapping[tuple[int, str, int], bool]


@contextmanager
def watch(model: nn.Module, steps: Sized) -> Iterator[Mapping[int, Sides]]:
    """Yield the sides of an OPT of minift, transformers or peft, by step; `steps` holds the steps that have ended."""
    sides: dict[int, dict[tuple[int, str, int], bool]] = defaultdict(dict)
    tokens: list[list[int]] = []  # the prefixes of a forward pass: all, and those that the last layer computes

    def enter(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = inspect.signature(decoder.forward).bind(*args, **kwargs).arguments
        ids, wanted = given["input_ids"], given.get("wanted")
        rows = given.get("rows")
        rows = torch.arange(ids.numel()).view(ids.shape) if rows is None else rows  # transformers' ids are (R, T)
        prefixes = prefixes_of(ids.flatten().tolist(), rows.tolist())
        tokens[:] = [prefixes, prefixes if wanted is None else [prefixes[token] for token in wanted.tolist()]]

    def note(layer: str, fc1: nn.Module, args: tuple, output: Tensor) -> None:
        inputs = output.detach().flatten(0, -2)  # (N, units)
        prefixes = next(prefixes for prefixes in tokens if len(prefixes) == len(inputs))
        for token, unit in (inputs.abs() < NEAR).nonzero().tolist():
            sides[len(steps)][prefixes[token], layer, unit] = bool(inputs[token, unit] > 0)

    hooks = []
    if model.config.activation_function == "relu":
        for name, module in model.named_modules():
            if name.endswith("decoder"):
                hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            elif name.endswith("fc1"):
                layer = name[name.index("layers.") :]
                hooks.append(module.register_forward_hook(partial(note, layer)))
    try:
        yield sides
    finally:
        for hook in hooks:
            hook.remove()


def prefixes_of(ids: Sequence[int], rows: Sequence[Sequence[int]]) -> list[int]:
    """Return each token's prefix, given the tokens' ids and where the tokens of each row are; -1 is after a row's end.

    >>> first, second = prefixes_of([2, 9, 10], [[0, 1], [0, 2]]), prefixes_of([2, 9, 2, 10], [[0, 1], [2, 3]])
    >>> [first.index(prefix) for prefix in second]
    [0, 1, 0, 2]
    """
    prefixes = [0] * len(ids)
    for row in rows:
        prefix = 0
        for token in row:
            if token >= 0:
                prefix = prefixes[token] = hash((prefix, ids[token]))
    return prefixes


def steps_that_jump(ours: Mapping[int, Sides], theirs: Mapping[int, Sides]) -> list[int]:
    """Return the steps in which the two models have an input of a ReLU on different sides of 0, near it in both."""
    return [
        step
        for step, sides in sorted(ours.items())
        if any(theirs.get(step, {}).get(key, side) != side for key, side in sides.items())
    ]
