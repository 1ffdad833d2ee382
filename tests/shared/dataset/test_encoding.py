"""Stored logprobs: half a step of error, mass that sums to 1, rows in order, a second storing that is exact."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shared.dataset.encoding import decode_logprobs, encode_gaps, round_sampled, round_tail, row_matches
from shared.dataset.schema import STEPS_PER_NAT


def random_rows(
    seed: int, widths: list[int], spread: float, vocabulary: int = 2000
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
    """Offsets, logprobs in falling order and exact tails of softmax rows that are cut to `widths`."""
    random = np.random.default_rng(seed)
    rows, tails = [], []
    for width in widths:
        logits = np.sort(random.normal(0, spread, vocabulary))[::-1]
        logprobs = logits - logits[0] - np.log(np.exp(logits - logits[0]).sum())
        rows.append(logprobs[:width])
        tails.append(max(0.0, 1 - np.exp(logprobs[:width]).sum()))
    flat = np.concatenate([*rows, np.zeros(0)])
    return (
        np.concatenate([[0], np.cumsum(widths)]).astype(np.int64),
        flat.astype(np.float32),
        np.array(tails, np.float32),
    )


row_shapes = st.one_of(
    st.lists(st.integers(0, 40), max_size=12),  # of any width
    st.tuples(st.integers(1, 12), st.integers(1, 40)).map(lambda t: [t[1]] * t[0]),  # of one width
)


@given(seed=st.integers(0, 10_000), widths=row_shapes, spread=st.sampled_from([0.01, 1.0, 4.0, 30.0]))
@settings(max_examples=80, deadline=None)
def test_stored_rows_sum_to_one_stay_in_order_and_store_again_exactly(
    seed: int, widths: list[int], spread: float
) -> None:
    offsets, logprobs, tail = random_rows(seed, widths, spread)
    gaps, stored_tail = encode_gaps(offsets, logprobs), round_tail(tail)
    stored = decode_logprobs(np.diff(offsets).astype(np.int32), gaps, stored_tail)
    for start, stop, rest in zip(offsets[:-1], offsets[1:], stored_tail, strict=True):
        row = stored[start:stop]
        assert (np.diff(row) <= 0).all()
        if len(row):
            assert abs(np.exp(row.astype(np.float64)).sum() + rest - 1) < 1e-5
    assert np.array_equal(encode_gaps(offsets, stored), gaps)
    assert np.array_equal(round_tail(stored_tail), stored_tail)


@given(seed=st.integers(0, 10_000), spread=st.sampled_from([0.5, 2.0, 4.0]))
@settings(max_examples=30, deadline=None)
def test_the_error_is_half_a_step_and_its_square_in_the_divergence(seed: int, spread: float) -> None:
    offsets, logprobs, tail = random_rows(seed, [64] * 10, spread)
    stored_tail = round_tail(tail)
    stored = decode_logprobs(np.full(10, 64, np.int32), encode_gaps(offsets, logprobs), stored_tail)
    # Half a step of the entry, at most as much of the normalizer, and the tail's rounding.
    assert np.abs(stored - logprobs).max() <= 1 / STEPS_PER_NAT + 1e-3
    exact, kept = logprobs.astype(np.float64), stored.astype(np.float64)
    divergence = (np.exp(exact) * (exact - kept)).reshape(10, 64).sum(axis=1)
    divergence += tail * np.log(np.maximum(tail, 1e-30) / np.maximum(stored_tail, 1e-30))
    # Rounding errors are uniform: their variance is step² / 12, and the divergence half of what the mass sees of it.
    assert divergence.mean() < 1.1 * (1 / STEPS_PER_NAT) ** 2 / 24
    assert divergence.max() < (1 / STEPS_PER_NAT) ** 2 / 8


def test_an_unknown_tail_leaves_probabilities_relative_to_the_candidates() -> None:
    offsets, logprobs, _ = random_rows(0, [5], 2.0)
    stored = decode_logprobs(np.array([5], np.int32), encode_gaps(offsets, logprobs), np.array([np.nan], np.float32))
    assert abs(np.exp(stored).sum() - 1) < 1e-6
    np.testing.assert_allclose(stored - stored[0], logprobs - logprobs[0], atol=0.5 / STEPS_PER_NAT + 1e-6)


def test_tails_keep_their_precision_at_both_ends() -> None:
    tail = np.array([0, 1e-9, 1e-4, 0.3, 0.5, 0.7, 1 - 1e-4, 1, np.nan, -1e-7, 1 + 1e-7], np.float32)
    rounded = round_tail(tail)
    assert np.isnan(rounded[8])
    assert rounded[[0, 7, 9, 10]].tolist() == [0, 1, 0, 1]
    inner = slice(1, 7)
    small = np.minimum(tail[inner], 1 - tail[inner])
    assert (np.abs(rounded[inner] - tail[inner]) <= small * 2.0**-11 + 1e-8).all()


def test_a_candidate_beyond_the_largest_distance_keeps_probability_zero() -> None:
    logprobs = np.array([-1e-6, -20.0, -5_000.0, -1e6], np.float32)
    gaps = encode_gaps(np.array([0, 4]), logprobs)
    stored = decode_logprobs(np.array([4], np.int32), gaps, np.zeros(1, np.float32))
    assert int(gaps.astype(np.int64).sum()) == 65_535
    assert np.exp(stored[2:]).tolist() == [0, 0]
    np.testing.assert_allclose(stored[:2], logprobs[:2], atol=1 / STEPS_PER_NAT)


def test_the_largest_gaps_decode_alike_in_rows_of_one_width_and_of_several() -> None:
    # Their running total over 3,000 rows of 64 passes 2^32; a row's own never does.
    rows = np.full((3_000, 64), 65_535, np.uint16)
    rows[:, 0] = 0
    tail = np.zeros(len(rows) + 1, np.float32)
    widths = np.full(len(rows) + 1, 64, np.int32)
    widths[-1] = 1
    one_width = decode_logprobs(widths[:-1], rows.reshape(-1), tail[:-1])
    several = decode_logprobs(widths, np.append(rows.reshape(-1), np.uint16(0)), tail)
    assert np.array_equal(one_width, several[:-1])
    assert np.array_equal(one_width.reshape(rows.shape), np.tile(-4_095.9375 * np.arange(64), (len(rows), 1)))


def test_sampled_logprobs_are_rounded_to_a_1024th() -> None:
    values = np.array([-0.3333333, -12.0001, np.nan], np.float32)
    rounded = round_sampled(values)
    np.testing.assert_allclose(rounded[:2], values[:2], atol=0.5 / 1024 + 1e-7)
    assert np.isnan(rounded[2])
    assert np.array_equal(round_sampled(rounded), rounded, equal_nan=True)


def test_tokens_find_their_own_entry_in_rows_of_one_width_and_of_several() -> None:
    ids = np.array([5, 6, 7, 8, 5, 9], np.int32)
    own = np.array([6, 1, 9], np.int32)
    for widths, expected in (([2, 2, 2], ([0, 2], [1, 5])), ([3, 0, 3], ([0, 2], [1, 5]))):
        tokens, entries = row_matches(np.array(widths, np.int32), ids, own)
        assert (tokens.tolist(), entries.tolist()) == expected
