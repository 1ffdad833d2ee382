"""Which loss is trained, and what is refused; bounds on the tail at another temperature, against actual tails."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from shared.config import TrainConfig
from shared.errors import ConfigError
from student.alignment.targets import SparseTargets
from student.losses.settings import LossSettings, check_temperature, resolve_loss, tail_share_bounds


def train(**changes) -> TrainConfig:
    return TrainConfig(steps=1, **changes)


@pytest.mark.parametrize(("has_distributions", "expected"), [(True, "kl"), (False, "ce")])
def test_auto_takes_kl_where_distributions_are_and_says_why(has_distributions, expected):
    choice = resolve_loss(train(loss="auto"), has_distributions)
    assert choice.name == expected
    assert f"auto chose {expected}" in choice.reason
    assert "distributions" in choice.reason


def test_auto_names_the_records_that_train_without():
    assert "7 records" in resolve_loss(train(loss="auto"), True, records_without=7).reason


@pytest.mark.parametrize("loss", ["ce", "kl", "hybrid"])
def test_an_explicit_loss_is_kept(loss):
    assert resolve_loss(train(loss=loss), True).name == loss


@pytest.mark.parametrize("loss", ["kl", "hybrid"])
@pytest.mark.parametrize(("has_distributions", "without"), [(False, 0), (True, 3)])
def test_kl_on_records_without_distributions_is_refused(loss, has_distributions, without):
    with pytest.raises(ConfigError, match=f"train.loss is '{loss}'.*no teacher distributions.*ce or auto") as caught:
        resolve_loss(train(loss=loss), has_distributions, records_without=without)
    assert not without or "3 training records" in str(caught.value)


@pytest.mark.parametrize("weight", ["tv_weight", "path_weight"])
def test_a_term_on_records_without_distributions_is_refused(weight):
    with pytest.raises(ConfigError, match=rf"{weight} is 0\.5"):
        resolve_loss(train(loss="auto", **{weight: 0.5}), False)


def test_random_masking_alone_is_trained_by_cross_entropy_alone():
    alone = {"objectives": {"blocks": 0, "random_masking": 1}}
    choice = resolve_loss(train(loss="auto", **alone), True)
    assert choice.name == "ce"
    assert "random masking alone" in choice.reason
    for changes in ({"loss": "kl"}, {"loss": "hybrid"}, {"tv_weight": 1}, {"path_weight": 1}):
        with pytest.raises(ConfigError, match="trains no blocks"):
            resolve_loss(train(**alone, **changes), True)


def test_settings_carry_every_weight():
    config = train(loss="hybrid", alpha=0.2, beta=0.9, temperature=0.8, tv_weight=0.1, path_weight=0.3, block_length=5)
    expected = LossSettings("hybrid", 5, 0.2, 0.9, 0.8, 0.1, 0.3)
    assert LossSettings.from_config(config, "hybrid") == expected


def test_a_hybrid_of_nothing_is_refused():
    with pytest.raises(ValidationError, match="all 0"):
        train(loss="hybrid", alpha=0, beta=0)


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
    assert check_temperature([truncated(rows, 3)], 1.0, 8, max_unknown_share=0.0) == 0
    assert check_temperature([truncated(rows, 8)], 4.0, 8, max_unknown_share=1.0) == pytest.approx(0, abs=1e-3)
    assert len(tail_share_bounds(truncated(rows, 3), 1.0, 8)[0]) == 1


def test_an_unsupported_temperature_is_refused_with_the_share():
    """k = 64 of 126,464 with 8 % in the tail: at T = 2 nobody knows where most of the mass is."""
    row = np.concatenate([0.92 * np.sort(np.random.default_rng(1).dirichlet(np.full(64, 0.2)))[::-1], [0.08]])
    targets = truncated([row], 64)
    unknown = check_temperature([targets], 2.0, 126_464, max_unknown_share=1.0)
    assert unknown > 0.5
    with pytest.raises(ConfigError, match=re.escape(f"{unknown:.1%} is unknown, expected at most 10.0%")):
        check_temperature([targets], 2.0, 126_464, max_unknown_share=0.1)
    assert check_temperature([targets], 0.7, 126_464, max_unknown_share=0.1) < 0.1


def test_positions_without_soft_target_do_not_count():
    targets = SparseTargets(
        event_offsets=np.zeros(3, np.int64),
        event_mass=np.zeros(0, np.float32),
        member_offsets=np.zeros(1, np.int64),
        members=np.zeros(0, np.int32),
        tail=np.full(2, np.nan, np.float32),
        known=np.zeros(2, np.float32),
    )
    assert len(tail_share_bounds(targets, 2.0, 100)[0]) == 0
    assert check_temperature([targets], 2.0, 100, 0.1) == 0
