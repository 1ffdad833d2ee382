"""The supervised positions of a micro-batch, as the losses take them.

Legend: N supervised positions, E events, M members, V the student's vocabulary. Rows are CSR, exactly as in
`student.alignment.targets.SparseTargets`, with positions gathered over the whole micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from student.alignment.targets import AlignedSample


@dataclass(slots=True)
class TargetBatch:
    """Targets of N supervised positions; positions of one masked block are consecutive and in order.

    Attributes:
        realized_ids: int64 [N], the student token that stands there.
        realized_logprob: float32 [N], the teacher's log p of it; NaN where unknown.
        depth: int64 [N], 1 for the first position of a block; 0 where the position is in no block (random masking).
        block: int64 [N], number of the block in the micro-batch; -1 where the position is in no block.
        weight: float32 [N], multiplies every per-position term (depth weight, 1/p of random masking).
        has_soft: bool [N], the position has a soft target.
        event_offsets: int64 [N + 1]. event_mass: float32 [E]. member_offsets: int64 [E + 1]. members: int64 [M].
        tail: float32 [N]; NaN where there is no soft target.
        known: float32 [N]: the known conditional mass, for logging.
    """

    realized_ids: Tensor
    realized_logprob: Tensor
    depth: Tensor
    block: Tensor
    weight: Tensor
    has_soft: Tensor
    event_offsets: Tensor
    event_mass: Tensor
    member_offsets: Tensor
    members: Tensor
    tail: Tensor
    known: Tensor

    def __len__(self) -> int:
        return self.realized_ids.shape[0]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TargetBatch:
        """The same targets on `device`."""
        return TargetBatch(
            **{f.name: getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)}
        )

    def event_rows(self) -> Tensor:
        """int64 [E], the position of every event."""
        return _rows_of(self.event_offsets, self.event_mass.shape[0])

    def member_events(self) -> Tensor:
        """int64 [M], the event of every member."""
        return _rows_of(self.member_offsets, self.members.shape[0])

    def slice(self, start: int, stop: int, events: slice, members: slice) -> TargetBatch:
        """Positions `start:stop`, whose events and members the caller has looked up (one host sync for all slices)."""
        rows = slice(start, stop)
        return TargetBatch(
            realized_ids=self.realized_ids[rows],
            realized_logprob=self.realized_logprob[rows],
            depth=self.depth[rows],
            block=self.block[rows],
            weight=self.weight[rows],
            has_soft=self.has_soft[rows],
            event_offsets=self.event_offsets[start : stop + 1] - events.start,
            event_mass=self.event_mass[events],
            member_offsets=self.member_offsets[events.start : events.stop + 1] - members.start,
            members=self.members[members],
            tail=self.tail[rows],
            known=self.known[rows],
        )


@dataclass(frozen=True, slots=True)
class Selection:
    """Response positions of one sample that are supervised together.

    Attributes:
        positions: int64 [n], response tokens (0-based within the response), in order.
        in_block: they are one masked block, depth 1 first; otherwise they are randomly masked positions.
        weight: float32 [n], or None for 1.
    """

    sample: AlignedSample
    positions: NDArray[np.int64]
    in_block: bool
    weight: NDArray[np.float32] | None = None


def gather_targets(selections: Sequence[Selection]) -> TargetBatch:
    """Targets of all selected positions, in the order of `selections`, which is the order of the gathered states."""
    rows = [_gather_rows(s) for s in selections]
    in_block = np.array([s.in_block for s in selections], bool)
    block = np.where(in_block, np.cumsum(in_block) - 1, -1)
    counts = [len(r.realized_ids) for r in rows]
    tail = _concatenate([r.tail for r in rows], np.float32)
    return TargetBatch(
        realized_ids=_tensor([r.realized_ids for r in rows], np.int64),
        realized_logprob=_tensor([r.realized_logprob for r in rows], np.float32),
        depth=_tensor([r.depth for r in rows], np.int64),
        block=torch.from_numpy(
            np.repeat(np.where([s.in_block for s in selections], block, -1), counts).astype(np.int64)
        ),
        weight=_tensor([r.weight for r in rows], np.float32),
        has_soft=torch.from_numpy(~np.isnan(tail)),
        event_offsets=_offsets([r.event_counts for r in rows]),
        event_mass=_tensor([r.event_mass for r in rows], np.float32),
        member_offsets=_offsets([r.member_counts for r in rows]),
        members=_tensor([r.members for r in rows], np.int64),
        tail=torch.from_numpy(tail),
        known=_tensor([r.known for r in rows], np.float32),
    )


def depth_weights(depth_N: Tensor, decay: float) -> Tensor:
    """float32 [N], decay^(depth - 1); 1 at positions in no block."""
    return torch.pow(torch.tensor(decay, dtype=torch.float32, device=depth_N.device), (depth_N - 1).clamp(min=0))


@dataclass(frozen=True, slots=True)
class _Rows:
    """The targets of one selection; counts instead of offsets, so that selections concatenate."""

    realized_ids: NDArray[np.int32]
    realized_logprob: NDArray[np.float32]
    depth: NDArray[np.int64]
    weight: NDArray[np.float32]
    event_counts: NDArray[np.int64]
    event_mass: NDArray[np.float32]
    member_counts: NDArray[np.int64]
    members: NDArray[np.int32]
    tail: NDArray[np.float32]
    known: NDArray[np.float32]


def _gather_rows(selection: Selection) -> _Rows:
    sample, targets = selection.sample, selection.sample.targets
    positions = np.asarray(selection.positions, np.int64)
    events = _ranges(targets.event_offsets, positions)
    count = len(positions)
    return _Rows(
        realized_ids=sample.input_ids[sample.prompt_length + positions],
        realized_logprob=sample.realized_logprob[positions],
        depth=np.arange(1, count + 1) if selection.in_block else np.zeros(count, np.int64),
        weight=np.ones(count, np.float32) if selection.weight is None else selection.weight,
        event_counts=targets.event_offsets[positions + 1] - targets.event_offsets[positions],
        event_mass=targets.event_mass[events],
        member_counts=targets.member_offsets[events + 1] - targets.member_offsets[events],
        members=targets.members[_ranges(targets.member_offsets, events)],
        tail=targets.tail[positions],
        known=targets.known[positions],
    )


def _ranges(offsets: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices `offsets[r]:offsets[r + 1]` of every row r, one after another."""
    starts, counts = offsets[rows], offsets[rows + 1] - offsets[rows]
    ends = np.cumsum(counts)
    return np.repeat(starts - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)


def _offsets(counts: list[NDArray[np.int64]]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(1, np.int64), np.cumsum(_concatenate(counts, np.int64))]))


def _concatenate(parts: list[NDArray], dtype: type) -> NDArray:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)


def _tensor(parts: list[NDArray], dtype: type) -> Tensor:
    return torch.from_numpy(_concatenate(parts, dtype))


def _rows_of(offsets: Tensor, total: int) -> Tensor:
    rows = torch.arange(offsets.shape[0] - 1, device=offsets.device)
    return torch.repeat_interleave(rows, offsets.diff(), output_size=total)
