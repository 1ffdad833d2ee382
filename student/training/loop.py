"""The training loop of one rank.

One step: this rank's micro-batches go through the engine, each loss scaled so that the step's gradient is the mean over
all targets of all ranks; then the sums for the log are added up over ranks. Every rank runs the same number of
micro-batches, with or without work in them.
"""

from __future__ import annotations

import itertools
import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed

from shared.config import PipelineConfig, dump_config
from shared.console import progress
from shared.files import new_directory, write_json, write_text
from student.data.batch import MicroBatch
from student.data.data_loader import TrainingDataLoader
from student.lineage import IDENTITY
from student.losses.objective import loss_scale, named_sums, sum_over_ranks, summarize
from student.model.export import save_student
from student.training import averaging, checkpoint, skipping
from student.training.metrics_logger import MetricsLogger

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class TrainingRun:
    """What one rank needs to train; `metrics` is rank 0's alone."""

    config: PipelineConfig
    loader: TrainingDataLoader
    engine: Any
    tokenizer: Any
    identity: dict[str, Any]
    rank: int
    metrics: MetricsLogger | None = None
    done: int = 0
    started: float = field(default_factory=time.monotonic)
    tokens: int = 0
    waited: float = 0.0
    batches: Iterator[MicroBatch] = field(default_factory=lambda: iter(()))

    def run(self) -> None:
        """Train from step `done` to the end, publish the model."""
        if self.rank == 0:
            self.metrics = MetricsLogger(self.config.run_dir, self.done)
            if self.done:
                logger.info("resuming after step %d of %d", self.done, self.loader.steps)
        self.started = time.monotonic()
        self.batches = self.loader.micro_batches(self.rank, self.tokenizer, first_step=self.done)
        every = self.config.train.checkpoint_steps
        with progress() as bar:
            task = bar.add_task(
                "training", total=self.loader.steps, completed=self.done, note="", visible=self.rank == 0
            )
            for step in range(self.done, self.loader.steps):
                entry = self.step(step)
                if self.metrics is not None:
                    self.metrics.write(entry)
                    loss, match = entry["loss"] or 0.0, entry["match_by_depth"][0] or 0.0
                    note = f"loss {loss:.3f} match@1 {match:.3f} {entry['tokens_per_s']:,.0f} tok/s"
                    bar.update(task, completed=step + 1, note=note)
                skipping.require_few(entry["skipped"], self.config.train)
                if every and (step + 1) % every == 0 and step + 1 < self.loader.steps:
                    keep = self.config.train.keep_checkpoints
                    checkpoint.save(self.engine, self.config.checkpoints_dir, step + 1, self.identity, keep, self.rank)
        self.publish()

    def step(self, step: int) -> dict[str, Any]:
        """Train step `step` (0-based); its entry of the metrics, the same on every rank."""
        order = self.loader.sampler
        asked = time.monotonic()
        batches = list(itertools.islice(self.batches, order.accumulation))
        self.waited += time.monotonic() - asked
        targets = sum_over_ranks(torch.tensor(sum(batch.target_count for batch in batches), device=self.engine.device))
        scale = loss_scale(int(targets), world_size=order.world_size, accumulation_steps=order.accumulation)
        sums = []
        for batch in batches:
            total, terms = self.engine(batch.to(self.engine.device))
            self.engine.backward(skipping.spread(total, scale))
            self.engine.step()
            sums.append(terms)
        tokens = sums[0].new_tensor([sum(batch.tokens for batch in batches)])
        reduced = sum_over_ranks(torch.cat([torch.stack(sums).sum(0), tokens]))
        self.tokens += int(reduced[-1])
        elapsed = time.monotonic() - self.started
        applied = self.engine.was_step_applied()
        if not applied:
            sample_ids = [batch.sample_ids for batch in batches]
            skipping.after_skip(self.engine, step + 1, sample_ids, sums, self.config.train.max_skipped_steps)
        mean = {"loss": float(named_sums(reduced[:-1])["total"] / targets)}
        return skipping.finite(summarize(reduced[:-1]) | mean) | {
            "step": step + 1,
            "steps": self.loader.steps,
            "epoch": order.epochs_after(step + 1),
            "learning_rate": self.engine.get_lr()[0],
            "grad_norm": float(self.engine.get_global_grad_norm()) if applied else None,
            "skipped": self.engine.skipped_steps,
            "tokens": int(reduced[-1]),
            "padding": 1 - int(reduced[-1]) / (order.global_batch * order.row_tokens),
            "tokens_per_s": self.tokens / elapsed,
            "data_wait": self.waited / elapsed,
            "eta_s": elapsed / (step + 1 - self.done) * (self.loader.steps - step - 1),
            "time": time.strftime("%H:%M:%S"),
        }

    def publish(self) -> None:
        """Write the trained model, whole or not at all. A collective: under ZeRO-3 every rank holds a part."""
        weights = full_weights(self.engine, averaged=self.config.train.ema is not None)
        if self.metrics is not None:
            self.metrics.close()
            summary = training_summary(self.metrics.entries) | {IDENTITY: self.identity}
            self.engine.module.model.config.draft_block_length = self.config.train.block_length
            with new_directory(self.config.student_final_dir) as directory:
                save_student(self.engine.module.model, self.tokenizer, directory, state_dict=weights)
                write_text(directory / "resolved_config.yaml", dump_config(self.config))
                write_json(directory / "training.json", summary)
            shutil.rmtree(self.config.checkpoints_dir, ignore_errors=True)
            logger.info("trained model: %s", self.config.student_final_dir)
        torch.distributed.barrier()


def full_weights(engine: Any, *, averaged: bool = False) -> dict[str, torch.Tensor]:
    """The student's state dict without the wrapper's prefix, on the CPU, or its moving average; under ZeRO-3 and of an
    average on rank 0 only. A collective."""
    if engine.zero_optimization_stage() < 3:
        state = engine.module.state_dict()
    else:
        import deepspeed

        state = {}
        for name, parameter in engine.module.named_parameters(remove_duplicate=False):
            with deepspeed.zero.GatheredParameters(parameter):  # one at a time: no rank ever holds the whole on a GPU
                if torch.distributed.get_rank() == 0:
                    state[name] = parameter.detach().cpu().clone()
    for name, average in averaging.averages(engine) if averaged else ():
        if torch.distributed.get_rank() == 0:
            state[name] = average.to(state[name].dtype).cpu()
    return {name.removeprefix("model."): value for name, value in state.items()}


def training_summary(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """What the report says of a run; its first and last losses are means over a twentieth of the steps."""
    window = max(len(entries) // 20, 1)
    losses = [entry["loss"] for entry in entries if entry["loss"] is not None]  # steps that were skipped have none
    return {
        "steps": len(entries),
        "tokens": sum(entry["tokens"] for entry in entries),
        "targets": round(sum(entry["positions"] for entry in entries)),
        "loss_first": float(np.mean(losses[:window])) if losses else None,
        "loss_last": float(np.mean(losses[-window:])) if losses else None,
        "tokens_per_s": entries[-1]["tokens_per_s"],
        "epochs": entries[-1]["epoch"],
    }
