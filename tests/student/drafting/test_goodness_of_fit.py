"""The test of sampled tokens against rows: right sampling passes at its level, wrong sampling fails as predicted."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from student.drafting.goodness_of_fit import CANDIDATES, LEVEL, Tally

V = 60


def sampled(rng: np.random.Generator, tokens: int, temperature: float = 1.0) -> Tally:
    """Tokens drawn at `temperature`, held to their rows at 1: a response of rows that are all different."""
    logits_TxV = rng.normal(size=(tokens, V)) * rng.uniform(0.5, 4, (tokens, 1))
    logprobs_TxV = logits_TxV - np.log(np.exp(logits_TxV).sum(1, keepdims=True))
    drawn_T = (logits_TxV / temperature + rng.gumbel(size=(tokens, V))).argmax(1)
    own_T = logprobs_TxV[np.arange(tokens), drawn_T]
    tally = Tally()
    ranks_T = (logprobs_TxV >= own_T[:, None]).sum(1)
    tally.add(ranks_T, own_T, -np.sort(-logprobs_TxV, axis=1)[:, :CANDIDATES][:, ::-1])
    return tally


def test_right_sampling_fails_as_often_as_the_level_says() -> None:
    rng = np.random.default_rng(0)
    p = np.array([sampled(rng, 300).figures()["p"] for _ in range(800)])
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_wrong_sampling_fails() -> None:
    rng = np.random.default_rng(1)
    assert sampled(rng, 4000, temperature=0.9).figures()["p"] < LEVEL
    assert sampled(rng, 4000, temperature=1.1).figures()["p"] < LEVEL
    greedy = sampled(rng, 500, temperature=1e-6).figures()
    assert greedy["p"] < 1e-30
    assert greedy["observed"] == {"1": 500, "2": 0, "3-5": 0, "6-20": 0, "others": 0}


def test_the_change_it_names_is_found() -> None:
    """So much of the tokens are replaced by their row's likeliest one: found in 99 of 100 tests."""
    rng = np.random.default_rng(2)
    p = []
    for _ in range(300):
        tally = sampled(rng, 2000)
        change = tally.figures()["detectable"] * 2000
        others = np.array(tally.observed_C[1:])
        tally.observed_C = [tally.observed_C[0] + change, *(others - change * others / others.sum())]
        p.append(tally.figures()["p"])
    assert np.mean(np.array(p) < LEVEL) > 0.98


def test_equal_rows_are_pearsons_test() -> None:
    rng = np.random.default_rng(3)
    row_V = np.sort(rng.dirichlet(np.ones(V)))[::-1]
    drawn_T = rng.choice(V, 5000, p=row_V)
    tally = Tally()
    for part in np.split(drawn_T, [1, 1200, 4000]):
        rows = np.tile(np.log(row_V[:CANDIDATES]), (len(part), 1))
        tally.add(part + 1, np.log(row_V[part]), rows)
    edges = [0, 1, 2, 5, CANDIDATES, V]
    expected = [5000 * row_V[a:b].sum() for a, b in pairwise(edges)]
    observed = [((drawn_T >= a) & (drawn_T < b)).sum() for a, b in pairwise(edges)]
    figures = tally.figures()
    assert figures["p"] == pytest.approx(stats.chisquare(observed, expected).pvalue, rel=1e-9)
    assert list(figures["observed"].values()) == observed
    assert list(figures["expected"].values()) == pytest.approx(expected)
    first = figures["by_position"]["1"]
    assert first["tokens"] == 4  # four responses
    assert sum(entry["tokens"] for entry in figures["by_position"].values()) == 5000


def test_certain_rows_leave_nothing_to_test_and_an_impossible_token_fails() -> None:
    rows = np.full((3, CANDIDATES), -np.inf)
    rows[:, 0] = 0
    right, wrong = Tally(), Tally()
    right.add([1, 1, 1], [0.0] * 3, rows)
    assert right.figures()["p"] == 1
    wrong.add([1, 2, 1], [0.0, -np.inf, 0.0], rows)
    assert wrong.figures()["p"] == 0
