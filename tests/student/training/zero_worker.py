"""One rank of `test_zero`: trains a toy run in many ways and writes what came of each.

    RANK=… WORLD_SIZE=… … python -m tests.student.training.zero_worker CONFIG OUTPUT SUITE

All in one process, because starting one takes longer than training for some steps.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.config import PipelineConfig, load_config
from student.data.batch import MicroBatch
from student.training import checkpoint
from student.training.engine import initialize_process_group
from student.training.loop import TrainingRun, full_weights
from student.training.train import Decision, build

LORA = "student.lora={rank: 4, alpha: 8}"
POISONED = 2
"""The step that is spoilt."""


def zero(stage: int, **settings: Any) -> str:
    """An override: this ZeRO stage, with parameters as small as the toy's shared out too."""
    if stage == 3:
        settings["stage3_param_persistence_threshold"] = 0
    return f"train.deepspeed={json.dumps({'zero_optimization': {'stage': stage} | settings})}"


def build_run(path: Path, *overrides: str, resume: bool = False) -> tuple[PipelineConfig, TrainingRun]:
    """A run that is ready to train; its global batch of 4 rows is for two ranks."""
    config = load_config(path, ["train.steps=60", "train.warmup=0.1", *overrides])
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    checkpoints = checkpoint.complete(config.checkpoints_dir, {}) if resume else []
    decision = Decision(finished=False, loss="kl", identity={}, checkpoints=checkpoints)
    return config, build(config, decision, checkpoints[0] if resume else None, rank, ranks)


def losses(path: Path) -> dict[Any, tuple[list[float], list[float]]]:
    """Losses and gradient norms of four steps under each stage, with and without LoRA, accumulation and offload, and
    with activation checkpointing."""
    kinds: list[tuple[str, int, list[str]]] = [
        *(("full", accumulation, []) for accumulation in (1, 2)),
        *(("lora", accumulation, [LORA]) for accumulation in (1, 2)),
        ("full, checkpointed", 2, ["train.activation_checkpointing=true"]),
    ]
    stages = {str(stage): zero(stage) for stage in range(4)}
    stages |= {f"{stage}, offloaded": zero(stage, offload_optimizer={"device": "cpu"}) for stage in (1, 2, 3)}
    found = {}
    for (stage, override), (kind, accumulation, more) in itertools.product(stages.items(), kinds):
        _, run = build_run(path, override, f"train.micro_batch={2 // accumulation}", *more)
        entries = [run.step(step) for step in range(4)]
        found[stage, kind, accumulation] = tuple([entry[name] for entry in entries] for name in ("loss", "grad_norm"))
        run.engine.destroy()
    return found


def muon(path: Path) -> dict[Any, list[float]]:
    """The same with Muon; the rate suits a random start."""
    found = {}
    kinds: dict[str, list[str]] = {"full": [], "lora": [LORA]}
    for stage, (kind, more) in itertools.product(range(4), kinds.items()):
        _, run = build_run(path, zero(stage), "train.micro_batch=1", "train.optimizer=muon", *more)
        found[stage, kind] = [run.step(step)["loss"] for step in range(6)]
        run.engine.destroy()
    return found


def averages(path: Path) -> dict[Any, Any]:
    """Four steps with an average, at once and interrupted after two; what the average ought to be, from the weights."""
    found = {}
    for stage, (dtype, optimizer) in itertools.product(range(4), (("float32", "adamw"), ("bfloat16", "muon"))):
        overrides = (zero(stage), "train.ema=0.6", f"train.dtype={dtype}", f"train.optimizer={optimizer}")
        config, run = build_run(path, *overrides)
        expected: dict[str, Tensor] = {}
        for step in range(4):
            run.step(step)
            weights = {name: value.float().clone() for name, value in full_weights(run.engine).items()}
            expected = {name: 0.6 * expected.get(name, value) + 0.4 * value for name, value in weights.items()}
            if step == 1:
                checkpoint.save(run.engine, config.checkpoints_dir, 2, {}, 1, run.rank)
        average = full_weights(run.engine, averaged=True)
        run.engine.destroy()
        _, run = build_run(path, *overrides, resume=True)
        for step in (2, 3):
            run.step(step)
        found[stage, dtype, optimizer] = average, expected, full_weights(run.engine, averaged=True)
        run.engine.destroy()
        torch.distributed.barrier()
        if run.rank == 0:
            shutil.rmtree(config.checkpoints_dir)
        torch.distributed.barrier()
    return found


def skipping(path: Path) -> dict[Any, Any]:
    """Steps 0 to 3 with a spoilt micro-batch in step 2, on rank 1 alone; and the same steps without step 2."""
    found = {}
    cases = [(str(stage), zero(stage), "float32", "adamw") for stage in range(4)]
    cases += [(str(stage), zero(stage), "bfloat16", "muon") for stage in (1, 3)]
    cases += [("2, offloaded", zero(2, offload_optimizer={"device": "cpu"}), "float32", "adamw")]
    for stage, override, dtype, optimizer in cases:
        overrides = (
            override, f"train.dtype={dtype}", f"train.optimizer={optimizer}", "train.ema=0.5", "train.micro_batch=1",
        )  # fmt: skip
        _, run = build_run(path, *overrides)
        order = run.loader.sampler
        run.batches = (batch for number, batch in enumerate(run.batches) if number // order.accumulation != POISONED)
        for step in (0, 1, 3):
            run.step(step)
        expected = state_of(run)
        run.engine.destroy()
        # A loss that is not finite spoils all gradients: one matrix alone is the harder case.
        for kind in POISONS if stage == "2" else ["gradient"]:
            _, run = build_run(path, *overrides)
            POISONS[kind](run)
            entries = [run.step(step) for step in range(4)]
            found[stage, dtype, optimizer, kind] = expected, state_of(run), entries
            run.engine.destroy()
    return found


def state_of(run: TrainingRun) -> dict[str, Any]:
    """All that a step changes. Optimizer states are this rank's part."""
    states = [
        value.clone() if torch.is_tensor(value) else value
        for state in run.engine.basic_optimizer.state.values()
        for _, value in sorted(state.items())
    ]
    weights = {name: value.clone() for name, value in full_weights(run.engine).items()}
    return {"weights": weights, "states": states, "schedule": run.engine.lr_scheduler.state_dict()}


def spoil(run: TrainingRun, change: Callable[[MicroBatch], MicroBatch]) -> None:
    """`change` the first micro-batch of rank 1 in the poisoned step."""
    poisoned = POISONED * run.loader.sampler.accumulation
    run.batches = (
        change(batch) if (run.rank, number) == (1, poisoned) else batch for number, batch in enumerate(run.batches)
    )


def poison_loss(run: TrainingRun) -> None:
    """A weight that is Inf."""

    def change(batch: MicroBatch) -> MicroBatch:
        return replace(batch, targets=replace(batch.targets, weight=batch.targets.weight * torch.inf))

    spoil(run, change)


def poison_value(run: TrainingRun) -> None:
    """A loss that is Inf though its gradient is finite."""
    forward, spoilt = run.engine.module.forward, []

    def change(batch: MicroBatch) -> MicroBatch:
        spoilt.append(True)
        return batch

    def shifted(batch: MicroBatch) -> tuple[Tensor, Tensor]:
        total, sums = forward(batch)
        added = torch.inf if spoilt and spoilt.pop() else 0.0
        return total + added, sums + added

    run.engine.module.forward = shifted
    spoil(run, change)


def poison_gradient(run: TrainingRun) -> None:
    """The gradient of one matrix overflows though the loss is finite."""
    spoilt: list[bool] = []

    def change(batch: MicroBatch) -> MicroBatch:
        spoilt.append(True)
        return batch

    matrix = next(p for name, p in run.engine.module.named_parameters() if ".blocks." in name and "norm" not in name)
    matrix.register_hook(lambda gradient: gradient * (torch.inf if spoilt and spoilt.pop() else 1))
    spoil(run, change)


POISONS = {"loss": poison_loss, "value": poison_value, "gradient": poison_gradient}
SUITES = {suite.__name__: suite for suite in (losses, muon, averages, skipping)}


def main() -> None:
    torch.set_num_threads(1)
    initialize_process_group()
    path, output, suite = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.save(SUITES[suite](path), f"{output}.{os.environ['RANK']}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
