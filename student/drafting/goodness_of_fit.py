"""Do sampled tokens follow the teacher's rows? A test over all of them at once, each against a row of its own.

The vocabulary is cut by rank in the teacher's row: the likeliest token, the second, 3 to 5, 6 to 20, the rest. With
c_n [C] the row's probability of each class and x_n [C] the one-hot class of the token that came out, x_n - c_n has
mean 0 given all that came before, however the context came about. So the sum over all tokens is a martingale with
covariance V = Σ diag(c_n) - c_n c_nᵀ, by its central limit theorem S = Σ x_n - c_n is normal, and

    Q = Sᵀ V⁻¹ S  is χ² with C - 1 degrees of freedom

(Pearson's statistic where all rows are equal; for the limit, Hall and Heyde, Martingale Limit Theory, 1980, th. 3.2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

CANDIDATES = 20
"""Tokens of a row that the classes need."""
_FIRST_OF_CLASS = np.array([1, 2, 3, 6, CANDIDATES + 1])
CLASSES = ("1", "2", "3-5", "6-20", "others")
POSITIONS = ("1", "2", "3", "4", "5-8", "9-16", "17 on")
_FIRST_OF_POSITION = np.array([1, 2, 3, 4, 5, 9, 17])
LEVEL = 1e-3
"""Sampling that is right fails this often."""
_NONCENTRALITY = 6.34
"""Root of the noncentrality at which χ² with 4 degrees of freedom is above its LEVEL in 99 of 100 tests."""


@dataclass
class Tally:
    """Sums over sampled tokens.

    Attributes:
        observed_C, expected_C: tokens of each class, and what the rows say. covariance_CxC: V above.
        positions: for each of `POSITIONS` in the response: tokens, the sum of their logprobs, those of rank above 5.
    """

    observed_C: list[float] = field(default_factory=lambda: [0.0] * len(CLASSES))
    expected_C: list[float] = field(default_factory=lambda: [0.0] * len(CLASSES))
    covariance_CxC: list[list[float]] = field(default_factory=lambda: np.zeros((len(CLASSES),) * 2).tolist())
    positions: list[list[float]] = field(default_factory=lambda: np.zeros((len(POSITIONS), 3)).tolist())

    def add(self, ranks_T: ArrayLike, logprobs_T: ArrayLike, rows_TxK: ArrayLike) -> None:
        """Count a response.

        Args:
            ranks_T: of each token in its row, from 1. logprobs_T: its own, in nats.
            rows_TxK: logprobs of each row's `CANDIDATES` likeliest tokens, in any order.
        """
        ranks_T, logprobs_T = np.asarray(ranks_T), np.asarray(logprobs_T)
        p_TxK = -np.sort(-np.exp(np.asarray(rows_TxK, np.float64)), axis=1)
        c_TxC = np.add.reduceat(p_TxK, _FIRST_OF_CLASS[:-1] - 1, axis=1)
        c_TxC = np.column_stack([c_TxC, np.maximum(1 - c_TxC.sum(1), 0)])
        class_T = np.searchsorted(_FIRST_OF_CLASS, ranks_T, side="right") - 1
        self.observed_C = (self.observed_C + np.bincount(class_T, minlength=len(CLASSES))).tolist()
        self.expected_C = (self.expected_C + c_TxC.sum(0)).tolist()
        self.covariance_CxC = (self.covariance_CxC + np.diag(c_TxC.sum(0)) - c_TxC.T @ c_TxC).tolist()
        place_T = np.searchsorted(_FIRST_OF_POSITION, np.arange(1, len(ranks_T) + 1), side="right") - 1
        positions = np.array(self.positions)
        np.add.at(positions, place_T, np.column_stack([np.ones(len(ranks_T)), logprobs_T, ranks_T > 5]))
        self.positions = positions.tolist()

    def figures(self) -> dict[str, Any]:
        """The test's result: `p`; `detectable`, the change of the likeliest token's probability, over all rows, that
        would fail in 99 of 100 such tests; and what came out by class and position."""
        tokens = sum(self.observed_C)
        deviation_C = np.subtract(self.observed_C, self.expected_C)
        covariance_CxC = np.array(self.covariance_CxC)
        # Classes that no row gives a probability carry no freedom; a token in one of them cannot be.
        possible_C = np.diag(covariance_CxC) > 1e-9 * max(tokens, 1)
        freedom = max(int(possible_C.sum()) - 1, 0)
        kept = np.flatnonzero(possible_C)[:freedom]
        statistic = float(deviation_C[kept] @ np.linalg.solve(covariance_CxC[np.ix_(kept, kept)], deviation_C[kept]))
        if (np.abs(deviation_C[~possible_C]) > 0.5).any():
            statistic = math.inf
        half_freedom = torch.tensor(max(freedom, 1) / 2, dtype=torch.float64)
        spread = math.sqrt(covariance_CxC[0, 0])
        by_position = {
            name: {"tokens": int(count), "mean_logprob": logprob / count, "outside_top_5": outside / count}
            for name, (count, logprob, outside) in zip(POSITIONS, self.positions, strict=True)
            if count
        }
        return {
            "tokens": int(tokens),
            "p": float(torch.special.gammaincc(half_freedom, torch.tensor(statistic / 2, dtype=torch.float64))),
            "detectable": _NONCENTRALITY * spread / tokens if tokens else None,
            "observed": dict(zip(CLASSES, self.observed_C, strict=True)),
            "expected": dict(zip(CLASSES, self.expected_C, strict=True)),
            "by_position": by_position,
        }
