"""Bytes that one rank holds while it trains, from shapes and DeepSpeed's settings alone.

Three moments decide: the loss (all activations kept, the logits' slice, the head's gradient), the backward (one block
made again where activations are checkpointed, gradients on their way to the other ranks), and the optimizer's step.
What is counted, and where it is read:

    activations     what autograd keeps of a block of `modeling_llada`, and the states that checkpointing keeps instead
    loss            `student.losses.chunked`
    weights, gradients, optimizer, communication
                    DeepSpeed 0.19's stage_1_and_2.py, stage3.py and bf16_optimizer.py

Tests hold the formulas to autograd's saved tensors, and the sum to what two ranks of DeepSpeed allocate.

Legend, per rank: N tokens of a forward, S supervised ones, P parameters, T trained ones, W ranks, e bytes an element.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

from shared.config import LoraConfig, TrainConfig
from student.losses.chunked import DEFAULT_CHUNK_BYTES, HEAD_ROWS, SCRATCH_BYTES
from student.model.configuration_llada import LladaConfig

Dtype = Literal["bfloat16", "float32"]
Device = Literal["cuda", "cpu"]

GIB = 1 << 30
ELEMENT_BYTES: dict[Dtype, int] = {"bfloat16": 2, "float32": 4}
# The optimizer's state beside the float32 weights: AdamW has two moments.
STATE_BYTES = 8
# What PyTorch's allocator cannot use, as a share, and the CUDA context with the libraries' workspaces and NCCL's
# buffers. Both are usual values, not measured here. On a CPU there are gloo's copies instead.
FRAGMENTATION = 0.06
CONTEXT_BYTES = int(1.5 * GIB)
GLOO_BYTES = GIB // 4
# Elements that DeepSpeed reduces at a time where it has no ZeRO bucket (engine.py, MEMORY_OPT_ALLREDUCE_SIZE).
PLAIN_BUCKET = 500_000_000


@dataclass(frozen=True, slots=True)
class Parameters:
    """How many there are: of the saved model, with adapters, trained; and entries of the largest trained tensors."""

    saved: int
    total: int
    trained: int
    largest: int
    largest_of_block: int

    @classmethod
    def of(cls, shape: LladaConfig, lora: LoraConfig | None, sequential_rank: int | None = None) -> Parameters:
        linears = block_linears(shape)
        block = sum(inputs * outputs for inputs, outputs in linears.values()) + 2 * shape.d_model
        vocabulary = shape.embedding_size * shape.d_model
        draft_head = 3 * (sequential_rank or 0) * shape.d_model
        saved = shape.n_layers * block + shape.d_model + vocabulary * (1 if shape.weight_tying else 2) + draft_head
        if lora is None:
            matrix = max(inputs * outputs for inputs, outputs in linears.values())
            return cls(saved, saved, saved, max(vocabulary, matrix), matrix)
        ends = [linears[target] for target in lora.targets]
        adapters = shape.n_layers * lora.rank * sum(a + b for a, b in ends)
        matrix = lora.rank * max(max(pair) for pair in ends)
        largest = max(matrix, draft_head // 3)
        return cls(saved, saved + adapters, adapters + draft_head, largest, matrix)


def block_linears(shape: LladaConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the matrices of a block, by their names in `modeling_llada`."""
    d, f, kv = shape.d_model, shape.mlp_hidden_size, shape.n_kv_heads * shape.head_dim
    return {
        "q_proj": (d, d), "k_proj": (d, kv), "v_proj": (d, kv), "attn_out": (d, d),
        "ff_proj": (d, f), "up_proj": (d, f), "ff_out": (f, d),
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Zero:
    """DeepSpeed's ZeRO settings as the arithmetic needs them; sizes in elements."""

    stage: int
    ranks: int
    optimizer_on: str
    parameters_on: str
    reduce_bucket: int
    buckets: int
    gathered: int
    prefetch: int
    sub_group: int
    all_reduces: bool
    overlap: bool
    accumulate_bytes: int

    @classmethod
    def of(cls, settings: dict[str, Any], ranks: int, dtype: Dtype) -> Zero:
        """Of the settings that `engine.deepspeed_config` makes; what they leave out has DeepSpeed's default."""
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
        from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum

        zero = DeepSpeedZeroConfig(**settings.get("zero_optimization", {}))
        wide = settings.get("data_types", {}).get("grad_accum_dtype") == "fp32"
        stage = int(zero.stage)
        return cls(
            stage=stage,
            ranks=ranks,
            optimizer_on=OffloadDeviceEnum(zero.offload_optimizer.device).value if zero.offload_optimizer else "none",
            parameters_on=OffloadDeviceEnum(zero.offload_param.device).value if zero.offload_param else "none",
            reduce_bucket=zero.reduce_bucket_size if stage else PLAIN_BUCKET,
            buckets=2 if zero.overlap_comm and stage < 3 else 1,
            gathered=zero.max_live_parameters,
            prefetch=zero.prefetch_bucket_size,
            sub_group=zero.sub_group_size,
            all_reduces=zero.use_multi_rank_bucket_allreduce,
            overlap=bool(zero.overlap_comm),
            accumulate_bytes=4 if wide else ELEMENT_BYTES[dtype],
        )

    @property
    def share(self) -> int:
        """What the optimizer's state is divided by."""
        return self.ranks if self.stage else 1


@dataclass(frozen=True, slots=True)
class Moment:
    """Bytes on the device at one moment, by part; `activations` are of the model's layers."""

    weights: int
    gradients: int
    optimizer: int
    communication: int = 0
    activations: int = 0
    loss: int = 0
    update: int = 0

    context: ClassVar[int] = CONTEXT_BYTES

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def margin(self) -> int:
        """For what no tensor holds."""
        return int(FRAGMENTATION * self.total) + self.context

    @property
    def needed(self) -> int:
        return self.total + self.margin


class HostMoment(Moment):
    """On a CPU, where the process itself is there already."""

    __slots__ = ()
    context: ClassVar[int] = GLOO_BYTES


@dataclass(frozen=True, slots=True)
class Memory:
    """A rank's three moments, and what it holds in the host's memory or on NVMe all the time."""

    loss: Moment
    backward: Moment
    step: Moment
    host: int
    nvme: int

    @property
    def fullest(self) -> tuple[str, Moment]:
        """The moment that takes most, with its name."""
        moments = {"loss": self.loss, "backward": self.backward, "step": self.step}
        return max(moments.items(), key=lambda item: item[1].total)

    @property
    def peak(self) -> int:
        """Bytes of tensors."""
        return self.fullest[1].total

    @property
    def needed(self) -> int:
        """Bytes of a device."""
        return self.fullest[1].needed


def memory(
    shape: LladaConfig,
    train: TrainConfig,
    zero: Zero,
    dtype: Dtype,
    lora: LoraConfig | None = None,
    accumulation: int = 1,
    device: Device = "cuda",
) -> Memory:
    """What a rank holds of a student of `shape`, trained as `train` and `zero` say."""
    e = ELEMENT_BYTES[dtype]
    parameters = Parameters.of(shape, lora, train.sequential_rank)
    trained, share = parameters.trained, -(-parameters.trained // zero.share)
    tokens = train.micro_batch * train.packed_row_tokens
    supervised = masked_tokens(train)
    offloaded, nvme = zero.optimizer_on != "none", zero.optimizer_on == "nvme"

    weights = e * parameters.total
    gathered = 0
    if zero.stage == 3:
        # ZeRO-3 gathers what it needs now, ahead of need up to `prefetch`, and keeps up to `gathered` of it.
        weights = 0 if zero.parameters_on != "none" else weights // zero.ranks
        largest = max(parameters.largest, shape.embedding_size * shape.d_model)
        gathered = e * (min(parameters.total, zero.gathered) + min(zero.prefetch + largest, parameters.total))
    # The float32 weights are a copy, but those of float32 training are the weights themselves where nothing cuts them.
    copied = dtype != "float32" or zero.stage in (1, 2)
    state = (STATE_BYTES + (4 if copied else 0)) * share
    gradients, reduced, flattened = _gradients(zero, e, trained, share, parameters.largest, accumulation)
    # The largest gradient is the head's or the embedding's, where no block's activations are made again.
    outside = _passing(zero, e, trained, share, parameters.largest)
    within = _passing(zero, e, trained, share, parameters.largest_of_block)
    again = block_again(shape, train, tokens, e, lora, device)
    passing, again = (outside, 0) if outside > within + again else (within, again)
    # ZeRO-3 steps a group of parameters at a time.
    stepped = min(share, zero.sub_group) if zero.stage == 3 else share
    update = max(reduced, flattened * stepped)  # fused AdamW updates in place
    bucket = e * zero.reduce_bucket if zero.stage == 3 else 0  # under ZeRO-3 it is never given back

    kept = kept_activations(shape, train, tokens, supervised, e, lora, device)
    fixed = (Moment if device == "cuda" else HostMoment)(weights, gradients, 0 if offloaded else state)
    host = 0
    if offloaded:
        # The state (on NVMe four buffers of it), the float32 gradients, and the weights on their way back.
        host = (0 if nvme else state) + 4 * share + e * share
    if zero.parameters_on == "cpu":
        host += e * parameters.total // zero.ranks
    return Memory(
        loss=_at(fixed, bucket + gathered, kept, loss_bytes(shape, train, supervised, e, lora is None, device), 0),
        backward=_at(fixed, bucket + gathered + passing, kept + again, 0, 0),
        step=_at(fixed, bucket, 0, 0, update),
        host=host,
        nvme=(state if nvme else 0) + (e * parameters.total // zero.ranks if zero.parameters_on == "nvme" else 0),
    )


def _at(fixed: Moment, communication: int, activations: int, loss: int, update: int) -> Moment:
    return replace(fixed, communication=communication, activations=activations, loss=loss, update=update)


def _gradients(zero: Zero, e: int, trained: int, share: int, largest: int, accumulation: int) -> tuple[int, int, int]:
    """Bytes of gradients that stay from one micro-batch to the next, and that the reduction before the step takes;
    bytes a parameter of the copy that the step is made on."""
    wide = zero.accumulate_bytes
    if zero.stage == 0:
        # FP16_UnfusedOptimizer: gradients as made; float32 copies of them at the step.
        return e * trained, e * min(zero.reduce_bucket, trained), 4 if e == 2 else 0
    if _sums_on_every_rank(zero, e):
        # BF16_Optimizer: float32 sums of all gradients on every rank, autograd's own beside them, and all of them once
        # more in the type of the reduction.
        return (wide + e) * trained, max(e * trained, 4 * largest), 0
    if zero.stage == 1:
        return wide * trained, 0, 4
    if zero.stage == 2 and wide == e:
        # Without a wider sum the micro-batches before are kept beside the present one, and the step flattens them.
        return e * share * (2 if accumulation > 1 else 1), 0, e
    return wide * share, 0, 0 if zero.stage == 2 else 4


def _passing(zero: Zero, e: int, trained: int, share: int, gradient: int) -> int:
    """Bytes of a gradient of so many entries on its way from autograd to the other ranks, with its bucket."""
    bucket, made = min(zero.reduce_bucket, trained), e * gradient
    if zero.stage == 0 or _sums_on_every_rank(zero, e):
        return made
    # A reduction takes a flat copy of its bucket, or of a gradient that is larger.
    copied = e * max(bucket, gradient)
    if zero.stage == 3:
        return made + copied + zero.accumulate_bytes * bucket // zero.ranks
    # The own part of what was reduced is widened before it is added.
    widened = zero.accumulate_bytes * min(gradient, share) if zero.accumulate_bytes != e else 0
    return e * zero.buckets * zero.reduce_bucket + made + copied + widened


def _sums_on_every_rank(zero: Zero, e: int) -> bool:
    return zero.stage == 1 and zero.accumulate_bytes != e and zero.optimizer_on == "none"


def masked_tokens(train: TrainConfig) -> int:
    """S of a forward, if samples are as long as they may be: shorter ones have more blocks to a row, and more targets.

    At most A G of every `max_sequence_tokens` + A G tokens of a row are masked (A anchors, blocks of G).
    """
    blocks = train.anchors * train.block_length
    return train.micro_batch * train.packed_row_tokens * blocks // (train.max_sequence_tokens + blocks)


def saved_by_block(shape: LladaConfig, masked: int, e: int, lora: LoraConfig | None, device: Device) -> tuple[int, int]:
    """Bytes a token that autograd saves in one block's forward: by attention, and by what comes after it; of a row, so
    many tokens are masked.

    A norm saves its input in float32, 1 / rms, its output and, where its weight is trained, the normed input; attention
    q, k, v, its output and the log-sum-exp; the MLP both projections, silu of the first and the product. A frozen
    matrix does not need its input, its adapter does, or with dropout what is left of it, and the mask.
    """
    d, f, kv = shape.d_model, shape.mlp_hidden_size, shape.n_kv_heads * shape.head_dim
    linears = block_linears(shape)
    dropout = lora is not None and lora.dropout > 0
    targets = linears.keys() if lora is None else [] if dropout else lora.targets
    norm = 4 * d + 4 + (e * d if lora is None else 0)
    early = norm + 2 * e * d + 2 * e * kv + 4 * shape.n_heads
    late = norm + e * f * (4 if "ff_out" in targets else 3)
    early += e * d * any(name in targets for name in ("q_proj", "k_proj", "v_proj"))
    late += e * d * any(name in targets for name in ("ff_proj", "up_proj"))
    if device == "cpu":
        # SDPA makes a mask of all keys for every masked token and layer; the documents' outputs are copied together.
        early += e * masked
        late += e * d * ("attn_out" in targets)
    if lora is None:
        return early, late
    for target in lora.targets:
        adapter = e * lora.rank
        if dropout:
            adapter += (e + (1 if device == "cuda" else e)) * linears[target][0]
        if target in ("q_proj", "k_proj", "v_proj"):
            early += adapter
        else:
            late += adapter
    return early, late


def kept_activations(
    shape: LladaConfig,
    train: TrainConfig,
    tokens: int,
    supervised: int,
    e: int,
    lora: LoraConfig | None,
    device: Device,
) -> int:
    """Bytes that the whole forward leaves for the backward; with checkpointing, the input of every block.

    After its attention the last block goes on with the supervised tokens alone.
    """
    masked = supervised // train.micro_batch
    early, late = saved_by_block(shape, masked, e, lora, device)
    if train.activation_checkpointing:
        layers = shape.n_layers * tokens * e * shape.d_model
    else:
        layers = (shape.n_layers - 1) * tokens * (early + late) + tokens * early + supervised * late
    final = 4 * shape.d_model + 4 + (e * shape.d_model if lora is None else 0)
    rope = 2 * 4 * shape.head_dim
    mask = masked if device == "cpu" else 0  # booleans, once
    draft_head = 2 * e * (shape.d_model + train.sequential_rank) if train.sequential_rank else 0
    return layers + tokens * (rope + mask) + supervised * (final + 2 * e * shape.d_model + draft_head)


def block_again(
    shape: LladaConfig, train: TrainConfig, tokens: int, e: int, lora: LoraConfig | None, device: Device
) -> int:
    """Bytes beside the kept ones while one block's backward runs: its activations, where they are made again, and the
    gradients of states and of the MLP's two branches."""
    if not train.activation_checkpointing:
        again = 0
    else:
        again = sum(saved_by_block(shape, masked_tokens(train) // train.micro_batch, e, lora, device))
    return tokens * (again + 2 * e * (shape.d_model + shape.mlp_hidden_size))


def loss_bytes(shape: LladaConfig, train: TrainConfig, supervised: int, e: int, head: bool, device: Device) -> int:
    """Most bytes that `student.losses.chunked` takes; `head` says that the head is trained."""
    vocabulary, d = shape.embedding_size, shape.d_model
    rows = min(max(DEFAULT_CHUNK_BYTES[device] // (4 * vocabulary), train.block_length), supervised)
    logits = 4 * rows * vocabulary
    slopes = e * rows * vocabulary if e == 2 else 0
    part = min(HEAD_ROWS, vocabulary)
    scratch = 4 * vocabulary * min(max(SCRATCH_BYTES[device] // (4 * vocabulary), 1), rows)
    if device == "cpu" and e == 2:
        scratch = max(scratch, 4 * part * (d + rows))
    if not head:
        return logits + max(scratch, slopes)
    # The head's gradient in float32, then once more in the head's type.
    product = e * part * d if e == 2 else 0
    copy = e * vocabulary * d if e == 2 else 0
    return logits + 4 * vocabulary * d + max(scratch, slopes + product, copy)
