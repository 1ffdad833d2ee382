"""How many tokens of a draft are accepted, by who made it, from what was accepted lately.

Letters: R requests (rows of the batch), K most tokens of a draft, M the two makers of drafts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MAKERS = ("llada", "lookup")
LLADA, LOOKUP = 0, 1


class Acceptance:
    """Chances that the k-th drafted token is accepted where those before it were, by request and over all.

    Counts fade with each draft: a request remembers about ten drafts, all requests together about a hundred. A new
    request starts from what all have shown; before any draft a token has a chance of 0.6, so that drafts are tried.
    """

    _FADE, _FADE_ALL, _FIRST = 0.9, 0.99, 0.6
    _WEIGHT, _WEIGHT_ALL = 4.0, 2.0  # tries that a request's, and the overall, starting value counts for

    def __init__(self, rows: int, draft_tokens: int) -> None:
        self.hits_RxMxK, self.tries_RxMxK = np.zeros((2, rows, len(MAKERS), draft_tokens))
        self._hits_MxK, self._tries_MxK = np.zeros((2, len(MAKERS), draft_tokens))

    def move(self, source_R: Ints) -> None:
        """Row r is now what was row `source_R[r]`; −1 is a new request."""
        for counts in (self.hits_RxMxK, self.tries_RxMxK):
            counts[: len(source_R)] = np.where((source_R >= 0)[:, None, None], counts[source_R], 0.0)

    def record(self, rows: Ints, maker: int, asked: Ints, accepted: Ints) -> None:
        """For each of `rows`: of `asked` tokens the first `accepted` were accepted, and the next, if any, was not."""
        depths_K = np.arange(self.hits_RxMxK.shape[2])
        hits = (depths_K < accepted[:, None]).astype(float)
        tries = (depths_K < np.minimum(accepted + 1, asked)[:, None]).astype(float)
        for counts, all_counts, new in (
            (self.hits_RxMxK, self._hits_MxK, hits),
            (self.tries_RxMxK, self._tries_MxK, tries),
        ):
            counts[rows, maker] = counts[rows, maker] * self._FADE + new
            all_counts[maker] = all_counts[maker] * self._FADE_ALL ** len(rows) + new.sum(0)

    def tries(self, maker: int) -> float:
        """Drafts that the overall chances rest on."""
        return float(self._tries_MxK[maker, 0])

    def _shares(self) -> Floats:
        shares: Floats = (self._hits_MxK + self._WEIGHT_ALL * self._FIRST) / (self._tries_MxK + self._WEIGHT_ALL)
        return shares

    def overall(self, maker: int) -> Floats:
        """[K]: the chance that the first k tokens of a new request's draft are all accepted."""
        return self._shares()[maker].cumprod()

    def survival(self, rows: int) -> Floats:
        """[R, M, K]: the chance that the first k tokens of a draft are all accepted."""
        hits, tries = self.hits_RxMxK[:rows], self.tries_RxMxK[:rows]
        return ((hits + self._WEIGHT * self._shares()) / (tries + self._WEIGHT)).cumprod(-1)
