"""How good a student drafts, from held-out shards (README.md of this folder), on one rank or many.

Every rank measures a part of the held-out responses, in forwards of the training's shape; the parts are put together on
all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from shared.config import PipelineConfig, TrainConfig
from shared.config.speculate import Way
from shared.console import progress
from shared.dataset.reader import Dataset
from shared.dataset.records import Record
from shared.errors import DatasetError
from student.alignment.prepared import PreparedDataset
from student.alignment.targets import AlignedSample
from student.data.batch import LaidOut, collate
from student.data.blocks import fitting_anchors, lay_out, leaves_room
from student.data.packing import pack
from student.data.random_masking import randomly_masked
from student.drafting.propose import Drafter
from student.evaluation.bounds import acceptance_bounds
from student.evaluation.offline_acceptance import OfflineAcceptance, draft_along
from student.losses.chunked import distillation_loss
from student.losses.objective import named_sums, summarize
from student.losses.settings import LossSettings

T = TypeVar("T")

logger = logging.getLogger(__name__)

RULES = ("greedy", "sample")


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What a student is measured on.

    Attributes:
        records: by decoding rule, to draft along.
        sampled: numbers of the prepared samples for rejection sampling.
        masked: numbers of the prepared samples for random masking; empty where that is not trained. Neither holds
            samples that training leaves out.
    """

    config: PipelineConfig
    dataset: Dataset
    prepared: PreparedDataset
    records: dict[str, list[Record]]
    sampled: NDArray[np.int64]
    masked: NDArray[np.int64]

    @classmethod
    def open(cls, config: PipelineConfig, prepared: PreparedDataset | None = None) -> HeldOut:
        """The held-out part of the run's dataset and prepared targets.

        Args:
            prepared: the run's, where the caller has opened it.

        Raises:
            DatasetError: if either is missing, or holds no held-out text of the headline's decoding rule, or none that
                training would keep.
            StaleError: if they do not belong together.
        """
        dataset = Dataset.open(config.shards_dir)
        prepared = prepared or PreparedDataset.of_run(config)
        most, blocks = config.evaluate.max_samples, config.train.objectives.blocks
        records = {rule: _held_out(dataset, rule, most) if blocks else [] for rule in RULES}
        if blocks and not records[config.evaluate.rule]:
            raise DatasetError(
                f"{config.shards_dir} holds no held-out response with the decoding rule {config.evaluate.rule!r}: "
                "add one to collect.decoding, or set evaluate.rule to the rule that it holds"
            )
        held_out = prepared.indices(split="held_out")
        if not len(held_out):
            raise DatasetError(f"{config.prepared_dir} holds no held-out sample: collect or import some")
        block_length, longest = config.train.block_length, config.train.max_sequence_tokens
        has_room = leaves_room(prepared.prompt_lengths, block_length, longest)
        kept = held_out[has_room[held_out]]
        if not len(kept):
            raise DatasetError(
                f"the shortest held-out prompt has {prepared.prompt_lengths[held_out].min()} student tokens, which "
                f"leaves no room for a block of {block_length} in train.max_sequence_tokens {longest}; raise it"
            )
        if len(kept) < len(held_out):
            logger.warning(
                "%d of %d held-out samples are left out: their prompts leave no room for a block of %d in "
                "train.max_sequence_tokens %d",
                len(held_out) - len(kept), len(held_out), block_length, longest,
            )  # fmt: skip
        sampled = prepared.indices(split="held_out", rule="sample") if blocks else held_out[:0]
        masked = kept if config.train.objectives.random_masking else kept[:0]
        return cls(config, dataset, prepared, records, sampled[has_room[sampled]][:most], masked[:most])

    def some(self, count: int) -> list[Record]:
        """At most `count` held-out conversations to show, of different prompts, and of different skills first."""
        split = self.dataset.records(split="held_out", distributions=False)
        latest_first = sorted((r for r in split if r.messages), key=lambda record: record.sample_id, reverse=True)
        by_prompt = {record.prompt_id: record for record in latest_first}
        by_skill = {record.skill: record.prompt_id for record in by_prompt.values()}
        return [by_prompt[name] for name in sorted(by_prompt, key=lambda name: name not in by_skill.values())][:count]

    def part(self, rank: int, ranks: int) -> HeldOut:
        """Every `ranks`-th response, from number `rank` on."""
        return replace(
            self,
            records={rule: records[rank::ranks] for rule, records in self.records.items()},
            sampled=self.sampled[rank::ranks],
            masked=self.masked[rank::ranks],
        )


def _held_out(dataset: Dataset, rule: str, most: int | None) -> list[Record]:
    records = dataset.records(split="held_out", rule=rule, distributions=False)
    return sorted(records, key=lambda record: record.sample_id)[:most]


@dataclass(frozen=True, slots=True)
class Measurement:
    """Of one part of the held-out responses.

    Attributes:
        acceptance: by decoding rule.
        sums: of the loss over all blocks of the sampled text (`LossTerms.sums`); None where there was none.
        alpha: sums of the lower and upper bounds on α, and their number.
        masked: sum over samples of the randomly masked cross-entropy, in nats, and its tokens.
    """

    acceptance: dict[str, OfflineAcceptance] = field(default_factory=dict)
    sums: torch.Tensor | None = None
    alpha: tuple[float, float, int] = (0.0, 0.0, 0)
    masked: tuple[float, int] = (0.0, 0)

    def figures(self, rule: str) -> dict[str, Any]:
        """What evaluate.json holds of a student, the headline for `rule`; not measured is None or absent."""
        low, high, positions = self.alpha
        bounds = {
            "alpha_low": low / positions if positions else None,
            "alpha_high": high / positions if positions else None,
        }
        figures: dict[str, Any] = dict(bounds)
        rules = {
            name: {
                "tau": 1 + result.mean_accepted,
                "acceptance_length": result.acceptance_length,
                "by_depth": result.by_depth(),
                "drafts": result.drafts,
                "by_confidence": result.chances(),
            }
            for name, result in self.acceptance.items()
        }
        if (headline := self.acceptance.get(rule)) is not None:
            figures |= {key: rules[rule][key] for key in ("tau", "by_depth", "drafts")}
            figures |= {"accepted_one_hot": headline.mean_accepted, "by_skill": headline.by_skill()}
        figures["rules"] = rules
        figures["ratio"] = {} if self.sums is None else _of_blocks(self.sums) | bounds
        figures["masked_ce"] = self.masked[0] / self.masked[1] if self.masked[1] else None
        return figures


def _of_blocks(sums: torch.Tensor) -> dict[str, Any]:
    summary, named = summarize(sums), named_sums(sums)
    return {
        "tau": 1 + float(named["accepted"] / named["blocks"]),
        "by_depth": summary["alpha_by_depth"],
        "ce": summary["ce"],
        "kl": summary["kl"],
        "blocks": summary["blocks"],
    }


def merged(parts: Sequence[Measurement]) -> Measurement:
    """The measurement of all parts together."""
    acceptance = {
        rule: reduce(add, [part.acceptance[rule] for part in parts if rule in part.acceptance])
        for rule in dict.fromkeys(rule for part in parts for rule in part.acceptance)
    }
    sums = [part.sums for part in parts if part.sums is not None]
    return Measurement(
        acceptance,
        sum(sums[1:], sums[0]) if sums else None,
        tuple(sum(column) for column in zip(*(part.alpha for part in parts), strict=True)),
        tuple(sum(column) for column in zip(*(part.masked for part in parts), strict=True)),
    )


def gathered(mine: T, ranks: int) -> list[T]:
    """What every rank has, on all of them. A collective."""
    parts = [mine] * ranks
    if ranks > 1:
        torch.distributed.all_gather_object(parts, mine)
    return parts


def measure(
    held_out: HeldOut, model: Any, tokenizer: Any, drafter: Drafter | None, note: str, rank: int = 0, ranks: int = 1
) -> dict[str, Any]:
    """What evaluate.json holds of a loaded model, in evaluation mode, on its device: `Measurement.figures`.

    Every rank measures a part of the responses and returns the figures of all. A collective.

    Args:
        drafter: the model, as `drafter_of` makes it.
        note: what the progress bars say of the model; only rank 0 shows them.
    """
    settings, part = held_out.config.evaluate, held_out.part(rank, ranks)
    acceptance: dict[str, OfflineAcceptance] = {}
    with progress() as bar:
        for rule, records in part.records.items():
            if records and drafter is not None:
                task = bar.add_task(f"{note}: drafting {rule} text", total=len(records), note="", visible=rank == 0)
                advance = partial(bar.advance, task)
                acceptance[rule] = draft_along(drafter, records, settings.batch, advance)
        total = len(part.sampled) + len(part.masked)
        task = bar.add_task(f"{note}: held-out loss", total=total, note="", visible=rank == 0)
        sums, alpha = _rejection_sampling(part, model, tokenizer, partial(bar.advance, task))
        masked = _random_masking(part, model, tokenizer, partial(bar.advance, task))
    measured = gathered(Measurement(acceptance, sums, alpha, masked), ranks)
    return merged(measured).figures(settings.rule)


def drafter_of(held_out: HeldOut, model: Any, directory: Path, way: Way | None = None) -> Drafter | None:
    """A loaded student as a drafter for the teacher of the held-out text, with the options that it is served with; None
    where no text is drafted along.

    Args:
        directory: has the student's tokenizer.
        way: how drafts are computed; null leaves the weights of a model that is in training where they are.
    """
    if not any(held_out.records.values()):
        return None
    config = held_out.config
    options = config.speculate.drafter
    changes: dict[str, Any] = {"block_length": options.block_length or config.train.block_length, "memory_gib": None}
    if directory != config.student_final_dir:  # only a trained student has counts of its tokens (`frequencies.py`)
        changes["draft_vocabulary"] = None
    return Drafter.from_student(
        model,
        directory,
        held_out.dataset.vocabulary,
        held_out.dataset.tokenizer_dir,
        config.evaluate.draft_tokens,
        options.model_copy(update=changes),
        max_context_tokens=config.speculate.max_context_tokens,
        way=way,
        in_turns=True,
    )


def _rejection_sampling(
    held_out: HeldOut, model: Any, tokenizer: Any, advance: Callable[[int], None]
) -> tuple[torch.Tensor | None, tuple[float, float, int]]:
    """The loss's sums and the bounds on α, at every anchor of the sampled text."""
    from student.training.module import DistillationModule

    train = held_out.config.train
    settings = LossSettings(loss="kl", block_length=train.block_length)
    module = DistillationModule(model, settings)
    sums, low, high, positions = [], 0.0, 0.0, 0
    for group in _groups(held_out, held_out.sampled):
        for rows in _packed(_blocks(group, train, tokenizer.mask_token_id), train):
            of_first = [[(sample, row.at_depth(1)) for sample, row in packed] for packed in rows]
            batch, first = (
                collate(chosen, pad_id=tokenizer.pad_token_id, row_tokens=train.packed_row_tokens).to(model.device)
                for chosen in (rows, of_first)
            )
            with torch.inference_mode():
                hidden_NxD = module.hidden_states(batch)
                sums.append(distillation_loss(hidden_NxD, model.head_weight, batch.targets, settings).sums.cpu())
                bounds = acceptance_bounds(hidden_NxD[batch.targets.depth == 1], model.head_weight, first.targets)
            known = ~bounds[0].isnan()
            low, high = (total + float(bound.nansum()) for total, bound in zip((low, high), bounds, strict=True))
            positions += int(known.sum())
        advance(len(group))
    return (torch.stack(sums).sum(0) if sums else None), (low, high, positions)


def _random_masking(held_out: HeldOut, model: Any, tokenizer: Any, advance: Callable[[int], None]) -> tuple[float, int]:
    """Randomly masked cross-entropy, with the masks of epoch 0: the same whenever and wherever it is measured."""
    from student.training.module import DistillationModule

    config, train = held_out.config, held_out.config.train
    module = DistillationModule(model, LossSettings(loss="ce", block_length=train.block_length))
    total, tokens = 0.0, 0
    for group in _groups(held_out, held_out.masked):
        laid_out = [
            (sample, row)
            for sample in group
            for row in randomly_masked(
                sample,
                train.random_masking,
                config.seed,
                0,
                mask_id=tokenizer.mask_token_id,
                end_id=tokenizer.eos_token_id,
                max_sequence_tokens=train.max_sequence_tokens,
            )
        ]
        for rows in _packed(laid_out, train):
            batch = collate(rows, pad_id=tokenizer.pad_token_id, row_tokens=train.packed_row_tokens)
            with torch.inference_mode():
                total += float(module(batch.to(model.device))[0])
            tokens += batch.target_count
        advance(len(group))
    return total, tokens


def _groups(held_out: HeldOut, numbers: NDArray[np.int64]) -> Iterator[list[AlignedSample]]:
    size = held_out.config.evaluate.batch
    for start in range(0, len(numbers), size):
        yield [held_out.prepared[int(number)] for number in numbers[start : start + size]]


def _blocks(samples: Sequence[AlignedSample], train: TrainConfig, mask_id: int) -> list[LaidOut]:
    """Every block of every sample; one with more blocks than a row has room for is laid out several times."""
    laid_out: list[LaidOut] = []
    for sample in samples:
        anchors = fitting_anchors(sample, train.block_length, train.max_sequence_tokens)
        clean = min(len(sample.input_ids), train.max_sequence_tokens)
        most = (train.packed_row_tokens - clean) // train.block_length
        parts = (anchors[start : start + most] for start in range(0, len(anchors), most))
        laid_out += ((sample, lay_out(sample, part, train.block_length, mask_id)) for part in parts)
    return laid_out


def _packed(laid_out: list[LaidOut], train: TrainConfig) -> Iterator[list[list[LaidOut]]]:
    """Rows of the training's length, always `micro_batch` at a time: the last forward has empty ones."""
    lengths = np.array([len(row) for _, row in laid_out], dtype=np.int64)
    rows = [[laid_out[number] for number in row] for row in pack(lengths, train.packed_row_tokens)]
    for start in range(0, len(rows), train.micro_batch):
        chosen = rows[start : start + train.micro_batch]
        yield chosen + [[] for _ in range(train.micro_batch - len(chosen))]
