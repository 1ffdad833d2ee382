"""Do the stored distributions belong to the text? A one-position shift is silent otherwise, and ruins training.

Tokens sampled at temperature 1 have the expected probability E[p(y)] = E[Σ p²], the collision probability, which can
be computed from the rows alone; greedy tokens have more. Rows shifted by a position give the observed tokens next to
nothing. So the ratio of the two means is about 1 or above where rows belong to their text, whatever the teacher's
entropy, and far below where they do not.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from shared.errors import AlignmentError
from student.alignment.targets import AlignedSample

MIN_RATIO = 0.6
"""Mean probability of the observed tokens over mean collision probability; below it rows are taken as shifted."""


def check_alignment(samples: Iterable[AlignedSample]) -> float:
    """Mean probability that the targets give to the observed student tokens, through the events that hold them.

    NaN where no position has a soft target.

    Raises:
        AlignmentError: if the mean is so low that rows and text cannot belong together.
    """
    observed, expected = probabilities(samples)
    if not len(observed):
        return float("nan")
    mean, collision = float(observed.mean()), float(expected.mean())
    if mean < MIN_RATIO * collision:
        raise AlignmentError(
            f"the stored rows give the observed tokens a mean probability of {mean:.3f}, expected about "
            f"{collision:.3f} from rows as peaked as these: rows and tokens do not belong together, for example after "
            "a shift by one position; check the dataset (`shards validate`), collect it again and prepare again"
        )
    return mean


def probabilities(samples: Iterable[AlignedSample]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(mass of the event that holds the observed token, sum of squared event masses) of all anchors with a target.

    Only anchors: inside a teacher token, what is left of the row is certain too often to tell anything.
    """
    observed, expected = [np.empty(0)], [np.empty(0)]
    for sample in samples:
        targets = sample.targets
        chosen = sample.is_anchor & ~np.isnan(targets.tail)
        squares = np.concatenate([[0.0], np.cumsum(targets.event_mass.astype(np.float64) ** 2)])
        observed.append(observed_masses(sample)[chosen])
        expected.append((squares[targets.event_offsets[1:]] - squares[targets.event_offsets[:-1]])[chosen])
    return np.concatenate(observed), np.concatenate(expected)


def observed_masses(sample: AlignedSample) -> NDArray[np.float64]:
    """float64 [S], mass of the event that holds x_i: 0 where no event does, NaN where there is no target."""
    targets = sample.targets
    count = len(targets.tail)
    member_events = np.repeat(np.arange(len(targets.event_mass)), np.diff(targets.member_offsets))
    event_positions = np.repeat(np.arange(count), np.diff(targets.event_offsets))
    response = sample.input_ids[sample.prompt_length :]
    hits = member_events[targets.members == response[event_positions[member_events]]]
    masses = np.where(np.isnan(targets.tail), np.nan, 0.0)
    masses[event_positions[hits]] = targets.event_mass[hits]
    return masses
