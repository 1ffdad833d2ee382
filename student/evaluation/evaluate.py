"""`student evaluate`: how good the drafter is on held-out text, before and after training, with no teacher at hand."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from shared.config import PipelineConfig
from shared.errors import CheckpointError
from shared.files import write_json
from student.evaluation.measure import HeldOut, measure
from student.lineage import IDENTITY, differences, evaluation_identity, read_json, require_current_model

logger = logging.getLogger(__name__)

RESULT = "evaluate.json"
ANSWERS = 3


def evaluate(config: PipelineConfig) -> dict[str, Any]:
    """Measure the initial and the trained student and write `evaluate.json` into the run's directory.

    What is up to date is left as it is; the initial student is measured once, however often another is trained.

    Raises:
        DatasetError: if the dataset or its prepared form is missing or holds no held-out text.
        CheckpointError: if either student is missing.
        StaleError: if dataset, start, prepared targets and trained student do not belong together.
    """
    import torch

    from student.model.export import load_student
    from student.training.engine import training_device, training_dtype

    students = {"before": config.student_init_dir, "after": config.student_final_dir}
    for directory in students.values():
        if not (directory / "config.json").exists():
            raise CheckpointError(
                f"{directory} holds no model; run `student init` and `student train` with this config first"
            )
    held_out = HeldOut.open(config)
    require_current_model(config)
    identity = evaluation_identity(config)
    earlier = read_json(config.run_dir / RESULT) or {}
    changed = differences(earlier.get(IDENTITY) or {}, identity) if "before" in earlier else ["all"]
    if not changed:
        logger.info("already evaluated: %s", config.run_dir / RESULT)
        return earlier
    result: dict[str, Any] = {
        "rule": config.evaluate.rule,
        "draft_tokens": config.evaluate.draft_tokens,
        IDENTITY: identity,
    }
    for name, directory in students.items():
        if name == "before" and all(difference.startswith("model:") for difference in changed):
            result[name] = earlier[name]
            continue
        # The start has its checkpoint's dtype, in which this machine may be slow.
        model, tokenizer = load_student(directory, getattr(torch, training_dtype(config.train)))
        model.eval().to(training_device())
        result[name] = measure(held_out, model, tokenizer, directory, name).figures(config.evaluate.rule)
        if name == "after":
            result["answers"] = answers(held_out, model, tokenizer, directory)
    write_json(config.run_dir / RESULT, result)
    for name in students:
        logger.info("%s: %s", name, headline(result[name], config.evaluate.rule))
    for said in result["answers"]:
        logger.info("asked: %s\n  teacher: %s\n  student: %s", said["prompt"], said["teacher"], said["student"])
    return result


def answers(held_out: HeldOut, model: Any, tokenizer: Any, directory: Path) -> list[dict[str, str]]:
    """A few held-out prompts with the teacher's answer and the student's own, each at most as long as the teacher's."""
    from student.model.generate import answer, default_settings

    found = []
    for record in held_out.some(ANSWERS):
        settings = default_settings(model.config)
        blocks = max(
            min(-(-len(record.response_ids) // settings.block_length), settings.length // settings.block_length), 1
        )
        length = blocks * settings.block_length
        said = answer(model, tokenizer, directory, record.messages, replace(settings, length=length, steps=length))
        prompt = record.messages[-1].content
        found.append({"prompt": prompt, "teacher": record.response_bytes.decode("utf-8", "replace"), "student": said})
    return found


def headline(figures: dict[str, Any], rule: str) -> str:
    """The figure that a person asks for first."""
    if "tau" in figures:
        return f"tau {figures['tau']:.3f} ({rule})"
    return f"cross-entropy {figures['masked_ce']:.3f} nats a token (random masking)"
