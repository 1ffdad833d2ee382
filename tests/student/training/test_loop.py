"""The training loop of one rank, around an engine that is a plain optimizer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed

from student.alignment.prepare import prepare
from student.evaluation.measure import HeldOut, drafter_of
from student.losses.settings import LossSettings
from student.model.export import load_student
from student.model.initialize import initialize_student
from student.training import averaging, loop
from student.training.module import DistillationModule
from tests.fixtures.toy_run import load_toy, write_toy_shards


@pytest.mark.usefixtures("alone")
def test_what_drafts_in_a_measurement_is_the_average_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drafter copies the head when it is made, and reads the other weights in place."""
    config = load_toy(tmp_path, ["train.ema=0.5"])
    write_toy_shards(config, train=8, held_out=4)
    initialize_student(config)
    prepare(config)
    model, tokenizer = load_student(config.student_init_dir)
    module = DistillationModule(model, LossSettings("kl", 4))
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    averaging.keep_average(optimizer, 0.5)
    for _ in range(2):
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    engine = SimpleNamespace(
        module=module, optimizer=optimizer, basic_optimizer=optimizer, zero_optimization_stage=lambda: 0
    )
    run = loop.TrainingRun(
        config, None, engine, tokenizer, {}, 1, HeldOut.open(config), 1.0, 0, iter(())  # type: ignore[arg-type]
    )  # fmt: skip
    drafts = []

    def drafted(held_out: HeldOut, measured: Any, _tokenizer: Any, drafter: Any, *_: Any) -> dict[str, Any]:
        both = (drafter, drafter_of(held_out, measured, config.student_init_dir))
        drafts.extend(found.forward(found.cache, [0], [np.arange(6)], 4) for found in both)
        return {"ratio": {}}

    monkeypatch.setattr(loop, "measure", drafted)
    run.measure(1)
    assert drafts[0] == drafts[1]
