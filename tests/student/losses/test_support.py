"""Bounds on the tail at another temperature, against actual tails; the refusal."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ConfigError
from student.alignment.targets import SparseTargets
from student.losses.support import check_temperature, tail_share_bounds, temperature_support


def truncated(rows: list[np.ndarray], kept: int) -> SparseTargets:
    """The `kept` first entries of each dense row as events of one token; the rest is the tail."""
    count = len(rows)
    return SparseTargets(
        event_offsets=np.arange(0, count * kept + 1, kept),
        event_mass=np.concatenate([r[:kept] for r in rows]).astype(np.float32),
        member_offsets=np.arange(count * kept + 1),
        members=np.tile(np.arange(kept, dtype=np.int32), count),
        tail=np.array([r[kept:].sum() for r in rows], np.float32),
        known=np.ones(count, np.float32),
    )


@given(
    seed=st.integers(0, 10_000),
    kept=st.integers(1, 6),
    temperature=st.sampled_from([0.3, 0.8, 1.0, 1.2, 3.0]),
    concentration=st.sampled_from([0.01, 0.3, 100.0]),
)
@settings(max_examples=60, deadline=None)
def test_no_tail_leaves_its_bounds(seed, kept, temperature, concentration):
    rng = np.random.default_rng(seed)
    rows = [rng.dirichlet(np.full(12, concentration)) for _ in range(5)]
    lower, upper = tail_share_bounds(truncated(rows, kept), temperature, vocabulary_size=12)
    for row, low, high in zip(rows, lower, upper, strict=True):
        softened = row ** (1 / temperature)
        share = softened[kept:].sum() / softened.sum()
        assert low - 1e-5 <= share <= high + 1e-5


def test_bounds_are_reached_by_an_even_tail_and_by_a_single_token():
    known = [0.5, 0.3]
    even, single = np.array([*known, 0.05, 0.05, 0.05, 0.05]), np.array([*known, 0.2, 0, 0, 0])
    bounds = tail_share_bounds(truncated([even], 2), 2.0, vocabulary_size=6)
    for row, bound in zip((single, even), bounds, strict=True):
        softened = np.sqrt(row)
        assert bound[0] == pytest.approx(softened[2:].sum() / softened.sum(), rel=1e-6)


def test_temperature_one_and_complete_rows_leave_nothing_unknown():
    rows = [np.random.default_rng(0).dirichlet(np.ones(8))]
    assert temperature_support([truncated(rows, 3)], 1.0, 8).unknown == 0
    assert temperature_support([truncated(rows, 8)], 4.0, 8).unknown == pytest.approx(0, abs=1e-3)
    assert check_temperature([truncated(rows, 3)], 1.0, 8, max_unknown_share=0.0).positions == 1


def test_an_unsupported_temperature_is_refused_with_the_share():
    """k = 64 of 126,464 with 8 % in the tail: at T = 2 nobody knows where most of the mass is."""
    row = np.concatenate([0.92 * np.sort(np.random.default_rng(1).dirichlet(np.full(64, 0.2)))[::-1], [0.08]])
    targets = truncated([row], 64)
    support = temperature_support([targets], 2.0, 126_464)
    assert support.unknown > 0.5
    with pytest.raises(ConfigError, match=re.escape(f"{support.unknown:.1%} is unknown, expected at most 10.0%")):
        check_temperature([targets], 2.0, 126_464, max_unknown_share=0.1)
    assert check_temperature([targets], 0.7, 126_464, max_unknown_share=0.1).unknown < 0.1


def test_positions_without_soft_target_do_not_count():
    targets = SparseTargets(
        event_offsets=np.zeros(3, np.int64),
        event_mass=np.zeros(0, np.float32),
        member_offsets=np.zeros(1, np.int64),
        members=np.zeros(0, np.int32),
        tail=np.full(2, np.nan, np.float32),
        known=np.zeros(2, np.float32),
    )
    assert check_temperature([targets], 2.0, 100, 0.1).positions == 0
