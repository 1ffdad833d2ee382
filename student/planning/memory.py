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
from typing import ClassVar

from student.losses.chunked import DEFAULT_CHUNK_BYTES, HEAD_ROWS, SCRATCH_BYTES
from student.planning.setup import Setup, block_linears

GIB = 1 << 30
# The optimizer's state beside the float32 weights: AdamW has two moments.
STATE_BYTES = 8
# What PyTorch's allocator cannot use, as a share, and the CUDA context with the libraries' workspaces and NCCL's
# buffers. Both are usual values, not measured here. On a CPU there are gloo's copies instead.
FRAGMENTATION = 0.06
CONTEXT_BYTES = int(1.5 * GIB)
GLOO_BYTES = GIB // 4


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
    def needed(self) -> int:
        """Bytes of a device."""
        return self.fullest[1].needed


def memory(setup: Setup) -> Memory:
    """What a rank holds of the student of `setup` while it trains."""
    zero, parameters, e, share = setup.zero, setup.parameters, setup.element_bytes, setup.share
    offloaded, nvme = setup.optimizer_on != "none", setup.optimizer_on == "nvme"

    weights = e * parameters.total
    gathered = 0
    if zero.stage == 3:
        # ZeRO-3 gathers what it needs now and ahead of need up to one size, and keeps of it up to the other.
        weights = 0 if setup.parameters_on != "none" else weights // setup.ranks
        largest = max(parameters.largest, setup.shape.embedding_size * setup.shape.d_model)
        ahead = min(zero.prefetch_bucket_size + largest, parameters.total)
        gathered = e * (min(parameters.total, zero.max_live_parameters) + ahead)
    # The float32 weights are a copy, but those of float32 training are the weights themselves where nothing cuts them.
    copied = setup.dtype != "float32" or zero.stage in (1, 2)
    averaged = setup.train.ema is not None  # in float32, beside the moments
    state = (STATE_BYTES + 4 * (copied + averaged)) * share
    gradients, reduced, flattened = _gradients(setup)
    # The largest gradient is the head's or the embedding's, where no block's activations are made again.
    outside, within = (_passing(setup, entries) for entries in (parameters.largest, parameters.largest_of_block))
    again = block_again(setup)
    passing, again = (outside, 0) if outside > within + again else (within, again)
    # ZeRO-3 steps a group of parameters at a time.
    stepped = min(share, zero.sub_group_size) if zero.stage == 3 else share
    update = max(reduced, flattened * stepped)  # fused AdamW updates in place
    bucket = e * setup.reduce_bucket if zero.stage == 3 else 0  # under ZeRO-3 it is never given back

    kept = kept_activations(setup)
    fixed = (Moment if setup.device == "cuda" else HostMoment)(
        weights, gradients, optimizer=0 if offloaded else state, communication=bucket
    )
    host = 0
    if offloaded:
        # The state (on NVMe four buffers of it), the float32 gradients, and the weights on their way back.
        host = (0 if nvme else state) + 4 * share + e * share
    if setup.parameters_on == "cpu":
        host += e * parameters.total // setup.ranks
    return Memory(
        loss=replace(fixed, communication=bucket + gathered, activations=kept, loss=loss_bytes(setup)),
        backward=replace(fixed, communication=bucket + gathered + passing, activations=kept + again),
        step=replace(fixed, update=update),
        host=host,
        nvme=(state if nvme else 0) + (e * parameters.total // setup.ranks if setup.parameters_on == "nvme" else 0),
    )


def _gradients(setup: Setup) -> tuple[int, int, int]:
    """Bytes of gradients that stay from one micro-batch to the next, and that the reduction before the step takes;
    bytes a parameter of the copy that the step is made on."""
    zero, e, trained, wide = setup.zero, setup.element_bytes, setup.parameters.trained, setup.accumulate_bytes
    if zero.stage == 0:
        # FP16_UnfusedOptimizer: gradients as made; float32 copies of them at the step.
        return e * trained, e * min(setup.reduce_bucket, trained), 4 if e == 2 else 0
    if _sums_on_every_rank(setup):
        # BF16_Optimizer: float32 sums of all gradients on every rank, autograd's own beside them, and all of them once
        # more in the type of the reduction.
        return (wide + e) * trained, max(e * trained, 4 * setup.parameters.largest), 0
    if zero.stage == 1:
        return wide * trained, 0, 4
    if zero.stage == 2 and wide == e:
        # Without a wider sum the micro-batches before are kept beside the present one, and the step flattens them.
        return e * setup.share * (2 if setup.accumulation > 1 else 1), 0, e
    return wide * setup.share, 0, 0 if zero.stage == 2 else 4


def _passing(setup: Setup, entries: int) -> int:
    """Bytes of a gradient of so many entries on its way from autograd to the other ranks, with its bucket."""
    zero, e = setup.zero, setup.element_bytes
    bucket, made = min(setup.reduce_bucket, setup.parameters.trained), e * entries
    if zero.stage == 0 or _sums_on_every_rank(setup):
        return made
    # A reduction takes a flat copy of its bucket, or of a gradient that is larger.
    copied = e * max(bucket, entries)
    if zero.stage == 3:
        return made + copied + setup.accumulate_bytes * bucket // setup.ranks
    # The own part of what was reduced is widened before it is added.
    widened = setup.accumulate_bytes * min(entries, setup.share) if setup.accumulate_bytes != e else 0
    buckets = 2 if zero.overlap_comm else 1
    return e * buckets * setup.reduce_bucket + made + copied + widened


def _sums_on_every_rank(setup: Setup) -> bool:
    zero = setup.zero
    return zero.stage == 1 and setup.accumulate_bytes != setup.element_bytes and setup.optimizer_on == "none"


def saved_by_block(setup: Setup) -> tuple[int, int]:
    """Bytes a token that autograd saves in one block's forward: by attention, and by what comes after it.

    A norm saves its input in float32, 1 / rms, its output and, where its weight is trained, the normed input; attention
    q, k, v, its output and the log-sum-exp; the MLP both projections, silu of the first and the product. A frozen
    matrix does not need its input, its adapter does, or with dropout what is left of it, and the mask.
    """
    shape, lora, e = setup.shape, setup.lora, setup.element_bytes
    d, f, kv = shape.d_model, shape.mlp_hidden_size, shape.n_kv_heads * shape.head_dim
    linears = block_linears(shape)
    dropout = lora is not None and lora.dropout > 0
    targets = linears.keys() if lora is None else [] if dropout else lora.targets
    norm = 4 * d + 4 + (e * d if lora is None else 0)
    early = norm + 2 * e * d + 2 * e * kv + 4 * shape.n_heads
    late = norm + e * f * (4 if "ff_out" in targets else 3)
    early += e * d * any(name in targets for name in ("q_proj", "k_proj", "v_proj"))
    late += e * d * any(name in targets for name in ("ff_proj", "up_proj"))
    if setup.device == "cpu":
        # SDPA makes a mask of all keys for every masked token and layer; the documents' outputs are copied together.
        early += e * (setup.supervised // setup.train.micro_batch)
        late += e * d * ("attn_out" in targets)
    if lora is None:
        return early, late
    for target in lora.targets:
        adapter = e * lora.rank
        if dropout:
            adapter += (e + (1 if setup.device == "cuda" else e)) * linears[target][0]
        if target in ("q_proj", "k_proj", "v_proj"):
            early += adapter
        else:
            late += adapter
    return early, late


def kept_activations(setup: Setup) -> int:
    """Bytes that the whole forward leaves for the backward; with checkpointing, the input of every block.

    After its attention the last block goes on with the supervised tokens alone.
    """
    shape, train, e, tokens, supervised = setup.shape, setup.train, setup.element_bytes, setup.tokens, setup.supervised
    early, late = saved_by_block(setup)
    if train.activation_checkpointing:
        layers = shape.n_layers * tokens * e * shape.d_model
    else:
        layers = (shape.n_layers - 1) * tokens * (early + late) + tokens * early + supervised * late
    final = 4 * shape.d_model + 4 + (e * shape.d_model if setup.lora is None else 0)
    rope = 2 * 4 * shape.head_dim
    mask = supervised // train.micro_batch if setup.device == "cpu" else 0  # booleans, once
    draft_head = 2 * e * (shape.d_model + train.sequential_rank) if train.sequential_rank else 0
    return layers + tokens * (rope + mask) + supervised * (final + 2 * e * shape.d_model + draft_head)


def block_again(setup: Setup) -> int:
    """Bytes beside the kept ones while one block's backward runs: its activations, where they are made again, and the
    gradients of states and of the MLP's two branches."""
    shape = setup.shape
    again = sum(saved_by_block(setup)) if setup.train.activation_checkpointing else 0
    return setup.tokens * (again + 2 * setup.element_bytes * (shape.d_model + shape.mlp_hidden_size))


def loss_bytes(setup: Setup) -> int:
    """Most bytes that `student.losses.chunked` takes; without adapters the head is trained."""
    vocabulary, d, e, device = setup.shape.embedding_size, setup.shape.d_model, setup.element_bytes, setup.device
    rows = min(max(DEFAULT_CHUNK_BYTES[device] // (4 * vocabulary), setup.train.block_length), setup.supervised)
    logits = 4 * rows * vocabulary
    slopes = e * rows * vocabulary if e == 2 else 0
    part = min(HEAD_ROWS, vocabulary)
    scratch = 4 * vocabulary * min(max(SCRATCH_BYTES[device] // (4 * vocabulary), 1), rows)
    if device == "cpu" and e == 2:
        scratch = max(scratch, 4 * part * (d + rows))
    if setup.lora is not None:
        return logits + max(scratch, slopes)
    # The head's gradient in float32, then once more in the head's type.
    product = e * part * d if e == 2 else 0
    copy = e * vocabulary * d if e == 2 else 0
    return logits + 4 * vocabulary * d + max(scratch, slopes + product, copy)
