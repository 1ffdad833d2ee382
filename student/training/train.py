"""`student train`: check everything that can be checked, start the ranks, train, publish the model.

The order of the data is a function of (seed, step) and the loss is normalised by the targets of the whole step, so
neither the number of ranks nor an interruption changes what is learnt (up to the order of floating-point sums).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.config import PipelineConfig, dump_config
from shared.console import progress
from shared.errors import CheckpointError, TrainingError
from student.alignment.prepared import PreparedDataset
from student.alignment.sanity import check_alignment
from student.data.batch import MicroBatch, collate
from student.data.blocks import choose_anchors, lay_out, sample_generator
from student.data.order import StepOrder
from student.training import launch
from student.training.checkpoint import require_same_run, resume, run_identity, save
from student.training.journal import Journal

logger = logging.getLogger(__name__)

SANITY_SAMPLES = 64


@dataclass(frozen=True, slots=True)
class TrainingData:
    """The prepared training samples and the order in which they come."""

    prepared: PreparedDataset
    samples: np.ndarray
    order: StepOrder
    steps: int

    @classmethod
    def open(cls, config: PipelineConfig, world_size: int) -> TrainingData:
        """Raises ConfigError or DatasetError where the data cannot feed this configuration."""
        prepared = PreparedDataset.open(config.prepared_dir)
        samples = np.asarray(prepared.indices(split="train"))
        if not len(samples):
            raise TrainingError(
                f"{config.prepared_dir} holds no sample of the split 'train'; collect some and prepare again"
            )
        order = StepOrder(
            lengths=np.asarray(prepared.lengths)[samples],
            seed=config.seed,
            global_batch=config.train.global_batch,
            micro_batch=config.train.micro_batch,
            world_size=world_size,
        )
        steps = config.train.steps or max(round((config.train.epochs or 1) * order.steps_per_epoch), 1)
        return cls(prepared, samples, order, steps)

    def micro_batch(
        self, config: PipelineConfig, epoch: int, chosen: np.ndarray, mask_id: int, pad_id: int
    ) -> MicroBatch:
        """The collated forward of the sample numbers `chosen`."""
        train = config.train
        samples = [self.prepared[int(self.samples[number])] for number in chosen]
        rows = []
        for sample in samples:
            generator = sample_generator(config.seed, epoch, sample.sample_id)
            anchors = choose_anchors(sample, train.anchors, generator)
            rows.append(lay_out(sample, anchors, train.block_length, mask_id, train.max_length))
        return collate(samples, rows, pad_id=pad_id, depth_decay=train.depth_decay)


def train(config: PipelineConfig, *, fresh: bool = False) -> None:
    """Train `config.student_init_dir` on `config.prepared_dir` into `config.student_final_dir`.

    Raises:
        DatasetError, ConfigError, CheckpointError, AlignmentError, TrainingError: before any rank starts.
    """
    if launch.is_rank():
        _run_rank(config)
        return
    world_size = launch.ranks_here(config.train)
    if _already_done(config, world_size, fresh):
        return
    if world_size > 1:
        launch.replace_with_ranks(world_size, [argument for argument in sys.argv[1:] if argument != "--fresh"])
    _run_rank(config)


def _already_done(config: PipelineConfig, world_size: int, fresh: bool) -> bool:
    """Everything that can fail before a rank starts; whether there is nothing left to do."""
    from student.losses.settings import resolve_loss
    from student.training.engine import deepspeed_config

    if not (config.student_init_dir / "config.json").exists():
        raise CheckpointError(f"{config.student_init_dir} holds no model; run `student init` with this config first")
    data = TrainingData.open(config, world_size)
    deepspeed_config(config.train, data.order.accumulation)
    sanity = [data.prepared[int(i)] for i in data.samples[:: max(len(data.samples) // SANITY_SAMPLES, 1)]]
    probability = check_alignment(sanity)
    loss, reason = resolve_loss(config.train, any((s.targets.event_offsets[-1] > 0) for s in sanity))
    logger.info("loss: %s (%s)", loss, reason)
    logger.info("alignment: the stored rows give the realised token a mean probability of %.3f", probability)
    if fresh:
        shutil.rmtree(config.checkpoints_dir, ignore_errors=True)
        shutil.rmtree(config.student_final_dir, ignore_errors=True)
    finished = config.student_final_dir / "training.json"
    if not finished.exists():
        return False
    summary = json.loads(finished.read_text(encoding="utf-8"))
    require_same_run(
        summary["identity"], run_identity(config, data.prepared.fingerprint, world_size), config.student_final_dir
    )
    logger.info("already trained: %s, %d steps; --fresh trains anew", config.student_final_dir, summary["steps"])
    return True


def _run_rank(config: PipelineConfig) -> None:
    """This rank's whole run."""
    import torch

    from student.losses.settings import LossSettings, resolve_loss
    from student.model.export import load_student
    from student.training.engine import build_engine, initialize_process_group
    from student.training.module import DistillationModule

    rank, world_size = initialize_process_group()
    data = TrainingData.open(config, world_size)
    loss, _ = resolve_loss(config.train, data.prepared.has_distributions)
    torch.manual_seed(config.seed)
    dtype = torch.bfloat16 if config.train.dtype == "bfloat16" else torch.float32
    model, tokenizer = load_student(config.student_init_dir, dtype=dtype)
    if config.train.activation_checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    settings = LossSettings.from_config(config.train, config.train.block_length, loss)
    engine = build_engine(DistillationModule(model, settings), config.train, data.order.accumulation, data.steps)
    identity = run_identity(config, data.prepared.fingerprint, world_size)
    done = resume(engine, config.checkpoints_dir, identity)
    journal = Journal(config.run_dir, done) if rank == 0 else None
    if rank == 0 and done:
        logger.info("resuming after step %d of %d", done, data.steps)
    _train_steps(config, data, engine, tokenizer, identity, journal, done, rank)
    _publish(config, data, engine, tokenizer, identity, journal, rank)


def _train_steps(
    config: PipelineConfig,
    data: TrainingData,
    engine: Any,
    tokenizer: Any,
    identity: dict[str, Any],
    journal: Journal | None,
    done: int,
    rank: int,
) -> None:
    import torch

    from student.losses.normalization import global_scale
    from student.losses.terms import summarize

    started, tokens_done = time.monotonic(), 0
    with progress() as bar:
        task = bar.add_task("training", total=data.steps, completed=done, note="", visible=rank == 0)
        for step in range(done, data.steps):
            epoch, parts = data.order.micro_batches(step, rank)
            batches = [
                data.micro_batch(config, epoch, part, tokenizer.mask_token_id, tokenizer.pad_token_id) for part in parts
            ]
            scale = global_scale(sum(batch.weight for batch in batches), data.order.world_size, data.order.accumulation)
            sums = []
            for batch in batches:
                total, terms = engine(batch.to(engine.device))
                engine.backward(total * scale)
                engine.step()
                sums.append(terms)
            tokens = terms.new_tensor([sum(batch.tokens for batch in batches)])
            reduced = torch.cat([torch.stack(sums).sum(0), tokens])
            torch.distributed.all_reduce(reduced)
            if journal is not None:
                step_tokens = int(reduced[-1])
                tokens_done += step_tokens
                elapsed = time.monotonic() - started
                entry = summarize(reduced[:-1]) | {
                    "step": step + 1,
                    "steps": data.steps,
                    "epoch": (step + 1) / data.order.steps_per_epoch,
                    "learning_rate": engine.get_lr()[0],
                    "grad_norm": float(engine.get_global_grad_norm()),
                    "tokens": step_tokens,
                    "tokens_per_s": tokens_done / elapsed,
                    "eta_s": elapsed / (step + 1 - done) * (data.steps - step - 1),
                    "time": time.strftime("%H:%M:%S"),
                }
                journal.write(entry)
                note = f"loss {entry['loss']:.3f} match@1 {entry['match_by_depth'][0]:.3f} {entry['tokens_per_s']:,.0f} tok/s"
                bar.update(task, completed=step + 1, note=note)
            every = config.train.checkpoint_steps
            if every and (step + 1) % every == 0 and step + 1 < data.steps:
                save(engine, config.checkpoints_dir, step + 1, identity, config.train.keep_checkpoints, rank)


def _publish(
    config: PipelineConfig,
    data: TrainingData,
    engine: Any,
    tokenizer: Any,
    identity: dict[str, Any],
    journal: Journal | None,
    rank: int,
) -> None:
    """Write the trained model under a temporary name, then give it its own: a model that is there is whole."""
    import torch.distributed

    from student.model.export import save_student

    weights = _full_weights(engine)
    if journal is not None:
        journal.close()
        partial = config.student_final_dir.with_name(config.student_final_dir.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        save_student(engine.module.model, tokenizer, partial, state_dict=weights)
        (partial / "resolved_config.yaml").write_text(dump_config(config), encoding="utf-8")
        summary = training_summary(journal.entries, data.order) | {"identity": identity}
        (partial / "training.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
        _replace_directory(partial, config.student_final_dir)
        logger.info("trained model: %s", config.student_final_dir)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _full_weights(engine: Any) -> dict[str, Any] | None:
    """The student's state dict on rank 0, without the wrapper's prefix. Under ZeRO-3 a collective on all ranks."""
    if engine.zero_optimization_stage() == 3:
        state = engine._zero3_consolidated_16bit_state_dict()
    else:
        state = engine.module.state_dict()
    if not state:
        return None
    return {name.removeprefix("model."): value for name, value in state.items()}


def _replace_directory(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    os.replace(source, target)


def training_summary(entries: list[dict[str, Any]], order: StepOrder) -> dict[str, Any]:
    """What the report says of a run; the first and last losses are means over a twentieth of the steps."""
    window = max(len(entries) // 20, 1)
    losses = [entry["loss"] for entry in entries]
    return {
        "steps": len(entries),
        "tokens": sum(entry["tokens"] for entry in entries),
        "targets": round(sum(entry["positions"] for entry in entries)),
        "loss_first": float(np.mean(losses[:window])),
        "loss_last": float(np.mean(losses[-window:])),
        "tokens_per_s": entries[-1]["tokens_per_s"],
        "epochs": len(entries) / order.steps_per_epoch,
    }
