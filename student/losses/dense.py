"""The loss from dense logits, plainly; `chunked` is tested against it, and must give the same.

Cost: the logits and three to four more tensors of their size. Half-precision logits are computed in float32, float64
stays float64.

Legend: N positions, V vocabulary, E events, M members, K = N + E outcomes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from student.losses.objective import LossTerms, StudentLogProbs, objective, segment_logsumexp
from student.losses.settings import LossSettings
from student.losses.targets import TargetBatch


def distillation_loss(logits_NxV: Tensor, targets: TargetBatch, settings: LossSettings) -> LossTerms:
    """All terms from dense logits. With N = 0 the total is 0 and its gradient is zero, not absent."""
    return objective(student_log_probs(logits_NxV, targets), targets, settings)


def student_log_probs(logits_NxV: Tensor, targets: TargetBatch) -> StudentLogProbs:
    """Log-probabilities of observed token, tail and events; finite wherever the logits are, up to ±1e4 and beyond."""
    logits_NxV = logits_NxV if logits_NxV.dtype == torch.float64 else logits_NxV.float()
    # Relative to the row's largest: at ±1e4, float32 has but three decimals, and a logsumexp would round to them.
    logits_NxV = logits_NxV - logits_NxV.detach().amax(dim=1, keepdim=True)
    rows_E, events_M = targets.event_rows(), targets.member_events()
    rows_M = rows_E[events_M]
    normalizer_N = logits_NxV.logsumexp(dim=1)
    event_E = segment_logsumexp(logits_NxV[rows_M, targets.members], events_M, len(rows_E))
    is_member_NxV = torch.zeros(logits_NxV.shape, dtype=torch.bool, device=logits_NxV.device)
    is_member_NxV[rows_M, targets.members] = True
    # A row whose every token is a member has no tail: give logsumexp a finite row, so that no NaN enters the gradient.
    full_N = is_member_NxV.all(dim=1)
    rest_NxV = logits_NxV.masked_fill(is_member_NxV & ~full_N[:, None], -torch.inf)
    peak_N = rest_NxV.detach().amax(dim=1)
    rest_N = (rest_NxV - peak_N[:, None]).logsumexp(dim=1) + peak_N
    tail_N = (rest_N - normalizer_N).masked_fill(full_N, -torch.inf)
    return StudentLogProbs(
        observed_N=logits_NxV.gather(1, targets.observed_ids[:, None]).squeeze(1) - normalizer_N,
        outcome_K=torch.cat([tail_N, event_E - normalizer_N[rows_E]]),
        top1_N=logits_NxV.argmax(dim=1),
    )
