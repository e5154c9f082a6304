"""The keys and values of the tokens so far, in two parts: those of the prompts, and those of each row's new tokens.

The rows that continue one prompt, as the beams of a search do, share its keys and values: they are stored and read
once. Two prompts, "A B" and "C", with two rows each, after a few steps:

    prompts, a slot for each          A B     C ·
    new tokens, a slot for each row   d e     d f     g h     g i
    row 1 attends to                  A B d f
    copy_slots([0, 0, 2, 3])          d e     d e     g h     g i     row 1 now continues row 0
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minift.model import MAX_GROUPS

MIN_ROOM = 32  # tokens of a row for which a buffer has room at first


class Recording(NamedTuple):
    """A decode step as a CUDA graph, with the memory that it reads and writes each time; see replay.py."""

    graph: torch.cuda.CUDAGraph
    inputs: Tensor  # (3, R)
    logits: Tensor  # (R, V)
    room: tuple[int, int]  # of the cache


class KVCache:
    """Keys and values of all tokens of each row but its newest.

    The first slots are in use. Beyond the lengths, slots may hold values of rows that have left.
    """

    recording: Recording | None = None

    def __init__(self, num_prompts: int, rows_per_prompt: int = 1) -> None:
        self.num_prompts, self.rows_per_prompt = num_prompts, rows_per_prompt
        self.prompt_lengths: list[int] = []  # tokens of each prompt in use
        self.new_lengths: list[int] = []  # new tokens of each row in use; rows of one prompt are neighbours
        self.prompts: list[Tensor] = []  # of each layer, keys and values: (2, prompt slots, H, capacity, D)
        self.new: list[Tensor] = []  # the same of the new tokens: (2, row slots, H, capacity, D)

    @property
    def room(self) -> tuple[int, int]:
        """Return for how many tokens of a prompt, and new tokens of a row, the buffers have room."""
        return self.prompts[0].shape[3] if self.prompts else 0, self.new[0].shape[3] if self.new else 0

    def copy_slots(self, parents: list[int]) -> None:
        """Copy row `parents[r]` to row r, for all r at once; other slots become free.

        The parents of rows that share a prompt must share one too.
        """
        prompts = [parent // self.rows_per_prompt for parent in parents[:: self.rows_per_prompt]]
        self.prompt_lengths = _copy(self.prompts, self.prompt_lengths, prompts)
        self.new_lengths = _copy(self.new, self.new_lengths, parents)


def _copy(layers: list[Tensor], lengths: list[int], parents: list[int]) -> list[int]:
    """Copy slot `parents[s]` to slot s, for all s at once; return the new lengths."""
    lengths = [lengths[parent] for parent in parents]
    moves = [(slot, parent) for slot, parent in enumerate(parents) if slot != parent]
    if moves and max(lengths) > 0:
        targets, origins = torch.tensor(moves, device=layers[0].device).T
        for layer in layers:  # the right side is a copy, made before a slot is written
            layer[:, targets, :, : max(lengths)] = layer[:, origins, :, : max(lengths)]
    return lengths


def _room(layers: list[Tensor], layer: int, num_slots: int, new: Tensor, length: int) -> Tensor:
    """Return a layer's buffer `(2, slots, H, capacity, D)`, grown if it has no room for `length` tokens like `new`."""
    if layer == len(layers):
        layers.append(new.new_zeros(2, num_slots, new.shape[1], 0, new.shape[3]))
    capacity = layers[layer].shape[3]
    if capacity < length:
        # Doubling keeps growth cheap. Zeros: a NaN in memory without values would spread even where it is masked.
        layers[layer] = F.pad(layers[layer], (0, 0, 0, max(length, 2 * capacity, MIN_ROOM) - capacity))
    return layers[layer]


class Prefill:
    """A `model.Cache` for a forward pass of whole prompts, longest first: it stores them in free slots."""

    max_groups = MAX_GROUPS

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.slots: dict[int, int] = {}  # for each layer, where its next group goes

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store keys and values `(R, H, T, D)` of a group; return causal attention among these tokens."""
        first, length = self.slots.get(layer, len(self.cache.prompt_lengths)), key.shape[2]
        self.slots[layer] = first + len(key)
        stored = _room(self.cache.prompts, layer, self.cache.num_prompts, key, length)
        for part, new in zip(stored, (key, value), strict=True):
            part[first : first + len(new), :, :length] = new
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


class DecodeStep:
    """A `model.Cache` for a forward pass of one token per row: it appends them to the rows' slots."""

    max_groups = 1

    def __init__(
        self, cache: KVCache, prompt_lengths: Tensor, new_lengths: Tensor, longest_prompt: int, longest: int
    ) -> None:
        """Take lengths `(R,)` without the new token. Attention looks at `longest_prompt` and `longest` tokens a row."""
        self.cache = cache
        self.places, device = new_lengths, new_lengths.device  # (R,) of the newest among a row's new tokens
        self.positions = prompt_lengths + new_lengths  # (R,)
        self.longest_prompt, self.longest = longest_prompt, longest  # S₁, S₂
        is_seen = torch.cat((
            torch.arange(self.longest_prompt, device=device) < prompt_lengths[:, None],
            torch.arange(self.longest, device=device) <= self.places[:, None],
        ), dim=1)  # fmt: skip
        self.mask = torch.zeros(is_seen.shape, device=device).masked_fill(~is_seen, -torch.inf)[:, None, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store keys and values `(R, H, 1, D)`; each row attends to its prompt and to its own new tokens."""
        num_rows, heads, _, width = query.shape
        per_prompt = self.cache.rows_per_prompt
        prompt_keys, prompt_values = self.cache.prompts[layer][:, : num_rows // per_prompt, :, : self.longest_prompt]
        stored = _room(self.cache.new, layer, self.cache.num_prompts * per_prompt, key, self.longest)
        if layer == 0:  # where the newest tokens go, once each row and head; the same in all layers
            heads_of_rows = torch.arange(num_rows * heads, device=query.device).view(num_rows, heads)
            self.cells = (heads_of_rows * stored.shape[3] + self.places[:, None]).flatten()  # (R * H,)
        for part, new in zip(stored, (key, value), strict=True):
            part.view(-1, width).index_copy_(0, self.cells, new.reshape(-1, width))
        keys, values = stored[:, :num_rows, :, : self.longest]  # (R, H, S₂, D)

        def by_prompt(rows: Tensor) -> Tensor:  # (R, H, 1, …) -> (prompts, H, rows of each, …)
            return rows.view(-1, per_prompt, heads, rows.shape[3]).transpose(1, 2)

        def by_row(prompts: Tensor) -> Tensor:  # and back
            return prompts.transpose(1, 2).reshape(num_rows, heads, 1, prompts.shape[3])

        query = query * width**-0.5
        scores = torch.cat((by_row(by_prompt(query) @ prompt_keys.mT), query @ keys.mT), dim=3)  # (R, H, 1, S₁ + S₂)
        weights = (scores + self.mask).softmax(3).to(value.dtype)  # the float32 mask makes the sum at least float32
        to_prompt, to_new = weights.split((self.longest_prompt, self.longest), dim=3)
        return by_row(by_prompt(to_prompt) @ prompt_values) + to_new @ values  # (R, H, 1, D)
