"""The training loop of one rank.

One step: this rank's micro-batches go through the engine, each loss scaled so that the step's gradient is the mean over
all targets of all ranks; then the sums for the log are added up over ranks. Every rank runs the same number of
micro-batches, with or without work in them.
"""

from __future__ import annotations

import faulthandler
import itertools
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed

from shared.config import PipelineConfig, dump_config
from shared.console import progress
from shared.files import new_directory, write_json, write_text
from shared.stopping import REQUEUE_EXIT_CODE, StopRequest
from student.data.batch import MicroBatch
from student.data.data_loader import TrainingDataLoader
from student.drafting.frequencies import count_tokens, write_counts
from student.evaluation.evaluate import headline
from student.evaluation.measure import HeldOut, drafter_of, measure
from student.lineage import IDENTITY, RECORD
from student.losses.objective import loss_scale, named_sums, summarize
from student.model.export import save_student
from student.training import averaging, checkpoint, skipping
from student.training.metrics_logger import MetricsLogger
from student.training.monitor import GradientStatistics, StepMonitor
from student.training.optimizer import schedule_factor

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class TrainingRun:
    """What one rank needs to train; `metrics` is rank 0's alone.

    Attributes:
        held_out: what checkpoints are measured on; None where they are not.
        step_flops: this rank's, of the model alone.
        done: steps that a checkpoint has brought along.
        batches: this rank's micro-batches after those.
    """

    config: PipelineConfig
    loader: TrainingDataLoader
    engine: Any
    tokenizer: Any
    identity: dict[str, Any]
    rank: int
    held_out: HeldOut | None
    step_flops: float
    done: int
    batches: Iterator[MicroBatch]
    metrics: MetricsLogger | None = None
    monitor: StepMonitor = field(init=False)
    gradients: GradientStatistics = field(init=False)
    stop: StopRequest = field(default_factory=StopRequest)
    _started: float = field(default_factory=time.monotonic)
    _tokens: int = 0

    def __post_init__(self) -> None:
        self.monitor = StepMonitor(self.step_flops)
        self.gradients = GradientStatistics(self.engine.module)

    def run(self) -> None:
        """Train from step `done` to the end, publish the model.

        Raises:
            SystemExit: with `REQUEUE_EXIT_CODE`, saved, where a scheduler's signal asked to stop.
        """
        train, steps = self.config.train, self.loader.steps
        if self.rank == 0:
            self.metrics = MetricsLogger(self.config.run_dir, self.done, train.trackers)
            if self.done:
                logger.info("resuming after step %d of %d", self.done, steps)
        self._started, at = time.monotonic(), self.done
        if at and self.is_due(at) and self.out_of_patience(at):  # the run was stopped before it could publish
            return self.publish(at)
        with progress() as bar, self.monitor.watching_collectives():
            task = bar.add_task("training", total=steps, completed=self.done, note="", visible=self.rank == 0)
            for step in range(self.done, steps):
                # A rank that waits for one that never comes prints its stacks and ends; the launcher ends the others.
                faulthandler.dump_traceback_later(60 * train.hang_minutes, exit=True)
                try:
                    entry = self.step(step)
                finally:
                    faulthandler.cancel_dump_traceback_later()
                at, asked = step + 1, entry.pop("asked_to_stop")
                due = self.is_due(at)
                if self.held_out is not None and (due or at == steps):
                    entry["evaluation"] = self.measure(at)
                if self.metrics is not None:
                    self.metrics.write(entry)
                    loss, match = entry["loss"] or 0.0, entry["match_by_depth"][0] or 0.0
                    note = f"loss {loss:.3f} match@1 {match:.3f} {entry['tokens_per_s']:,.0f} tok/s"
                    bar.update(task, completed=at, note=note)
                skipping.require_few(entry["skipped"], train)
                if due or asked or (at == steps and train.checkpoint_steps):
                    self.save(at, entry.get("evaluation"))
                if due and self.out_of_patience(at):
                    break
                if at < steps and asked:
                    self.end_early(at)
        self.publish(at)

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is saved after so many steps, other than at the end or for a signal."""
        every = self.config.train.checkpoint_steps
        return every is not None and step % every == 0

    def step(self, step: int) -> dict[str, Any]:
        """Train on the next micro-batches, as step `step` (0-based); its entry of the metrics, the same on every rank.
        A collective."""
        began = time.perf_counter()
        train, order, monitor, device = self.config.train, self.loader.sampler, self.monitor, self.engine.device
        # Dropout's masks: others on each rank and in each step, and the same again after an interruption.
        torch.manual_seed(int(np.random.SeedSequence((self.config.seed, step, self.rank)).generate_state(1)[0]))
        learning_rate = train.learning_rate * schedule_factor(self.engine.lr_scheduler)
        every = train.gradient_statistics_steps
        self.gradients.watching = every is not None and step % every == 0
        with monitor.part("data"):
            batches = list(itertools.islice(self.batches, order.accumulation))
        targets = torch.tensor(sum(batch.target_count for batch in batches), device=device)
        with monitor.part("communication"):
            torch.distributed.all_reduce(targets)
        scale = loss_scale(int(targets), world_size=order.world_size, accumulation_steps=order.accumulation)
        sums = []
        for batch in batches:
            with monitor.part("forward"):
                total, terms = self.engine(batch.to(device))
            with monitor.part("backward"):
                self.engine.backward(skipping.spread(total, scale))
            with monitor.part("optimizer"):
                self.engine.step()
            sums.append(terms)
        asked = self.stop.name is not None
        own = sums[0].new_tensor([sum(batch.tokens for batch in batches), asked])
        everyones = torch.cat([torch.stack(sums).sum(0), own])
        with monitor.part("communication"):
            torch.distributed.all_reduce(everyones)
        reduced, tokens, asked_ranks = everyones[:-2], int(everyones[-2]), int(everyones[-1])
        self._tokens += tokens
        elapsed = time.monotonic() - self._started
        applied = self.engine.was_step_applied()
        if not applied:
            sample_ids = [batch.sample_ids for batch in batches]
            skipping.after_skip(self.engine, step + 1, sample_ids, sums, train.max_skipped_steps)
        mean = {"loss": float(named_sums(reduced)["total"] / targets)}
        statistics = self.gradients.finish() if self.gradients.watching else {}
        figures = skipping.finite(summarize(reduced) | mean | statistics) | {
            "step": step + 1,
            "steps": self.loader.steps,
            "epoch": order.epochs_after(step + 1),
            "learning_rate": learning_rate,
            "grad_norm": float(self.engine.get_global_grad_norm()) if applied else None,
            "skipped": self.engine.skipped_steps,
            "tokens": tokens,
            "padding": 1 - tokens / (order.global_batch * order.row_tokens),
            "tokens_per_s": self._tokens / elapsed,
            "eta_s": elapsed / (step + 1 - self.done) * (self.loader.steps - step - 1),
            "time": time.strftime("%H:%M:%S"),
            "asked_to_stop": asked_ranks > 0,
        }
        return figures | monitor.finish(time.perf_counter() - began)

    def measure(self, step: int) -> dict[str, Any]:
        """The student of now on held-out text, every rank a part of it; the same on every rank. A collective."""
        assert self.held_out is not None
        model, ranks = self.engine.module.model, torch.distributed.get_world_size()
        model.eval()
        weights = averaging.in_place_of_weights(self.engine) if self.config.train.ema is not None else nullcontext()
        with weights:
            drafter = drafter_of(self.held_out, model, self.config.student_init_dir)  # which copies the head
            figures = measure(self.held_out, model, self.tokenizer, drafter, f"step {step}", self.rank, ranks)
        model.train()
        blocks = figures["ratio"]
        kept = {name: figures.get(name) for name in ("tau", "alpha_low", "alpha_high", "masked_ce")}
        kept |= {name: blocks.get(name) for name in ("ce", "kl")}
        if self.rank == 0:
            logger.info("step %d, held-out text: %s", step, headline(figures, self.config.evaluate.rule))
        return skipping.finite(kept)

    def save(self, step: int, evaluation: dict[str, Any] | None) -> None:
        """A resumable checkpoint after `step` steps. A collective."""
        directory, train = self.config.checkpoints_dir, self.config.train
        average = full_weights(self.engine, averaged=True) if train.ema is not None else None
        checkpoint.save(
            self.engine, directory, step, self.identity, train.keep_checkpoints, self.rank, score(evaluation), average
        )

    def end_early(self, step: int) -> NoReturn:
        """End as a scheduler asked. A collective."""
        if self.metrics is not None:
            self.metrics.close()
            name = self.stop.name or "a signal to another rank"
            said = "%s: saved after step %d of %d; the same command, without --fresh, goes on"
            logger.warning(said, name, step, self.loader.steps)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        sys.exit(REQUEUE_EXIT_CODE)

    def out_of_patience(self, step: int) -> bool:
        """Whether `patience` checkpoints in a row were no better than the best; rank 0 decides. A collective."""
        patience, every = self.config.train.patience, self.config.train.checkpoint_steps
        if patience is None or every is None:
            return False
        leader = checkpoint.best(self.config.checkpoints_dir) if self.rank == 0 else None
        verdict = [leader is not None and step - leader.step >= patience * every]
        torch.distributed.broadcast_object_list(verdict)
        if verdict[0] and leader is not None:
            logger.info("no checkpoint was better than that of step %d: training ends at step %d", leader.step, step)
        return verdict[0]

    def publish(self, step: int) -> None:
        """Write the model trained for `step` steps, whole or not at all; its last checkpoint stays, for a run that is
        made longer.

        A collective: under ZeRO-3 every rank holds a part.
        """
        weights = full_weights(self.engine, averaged=self.config.train.ema is not None)
        if self.metrics is not None:
            self.metrics.close()
            summary = training_summary(self.metrics.entries) | {IDENTITY: self.identity}
            model, train = self.engine.module.model, self.config.train
            leader = checkpoint.best(self.config.checkpoints_dir) if train.publish == "best" else None
            if leader is not None and leader.step < step:
                dtype = next(iter(weights.values())).dtype
                weights = {name: value.to(dtype) for name, value in checkpoint.whole_weights(leader).items()}
                summary["published_step"] = leader.step
                logger.info("the best of the measured checkpoints is that of step %d", leader.step)
            # Only blocks teach to draft after a causal prefix.
            model.config.draft_block_length = train.block_length if train.objectives.blocks else None
            with new_directory(self.config.student_final_dir) as directory:
                save_student(model, self.tokenizer, directory, state_dict=weights)
                write_counts(directory, count_tokens(self.loader.prepared, model.config.vocab_size))
                write_text(directory / "resolved_config.yaml", dump_config(self.config))
                write_json(directory / RECORD, summary)
            if self.held_out is None:
                checkpoint.prune(self.config.checkpoints_dir, keep=1)
            logger.info("trained model: %s", self.config.student_final_dir)
        torch.distributed.barrier()


def score(evaluation: dict[str, Any] | None) -> float | None:
    """What checkpoints are compared by: τ, or less cross-entropy where no blocks are trained."""
    if evaluation is None:
        return None
    return evaluation["tau"] if evaluation["tau"] is not None else -evaluation["masked_ce"]


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
        "tokens_per_s": entries[-1]["tokens_per_s"] if entries else None,
        "epochs": entries[-1]["epoch"] if entries else None,
    }
