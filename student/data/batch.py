"""Packed rows as the tensors of one forward, with the sparse targets of their supervised positions.

Legend: B rows, L tokens of a row, N supervised positions over the whole micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
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
        documents: clean and masked tokens of each document, row after row; the padding of a row is its last, clean.
        tokens: tokens that are not padding.
        target_count: this micro-batch's part of what the step's loss is divided by.
        sample_ids: of the samples in it, row after row.
    """

    input_ids: Tensor
    position_ids: Tensor
    block_ids: Tensor
    document_ids: Tensor
    supervised: Tensor
    targets: TargetBatch
    documents: list[list[tuple[int, int]]]
    tokens: int
    target_count: int
    sample_ids: list[str]

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch on `device`; the copies do not wait where the memory is pinned."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> MicroBatch:
        """The same micro-batch in page-locked memory; PyTorch's data loader calls this."""
        return self._with(torch.Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> MicroBatch:
        own: dict[str, Any] = {
            f.name: change(value) for f in fields(self) if torch.is_tensor(value := getattr(self, f.name))
        }
        return replace(self, **own, targets=self.targets.changed(change))


LaidOut = tuple[AlignedSample, BlockRow]


def collate(
    rows: Sequence[Sequence[LaidOut]], *, pad_id: int, row_tokens: int | None = None, depth_decay: float = 1.0
) -> MicroBatch:
    """Put the samples of each row side by side, pad all rows to one length, and gather the targets.

    Args:
        row_tokens: L; null is the longest row.
    """
    used = [sum(len(block_row) for _, block_row in row) for row in rows]
    length = row_tokens or max(used)
    shape = len(rows), length
    input_ids = np.full(shape, pad_id, np.int64)
    position_ids = np.zeros(shape, np.int64)
    block_ids = np.zeros(shape, np.int64)
    document_ids = np.full(shape, PADDING_DOCUMENT, np.int64)
    supervised, blocks, next_block = [], [], 0
    documents = [[block_row.clean_and_masked for _, block_row in row] for row in rows]
    for number, row in enumerate(rows):
        start = 0
        for document, (_, block_row) in enumerate(row):
            own = number, slice(start, start + len(block_row))
            input_ids[own], position_ids[own] = block_row.input_ids, block_row.position_ids
            block_ids[own], document_ids[own] = block_row.block_ids, document
            supervised.append(number * length + start + block_row.supervised)
            blocks.append(np.where(block_row.block < 0, -1, next_block + block_row.block))
            next_block += int(block_row.block_ids.max(initial=0))
            start += len(block_row)
    for of_row, tokens in zip(documents, used, strict=True):
        if tokens < length:
            of_row.append((length - tokens, 0))
    laid_out = [pair for row in rows for pair in row]
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        block_ids=torch.from_numpy(block_ids),
        document_ids=torch.from_numpy(document_ids),
        supervised=_joined(supervised, np.int64),
        targets=_target_batch(laid_out, _joined(blocks, np.int64), depth_decay),
        documents=documents,
        tokens=sum(used),
        target_count=sum(block_row.count for _, block_row in laid_out),
        sample_ids=[sample.sample_id for sample, _ in laid_out],
    )


def _target_batch(laid_out: Sequence[LaidOut], block: Tensor, depth_decay: float) -> TargetBatch:
    chosen = [
        take_positions(s.targets, r.response_positions) if r.sees_left_only else SparseTargets.none(len(r.depth))
        for s, r in laid_out
    ]
    depth = _joined([r.depth for _, r in laid_out], np.int64)
    weight = _joined([np.full(len(r.depth), r.weight) for _, r in laid_out], np.float32)
    tail = _joined([t.tail for t in chosen], np.float32)
    return TargetBatch(
        observed_ids=_joined([r.observed_ids for _, r in laid_out], np.int64),
        observed_logprob=_joined([_observed_logprob(s, r) for s, r in laid_out], np.float32),
        depth=depth,
        block=block,
        weight=weight * depth_weights(depth, depth_decay),
        has_soft=~tail.isnan(),
        event_offsets=_joined_offsets([t.event_offsets for t in chosen]),
        event_mass=_joined([t.event_mass for t in chosen], np.float32),
        member_offsets=_joined_offsets([t.member_offsets for t in chosen]),
        members=_joined([t.members for t in chosen], np.int64),
        tail=tail,
        known=_joined([t.known for t in chosen], np.float32),
    )


def _observed_logprob(sample: AlignedSample, row: BlockRow) -> NDArray[np.float32]:
    if not row.sees_left_only:
        return np.full(len(row.depth), np.nan, np.float32)
    # At its anchor a block knows that the teacher's token before it has ended; deeper it does not.
    anchor, deeper = (a[row.response_positions] for a in (sample.anchor_logprob, sample.observed_logprob))
    return np.where(row.depth == 1, anchor, deeper)


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


def _joined(parts: Sequence[NDArray[Any]], dtype: type) -> Tensor:
    return torch.from_numpy(np.concatenate([*parts, np.empty(0, dtype)]).astype(dtype))


def _joined_offsets(parts: Sequence[NDArray[np.int64]]) -> Tensor:
    lengths = _joined([np.diff(part) for part in parts], np.int64)
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
