"""The training samples of a run as micro-batches: order, anchors and collation put together.

A forward's content depends on (seed, step) alone. Reading and collating happen in the caller's process; both are
array copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from shared.config import PipelineConfig
from shared.errors import TrainingError
from student.alignment.prepared import PreparedDataset
from student.alignment.targets import AlignedSample
from student.data.batch import MicroBatch, collate
from student.data.batch_sampler import BatchSampler
from student.data.blocks import choose_anchors, lay_out, sample_generator


@dataclass(frozen=True)
class TrainingDataLoader:
    """The prepared training samples, their sampler, and how many steps there will be.

    Attributes:
        chosen: int64 [n], numbers of the training samples within `prepared`.
        steps: of the whole run.
    """

    config: PipelineConfig
    prepared: PreparedDataset
    chosen: NDArray[np.int64]
    sampler: BatchSampler
    steps: int

    @classmethod
    def open(cls, config: PipelineConfig, world_size: int) -> TrainingDataLoader:
        """The loader of `config` for `world_size` ranks.

        Raises:
            DatasetError: if there is no prepared dataset. StaleError: if it is to be made again.
            TrainingError: if it holds no training sample.
            ConfigError: if the batch cannot be shared out.
        """
        prepared = PreparedDataset.of_run(config)
        chosen = np.asarray(prepared.indices(split="train"), dtype=np.int64)
        if not len(chosen):
            raise TrainingError(
                f"{config.prepared_dir} holds no sample of the split 'train': collect some and prepare again"
            )
        sampler = BatchSampler(
            lengths=np.asarray(prepared.lengths)[chosen],
            seed=config.seed,
            global_batch=config.train.global_batch,
            micro_batch=config.train.micro_batch,
            world_size=world_size,
        )
        steps = config.train.steps or max(round((config.train.epochs or 1) * sampler.steps_per_epoch), 1)
        return cls(config, prepared, chosen, sampler, steps)

    def sample(self, number: int) -> AlignedSample:
        """Training sample `number`, 0 ≤ number < n."""
        return self.prepared[int(self.chosen[number])]

    @cached_property
    def without_distributions(self) -> int:
        """Training samples of records that hold no distributions (rows that were too thin to use do not count)."""
        suspects = np.flatnonzero(self.prepared.soft[self.chosen] == 0)
        return sum(bool(np.isnan(self.sample(number).targets.known).all()) for number in suspects)

    def micro_batches(self, step: int, rank: int, mask_id: int, pad_id: int) -> Iterator[MicroBatch]:
        """This rank's forwards of `step`."""
        epoch, parts = self.sampler.micro_batches(step, rank)
        train = self.config.train
        for part in parts:
            samples = [self.sample(number) for number in part]
            rows = []
            for sample in samples:
                generator = sample_generator(self.config.seed, epoch, sample.sample_id)
                anchors = choose_anchors(sample, train.anchors, generator)
                rows.append(lay_out(sample, anchors, train.block_length, mask_id, train.max_sequence_tokens))
            yield collate(samples, rows, pad_id=pad_id, depth_decay=train.depth_decay)
