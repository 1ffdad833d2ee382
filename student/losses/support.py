"""Which temperatures a truncated row supports, by bounds on its tail.

At T ≠ 1 a distribution is raised to 1/T and normalised. The rows say how the events' masses change, but not how
the tail's does: a tail of mass r over n tokens becomes r^(1/T) if one token holds it all and n^(1 - 1/T) r^(1/T) if
all hold the same, and everything between is possible (1/T < 1 is concave, 1/T > 1 convex: the two exchange places).
The share of the softened target that may lie on either side of the tail's border is the unknown share; it is 0 at
T = 1 and for complete rows. Above a limit the temperature is refused: `reference.event_kl`, which tempers the tail
as one event, would then soften some other distribution than the teacher's. Numpy, linear in the number of events;
runs before training.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.errors import ConfigError
from student.alignment.targets import SparseTargets


@dataclass(frozen=True, slots=True)
class TemperatureSupport:
    """Means over `positions` soft positions: the least and the largest share that the tail can have at T."""

    lower: float
    upper: float
    positions: int

    @property
    def unknown(self) -> float:
        """Share of the softened target of which the rows do not say whether it is in the tail."""
        return self.upper - self.lower


def tail_share_bounds(
    targets: SparseTargets, temperature: float, vocabulary_size: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Least and largest share of the tail at `temperature`, at each soft position of `targets`, in order."""
    power = 1 / temperature
    event_counts, member_counts = np.diff(targets.event_offsets), np.diff(targets.member_offsets)
    rows = np.repeat(np.arange(len(targets.tail)), event_counts)
    events = np.bincount(rows, targets.event_mass.astype(np.float64) ** power, minlength=len(targets.tail))
    outside = np.maximum(vocabulary_size - np.bincount(rows, member_counts, minlength=len(targets.tail)), 1)
    soft = ~np.isnan(targets.tail)
    concentrated = np.clip(targets.tail[soft].astype(np.float64), 0, 1) ** power
    shares = [mass / (events[soft] + mass) for mass in (concentrated, concentrated * outside[soft] ** (1 - power))]
    return np.minimum(*shares), np.maximum(*shares)


def temperature_support(
    targets: Iterable[SparseTargets], temperature: float, vocabulary_size: int
) -> TemperatureSupport:
    """`tail_share_bounds`, averaged over all soft positions of all `targets`."""
    bounds = [tail_share_bounds(t, temperature, vocabulary_size) for t in targets]
    lower, upper = (np.concatenate([b[side] for b in bounds] or [np.zeros(0)]) for side in (0, 1))
    if not len(lower):
        return TemperatureSupport(0.0, 0.0, 0)
    return TemperatureSupport(float(lower.mean()), float(upper.mean()), len(lower))


def check_temperature(
    targets: Iterable[SparseTargets], temperature: float, vocabulary_size: int, max_unknown_share: float
) -> TemperatureSupport:
    """Refuse a temperature that the rows do not support; a few hundred samples' targets are plenty.

    Raises:
        ConfigError: if the unknown share is above `max_unknown_share`; the message names it and the tail's bounds.
    """
    support = temperature_support(targets, temperature, vocabulary_size)
    if temperature != 1 and support.unknown > max_unknown_share:
        raise ConfigError(
            f"train.temperature is {temperature}, but the stored rows do not support it: there their tail may hold "
            f"{support.lower:.1%} to {support.upper:.1%} of the mass (means of {support.positions} positions), so "
            f"{support.unknown:.1%} is unknown, expected at most {max_unknown_share:.1%} (train.max_unknown_share): "
            "use a temperature closer to 1, or collect with a larger collect.top_k"
        )
    return support
