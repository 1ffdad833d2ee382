"""The supervised positions of a micro-batch, as the losses take them.

Legend: N supervised positions, E events, M members, K = N + E outcomes. Rows are CSR, exactly as in
`student.alignment.targets.SparseTargets`, with positions gathered over the whole micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(slots=True)
class TargetBatch:
    """Targets of N supervised positions; positions of one masked block are consecutive and in order.

    Attributes:
        observed_ids: int64 [N], the student token that stands there.
        observed_logprob: float32 [N], the teacher's log p of it; NaN where unknown.
        depth: int64 [N], 1 for the first position of a block; 0 where the position is in no block (random masking).
        block: int64 [N], number of the block in the micro-batch; -1 where the position is in no block.
        weight: float32 [N], multiplies every per-position term (depth weight, 1/p of random masking).
        has_soft: bool [N], the position has a soft target.
        event_offsets: int64 [N + 1]. event_mass: float32 [E]. member_offsets: int64 [E + 1]. members: int64 [M].
        tail: float32 [N]; NaN where there is no soft target.
        known: float32 [N]: the known conditional mass, for logging.
    """

    observed_ids: Tensor
    observed_logprob: Tensor
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
        return self.observed_ids.shape[0]

    def changed(self, change: Callable[[Tensor], Tensor]) -> TargetBatch:
        """Every tensor put through `change`: another device, or another kind of memory."""
        return TargetBatch(**{f.name: change(getattr(self, f.name)) for f in fields(self)})

    def event_rows(self) -> Tensor:
        """int64 [E], the position of every event."""
        return _rows_of(self.event_offsets, self.event_mass.shape[0])

    def member_events(self) -> Tensor:
        """int64 [M], the event of every member."""
        return _rows_of(self.member_offsets, self.members.shape[0])

    def outcome_rows(self) -> Tensor:
        """int64 [K], the position of every outcome: the tail of each position, then each event."""
        return torch.cat([torch.arange(len(self), device=self.tail.device), self.event_rows()])

    def slice(self, start: int, stop: int, events: slice, members: slice) -> TargetBatch:
        """Positions `start:stop`, whose events and members the caller has looked up (one host sync for all slices)."""
        cut = {f.name: getattr(self, f.name)[start:stop] for f in fields(self)}
        cut["event_offsets"] = self.event_offsets[start : stop + 1] - events.start
        cut["event_mass"] = self.event_mass[events]
        cut["member_offsets"] = self.member_offsets[events.start : events.stop + 1] - members.start
        cut["members"] = self.members[members]
        return TargetBatch(**cut)


def depth_weights(depth_N: Tensor, decay: float) -> Tensor:
    """float32 [N], decay^(depth - 1); 1 at positions in no block."""
    return torch.pow(torch.tensor(decay, dtype=torch.float32, device=depth_N.device), (depth_N - 1).clamp(min=0))


def _rows_of(offsets: Tensor, total: int) -> Tensor:
    rows = torch.arange(offsets.shape[0] - 1, device=offsets.device)
    return torch.repeat_interleave(rows, offsets.diff(), output_size=total)
