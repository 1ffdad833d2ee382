"""Rows of several samples as the tensors of one forward, with the sparse targets of their supervised positions.

Legend: B rows, L padded length, N supervised positions over the whole micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.dataset.records import offsets_of
from student.alignment.targets import AlignedSample, SparseTargets
from student.data.blocks import BlockRow
from student.losses.targets import TargetBatch, depth_weights

PADDING_DOCUMENT = -1


@dataclass(slots=True)
class MicroBatch:
    """One forward.

    Attributes:
        input_ids, position_ids, block_ids, document_ids: int64 [B, L]; document -1 is padding.
        supervised: int64 [N], indices into the flattened [B * L].
        targets: of the N supervised positions.
        tokens: tokens that are not padding.
        sample_ids: of its samples.
    """

    input_ids: Tensor
    position_ids: Tensor
    block_ids: Tensor
    document_ids: Tensor
    supervised: Tensor
    targets: TargetBatch
    tokens: int
    sample_ids: list[str]

    @property
    def target_count(self) -> int:
        """N, this micro-batch's part of the number that the step's loss is divided by."""
        return len(self.targets.observed_ids)

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch on `device`."""
        return MicroBatch(
            input_ids=self.input_ids.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            block_ids=self.block_ids.to(device, non_blocking=True),
            document_ids=self.document_ids.to(device, non_blocking=True),
            supervised=self.supervised.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            tokens=self.tokens,
            sample_ids=self.sample_ids,
        )


def collate(
    samples: Sequence[AlignedSample], rows: Sequence[BlockRow], *, pad_id: int, depth_decay: float = 1.0
) -> MicroBatch:
    """Pad `rows` to one length and gather the targets of their supervised positions.

    An empty micro-batch becomes one row of one padding token, so that a rank without work stays in step.
    """
    length = max((len(row) for row in rows), default=1)
    shape = (max(len(rows), 1), length)
    input_ids = np.full(shape, pad_id, np.int64)
    position_ids = np.zeros(shape, np.int64)
    block_ids = np.zeros(shape, np.int64)
    document_ids = np.full(shape, PADDING_DOCUMENT, np.int64)
    supervised, blocks, next_block = [], [], 0
    for number, row in enumerate(rows):
        input_ids[number, : len(row)] = row.input_ids
        position_ids[number, : len(row)] = row.position_ids
        block_ids[number, : len(row)] = row.block_ids
        document_ids[number, : len(row)] = 0
        supervised.append(number * length + row.supervised)
        blocks.append(next_block + row.block)
        next_block += int(row.block_ids.max(initial=0))
    depth = _joined([row.depth for row in rows], np.int64)
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        block_ids=torch.from_numpy(block_ids),
        document_ids=torch.from_numpy(document_ids),
        supervised=torch.from_numpy(_joined(supervised, np.int64)),
        targets=_target_batch(samples, rows, depth, _joined(blocks, np.int64), depth_decay),
        tokens=sum(len(row) for row in rows),
        sample_ids=[sample.sample_id for sample in samples],
    )


def _target_batch(
    samples: Sequence[AlignedSample],
    rows: Sequence[BlockRow],
    depth: NDArray[np.int64],
    block: NDArray[np.int64],
    depth_decay: float,
) -> TargetBatch:
    chosen = [take_positions(s.targets, r.response_positions) for s, r in zip(samples, rows, strict=True)]
    observed_ids = [s.input_ids[s.prompt_length + r.response_positions] for s, r in zip(samples, rows, strict=True)]
    # At its anchor a block knows that the teacher's token before it has ended; deeper it does not.
    observed_logprob = [
        np.where(r.depth == 1, s.anchor_logprob[r.response_positions], s.observed_logprob[r.response_positions])
        for s, r in zip(samples, rows, strict=True)
    ]
    tail = _joined([t.tail for t in chosen], np.float32)
    return TargetBatch(
        observed_ids=torch.from_numpy(_joined(observed_ids, np.int64)),
        observed_logprob=torch.from_numpy(_joined(observed_logprob, np.float32)),
        depth=torch.from_numpy(depth),
        block=torch.from_numpy(block),
        weight=depth_weights(torch.from_numpy(depth), depth_decay),
        has_soft=torch.from_numpy(~np.isnan(tail)),
        event_offsets=torch.from_numpy(_joined_offsets([t.event_offsets for t in chosen])),
        event_mass=torch.from_numpy(_joined([t.event_mass for t in chosen], np.float32)),
        member_offsets=torch.from_numpy(_joined_offsets([t.member_offsets for t in chosen])),
        members=torch.from_numpy(_joined([t.members for t in chosen], np.int64)),
        tail=torch.from_numpy(tail),
        known=torch.from_numpy(_joined([t.known for t in chosen], np.float32)),
    )


def take_positions(targets: SparseTargets, positions: NDArray[np.int64]) -> SparseTargets:
    """The targets of `positions` only, in that order; a position may be taken more than once."""
    events, event_offsets = _take_rows(targets.event_offsets, positions)
    members, member_offsets = _take_rows(targets.member_offsets, events)
    return SparseTargets(
        event_offsets=event_offsets,
        event_mass=targets.event_mass[events],
        member_offsets=member_offsets,
        members=targets.members[members],
        tail=targets.tail[positions],
        known=targets.known[positions],
    )


def _take_rows(offsets: NDArray[np.int64], rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Item indices of the CSR `rows`, row after row, and the offsets of the result."""
    starts, lengths = offsets[rows], offsets[rows + 1] - offsets[rows]
    new_offsets = offsets_of(lengths)
    return np.repeat(starts - new_offsets[:-1], lengths) + np.arange(new_offsets[-1]), new_offsets


def _joined(parts: Sequence[NDArray[Any]], dtype: type) -> NDArray[Any]:
    return np.concatenate([*parts, np.empty(0, dtype)]).astype(dtype)


def _joined_offsets(parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    return offsets_of(_joined([np.diff(part) for part in parts], np.int64))
