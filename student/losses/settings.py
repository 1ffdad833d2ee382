"""Which loss is trained: its weights, and whether what the dataset holds supports it.

`resolve_loss` settles `auto` and refuses a loss that the records cannot support; `check_temperature` does the same for
a temperature, by bounds on the tail of truncated rows (README.md of this folder). Both run before any model exists.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.config import TrainConfig
from shared.errors import ConfigError
from student.alignment.targets import SparseTargets

ResolvedLossName = Literal["ce", "kl", "hybrid"]


class LossChoice(NamedTuple):
    """A loss that can be trained, and the sentence for the log that says why it was chosen."""

    name: ResolvedLossName
    reason: str


@dataclass(frozen=True, slots=True)
class LossSettings:
    """Weights of the objective's terms (README.md of this folder). One position's loss is

        ce:      CE
        kl:      T² KL_T               where there is a soft target, CE elsewhere
        hybrid:  α CE + β (the line above)

    plus `tv_weight` · TV at soft positions of depth 1; one block's is `path_weight` · (-n log(J / n)).

    Attributes:
        temperature: T of the KL term; masses of events are raised to 1/T.
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
    def from_config(cls, train: TrainConfig, loss: ResolvedLossName) -> LossSettings:
        """Settings of `train`, with `loss` as `resolve_loss` settled it."""
        return cls(loss, **{field.name: getattr(train, field.name) for field in fields(cls) if field.name != "loss"})


def resolve_loss(train: TrainConfig, has_distributions: bool, *, records_without: int = 0) -> LossChoice:
    """Settle `train.loss` against the training records.

    Args:
        has_distributions: at least one training record carries the teacher's distributions.
        records_without: training records that carry none, where the caller counted them. `auto` trains these with
            cross-entropy at their own positions; an explicit `kl` or `hybrid` refuses them.

    Raises:
        ConfigError: if `kl`, `hybrid`, a TV or a path weight needs distributions that are not there, or blocks, which
            alone see nothing to the right of a token, as the teacher does not.
    """
    blocks = train.objectives.blocks > 0
    missing = f"{records_without} training records hold" if has_distributions else "the training records hold"
    without = f"{missing} no teacher distributions: collect them with `teacher collect` or `teacher score`"
    if not blocks:
        without = "train.objectives trains no blocks, and random masking learns the text alone: train blocks too"
    if train.loss in ("kl", "hybrid") and (not has_distributions or records_without or not blocks):
        raise ConfigError(f"train.loss is {train.loss!r}, but {without}, or set train.loss to ce or auto")
    for name in ("tv_weight", "path_weight"):
        if getattr(train, name) > 0 and not (has_distributions and blocks):
            raise ConfigError(f"train.{name} is {getattr(train, name)}, but {without}, or set it to 0")
    if train.loss == "auto":
        if not blocks:
            return LossChoice("ce", "auto chose ce: train.objectives trains random masking alone")
        if not has_distributions:
            return LossChoice("ce", "auto chose ce: the training records hold no teacher distributions")
        elsewhere = f"; {records_without} records without them train with ce" if records_without else ""
        return LossChoice("kl", f"auto chose kl: the training records hold teacher distributions{elsewhere}")
    return LossChoice(train.loss, f"{train.loss}, as train.loss says")


def tail_share_bounds(
    targets: SparseTargets, temperature: float, vocabulary_size: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Least and largest share of the tail at `temperature`, at each soft position of `targets`, in order."""
    power = 1 / temperature
    positions, member_counts = len(targets.tail), np.diff(targets.member_offsets)
    rows = np.repeat(np.arange(positions), np.diff(targets.event_offsets))
    events = np.bincount(rows, targets.event_mass.astype(np.float64) ** power, minlength=positions)
    outside = np.maximum(vocabulary_size - np.bincount(rows, member_counts, minlength=positions), 1)
    soft = ~np.isnan(targets.tail)
    concentrated = np.clip(targets.tail[soft].astype(np.float64), 0, 1) ** power
    shares = [mass / (events[soft] + mass) for mass in (concentrated, concentrated * outside[soft] ** (1 - power))]
    return np.minimum(*shares), np.maximum(*shares)


def check_temperature(
    targets: Iterable[SparseTargets], temperature: float, vocabulary_size: int, max_unknown_share: float
) -> float:
    """Refuse a temperature that the rows do not support; a few hundred samples' targets are plenty.

    Returns: the unknown share, the distance between the means of the two `tail_share_bounds`; 0 without soft positions.

    Raises:
        ConfigError: if the unknown share is above `max_unknown_share`; the message names it and the tail's bounds.
    """
    bounds = np.concatenate(
        [np.zeros((2, 0)), *(tail_share_bounds(t, temperature, vocabulary_size) for t in targets)], 1
    )
    positions = bounds.shape[1]
    lower, upper = (float(bound.mean()) for bound in bounds) if positions else (0.0, 0.0)
    if temperature != 1 and upper - lower > max_unknown_share:
        raise ConfigError(
            f"train.temperature is {temperature}, but the stored rows do not support it: at this temperature their "
            f"tail may hold {lower:.1%} to {upper:.1%} of the mass (means of {positions} positions), so "
            f"{upper - lower:.1%} is unknown, expected at most {max_unknown_share:.1%} (train.max_unknown_share): "
            "use a temperature closer to 1, or collect with a larger collect.top_k"
        )
    return upper - lower
