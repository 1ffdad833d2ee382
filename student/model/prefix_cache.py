"""The prefix cache of drafting: keys and values of clean tokens, in pages of one pool that is allocated once.

Exact because clean tokens attend causally to clean tokens only (`attention.AnchoredLayout`): nothing that follows a
prefix changes its keys and values. A request is known by its slot, any number, and holds as many pages of `PAGE` tokens
as its prefix and block need; so a token costs 2 x layers x n_kv_heads x head_dim numbers, and at most a page is
wasted. Lengths and pages are kept on the host, which decides what stays cached, so that a step never waits for the
device. This file is copied beside exported weights and imports nothing of this project.

Legend: B requests, C new clean tokens, G block length, N tokens of a forward (each request's clean tokens, then its
block), L tokens of its longest row, M pages of the longest request, T = M x PAGE keys attended to, P pages of the
pool, K key and value heads, E head width.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .configuration_llada import LladaConfig

PAGE = 16
"""Tokens: a row of a mask over whole pages is aligned for every attention kernel."""


def page_bytes(config: LladaConfig, dtype: torch.dtype, kv_heads: int | None = None) -> int:
    """Of a page over all layers; `kv_heads` are those of this rank."""
    return 2 * config.n_layers * (kv_heads or config.n_kv_heads) * config.head_dim * dtype.itemsize * PAGE


def pages_for(tokens: int) -> int:
    """How many pages so many tokens take."""
    return -(-tokens // PAGE)


class PrefixCache:
    """The pool, and which pages hold which request's keys and values.

    Args:
        pages: of the pool; allocated here, whole.
        kv_heads: of this rank, where tensor parallelism shares them out.
    """

    def __init__(
        self,
        config: LladaConfig,
        pages: int,
        dtype: torch.dtype,
        device: torch.device | str,
        kv_heads: int | None = None,
    ) -> None:
        shape = (pages * PAGE, 2, kv_heads or config.n_kv_heads, config.head_dim)
        # Zeros, not empty: what lies beyond a prefix is masked, but a NaN there would come through.
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
        self.pages = pages
        self._free = list(range(pages))  # a heap: low pages first, so that a lone request's follow one another
        self._held: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}

    @classmethod
    def allocate(
        cls, config: LladaConfig, slots: int, capacity: int, dtype: torch.dtype, device: torch.device | str
    ) -> PrefixCache:
        """An empty cache with room for `slots` requests of `capacity` tokens each, the drafted block included."""
        return cls(config, slots * pages_for(capacity), dtype, device)

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def length(self, slot: int) -> int:
        """Cached tokens of a request; 0 if it is unknown."""
        return self._lengths.get(slot, 0)

    def held_pages(self, slot: int) -> int:
        return len(self._held.get(slot, ()))

    def truncate(self, slot: int, length: int) -> None:
        """Forget what lies beyond `length`; the pages stay with the request."""
        assert 0 <= length <= self.length(slot), "it can only become shorter"
        self._lengths[slot] = length

    def trim(self, slot: int, pages: int) -> None:
        """Give back what a request holds beyond so many pages."""
        held = self._held.get(slot, [])
        for page in held[pages:]:
            heapq.heappush(self._free, page)
        del held[pages:]

    def release(self, slot: int) -> None:
        """Forget a request and give its pages back; an unknown one is ignored."""
        for page in self._held.pop(slot, ()):
            heapq.heappush(self._free, page)
        self._lengths.pop(slot, None)

    def begin(
        self, slots: Sequence[int], clean_lengths: Sequence[int], block_length: int, max_length: int
    ) -> DraftStep:
        """Take the pages that one draft forward needs, and say where its tokens go and what they see.

        Args:
            slots: B different ones. clean_lengths: how many clean tokens each appends. max_length: the model's own.

        Raises:
            ValueError: if the tokens do not fit; then nothing is changed.
        """
        assert len(set(slots)) == len(slots) == len(clean_lengths)
        prior = np.array([self.length(slot) for slot in slots], np.int64)
        clean = np.array(clean_lengths, np.int64)
        tokens = prior + clean + block_length
        missing = [max(pages_for(int(n)) - self.held_pages(slot), 0) for slot, n in zip(slots, tokens, strict=True)]
        if tokens.max() > max_length:
            raise ValueError(
                f"a prefix of {tokens.max() - block_length} tokens and a block of {block_length} exceed the model's "
                f"max_sequence_length {max_length}: drop the request"
            )
        if sum(missing) > self.free_pages:
            raise ValueError(
                f"prefixes and blocks of {tokens.tolist()} tokens need {sum(missing)} more pages of {PAGE} tokens, and "
                f"{self.free_pages} of {self.pages} are free: release requests, or allocate a larger cache"
            )
        for slot, count in zip(slots, missing, strict=True):
            self._held.setdefault(slot, []).extend(heapq.heappop(self._free) for _ in range(count))
        pages = [self._held[slot][: pages_for(int(n))] for slot, n in zip(slots, tokens, strict=True)]
        return DraftStep(self, list(slots), prior, clean, block_length, pages)

    def commit(self, step: DraftStep) -> None:
        """Count the step's clean tokens as cached; its block is forgotten."""
        for slot, length in zip(step.slots, (step.prior + step.clean).tolist(), strict=True):
            self._lengths[slot] = length


class DraftStep:
    """One draft forward over the cache, planned on the host; one copy brings it to the device.

    A key's place in its request's pages is its position, for the block too: it is written beyond the prefix, attended
    to, and overwritten by what comes next. So a query at position p sees the keys up to p if it is clean, and up to the
    end of the block if it is in the block.

    Attributes:
        positions_N: of every token. last_seen_N: position of the last key that it sees.
        places_N: where its keys and values go in the pool.
        pages_BM: of every request; the shorter ones are filled up with pages that their mask leaves out.
        padded_BL: which of the N tokens a padded row holds; the padding repeats the row's last.
        unpadded_N: where the N tokens are in the padded rows, as B x L flattened.
        block_BG: which of the N tokens are blocks.
    """

    def __init__(
        self,
        cache: PrefixCache,
        slots: list[int],
        prior: NDArray[np.int64],
        clean: NDArray[np.int64],
        block_length: int,
        pages: list[list[int]],
    ) -> None:
        self.cache, self.slots, self.prior, self.clean = cache, slots, prior, clean
        batch = len(slots)
        rows = clean + block_length
        starts_B = np.cumsum(rows) - rows
        longest, most_pages = int(rows.max()), max(map(len, pages))
        self.is_ragged = bool((rows != longest).any())
        row_N = np.repeat(np.arange(batch), rows)
        column_N = np.arange(len(row_N)) - starts_B[row_N]
        positions_N = prior[row_N] + column_N
        last_seen_N = np.where(column_N < clean[row_N], positions_N, (prior + rows - 1)[row_N])
        table_BM = np.zeros((batch, most_pages), np.int64)
        for row, held in enumerate(pages):
            table_BM[row, : len(held)] = held
        places_N = table_BM[row_N, positions_N // PAGE] * PAGE + positions_N % PAGE
        padded_BL = starts_B[:, None] + np.minimum(np.arange(longest), rows[:, None] - 1)
        unpadded_N = row_N * longest + column_N
        block_BG = (starts_B + clean)[:, None] + np.arange(block_length)
        parts = [positions_N, last_seen_N, places_N, table_BM, padded_BL, unpadded_N, block_BG]
        device = cache.layers[0].device
        packed = torch.from_numpy(np.concatenate([part.ravel() for part in parts])).to(device, non_blocking=True)
        split = packed.split([part.size for part in parts])
        self.positions_N, self.last_seen_N, self.places_N, pages_BM, padded, self.unpadded_N, block = split
        self.pages_BM, self.padded_BL = pages_BM.view(batch, -1), padded.view(batch, -1)
        self.block_BG = block.view(batch, -1)
        first = pages[0][0] if batch == 1 and pages[0] else 0
        self._run = first * PAGE if batch == 1 and pages[0] == list(range(first, first + most_pages)) else None

    def mask_BxLxT(self) -> Tensor:
        """bool: whether the query sees the key."""
        keys = torch.arange(self.pages_BM.shape[1] * PAGE, device=self.positions_N.device)
        return keys <= self.last_seen_N[self.padded_BL][..., None]

    def write(self, layer: int, kv_Nx2xKxE: Tensor) -> None:
        """Put the tokens' new keys (0) and values (1) of a layer into the pool."""
        stored = self.cache.layers[layer]
        stored.index_copy_(0, self.places_N, kv_Nx2xKxE.to(stored.dtype))

    def read(self, layer: int) -> Tensor:
        """BxTx2xKxE: all keys (0) and values (1) that the queries may see; a view for one request's run of pages."""
        stored, (batch, pages) = self.cache.layers[layer], self.pages_BM.shape
        if self._run is not None:
            return stored[self._run : self._run + pages * PAGE][None]
        paged = stored.view(-1, PAGE * stored[0].numel())
        return paged.index_select(0, self.pages_BM.flatten()).view(batch, pages * PAGE, *stored.shape[1:])

    def extend(self, layer: int, k_BxKxLxE: Tensor, v_BxKxLxE: Tensor) -> tuple[Tensor, Tensor]:
        """`write` and `read` for the plain forward, whose rows are padded: BxKxTxE each."""
        kv_BxLx2xKxE = torch.stack((k_BxKxLxE, v_BxKxLxE), dim=1).permute(0, 3, 1, 2, 4)
        self.write(layer, kv_BxLx2xKxE.flatten(0, 1)[self.unpadded_N])
        k_BxTxKxE, v_BxTxKxE = self.read(layer).to(k_BxKxLxE.dtype).unbind(2)
        return k_BxTxKxE.transpose(1, 2), v_BxTxKxE.transpose(1, 2)
