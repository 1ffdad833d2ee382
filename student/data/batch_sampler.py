"""Which samples make up which step, as a pure function of (seed, epoch).

A step is `global_batch` samples. The order never depends on the number of ranks: a step's samples are fixed
first and dealt to ranks and micro-batches afterwards, longest with longest, so that little is padded and every
rank runs the same number of micro-batches. The state of an interrupted run is therefore one number, the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from shared.errors import ConfigError


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, samples: int) -> NDArray[np.int64]:
    """An epoch's order; kept, because every step of the epoch asks for its part."""
    return np.random.default_rng([seed, epoch]).permutation(samples)


@dataclass(frozen=True, slots=True)
class BatchSampler:
    """The order of one training run.

    Attributes:
        lengths: int64 [n], length of every training sample in tokens; only steers who shares a micro-batch.
        seed: of the run.
        global_batch: samples per step over all ranks and accumulation steps.
        micro_batch: most samples per forward.
        world_size: ranks.
    """

    lengths: NDArray[np.int64]
    seed: int
    global_batch: int
    micro_batch: int
    world_size: int

    def __post_init__(self) -> None:
        if self.global_batch % self.world_size:
            raise ConfigError(
                f"train.global_batch is {self.global_batch}, which {self.world_size} ranks cannot share evenly; "
                f"use a multiple of {self.world_size}"
            )
        if len(self.lengths) < self.global_batch:
            raise ConfigError(
                f"train.global_batch is {self.global_batch}, but only {len(self.lengths)} training samples are "
                "prepared; lower it or collect more responses"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps in an epoch; the samples left over are others in every epoch."""
        return len(self.lengths) // self.global_batch

    @property
    def accumulation(self) -> int:
        """Micro-batches per rank and step."""
        return -(-self.global_batch // (self.world_size * self.micro_batch))

    def step_samples(self, step: int) -> tuple[int, NDArray[np.int64]]:
        """Epoch and sample numbers of step `step` (0-based), before they are dealt out."""
        epoch, within = divmod(step, self.steps_per_epoch)
        permutation = _permutation(self.seed, epoch, len(self.lengths))
        return epoch, permutation[within * self.global_batch : (within + 1) * self.global_batch]

    def micro_batches(self, step: int, rank: int) -> tuple[int, list[NDArray[np.int64]]]:
        """Epoch, and this rank's sample numbers of each micro-batch of the step."""
        epoch, samples = self.step_samples(step)
        by_length = samples[np.argsort(-self.lengths[samples], kind="stable")]
        mine = by_length[rank :: self.world_size]
        return epoch, np.array_split(mine, self.accumulation)
