"""Bounds on the acceptance rate α of rejection sampling at depth 1, from truncated rows (README.md of this folder).

α = Σ_s min(p(s), q(s)) needs p of every student token. Stored is p of events, sets of tokens whose inner split is
unknown, and of the tail. The lower bound puts an event's whole mass on the token that the student likes least, and
counts nothing of the tail; the upper bound splits events and tail as the student does.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from student.losses.chunked import multiply_by_head
from student.losses.targets import TargetBatch

CHUNK_BYTES = 256 << 20


def acceptance_bounds(
    hidden_NxD: Tensor, head_VxD: Tensor, targets: TargetBatch, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor]:
    """Lower and upper bound of α at each position.

    Args:
        hidden_NxD: the student's final states. head_VxD: makes its logits of them; both in any float dtype, the logits
            in float32 at least.
        targets: of the same N positions.
        chunk_bytes: bound on one float64 slice of the logits, of which two are held; a slice has at least one row.

    Returns: two float64 [N]; NaN where a position has no soft target.
    """
    position_E, event_M = targets.event_rows(), targets.member_events()
    position_M = position_E[event_M]
    q_M = torch.empty(len(event_M), dtype=torch.float64, device=hidden_NxD.device)
    precision = torch.float64 if head_VxD.dtype == torch.float64 else torch.float32
    rows = max(chunk_bytes // (8 * len(head_VxD)), 1)
    starts = [*range(0, len(targets), rows), len(targets)]
    # Members are in order of their positions.
    bounds = targets.member_offsets[targets.event_offsets[torch.tensor(starts, device=hidden_NxD.device)]].tolist()
    for (start, stop), (first, last) in zip(pairwise(starts), pairwise(bounds), strict=True):
        logits_CxV = head_VxD.new_empty(stop - start, len(head_VxD), dtype=precision)
        multiply_by_head(hidden_NxD[start:stop], head_VxD, logits_CxV)
        logits_CxV = logits_CxV.double()
        row_M = position_M[first:last] - start
        member_M = logits_CxV[row_M, targets.members[first:last]]
        q_M[first:last] = (member_M - logits_CxV.logsumexp(-1)[row_M]).exp()
    mass_E = targets.event_mass.double()
    q_E = torch.zeros_like(mass_E).index_add_(0, event_M, q_M)
    least_q_E = torch.full_like(mass_E, torch.inf).scatter_reduce_(0, event_M, q_M, "amin")

    def summed(values_E: Tensor) -> Tensor:
        return q_M.new_zeros(len(targets)).index_add_(0, position_E, values_E)

    low = summed(torch.minimum(mass_E, least_q_E))
    tail = targets.tail.double()
    high = summed(torch.minimum(mass_E, q_E)) + torch.minimum(tail, (1 - summed(q_E)).clamp(min=0))
    unknown = ~targets.has_soft
    return low.masked_fill(unknown, torch.nan), high.masked_fill(unknown, torch.nan)
