"""The objective: the loss of a micro-batch, and its sums for the log, from three small vectors of the student.

`chunked` reduces the student's logits to `StudentLogProbs` and calls `objective`; no tensor here has a vocabulary axis.
Formulas, their sources and their proofs: README.md of this folder. All is summed, never averaged, so that chunks,
micro-batches and ranks add up exactly; the caller divides (`loss_scale`, `summarize`).

Legend: N positions, E events, M members, K = N + E outcomes (the tail of every position, then every event), B blocks,
G block length, S segments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from student.losses.settings import LossSettings
from student.losses.targets import TargetBatch

# The sums for the log: float64, detached, unweighted but for the first. Soft positions have a soft target.
SCALARS = (
    "total",  # the weighted loss
    "ce",  # nats, over all positions
    "kl",  # nats, at the settings' temperature, without T², over soft positions
    "tv",  # total variation, over soft positions of depth 1
    "path",  # nats, -n log(J / n), over blocks, n their usable length
    "accepted",  # J over blocks: expected accepted tokens under rejection sampling
    "positions",  # from here to "blocks": how many of them these sums run over
    "soft_positions",
    "tv_positions",
    "blocks",
    "known",  # known conditional mass, over soft positions
    "retained",  # mass of the events (1 - tail), over soft positions
    "target_entropy",  # nats, over the events and the tail event, over soft positions
    "student_entropy",  # the same of the student
    "hits",  # positions whose most probable token is the observed one
)
# One number for each depth d = 1 … G.
BY_DEPTH = (
    "accepted_by_depth",  # sum over blocks of prod_{j<=d} min(1, q_j / p_j)
    "accepted_count_by_depth",  # blocks whose teacher logprobs are known to depth d
    "matched_by_depth",  # blocks whose first d most probable tokens are all the observed ones
    "count_by_depth",  # blocks that reach depth d
)


class StudentLogProbs(NamedTuple):
    """What the objective needs of the student's distribution q; natural logs at temperature 1.

    Attributes:
        observed_N: log q of the observed token.
        outcome_K: log q of each position's tail, then of each event (the sum over its members). The tail is summed over
            the tokens outside the events: log(1 - sum) loses all its digits where the events hold nearly everything.
        top1_N: int64, the most probable token.
    """

    observed_N: Tensor
    outcome_K: Tensor
    top1_N: Tensor


class LossTerms(NamedTuple):
    """`total`, 0-dim, is what to differentiate; `sums`, one float64 vector, is for the log (`named_sums`)."""

    total: Tensor
    sums: Tensor


def objective(student: StudentLogProbs, targets: TargetBatch, settings: LossSettings) -> LossTerms:
    """The loss and its sums; the one place where the terms meet. With N = 0 the total is 0, its gradient zeros."""
    soft_N, tv_mask_N = targets.has_soft, targets.has_soft & (targets.depth == 1)
    log_q_K, rows_K = student.outcome_K, targets.outcome_rows()
    mass_K = torch.cat([targets.tail.nan_to_num(0.0), targets.event_mass]).to(log_q_K.dtype)
    # A tail of 1 - sum(float32) may come out a hair below zero.
    log_p_K = mass_K.clamp(min=0).log()

    def of_position(values_K: Tensor) -> Tensor:
        return values_K.new_zeros(len(targets)).index_add(0, rows_K, values_K)

    ce_N = -student.observed_N
    kl_N = of_position(outcome_kl(log_p_K, log_q_K, rows_K, len(targets), settings.temperature))
    tv_N = 0.5 * of_position((mass_K - log_q_K.exp()).abs())
    to_blocks = block_layout(targets, settings.block_length)
    path_B, accepted_B, log_prefix_BxG, usable_BxG = path_term(student.observed_N, targets.observed_logprob, to_blocks)

    # Cross-entropy has the same expected gradient as the KL that is missing.
    soft_or_hard_N = torch.where(soft_N, settings.temperature**2 * kl_N, ce_N)
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
        hit_N = student.top1_N == targets.observed_ids
        sums = {
            "total": total,
            "ce": _sum(ce_N),
            "kl": _sum(kl_N, soft_N),
            "tv": _sum(tv_N, tv_mask_N),
            "path": _sum(path_B),
            "accepted": _sum(accepted_B),
            "positions": _sum(torch.ones_like(ce_N)),
            "soft_positions": _sum(soft_N),
            "tv_positions": _sum(tv_mask_N),
            "blocks": _sum(usable_BxG.any(dim=1)),
            "known": _sum(targets.known, soft_N),
            "retained": _sum(1 - targets.tail.double(), soft_N),
            "target_entropy": _sum(-of_position(_p_log_p(log_p_K)), soft_N),
            "student_entropy": _sum(-of_position(_p_log_p(log_q_K)), soft_N),
            "hits": _sum(hit_N),
            "accepted_by_depth": (log_prefix_BxG.exp() * usable_BxG).sum(0, dtype=torch.float64),
            "accepted_count_by_depth": usable_BxG.sum(0, dtype=torch.float64),
            "matched_by_depth": to_blocks(hit_N).cumprod(dim=1).sum(0, dtype=torch.float64),
            "count_by_depth": to_blocks(torch.ones_like(hit_N)).sum(0, dtype=torch.float64),
        }
        return LossTerms(total, torch.cat([sums[name].double().reshape(-1) for name in (*SCALARS, *BY_DEPTH)]))


def outcome_kl(log_p_K: Tensor, log_q_K: Tensor, rows_K: Tensor, positions: int, temperature: float) -> Tensor:
    """[K] nats, each outcome's addend of KL(P_T ‖ Q_T), both sides tempered over outcomes. Not times T²."""
    # Where no token is outside the events, what float32 masses leave of a tail is rounding that no student can take.
    is_tail_K = torch.arange(len(log_q_K), device=log_q_K.device) < positions
    log_p_K = log_p_K.masked_fill(is_tail_K & log_q_K.isneginf(), -torch.inf)
    if temperature != 1:
        log_p_K, log_q_K = (_tempered(log_K, rows_K, positions, temperature) for log_K in (log_p_K, log_q_K))
    # 0 log 0 = 0 for any q, in value and gradient.
    some_K = log_p_K > -torch.inf
    return torch.where(some_K, log_p_K.exp() * (log_p_K.where(some_K, 0) - log_q_K.where(some_K, 0)), 0)


def path_term(
    log_q_N: Tensor, log_p_N: Tensor, to_blocks: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-n log(J / n) of every block in log space, J = sum_{m<=n} prod_{j<=m} min(1, q_j / p_j).

    A block counts up to its first position whose teacher logprob is unknown (NaN); n is this usable length.

    Returns:
        path_B: nats, 0 for a block with no usable position. accepted_B: its J, detached.
        log_prefix_BxG: log of the prefix products, detached. usable_BxG: bool, where they are known.
    """
    log_p_N = log_p_N.to(log_q_N.dtype)
    log_ratio_N = log_q_N - log_p_N.nan_to_num(0.0, neginf=0.0)
    # p = 0 accepts whatever q drafts; elsewhere min(1, q/p). -inf from the student's side keeps a finite floor.
    log_ratio_N = torch.where(log_p_N.isneginf(), 0, log_ratio_N).clamp(min=-1e30)
    log_accept_N = torch.where(log_ratio_N < 0, log_ratio_N, 0)
    usable_BxG = to_blocks(~log_p_N.isnan()).long().cumprod(dim=1).bool()
    log_prefix_BxG = to_blocks(log_accept_N).cumsum(dim=1)
    length_B = usable_BxG.sum(dim=1)
    # Unusable blocks would be log 0: give them one term of log 1, and drop them afterwards.
    kept_BxG = usable_BxG.clone()
    kept_BxG[:, 0] |= length_B == 0
    log_j_B = log_prefix_BxG.masked_fill(~kept_BxG, -torch.inf).logsumexp(dim=1)
    path_B = torch.where(length_B > 0, length_B * (length_B.clamp(min=1).to(log_j_B.dtype).log() - log_j_B), 0)
    accepted_B = torch.where(length_B > 0, log_j_B.detach().exp(), 0)
    return path_B, accepted_B, log_prefix_BxG.detach(), usable_BxG


def block_layout(targets: TargetBatch, block_length: int) -> Callable[[Tensor], Tensor]:
    """A function that lays [N] out as [B, G], zero or False past a block's end. Waits for the device, here only."""
    chosen = (targets.block >= 0).nonzero().squeeze(1)
    numbers, rows = targets.block[chosen].unique_consecutive(return_inverse=True)
    columns = targets.depth[chosen] - 1
    return lambda values_N: values_N.new_zeros(len(numbers), block_length).index_put((rows, columns), values_N[chosen])


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


def _tempered(log_K: Tensor, rows_K: Tensor, positions: int, temperature: float) -> Tensor:
    """Log masses to the power 1/T, normalized over each position's outcomes."""
    log_K = log_K / temperature
    normalizer_N = segment_logsumexp(log_K, rows_K, positions)
    return log_K - torch.where(normalizer_N.isneginf(), 0, normalizer_N)[rows_K]


def _p_log_p(log_p: Tensor) -> Tensor:
    return log_p.exp() * log_p.where(log_p > -torch.inf, 0)


def _sum(values: Tensor, where: Tensor | None = None) -> Tensor:
    """float64 0-dim. A mask instead of an index: indexing by one would wait for the device."""
    return (values if where is None else values.where(where, 0)).sum(dtype=torch.float64)


def loss_scale(global_targets: int, *, world_size: int, accumulation_steps: int) -> float:
    """A W / N: what a summed loss is multiplied by before `engine.backward`, so that the step's gradient is its mean.

    Args:
        global_targets: N, target tokens of the whole step, of all ranks, counted before any forward.
        world_size: W, data-parallel ranks (`engine.dp_world_size`). accumulation_steps: A, micro-batches of the step
            (`engine.gradient_accumulation_steps()`); 1 where `backward` is called with `scale_wrt_gas=False`.

    Returns: 0 for a step with no target at all, whose loss is 0 anyway.
    """
    return accumulation_steps * world_size / global_targets if global_targets else 0.0


def named_sums(sums: Tensor) -> dict[str, Tensor]:
    """Views of `LossTerms.sums` by name: 0-dim those of `SCALARS`, [G] those of `BY_DEPTH`."""
    by_depth = sums[len(SCALARS) :].view(len(BY_DEPTH), -1)
    return dict(zip((*SCALARS, *BY_DEPTH), (*sums[: len(SCALARS)], *by_depth), strict=True))


def summarize(sums: Tensor) -> dict[str, float | list[float | None] | None]:
    """Means for the log from (reduced) `LossTerms.sums`: per position, per soft position, per block, per depth.

    Returns: `loss` (total per position), `ce`, `kl`, `tv`, `path` in nats, `known_mass`, `retained_mass`,
    `target_entropy`, `entropy_gap` (student minus target, nats: above zero, the student is less certain than the
    teacher), `top1`, `accepted` (J), `alpha_by_depth` and `match_by_depth` (reached and accepted to depth d), and
    the counts `positions`, `soft_positions`, `blocks`. None where nothing was summed.
    """
    named = named_sums(sums.cpu())

    def mean(total: Tensor, count: str) -> float | None:
        return float(total / named[count]) if named[count] > 0 else None

    def means(totals: str, counts: str) -> list[float | None]:
        return [float(t / c) if c > 0 else None for t, c in zip(named[totals], named[counts], strict=True)]

    return {
        "loss": mean(named["total"], "positions"),
        "ce": mean(named["ce"], "positions"),
        "kl": mean(named["kl"], "soft_positions"),
        "tv": mean(named["tv"], "tv_positions"),
        "path": mean(named["path"], "blocks"),
        "accepted": mean(named["accepted"], "blocks"),
        "known_mass": mean(named["known"], "soft_positions"),
        "retained_mass": mean(named["retained"], "soft_positions"),
        "target_entropy": mean(named["target_entropy"], "soft_positions"),
        "entropy_gap": mean(named["student_entropy"] - named["target_entropy"], "soft_positions"),
        "top1": mean(named["hits"], "positions"),
        "alpha_by_depth": means("accepted_by_depth", "accepted_count_by_depth"),
        "match_by_depth": means("matched_by_depth", "count_by_depth"),
        **{count: float(named[count]) for count in ("positions", "soft_positions", "blocks")},
    }
