"""A decode step, which a GPU records as a CUDA graph and then replays.

A step starts hundreds of small kernels, and a GPU finishes each sooner than Python starts the next one. A graph starts
all of them with one call. It repeats the same kernels on the same memory, so every slot of the cache takes part, in use
or not, and every row is as long as there is room; a mask hides what is not there. When the cache has grown, the step is
recorded anew.
"""

import torch
from torch import Tensor

from minift.cache import DecodeStep, KVCache, Recording
from minift.model import OPT


def decode(model: OPT, cache: KVCache, newest: list[int]) -> Tensor:
    """Return float32 logits `(R, V)` of the next token of each row in the cache, which lacks the rows' newest tokens.

    Afterwards the cache has them.
    """
    prompt_lengths = [length for length in cache.prompt_lengths for _ in range(cache.rows_per_prompt)]
    inputs = torch.tensor([newest, prompt_lengths, cache.new_lengths])  # (3, R)
    longest = max(cache.new_lengths) + 1
    if can_record(model.head) and longest <= cache.room[1]:
        if cache.recording is None or cache.recording.room != cache.room:
            cache.recording = record(model, cache)
        cache.recording.inputs[:, : len(newest)] = inputs
        cache.recording.graph.replay()
        logits = cache.recording.logits[: len(newest)]
    else:  # on a GPU this happens only when the cache must grow
        logits = decode_step(model, cache, inputs.to(model.head.device), (max(prompt_lengths), longest))
    cache.new_lengths = [length + 1 for length in cache.new_lengths]
    return logits


def decode_step(model: OPT, cache: KVCache, inputs: Tensor, room: tuple[int, int]) -> Tensor:
    """Compute the logits `(R, V)` of rows with inputs `(3, R)`: newest id, length of the prompt, number of new tokens.

    `room` is the number of prompt tokens and of new tokens that attention looks at in every row.
    """
    newest, prompt_lengths, new_lengths = inputs
    step = DecodeStep(cache, prompt_lengths, new_lengths, *room)
    rows = torch.arange(len(newest))[:, None]  # row r is token r
    return model.logits(model(newest, step.positions, rows, step)).float()


def can_record(weight: Tensor) -> bool:
    """Return whether the decode steps of a model with this weight can be recorded: on CUDA, if it is not sharded."""
    return weight.is_cuda and not hasattr(weight, "to_local") and not torch.is_autocast_enabled("cuda")


def record(model: OPT, cache: KVCache) -> Recording:
    """Record a decode step of all slots of the cache, as it is now; nothing is computed yet."""
    inputs = torch.zeros(3, cache.num_prompts * cache.rows_per_prompt, dtype=torch.long, device=model.head.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = decode_step(model, cache, inputs, cache.room)
    return Recording(graph, inputs, logits, cache.room)
