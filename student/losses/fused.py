"""The losses from hidden states and the head's weight, never holding more than a slice of the logits.

Method: positions go through the head in chunks of whole blocks (the path term couples a block's positions, so it
stays exact). Within a chunk the logits are made once; three vectors (log q of realized tokens, events, tail) are read
off them; `reference.combine` turns these into the loss, and autograd on the small vectors alone gives the loss's
slopes. With those the chunk of logits is overwritten by its own gradient,

    dL/dz_v = exp(z_v - lse_rest) (g_tail - G q_tail)      for v in no event, G = g_realized + sum_e g_e + g_tail
    dL/dz_v = g_e exp(z_v - lse_e) - G exp(z_v - lse)      for v in event e
    plus g_realized at the realized token,

and multiplied into the gradients of the hidden states and the head at once, as Liger's fused linear cross-entropy
(arXiv:2410.10989) does. So there are three matrix products in all, the plain computation's number, and backward only
scales what forward has computed.

Cost beyond the gradients themselves: `chunk_bytes` (its float32 logits; twice for half-precision parameters). The
gradient of the head is summed in float32. There is no second derivative.

Legend: N positions, C positions of a chunk, V vocabulary, D hidden size, E events, M members.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from student.losses.reference import EventLogProbs, combine, segment_logsumexp
from student.losses.settings import LossSettings
from student.losses.targets import TargetBatch
from student.losses.terms import LossTerms, terms_from_sums

DEFAULT_CHUNK_BYTES = 64 << 20


def distillation_loss(
    hidden_NxD: Tensor,
    head_weight_VxD: Tensor,
    targets: TargetBatch,
    settings: LossSettings,
    *,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> LossTerms:
    """`reference.distillation_loss(hidden_NxD @ head_weight_VxD.T, …)`, chunked; equal in values and gradients.

    Must run inside the DeepSpeed engine's forward, where ZeRO-3 has gathered the head. A frozen head, or hidden states
    that need no gradient, cost nothing. With N = 0 the total is 0 and both gradients are zeros, so ranks stay in step.

    Args:
        chunk_bytes: bound on the float32 logits held at once; a chunk has at least one block whatever it says.
    """
    if torch.is_autocast_enabled(hidden_NxD.device.type):
        dtype = torch.get_autocast_dtype(hidden_NxD.device.type)
        hidden_NxD, head_weight_VxD = hidden_NxD.to(dtype), head_weight_VxD.to(dtype)
    hidden_NxD = hidden_NxD.to(head_weight_VxD.dtype)
    grad = torch.is_grad_enabled()
    needs = (grad and hidden_NxD.requires_grad, grad and head_weight_VxD.requires_grad)
    total, sums = _ChunkedLoss.apply(hidden_NxD, head_weight_VxD, targets, settings, chunk_bytes, needs)
    terms = terms_from_sums(sums)
    terms.total = total
    return terms


class _ChunkedLoss(torch.autograd.Function):
    """Forward computes the loss and both gradients; backward scales them by the incoming scalar."""

    @staticmethod
    def forward(ctx, hidden_NxD, head_VxD, targets, settings, chunk_bytes, needs):  # type: ignore[no-untyped-def]
        with torch.autocast(hidden_NxD.device.type, enabled=False):
            result = _forward(hidden_NxD, head_VxD, targets, settings, chunk_bytes, *needs)
        ctx.mark_non_differentiable(result.sums)
        ctx.hidden_grad, ctx.head_grad = result.hidden_grad_NxD, result.head_grad_VxD
        ctx.spent = False
        return result.total, result.sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total, _grad_sums):  # type: ignore[no-untyped-def]
        if ctx.spent:
            raise RuntimeError("the fused loss was differentiated twice: its gradients are handed over, not kept")
        hidden_grad, head_grad = ctx.hidden_grad, ctx.head_grad
        ctx.hidden_grad = ctx.head_grad = None
        ctx.spent = True
        for gradient in (hidden_grad, head_grad):
            if gradient is not None:
                _scale(gradient, grad_total)
        return hidden_grad, head_grad, None, None, None, None


def _scale(gradient: Tensor, factor: Tensor) -> None:
    """Multiply in place, the product taken in the factor's precision, with no second copy of the whole."""
    if gradient.dtype == factor.dtype:
        gradient.mul_(factor)
        return
    # A bfloat16 factor would tilt every gradient by up to 0.4 %.
    for part in gradient.split(8192):
        part.copy_(part.to(factor.dtype) * factor)


@dataclass(slots=True)
class _Result:
    total: Tensor
    sums: Tensor
    hidden_grad_NxD: Tensor | None
    head_grad_VxD: Tensor | None


def _forward(
    hidden_NxD: Tensor,
    head_VxD: Tensor,
    targets: TargetBatch,
    settings: LossSettings,
    chunk_bytes: int,
    needs_hidden: bool,
    needs_head: bool,
) -> _Result:
    accumulate = torch.float64 if head_VxD.dtype == torch.float64 else torch.float32
    hidden_grad_NxD = torch.zeros_like(hidden_NxD) if needs_hidden else None
    head_grad_VxD = torch.zeros(head_VxD.shape, dtype=accumulate, device=head_VxD.device) if needs_head else None
    chunk_rows = max(1, chunk_bytes // (head_VxD.shape[0] * 4))
    total: Tensor | None = None
    sums: Tensor | None = None
    for start, stop, chunk in _chunks(targets, chunk_rows):
        hidden_CxD = hidden_NxD[start:stop]
        logits_CxV = (hidden_CxD @ head_VxD.T).to(accumulate)
        terms = _chunk_terms(logits_CxV, chunk, settings, gradient=needs_hidden or needs_head)
        total = terms.total if total is None else total + terms.total
        sums = terms.sums() if sums is None else sums + terms.sums()
        # From here `logits_CxV` holds the loss's gradient with respect to the logits.
        if hidden_grad_NxD is not None:
            hidden_grad_NxD[start:stop] = logits_CxV.to(head_VxD.dtype) @ head_VxD
        if head_grad_VxD is not None:
            head_grad_VxD.addmm_(logits_CxV.T, hidden_CxD.to(accumulate))
    assert total is not None
    assert sums is not None
    if head_grad_VxD is not None:
        head_grad_VxD = head_grad_VxD.to(head_VxD.dtype)
    return _Result(total, sums, hidden_grad_NxD, head_grad_VxD)


def _chunk_terms(logits_CxV: Tensor, targets: TargetBatch, settings: LossSettings, *, gradient: bool) -> LossTerms:
    """The chunk's terms; on return `logits_CxV` holds d total / d logits if `gradient`, and is spoilt otherwise."""
    rows_C = torch.arange(len(targets), device=logits_CxV.device)
    rows_E, events_M = targets.event_rows(), targets.member_events()
    rows_M = rows_E[events_M]
    realized_C = logits_CxV[rows_C, targets.realized_ids]
    member_M = logits_CxV[rows_M, targets.members]

    # The rest of the vocabulary, in place: logits become exp(logit - peak).
    logits_CxV[rows_M, targets.members] = -torch.inf
    peak_C, top1_C = logits_CxV.max(dim=1)
    top1_C = _top1(peak_C, top1_C, member_M, rows_M, targets.members)
    peak_C = torch.where(peak_C.isneginf(), 0, peak_C)
    rest_sum_C = logits_CxV.sub_(peak_C[:, None]).exp_().sum(dim=1)
    rest_C = rest_sum_C.log() + peak_C
    event_E = segment_logsumexp(member_M, events_M, len(rows_E))
    normalizer_C = torch.logaddexp(rest_C, segment_logsumexp(event_E, rows_E, len(targets)))

    student = EventLogProbs(
        realized_N=(realized_C - normalizer_C).requires_grad_(gradient),
        event_E=(event_E - normalizer_C[rows_E]).requires_grad_(gradient),
        tail_N=(rest_C - normalizer_C).requires_grad_(gradient),
        top1_N=top1_C,
    )
    with torch.set_grad_enabled(gradient):
        terms = combine(student, targets, settings)
    if not gradient:
        return terms
    leaves = (student.realized_N, student.event_E, student.tail_N)
    slopes = torch.autograd.grad(terms.total, leaves, materialize_grads=True)
    terms.total = terms.total.detach()
    realized_slope_C, event_slope_E, tail_slope_C = slopes
    slope_sum_C = (realized_slope_C + tail_slope_C).index_add(0, rows_E, event_slope_E)

    tail_q_C = (rest_C - normalizer_C).exp()
    coefficient_C = (tail_slope_C - slope_sum_C * tail_q_C) / rest_sum_C.where(rest_sum_C > 0, 1)
    logits_CxV.mul_(coefficient_C[:, None])
    finite_event_M = event_E.where(event_E > -torch.inf, 0)[events_M]
    inside_M = event_slope_E[events_M] * (member_M - finite_event_M).exp()
    logits_CxV[rows_M, targets.members] = inside_M - slope_sum_C[rows_M] * (member_M - normalizer_C[rows_M]).exp()
    logits_CxV[rows_C, targets.realized_ids] += realized_slope_C
    return terms


def _top1(peak_C: Tensor, top1_C: Tensor, member_M: Tensor, rows_M: Tensor, members: Tensor) -> Tensor:
    """The most probable token, given the most probable one outside the events; ties go to the lowest id."""
    best_C = peak_C.scatter_reduce(0, rows_M, member_M, "amax")
    nobody = torch.iinfo(torch.int64).max
    candidate_C = torch.where(peak_C == best_C, top1_C, nobody)
    return candidate_C.scatter_reduce(0, rows_M, torch.where(member_M == best_C[rows_M], members, nobody), "amin")


def _chunks(targets: TargetBatch, chunk_rows: int) -> Iterator[tuple[int, int, TargetBatch]]:
    """Consecutive positions, at most `chunk_rows` where no single block is longer; blocks are never cut."""
    count = len(targets)
    block = targets.block.cpu()
    # A position starts a run unless it continues the block of the one before it.
    is_start = torch.ones(count, dtype=torch.bool)
    is_start[1:] = (block[1:] != block[:-1]) | (block[1:] < 0)
    starts = [*is_start.nonzero().squeeze(1).tolist(), count]
    bounds = [0]
    for run_start, run_stop in itertools.pairwise(starts):
        if run_stop - bounds[-1] > chunk_rows and run_start > bounds[-1]:
            bounds.append(run_start)
    bounds.append(count)
    event_bounds_device = targets.event_offsets[torch.tensor(bounds, device=targets.event_offsets.device)]
    event_bounds = event_bounds_device.tolist()
    member_bounds = targets.member_offsets[event_bounds_device].tolist()
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        events = slice(event_bounds[i], event_bounds[i + 1])
        members = slice(member_bounds[i], member_bounds[i + 1])
        yield start, stop, targets.slice(start, stop, events, members)
