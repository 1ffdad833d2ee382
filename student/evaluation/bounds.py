"""Bounds on the acceptance rate α of rejection sampling at depth 1, from truncated rows (README.md of this folder).

α = Σ_s min(p(s), q(s)) needs p of every student token. Stored is p of events, sets of tokens whose inner split is
unknown, and of the tail. The lower bound puts an event's whole mass on the token that the student likes least, and
counts nothing of the tail; the upper bound splits events and tail as the student does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from student.losses.targets import TargetBatch


def acceptance_bounds(logits_NxV: Tensor, targets: TargetBatch) -> tuple[Tensor, Tensor]:
    """Lower and upper bound of α at each position.

    Args:
        logits_NxV: the student's, any float dtype.
        targets: of the same N positions.

    Returns: two float64 [N]; NaN where a position has no soft target.
    """
    q_NxV = torch.softmax(logits_NxV.double(), dim=-1)
    position_E, event_M = targets.event_rows(), targets.member_events()
    q_M = q_NxV[position_E[event_M], targets.members]
    mass_E = targets.event_mass.double()
    q_E = torch.zeros_like(mass_E).index_add_(0, event_M, q_M)
    least_q_E = torch.full_like(mass_E, torch.inf).scatter_reduce_(0, event_M, q_M, "amin")

    def summed(values_E: Tensor) -> Tensor:
        return q_NxV.new_zeros(len(targets)).index_add_(0, position_E, values_E)

    low = summed(torch.minimum(mass_E, least_q_E))
    tail = targets.tail.double()
    high = summed(torch.minimum(mass_E, q_E)) + torch.minimum(tail, (1 - summed(q_E)).clamp(min=0))
    unknown = ~targets.has_soft
    return low.masked_fill(unknown, torch.nan), high.masked_fill(unknown, torch.nan)
