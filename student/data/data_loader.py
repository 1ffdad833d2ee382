"""The training samples of a run as micro-batches: order, anchors and collation put together.

A forward's content depends on (seed, step) alone. PyTorch's data loader makes them ahead, in processes of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from shared.config import PipelineConfig, TrainConfig
from shared.errors import TrainingError
from student.alignment.prepared import PreparedDataset
from student.alignment.targets import AlignedSample
from student.data.batch import LaidOut, MicroBatch, collate
from student.data.batch_sampler import BatchSampler, PackedRow
from student.data.blocks import choose_anchors, fitting_anchors, lay_out, leaves_room, sample_generator
from student.data.random_masking import randomly_masked


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
            DatasetError: if there is no prepared dataset, or it is damaged. StaleError: if it is to be made again.
            TrainingError: if it holds no training sample.
            ConfigError: if the batch cannot be shared out.
        """
        prepared = PreparedDataset.of_run(config)
        of_split = np.asarray(prepared.indices(split="train"), dtype=np.int64)
        if not len(of_split):
            raise TrainingError(
                f"{config.prepared_dir} holds no sample of the split 'train': collect some and prepare again"
            )
        train = config.train
        prompts = prepared.prompt_lengths[of_split]
        chosen = of_split[leaves_room(prompts, train.block_length, train.max_sequence_tokens)]
        if not len(chosen):
            raise TrainingError(
                f"the shortest prompt has {prompts.min()} student tokens, which leaves no "
                f"room for a block of {train.block_length} in train.max_sequence_tokens {train.max_sequence_tokens}; "
                "raise it"
            )
        sampler = BatchSampler(
            most_tokens(prepared.lengths[chosen], prepared.anchors[chosen], train),
            train.packed_row_tokens,
            config.seed,
            train.global_batch,
            train.micro_batch,
            world_size,
        )
        steps = train.steps or sampler.steps_of(train.epochs or 1)
        return cls(config, prepared, chosen, len(of_split) - len(chosen), sampler, steps)

    def sample(self, number: int) -> AlignedSample:
        """Training sample `number`, 0 ≤ number < n."""
        return self.prepared[int(self.chosen[number])]

    @property
    def without_distributions(self) -> int:
        """Training samples of records that hold no distributions (rows that were too thin to use do not count)."""
        return int((~self.prepared.with_distributions[self.chosen]).sum())

    def micro_batches(self, rank: int, tokenizer: Any, first_step: int = 0) -> Iterator[MicroBatch]:
        """This rank's forwards from `first_step` to the last step, `sampler.accumulation` a step.

        Args:
            tokenizer: the student's, for its special tokens.
        """
        forwards = _Forwards(self, rank, tokenizer.mask_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
        workers = self.config.train.data_workers
        return iter(
            DataLoader(
                forwards,
                batch_size=None,
                sampler=range(first_step * self.sampler.accumulation, len(forwards)),
                num_workers=workers,
                pin_memory=torch.cuda.is_available(),
                # A fork would copy the threads of Arrow, and of the rank's process group, in the middle of their work.
                multiprocessing_context="spawn" if workers else None,
            )
        )

    def lay_out(self, row: PackedRow, mask_id: int, end_id: int) -> list[LaidOut]:
        """The samples of a row, each masked by the objective that its visit draws."""
        train, seed, laid_out = self.config.train, self.config.seed, []
        shares = train.objectives
        for number in row.samples:
            sample = self.sample(number)
            drawn = sample_generator(seed, row.epoch, f"{sample.sample_id}/objective").random()
            if drawn * (shares.blocks + shares.random_masking) < shares.blocks:
                candidates = fitting_anchors(sample, train.block_length, train.max_sequence_tokens)
                generator = sample_generator(seed, row.epoch, sample.sample_id)
                anchors = choose_anchors(candidates, train.anchors, generator)
                laid_out.append((sample, lay_out(sample, anchors, train.block_length, mask_id)))
            else:
                masked = randomly_masked(
                    sample, train.random_masking, seed, row.epoch,
                    mask_id=mask_id, end_id=end_id, max_sequence_tokens=train.max_sequence_tokens,
                )  # fmt: skip
                laid_out += ((sample, copy) for copy in masked)
        return laid_out


def most_tokens(lengths: NDArray[np.int64], anchor_counts: NDArray[np.int64], train: TrainConfig) -> NDArray[np.int64]:
    """int64 [n], the most tokens that a visit makes of samples of so many tokens and so many anchor positions."""
    longest, masking = train.max_sequence_tokens, train.random_masking
    tokens = np.zeros_like(lengths)
    if train.objectives.blocks:
        tokens = np.minimum(lengths, longest) + np.minimum(anchor_counts, train.anchors) * train.block_length
    if train.objectives.random_masking:
        tokens = np.maximum(tokens, masking.copies * np.minimum(lengths + masking.end_tokens, longest))
    return tokens


@dataclass(frozen=True)
class _Forwards(Dataset[MicroBatch]):
    """A rank's forwards by number, all steps in a row."""

    loader: TrainingDataLoader
    rank: int
    mask_id: int
    pad_id: int
    end_id: int

    def __len__(self) -> int:
        return self.loader.steps * self.loader.sampler.accumulation

    def __getitem__(self, number: int) -> MicroBatch:
        step, part = divmod(number, self.loader.sampler.accumulation)
        train = self.loader.config.train
        packed = self.loader.sampler.micro_batches(step, self.rank)[part]
        rows = [self.loader.lay_out(row, self.mask_id, self.end_id) for row in packed]
        return collate(rows, pad_id=self.pad_id, row_tokens=train.packed_row_tokens, depth_decay=train.depth_decay)
