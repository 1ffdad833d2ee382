"""How far two sequences of token ids agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

TokenIds = Sequence[int] | NDArray[np.integer[Any]]


def leading_matches(a: TokenIds, b: TokenIds) -> int:
    """How many tokens at the start of both sequences are the same."""
    shorter = min(len(a), len(b))
    differs = np.asarray(a[:shorter]) != np.asarray(b[:shorter])
    return int(differs.argmax()) if differs.any() else shorter
