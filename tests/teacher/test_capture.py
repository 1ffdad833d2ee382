"""vLLM's columns become rows: which column is what, what goes to the tail, and what a shift looks like."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shared.errors import AlignmentError, CheckpointError
from teacher.capture import Columns, reshape_flat, response_columns, to_distributions

V = 32


def true_logprobs(tokens: int, seed: int = 0) -> NDArray[np.float32]:
    """Complete distributions over V tokens, float32 [tokens, V]."""
    logits = np.random.default_rng(seed).normal(size=(tokens, V)) * 3
    return (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)


def columns_of(logprobs_TxV: NDArray[np.float32], sampled: NDArray[np.int32], k: int) -> Columns:
    """What vLLM returns for these distributions: the sampled token, then the top k."""
    top = np.argsort(-logprobs_TxV, axis=1, kind="stable")[:, :k]
    ids = np.concatenate([sampled[:, None], top], axis=1)
    return Columns(ids.astype(np.int32), np.take_along_axis(logprobs_TxV, ids, axis=1))


def test_sampled_outside_the_top_k_keeps_its_own_logprob() -> None:
    logprobs = true_logprobs(5)
    sampled = np.argsort(logprobs, axis=1)[:, 0].astype(np.int32)  # the least likely token
    rows = to_distributions(columns_of(logprobs, sampled, 4), sampled, V)
    np.testing.assert_array_equal(rows.sampled, logprobs[np.arange(5), sampled])
    for j in range(5):
        ids, _ = rows.row(j)
        assert len(ids) == 4
        assert sampled[j] not in ids


@given(st.integers(1, 12), st.integers(1, V), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_rows_hold_the_top_k_in_order_and_the_tail_is_the_rest(tokens: int, k: int, seed: int) -> None:
    logprobs = true_logprobs(tokens, seed)
    sampled = np.random.default_rng(seed).integers(0, V, tokens).astype(np.int32)
    rows = to_distributions(columns_of(logprobs, sampled, k), sampled, V)
    assert len(rows) == tokens
    for j in range(tokens):
        ids, values = rows.row(j)
        expected = np.sort(logprobs[j])[::-1][:k]
        np.testing.assert_array_equal(values, expected)
        np.testing.assert_array_equal(values, logprobs[j][ids])
        assert np.exp(values.astype(np.float64)).sum() + rows.tail[j] == pytest.approx(1, abs=1e-5)


def test_ties_are_ordered_by_id_whatever_order_they_came_in() -> None:
    ids = np.array([[9, 7, 3, 5]], dtype=np.int32)
    values = np.log(np.array([[0.1, 0.3, 0.3, 0.3]], dtype=np.float32))
    rows = to_distributions(Columns(ids, values), np.array([9], dtype=np.int32), V)
    assert rows.row(0)[0].tolist() == [3, 5, 7]


def test_impossible_and_padded_candidates_go_to_the_tail() -> None:
    ids = np.array([[1, 1, V + 3, 2, 4]], dtype=np.int32)
    values = np.array([[np.log(0.5), np.log(0.5), np.log(0.25), np.log(0.125), -np.inf]], dtype=np.float32)
    rows = to_distributions(Columns(ids, values), np.array([1], dtype=np.int32), V)
    assert rows.row(0)[0].tolist() == [1, 2]
    assert rows.tail[0] == pytest.approx(0.375)


def test_retained_mass_stops_each_row_where_it_is_reached() -> None:
    ids = np.array([[1, 1, 2, 3], [4, 4, 5, 6]], dtype=np.int32)
    values = np.log(np.array([[0.95, 0.95, 0.03, 0.01], [0.5, 0.5, 0.3, 0.1]], dtype=np.float32))
    rows = to_distributions(Columns(ids, values), np.array([1, 4], dtype=np.int32), V, retained_mass=0.9)
    assert np.diff(rows.offsets).tolist() == [1, 3]  # the second row reaches 0.9 only with its third, or never
    assert rows.tail == pytest.approx([0.05, 0.1])


def test_an_empty_response_has_no_rows() -> None:
    empty = Columns(np.empty((0, 5), dtype=np.int32), np.empty((0, 5), dtype=np.float32))
    rows = to_distributions(empty, np.empty(0, dtype=np.int32), V)
    assert len(rows) == 0
    assert rows.offsets.tolist() == [0]


def test_rows_of_a_shifted_text_are_refused() -> None:
    logprobs = true_logprobs(6)
    sampled = np.arange(6, dtype=np.int32)
    columns = columns_of(logprobs, sampled, 4)
    with pytest.raises(AlignmentError, match="row 0 belongs to another token"):
        to_distributions(columns, np.roll(sampled, 1), V)
    with pytest.raises(AlignmentError, match="6 rows were captured for 5 response tokens"):
        to_distributions(columns, sampled[:5], V)


@pytest.mark.parametrize("bad", [np.nan, 0.5, np.inf])
def test_what_is_no_logprob_is_refused(bad: float) -> None:
    columns = columns_of(true_logprobs(3), np.zeros(3, dtype=np.int32), 4)
    columns.logprobs[1, 2] = bad
    with pytest.raises(CheckpointError, match="response token 1"):
        to_distributions(columns, np.zeros(3, dtype=np.int32), V)


def test_response_rows_follow_the_prompt_without_its_first_position() -> None:
    tokens = np.array([10, 11, 12, 20, 21], dtype=np.int32)  # three of the prompt, two of the response
    scored = Columns(np.stack([tokens[1:], tokens[1:]], axis=1), np.zeros((4, 2), dtype=np.float32))
    rows = response_columns(scored, prompt_length=3, response_length=2)
    assert rows.ids[:, 0].tolist() == [20, 21]
    with pytest.raises(AlignmentError, match=r"5 positions of 3 \+ 2 tokens, expected 4"):
        response_columns(Columns(np.zeros((5, 2), dtype=np.int32), np.zeros((5, 2), dtype=np.float32)), 3, 2)


def test_flat_lists_reshape_by_rows_and_uneven_ones_are_refused() -> None:
    columns = reshape_flat([5, 5, 6, 7, 7, 8], [-1.0, -1.0, -2.0, -3.0, -3.0, -4.0], rows=2)
    assert columns.ids.tolist() == [[5, 5, 6], [7, 7, 8]]
    assert columns.logprobs[1].tolist() == [-3.0, -3.0, -4.0]
    assert len(reshape_flat([], [], rows=0)) == 0
    with pytest.raises(AlignmentError, match="5 ids and 5 logprobs for 2 tokens"):
        reshape_flat([1] * 5, [0.0] * 5, rows=2)
