"""A decode step, which a GPU records as a CUDA graph and then replays.

A step starts hundreds of small kernels, and a GPU finishes each sooner than Python starts the next one. A graph starts
all of them with one call. It repeats the same kernels on the same memory, so every slot of the cache takes part, in use
or not, and attention reads a fixed number of columns of each; a mask hides what a row does not see. When more columns
are needed, the step is recorded anew.
"""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minift.cache import DecodeStep, Group, KVCache, Recording
from minift.model import OPT
from minift.prepacked import is_on_gpu

_run_before: set[object] = set()  # the shapes of the weights and rows of steps that have run in this process


def decode(model: OPT, cache: KVCache, newest: list[int]) -> Tensor:
    """Return float32 logits `(R, V)` of the next token of each row in the cache, which lacks the rows' newest tokens.

    Afterwards the cache has them.
    """
    columns = cache.choose_columns().flatten()  # (R,)
    positions = torch.tensor(cache.positions).repeat_interleave(cache.rows_per_prompt)
    inputs = torch.stack((torch.tensor(newest), positions, columns))  # (3, R)
    cache.positions = [position + 1 for position in cache.positions]
    if can_record(model.head):
        return replay(model, cache, inputs)
    device, num_slots = model.head.device, len(cache.positions)
    is_seen = cache.is_seen[:num_slots]
    return decode_step(model, cache, inputs.to(device), is_seen.to(device), cache.groups(num_slots))


def decode_step(model: OPT, cache: KVCache, inputs: Tensor, is_seen: Tensor, groups: list[Group]) -> Tensor:
    """Compute the logits `(R, V)` of rows with inputs `(3, R)`: newest id, its position, and its column in the cache.

    `is_seen (slots, rows of each, room)` says which columns a row sees, and the groups, how many attention reads.
    """
    newest, positions, columns = inputs
    step = DecodeStep(cache, columns.view(-1, cache.rows_per_prompt), is_seen, groups)
    rows = torch.arange(len(newest)).view(
        -1, cache.rows_per_prompt
    )  # in attention a slot is one row, of the rows' newest tokens
    return model.logits(model(newest, positions, rows, step)).float()


def can_record(weight: Tensor) -> bool:
    """Return whether the decode steps of a model with this weight can be recorded: on CUDA, whole, no autocast."""
    return is_on_gpu(weight) and not torch.is_autocast_enabled("cuda")


def replay(model: OPT, cache: KVCache, inputs: Tensor) -> Tensor:
    """Compute the logits like `decode_step` by a recorded step, which is recorded first if there is none for them."""
    num_rows, num_slots, recording = inputs.shape[1], len(cache.positions), cache.recording
    if recording is None or not all(map(Group.fits, cache.groups(cache.num_prompts), recording.groups)):
        cache.recording = None  # its memory is free before the next one needs as much
        cache.recording = recording = record(model, cache, inputs)
    recording.inputs[:, :num_rows] = inputs
    recording.is_seen[:num_slots] = cache.is_seen[:num_slots]
    recording.graph.replay()
    return recording.logits[:num_rows]


def record(model: OPT, cache: KVCache, inputs: Tensor) -> Recording:
    """Record a decode step of all slots of the cache, whose rows have room to grow."""
    groups, device = cache.groups_with_room(), model.head.device
    static = torch.zeros(3, cache.num_prompts * cache.rows_per_prompt, dtype=torch.long, device=device)
    static[:, : inputs.shape[1]] = inputs
    is_seen = torch.ones(cache.is_seen.shape, dtype=torch.bool, device=device)  # a row that sees nothing would be NaN
    shapes = (static.shape, *((weight.shape, weight.dtype, weight.device) for weight in model.parameters()))
    # Libraries set themselves up in a first step. They may not do so while a graph is recorded, so cuDNN's attention,
    # which makes a plan for each new shape, is not used.
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        if shapes not in _run_before:
            decode_step(model, cache, static, is_seen, groups)
            _run_before.add(shapes)
        graph, logits = capture(model, cache, static, is_seen, groups)
    return Recording(graph, logits, static, is_seen, groups)


def capture(
    model: OPT, cache: KVCache, inputs: Tensor, is_seen: Tensor, groups: list[Group]
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Return a decode step as a graph, and the logits that it will compute; nothing is computed yet."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = decode_step(model, cache, inputs, is_seen, groups)
    return graph, logits
