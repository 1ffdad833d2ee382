"""How long a step of the target, or a draft, takes: a line through what was measured while serving."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

WINDOW = 64
"""Measurements of each kind that a fit is over."""


class Fit:
    """Time as a + Σ b_i x_i over the last measurements, with no negative b but those that may be.

    The fit is made twice, and the second time a measurement counts for at most 1.5 times what the first says, so that a
    pause of the machine moves little. Where the x never varied, the fit is as flat as what was seen allows: what was
    not tried looks cheap. It is made anew after some measurements, not after each: it takes longer than all else here.

    Args:
        inputs: number of x. signed: so many of them, the last, may have a negative b.
        groups: of measurements; each keeps its last `WINDOW`.
    """

    def __init__(self, inputs: int, signed: int = 0, groups: int = 1) -> None:
        self._positive = inputs - signed
        self._seen_GxWx = np.zeros((groups, WINDOW, 1 + inputs))
        self.counts = np.zeros(groups, np.int64)
        """Measurements of each group."""
        self._coefficients: Floats | None = None
        self._fitted_G = np.zeros(groups, np.int64)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def record(self, seconds: float, *x: float, group: int = 0) -> None:
        self._seen_GxWx[group, self.counts[group] % WINDOW] = (seconds, *x)
        self.counts[group] += 1
        new_G = self.counts - self._fitted_G
        if ((new_G > 0) & (8 * new_G >= np.minimum(self._fitted_G, WINDOW))).any():
            self._coefficients = None

    def __call__(self, *x: Any) -> Any:
        """Seconds at x: numbers or arrays. Needs a measurement."""
        if self._coefficients is None:
            self._coefficients = self._solve()
            self._fitted_G = self.counts.copy()
        return sum((b * value for b, value in zip(self._coefficients[1:], x, strict=True)), self._coefficients[0])

    def _solve(self) -> Floats:
        kept = np.minimum(self.counts, WINDOW)
        seen = np.concatenate([group[:count] for group, count in zip(self._seen_GxWx, kept, strict=True)])
        seconds, inputs = seen[:, 0], seen[:, 1:]
        scale = np.maximum(inputs.max(0), 1e-9)
        columns = np.column_stack([np.ones(len(inputs)), inputs / scale])
        coefficients = _least_squares(columns, seconds, self._positive)
        coefficients = _least_squares(columns, np.minimum(seconds, 1.5 * columns @ coefficients), self._positive)
        coefficients[1:] /= scale
        return coefficients


def _least_squares(columns: Floats, seconds: Floats, positive: int) -> Floats:
    """Of the coefficients after the first, the constant, the next `positive` are zero where they would be negative."""
    coefficients = np.zeros(columns.shape[1])
    used = list(range(columns.shape[1]))
    while True:
        # A little ridge on all but the constant: they are zero where nothing speaks for them.
        X = columns[:, used]
        gram = X.T @ X + np.diag([0.0, *[1e-3] * (len(used) - 1)])
        solved = np.linalg.solve(gram, X.T @ seconds)
        negative = [place for place, x in enumerate(used) if 1 <= x <= positive and solved[place] < 0]
        if not negative:
            coefficients[used] = solved
            return coefficients
        used.pop(min(negative, key=lambda place: float(solved[place])))
