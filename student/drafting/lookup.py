"""Drafts from the context itself: what followed an earlier occurrence of its last tokens (prompt lookup).

The search is that of vLLM's `ngram` method, compiled by numba when a `Lookup` is made (some seconds); a search is one
pass over the context, 4 µs at 100 tokens. A found draft is one-hot like LLaDA's, so it is lossless in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHORTEST, LONGEST = 2, 5
"""So many last tokens, at least, must have occurred before; the longest match counts, up to so many."""


class Lookup:
    """Finds up to `draft_tokens` tokens for rows of vLLM's batch."""

    def __init__(self, draft_tokens: int, max_model_len: int) -> None:
        from vllm.v1.spec_decode.ngram_proposer import _find_longest_matched_ngram_and_propose_tokens

        self.draft_tokens, self.max_model_len = draft_tokens, max_model_len
        self._search: Any = _find_longest_matched_ngram_and_propose_tokens
        self.find([0], np.array([1]), np.zeros((1, 1), np.int32))  # numba compiles now, not in the first step

    def find(self, rows: Iterable[int], lengths: NDArray[Any], tokens_RxL: NDArray[Any]) -> NDArray[np.int64]:
        """[R, K]: the tokens found for each of `rows`, then −1; no other row has any.

        Args:
            lengths: tokens of each row of the batch. tokens_RxL: their ids.
        """
        found_RxK = np.full((len(lengths), self.draft_tokens), -1, np.int64)
        for row in rows:
            context = tokens_RxL[row, : lengths[row]]
            draft = self._search(context, SHORTEST, LONGEST, self.max_model_len, self.draft_tokens)
            found_RxK[row, : len(draft)] = draft
        return found_RxK
