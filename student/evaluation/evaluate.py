"""`student evaluate`: how good the drafter is on held-out text, before and after training, with no teacher at hand."""

from __future__ import annotations

import logging
from typing import Any

from shared.config import PipelineConfig
from shared.errors import CheckpointError
from shared.files import write_json
from student.evaluation.measure import HeldOut, measure
from student.lineage import IDENTITY, evaluation_identity, require_current_model

logger = logging.getLogger(__name__)


def evaluate(config: PipelineConfig) -> dict[str, Any]:
    """Measure the initial and the trained student and write `evaluate.json` into the run's directory.

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
    result: dict[str, Any] = {
        "rule": config.evaluate.rule,
        "draft_tokens": config.evaluate.draft_tokens,
        IDENTITY: evaluation_identity(config),
    }
    for name, directory in students.items():
        # The start has its checkpoint's dtype, in which this machine may be slow.
        model, tokenizer = load_student(directory, getattr(torch, training_dtype(config.train)))
        model.eval().to(training_device())
        result[name] = measure(held_out, model, tokenizer, directory, name).figures(config.evaluate.rule)
    write_json(config.run_dir / "evaluate.json", result)
    for name in students:
        logger.info("%s: %s", name, headline(result[name], config.evaluate.rule))
    return result


def headline(figures: dict[str, Any], rule: str) -> str:
    """The figure that a person asks for first."""
    if "tau" in figures:
        return f"tau {figures['tau']:.3f} ({rule})"
    return f"cross-entropy {figures['masked_ce']:.3f} nats a token (random masking)"
