from __future__ import annotations

import numpy as np
import pytest

from student.drafting.tokens import leading_matches


@pytest.mark.parametrize(
    ("a", "b", "matches"),
    [([1, 2], [1, 2, 3], 2), ([1, 9, 3], [1, 2, 3], 1), ([], [1], 0), ([1, 2], [1], 1), ([], [], 0), ([2], [1], 0)],
)
def test_leading_matches(a: list[int], b: list[int], matches: int) -> None:
    assert leading_matches(a, b) == leading_matches(b, a) == matches
    assert leading_matches(np.array(a, np.int32), np.array(b, np.int64)) == matches
