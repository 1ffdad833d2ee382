"""How long a step of the target, or a draft, takes, by what was measured while serving on a machine whose speed drifts.

On a machine that others share, the time of one and the same step wanders: by a factor of two within seconds on the
demo's, with a correlation of 0.8 from a step to the next and 0.55 over five. A line through absolute times takes slow
moments for costly steps. So a measurement is compared with the mean of those just before it, which the drift moves too:

    t - mean(t) = b · (x - mean(x)) + noise        means over the last steps, with weights that fall by an eighth a step

and the time at x is expected to be mean(t) + b · (x - mean(x)).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

WINDOW = 64
"""Measurements of each kind that a fit is over."""
_NEWEST = 1 / 8
"""Weight of the newest measurement in the means."""
_MOST = 1.5
"""A measurement counts for at most so many times what was expected: a pause of the machine moves little."""
_VARIED = 0.02
"""Of its largest value, by which an x has to differ from its mean."""
_LEAST = 0.1
"""No time is expected to be less than this share of the mean."""


class Fit:
    """Seconds by x, with no negative b but those that may be.

    Where an x never varied its b is zero: what was not tried looks cheap. The fit is made anew after some measurements,
    not after each: it takes longer than all else here.

    Args:
        inputs: number of x. signed: so many of them, the last, may have a negative b.
        groups: of measurements; each keeps its last `WINDOW`.
    """

    def __init__(self, inputs: int, signed: int = 0, groups: int = 1) -> None:
        self._positive = inputs - signed
        self._changes_GxWx = np.zeros((groups, WINDOW, 1 + inputs))
        """(seconds, x), less the means at the time, where an x differed from its mean: the others say nothing of b."""
        self._mean: Floats | None = None
        self._largest = np.full(inputs, 1e-9)
        self.counts = np.zeros(groups, np.int64)
        """Measurements of each group."""
        self._kept_G = np.zeros(groups, np.int64)
        self._slopes: Floats | None = np.zeros(inputs)
        self._fitted_G = np.zeros(groups, np.int64)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def record(self, seconds: float, *x: float, group: int = 0) -> None:
        if self._mean is None:
            self._mean = np.array([seconds, *x])
        seen = np.array([min(seconds, _MOST * float(self(*x))), *x])
        change = seen - self._mean
        self._mean += _NEWEST * change
        self.counts[group] += 1
        self._largest = np.maximum(self._largest, np.abs(seen[1:]))
        if (np.abs(change[1:]) < _VARIED * self._largest).all():
            return
        self._changes_GxWx[group, self._kept_G[group] % WINDOW] = change
        self._kept_G[group] += 1
        new_G = self._kept_G - self._fitted_G
        if ((new_G > 0) & (8 * new_G >= np.minimum(self._fitted_G, WINDOW))).any():
            self._slopes = None

    def __call__(self, *x: Any) -> Any:
        """Seconds at x: numbers or arrays. Needs a measurement."""
        assert self._mean is not None
        if self._slopes is None:
            self._slopes = self._solve()
            self._fitted_G = self._kept_G.copy()
        mean, *mean_x = self._mean
        expected = mean + sum(b * (value - there) for b, value, there in zip(self._slopes, x, mean_x, strict=True))
        return np.maximum(expected, _LEAST * mean)

    def _solve(self) -> Floats:
        kept = np.minimum(self._kept_G, WINDOW)
        changes = np.concatenate([group[:count] for group, count in zip(self._changes_GxWx, kept, strict=True)])
        return _least_squares(changes[:, 1:] / self._largest, changes[:, 0], self._positive) / self._largest


def _least_squares(columns: Floats, seconds: Floats, positive: int) -> Floats:
    """The slopes; of these, the first `positive` are zero where they would be negative."""
    slopes = np.zeros(columns.shape[1])
    used = list(range(columns.shape[1]))
    while used:
        # A little ridge: they are zero where nothing speaks for them.
        X = columns[:, used]
        solved = np.linalg.solve(X.T @ X + 1e-3 * np.eye(len(used)), X.T @ seconds)
        negative = [place for place, x in enumerate(used) if x < positive and solved[place] < 0]
        if not negative:
            slopes[used] = solved
            break
        used.pop(min(negative, key=lambda place: float(solved[place])))
    return slopes
