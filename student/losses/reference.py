"""The losses of METHOD 4, plainly: pure functions of log-probabilities, differentiable by autograd, sum reduction.

The losses see the student through three vectors only (`EventLogProbs`): log q of the realized token, of every event
and of the tail event. `distillation_loss` makes them from dense logits; `student.losses.fused` makes the same three
without the dense logits; both then call `combine`. Cost of the dense way: the logits and three to four more tensors
of their size. Half-precision logits are computed in float32, float64 stays float64.

Legend: N positions, V vocabulary, E events, M members, B blocks, G block length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from student.losses.settings import LossSettings
from student.losses.targets import TargetBatch
from student.losses.terms import LossTerms


@dataclass(slots=True)
class EventLogProbs:
    """What the losses need of the student's distribution; natural logs at temperature 1.

    Attributes:
        realized_N: log q of the realized token.
        event_E: log of the event's probability, the sum over its members.
        tail_N: log of the probability outside the events, summed over those tokens rather than taken as
            log(1 - sum), which loses all its digits where the events hold nearly everything.
        top1_N: int64, the most probable token.
    """

    realized_N: Tensor
    event_E: Tensor
    tail_N: Tensor
    top1_N: Tensor


@dataclass(slots=True)
class BlockGrid:
    """Positions in blocks laid out as [B, G]; made once, as finding the blocks waits for the device.

    Attributes:
        positions_K: int64, the positions that are in a block. rows_K, columns_K: their cells in a grid of `shape`.
    """

    positions_K: Tensor
    rows_K: Tensor
    columns_K: Tensor
    shape: tuple[int, int]

    def scatter(self, values_N: Tensor) -> Tensor:
        """[B, G], zero (or False) past a block's end."""
        grid_BxG = values_N.new_zeros(self.shape)
        return grid_BxG.index_put((self.rows_K, self.columns_K), values_N[self.positions_K])


def distillation_loss(logits_NxV: Tensor, targets: TargetBatch, settings: LossSettings) -> LossTerms:
    """All terms from dense logits. With N = 0 the total is 0 and its gradient is zero, not absent."""
    return combine(event_log_probs(logits_NxV, targets), targets, settings)


def event_log_probs(logits_NxV: Tensor, targets: TargetBatch) -> EventLogProbs:
    """Log-probabilities of realized token, events and tail; finite wherever the logits are, up to ±1e4 and beyond."""
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
    return EventLogProbs(
        realized_N=logits_NxV.gather(1, targets.realized_ids[:, None]).squeeze(1) - normalizer_N,
        event_E=event_E - normalizer_N[rows_E],
        tail_N=(rest_N - normalizer_N).masked_fill(full_N, -torch.inf),
        top1_N=logits_NxV.argmax(dim=1),
    )


def combine(student: EventLogProbs, targets: TargetBatch, settings: LossSettings) -> LossTerms:
    """The loss and its log sums from the student's log-probabilities; the one place where the terms meet.

    A position without a soft target takes its cross-entropy in the place of KL: over texts sampled from the teacher
    both have the same expected gradient, one is the other with its variance taken out.
    """
    soft_N = targets.has_soft
    ce_N = cross_entropy(student)
    kl_N = event_kl(student, targets, settings.temperature)
    soft_or_hard_N = torch.where(soft_N, settings.temperature**2 * kl_N, ce_N)
    tv_N = total_variation(student, targets)
    tv_mask_N = soft_N & (targets.depth == 1)
    grid = block_grid(targets, settings.block_length)
    path_B, accepted_B, log_prefix_BxG, usable_BxG = path_terms(student, targets, grid)

    if settings.loss == "ce":
        position_N = ce_N
    elif settings.loss == "kl":
        position_N = soft_or_hard_N
    else:
        position_N = settings.alpha * ce_N + settings.beta * soft_or_hard_N
    weight_N = targets.weight.to(ce_N.dtype)
    total = (weight_N * position_N).sum()
    if settings.tv_weight:
        total = total + settings.tv_weight * (weight_N * tv_N).where(tv_mask_N, 0).sum()
    if settings.path_weight:
        total = total + settings.path_weight * path_B.sum()

    with torch.no_grad():
        hit_N = student.top1_N == targets.realized_ids
        matched_BxG = grid.scatter(hit_N).cumprod(dim=1)
        target_entropy_N, student_entropy_N = entropies(student, targets)
        return LossTerms(
            total=total,
            ce=_sum(ce_N),
            kl=_sum(kl_N, soft_N),
            tv=_sum(tv_N, tv_mask_N),
            path=_sum(path_B),
            accepted=_sum(accepted_B),
            positions=_sum(torch.ones_like(ce_N)),
            soft_positions=_sum(soft_N),
            tv_positions=_sum(tv_mask_N),
            blocks=_sum(usable_BxG.any(dim=1)),
            known=_sum(targets.known, soft_N),
            retained=_sum(1 - targets.tail.double(), soft_N),
            target_entropy=_sum(target_entropy_N, soft_N),
            student_entropy=_sum(student_entropy_N, soft_N),
            hits=_sum(hit_N),
            accepted_by_depth=(log_prefix_BxG.exp() * usable_BxG).sum(0, dtype=torch.float64),
            accepted_count_by_depth=usable_BxG.sum(0, dtype=torch.float64),
            matched_by_depth=matched_BxG.sum(0, dtype=torch.float64),
            count_by_depth=grid.scatter(torch.ones_like(hit_N)).sum(0, dtype=torch.float64),
        )


def cross_entropy(student: EventLogProbs) -> Tensor:
    """[N] nats, -log q of the realized token."""
    return -student.realized_N


def event_kl(student: EventLogProbs, targets: TargetBatch, temperature: float = 1.0) -> Tensor:
    """[N] nats, KL(P_T ‖ Q_T) over the events and the tail event; 0 where there is no soft target. Not times T².

    At T = 1: sum_e p_e log(p_e / q_e) + r log(r / q_tail), the truncated forward KL of Sparse Logit Sampling
    (ACL 2025) with the tail as one more outcome, nothing renormalised.

    At T ≠ 1 both sides are tempered *over events*: P_T(e) = p_e^(1/T) / Z, and the same of q, the tail being one
    event. With complete rows of single tokens this is Hinton's KL of softened logits. With merged or many-member
    events it still is zero exactly where q_e = p_e, which softening the student's logits inside an event would
    break: sum_v q_v^(1/T) depends on how q spreads inside the event, of which the target says nothing. How far a
    truncated tail bends it is bounded by `student.losses.support`.
    """
    rows_E = targets.event_rows()
    log_q_E, log_q_tail_N = student.event_E, student.tail_N
    log_p_E, log_p_tail_N = _target_log_mass(targets, log_q_E.dtype)
    # Where no token is outside the events, what float32 masses leave of one is rounding that no student can take.
    log_p_tail_N = log_p_tail_N.masked_fill(log_q_tail_N.isneginf(), -torch.inf)
    if temperature != 1:
        log_q_E, log_q_tail_N = _tempered(log_q_E, log_q_tail_N, rows_E, temperature)
        log_p_E, log_p_tail_N = _tempered(log_p_E, log_p_tail_N, rows_E, temperature)
    kl_E = _p_log_ratio(log_p_E, log_q_E)
    kl_tail_N = _p_log_ratio(log_p_tail_N, log_q_tail_N)
    return torch.where(targets.has_soft, kl_tail_N.index_add(0, rows_E, kl_E), 0)


def total_variation(student: EventLogProbs, targets: TargetBatch) -> Tensor:
    """[N] in [0, 1], ½ sum_e |p_e - q_e| + ½ |r - q_tail|; 0 where there is no soft target.

    A lower bound on the full vocabulary's, tight where events are single tokens and the tail is empty. It is 1 - α, α
    being the chance that the ratio rule accepts a drafted event. Valid as a loss at depth 1 only (METHOD 3).
    """
    difference_E = (targets.event_mass.to(student.event_E.dtype) - student.event_E.exp()).abs()
    difference_N = (targets.tail.nan_to_num(0.0).to(student.tail_N.dtype) - student.tail_N.exp()).abs()
    return torch.where(targets.has_soft, 0.5 * difference_N.index_add(0, targets.event_rows(), difference_E), 0)


def path_terms(student: EventLogProbs, targets: TargetBatch, grid: BlockGrid) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The path term of METHOD 4, per block, in log space.

    One stored sample's estimate of J is sum_m prod_{j<=m} min(1, q_j(x_j) / p(x_j | x_<j)); its mean over texts sampled
    at temperature 1 is J exactly. The loss is -n log(J / n), n the block's usable length: zero where every token is
    accepted, and on the scale of n per-position terms. Its gradient does not vanish where J does; by Jensen it bounds
    -n log(E[J] / n) from above, so minimising it raises J, but it is not -log of the mean.

    A block counts up to its first position whose teacher logprob is unknown.

    Returns:
        path_B: the loss, nats, 0 for a block with no usable position. accepted_B: J of the block.
        log_prefix_BxG: log of the prefix products. usable_BxG: bool, where they are known.
    """
    log_p_N = targets.realized_logprob.to(student.realized_N.dtype)
    log_ratio_N = student.realized_N - log_p_N.nan_to_num(0.0, neginf=0.0)
    # p = 0 accepts whatever q drafts; elsewhere min(1, q/p). -inf from the student's side keeps a finite floor.
    log_ratio_N = torch.where(log_p_N.isneginf(), 0, log_ratio_N).clamp(min=-1e30)
    log_accept_N = torch.where(log_ratio_N < 0, log_ratio_N, 0)
    usable_BxG = grid.scatter(~log_p_N.isnan()).long().cumprod(dim=1).bool()
    log_prefix_BxG = grid.scatter(log_accept_N).cumsum(dim=1)
    length_B = usable_BxG.sum(dim=1)
    # Unusable blocks would be log 0: give them one term of log 1, and drop them afterwards.
    kept_BxG = usable_BxG.clone()
    kept_BxG[:, 0] |= length_B == 0
    log_j_B = log_prefix_BxG.masked_fill(~kept_BxG, -torch.inf).logsumexp(dim=1)
    path_B = torch.where(length_B > 0, length_B * (length_B.clamp(min=1).to(log_j_B.dtype).log() - log_j_B), 0)
    accepted_B = torch.where(length_B > 0, log_j_B.detach().exp(), 0)
    return path_B, accepted_B, log_prefix_BxG.detach(), usable_BxG


def entropies(student: EventLogProbs, targets: TargetBatch) -> tuple[Tensor, Tensor]:
    """([N], [N]) nats, entropy of the target and of the student over the same events and tail event."""
    rows_E = targets.event_rows()
    pairs = (_target_log_mass(targets, student.event_E.dtype), (student.event_E, student.tail_N))
    target_N, student_N = (
        -_p_log_p(log_tail_N).index_add(0, rows_E, _p_log_p(log_mass_E)) for log_mass_E, log_tail_N in pairs
    )
    return target_N, student_N


def segment_logsumexp(values_M: Tensor, segments_M: Tensor, segments: int) -> Tensor:
    """[segments], log of the sum of exp over each segment; -inf (with gradient zero) where that sum is zero."""
    peak_S = _segment_peak(values_M, segments_M, segments)
    sum_S = torch.zeros_like(peak_S).index_add(0, segments_M, (values_M - peak_S[segments_M]).exp())
    return torch.where(sum_S > 0, sum_S.where(sum_S > 0, 1).log() + peak_S, -torch.inf)


def segment_softmax(values_M: Tensor, segments_M: Tensor, segments: int) -> Tensor:
    """[M], exp of each value over the sum of its segment; 0 where that sum is zero."""
    share_M = (values_M - _segment_peak(values_M, segments_M, segments)[segments_M]).exp()
    sum_S = torch.zeros(segments, dtype=values_M.dtype, device=values_M.device).index_add(0, segments_M, share_M)
    return share_M / sum_S.where(sum_S > 0, 1)[segments_M]


def _segment_peak(values_M: Tensor, segments_M: Tensor, segments: int) -> Tensor:
    peak_S = torch.full((segments,), -torch.inf, dtype=values_M.dtype, device=values_M.device)
    peak_S = peak_S.scatter_reduce(0, segments_M, values_M.detach(), "amax")
    return torch.where(peak_S.isneginf(), 0, peak_S)


def block_grid(targets: TargetBatch, block_length: int) -> BlockGrid:
    """Where each position that is in a block stands among blocks and depths."""
    positions_K = (targets.block >= 0).nonzero().squeeze(1)
    numbers, rows_K = targets.block[positions_K].unique_consecutive(return_inverse=True)
    return BlockGrid(positions_K, rows_K, targets.depth[positions_K] - 1, (len(numbers), block_length))


def _target_log_mass(targets: TargetBatch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # A tail of 1 - sum(float32) may come out a hair below zero.
    return targets.event_mass.to(dtype).clamp(min=0).log(), targets.tail.nan_to_num(0.0).to(dtype).clamp(min=0).log()


def _tempered(log_mass_E: Tensor, log_tail_N: Tensor, rows_E: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log masses to the power 1/T, normalised over each position's events and tail."""
    log_mass_E, log_tail_N = log_mass_E / temperature, log_tail_N / temperature
    positions = log_tail_N.shape[0]
    rows = torch.cat([rows_E, torch.arange(positions, device=rows_E.device)])
    normalizer_N = segment_logsumexp(torch.cat([log_mass_E, log_tail_N]), rows, positions)
    normalizer_N = torch.where(normalizer_N.isneginf(), 0, normalizer_N)
    return log_mass_E - normalizer_N[rows_E], log_tail_N - normalizer_N


def _p_log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p - log q), with 0 log 0 = 0 for any q, in value and gradient."""
    some = log_p > -torch.inf
    return torch.where(some, log_p.exp() * (log_p.where(some, 0) - log_q.where(some, 0)), 0)


def _p_log_p(log_p: Tensor) -> Tensor:
    return log_p.exp() * log_p.where(log_p > -torch.inf, 0)


def _sum(values: Tensor, where: Tensor | None = None) -> Tensor:
    """float64 0-dim. A mask instead of an index: indexing by one would wait for the device."""
    values = values.detach() if where is None else values.detach().where(where, 0)
    return values.sum(dtype=torch.float64)
