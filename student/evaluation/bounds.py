"""Bounds on the acceptance rate α of the ratio rule at depth 1, from truncated rows (`student/README.md`, Evaluation).

α = Σ_s min(p(s), q(s)) needs p of every student token. What is stored is p of events: sets of tokens whose inner split
is unknown, and the tail. Over all splits that the events allow, α lies in

    Σ_e min(p(e), min_{s∈e} q(s))  ≤  α  ≤  Σ_e min(p(e), q(e)) + min(tail, 1 − Σ_e q(e)),

both ends attained: the lower one puts an event's whole mass on its least drafted token, the upper one splits it as q
does. With one token an event this is the usual top-k bound.
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
    positions = logits_NxV.shape[0]
    q_NxV = torch.softmax(logits_NxV.double(), dim=-1)
    position_E = torch.repeat_interleave(torch.arange(positions, device=q_NxV.device), targets.event_offsets.diff())
    event_M = torch.repeat_interleave(
        torch.arange(len(targets.event_mass), device=q_NxV.device), targets.member_offsets.diff()
    )
    q_M = q_NxV[position_E[event_M], targets.members]
    mass_E = targets.event_mass.double()
    q_E = torch.zeros_like(mass_E).index_add_(0, event_M, q_M)
    least_q_E = torch.full_like(mass_E, torch.inf).scatter_reduce_(0, event_M, q_M, "amin")

    def summed(values_E: Tensor) -> Tensor:
        return torch.zeros(positions, dtype=torch.float64, device=q_NxV.device).index_add_(0, position_E, values_E)

    low = summed(torch.minimum(mass_E, least_q_E))
    tail = targets.tail.double()
    high = summed(torch.minimum(mass_E, q_E)) + torch.minimum(tail, (1 - summed(q_E)).clamp(min=0))
    unknown = ~targets.has_soft
    return low.masked_fill(unknown, torch.nan), high.masked_fill(unknown, torch.nan)
