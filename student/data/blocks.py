"""Anchored blocks: which masked blocks of a response are drafted in one forward (README.md of this folder).

An anchor is a response position where a block starts. The block's tokens are masked; it sees the clean tokens
before its anchor and nothing to its right, which is what makes the teacher's stored row the right target. Many
anchors share one forward: the row is [clean copy | block 1 | block 2 | …] and the attention layout keeps the
blocks apart. Anchors are a pure function of (seed, epoch, sample id).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from student.alignment.targets import AlignedSample


@dataclass(frozen=True, slots=True)
class BlockRow:
    """One sample laid out for one forward; L = clean tokens + masked tokens.

    Attributes:
        input_ids: int64 [L], the mask id in blocks.
        position_ids: int64 [L], a block continues the positions of the text it stands in.
        block_ids: int64 [L], 0 for the clean copy, b ≥ 1 for block b.
        supervised: int64 [N], indices into L that have a target.
        response_positions: int64 [N], the response token that stands there.
        observed_ids: int64 [N], that token.
        depth: int64 [N], 1 at the anchor; 0 in no block.
        block: int64 [N], 0-based block number; -1 in no block.
        weight: of every target in the sum of the loss.
        count: what the sum is divided by, to be a mean over tokens.
        sees_left_only: nothing right of a target's block is visible to it, so that the teacher's row is its target.
    """

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    block_ids: NDArray[np.int64]
    supervised: NDArray[np.int64]
    response_positions: NDArray[np.int64]
    observed_ids: NDArray[np.int64]
    depth: NDArray[np.int64]
    block: NDArray[np.int64]
    weight: float
    count: int
    sees_left_only: bool

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def clean_and_masked(self) -> tuple[int, int]:
        """Tokens of the clean copy, which stands first, and of the blocks."""
        masked = int(np.count_nonzero(self.block_ids))
        return len(self) - masked, masked

    def at_depth(self, depth: int) -> BlockRow:
        """The same row, supervised at one depth only."""
        kept = self.depth == depth
        return replace(
            self,
            supervised=self.supervised[kept],
            response_positions=self.response_positions[kept],
            observed_ids=self.observed_ids[kept],
            depth=self.depth[kept],
            block=self.block[kept],
        )


def sample_generator(seed: int, epoch: int, sample_id: str) -> np.random.Generator:
    """The generator of a sample in an epoch, the same on any rank of any world."""
    digest = hashlib.sha256(sample_id.encode()).digest()
    return np.random.default_rng([seed, epoch, int.from_bytes(digest[:8], "little")])


def leaves_room(prompt_lengths: NDArray[np.int64], block_length: int, max_sequence_tokens: int) -> NDArray[np.bool_]:
    """bool [n], whether a prompt of so many tokens leaves room for a block; no other is trained or measured."""
    return prompt_lengths + block_length <= max_sequence_tokens


def fitting_anchors(sample: AlignedSample, block_length: int, max_sequence_tokens: int) -> NDArray[np.int64]:
    """The response's anchor positions whose block ends within `max_sequence_tokens`; the first token is always one."""
    anchors = np.flatnonzero(sample.is_anchor)
    return anchors[sample.prompt_length + anchors + block_length <= max_sequence_tokens]


def choose_anchors(candidates: NDArray[np.int64], count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """At most `count` of `candidates`, spread evenly over them from a random start, in rising order.

    Each is chosen with the same probability (systematic sampling). The last one is never far from the end, so that the
    length of the row is known within the distance of two anchors before the sample is read.
    """
    if len(candidates) > count:
        spacing = len(candidates) / count
        candidates = candidates[((generator.random() + np.arange(count)) * spacing).astype(np.int64)]
    return candidates


def lay_out(sample: AlignedSample, anchors: NDArray[np.int64], block_length: int, mask_id: int) -> BlockRow:
    """[clean copy | masked blocks] of one sample.

    Every block has `block_length` masked tokens, as it has when it drafts; those past the response's end have no
    target. The clean copy ends at the last anchor, because nothing sees further.
    """
    response_length = len(sample.byte_ends)
    clean_length = sample.prompt_length + int(anchors[-1])
    depth_offsets = np.arange(block_length)
    response_BxG = anchors[:, None] + depth_offsets
    within = (response_BxG < response_length).ravel()
    blocks = np.repeat(np.arange(len(anchors)), block_length)
    masked, positions = len(blocks), response_BxG.ravel()[within]
    return BlockRow(
        input_ids=np.concatenate([sample.input_ids[:clean_length], np.full(masked, mask_id)]).astype(np.int64),
        position_ids=np.concatenate([np.arange(clean_length), sample.prompt_length + response_BxG.ravel()]),
        block_ids=np.concatenate([np.zeros(clean_length, np.int64), blocks + 1]),
        supervised=clean_length + np.flatnonzero(within),
        response_positions=positions,
        observed_ids=sample.input_ids[sample.prompt_length + positions].astype(np.int64),
        depth=np.tile(depth_offsets + 1, len(anchors))[within],
        block=blocks[within],
        weight=1.0,
        count=len(positions),
        sees_left_only=True,
    )
