"""The supervised positions of a micro-batch, as the losses take them.

Legend: N supervised positions, E events, M members, V the student's vocabulary. Rows are CSR, exactly as in
`student.alignment.targets.SparseTargets`, with positions gathered over the whole micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
