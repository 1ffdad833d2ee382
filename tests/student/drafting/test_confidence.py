from __future__ import annotations

import numpy as np

from student.drafting.confidence import BINS, EDGES, Calibration, bins, count


def test_what_was_counted_outweighs_what_was_assumed() -> None:
    """Tokens that are right less often than the student is sure: their bin's chance, alone, comes near the share."""
    calibration, rng = Calibration(), np.random.default_rng(0)
    before = calibration(np.array([0.2, 0.92]))
    for _ in range(2000):
        calibration.record(np.array([[0.92]]), np.array([rng.random() < 0.4], int))
    after = calibration(np.array([0.2, 0.92]))
    assert before[1] > 0.9
    assert abs(after[1] - 0.4) < 0.08
    assert after[0] == before[0]


def test_measured_chances_are_the_start() -> None:
    chances = [None, *np.linspace(0.1, 0.9, BINS - 1).tolist()]
    start = Calibration(chances)(np.append(0.0, EDGES))
    assert start[0] == Calibration()(np.zeros(1))[0], "a bin that nothing is known of"
    np.testing.assert_allclose(start[1:], chances[1:])


def test_drafts_are_counted_up_to_their_first_rejected_token() -> None:
    confidence = np.array([[0.995, 0.5, 0.5, 0.01]])
    places = bins(confidence[0])
    verified, accepted = count(confidence, np.array([2]))
    assert (verified[places[0]], accepted[places[0]]) == (1, 1)
    assert (verified[places[1]], accepted[places[1]]) == (2, 1)
    assert (verified.sum(), accepted.sum()) == (3, 2)
    assert count(confidence, np.array([4])).sum() == 8
    assert not count(np.zeros((1, 0)), np.array([0])).any()


def test_drafts_of_one_step_are_counted_together() -> None:
    confidence = np.array([[0.7, 0.3, 0.2], [0.92, 0.92, 0.0], [0.4, 0.0, 0.0]])
    accepted = np.array([1, 2, 0])
    alone = [count(row[None, row > 0], accepted[[at]]) for at, row in enumerate(confidence)]
    np.testing.assert_array_equal(count(confidence, accepted), sum(alone))
    assert sum(alone).sum() == 5 + 3
