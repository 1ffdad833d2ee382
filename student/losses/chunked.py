"""The loss from hidden states and the head's weight, never holding more than a slice of the logits.

Positions go through the head in chunks of whole blocks (the path term couples a block's positions). A chunk's logits
are made once; `objective` on three vectors read off them gives the loss and its slopes; the gradient of the logits
overwrites the logits and goes into the gradients of the hidden states and the head at once (formula and source:
README.md of this folder). Three matrix products in all, the plain computation's number; backward only scales.

Half-precision parameters are multiplied as they are, but logits are float32: a logit of 4 rounded to bfloat16 moves its
token's gradient by 1.6 %. The head's gradient is summed in float32.

Cost beyond the gradients themselves: one float32 slice of the logits of `chunk_bytes` and a little scratch
(half-precision parameters add a half-sized slice). There is no second derivative.

Legend: N positions, C positions of a chunk, V vocabulary, D hidden size, E events, M members, K = C + E outcomes.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from student.losses.objective import (
    LossTerms,
    StudentLogProbs,
    named_sums,
    objective,
    segment_logsumexp,
    segment_softmax,
)
from student.losses.settings import LossSettings
from student.losses.targets import TargetBatch

# Every slice reads the head twice and its gradient once: slices so large that this costs little beside the products.
# On an H100, at 4,096 positions of LLaDA-8B: 45 TFLOP/s with 64 MiB, 151 with 256 MiB, 265 with 1 GiB.
DEFAULT_CHUNK_BYTES = {"cpu": 88 << 20, "cuda": 1 << 30}
# Scratch of the softmax over a slice: within a CPU's cache; enough rows to fill a GPU.
SCRATCH_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}
# Rows of the head that are converted at a time where its gradient changes precision.
HEAD_ROWS = 8192
_NOBODY = torch.iinfo(torch.int64).max


def distillation_loss(
    hidden_NxD: Tensor,
    head_weight_VxD: Tensor,
    targets: TargetBatch,
    settings: LossSettings,
    *,
    chunk_bytes: int | None = None,
) -> LossTerms:
    """The loss of the logits `hidden_NxD @ head_weight_VxD.T`, chunked; equal to the dense one in values and gradients.

    Must run inside the DeepSpeed engine's forward, where ZeRO-3 has gathered the head. A frozen head, or hidden states
    that need no gradient, cost nothing. With N = 0 the total is 0 and both gradients are zeros, so ranks stay in step.

    Args:
        chunk_bytes: bound on one float32 slice of logits; a slice has at least one block whatever it says. None takes
            the device's default.
    """
    device = hidden_NxD.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_NxD, head_weight_VxD = hidden_NxD.to(dtype), head_weight_VxD.to(dtype)
    hidden_NxD = hidden_NxD.to(head_weight_VxD.dtype)
    if chunk_bytes is None:
        chunk_bytes = _by_device(DEFAULT_CHUNK_BYTES, hidden_NxD.device)
    needs_hidden, needs_head = (torch.is_grad_enabled() and t.requires_grad for t in (hidden_NxD, head_weight_VxD))
    with torch.no_grad(), torch.autocast(device, enabled=False):
        terms, *gradients = _forward(
            hidden_NxD, head_weight_VxD, targets, settings, chunk_bytes, needs_hidden, needs_head
        )
    total = _GradientsMade.apply(hidden_NxD, head_weight_VxD, terms.total, *gradients)
    return terms._replace(total=total)


def _by_device(sizes: dict[str, int], device: torch.device) -> int:
    return sizes.get(device.type, sizes["cpu"])


class _GradientsMade(torch.autograd.Function):
    """`total` as a function of states and head, whose gradients are there already: backward scales and hands over."""

    @staticmethod
    def forward(ctx, _hidden_NxD, _head_VxD, total, *gradients):  # type: ignore[no-untyped-def]
        ctx.gradients = gradients
        return total.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total):  # type: ignore[no-untyped-def]
        if ctx.gradients is None:
            raise RuntimeError("the chunked loss was differentiated twice: its gradients are handed over, not kept")
        gradients, ctx.gradients = ctx.gradients, None
        for gradient in gradients:
            if gradient is not None:
                _scale(gradient, grad_total)
        return *gradients, None, None, None


def _scale(gradient: Tensor, factor: Tensor) -> None:
    """Multiply in place, the product taken in the factor's precision, with no second copy of the whole."""
    if gradient.dtype == factor.dtype:
        gradient.mul_(factor)
        return
    # A bfloat16 factor would tilt every gradient by up to 0.4 %.
    for part in gradient.split(HEAD_ROWS):
        part.copy_(part.to(factor.dtype) * factor)


def _forward(
    hidden_NxD: Tensor,
    head_VxD: Tensor,
    targets: TargetBatch,
    settings: LossSettings,
    chunk_bytes: int,
    needs_hidden: bool,
    needs_head: bool,
) -> tuple[LossTerms, Tensor | None, Tensor | None]:
    """The terms, and the total's gradients for hidden states and head where they are needed."""
    accumulate = torch.float64 if head_VxD.dtype == torch.float64 else torch.float32
    hidden_grad_NxD = torch.empty_like(hidden_NxD, memory_format=torch.contiguous_format) if needs_hidden else None
    head_grad_VxD = torch.empty(head_VxD.shape, dtype=accumulate, device=head_VxD.device) if needs_head else None
    chunks = _chunks(targets, max(1, chunk_bytes // (head_VxD.shape[0] * 4)))
    rows = max(stop - start for start, stop, _ in chunks)
    slice_CxV = head_VxD.new_empty(rows, head_VxD.shape[0], dtype=accumulate)
    parts = []
    for start, stop, chunk in chunks:
        hidden_CxD, logits_CxV = hidden_NxD[start:stop], slice_CxV[: stop - start]
        multiply_by_head(hidden_CxD, head_VxD, logits_CxV)
        terms, slope_CxV = _chunk_terms(logits_CxV, chunk, settings, gradient=needs_hidden or needs_head)
        parts.append(terms)
        if slope_CxV is None:
            continue
        slope_CxV = slope_CxV.to(head_VxD.dtype)
        if hidden_grad_NxD is not None:
            torch.mm(slope_CxV, head_VxD, out=hidden_grad_NxD[start:stop])
        if head_grad_VxD is not None:
            _add_product(head_grad_VxD, slope_CxV, hidden_CxD, first=start == 0)
        del slope_CxV  # before the next one is made, where it is not the slice itself
    terms = LossTerms(*(sum(values[1:], values[0]) for values in zip(*parts, strict=True)))
    named_sums(terms.sums)["total"].copy_(terms.total)  # the log shows what is differentiated, to the last digit
    return terms, hidden_grad_NxD, None if head_grad_VxD is None else head_grad_VxD.to(head_VxD.dtype)


def multiply_by_head(hidden_CxD: Tensor, head_VxD: Tensor, logits_CxV: Tensor) -> None:
    """`logits_CxV = hidden_CxD @ head_VxD.T`, in the precision of `logits_CxV`."""
    if head_VxD.dtype == logits_CxV.dtype:
        torch.mm(hidden_CxD, head_VxD.T, out=logits_CxV)
    elif head_VxD.is_cuda:
        torch.mm(hidden_CxD, head_VxD.T, out_dtype=logits_CxV.dtype, out=logits_CxV)
    else:  # CPUs have no product of this kind: a part of the head at a time is converted
        hidden_CxD = hidden_CxD.to(logits_CxV.dtype)
        for part_RxD, logits_CxR in zip(head_VxD.split(HEAD_ROWS), logits_CxV.split(HEAD_ROWS, dim=1), strict=True):
            logits_CxR.copy_(hidden_CxD @ part_RxD.to(logits_CxV.dtype).T)


def _chunk_terms(
    logits_CxV: Tensor, targets: TargetBatch, settings: LossSettings, *, gradient: bool
) -> tuple[LossTerms, Tensor | None]:
    """The chunk's terms, and d total / d logits, which lie where the logits lay, if `gradient`."""
    rows_C = torch.arange(len(targets), device=logits_CxV.device)
    rows_K, rows_E, events_M = targets.outcome_rows(), targets.event_rows(), targets.member_events()
    rows_M = rows_E[events_M]
    observed_C = logits_CxV[rows_C, targets.observed_ids]
    member_M = logits_CxV[rows_M, targets.members]

    # The tokens outside the events. A finite floor instead of -inf keeps a row finite where there are none.
    floor = torch.finfo(logits_CxV.dtype).min
    logits_CxV[rows_M, targets.members] = floor
    peak_C, top1_C = logits_CxV.max(dim=1)
    rest_CxV = _softmax(logits_CxV)
    # From here all logits are relative to the row's largest: at ±1e4, float32 has but three decimals.
    has_rest_C = peak_C > floor
    largest_C = peak_C.scatter_reduce(0, rows_M, member_M, "amax")
    # The lowest id of the largest logit, inside the events or outside: where a dense argmax sends ties.
    outside_C = torch.where(peak_C == largest_C, top1_C, _NOBODY)
    inside_M = torch.where(member_M == largest_C[rows_M], targets.members, _NOBODY)
    top1_N = outside_C.scatter_reduce(0, rows_M, inside_M, "amin")
    observed_C, member_M = observed_C - largest_C, member_M - largest_C[rows_M]
    rest_C = torch.where(has_rest_C, peak_C - largest_C - rest_CxV[rows_C, top1_C].log(), -torch.inf)
    event_E = segment_logsumexp(member_M, events_M, len(rows_E))
    normalizer_C = torch.logaddexp(rest_C, segment_logsumexp(event_E, rows_E, len(targets)))

    student = StudentLogProbs(
        observed_N=(observed_C - normalizer_C).requires_grad_(gradient),
        outcome_K=(torch.cat([rest_C, event_E]) - normalizer_C[rows_K]).requires_grad_(gradient),
        top1_N=top1_N,
    )
    with torch.set_grad_enabled(gradient):
        terms = objective(student, targets, settings)
    if not gradient:
        return terms, None
    leaves = (student.observed_N, student.outcome_K)
    observed_g_C, outcome_g_K = torch.autograd.grad(terms.total, leaves, materialize_grads=True)
    tail_g_C, event_g_E = outcome_g_K.split([len(rows_C), len(rows_E)])
    sum_g_C = observed_g_C.index_add(0, rows_K, outcome_g_K)

    slope_CxV = rest_CxV.mul_((tail_g_C - sum_g_C * (rest_C - normalizer_C).exp())[:, None])
    share_M = segment_softmax(member_M, events_M, len(rows_E))
    slope_CxV[rows_M, targets.members] = (
        event_g_E[events_M] * share_M - sum_g_C[rows_M] * (member_M - normalizer_C[rows_M]).exp()
    )
    slope_CxV[rows_C, targets.observed_ids] += observed_g_C
    return terms._replace(total=terms.total.detach()), slope_CxV


def _softmax(logits_CxV: Tensor) -> Tensor:
    """Row-wise softmax in place."""
    rows = max(1, _by_device(SCRATCH_BYTES, logits_CxV.device) // (logits_CxV.shape[1] * 4))
    for part_RxV in logits_CxV.split(rows):
        part_RxV.copy_(torch.softmax(part_RxV, dim=1))
    return logits_CxV


def _add_product(head_grad_VxD: Tensor, slope_CxV: Tensor, hidden_CxD: Tensor, *, first: bool) -> None:
    """`head_grad_VxD += slope_CxV.T @ hidden_CxD`, or `=` for the first; half precision is added up in float32."""
    if head_grad_VxD.dtype == slope_CxV.dtype:
        head_grad_VxD.addmm_(slope_CxV.T, hidden_CxD, beta=0 if first else 1)
        return
    if head_grad_VxD.is_cuda:
        wide: dict[str, Any] = {"out_dtype": head_grad_VxD.dtype, "out": head_grad_VxD}
        if first:
            torch.mm(slope_CxV.T, hidden_CxD, **wide)
        else:
            torch.addmm(head_grad_VxD, slope_CxV.T, hidden_CxD, **wide)
        return
    for part_RxD, slope_CxR in zip(head_grad_VxD.split(HEAD_ROWS), slope_CxV.split(HEAD_ROWS, dim=1), strict=True):
        product_RxD = slope_CxR.T @ hidden_CxD
        if first:
            part_RxD.copy_(product_RxD)
        else:
            part_RxD += product_RxD


def _chunks(targets: TargetBatch, most_rows: int) -> list[tuple[int, int, TargetBatch]]:
    """Consecutive positions in whole blocks, at most `most_rows` a chunk where no block is longer.

    No position at all is one empty chunk. Waits for the device, once.
    """
    count = len(targets)
    block = targets.block.cpu()
    # A position starts a run unless it continues the block of the one before it.
    is_start = torch.ones(count, dtype=torch.bool)
    is_start[1:] = (block[1:] != block[:-1]) | (block[1:] < 0)
    starts = [*is_start.nonzero().squeeze(1).tolist(), count]
    bounds = [0]
    for run_start, run_stop in itertools.pairwise(starts):
        if run_stop - bounds[-1] > most_rows and run_start > bounds[-1]:
            bounds.append(run_start)
    bounds.append(count)
    event_bounds_device = targets.event_offsets[torch.tensor(bounds, device=targets.event_offsets.device)]
    event_bounds = event_bounds_device.tolist()
    member_bounds = targets.member_offsets[event_bounds_device].tolist()
    chunks = []
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        events, members = slice(*event_bounds[i : i + 2]), slice(*member_bounds[i : i + 2])
        chunks.append((start, stop, targets.slice(start, stop, events, members)))
    return chunks
