"""Do the stored distributions belong to the text? A one-position shift is silent otherwise, and ruins training.

Text sampled at temperature 1 gives its tokens E[p(y)] = E[Σ p²], the collision probability, which every row knows of
itself; greedy text gives them more. Rows shifted by a position give the realised tokens next to nothing. So the
ratio of the two means is about 1 or above where rows belong to their text, whatever the teacher's entropy, and far
below where they do not.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from shared.errors import AlignmentError
from student.alignment.targets import AlignedSample

MIN_RATIO = 0.6
"""Mean probability of the realised tokens over mean collision probability; rows below it are taken as shifted."""


def check_alignment(samples: Iterable[AlignedSample]) -> float:
    """Mean probability that the targets give to the realised student tokens, through the events that hold them.

    NaN where no position has a soft target.

    Raises:
        AlignmentError: if the mean is so low that rows and text cannot belong together.
    """
    realized, expected = probabilities(samples)
    if not len(realized):
        return float("nan")
    mean, collision = float(realized.mean()), float(expected.mean())
    if mean < MIN_RATIO * collision:
        raise AlignmentError(
            f"the stored rows give the realised tokens a mean probability of {mean:.3f}, where rows of this sharpness "
            f"give {collision:.3f} to their own text: rows and tokens do not belong together, as after a shift by one "
            "position; check how the dataset was collected (`shards validate`), collect it again and prepare again"
        )
    return mean


def probabilities(samples: Iterable[AlignedSample]) -> tuple[np.ndarray, np.ndarray]:
    """(mass of the event that holds the realised token, sum of squared event masses) of all anchors with a target.

    Only anchors: inside a teacher token, what is left of the row is certain too often to tell anything.
    """
    realized, expected = [], []
    for sample in samples:
        targets = sample.targets
        chosen = np.flatnonzero(sample.is_anchor & ~np.isnan(targets.tail))
        for i in chosen:
            first, stop = int(targets.event_offsets[i]), int(targets.event_offsets[i + 1])
            members = targets.members[targets.member_offsets[first] : targets.member_offsets[stop]]
            at = np.flatnonzero(members == sample.input_ids[sample.prompt_length + i])
            event = np.searchsorted(targets.member_offsets, targets.member_offsets[first] + at[:1], side="right") - 1
            realized.append(float(targets.event_mass[event[0]]) if len(event) else 0.0)
            mass = targets.event_mass[first:stop].astype(np.float64)
            expected.append(float((mass**2).sum()))
    return np.array(realized), np.array(expected)
