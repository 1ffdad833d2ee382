"""Which samples make up which step, as a pure function of (seed, step).

An epoch is a permutation of the samples, packed into rows of one length; the rows of all epochs are one endless
sequence, of which a step takes the next `global_batch`. So an epoch visits every sample once, the order never depends
on the number of ranks, every rank runs the same number of forwards of the same shape, and the state of an interrupted
run is one number, the step.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.errors import ConfigError
from student.data.packing import pack


def accumulation_steps(global_batch: int, micro_batch: int, world_size: int) -> int:
    """Micro-batches per rank and step; the last may have fewer rows.

    Raises:
        ConfigError: if the ranks cannot share a step's rows evenly.
    """
    if global_batch % world_size:
        raise ConfigError(
            f"train.global_batch is {global_batch}, which {world_size} ranks cannot share evenly; "
            f"use a multiple of {world_size}"
        )
    return -(-global_batch // (world_size * micro_batch))


class PackedRow(NamedTuple):
    """The samples of one row, and the epoch that they are visited in."""

    epoch: int
    samples: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class BatchSampler:
    """The order of one training run.

    Attributes:
        lengths: int64 [n], the most tokens that each training sample takes in a row.
        row_tokens: tokens of a row.
        seed: of the run.
        global_batch: rows per step over all ranks and accumulation steps.
        micro_batch: most rows per forward.
        world_size: ranks.
    """

    lengths: NDArray[np.int64]
    row_tokens: int
    seed: int
    global_batch: int
    micro_batch: int
    world_size: int
    _first_rows: list[int] = field(default_factory=lambda: [0], repr=False)
    """Of each epoch that is known, in the endless sequence."""

    def __post_init__(self) -> None:
        accumulation_steps(self.global_batch, self.micro_batch, self.world_size)
        if (rows := len(self.epoch_rows(0))) < self.global_batch:
            raise ConfigError(
                f"train.global_batch is {self.global_batch} rows of {self.row_tokens} tokens, but {len(self.lengths)} "
                f"training samples fill only {rows}; lower it, or train.row_tokens, or collect more responses"
            )

    @property
    def accumulation(self) -> int:
        """Micro-batches per rank and step."""
        return accumulation_steps(self.global_batch, self.micro_batch, self.world_size)

    def epoch_rows(self, epoch: int) -> list[NDArray[np.int64]]:
        """The rows of an epoch, in order."""
        return _rows_of_epoch(self, epoch)

    def steps_of(self, epochs: float) -> int:
        """Steps until `epochs` passes over the samples are complete; the last may begin the next pass."""
        whole, part = divmod(epochs, 1)
        rows = self._first_row(int(whole)) + part * len(self.epoch_rows(int(whole)) if part else ())
        return max(int(np.ceil(rows / self.global_batch)), 1)

    def epochs_after(self, steps: int) -> float:
        """Passes over the samples that are done after so many steps."""
        epoch, row = self._find(steps * self.global_batch)
        return epoch + row / len(self.epoch_rows(epoch))

    def step_rows(self, step: int) -> list[PackedRow]:
        """The rows of step `step` (0-based), before they are dealt out."""
        found = [self._find(row) for row in range(step * self.global_batch, (step + 1) * self.global_batch)]
        return [PackedRow(epoch, self.epoch_rows(epoch)[row]) for epoch, row in found]

    def micro_batches(self, step: int, rank: int) -> list[list[PackedRow]]:
        """This rank's rows of each micro-batch of the step."""
        mine = self.step_rows(step)[rank :: self.world_size]
        return [mine[start : start + self.micro_batch] for start in range(0, len(mine), self.micro_batch)]

    def _first_row(self, epoch: int) -> int:
        while len(self._first_rows) <= epoch:
            last = len(self._first_rows) - 1
            self._first_rows.append(self._first_rows[last] + len(self.epoch_rows(last)))
        return self._first_rows[epoch]

    def _find(self, row: int) -> tuple[int, int]:
        """Epoch, and number within the epoch, of a row of the endless sequence."""
        while self._first_rows[-1] <= row:
            self._first_row(len(self._first_rows))
        epoch = bisect_right(self._first_rows, row) - 1
        return epoch, row - self._first_rows[epoch]


@lru_cache(2)  # a step may reach into the next epoch, and each of its micro-batches asks for both
def _rows_of_epoch(sampler: BatchSampler, epoch: int) -> list[NDArray[np.int64]]:
    generator = np.random.default_rng([sampler.seed, epoch])
    order = generator.permutation(len(sampler.lengths))
    rows = [order[row] for row in pack(sampler.lengths[order], sampler.row_tokens)]
    return [rows[number] for number in generator.permutation(len(rows))]
