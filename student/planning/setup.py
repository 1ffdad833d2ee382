"""What the arithmetic of a training starts from: the student's shape, and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from shared.config import LoraConfig, PipelineConfig, TrainConfig
from student.data.batch_sampler import accumulation_steps
from student.model.configuration_llada import LladaConfig
from student.training.engine import deepspeed_config

Dtype = Literal["bfloat16", "float32"]
Device = Literal["cuda", "cpu"]

ELEMENT_BYTES: dict[Dtype, int] = {"bfloat16": 2, "float32": 4}
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
    def of(cls, shape: LladaConfig, lora: LoraConfig | None, sequential_rank: int | None) -> Parameters:
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


@dataclass(frozen=True)
class Setup:
    """What the arithmetic takes: a shape, and how it is trained; `settings` are DeepSpeed's."""

    shape: LladaConfig
    train: TrainConfig
    settings: dict[str, Any]
    lora: LoraConfig | None
    ranks: int
    device: Device = "cuda"

    @classmethod
    def of(cls, config: PipelineConfig, shape: LladaConfig, dtype: Dtype, ranks: int, device: Device = "cuda") -> Setup:
        """Of a run with `config` in `dtype`.

        Raises:
            ConfigError: if the DeepSpeed settings are missing or wrong.
        """
        train = config.train.model_copy(update={"dtype": dtype})
        plain = cls(shape, train, {}, config.student.lora, ranks, device)
        return replace(plain, settings=deepspeed_config(train, plain.accumulation))

    @property
    def dtype(self) -> Dtype:
        return "float32" if self.train.dtype == "float32" else "bfloat16"

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.dtype]

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step on a rank."""
        return accumulation_steps(self.train.global_batch, self.train.micro_batch, self.ranks)

    @property
    def tokens(self) -> int:
        """Of a forward on a rank."""
        return self.train.micro_batch * self.train.packed_row_tokens

    @property
    def supervised(self) -> int:
        """Supervised tokens of a forward, if samples are as long as they may be: shorter ones have more blocks to a
        row, and more targets.

        At most A G of every `max_sequence_tokens` + A G tokens of a row are masked (A anchors, blocks of G).
        """
        blocks = self.train.anchors * self.train.block_length
        return self.tokens * blocks // (self.train.max_sequence_tokens + blocks)

    @cached_property
    def parameters(self) -> Parameters:
        return Parameters.of(self.shape, self.lora, self.train.sequential_rank)

    @cached_property
    def zero(self) -> Any:
        """DeepSpeed's own `DeepSpeedZeroConfig`, with its defaults; sizes in elements."""
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        return DeepSpeedZeroConfig(**self.settings.get("zero_optimization", {}))

    @property
    def optimizer_on(self) -> str:
        """Where the optimizer's state is offloaded to: none, cpu or nvme."""
        return self.zero.offload_optimizer.device if self.zero.offload_optimizer else "none"

    @property
    def parameters_on(self) -> str:
        """The same of the weights."""
        return self.zero.offload_param.device if self.zero.offload_param else "none"

    @property
    def reduce_bucket(self) -> int:
        """Elements that are reduced at a time."""
        size = self.zero.reduce_bucket_size if self.zero.stage else PLAIN_BUCKET
        # What nothing is ever written to takes no memory of a host.
        return min(size, self.parameters.trained) if self.device == "cpu" else size

    @property
    def accumulate_bytes(self) -> int:
        """Of an element of the gradients' sums."""
        return 4 if self.settings.get("data_types", {}).get("grad_accum_dtype") == "fp32" else self.element_bytes

    @property
    def share(self) -> int:
        """Trained parameters whose optimizer's state is on one rank."""
        return -(-self.parameters.trained // (self.ranks if self.zero.stage else 1))

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
