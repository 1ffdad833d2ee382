"""Whether a training fits into memory; if not, the arithmetic, and the changes that the same arithmetic accepts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import psutil
import torch

from shared.config import PipelineConfig
from shared.errors import ConfigError
from student.model.export import read_config
from student.planning.memory import GIB, Moment, memory
from student.planning.setup import Device, Setup
from student.training.engine import settings_place, training_dtype

WORKER_BYTES = GIB // 2
"""Of a process that makes batches ahead: Python, PyTorch, and the batches that wait."""


def require_fit(setup: Setup, available: int, owner: str = "a rank needs") -> None:
    """Refuse what does not fit into `available` bytes a rank, with what would.

    Raises:
        ConfigError: naming the largest part, the bytes, and the changes that the same arithmetic accepts.
    """
    held = memory(setup)
    if held.needed <= available:
        return
    name, moment = held.fullest
    part = max((field.name for field in fields(Moment)), key=lambda field: getattr(moment, field))
    found = [f"{text} ({needed / GIB:.1f} GiB)" for text, needed in remedies(setup, available)]
    more = "more or larger GPUs" if setup.device == "cuda" else "a larger machine, or fewer ranks on it"
    raise ConfigError(
        f"does not fit: {owner} {held.needed / GIB:.1f} GiB of {available / GIB:.1f} GiB, most of it in the {name} "
        f"({part} {getattr(moment, part) / GIB:.1f} GiB); "
        + ("any of these fits: " + "; ".join(found) if found else f"nothing tried here fits: take {more}")
    )


def require_memory(config: PipelineConfig, ranks: int, ranks_of_node: int) -> None:
    """Refuse to train the run's start where this machine's memory is too small for it; nothing is loaded.

    On a GPU, the rank's tensors are held against its memory, and what is offloaded against the host's. On a CPU all
    ranks of the node share what the host has free.

    Raises:
        ConfigError: as `require_fit`.
    """
    shape = read_config(config.student_init_dir)
    device: Device = "cuda" if torch.cuda.is_available() else "cpu"
    setup = Setup.of(config, shape, training_dtype(config.train), ranks, device)
    free = host_bytes_free() // ranks_of_node - config.train.data_workers * WORKER_BYTES
    if device == "cpu":
        require_fit(setup, free - memory(setup).host, f"each of {ranks_of_node} ranks on this machine needs")
        return
    require_fit(setup, torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    offloaded = memory(setup).host
    if offloaded > free:
        raise ConfigError(
            f"does not fit: each of {ranks_of_node} ranks on this machine offloads {offloaded / GIB:.1f} GiB to the "
            f"host, which has {free / GIB:.1f} GiB free for each; take more ranks on more nodes, or offload less in "
            f"{settings_place(config.train.deepspeed)}"
        )


def host_bytes_free() -> int:
    """Bytes of the host's memory that this process and others like it may still take, by its control groups too."""
    free = psutil.virtual_memory().available
    groups = Path("/proc/self/cgroup")
    named = [line[3:] for line in groups.read_text().splitlines() if line.startswith("0::")] if groups.exists() else []
    for name in named:
        own = Path("/sys/fs/cgroup") / name.lstrip("/")
        for group in (own, *own.parents):
            limit = group / "memory.max"
            if limit.exists() and (text := limit.read_text().strip()) != "max":
                statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                used = int((group / "memory.current").read_text()) - int(statistics["inactive_file"])
                free = min(free, int(text) - used)
    return free


def remedies(setup: Setup, available: int) -> Iterator[tuple[str, int]]:
    """Changes that make it fit, with the bytes needed then: single ones, else the first sum of them that does."""
    train, stage, place = setup.train, setup.zero.stage, settings_place(setup.train.deepspeed)
    # Without the second DeepSpeed refuses an optimizer of PyTorch's.
    offload = '"offload_optimizer": {"device": "cpu"} and "zero_force_ds_cpu_optimizer": false in ' + place
    changes: list[tuple[str, dict[str, Any]]] = []
    if not train.activation_checkpointing:
        changes.append(("train.activation_checkpointing: true", {"activation_checkpointing": True}))
    halves = [train.micro_batch >> shift for shift in range(1, train.micro_batch.bit_length())]
    changes += [(f"train.micro_batch: {rows}", {"micro_batch": rows}) for rows in halves]
    if setup.ranks > 1:
        changes += [(f"ZeRO stage {higher} in {place}", {"stage": higher}) for higher in range(stage + 1, 4)]
    if stage and setup.optimizer_on == "none" and setup.device == "cuda":
        changes.append((offload, {"offload": True}))
    if setup.lora is None:
        changes.append(("student.lora: {}", {"lora": True}))
    if setup.device == "cuda":
        more = (ranks for ranks in (2, 4, 8, 16, 32, 64) if ranks > setup.ranks and train.global_batch % ranks == 0)
        changes += [(f"{ranks} GPUs", {"ranks": ranks}) for ranks in more]
    found: list[tuple[str, int]] = []
    kinds: set[str] = set()
    for text, change in changes:
        needed = memory(setup.changed(**change)).needed
        if needed <= available and not kinds & change.keys():  # the first of a kind costs least
            kinds |= change.keys()
            found.append((text, needed))
    if found:
        yield from found
        return
    texts: dict[str, str] = {}
    together: dict[str, Any] = {}
    for text, change in changes:
        texts |= dict.fromkeys(change, text)  # a later change of a kind replaces the one before
        together |= change
        needed = memory(setup.changed(**together)).needed
        if needed <= available:
            yield " with ".join(texts.values()), needed
            return
