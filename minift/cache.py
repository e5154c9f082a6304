"""The keys and values of the tokens so far, and which of them each row sees.

A prompt has a slot, with a column for each token. Its rows (one, or the beams of a search) share the slot, and each row
sees only the tokens that it consists of. The slot of prompt "A B" with two rows:

    slot          A B c d
    row 0 sees    A B c
    row 1 sees    A B   d

    reorder([1, 1])          both rows now continue row 1; nobody sees c any more, so its column is free

    slot          A B e d f    the next tokens, e and f: one takes c's column, the other a new one
    row 0 sees    A B e d
    row 1 sees    A B   d f

The order of columns means nothing to attention: a token's position is part of its embedding.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minift.rows import MAX_GROUPS

MIN_ROOM = 64  # columns by which the slots grow at once; 1 or more
MIN_DIVIDED = 16  # from this many slots on, attention has two groups


class Group(NamedTuple):
    """The slots `start` to `end` - 1, and how many columns attention looks at in each of them."""

    start: int
    end: int
    width: int  # S

    def fits(self, recorded: "Group") -> bool:
        """Return whether a step that was recorded for another group of these slots looks at enough columns."""
        return self.width <= recorded.width


class Recording(NamedTuple):
    """A decode step as a CUDA graph, with the memory that it reads and writes each time; see replay.py."""

    graph: torch.cuda.CUDAGraph
    logits: Tensor  # (R, V)
    inputs: Tensor  # (3, R)
    is_seen: Tensor  # (slots, rows of each, room)
    groups: list[Group]  # of all slots


class KVCache:
    """Keys and values of all tokens of each row but its newest.

    Slots 0 to `len(positions)` - 1 are in use. The others, and columns that no row sees, may hold values of rows that
    have left.
    """

    recording: Recording | None = None

    def __init__(self, num_prompts: int, rows_per_prompt: int = 1) -> None:
        self.num_prompts, self.rows_per_prompt = num_prompts, rows_per_prompt
        self.positions: list[int] = []  # of the newest token, in each slot in use; its rows are equally long
        self.is_seen = torch.zeros(num_prompts, rows_per_prompt, 0, dtype=torch.bool)  # (slots, rows of each, room)
        self.layers: list[Tensor] = []  # keys and values of each: (2, slots, H, room, D)

    def enter(self, lengths: list[int]) -> None:
        """Put prompts of these lengths in use, whose keys and values have been stored in the next free slots."""
        for slot, length in enumerate(lengths, len(self.positions)):
            self.is_seen[slot] = torch.arange(self.room) < length
        self.positions += lengths

    @property
    def room(self) -> int:
        """Return the number of columns."""
        return self.is_seen.shape[2]

    def reorder(self, parents: list[int]) -> None:
        """Let row r continue row `parents[r]`, for all r at once; other slots become free.

        The rows of a slot must have parents in one slot.
        """
        slots = [parent // self.rows_per_prompt for parent in parents[:: self.rows_per_prompt]]
        moves = [(slot, origin) for slot, origin in enumerate(slots) if slot != origin]
        if moves:
            targets, origins = torch.tensor(moves, device=self.layers[0].device).T
            widths = self.widths()
            width = max(widths[origin] for _, origin in moves)
            for layer in self.layers:  # the right side is a copy, made before a slot is written
                layer[:, targets, :, :width] = layer[:, origins, :, :width]
        self.is_seen[: len(slots)] = self.is_seen.flatten(0, 1)[parents].unflatten(0, (-1, self.rows_per_prompt))
        self.positions = [self.positions[slot] for slot in slots]

    def widths(self) -> list[int]:
        """Return the number of columns of each slot in use up to the last one that a row sees."""
        columns = torch.arange(1, self.room + 1)
        return (self.is_seen[: len(self.positions)].any(1) * columns).amax(1).tolist()

    def choose_columns(self) -> Tensor:
        """Return the columns `(slots in use, rows of each)` for the rows' newest tokens, which the rows now see."""
        num_slots, per_prompt = len(self.positions), self.rows_per_prompt
        num_used = self.is_seen[:num_slots].any(1).sum(1).max()
        self.make_room(int(num_used) + per_prompt)
        is_used = self.is_seen[:num_slots].any(1)  # (slots in use, room)
        free = torch.arange(self.room).masked_fill(is_used, self.room)
        columns = free.topk(per_prompt, largest=False).values  # the first free ones
        self.is_seen[:num_slots].scatter_(2, columns[:, :, None], True)
        return columns

    def make_room(self, width: int) -> None:
        """Give the slots at least `width` columns; if they have fewer, some more at once."""
        if self.room >= width:
            return
        self.recording = None  # it reads the old memory
        new = aligned(width + MIN_ROOM) - self.room
        self.is_seen = F.pad(self.is_seen, (0, new))
        # Zeros: a NaN in memory without values would spread even where it is masked.
        for index, layer in enumerate(self.layers):  # one at a time: the old memory is free before the next is taken
            self.layers[index] = F.pad(layer, (0, 0, 0, new))

    def groups(self, num_slots: int) -> list[Group]:
        """Return how attention divides the first slots in a decode step, so that it reads few columns that nobody sees.

        Prompts enter sorted, so the first eighth has the longest ones: it is a group.
        """
        starts = [0, num_slots // 8] if num_slots >= MIN_DIVIDED else [0]
        widths = self.widths()
        return [Group(start, end, max(widths[start:end], default=0)) for start, end in pairwise([*starts, num_slots])]

    def groups_with_room(self) -> list[Group]:
        """Return the groups of all slots, each with columns for the next steps too."""
        return [
            group._replace(width=min(aligned(group.width + MIN_ROOM - 1), self.room))
            for group in self.groups(self.num_prompts)
        ]


def aligned(width: int) -> int:
    """Round up to a multiple of 8: on a GPU the masks of attention must be that wide, or each layer copies them."""
    return -(-width // 8) * 8


class Prefill:
    """A `model.Cache` for a forward pass of whole prompts, longest first: it stores them in free slots."""

    max_groups = MAX_GROUPS

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.slots: dict[int, int] = {}  # for each layer, where its next group goes

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store keys and values `(slots, H, T, D)` of a group; return causal attention among these tokens."""
        cache, width = self.cache, key.shape[2]
        first = self.slots.get(layer, len(cache.positions))
        self.slots[layer] = first + len(key)
        cache.make_room(width)  # the first group has the longest prompts
        if layer == len(cache.layers):
            cache.layers.append(key.new_zeros(2, cache.num_prompts, key.shape[1], cache.room, key.shape[3]))
        for part, new in zip(cache.layers[layer], (key, value), strict=True):
            part[first : first + len(new), :, :width] = new
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


class DecodeStep:
    """A `model.Cache` for a forward pass of one token per row: it stores them, and each row attends to what it sees."""

    max_groups = 1

    def __init__(self, cache: KVCache, columns: Tensor, is_seen: Tensor, groups: list[Group]) -> None:
        """Take the tokens' columns `(slots, B)`, what B rows see `(slots, B, room)`, and how attention is divided."""
        self.cache, self.groups, self.columns = cache, groups, columns
        self.slots = torch.arange(len(columns), device=columns.device)[:, None]
        self.masks = [self._mask(is_seen[group.start : group.end, :, : group.width]) for group in groups]

    def _mask(self, is_seen: Tensor) -> Tensor:
        """Return what is added to a group's scores, `(slots, 1, B, S)`: 0 where something is seen, else -inf."""
        mask = torch.zeros(is_seen.shape, dtype=self.cache.layers[0].dtype, device=is_seen.device)
        return mask.masked_fill_(~is_seen, -torch.inf)[:, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store keys and values `(slots, H, B, D)`; return each row's attention to the tokens that it sees."""
        for part, new in zip(self.cache.layers[layer], (key, value), strict=True):
            part[self.slots, :, self.columns] = new.transpose(1, 2)  # (slots, B, H, D)
        mixed = []
        for group, mask in zip(self.groups, self.masks, strict=True):
            keys, values = self.cache.layers[layer][:, group.start : group.end, :, : group.width]  # (slots, H, S, D)
            mixed.append(F.scaled_dot_product_attention(query[group.start : group.end], keys, values, attn_mask=mask))
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)  # (slots, H, B, D)
