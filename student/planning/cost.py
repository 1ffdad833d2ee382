"""What a step costs: multiplications, bytes sent, bytes of a checkpoint; and the samples that it is made of."""

from __future__ import annotations

from dataclasses import dataclass

from shared.config import PipelineConfig, TrainConfig
from shared.dataset.reader import Dataset
from shared.errors import DatasetError
from student.alignment.prepared import PreparedDataset
from student.model.configuration_llada import LladaConfig
from student.planning.setup import Setup, block_linears


@dataclass(frozen=True, slots=True)
class Data:
    """The training samples: how many, and the mean tokens of one in a row, clean and masked."""

    samples: int
    clean_tokens: float
    masked_tokens: float
    source: str


def step_flops(config: PipelineConfig, shape: LladaConfig, ranks: int, prepared: PreparedDataset) -> float:
    """Multiplications and additions of a step on one rank, what checkpointing repeats left out."""
    train = config.train.model_copy(update={"activation_checkpointing": False})
    setup = Setup(shape, train, {}, config.student.lora, ranks)
    return setup.accumulation * micro_batch_flops(setup, data_of_prepared(prepared, train))


def data_of(config: PipelineConfig) -> Data | None:
    """The run's training samples: of its prepared data, else of its dataset's manifest; None where there are none."""
    train = config.train
    try:
        return data_of_prepared(PreparedDataset.open(config.prepared_dir), train)
    except DatasetError:
        pass
    try:
        manifest = Dataset.open(config.shards_dir).manifest
    except DatasetError:
        return None
    samples = sum(count for key, count in manifest.counts.items() if key.startswith("train/"))
    if not samples:
        return None
    tokens = manifest.tokens / max(manifest.rows, 1)
    source = f"{config.shards_dir}, {tokens:.0f} response tokens each, of the teacher's; prompts not counted"
    return Data(
        samples, min(tokens, train.max_sequence_tokens), train.block_length * min(train.anchors, tokens), source
    )


def data_of_prepared(prepared: PreparedDataset, train: TrainConfig) -> Data | None:
    """The training samples of prepared targets; None where there are none."""
    chosen = prepared.indices(split="train")
    if not len(chosen):
        return None
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
    tokens = setup.tokens
    sizes = {name: inputs * outputs for name, (inputs, outputs) in block_linears(shape).items()}
    after_attention = sum(sizes[name] for name in ("attn_out", "ff_proj", "up_proj", "ff_out"))
    sample = train.max_sequence_tokens if data is None else data.clean_tokens
    attention = shape.n_layers * 4 * shape.d_model * sample / 2
    supervised = float(setup.supervised)
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
    zero, e, count = setup.zero, setup.element_bytes, setup.parameters
    ring = (setup.ranks - 1) / setup.ranks
    gradients = ring * e * count.trained
    if zero.stage == 0:
        return 0.0, 2 * gradients
    if zero.stage == 1:
        return 0.0, 2 * gradients + gradients  # the updated weights are as many bytes as the gradients
    if zero.stage == 2:
        return setup.accumulation * gradients * (2 if zero.use_multi_rank_bucket_allreduce else 1), gradients
    # Weights for the forward and again for the backward.
    return setup.accumulation * (2 * ring * e * count.total + gradients), 0.0


def checkpoint_bytes(setup: Setup) -> int:
    """Of one step-N: the weights, and float32 weights with AdamW's moments of what is trained; of an average its state,
    and the weights once more."""
    averaged = setup.train.ema is not None
    whole = setup.element_bytes * setup.parameters.total
    return whole * (1 + averaged) + (12 + 4 * averaged) * setup.parameters.trained
