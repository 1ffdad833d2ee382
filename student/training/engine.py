"""DeepSpeed around the student: process group, settings, engine.

`train.deepspeed`, a file or a mapping, holds what belongs to the cluster (ZeRO stage, buckets, offload). What follows
from the training config (batch sizes, precision, clipping) is filled in here. The file may say it too, if it agrees.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import ValidationError
from torch import nn

from shared.config import TrainConfig
from shared.errors import USER_ERROR_EXIT_CODE, ConfigError
from student.training import averaging, skipping
from student.training.optimizer import build_optimizer, build_schedule

T = TypeVar("T")

logger = logging.getLogger(__name__)

DRIVERS_GPUS = Path("/proc/driver/nvidia/gpus")
LONGEST_WAIT = timedelta(hours=6)
"""For which ranks wait for what one does alone: converting a checkpoint of LLaDA-8B moves some 400 GB, which the ten
minutes of NCCL do not cover. A step that hangs ends earlier (`train.hang_minutes`)."""


def initialize_process_group(*, with_deepspeed: bool = True) -> tuple[int, int]:
    """Join the job's process group; (rank, world size). A process that no launcher started is a world of one.

    Args:
        with_deepspeed: for DeepSpeed's use too, which takes seconds to import.
    """
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # collectives of objects use the current device
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if with_deepspeed:
        import deepspeed
        import deepspeed.ops

        if not torch.cuda.is_available():
            # Without this, DeepSpeed compiles an all-reduce of its own for minutes; gloo's serves two ranks as well.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # DeepSpeed calls names that this torch already calls old.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if not torch.distributed.is_initialized():
        alone: dict[str, Any] = {}
        if os.environ["WORLD_SIZE"] == "1":
            # It meets nobody: whichever port is free, where a chosen one could be taken before it listens there.
            store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)  # type: ignore[attr-defined]
            alone = {"store": store, "rank": 0, "world_size": 1}
        torch.distributed.init_process_group(backend, timeout=LONGEST_WAIT, **alone)
    if with_deepspeed:
        deepspeed.init_distributed(dist_backend=backend, timeout=LONGEST_WAIT)  # takes the group that is there
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def agreed(decide: Callable[[], T]) -> T:
    """What `decide` says on rank 0, on every rank; where it fails there, all end. A collective."""
    said: list[Any] = [False, None]  # whether it did not fail, and the verdict
    try:
        if torch.distributed.get_rank() == 0:
            said = [True, decide()]
    finally:
        torch.distributed.broadcast_object_list(said)
    if not said[0]:
        sys.exit(USER_ERROR_EXIT_CODE)  # rank 0 says why
    return said[1]


def require_gpu_build() -> None:
    """Refuse to compute on CPUs by mistake: beside GPUs, with a torch that cannot use them.

    Raises:
        ConfigError: if NVIDIA's driver has GPUs and torch is a CPU build. `CUDA_VISIBLE_DEVICES=` says it is meant so.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    if torch.version.cuda is None and torch.version.hip is None and not hidden and any(DRIVERS_GPUS.glob("*")):
        raise ConfigError(
            f"this machine has GPUs and torch {torch.__version__} is a CPU build: run `make setup` here, or "
            "`make setup GPUS=1` where no GPU is seen; to compute on the CPU all the same, set CUDA_VISIBLE_DEVICES "
            "to nothing"
        )


def training_device() -> torch.device:
    """The GPU of this rank, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def training_dtype(train: TrainConfig) -> Literal["bfloat16", "float32"]:
    """What `train.dtype` means on this machine."""
    if train.dtype != "auto":
        return train.dtype
    # oneDNN has bfloat16 products from AVX-512 on; on AVX2 one of 512 x 576 x 1536 took 1,120 ms on one core of an
    # AMD EPYC, and 23 ms in float32.
    fast = torch.cuda.is_available() or torch.backends.cpu.get_cpu_capability() == "AVX512"
    return "bfloat16" if fast else "float32"


def deepspeed_config(train: TrainConfig, accumulation: int, is_universal: bool = False) -> dict[str, Any]:
    """The DeepSpeed settings of a run: those of `train.deepspeed`, and what follows from the training config.

    Args:
        is_universal: a checkpoint in the universal format will be loaded.

    Raises:
        ConfigError: if the file is missing or is not a JSON object, or if the settings contradict the training config.
    """
    settings, where = read_settings(train.deepspeed)
    dtype, stage, zero = training_dtype(train), zero_stage(settings), settings.get("zero_optimization", {})
    follows: dict[str, tuple[Any, str]] = {
        "train_batch_size": (train.global_batch, "train.global_batch"),
        "train_micro_batch_size_per_gpu": (train.micro_batch, "train.micro_batch"),
        "gradient_accumulation_steps": (accumulation, "train.global_batch, train.micro_batch and the ranks"),
        "gradient_clipping": (train.grad_clip, "train.grad_clip"),
        "bf16.enabled": (dtype == "bfloat16", "train.dtype"),
        "bf16.check_grad_overflow": (True, "train.max_skipped_steps"),
        "fp16.enabled": (False, "train.dtype"),
        "optimizer": (None, "train.optimizer, which makes it"),
        "scheduler": (None, "train.schedule, which makes it"),
    }
    if zero.get("offload_optimizer"):
        # Its own AdamW for CPUs is compiled on first use; torch's fused one comes compiled.
        follows["zero_force_ds_cpu_optimizer"] = (False, "train.optimizer")
    if train.optimizer == "muon" and stage == 3:
        follows["zero_optimization.reduce_scatter"] = (False, "train.optimizer=muon, which needs whole gradients")
    _require_agreement(settings, follows, where)
    for key in ("train_batch_size", "fp16.enabled", "optimizer", "scheduler"):
        del follows[key]
    # DeepSpeed makes it of the other two; it is larger than ours where the last micro-batch of a step is not full.
    settings.pop("train_batch_size", None)
    if train.optimizer == "muon" or _is_bare(train, stage):
        # ZeRO 1 to 3 would clip Muon's orthogonal updates, whose norm is in the hundreds. `skipping.guard` clips for a
        # bare optimizer.
        follows["gradient_clipping"] = (0.0, "")
    for key, (value, _) in follows.items():
        section, _, name = key.rpartition(".")
        (settings.setdefault(section, {}) if section else settings)[name] = value
    if dtype == "bfloat16" and stage > 0:
        # By default gradients would be added up in the model's dtype, over micro-batches and over ranks.
        settings["data_types"] = {"grad_accum_dtype": "fp32"} | settings.get("data_types", {})
    if is_universal:
        settings["checkpoint"] = settings.get("checkpoint", {}) | {"load_universal": True}
    return settings


def read_settings(source: Path | dict[str, Any]) -> tuple[dict[str, Any], str]:
    """A copy of the settings in a file or in the config itself, and their place.

    Raises:
        ConfigError: if the file is missing or is not a JSON object, a section is none, or ZeRO's is not DeepSpeed's.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    where = settings_place(source)
    if isinstance(source, dict):
        settings = copy.deepcopy(source)
    else:
        try:
            settings = json.loads(source.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"train.deepspeed: cannot read {source}: {error.strerror}") from error
        except json.JSONDecodeError as error:
            raise ConfigError(f"train.deepspeed: {source} is not JSON: {error}") from error
        if not isinstance(settings, dict):
            raise ConfigError(f"train.deepspeed: {source} holds {type(settings).__name__}, expected an object")
    for name in ("zero_optimization", "bf16", "fp16", "data_types", "checkpoint"):
        if not isinstance(settings.get(name, {}), dict):
            raise ConfigError(f"{where}: {name} is {settings[name]!r}, expected a mapping of its settings")
    try:
        DeepSpeedZeroConfig(**settings.get("zero_optimization", {}))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(["zero_optimization", *map(str, problem["loc"])])  # a rule over several keys has no place
        raise ConfigError(f"{where}: {key} is {problem['input']!r}: {problem['msg']}") from error
    return settings, where


def settings_place(source: Path | dict[str, Any]) -> str:
    """What a message calls the place of DeepSpeed's settings."""
    return "train.deepspeed" if isinstance(source, dict) else str(source)


def _require_agreement(settings: dict[str, Any], follows: dict[str, tuple[Any, str]], where: str) -> None:
    """Hold settings against what the train section says, for each `section.name` that both have."""
    contradictions = []
    for key, (value, source) in follows.items():
        section, _, name = key.rpartition(".")
        there = (settings.get(section, {}) if section else settings).get(name)
        if there is not None and there not in ("auto", value):
            contradictions.append(f"{key} is {there!r} there, {value!r} by {source}")
    if contradictions:
        raise ConfigError(
            f"{where} contradicts the train section: {'; '.join(contradictions)}; remove it there, or change the train "
            "section"
        )


def require_nvme(settings: dict[str, Any]) -> None:
    """Refuse to offload to NVMe where that cannot work; DeepSpeed would say so in the middle of its start, if at all.

    Raises:
        ConfigError: if the stage is not 3, the directory is not there, or DeepSpeed's reader cannot be built.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    zero = settings.get("zero_optimization", {})
    for name in ("offload_optimizer", "offload_param"):
        section = zero.get(name) or {}
        if section.get("device") != "nvme":
            continue
        where = f"zero_optimization.{name}"
        if zero_stage(settings) != 3:
            raise ConfigError(
                f"{where}.device is nvme under ZeRO-{zero_stage(settings)}, DeepSpeed has that under ZeRO-3 alone: set "
                "stage 3, or device cpu"
            )
        directory = section.get("nvme_path")
        if directory is None or not os.access(directory, os.W_OK) or not Path(directory).is_dir():
            raise ConfigError(f"{where}.nvme_path is {directory}, expected a directory to write into; make it first")
        if not AsyncIOBuilder().is_compatible(verbose=False):
            raise ConfigError(
                f"{where}.device is nvme, for which DeepSpeed builds its async_io, and libaio is not here to build it "
                "with: install libaio-dev (Debian) or libaio-devel (Red Hat) on every node, or set device cpu"
            )
        logger.warning("%s.device is nvme: no test of this program has trained so, for want of libaio", where)


def zero_stage(settings: dict[str, Any]) -> int:
    """The ZeRO stage of DeepSpeed's settings; 0 is none."""
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def _is_bare(train: TrainConfig, stage: int) -> bool:
    """Whether DeepSpeed steps the optimizer itself, with no wrapper that clips and looks for NaN and Inf."""
    return stage == 0 and training_dtype(train) == "float32"


def partitioned_loading(settings: dict[str, Any]) -> Any:
    """Under ZeRO-3, what makes `from_pretrained` load straight into shares; it works for as long as it is kept."""
    if zero_stage(settings) != 3:
        return None
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    return HfDeepSpeedConfig(settings)


def build_engine(module: nn.Module, train: TrainConfig, settings: dict[str, Any], steps: int) -> Any:
    """The DeepSpeed engine, of `settings`, with the optimizer, schedule and average of the train section."""
    import deepspeed

    optimizer = build_optimizer(module, train)
    if _is_bare(train, zero_stage(settings)):
        skipping.guard(optimizer, math.inf if train.optimizer == "muon" else train.grad_clip)
    schedule = build_schedule(optimizer, train, steps)
    if train.ema is not None:
        averaging.keep_average(optimizer, train.ema)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, lr_scheduler=schedule, config=settings)
    if train.optimizer == "muon":
        skipping.check_before_muon(engine)
    return engine
