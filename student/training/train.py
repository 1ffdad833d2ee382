"""`student train`: check everything that can be checked, then start the ranks and train.

The order of the data is a function of (seed, step) and the loss is normalized by the targets of the whole step, so
neither the number of ranks nor an interruption changes what is learnt (up to the order of floating-point sums).
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from typing import Any

from shared.config import PipelineConfig
from shared.errors import CheckpointError
from student.alignment.sanity import check_alignment
from student.data.data_loader import TrainingDataLoader
from student.lineage import IDENTITY, present, read_json
from student.losses.settings import LossChoice, LossSettings, check_temperature, resolve_loss
from student.model.export import read_config
from student.training import launch
from student.training.checkpoint import require_resumable, require_same_run, run_identity
from student.training.engine import deepspeed_config, training_dtype

logger = logging.getLogger(__name__)

ALREADY_TRAINED = "already trained: %s (--fresh trains anew)"
SANITY_SAMPLES = 64


def train(config: PipelineConfig, *, fresh: bool = False) -> None:
    """Train `config.student_init_dir` on `config.prepared_dir` into `config.student_final_dir`.

    A run that is finished is left as it is; one that was interrupted goes on from its newest checkpoint; `fresh`
    forgets both. Started by hand, this becomes one process per rank.

    Raises:
        DatasetError, ConfigError, CheckpointError, AlignmentError, StaleError, TrainingError: before any rank starts.
    """
    if launch.is_rank():
        train_rank(config, fresh=fresh)
        return
    world_size = launch.ranks_here(config.train)
    loader = check(config, world_size)
    if fresh:
        forget(config)
    if is_finished(config, identity_of(config, loader)):
        logger.info(ALREADY_TRAINED, config.student_final_dir)
    elif world_size > 1:
        launch.replace_with_ranks(world_size, [argument for argument in sys.argv[1:] if argument != "--fresh"])
    else:
        train_rank(config)


def forget(config: PipelineConfig) -> None:
    """Delete what an earlier run has trained."""
    shutil.rmtree(config.checkpoints_dir, ignore_errors=True)
    shutil.rmtree(config.student_final_dir, ignore_errors=True)


def check(config: PipelineConfig, world_size: int) -> TrainingDataLoader:
    """Everything that can fail on the user's account, before a rank starts; logs which loss is trained and why.

    Returns: the loader that passed.
    """
    if not (config.student_init_dir / "config.json").exists():
        raise CheckpointError(f"{config.student_init_dir} holds no model; run `student init` with this config first")
    loader = TrainingDataLoader.open(config, world_size)
    deepspeed_config(config.train, loader.sampler.accumulation)
    loss, reason = settle_loss(config, loader)
    LossSettings.from_config(config.train, config.train.block_length, loss)
    stride = max(len(loader.chosen) // SANITY_SAMPLES, 1)
    samples = [loader.sample(number) for number in range(0, len(loader.chosen), stride)]
    probability = check_alignment(samples)
    if loss != "ce":
        vocabulary_size = read_config(config.student_init_dir).vocab_size
        targets = (sample.targets for sample in samples)
        check_temperature(targets, config.train.temperature, vocabulary_size, config.train.max_unknown_share)
    logger.info("loss: %s; in %s", reason, training_dtype(config.train))
    logger.info("sanity: the stored rows give the observed tokens a mean probability of %.3f", probability)
    return loader


def settle_loss(config: PipelineConfig, loader: TrainingDataLoader) -> LossChoice:
    """The loss that these training records support, and why."""
    has_any = bool(loader.prepared.soft[loader.chosen].any())
    return resolve_loss(config.train, has_any, records_without=loader.without_distributions)


def identity_of(config: PipelineConfig, loader: TrainingDataLoader) -> dict[str, Any]:
    """The identity of the run that is to be: of its settings, its prepared data with their sources, and its start."""
    inputs = loader.prepared.identity | {"prepared data": loader.prepared.fingerprint} | present(config, "start")
    return run_identity(config, inputs, loader.sampler.world_size)


def is_finished(config: PipelineConfig, identity: dict[str, Any]) -> bool:
    """Whether this very run has published its model.

    Raises:
        CheckpointError: if a model or a checkpoint is there that other settings or inputs trained.
    """
    require_resumable(config.checkpoints_dir, identity)
    record = read_json(config.student_final_dir / "training.json")
    if record is None:
        return False
    require_same_run(record.get(IDENTITY) or {}, identity, config.student_final_dir)
    return True


def train_rank(config: PipelineConfig, *, fresh: bool = False) -> None:
    """This process's part of the run. Each rank checks what the run is made from, whatever launched it."""
    import torch

    from student.model.export import load_student
    from student.model.lora import add_lora
    from student.training.engine import build_engine, initialize_process_group, partitioned_loading
    from student.training.loop import TrainingRun
    from student.training.module import DistillationModule

    if fresh and int(os.environ["RANK"]) == 0:
        check(config, int(os.environ["WORLD_SIZE"]))
        forget(config)  # the other ranks go on when this one has joined
    rank, world_size = initialize_process_group()
    loader = TrainingDataLoader.open(config, world_size)
    identity = identity_of(config, loader)
    if not fresh and is_finished(config, identity):
        if rank == 0:
            logger.info(ALREADY_TRAINED, config.student_final_dir)
        torch.distributed.destroy_process_group()
        return
    torch.manual_seed(config.seed)
    partitioned = partitioned_loading(deepspeed_config(config.train, loader.sampler.accumulation))
    model, tokenizer = load_student(config.student_init_dir, dtype=getattr(torch, training_dtype(config.train)))
    del partitioned
    if config.student.lora:
        add_lora(model, config.student.lora)
    if config.train.activation_checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    loss, _ = settle_loss(config, loader)
    module = DistillationModule(model, LossSettings.from_config(config.train, config.train.block_length, loss))
    engine = build_engine(module, config.train, loader.sampler.accumulation, loader.steps)
    TrainingRun(config, loader, engine, tokenizer, identity, rank).run()
    torch.distributed.destroy_process_group()
