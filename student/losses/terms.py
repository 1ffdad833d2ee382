"""What a loss function returns: the sum to differentiate, and detached sums for the log.

Everything is a sum, never a mean, so that micro-batches and ranks add up exactly; `summarize` divides at the
end. Legend: G the block length, index d - 1 for depth d.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(slots=True)
class LossTerms:
    """Sums over the N positions of a micro-batch. All but `total` are float64, detached and unweighted.

    Attributes:
        total: 0-dim, the weighted loss; the only differentiable field.
        ce: nats, -log q(realized token) over all positions.
        kl: nats, KL at the settings' temperature, without T², over soft positions.
        tv: total variation over soft positions of depth 1.
        path: nats, -log(J / n) over blocks, n their usable length.
        accepted: J over blocks, expected accepted tokens under ratio verification.
        positions, soft_positions, tv_positions, blocks: what these sums ran over.
        known: known conditional mass, over soft positions.
        retained: mass of the events (1 - tail), over soft positions.
        target_entropy, student_entropy: nats, over the events and the tail event, over soft positions.
        hits: positions whose most probable token is the realized one.
        accepted_by_depth: [G], sum over blocks of prod_{j<=d} min(1, q_j / p_j).
        accepted_count_by_depth: [G], blocks whose teacher logprobs are known to depth d.
        matched_by_depth: [G], blocks whose first d most probable tokens are all the realized ones.
        count_by_depth: [G], blocks that reach depth d.
    """

    total: Tensor
    ce: Tensor
    kl: Tensor
    tv: Tensor
    path: Tensor
    accepted: Tensor
    positions: Tensor
    soft_positions: Tensor
    tv_positions: Tensor
    blocks: Tensor
    known: Tensor
    retained: Tensor
    target_entropy: Tensor
    student_entropy: Tensor
    hits: Tensor
    accepted_by_depth: Tensor
    accepted_count_by_depth: Tensor
    matched_by_depth: Tensor
    count_by_depth: Tensor

    def sums(self) -> Tensor:
        """float64 [K], all sums in one vector, `total` first: add over micro-batches, all-reduce over ranks."""
        return torch.cat([getattr(self, f.name).detach().double().reshape(-1) for f in fields(self)])


def terms_from_sums(sums: Tensor) -> LossTerms:
    """Inverse of `LossTerms.sums`, with a detached `total`."""
    names = [f.name for f in fields(LossTerms)]
    scalars = len(names) - 4
    block_length = (sums.shape[0] - scalars) // 4
    values = [*sums[:scalars].unbind(), *sums[scalars:].split(block_length)]
    return LossTerms(**dict(zip(names, values, strict=True)))


def summarize(sums: Tensor) -> dict[str, float | list[float | None] | None]:
    """Means for the log from (reduced) `LossTerms.sums`: per position, per soft position, per block, per depth.

    Returns: `loss` (total per position), `ce`, `kl`, `tv`, `path` in nats, `known_mass`, `retained_mass`,
    `target_entropy`, `entropy_gap` (student minus target, nats: above zero, the student is less certain than the
    teacher), `top1`, `accepted` (J), `alpha_by_depth` and `match_by_depth` (reached and accepted to depth d), and
    the counts `positions`, `soft_positions`, `blocks`. None where nothing was summed.
    """
    terms = terms_from_sums(sums.cpu())

    def mean(total: Tensor, count: Tensor) -> float | None:
        return float(total / count) if count > 0 else None

    def means(totals: Tensor, counts: Tensor) -> list[float | None]:
        return [mean(t, c) for t, c in zip(totals, counts, strict=True)]

    return {
        "loss": mean(terms.total, terms.positions),
        "ce": mean(terms.ce, terms.positions),
        "kl": mean(terms.kl, terms.soft_positions),
        "tv": mean(terms.tv, terms.tv_positions),
        "path": mean(terms.path, terms.blocks),
        "accepted": mean(terms.accepted, terms.blocks),
        "known_mass": mean(terms.known, terms.soft_positions),
        "retained_mass": mean(terms.retained, terms.soft_positions),
        "target_entropy": mean(terms.target_entropy, terms.soft_positions),
        "entropy_gap": mean(terms.student_entropy - terms.target_entropy, terms.soft_positions),
        "top1": mean(terms.hits, terms.positions),
        "alpha_by_depth": means(terms.accepted_by_depth, terms.accepted_count_by_depth),
        "match_by_depth": means(terms.matched_by_depth, terms.count_by_depth),
        "positions": float(terms.positions),
        "soft_positions": float(terms.soft_positions),
        "blocks": float(terms.blocks),
    }
