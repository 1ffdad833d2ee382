"""Looking into a batch of targets, and cutting it."""

from __future__ import annotations

import pytest
import torch

from student.losses.targets import depth_weights
from tests.fixtures.loss_cases import concatenate, event_probabilities, random_targets, targets_from_events

EVENTS = [[(0.5, [1]), (0.25, [2, 3])], None, [(1.0, [4, 5, 6])]]


def test_rows_of_events_and_events_of_members():
    targets = targets_from_events(EVENTS, [1, 2, 4])
    assert targets.event_rows().tolist() == [0, 0, 2]
    assert targets.member_events().tolist() == [0, 1, 1, 2, 2, 2]
    empty = targets_from_events([], [])
    assert len(empty) == len(empty.event_rows()) == len(empty.member_events()) == 0


def test_a_slice_stands_for_its_positions():
    targets = targets_from_events(EVENTS, [1, 2, 4])
    cut = targets.slice(1, 3, slice(2, 3), slice(3, 6))
    assert cut.event_offsets.tolist() == [0, 0, 1]
    assert cut.member_offsets.tolist() == [0, 3]
    assert cut.members.tolist() == [4, 5, 6]
    assert cut.observed_ids.tolist() == [2, 4]


def test_slices_put_together_are_the_batch():
    targets = random_targets(0, 10, 30, block_length=5, most_events=3)
    event, member = int(targets.event_offsets[5]), int(targets.member_offsets[targets.event_offsets[5]])
    cuts = [
        targets.slice(0, 5, slice(0, event), slice(0, member)),
        targets.slice(5, 10, slice(event, len(targets.event_mass)), slice(member, len(targets.members))),
    ]
    q = torch.randn(10, 30).softmax(1)
    whole = event_probabilities(q, targets)
    for rows in (
        event_probabilities(q, concatenate(cuts)),
        [r for c, x in zip(cuts, q.split(5), strict=True) for r in event_probabilities(x, c)],
    ):
        for ours, theirs in zip(rows, whole, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_depth_weights_decay_and_leave_random_masking_alone(decay):
    assert depth_weights(torch.tensor([1, 2, 3, 0]), decay).tolist() == [1, decay, decay**2, 1]
