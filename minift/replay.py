"""A decode step, which a GPU records as a CUDA graph and then replays.

A step starts hundreds of small kernels, and a GPU finishes each sooner than Python starts the next one. A graph starts
all of them with one call. It repeats the same kernels on the same memory, so every slot of the cache takes part, in use
or not, and every row of a group is as long as there is room; a mask hides what is not there. When the rows have become
longer than that, the step is recorded anew.
"""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minift.cache import DecodeStep, Group, KVCache, Recording
from minift.model import OPT
from minift.packed import is_on_gpu

_run_before: set[object] = set()  # the shapes of the weights and rows of steps that have run in this process


def decode(model: OPT, cache: KVCache, newest: list[int]) -> Tensor:
    """Return float32 logits `(R, V)` of the next token of each row in the cache, which lacks the rows' newest tokens.

    Afterwards the cache has them.
    """
    shared_lengths = [length for length in cache.shared_lengths for _ in range(cache.rows_per_prompt)]
    inputs = torch.tensor([newest, shared_lengths, cache.own_lengths])  # (3, R)
    cache.reserve()
    if can_record(model.head):
        logits = replay(model, cache, inputs)
    else:
        logits = decode_step(model, cache, inputs.to(model.head.device), cache.groups(len(cache.shared_lengths)))
    cache.own_lengths = [length + 1 for length in cache.own_lengths]
    return logits


def decode_step(model: OPT, cache: KVCache, inputs: Tensor, groups: list[Group]) -> Tensor:
    """Compute the logits `(R, V)` of rows with inputs `(3, R)`: newest id, number of shared and of own tokens.

    Attention looks at as many tokens of a row as its group says.
    """
    newest, shared_lengths, own_lengths = inputs
    step = DecodeStep(cache, shared_lengths, own_lengths, groups)
    rows = torch.arange(len(newest))[:, None]  # row r is token r
    return model.logits(model(newest, step.positions, rows, step)).float()


def can_record(weight: Tensor) -> bool:
    """Return whether the decode steps of a model with this weight can be recorded: on CUDA, if it is not sharded."""
    return is_on_gpu(weight) and not torch.is_autocast_enabled("cuda")


def replay(model: OPT, cache: KVCache, inputs: Tensor) -> Tensor:
    """Compute the logits like `decode_step` by a recorded step, which is recorded first if there is none for them."""
    num_rows, recording = inputs.shape[1], cache.recording
    if recording is None or not all(map(Group.fits, cache.groups(cache.num_prompts), recording.groups)):
        cache.recording = None  # its memory is free before the next one needs as much
        cache.recording = recording = record(model, cache, inputs)
    recording.inputs[:, :num_rows] = inputs
    recording.graph.replay()
    return recording.logits[:num_rows]


def record(model: OPT, cache: KVCache, inputs: Tensor) -> Recording:
    """Record a decode step of all slots of the cache, whose rows have room to grow."""
    groups = cache.groups_with_room()
    static = torch.zeros(3, groups[-1].end, dtype=torch.long, device=model.head.device)
    static[:, : inputs.shape[1]] = inputs
    shapes = (static.shape, *((weight.shape, weight.dtype, weight.device) for weight in model.parameters()))
    # Libraries set themselves up in a first step. They may not do so while a graph is recorded, so cuDNN's attention,
    # which makes a plan for each new shape, is not used.
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        if shapes not in _run_before:
            decode_step(model, cache, static, groups)
            _run_before.add(shapes)
        graph, logits = capture(model, cache, static, groups)
    return Recording(graph, logits, static, groups)


def capture(model: OPT, cache: KVCache, inputs: Tensor, groups: list[Group]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Return a decode step as a graph, and the logits that it will compute; nothing is computed yet."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = decode_step(model, cache, inputs, groups)
    return graph, logits
