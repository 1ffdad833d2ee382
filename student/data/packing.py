"""Several samples in one row: best fit decreasing, a heuristic of bin packing.

It needs at most 11/9 of the fewest rows possible, plus a constant (D. S. Johnson, "Near-optimal bin packing
algorithms", 1973). With samples of mixed lengths, many to a row, hardly any room is left.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
from numpy.typing import NDArray

WINDOW = 8192
"""Samples that are packed together: enough to fill rows, few enough that a million samples take seconds."""


def pack(lengths: NDArray[np.int64], capacity: int) -> list[NDArray[np.int64]]:
    """Rows of sample numbers, 0 ≤ number < n, each of at most `capacity` tokens; every sample is in one.

    Args:
        lengths: int64 [n], tokens of each sample, none above `capacity`. Each `WINDOW` of them is packed apart.
    """
    rows: list[NDArray[np.int64]] = []
    for start in range(0, len(lengths), WINDOW):
        rows += (start + np.array(row) for row in _best_fit_decreasing(lengths[start : start + WINDOW], capacity))
    return rows


def _best_fit_decreasing(lengths: NDArray[np.int64], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (tokens of room, row), rising
    for number in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[number])
        place = bisect_left(open_rows, (length, -1))
        if place < len(open_rows):
            room, row = open_rows.pop(place)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(number)
        insort(open_rows, (room - length, row))
    return rows
