from __future__ import annotations

import numpy as np
import pytest

from student.drafting.tokens import TokenBuffer, leading_matches


@pytest.mark.parametrize(
    ("a", "b", "matches"),
    [([1, 2], [1, 2, 3], 2), ([1, 9, 3], [1, 2, 3], 1), ([], [1], 0), ([1, 2], [1], 1), ([], [], 0), ([2], [1], 0)],
)
def test_leading_matches(a: list[int], b: list[int], matches: int) -> None:
    assert leading_matches(a, b) == leading_matches(b, a) == matches
    assert leading_matches(np.array(a, np.int32), np.array(b, np.int64)) == matches


def test_a_buffer_holds_what_was_written() -> None:
    """Random writes at random places, against a list."""
    rng = np.random.default_rng(0)
    buffer, expected = TokenBuffer(), []
    for _ in range(300):
        start, new = (
            int(rng.integers(max(0, len(expected) - 3), len(expected) + 1)),
            rng.integers(0, 99, rng.integers(9)),
        )
        buffer.write(start, new)
        expected[start:] = new.tolist()
        assert buffer.ids.tolist() == expected
        assert len(buffer) == len(expected)
    assert len(buffer) > 600
