"""What a training will take, before it is started: memory, traffic, time, disk, by arithmetic alone (README.md).

Memory is `student.planning.memory`. Time is multiplications over the stated rate, and bytes over the stated link, where
nothing is computed meanwhile. Nothing is loaded but a shape: the start's where there is one, else the checkpoint's.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from rich.console import Group

from shared.config import PipelineConfig
from shared.console import bytes_text, titled_table
from student.planning.cost import Data, checkpoint_bytes, data_of, micro_batch_flops, wire_bytes
from student.planning.fit import require_fit
from student.planning.memory import GIB, Memory, Moment, memory
from student.planning.setup import Setup
from student.planning.shapes import shape_of
from student.training.launch import ranks_here

RANKS_OF_A_NODE = 8
# The largest file of a checkpoint, which ZeRO-3 loads at a time; `save_student` writes no larger one.
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What the command line states; None takes this machine's, or an 80 GiB GPU's."""

    gpus: int | None = None
    gpu_gib: float | None = None
    tflops: float = 989.0
    utilization: float = 0.4
    link: float = 450.0
    shape: Path | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is printed.

    Attributes:
        available: bytes of a rank's device.
        compute_s: seconds of a step's multiplications.
        wire: bytes that a rank sends in a step: during its micro-batches, and after them.
        wire_s: seconds of that.
        step_s: computing and sending at once where `overlap_comm` says so, and one after the other elsewhere.
        hours: None where the number of steps is unknown.
        host_bytes: of a node, while the start is loaded or all the time, whichever is more.
    """

    setup: Setup
    assumptions: Assumptions
    available: int
    memory: Memory
    shape_source: str
    data: Data | None
    steps: int | None
    epochs: float | None
    compute_s: float
    wire: tuple[float, float]
    wire_s: float
    step_s: float
    hours: float | None
    checkpoint_bytes: int
    host_bytes: int

    def require_fit(self) -> None:
        """As `student.planning.fit.require_fit`."""
        require_fit(self.setup, self.available)

    def table(self) -> Group:
        """For people."""
        setup, train, assumed = self.setup, self.setup.train, self.assumptions
        moments = (self.memory.loss, self.memory.backward, self.memory.step)
        title = f"memory of a rank, GiB, at three moments; a GPU has {self.available / GIB:.1f}"
        parts = titled_table(title, "part", "loss", "backward", "step")
        for field in fields(Moment):
            parts.add_row(field.name, *(f"{getattr(moment, field.name) / GIB:.1f}" for moment in moments))
        parts.add_row("margin", *(f"{moment.margin / GIB:.1f}" for moment in moments), end_section=True)
        parts.add_row("needed", *(f"{moment.needed / GIB:.1f}" for moment in moments))
        rest = titled_table("what the training will take")
        count, zero = setup.parameters, setup.zero
        rest.add_row("shape", f"{count.saved:,} parameters", self.shape_source)
        rest.add_row("trained", f"{count.trained:,}", f"ZeRO-{zero.stage}, ranks: {setup.ranks}, {setup.dtype}")
        rows = f"{train.global_batch:,} rows of {train.packed_row_tokens:,} tokens"
        rest.add_row("step", rows, f"{setup.accumulation} micro-batches of {train.micro_batch} on a rank")
        during, after = self.wire
        rest.add_row(
            "sent by a rank", bytes_text(during + after), f"a step; {bytes_text(after)} of it after its micro-batches"
        )
        rest.add_row(
            "step time", f"{self.step_s:.1f} s",
            f"{self.compute_s:.1f} s at {assumed.utilization:.0%} of {assumed.tflops:g} TFLOP/s, "
            f"{self.wire_s:.1f} s on the wire at {assumed.link:g} GB/s",
        )  # fmt: skip
        missing = "there is neither prepared data nor a dataset with training samples yet"
        rest.add_row("samples", "unknown" if self.data is None else f"{self.data.samples:,}",
                     missing if self.data is None else self.data.source)  # fmt: skip
        rest.add_row("steps", "unknown" if self.steps is None else f"{self.steps:,}",
                     "" if self.epochs is None else f"{self.epochs:.2f} epochs")  # fmt: skip
        rest.add_row("hours", "unknown" if self.hours is None else f"{self.hours:,.1f}", "")
        kept = train.keep_checkpoints + 1 if train.checkpoint_steps else 0
        rest.add_row("checkpoint", bytes_text(self.checkpoint_bytes),
                     f"at most {kept} at once: {bytes_text(kept * self.checkpoint_bytes)}")  # fmt: skip
        rest.add_row("model at the end", bytes_text(setup.element_bytes * count.saved), "")
        node = f"of a node, with ranks: {min(setup.ranks, RANKS_OF_A_NODE)}"
        rest.add_row("host memory", bytes_text(self.host_bytes), node)
        if self.memory.nvme:
            rest.add_row("NVMe", bytes_text(self.memory.nvme), "a rank")
        return Group(parts, rest)

    def json(self) -> str:
        """For programs: bytes, seconds, hours."""
        during, after = self.wire
        moments = {name: asdict(getattr(self.memory, name)) for name in ("loss", "backward", "step")}
        return json.dumps(
            {
                "parameters": asdict(self.setup.parameters) | {"source": self.shape_source},
                "ranks": self.setup.ranks,
                "zero_stage": self.setup.zero.stage,
                "dtype": self.setup.dtype,
                "memory": moments | {"needed": self.memory.needed, "available": self.available},
                "fits": self.memory.needed <= self.available,
                "host_bytes": self.host_bytes,
                "nvme_bytes": self.memory.nvme,
                "accumulation": self.setup.accumulation,
                "row_tokens": self.setup.train.packed_row_tokens,
                "wire_bytes": {"micro_batches": during, "end": after},
                "compute_s": self.compute_s,
                "step_s": self.step_s,
                "data": None if self.data is None else asdict(self.data),
                "steps": self.steps,
                "epochs": self.epochs,
                "hours": self.hours,
                "checkpoint_bytes": self.checkpoint_bytes,
                "assumptions": {key: value for key, value in asdict(self.assumptions).items() if key != "shape"},
            },
            indent=1,
        )


def plan(config: PipelineConfig, assumptions: Assumptions) -> Plan:
    """The cost of `student train` with `config`.

    Raises:
        ConfigError: if the shape is unknown, or the DeepSpeed file is missing or wrong.
    """
    ranks = assumptions.gpus or ranks_here(config.train)
    shape, source = shape_of(config, assumptions.shape)
    # What is planned for is a GPU, where `auto` means bfloat16, whatever this machine is.
    setup = Setup.of(config, shape, "bfloat16" if config.train.dtype == "auto" else config.train.dtype, ranks)
    train = setup.train
    if assumptions.gpu_gib is not None:
        available = int(assumptions.gpu_gib * GIB)
    else:
        available = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 80 * GIB
    data = data_of(config)
    steps, epochs = train.steps, train.epochs
    if data is not None:
        # Rows are taken as full.
        rows = data.samples * (data.clean_tokens + data.masked_tokens) / train.packed_row_tokens
        per_epoch = max(rows / train.global_batch, 1e-9)
        if steps is None:
            steps = max(-(-int((epochs or 1) * rows) // train.global_batch), 1)
        epochs = steps / per_epoch
    held, wire = memory(setup), wire_bytes(setup)
    flops_per_s = assumptions.tflops * 1e12 * assumptions.utilization
    compute_s = setup.accumulation * micro_batch_flops(setup, data) / flops_per_s
    during_s, after_s = (sent / (assumptions.link * 1e9) for sent in wire)
    step_s = after_s + (max(compute_s, during_s) if setup.zero.overlap_comm else compute_s + during_s)
    on_node, model = min(ranks, RANKS_OF_A_NODE), setup.element_bytes * setup.parameters.saved
    loading = model if setup.zero.stage < 3 else min(model, SHARD_BYTES)
    return Plan(
        setup,
        assumptions,
        available,
        held,
        source,
        data,
        steps,
        epochs,
        compute_s,
        wire,
        wire_s=during_s + after_s,
        step_s=step_s,
        hours=None if steps is None else steps * step_s / 3600,
        checkpoint_bytes=checkpoint_bytes(setup),
        host_bytes=max(on_node * loading, on_node * held.host + model),
    )
