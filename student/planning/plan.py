"""What a training will take, before it is started: memory, traffic, time, disk, by arithmetic alone (README.md).

Memory is `student.planning.memory`. Time is multiplications over the stated rate, and bytes over the stated link, where
nothing is computed meanwhile. Nothing is loaded but a shape: the start's where there is one, else the checkpoint's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Group

from shared.config import LoraConfig, PipelineConfig, TrainConfig
from shared.console import bytes_text, titled_table
from shared.errors import ConfigError, DatasetError
from student.alignment.prepared import PreparedDataset
from student.model.configuration_llada import LladaConfig
from student.planning.memory import (
    ELEMENT_BYTES,
    GIB,
    Dtype,
    Memory,
    Moment,
    Parameters,
    Zero,
    block_linears,
    masked_tokens,
    memory,
)
from student.planning.shapes import shape_of
from student.training.engine import deepspeed_config
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
class Setup:
    """What the arithmetic takes: a shape, and how it is trained."""

    shape: LladaConfig
    train: TrainConfig
    settings: dict[str, Any]
    lora: LoraConfig | None
    ranks: int

    @property
    def dtype(self) -> Dtype:
        return "float32" if self.train.dtype == "float32" else "bfloat16"

    @property
    def accumulation(self) -> int:
        return -(-self.train.global_batch // (self.ranks * self.train.micro_batch))

    @property
    def zero(self) -> Zero:
        return Zero.of(self.settings, self.ranks, self.dtype)

    @property
    def parameters(self) -> Parameters:
        return Parameters.of(self.shape, self.lora)

    def memory(self) -> Memory:
        return memory(self.shape, self.train, self.zero, self.dtype, self.lora, self.accumulation)

    def changed(
        self,
        *,
        stage: int | None = None,
        offload: bool = False,
        lora: bool = False,
        ranks: int | None = None,
        **train: Any,
    ) -> Setup:
        """The same with other settings."""
        zero = dict(self.settings.get("zero_optimization", {}))
        if stage is not None:
            zero["stage"] = stage
        if offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        settings = self.settings | {"zero_optimization": zero}
        if zero.get("stage") and self.dtype == "bfloat16":
            settings["data_types"] = {"grad_accum_dtype": "fp32"} | settings.get("data_types", {})
        return replace(
            self,
            train=self.train.model_copy(update=train),
            settings=settings,
            lora=LoraConfig() if lora else self.lora,
            ranks=ranks or self.ranks,
        )


@dataclass(frozen=True, slots=True)
class Data:
    """The training samples: how many, and the mean tokens of one in a row, clean and masked."""

    samples: int
    clean_tokens: float
    masked_tokens: float
    source: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is printed; times are None where the number of steps is unknown."""

    setup: Setup
    assumptions: Assumptions
    available: int
    memory: Memory
    shape_source: str
    data: Data | None
    steps: int | None
    epochs: float | None

    @property
    def compute_s(self) -> float:
        """Seconds of a step's multiplications."""
        flops = self.setup.accumulation * micro_batch_flops(self.setup, self.data)
        return flops / (self.assumptions.tflops * 1e12 * self.assumptions.utilization)

    @property
    def wire(self) -> tuple[float, float]:
        """Bytes that a rank sends in a step: during its micro-batches, and after them."""
        return wire_bytes(self.setup)

    @property
    def wire_s(self) -> tuple[float, float]:
        during, after = (sent / (self.assumptions.link * 1e9) for sent in self.wire)
        return during, after

    @property
    def step_s(self) -> float:
        """Computing and sending at once where `overlap_comm` says so, and one after the other elsewhere."""
        during, after = self.wire_s
        return after + (max(self.compute_s, during) if self.setup.zero.overlap else self.compute_s + during)

    @property
    def hours(self) -> float | None:
        return None if self.steps is None else self.steps * self.step_s / 3600

    @property
    def checkpoint_bytes(self) -> int:
        return checkpoint_bytes(self.setup)

    @property
    def host_bytes(self) -> int:
        """Of a node, while the start is loaded or all the time, whichever is more."""
        ranks = min(self.setup.ranks, RANKS_OF_A_NODE)
        model = ELEMENT_BYTES[self.setup.dtype] * self.setup.parameters.saved
        loading = ranks * (model if self.setup.zero.stage < 3 else min(model, SHARD_BYTES))
        return max(loading, ranks * self.memory.host + model)

    @property
    def fits(self) -> bool:
        return self.memory.needed <= self.available

    def require_fit(self) -> None:
        """Refuse what does not fit, with what would.

        Raises:
            ConfigError: naming the largest part, the bytes, and the changes that the same arithmetic accepts.
        """
        if self.fits:
            return
        name, moment = self.memory.fullest
        part = max((field.name for field in fields(Moment)), key=lambda field: getattr(moment, field))
        found = [f"{text} ({needed / GIB:.1f} GiB)" for text, needed in remedies(self.setup, self.available)]
        raise ConfigError(
            f"does not fit: a rank needs {self.memory.needed / GIB:.1f} GiB of {self.available / GIB:.1f} GiB, most of "
            f"it in the {name} ({part} {getattr(moment, part) / GIB:.1f} GiB); "
            + (
                "any of these fits: " + "; ".join(found)
                if found
                else "nothing tried here fits: take more or larger GPUs"
            )
        )

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
            f"{sum(self.wire_s):.1f} s on the wire at {assumed.link:g} GB/s",
        )  # fmt: skip
        missing = "there is neither prepared data nor a dataset yet"
        rest.add_row("samples", "unknown" if self.data is None else f"{self.data.samples:,}",
                     missing if self.data is None else self.data.source)  # fmt: skip
        rest.add_row("steps", "unknown" if self.steps is None else f"{self.steps:,}",
                     "" if self.epochs is None else f"{self.epochs:.2f} epochs")  # fmt: skip
        rest.add_row("hours", "unknown" if self.hours is None else f"{self.hours:,.1f}", "")
        kept = train.keep_checkpoints + 1 if train.checkpoint_steps else 0
        rest.add_row("checkpoint", bytes_text(self.checkpoint_bytes),
                     f"at most {kept} at once: {bytes_text(kept * self.checkpoint_bytes)}")  # fmt: skip
        rest.add_row("model at the end", bytes_text(ELEMENT_BYTES[setup.dtype] * count.saved), "")
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
                "fits": self.fits,
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
    dtype = "bfloat16" if config.train.dtype == "auto" else config.train.dtype
    train = config.train.model_copy(update={"dtype": dtype})
    setup = Setup(shape, train, deepspeed_config(train, 1), config.student.lora, ranks)
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
    return Plan(setup, assumptions, available, setup.memory(), source, data, steps, epochs)


def step_flops(config: PipelineConfig, shape: LladaConfig, ranks: int, prepared: PreparedDataset) -> float:
    """Multiplications and additions of a step on one rank, what checkpointing repeats left out."""
    train = config.train.model_copy(update={"activation_checkpointing": False})
    setup = Setup(shape, train, {}, config.student.lora, ranks)
    return setup.accumulation * micro_batch_flops(setup, data_of_prepared(prepared, train))


def data_of(config: PipelineConfig) -> Data | None:
    """The run's training samples: of its prepared data, else of its dataset's manifest, else None."""
    train = config.train
    try:
        return data_of_prepared(PreparedDataset.open(config.prepared_dir), train)
    except DatasetError:
        pass
    try:
        from shared.dataset.reader import Dataset

        manifest = Dataset.open(config.shards_dir).manifest
    except DatasetError:
        return None
    samples = sum(count for key, count in manifest.counts.items() if key.startswith("train/"))
    tokens = manifest.tokens / max(manifest.rows, 1)
    source = f"{config.shards_dir}, {tokens:.0f} response tokens each, of the teacher's; prompts not counted"
    return Data(
        samples, min(tokens, train.max_sequence_tokens), train.block_length * min(train.anchors, tokens), source
    )


def data_of_prepared(prepared: PreparedDataset, train: TrainConfig) -> Data:
    """The training samples of prepared targets."""
    chosen = prepared.indices(split="train")
    lengths, prompts = prepared.lengths[chosen], prepared.prompt_lengths[chosen]
    clean = float(lengths.clip(max=train.max_sequence_tokens).mean())
    masked = train.block_length * float((lengths - prompts).clip(max=train.anchors).mean())
    return Data(len(chosen), clean, masked, f"{prepared.directory}, {clean:.0f} + {masked:.0f} tokens each")


def micro_batch_flops(setup: Setup, data: Data | None) -> float:
    """Multiplications and additions of one forward and backward on a rank, what checkpointing repeats included.

    Two a weight and token forward, twice that backward, or once where the weight is frozen. Attention: a query meets
    half of its sample. The last block after its attention, and the head, see supervised positions alone; the head makes
    three products each (`student.losses.chunked`).
    """
    shape, train, lora = setup.shape, setup.train, setup.lora
    tokens = train.micro_batch * train.packed_row_tokens
    sizes = {name: inputs * outputs for name, (inputs, outputs) in block_linears(shape).items()}
    after_attention = sum(sizes[name] for name in ("attn_out", "ff_proj", "up_proj", "ff_out"))
    sample = train.max_sequence_tokens if data is None else data.clean_tokens
    attention = shape.n_layers * 4 * shape.d_model * sample / 2
    supervised = float(masked_tokens(train))
    if data is not None:
        supervised = tokens * data.masked_tokens / (data.clean_tokens + data.masked_tokens)
    again = 1 if train.activation_checkpointing else 0
    products = tokens * shape.n_layers * sum(sizes.values()) - (tokens - supervised) * after_attention
    blocks = 2 * products * (again + (3 if lora is None else 2)) + tokens * attention * (again + 3)
    head = supervised * 2 * shape.embedding_size * shape.d_model * (3 if lora is None else 2)
    adapters = 0 if lora is None else tokens * 2 * setup.parameters.trained * (again + 3)
    return blocks + head + adapters


def wire_bytes(setup: Setup) -> tuple[float, float]:
    """Bytes that a rank sends in a step, by rings: a share of (W - 1) / W to gather or to reduce and scatter, twice
    that to all-reduce. During the micro-batches, and after them."""
    zero, e, count = setup.zero, ELEMENT_BYTES[setup.dtype], setup.parameters
    ring = (zero.ranks - 1) / zero.ranks
    gradients = ring * e * count.trained
    if zero.stage == 0:
        return 0.0, 2 * gradients
    if zero.stage == 1:
        return 0.0, 2 * gradients + gradients  # the updated weights are as many bytes as the gradients
    if zero.stage == 2:
        return setup.accumulation * gradients * (2 if zero.all_reduces else 1), gradients
    # Weights for the forward and again for the backward.
    return setup.accumulation * (2 * ring * e * count.total + gradients), 0.0


def checkpoint_bytes(setup: Setup) -> int:
    """Of one step-N: the weights, and float32 weights with AdamW's moments of what is trained."""
    return ELEMENT_BYTES[setup.dtype] * setup.parameters.total + 12 * setup.parameters.trained


def remedies(setup: Setup, available: int) -> Iterator[tuple[str, int]]:
    """Changes that make it fit, with the bytes needed then: single ones, else the first sum of them that does."""
    train, stage = setup.train, setup.zero.stage
    # Without the second DeepSpeed refuses an optimizer of PyTorch's.
    offload = '"offload_optimizer": {"device": "cpu"} and "zero_force_ds_cpu_optimizer": false in the DeepSpeed file'
    changes: list[tuple[str, dict[str, Any]]] = []
    if not train.activation_checkpointing:
        changes.append(("train.activation_checkpointing: true", {"activation_checkpointing": True}))
    halves = [train.micro_batch >> shift for shift in range(1, train.micro_batch.bit_length())]
    changes += [(f"train.micro_batch: {rows}", {"micro_batch": rows}) for rows in halves]
    if setup.ranks > 1:
        changes += [(f"ZeRO stage {higher} in {train.deepspeed}", {"stage": higher}) for higher in range(stage + 1, 4)]
    if stage and setup.zero.optimizer_on == "none":
        changes.append((offload, {"offload": True}))
    if setup.lora is None:
        changes.append(("student.lora: {}", {"lora": True}))
    changes += [(f"{ranks} GPUs", {"ranks": ranks}) for ranks in (2, 4, 8, 16, 32, 64) if ranks > setup.ranks]
    found: list[tuple[str, int]] = []
    kinds: set[str] = set()
    for text, change in changes:
        needed = setup.changed(**change).memory().needed
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
        needed = setup.changed(**together).memory().needed
        if needed <= available:
            yield " with ".join(texts.values()), needed
            return
