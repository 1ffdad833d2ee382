from __future__ import annotations

import numpy as np

from student.drafting.confidence import BINS, EDGES, Calibration, bins, count


def test_what_was_counted_outweighs_what_was_assumed() -> None:
    """Tokens that are right less often than the student is sure: their bin's chance, alone, comes near the share."""
    calibration, rng = Calibration(), np.random.default_rng(0)
    before = calibration(np.array([0.2, 0.92]))
    for _ in range(2000):
        calibration.record([0.92], int(rng.random() < 0.4))
    after = calibration(np.array([0.2, 0.92]))
    assert before[1] > 0.9
    assert abs(after[1] - 0.4) < 0.08
    assert after[0] == before[0]


def test_measured_chances_are_the_start() -> None:
    chances = [None, *np.linspace(0.1, 0.9, BINS - 1).tolist()]
    start = Calibration(chances)(np.append(0.0, EDGES))
    assert start[0] == Calibration()(np.zeros(1))[0], "a bin that nothing is known of"
    np.testing.assert_allclose(start[1:], chances[1:])


def test_a_draft_is_counted_up_to_its_first_rejected_token() -> None:
    confidence = [0.995, 0.5, 0.5, 0.01]
    places = bins(np.array(confidence))
    verified, accepted = count(confidence, 2)
    assert (verified[places[0]], accepted[places[0]]) == (1, 1)
    assert (verified[places[1]], accepted[places[1]]) == (2, 1)
    assert (verified.sum(), accepted.sum()) == (3, 2)
    assert count(confidence, 4).sum() == 8
    assert not count([], 0).any()
