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
from student.data.blocks import choose_anchors, fitting_anchors, lay_out, sample_generator


@dataclass(frozen=True)
class TrainingDataLoader:
    """The prepared training samples, their sampler, and how many steps there will be.

    Attributes:
        chosen: int64 [n], numbers of the training samples within `prepared`.
        left_out: training samples whose prompt leaves no room for a block.
        steps: of the whole run.
    """

    config: PipelineConfig
    prepared: PreparedDataset
    chosen: NDArray[np.int64]
    left_out: int
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
        of_split = np.asarray(prepared.indices(split="train"), dtype=np.int64)
        if not len(of_split):
            raise TrainingError(
                f"{config.prepared_dir} holds no sample of the split 'train': collect some and prepare again"
            )
        room = config.train.max_sequence_tokens - config.train.block_length
        chosen = of_split[prepared.prompt_lengths[of_split] <= room]
        if not len(chosen):
            raise TrainingError(
                f"the shortest prompt has {prepared.prompt_lengths[of_split].min()} student tokens, which leaves no "
                f"room for a block of {config.train.block_length} in train.max_sequence_tokens "
                f"{config.train.max_sequence_tokens}; raise it"
            )
        sampler = BatchSampler(
            lengths=np.asarray(prepared.lengths)[chosen],
            seed=config.seed,
            global_batch=config.train.global_batch,
            micro_batch=config.train.micro_batch,
            world_size=world_size,
        )
        steps = config.train.steps or max(round((config.train.epochs or 1) * sampler.steps_per_epoch), 1)
        return cls(config, prepared, chosen, len(of_split) - len(chosen), sampler, steps)

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
                candidates = fitting_anchors(sample, train.block_length, train.max_sequence_tokens)
                anchors = choose_anchors(candidates, train.anchors, generator)
                rows.append(lay_out(sample, anchors, train.block_length, mask_id))
            yield collate(samples, rows, pad_id=pad_id, depth_decay=train.depth_decay)
