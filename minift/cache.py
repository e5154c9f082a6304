"""The keys and values of the tokens so far: those that several rows share, and each row's own.

The rows that continue one prompt, as the beams of a search do, share its keys and values: they are stored and read
once. Two prompts, "A B" and "C", with two rows each, after a few steps:

    shared, a slot for each prompt    A B     C ·
    own, a slot for each row          d e     d f     g h     g i
    row 1 attends to                  A B d f
    copy_slots([0, 0, 2, 3])          d e     d e     g h     g i     row 1 now continues row 0

With one row for each prompt nothing is shared. A row's new tokens follow its prompt:

    own                               A B d e     C g h ·
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minift.model import MAX_GROUPS

MIN_ROOM = 64  # tokens for which a row gets room at once
MIN_DIVIDED = 16  # rows; fewer are one group


class Group(NamedTuple):
    """The rows `start` to `end` - 1, and how many tokens attention looks at in each of them."""

    start: int
    end: int
    shared: int  # S₁
    own: int  # S₂, the newest included

    def fits(self, recorded: "Group") -> bool:
        """Return whether a step that was recorded for another group of these slots looks at enough tokens."""
        return self.shared <= recorded.shared and self.own <= recorded.own


class Recording(NamedTuple):
    """A decode step as a CUDA graph, with the memory that it reads and writes each time; see replay.py."""

    graph: torch.cuda.CUDAGraph
    logits: Tensor  # (R, V)
    inputs: Tensor  # (3, R)
    groups: list[Group]  # of all slots


class KVCache:
    """Keys and values of all tokens of each row but its newest.

    The first slots are in use. Beyond the lengths, slots may hold values of rows that have left.
    """

    recording: Recording | None = None

    def __init__(self, num_prompts: int, rows_per_prompt: int = 1) -> None:
        self.num_prompts, self.rows_per_prompt = num_prompts, rows_per_prompt
        self.shared_lengths: list[int] = []  # tokens that the rows of each prompt in use share
        self.own_lengths: list[int] = []  # the other tokens of each row in use; rows of one prompt are neighbours
        self.shared: list[Tensor] = []  # of each layer, keys and values: (2, prompt slots, H, room, D)
        self.own: list[Tensor] = []  # the same of the rows' own tokens: (2, row slots, H, room, D)

    def enter(self, lengths: list[int]) -> None:
        """Put prompts of these lengths in use, whose keys and values have been stored in the next free slots."""
        is_shared = self.rows_per_prompt > 1
        self.shared_lengths += lengths if is_shared else [0] * len(lengths)
        self.own_lengths += [0] * (len(lengths) * self.rows_per_prompt) if is_shared else lengths

    def copy_slots(self, parents: list[int]) -> None:
        """Copy row `parents[r]` to row r, for all r at once; other slots become free.

        The parents of rows that share a prompt must share one too.
        """
        prompts = [parent // self.rows_per_prompt for parent in parents[:: self.rows_per_prompt]]
        self.shared_lengths = _copy(self.shared, self.shared_lengths, prompts)
        self.own_lengths = _copy(self.own, self.own_lengths, parents)

    def groups(self, num_prompts: int) -> list[Group]:
        """Return how attention divides the rows of the first prompts' slots, so that it pads little in a decode step.

        Prompts enter sorted by length, longest first, so the first eighth is a group. Rows that share prompts are one
        group: there is less to gain.
        """
        num_rows, starts = num_prompts * self.rows_per_prompt, [0]
        if self.rows_per_prompt == 1 and num_rows >= MIN_DIVIDED:
            starts.append(num_rows // 8)
        shared = max(self.shared_lengths, default=0)
        return [
            Group(start, end, shared, max(self.own_lengths[start:end], default=0) + 1)
            for start, end in pairwise([*starts, num_rows])
        ]

    def groups_with_room(self) -> list[Group]:
        """Return the groups of all slots, as wide as they will be in some steps."""
        room = self.own[0].shape[3]
        return [
            group._replace(shared=aligned(group.shared), own=min(aligned(group.own + MIN_ROOM - 1), room))
            for group in self.groups(self.num_prompts)
        ]

    def reserve(self) -> None:
        """Make room for another token of each row, and then for some more."""
        if not self.own:  # all that has been stored is shared
            num_rows = self.num_prompts * self.rows_per_prompt
            self.own = [layer.new_zeros(2, num_rows, layer.shape[2], 0, layer.shape[4]) for layer in self.shared]
        for layer in range(len(self.own)):
            self.grow(self.own, layer, max(self.own_lengths) + 1, MIN_ROOM)

    def grow(self, layers: list[Tensor], layer: int, length: int, spare: int) -> Tensor:
        """Return a layer's buffer; if it has no room for `length` tokens, give it room for `spare` more than these."""
        room = layers[layer].shape[3]
        if room < length:
            self.recording = None  # it reads the old buffer
            # Zeros: a NaN in memory without values would spread even where it is masked.
            layers[layer] = F.pad(layers[layer], (0, 0, 0, aligned(length + spare) - room))
        return layers[layer]


def aligned(length: int) -> int:
    """Round up to a multiple of 8: on a GPU the masks of attention must be that wide, or each layer copies them."""
    return -(-length // 8) * 8


def _copy(layers: list[Tensor], lengths: list[int], parents: list[int]) -> list[int]:
    """Copy slot `parents[s]` to slot s, for all s at once; return the new lengths."""
    lengths = [lengths[parent] for parent in parents]
    moves = [(slot, parent) for slot, parent in enumerate(parents) if slot != parent]
    if moves and max(lengths) > 0:
        targets, origins = torch.tensor(moves, device=layers[0].device).T
        longest = max(lengths[slot] for slot, _ in moves)
        for layer in layers:  # the right side is a copy, made before a slot is written
            layer[:, targets, :, :longest] = layer[:, origins, :, :longest]
    return lengths


class Prefill:
    """A `model.Cache` for a forward pass of whole prompts, longest first: it stores them in free slots."""

    max_groups = MAX_GROUPS

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.slots: dict[int, int] = {}  # for each layer, where its next group goes

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store keys and values `(R, H, T, D)` of a group; return causal attention among these tokens."""
        cache, length = self.cache, key.shape[2]
        first = self.slots.get(layer, len(cache.shared_lengths))
        self.slots[layer] = first + len(key)
        layers, spare = (cache.own, MIN_ROOM) if cache.rows_per_prompt == 1 else (cache.shared, 0)
        if layer == len(layers):
            layers.append(key.new_zeros(2, cache.num_prompts, key.shape[1], 0, key.shape[3]))
        for part, new in zip(cache.grow(layers, layer, length, spare), (key, value), strict=True):
            part[first : first + len(new), :, :length] = new
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


class DecodeStep:
    """A `model.Cache` for a forward pass of one token per row: it appends them to the rows' slots."""

    max_groups = 1

    def __init__(self, cache: KVCache, shared_lengths: Tensor, own_lengths: Tensor, groups: list[Group]) -> None:
        """Take lengths `(R,)` without the new token, and how attention divides the rows."""
        self.cache, self.groups = cache, groups
        self.positions = shared_lengths + own_lengths  # (R,)
        self.slots = torch.arange(len(own_lengths), device=own_lengths.device)  # (R,)
        self.places = own_lengths  # (R,) of the newest tokens in their slots
        self.masks = [
            self._mask(shared_lengths[group.start : group.end], own_lengths[group.start : group.end], group)
            for group in groups
        ]

    def _mask(self, shared_lengths: Tensor, own_lengths: Tensor, group: Group) -> Tensor:
        """Return what is added to the scores of a group's rows, `(R, 1, 1, S₁ + S₂)`: 0, or -inf where nothing is."""
        shared, own = (torch.arange(count, device=own_lengths.device) for count in (group.shared, group.own))
        is_hidden = torch.cat((shared >= shared_lengths[:, None], own > own_lengths[:, None]), dim=1)
        mask = torch.zeros(is_hidden.shape, dtype=self.cache.own[0].dtype, device=own_lengths.device)
        return mask.masked_fill_(is_hidden, -torch.inf)[:, None, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store keys and values `(R, H, 1, D)`; each row attends to what its prompt's rows share and to its own."""
        for part, new in zip(self.cache.own[layer], (key, value), strict=True):
            part[self.slots, :, self.places] = new.squeeze(2)
        mixed = [
            self._mix(layer, query[group.start : group.end], mask, group)
            for group, mask in zip(self.groups, self.masks, strict=True)
        ]
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)  # (R, H, 1, D)

    def _mix(self, layer: int, query: Tensor, mask: Tensor, group: Group) -> Tensor:
        """Return the attention of a group's rows, `(R, H, 1, D)` as `query`."""
        keys, values = self.cache.own[layer][:, group.start : group.end, :, : group.own]  # (R, H, S₂, D)
        per_prompt = self.cache.rows_per_prompt
        if per_prompt == 1:
            return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        num_rows, heads, _, width = query.shape
        prompts = self.cache.shared[layer][:, : num_rows // per_prompt, :, : group.shared]
        shared_keys, shared_values = prompts  # (prompts, H, S₁, D)

        def by_prompt(rows: Tensor) -> Tensor:  # (R, H, 1, …) -> (prompts, H, rows of each, …)
            return rows.view(-1, per_prompt, heads, rows.shape[3]).transpose(1, 2)

        def by_row(prompts: Tensor) -> Tensor:  # and back
            return prompts.transpose(1, 2).reshape(num_rows, heads, 1, prompts.shape[3])

        query = query * width**-0.5
        scores = torch.cat((by_row(by_prompt(query) @ shared_keys.mT), query @ keys.mT), dim=3)  # (R, H, 1, S₁ + S₂)
        to_shared, to_own = (scores + mask).softmax(3).split((group.shared, group.own), dim=3)
        return by_row(by_prompt(to_shared) @ shared_values) + to_own @ values  # (R, H, 1, D)
