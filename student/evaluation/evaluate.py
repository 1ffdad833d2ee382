"""`student evaluate`: how good the drafter is on held-out text, before and after training, with no teacher at hand.

Two measurements, each from the shards alone (README.md of this folder). *One-hot verification*: the drafter that
serving uses drafts along the stored text of each decoding rule (`offline_acceptance.py`); its tau, in teacher tokens,
is what speculative decoding with these drafts would show. *Rejection sampling*: blocks at every anchor of text sampled
at T = 1, for 1 + J and the bounds on α, in student tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.config import PipelineConfig, TrainConfig
from shared.console import progress
from shared.dataset.reader import Dataset
from shared.dataset.records import Record
from shared.errors import CheckpointError, DatasetError
from shared.files import write_json
from student.alignment.prepared import PreparedDataset
from student.alignment.targets import AlignedSample
from student.data.batch import LaidOut, collate
from student.data.blocks import fitting_anchors, lay_out
from student.data.packing import pack
from student.evaluation.offline_acceptance import OfflineAcceptance, draft_along
from student.lineage import IDENTITY, evaluation_identity, require_current_model

logger = logging.getLogger(__name__)


def evaluate(config: PipelineConfig) -> dict[str, Any]:
    """Measure the initial and the trained student and write `evaluate.json` into the run's directory.

    Raises:
        DatasetError: if the dataset or its prepared form is missing or holds no held-out text.
        CheckpointError: if either student is missing.
        StaleError: if dataset, start, prepared targets and trained student do not belong together.
    """
    students = {"before": config.student_init_dir, "after": config.student_final_dir}
    for directory in students.values():
        if not (directory / "config.json").exists():
            raise CheckpointError(
                f"{directory} holds no model; run `student init` and `student train` with this config first"
            )
    dataset = Dataset.open(config.shards_dir)
    prepared = PreparedDataset.of_run(config)
    require_current_model(config)
    held_out = {rule: _held_out(dataset, rule, config.evaluate.max_samples) for rule in ("greedy", "sample")}
    if not held_out[config.evaluate.rule]:
        raise DatasetError(
            f"{config.shards_dir} holds no held-out response with the decoding rule {config.evaluate.rule!r}: "
            "add one to collect.decoding, or set evaluate.rule to the rule that it holds"
        )
    result: dict[str, Any] = {
        "rule": config.evaluate.rule,
        "draft_tokens": config.evaluate.draft_tokens,
        IDENTITY: evaluation_identity(config),
    }
    for name, directory in students.items():
        result[name] = _measure(config, name, directory, dataset, held_out, prepared)
    write_json(config.run_dir / "evaluate.json", result)
    for name in students:
        logger.info("%s: tau %.3f (%s)", name, result[name]["tau"], config.evaluate.rule)
    return result


def _held_out(dataset: Dataset, rule: str, most: int | None) -> list[Record]:
    records = dataset.records(split="held_out", rule=rule, distributions=False)
    return sorted(records, key=lambda record: record.sample_id)[:most]


def _measure(
    config: PipelineConfig,
    name: str,
    directory: Path,
    dataset: Dataset,
    held_out: dict[str, list[Record]],
    prepared: PreparedDataset,
) -> dict[str, Any]:
    import torch

    from student.drafting.propose import Drafter
    from student.model.export import load_student
    from student.training.engine import training_device, training_dtype

    # The start has its checkpoint's dtype, in which this machine may be slow.
    model, tokenizer = load_student(directory, getattr(torch, training_dtype(config.train)))
    model.eval().to(training_device())
    drafter = Drafter.from_student(
        model,
        directory,
        dataset.vocabulary,
        dataset.tokenizer_dir,
        config.evaluate.draft_tokens,
        config.train.block_length,
    )
    measured: dict[str, OfflineAcceptance] = {}
    with progress() as bar:
        for rule, records in held_out.items():
            if records:
                task = bar.add_task(f"{name}: drafting {rule} text", total=len(records), note="")
                measured[rule] = draft_along(
                    drafter, records, config.evaluate.draft_tokens, config.evaluate.batch, partial(bar.advance, task)
                )
        sampled = prepared.indices(split="held_out", rule="sample")[: config.evaluate.max_samples]
        task = bar.add_task(f"{name}: rejection sampling", total=len(sampled), note="")
        rejection = _rejection_sampling(config, model, tokenizer, prepared, sampled, partial(bar.advance, task))
    headline = measured[config.evaluate.rule]
    return {
        "tau": 1 + headline.mean_accepted,
        "accepted_one_hot": headline.mean_accepted,
        "by_depth": headline.by_depth(),
        "alpha_low": rejection.get("alpha_low"),
        "alpha_high": rejection.get("alpha_high"),
        "drafts": headline.drafts,
        "by_skill": headline.by_skill(),
        "rules": {
            rule: {
                "tau": 1 + result.mean_accepted,
                "acceptance_length": result.acceptance_length,
                "by_depth": result.by_depth(),
                "drafts": result.drafts,
            }
            for rule, result in measured.items()
        },
        "ratio": rejection,
    }


def _rejection_sampling(
    config: PipelineConfig,
    model: Any,
    tokenizer: Any,
    prepared: PreparedDataset,
    chosen: NDArray[np.int64],
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """1 + J and the α bounds of rejection sampling at T = 1, at every anchor of the held-out samples `chosen`."""
    import torch

    from student.evaluation.bounds import acceptance_bounds
    from student.losses.chunked import distillation_loss
    from student.losses.objective import named_sums, summarize
    from student.losses.settings import LossSettings
    from student.training.module import DistillationModule

    if not len(chosen):
        return {}
    block_length = config.train.block_length
    settings = LossSettings(loss="kl", block_length=block_length)
    module = DistillationModule(model, settings)
    device = model.head_weight.device
    sums, lows, highs = [], [], []
    for start in range(0, len(chosen), config.evaluate.batch):
        group = [prepared[int(i)] for i in chosen[start : start + config.evaluate.batch]]
        for rows in _packed(group, config.train, tokenizer.mask_token_id):
            batch, first = (
                collate(of_depths, pad_id=tokenizer.pad_token_id, row_tokens=config.train.packed_row_tokens).to(device)
                for of_depths in (rows, [[(sample, row.at_depth(1)) for sample, row in packed] for packed in rows])
            )
            with torch.inference_mode():
                hidden_NxD = module.hidden_states(batch)
                sums.append(distillation_loss(hidden_NxD, model.head_weight, batch.targets, settings).sums)
                first_logits = hidden_NxD[batch.targets.depth == 1] @ model.head_weight.T
                low, high = acceptance_bounds(first_logits, first.targets)
            lows.append(low.cpu())
            highs.append(high.cpu())
        advance(len(group))
    if not sums:
        return {}
    total = torch.stack(sums).sum(0)
    summary, named = summarize(total), named_sums(total)
    return {
        "tau": 1 + float(named["accepted"] / named["blocks"]),
        "alpha_low": float(torch.cat(lows).nanmean()),
        "alpha_high": float(torch.cat(highs).nanmean()),
        "by_depth": summary["alpha_by_depth"],
        "ce": summary["ce"],
        "kl": summary["kl"],
        "blocks": summary["blocks"],
    }


def _packed(samples: Sequence[AlignedSample], train: TrainConfig, mask_id: int) -> Iterator[list[list[LaidOut]]]:
    """Every block of every sample in rows of the training's length, `micro_batch` rows at a time.

    A sample with more blocks than a row has room for is laid out several times, with a part of its blocks each.
    """
    laid_out: list[LaidOut] = []
    for sample in samples:
        anchors = fitting_anchors(sample, train.block_length, train.max_sequence_tokens)
        clean = min(len(sample.input_ids), train.max_sequence_tokens)
        most = (train.packed_row_tokens - clean) // train.block_length
        parts = (anchors[start : start + most] for start in range(0, len(anchors), most))
        laid_out += ((sample, lay_out(sample, part, train.block_length, mask_id)) for part in parts)
    lengths = np.array([len(row) for _, row in laid_out], dtype=np.int64)
    rows = [[laid_out[number] for number in row] for row in pack(lengths, train.packed_row_tokens)]
    for start in range(0, len(rows), train.micro_batch):
        yield rows[start : start + train.micro_batch]
