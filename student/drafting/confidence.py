"""How likely a drafted token is to be accepted, by the student's own confidence in it.

A student is not as right as it is sure: it was trained for another text's tokens than the target now says, and under
greedy decoding the target says its likeliest token, however unsure it is. So the chance is counted: the share of
tokens of about this confidence that were accepted, of those before which all were. `student evaluate` counts along
held-out responses; the policy goes on from there with what it sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

EDGES = np.array([0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99])
"""Between bins of confidence."""
BINS = len(EDGES) + 1


def bins(confidence: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    """The bin of each."""
    return np.digitize(confidence, EDGES)


def count(confidence_NxK: NDArray[np.floating[Any]], accepted_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """[2, BINS]: of N drafts of which the first `accepted` tokens each were accepted, the tokens verified and accepted.
    A token behind a rejected one was not verified.

    Args:
        confidence_NxK: 0 where a draft has no token.
    """
    bin_NxK = bins(confidence_NxK)
    depths_K = np.arange(confidence_NxK.shape[1])
    verified = (depths_K <= accepted_N[:, None]) & (confidence_NxK > 0)
    accepted = depths_K < accepted_N[:, None]
    return np.stack([np.bincount(bin_NxK[which], minlength=BINS) for which in (verified, accepted)])


class Calibration:
    """Chance of acceptance by confidence, counted while drafting.

    Args:
        start: chances by bin; null where nothing is known of the bin, and at first the student is taken at its word.
    """

    _FADE, _WEIGHT = 0.998, 20.0  # by draft; tries that a starting value counts for

    def __init__(self, start: Sequence[float | None] | None = None) -> None:
        middle = (np.append(EDGES, 1.0) + np.append(0.0, EDGES)) / 2
        known = [None] * BINS if start is None else start
        self._start = np.array([own if chance is None else chance for chance, own in zip(known, middle, strict=True)])
        self._counts = np.zeros((2, BINS))

    def record(self, confidence_NxK: NDArray[np.floating[Any]], accepted_N: NDArray[np.int64]) -> None:
        """What came of N drafts, as `count` takes them."""
        self._counts = self._counts * self._FADE ** len(accepted_N) + count(confidence_NxK, accepted_N)

    def __call__(self, confidence: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """The chance of each token, where those before it are accepted."""
        verified, accepted = self._counts
        shares = (accepted + self._WEIGHT * self._start) / (verified + self._WEIGHT)
        chances: NDArray[np.float64] = shares[bins(confidence)]
        return chances
