from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from student.data.packing import WINDOW, pack


@given(lengths=st.lists(st.integers(1, 50), max_size=60), capacity=st.integers(50, 120))
def test_every_sample_is_in_one_row_and_no_row_is_too_long(lengths: list[int], capacity: int) -> None:
    sizes = np.array(lengths, dtype=np.int64)
    rows = pack(sizes, capacity)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert all(sizes[row].sum() <= capacity for row in rows)
    # Two rows that fit into one were never both opened.
    used = sorted(int(sizes[row].sum()) for row in rows)
    assert len(used) < 2 or used[0] + used[1] > capacity


def test_rows_by_hand() -> None:
    # 7; 6; 4 goes to the 6, where it leaves least room; 3 to the 7.
    rows = pack(np.array([3, 7, 4, 6]), 10)
    assert sorted(sorted(row.tolist()) for row in rows) == [[0, 1], [2, 3]]


def test_responses_of_mixed_lengths_leave_little_room() -> None:
    """Lengths of a real mixture: 32 to 1,600 tokens, most of them short, in rows of 4,352."""
    lengths = np.random.default_rng(0).lognormal(6, 0.7, 3 * WINDOW).clip(32, 1600).astype(np.int64)
    assert 1 - lengths.sum() / (len(pack(lengths, 4352)) * 4352) < 0.01
