"""Which loss is trained, and what is refused."""

from __future__ import annotations

import pytest

from shared.config import TrainConfig
from shared.errors import ConfigError
from student.losses.settings import LossSettings, resolve_loss


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


def test_tv_on_records_without_distributions_is_refused():
    with pytest.raises(ConfigError, match=r"tv_weight is 0\.5"):
        resolve_loss(train(loss="auto", tv_weight=0.5), False)


def test_settings_carry_every_weight():
    config = train(loss="hybrid", alpha=0.2, beta=0.9, temperature=0.8, tv_weight=0.1, path_weight=0.3, block_length=5)
    expected = LossSettings("hybrid", 5, 0.2, 0.9, 0.8, 0.1, 0.3)
    assert LossSettings.from_config(config, config.block_length) == expected


def test_settings_take_the_resolved_loss_and_refuse_auto():
    assert LossSettings.from_config(train(loss="auto"), 4, loss="kl").loss == "kl"
    with pytest.raises(ConfigError, match="'auto'"):
        LossSettings.from_config(train(loss="auto"), 4)


def test_a_hybrid_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="all 0"):
        LossSettings.from_config(train(loss="hybrid", alpha=0, beta=0), 4)
