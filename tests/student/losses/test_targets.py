"""Gathering the targets of selected positions of several samples into one batch."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from student.alignment.targets import AlignedSample, SparseTargets
from student.losses.targets import Selection, gather_targets


def sample(seed: int, positions: int) -> tuple[AlignedSample, list[list[tuple[float, list[int]]] | None]]:
    """A sample with random events, and the same events as plain lists (None: no soft target)."""
    rng = np.random.default_rng(seed)
    events: list[list[tuple[float, list[int]]] | None] = []
    for _ in range(positions):
        masses = rng.random(rng.integers(0, 4)).astype(np.float32) / 4
        row = [(float(mass), rng.integers(0, 99, rng.integers(1, 4)).tolist()) for mass in masses]
        events.append(row or None)
    flat = [event for row in events for event in row or []]
    tail = [np.nan if row is None else 1 - sum(m for m, _ in row) for row in events]
    targets = SparseTargets(
        event_offsets=np.cumsum([0, *(len(row or []) for row in events)]),
        event_mass=np.array([m for m, _ in flat], np.float32),
        member_offsets=np.cumsum([0, *(len(members) for _, members in flat)]),
        members=np.array([v for _, members in flat for v in members], np.int32),
        tail=np.array(tail, np.float32),
        known=rng.random(positions).astype(np.float32),
    )
    aligned = AlignedSample(
        sample_id=str(seed), prompt_id="p", split="train", rule="sample", skill="test",
        input_ids=rng.integers(0, 99, positions + 3).astype(np.int32), prompt_length=3,
        byte_ends=np.arange(positions), is_anchor=np.ones(positions, bool),
        teacher_index=np.arange(positions, dtype=np.int32), realized_logprob=-rng.random(positions).astype(np.float32),
        targets=targets, teacher_ids=np.zeros(0, np.int32), teacher_byte_ends=np.zeros(0, np.int64),
        teacher_sampled_logprob=np.zeros(0, np.float32),
    )  # fmt: skip
    return aligned, events


def test_positions_keep_their_order_events_and_numbers():
    first, first_events = sample(1, 9)
    second, second_events = sample(2, 7)
    selections = [
        Selection(first, np.array([4, 5, 6]), in_block=True, weight=np.array([1, 0.5, 0.25], np.float32)),
        Selection(first, np.array([0, 8]), in_block=False),
        Selection(second, np.array([2, 3]), in_block=True),
    ]
    batch = gather_targets(selections)
    expected = [first_events[i] for i in (4, 5, 6, 0, 8)] + [second_events[i] for i in (2, 3)]
    assert len(batch) == 7
    assert batch.depth.tolist() == [1, 2, 3, 0, 0, 1, 2]
    assert batch.block.tolist() == [0, 0, 0, -1, -1, 1, 1]
    assert batch.weight.tolist() == [1, 0.5, 0.25, 1, 1, 1, 1]
    assert batch.has_soft.tolist() == [e is not None for e in expected]
    assert batch.realized_ids.tolist() == [*first.input_ids[[7, 8, 9, 3, 11]], *second.input_ids[[5, 6]]]
    assert batch.known.tolist() == [*first.targets.known[[4, 5, 6, 0, 8]], *second.targets.known[[2, 3]]]
    found = []
    for start, stop in itertools.pairwise(batch.event_offsets.tolist()):
        members = [batch.members[slice(*batch.member_offsets[e : e + 2])].tolist() for e in range(start, stop)]
        found.append(list(zip(batch.event_mass[start:stop].tolist(), members, strict=True)) or None)
    assert found == expected
    assert batch.members.dtype == batch.realized_ids.dtype == torch.int64


def test_nothing_selected_is_an_empty_batch():
    empty = gather_targets([])
    assert len(empty) == 0
    assert empty.event_offsets.tolist() == [0]
    assert len(gather_targets([Selection(sample(1, 4)[0], np.zeros(0, np.int64), in_block=True)])) == 0
