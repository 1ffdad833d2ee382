"""Which loss is trained, resolved from the config and from what the dataset holds.

`resolve_loss` settles `auto` and refuses a loss that the records cannot support; `LossSettings` is what the loss
functions take. Both are plain Python: they run before any model exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from shared.config import TrainConfig
from shared.errors import ConfigError

ResolvedLossName = Literal["ce", "kl", "hybrid"]


class LossChoice(NamedTuple):
    """A loss that can be trained, and the sentence for the log that says why it was chosen."""

    name: ResolvedLossName
    reason: str


@dataclass(frozen=True, slots=True)
class LossSettings:
    """Weights of the terms of METHOD 4. One position's loss is

        ce:      CE
        kl:      T² KL_T               where there is a soft target, CE elsewhere
        hybrid:  α CE + β (the line above)

    plus `tv_weight` · TV at soft positions of depth 1; one block's is `path_weight` · (-n log(J / n)).

    Attributes:
        temperature: T of the KL term; masses of events are raised to 1/T (see `reference.event_kl`).
        block_length: largest depth that a position can have; the length of the per-depth sums.
    """

    loss: ResolvedLossName
    block_length: int
    alpha: float = 0.5
    beta: float = 0.5
    temperature: float = 1.0
    tv_weight: float = 0.0
    path_weight: float = 0.0

    @classmethod
    def from_config(cls, train: TrainConfig, block_length: int, loss: ResolvedLossName | None = None) -> LossSettings:
        """Settings of `train`, with `loss` (from `resolve_loss`) in place of `auto`.

        Raises:
            ConfigError: if the loss is `auto` and was not resolved, or if every weight is zero.
        """
        name = loss if loss is not None else train.loss
        if name == "auto":
            raise ConfigError("train.loss is 'auto', expected ce, kl or hybrid: resolve it against the dataset first")
        if name == "hybrid" and train.alpha == train.beta == train.tv_weight == train.path_weight == 0:
            raise ConfigError(
                "train.loss is 'hybrid' with train.alpha, beta, tv_weight and path_weight all 0, expected one above 0: "
                "nothing would be trained"
            )
        return cls(
            loss=name,
            block_length=block_length,
            alpha=train.alpha,
            beta=train.beta,
            temperature=train.temperature,
            tv_weight=train.tv_weight,
            path_weight=train.path_weight,
        )


def resolve_loss(train: TrainConfig, has_distributions: bool, *, records_without: int = 0) -> LossChoice:
    """Settle `train.loss` against the training records.

    Args:
        has_distributions: at least one training record carries the teacher's distributions.
        records_without: training records that carry none, where the caller counted them. `auto` trains these with
            cross-entropy at their own positions; an explicit `kl` or `hybrid` refuses them.

    Raises:
        ConfigError: if `kl`, `hybrid`, a temperature, or a TV weight needs distributions that are not there.
    """
    missing = f"{records_without} training records hold" if has_distributions else "the training records hold"
    collect = "collect them with `teacher collect` or `teacher score`"
    if train.loss in ("kl", "hybrid") and (not has_distributions or records_without):
        raise ConfigError(
            f"train.loss is {train.loss!r}, but {missing} no teacher distributions: {collect}, "
            "or set train.loss to ce or auto"
        )
    if train.tv_weight > 0 and not has_distributions:
        raise ConfigError(
            f"train.tv_weight is {train.tv_weight}, but {missing} no teacher distributions: {collect}, or set it to 0"
        )
    if train.loss == "auto":
        if not has_distributions:
            return LossChoice("ce", "auto chose ce: the training records hold no teacher distributions")
        elsewhere = f"; {records_without} records without them train with ce" if records_without else ""
        return LossChoice("kl", f"auto chose kl: the training records hold teacher distributions{elsewhere}")
    return LossChoice(train.loss, f"{train.loss}, as train.loss says")
