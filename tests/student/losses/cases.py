"""Random targets and dense oracles that the loss tests share. The oracles use none of the code under test."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from student.losses import dense
from student.losses.objective import named_sums
from student.losses.settings import LossSettings
from student.losses.targets import TargetBatch


def targets_from_events(
    events: list[list[tuple[float, list[int]]] | None],
    observed: list[int],
    *,
    block_length: int = 1,
    observed_logprob: list[float] | None = None,
    weight: list[float] | None = None,
) -> TargetBatch:
    """Positions given as lists of (mass, members), or None for no soft target; blocks of `block_length` in order."""
    count = len(observed)
    rows = [e or [] for e in events]
    flat = [event for row in rows for event in row]
    soft = [e is not None for e in events]
    tail = [1 - sum(mass for mass, _ in row) if s else float("nan") for row, s in zip(rows, soft, strict=True)]
    return TargetBatch(
        observed_ids=torch.tensor(observed, dtype=torch.int64),
        observed_logprob=torch.tensor(observed_logprob or [float("nan")] * count, dtype=torch.float32),
        depth=torch.arange(count) % block_length + 1,
        block=torch.arange(count) // block_length,
        weight=torch.tensor(weight or [1.0] * count),
        has_soft=torch.tensor(soft, dtype=torch.bool),
        event_offsets=torch.tensor(np.cumsum([0, *map(len, rows)])),
        event_mass=torch.tensor([mass for mass, _ in flat], dtype=torch.float32),
        member_offsets=torch.tensor(np.cumsum([0, *(len(members) for _, members in flat)])),
        members=torch.tensor([m for _, members in flat for m in members], dtype=torch.int64),
        tail=torch.tensor(tail, dtype=torch.float32),
        known=torch.ones(count),
    )


def random_targets(seed: int, positions: int, vocabulary: int, block_length: int, most_events: int) -> TargetBatch:
    """Events of one to three members, some positions without soft target or teacher logprob, the last block cut short.

    About one row in ten has mass on all of a small vocabulary, one event of mass 1, or an empty tail.
    """
    rng = np.random.default_rng(seed)
    events: list[list[tuple[float, list[int]]] | None] = []
    for _ in range(positions):
        if rng.random() < 0.2:
            events.append(None)
            continue
        order = rng.permutation(vocabulary).tolist()
        row = []
        for _ in range(rng.integers(1, most_events + 1)):
            members, order = order[: (size := int(rng.integers(1, 4)))], order[size:]
            if members:
                row.append(members)
        whole = rng.random() < 0.1
        if whole and order:
            row.append(order)
        mass = rng.dirichlet(np.ones(len(row) + 1))
        if whole or rng.random() < 0.1:
            mass[:-1] /= mass[:-1].sum()
        events.append([(float(np.float32(m)), members) for m, members in zip(mass[:-1], row, strict=True)])
    logprob = np.where(rng.random(positions) < 0.1, np.nan, -rng.exponential(3, positions))
    batch = targets_from_events(
        events,
        rng.integers(0, vocabulary, positions).tolist(),
        block_length=block_length,
        observed_logprob=logprob.tolist(),
        weight=rng.random(positions).tolist(),
    )
    # A row whose members are the whole vocabulary leaves nothing outside; float32 rounding must not say otherwise.
    batch.tail = torch.where(batch.tail.abs() < 1e-5, 0, batch.tail)
    if positions > 2:
        # Two positions of random masking, in no block.
        batch.depth[-2:], batch.block[-2:] = 0, -1
    return batch


def dense_terms(logits_NxV: Tensor, targets: TargetBatch, settings: LossSettings) -> SimpleNamespace:
    """`dense.distillation_loss`: its `total` and `sums`, and each of the sums under its name."""
    terms = dense.distillation_loss(logits_NxV, targets, settings)
    return SimpleNamespace(**named_sums(terms.sums) | terms._asdict())


def event_probabilities(probabilities_NxV: Tensor, targets: TargetBatch) -> list[Tensor]:
    """Per position: the probabilities of its events and, last, of everything else, by adding up dense rows."""
    rows = []
    for i in range(len(targets)):
        inside, values = torch.zeros(probabilities_NxV.shape[1], dtype=torch.bool), []
        for e in range(int(targets.event_offsets[i]), int(targets.event_offsets[i + 1])):
            members = targets.members[int(targets.member_offsets[e]) : int(targets.member_offsets[e + 1])]
            inside[members] = True
            values.append(probabilities_NxV[i, members].sum())
        values.append(probabilities_NxV[i, ~inside].sum())
        rows.append(torch.stack(values))
    return rows


def target_probabilities(targets: TargetBatch, position: int) -> Tensor:
    """float64, the position's event masses and, last, its tail."""
    events = slice(int(targets.event_offsets[position]), int(targets.event_offsets[position + 1]))
    return torch.cat([targets.event_mass[events], targets.tail[position : position + 1]]).double()


def concatenate(batches: list[TargetBatch]) -> TargetBatch:
    """One micro-batch of several, blocks renumbered."""
    blocks, events, members = 0, 0, 0
    shifted = []
    for batch in batches:
        shifted.append((torch.where(batch.block >= 0, batch.block + blocks, -1), events, members))
        blocks += int(batch.block.max().clamp(min=-1)) + 1 if len(batch) else 0
        events, members = events + len(batch.event_mass), members + len(batch.members)
    joined = {f.name: torch.cat([getattr(b, f.name) for b in batches]) for f in fields(TargetBatch)}
    joined["block"] = torch.cat([block for block, _, _ in shifted])
    for name, shifts in (("event_offsets", [e for _, e, _ in shifted]), ("member_offsets", [m for _, _, m in shifted])):
        parts = [getattr(b, name)[:-1] + shift for b, shift in zip(batches, shifts, strict=True)]
        joined[name] = torch.cat([*parts, torch.tensor([events if name == "event_offsets" else members])])
    return TargetBatch(**joined)
