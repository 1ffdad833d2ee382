"""DeepSpeed around the student: process group, optimizer, schedule, engine.

The file that `train.deepspeed` names holds what belongs to the cluster (ZeRO stage, buckets, offload). What follows
from the training config (batch sizes, precision, clipping) is filled in here, so that it is said once.
"""

from __future__ import annotations

import json
import os
import warnings
from typing import Any, Literal

import torch
from torch import nn

from shared.config import TrainConfig
from shared.errors import ConfigError

FILLED_IN = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "fp16",
    "optimizer",
    "scheduler",
)


def initialize_process_group() -> tuple[int, int]:
    """Join the job's process group; (rank, world size). A process that no launcher started is a world of one."""
    import deepspeed
    import deepspeed.ops

    if not torch.cuda.is_available():
        # Without this, DeepSpeed compiles an all-reduce of its own for minutes; gloo's serves two ranks as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" not in os.environ:
        import socket

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # collectives of objects use the current device
    # DeepSpeed calls names that this torch already calls old.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo")
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


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
    """The DeepSpeed settings of a run.

    Args:
        is_universal: a checkpoint in the universal format will be loaded.

    Raises:
        ConfigError: if the file is missing, is not a JSON object, or sets what the training config decides.
    """
    try:
        settings = json.loads(train.deepspeed.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"train.deepspeed: cannot read {train.deepspeed}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"train.deepspeed: {train.deepspeed} is not JSON: {error}") from error
    doubled = [key for key in FILLED_IN if key in settings]
    if doubled:
        raise ConfigError(
            f"{train.deepspeed} sets {', '.join(doubled)}, which follow from the train section; remove them there"
        )
    dtype = training_dtype(train)
    if dtype == "bfloat16" and zero_stage(settings) > 0:
        # By default gradients would be added up in the model's dtype, over micro-batches and over ranks.
        settings["data_types"] = {"grad_accum_dtype": "fp32"} | settings.get("data_types", {})
    if is_universal:
        settings["checkpoint"] = settings.get("checkpoint", {}) | {"load_universal": True}
    return settings | {
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.grad_clip,
        "bf16": {"enabled": dtype == "bfloat16"},
    }


def zero_stage(settings: dict[str, Any]) -> int:
    """The ZeRO stage of DeepSpeed's settings; 0 is none."""
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def partitioned_loading(settings: dict[str, Any]) -> Any:
    """Under ZeRO-3, what makes `from_pretrained` load straight into shares; it works for as long as it is kept."""
    if zero_stage(settings) != 3:
        return None
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    return HfDeepSpeedConfig(settings)


def build_engine(module: nn.Module, train: TrainConfig, settings: dict[str, Any], steps: int) -> Any:
    """The DeepSpeed engine, of `settings`, with AdamW and a cosine schedule with warm-up."""
    import deepspeed
    from transformers import get_cosine_with_min_lr_schedule_with_warmup

    optimizer = torch.optim.AdamW(
        [parameter for parameter in module.parameters() if parameter.requires_grad],
        lr=train.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=train.weight_decay,
    )
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer,
        num_warmup_steps=round(train.warmup * steps),
        num_training_steps=steps,
        min_lr_rate=train.min_learning_rate,
    )
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, lr_scheduler=schedule, config=settings)
    return engine
