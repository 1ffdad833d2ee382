"""The prefix cache of drafting: keys and values of clean tokens, one slot a request.

Exact because clean tokens attend causally to clean tokens only (`attention.AnchoredLayout`): nothing that
follows a prefix changes its keys and values. Memory: 2 x layers x slots x capacity x n_kv_heads x head_dim
numbers. The lengths are kept on the host, which decides what stays cached, so that a step never waits for the
device. This file is copied beside exported weights and imports nothing of this project.

Legend: B requests, C new clean tokens, G block length, L = C + G, T keys attended to, S slots, K key and value
heads, E head width, N valid tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .configuration_llada import LladaConfig


@dataclass
class PrefixCache:
    """Keys and values per layer, SxKxTxE, and how many tokens of each slot are valid."""

    keys: list[Tensor]
    values: list[Tensor]
    lengths: Tensor = field(repr=False)
    """int64 [S], on the host."""

    @classmethod
    def allocate(
        cls, config: LladaConfig, slots: int, capacity: int, dtype: torch.dtype, device: torch.device | str
    ) -> PrefixCache:
        """An empty cache of `slots` requests with room for `capacity` tokens each, the drafted block included."""
        shape = (slots, config.n_kv_heads, capacity, config.head_dim)
        # Zeros, not empty: what lies beyond a slot's length is masked, but a NaN there would come through.
        keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
        values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
        return cls(keys, values, torch.zeros(slots, dtype=torch.int64))

    @property
    def slots(self) -> int:
        return len(self.lengths)

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    def grow(self, slots: int, capacity: int) -> None:
        """Make room for at least `slots` requests of `capacity` tokens, layer by layer; what is cached stays."""
        more = [0, 0, 0, max(0, capacity - self.capacity), 0, 0, 0, max(0, slots - self.slots)]
        if any(more):
            for stored in (self.keys, self.values):
                for layer, old in enumerate(stored):
                    stored[layer] = torch.nn.functional.pad(old, more)
            self.lengths = torch.nn.functional.pad(self.lengths, more[-2:])

    def truncate(self, slots: Sequence[int] | Tensor, lengths: Sequence[int] | Tensor) -> None:
        """Forget what lies beyond `lengths` in each of `slots`; 0 frees a slot.

        Raises:
            ValueError: if a slot holds fewer tokens than are to be kept.
        """
        slots = torch.as_tensor(slots, dtype=torch.int64)
        lengths = torch.as_tensor(lengths, dtype=torch.int64)
        if bool((lengths > self.lengths[slots]).any()) or bool((lengths < 0).any()):
            raise ValueError(
                f"cannot truncate slots {slots.tolist()} of {self.lengths[slots].tolist()} tokens "
                f"to {lengths.tolist()}: a slot can only become shorter"
            )
        self.lengths[slots] = lengths

    def begin(self, slots: list[int], clean_lengths: list[int], block_length: int, max_length: int) -> DraftStep:
        """Where the tokens of one draft forward go and what they see.

        Raises:
            ValueError: if the slots are not different slots of this cache, or the tokens do not fit.
        """
        if len(set(slots)) != len(slots) or not all(0 <= slot < self.slots for slot in slots):
            raise ValueError(f"slots {slots} are not different slots of a cache of {self.slots}")
        if len(clean_lengths) != len(slots):
            raise ValueError(f"got {len(clean_lengths)} clean_lengths for {len(slots)} slots")
        prior = self.lengths[slots]
        clean = torch.tensor(clean_lengths, dtype=torch.int64)
        longest = int((prior + clean).max()) + block_length
        if longest > min(self.capacity, max_length):
            raise ValueError(
                f"a prefix of {longest - block_length} tokens and a block of {block_length} exceed the room of "
                f"{min(self.capacity, max_length)} tokens (cache capacity {self.capacity}, max_sequence_length "
                f"{max_length}): allocate a larger cache or drop the request"
            )
        return DraftStep(self, slots, prior, clean, block_length, longest)

    def commit(self, step: DraftStep) -> None:
        """Count the step's clean tokens as cached; its block is forgotten."""
        self.lengths[step.slots] = step.prior + step.clean


class DraftStep:
    """One draft forward over the cache. Token columns are C right-padded clean tokens, then G block tokens.

    A key's index in the cache is its position, for the block too: it is written beyond the prefix, attended to,
    and overwritten by what comes next. So a query at position p sees the keys up to p if it is clean, and up to
    the end of the block if it is in the block.
    """

    def __init__(
        self, cache: PrefixCache, slots: list[int], prior: Tensor, clean: Tensor, block_length: int, longest: int
    ) -> None:
        self.cache, self.slots, self.prior, self.clean = cache, slots, prior, clean
        self.longest = longest
        self.new_length = new = int(clean.max())
        device = cache.keys[0].device
        total = prior + clean
        clean_position = prior[:, None] + torch.arange(new)
        block_position = total[:, None] + torch.arange(block_length)
        position = torch.cat((clean_position, block_position), dim=1)
        valid = torch.cat((torch.arange(new) < clean[:, None], torch.ones_like(block_position, dtype=torch.bool)), 1)
        last_visible = torch.cat((clean_position, (total + block_length - 1)[:, None].expand_as(block_position)), 1)
        mask = torch.arange(longest) <= last_visible[..., None]
        row, column = valid.nonzero(as_tuple=True)
        # Everything is computed on the host; these copies do not wait.
        self.position_ids_BxL = position.to(device, non_blocking=True)
        self.mask_Bx1xLxT = mask[:, None].to(device, non_blocking=True)
        self._row = row.to(device, non_blocking=True)
        self._column = column.to(device, non_blocking=True)
        self._slot = torch.tensor(slots)[row].to(device, non_blocking=True)
        self._position = position[row, column].to(device, non_blocking=True)
        first = slots[0]
        self._contiguous = slots == list(range(first, first + len(slots)))
        self._slots = torch.tensor(slots).to(device, non_blocking=True)

    def extend(self, layer: int, k_BxKxLxE: Tensor, v_BxKxLxE: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values of a layer; return all that the queries may see, BxKxTxE each."""
        return (
            self._write(self.cache.keys[layer], k_BxKxLxE),
            self._write(self.cache.values[layer], v_BxKxLxE),
        )

    def _write(self, stored_SxKxTxE: Tensor, new_BxKxLxE: Tensor) -> Tensor:
        stored_SxKxTxE[self._slot, :, self._position] = new_BxKxLxE[self._row, :, self._column].to(stored_SxKxTxE.dtype)
        if self._contiguous:
            seen = stored_SxKxTxE[self.slots[0] : self.slots[0] + len(self.slots), :, : self.longest]
        else:
            seen = stored_SxKxTxE[:, :, : self.longest].index_select(0, self._slots)
        return seen.to(new_BxKxLxE.dtype)
