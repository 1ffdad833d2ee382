"""`student train`: check everything that can be checked, then start the ranks and train.

One process decides (rank 0, or the one that starts the ranks) and all ranks do as it says, whatever launched them.

The order of the data is a function of (seed, step) and the loss is normalized by the targets of the whole step, so
neither the number of ranks nor an interruption changes what is learnt (up to the order of floating-point sums).
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from shared.config import PipelineConfig
from shared.errors import CheckpointError, ConfigError
from shared.files import read_json
from student.alignment.sanity import check_alignment
from student.data.data_loader import TrainingDataLoader
from student.evaluation.measure import HeldOut
from student.lineage import IDENTITY, RECORD, differences, present
from student.losses.settings import LossChoice, LossSettings, ResolvedLossName, check_temperature, resolve_loss
from student.model.export import load_student, read_config, read_tokenizer
from student.model.lora import add_lora
from student.training import checkpoint, launch
from student.training.checkpoint import Checkpoint, require_same_run, run_identity
from student.training.engine import (
    agreed,
    build_engine,
    deepspeed_config,
    initialize_process_group,
    partitioned_loading,
    require_gpu_build,
    require_nvme,
    training_dtype,
    zero_stage,
)
from student.training.loop import TrainingRun
from student.training.metrics_logger import check_trackers

logger = logging.getLogger(__name__)

ALREADY_TRAINED = "already trained: %s (--fresh trains anew)"
SANITY_SAMPLES = 64


@dataclass(frozen=True)
class Decision:
    """What all ranks do, decided by one.

    Attributes:
        finished: this very run has published its model already.
        checkpoints: to resume from, the newest first.
    """

    finished: bool
    loss: ResolvedLossName
    identity: dict[str, Any]
    checkpoints: list[Checkpoint]


def train(config: PipelineConfig, *, fresh: bool = False) -> None:
    """Train `config.student_init_dir` on `config.prepared_dir` into `config.student_final_dir`.

    A run that is finished is left as it is. One that was interrupted, or is to have more steps now, goes on from its
    newest undamaged checkpoint. `fresh` forgets both. Started by hand, this becomes one process per rank.

    Raises:
        DatasetError, ConfigError, CheckpointError, AlignmentError, StaleError, TrainingError: before anything is
            trained or overwritten.
    """
    count = launch.ranks_here(config.train)
    if launch.is_rank() or (world_size := count * launch.nodes_by_hand()) == 1:
        train_rank(config, fresh=fresh)
    # Decided here too, so that a mistake ends without starting ranks.
    elif decide(config, check(config, world_size), fresh=fresh).finished:
        logger.info(ALREADY_TRAINED, config.student_final_dir)
    else:
        launch.run_ranks(count, config.train, [argument for argument in sys.argv[1:] if argument != "--fresh"])


def decide(config: PipelineConfig, loader: TrainingDataLoader, *, fresh: bool = False) -> Decision:
    """Forget an earlier run if asked to, and say what there is to do.

    Args:
        loader: of samples that `check` has passed.

    Raises: as `train`.
    """
    if fresh:
        forget(config)
    identity = identity_of(config, loader)
    is_longer = partial(lengthens, wanted=identity, loader=loader)
    checkpoints = checkpoint.complete(config.checkpoints_dir, identity, is_longer)
    finished = is_finished(config, identity, is_longer)
    if not finished and (config.student_final_dir / RECORD).exists() and not checkpoints:
        raise CheckpointError(
            f"{config.student_final_dir} was trained for fewer steps than the {loader.steps} of now and left no "
            "checkpoint to go on from: restore train.steps and train.epochs, choose another `name`, or pass --fresh to "
            "train anew. With train.checkpoint_steps a finished run can be made longer"
        )
    if checkpoints and is_longer(checkpoints[0].identity) and launch.CHECKED not in os.environ:
        log_extension(config, checkpoints[0], loader)
    return Decision(
        finished=finished, loss=settle_loss(config, loader).name, identity=identity, checkpoints=checkpoints
    )


def lengthens(found: dict[str, Any], wanted: dict[str, Any], loader: TrainingDataLoader) -> bool:
    """Whether `wanted`, of `loader`'s run, is the identity of a run as `found`, but for more steps."""
    others = wanted.keys() - {"train.steps", "train.epochs"}
    same = not differences({key: found[key] for key in others & found.keys()}, wanted)
    return same and {"train.steps", "train.epochs"} <= found.keys() and length_of(found, loader) < loader.steps


def length_of(identity: dict[str, Any], loader: TrainingDataLoader) -> int:
    """Steps of a run with the samples of `loader`."""
    return identity["train.steps"] or loader.sampler.steps_of(identity["train.epochs"] or 1)


def log_extension(config: PipelineConfig, found: Checkpoint, loader: TrainingDataLoader) -> None:
    """Say what a run is that goes on for more steps than it began with.

    The data, and a constant learning rate, do not depend on the length. Other rates do: they go on as the longer
    schedule has them from here, which is safe for the optimizer, whose moments are warm, but not what that schedule
    would have made of the steps that are done.
    """
    train, before, after = config.train, length_of(found.identity, loader), loader.steps
    warmed = [min(round(train.warmup * steps), found.step) for steps in (before, after)]
    if train.schedule == "constant" and warmed[0] == warmed[1]:
        logger.info("a run of %d steps is made one of %d: the same as if it had been that long", before, after)
        return
    logger.warning(
        "a run of %d steps is made one of %d: after step %d the learning rate follows the %s schedule of %d steps, the "
        "steps before followed that of %d. For the same as a run of that length, train anew (--fresh), or with "
        "train.schedule=constant and train.warmup=0 from the start",
        before, after, found.step, train.schedule, after, before,
    )  # fmt: skip


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
    require_gpu_build()
    loader = TrainingDataLoader.open(config, world_size)
    settings = deepspeed_config(config.train, loader.sampler.accumulation)
    require_nvme(settings)
    check_trackers(config.train.trackers)
    if config.train.evaluate_checkpoints:
        if zero_stage(settings) == 3:
            raise ConfigError(
                "train.evaluate_checkpoints drafts on every rank with whole weights, which no rank has under ZeRO-3: "
                "use ZeRO 1 or 2, or `student evaluate` afterwards"
            )
        HeldOut.open(config, loader.prepared)
    loss, reason = settle_loss(config, loader)
    stride = max(len(loader.chosen) // SANITY_SAMPLES, 1)
    samples = [loader.sample(number) for number in range(0, len(loader.chosen), stride)]
    probability = check_alignment(samples)
    if loss != "ce":
        vocabulary_size = read_config(config.student_init_dir).vocab_size
        targets = (sample.targets for sample in samples)
        check_temperature(targets, config.train.temperature, vocabulary_size, config.train.max_unknown_share)
    if loader.left_out:
        logger.warning(
            "%d training samples are left out: their prompts leave no room for a block of %d in "
            "train.max_sequence_tokens %d",
            loader.left_out, config.train.block_length, config.train.max_sequence_tokens,
        )  # fmt: skip
    logger.info("loss: %s; in %s", reason, training_dtype(config.train))
    if not math.isnan(probability):
        logger.info("sanity: the stored rows give the observed tokens a mean probability of %.3f", probability)
    return loader


def settle_loss(config: PipelineConfig, loader: TrainingDataLoader) -> LossChoice:
    """The loss that these training records support, and why."""
    has_any = bool(loader.prepared.soft[loader.chosen].any())
    return resolve_loss(config.train, has_any, records_without=loader.without_distributions)


def identity_of(config: PipelineConfig, loader: TrainingDataLoader) -> dict[str, Any]:
    """The identity of the run that is to be: of its settings, its prepared data with their sources, and its start."""
    inputs = loader.prepared.identity | {"prepared data": loader.prepared.fingerprint} | present(config, "start")
    return run_identity(config, inputs)


def is_finished(
    config: PipelineConfig, identity: dict[str, Any], is_longer: Callable[[dict[str, Any]], bool] = lambda _: False
) -> bool:
    """Whether this very run has published its model, and not one of fewer steps.

    Args:
        is_longer: whether the run is, but for more steps, the one with the identity that was found.

    Raises:
        CheckpointError: if a model is there that other settings or inputs trained.
    """
    record = read_json(config.student_final_dir / RECORD)
    if record is None:
        return False
    found = record.get(IDENTITY) or {}
    if is_longer(found):
        return False
    require_same_run(found, identity, config.student_final_dir)
    return True


def train_rank(config: PipelineConfig, *, fresh: bool = False) -> None:
    """This process's part of the run.

    Raises:
        SystemExit: with the exit code of a user's mistake, on the ranks that leave the message to rank 0.
        DatasetError, …: on rank 0, as `train`.
    """
    from student.planning.fit import require_memory

    rank, world_size = initialize_process_group()
    loader = None

    def decided() -> Decision:
        nonlocal loader
        checked = launch.CHECKED in os.environ
        loader = TrainingDataLoader.open(config, world_size) if checked else check(config, world_size)
        return decide(config, loader, fresh=fresh)

    decision = agreed(decided)
    if not decision.finished:
        agreed(lambda: require_memory(config, world_size, launch.ranks_of_node(world_size)))
        resumed = checkpoint.undamaged(decision.checkpoints)
        build(config, decision, resumed, rank, world_size, loader).run()
    elif rank == 0:
        logger.info(ALREADY_TRAINED, config.student_final_dir)
    torch.distributed.destroy_process_group()


def build(
    config: PipelineConfig,
    decision: Decision,
    resumed: Checkpoint | None,
    rank: int,
    world_size: int,
    loader: TrainingDataLoader | None = None,
) -> TrainingRun:
    """The model, the engine around it, and what is resumed of it. A collective.

    Args:
        loader: if this rank has opened it.
    """
    from student.model.sequential_head import settle_sequential_head
    from student.planning.cost import step_flops
    from student.training.module import DistillationModule

    # One rank of a node compares the checksums of what lies there; the others rely on its stamp.
    if os.environ["LOCAL_RANK"] != "0":
        torch.distributed.barrier()
    loader = loader or TrainingDataLoader.open(config, world_size)
    if os.environ["LOCAL_RANK"] == "0":
        torch.distributed.barrier()
    done = resumed.step if resumed is not None else 0
    # The first batches are made while the model is loaded.
    start = config.student_init_dir
    batches = loader.micro_batches(rank, read_tokenizer(start, read_config(start)), first_step=done)
    accumulation = loader.sampler.accumulation
    settings = deepspeed_config(config.train, accumulation)
    universal = None
    if resumed is not None and not resumed.fits(world_size, zero_stage(settings)):
        universal = agreed(lambda: checkpoint.reshard(resumed, world_size, zero_stage(settings)))
        settings = deepspeed_config(config.train, accumulation, is_universal=True)
    torch.manual_seed(config.seed)
    partitioned = partitioned_loading(settings)
    model, tokenizer = load_student(start, dtype=getattr(torch, training_dtype(config.train)))
    del partitioned
    if config.student.lora:
        add_lora(model, config.student.lora)
    settle_sequential_head(model, config.train.sequential_rank)
    if config.train.activation_checkpointing:
        model.gradient_checkpointing_enable()
    if config.train.compile and torch.cuda.is_available() and zero_stage(settings) < 3:
        model.compile_blocks()
    model.train()
    loss = LossSettings.from_config(config.train, decision.loss)
    engine = build_engine(DistillationModule(model, loss), config.train, settings, loader.steps)
    if resumed is not None:
        checkpoint.load(engine, resumed, universal, rank)
    return TrainingRun(
        config,
        loader,
        engine,
        tokenizer,
        decision.identity,
        rank,
        held_out=HeldOut.open(config, loader.prepared) if config.train.evaluate_checkpoints else None,
        step_flops=step_flops(config, model.config, world_size, loader.prepared),
        done=done,
        batches=batches,
    )
