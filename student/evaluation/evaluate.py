"""`student evaluate`: how good the drafter is on held-out text, before and after training, with no teacher at hand.

The held-out responses are shared out over ranks, which are started as `student train` starts them: each measures its
part on its own device, and rank 0 writes what all have found.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from shared.config import PipelineConfig
from shared.dataset.records import Record
from shared.errors import CheckpointError, ConfigError
from shared.files import read_json, write_json
from student.drafting.propose import Drafter
from student.drafting.steps import spans
from student.evaluation.measure import HeldOut, drafter_of, gathered, measure
from student.evaluation.offline_acceptance import steps_along
from student.lineage import IDENTITY, differences, evaluation_identity, require_current_model, unrecorded
from student.model.export import load_student
from student.model.generate import answer, default_settings
from student.training import launch
from student.training.engine import (
    agreed,
    initialize_process_group,
    require_gpu_build,
    training_device,
    training_dtype,
)
from student.training.skipping import finite

logger = logging.getLogger(__name__)

RESULT = "evaluate.json"
ANSWERS = 3


@dataclass(frozen=True)
class Work:
    """What there is to measure.

    Attributes:
        earlier: what evaluate.json holds. identity: of what is measured now.
        students: names of those that are to be measured; none if the file is up to date.
    """

    earlier: dict[str, Any]
    identity: dict[str, Any]
    students: tuple[str, ...]


def evaluate(config: PipelineConfig) -> dict[str, Any]:
    """Measure the initial and the trained student and write `evaluate.json` into the run's directory.

    What is up to date is left as it is; the initial student is measured once, however often another is trained.
    Started by hand, this becomes one process per rank.

    Raises:
        DatasetError: if the dataset or its prepared form is missing or holds no held-out text.
        CheckpointError: if either student is missing. ConfigError: as `require_gpu_build`.
        StaleError: if dataset, start, prepared targets and trained student do not belong together.
    """
    ranks = launch.ranks_here(config.train)
    if launch.is_rank() or ranks * launch.nodes_by_hand() == 1:
        return evaluate_rank(config)
    work = outstanding(config)  # here, so that a mistake ends without starting ranks
    if work.students:
        launch.run_ranks(ranks, config.train, sys.argv[1:])
    return work.earlier


def outstanding(config: PipelineConfig) -> Work:
    """What is to be measured. Raises as `evaluate` does."""
    require_gpu_build()
    for directory in _directories(config).values():
        if not (directory / "config.json").exists():
            raise CheckpointError(
                f"{directory} holds no model; run `student init` and `student train` with this config first"
            )
    HeldOut.open(config)
    require_current_model(config)
    identity = evaluation_identity(config)
    earlier = read_json(config.run_dir / RESULT) or {}
    made = earlier.get(IDENTITY) or {}
    changed = [*differences(made, identity), *unrecorded(made, identity)] if "before" in earlier else ["all"]
    if not changed:
        logger.info("already evaluated: %s", config.run_dir / RESULT)
        return Work(earlier, identity, ())
    only_model = all(difference.startswith("model:") for difference in changed)
    return Work(earlier, identity, ("after",) if only_model else ("before", "after"))


def evaluate_rank(config: PipelineConfig) -> dict[str, Any]:
    """This process's part. Raises as `evaluate` does, on rank 0; the others leave the message to it."""
    rank, ranks = initialize_process_group(with_deepspeed=False) if launch.is_rank() else (0, 1)
    work = agreed(lambda: outstanding(config)) if launch.is_rank() else outstanding(config)
    result: dict[str, Any] = work.earlier
    if work.students:
        held_out = HeldOut.open(config)
        result = {"rule": config.evaluate.rule, "draft_tokens": config.evaluate.draft_tokens, IDENTITY: work.identity}
        for name, directory in _directories(config).items():
            if name not in work.students:
                result[name] = work.earlier[name]
                continue
            # The start has its checkpoint's dtype, in which this machine may be slow.
            dtype = training_dtype(config.train)
            model, tokenizer = load_student(directory, getattr(torch, dtype))
            model.eval().to(training_device())
            drafter = drafter_of(held_out, model, directory, dtype)
            result[name] = measure(held_out, model, tokenizer, drafter, name, rank, ranks)
            if name == "after":
                shown = answers(held_out, held_out.some(ANSWERS)[rank::ranks], model, tokenizer, directory, drafter)
                parts = gathered(shown, ranks)
                result["answers"] = [parts[number % ranks][number // ranks] for number in range(sum(map(len, parts)))]
        if rank == 0:
            result = finite(result)  # what there is no text for is NaN
            write_json(config.run_dir / RESULT, result)
            for name in _directories(config):
                logger.info("%s: %s", name, headline(result[name], config.evaluate.rule))
            for said in result["answers"]:
                logger.info("asked: %s\n  teacher: %s\n  student: %s", said["prompt"], said["teacher"], said["student"])
    if launch.is_rank():
        torch.distributed.destroy_process_group()
    return result


def _directories(config: PipelineConfig) -> dict[str, Path]:
    return {"before": config.student_init_dir, "after": config.student_final_dir}


def answers(
    held_out: HeldOut,
    records: Sequence[Record],
    model: Any,
    tokenizer: Any,
    directory: Path,
    drafter: Drafter | None,
) -> list[dict[str, Any]]:
    """The prompts of `records`, each with the teacher's answer and the student's own, which is at most as long; with a
    drafter also, in pieces, what it would have drafted of the teacher's (`steps.spans`)."""
    found = []
    for record in records:
        settings = default_settings(model.config)
        blocks = max(
            min(-(-len(record.response_ids) // settings.block_length), settings.length // settings.block_length), 1
        )
        length = blocks * settings.block_length
        try:
            said = answer(model, tokenizer, directory, record.messages, replace(settings, length=length, steps=length))
        except ConfigError as error:  # the teacher takes longer prompts than the student
            said = f"({error})"
        prompt = record.messages[-1].content
        taught = record.response_bytes.decode("utf-8", "replace")
        steps = [] if drafter is None else steps_along(drafter, record)
        drafted = [list(piece) for piece in spans(steps, held_out.dataset.vocabulary)]
        found.append({"prompt": prompt, "teacher": taught, "student": said, "drafted": drafted})
    return found


def headline(figures: dict[str, Any], rule: str) -> str:
    """The figure that a person asks for first."""
    if "tau" in figures:
        return f"tau {figures['tau']:.3f} ({rule})"
    return f"cross-entropy {figures['masked_ce']:.3f} nats a token (random masking)"
