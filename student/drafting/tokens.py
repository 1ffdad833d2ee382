"""Sequences of token ids: one that grows in place, and how far two agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

TokenIds = Sequence[int] | NDArray[np.integer[Any]]


class TokenBuffer:
    """Token ids in an int32 array that doubles when it is full, so that a step costs its own tokens alone."""

    def __init__(self) -> None:
        self._storage = np.empty(256, np.int32)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def ids(self) -> NDArray[np.int32]:
        """A view; valid until the next `write`."""
        return self._storage[: self._length]

    def write(self, start: int, ids: TokenIds) -> None:
        """Put `ids` at `start`, which is at most the length, and end there."""
        stop = start + len(ids)
        if stop > len(self._storage):
            self._storage = np.concatenate((self._storage, np.empty(stop, np.int32)))
        self._storage[start:stop] = ids
        self._length = stop


def leading_matches(a: TokenIds, b: TokenIds) -> int:
    """How many tokens at the start of both sequences are the same."""
    shorter = min(len(a), len(b))
    differs = np.asarray(a[:shorter]) != np.asarray(b[:shorter])
    return int(differs.argmax()) if differs.any() else shorter
