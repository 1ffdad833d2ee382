"""The `train` section."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from shared.config.section import Section

LossName = Literal["auto", "ce", "kl", "hybrid"]


class TrainConfig(Section):
    """The student's training. Rates are per step; a step is `global_batch` packed rows over all ranks."""

    loss: LossName = Field(
        "auto", description="ce, kl, hybrid (alpha CE + beta KL), or auto: kl where there are distributions, else ce."
    )
    alpha: NonNegativeFloat = Field(0.5, description="Weight of cross-entropy in `hybrid`.")
    beta: NonNegativeFloat = Field(0.5, description="Weight of KL in `hybrid`.")
    temperature: PositiveFloat = Field(
        1.0, description="Of both distributions in KL; the loss is scaled by its square."
    )
    max_unknown_share: float = Field(
        0.1, ge=0, le=1, description="Refuse a temperature at which more than this share of the mass is unknown."
    )
    tv_weight: NonNegativeFloat = Field(0.0, description="Weight of total variation at depth 1.")
    path_weight: NonNegativeFloat = Field(0.0, description="Weight of the path term -log J.")
    depth_decay: float = Field(1.0, gt=0, le=1, description="Weight of depth d is depth_decay^(d-1).")
    block_length: PositiveInt = Field(8, description="Masked tokens per block: the longest draft, in student tokens.")
    anchors: PositiveInt = Field(8, description="Masked blocks per sequence and forward.")
    steps: PositiveInt | None = Field(None, description="Optimizer steps; set this or epochs.")
    epochs: PositiveFloat | None = Field(None, description="Passes over the training samples; set this or steps.")
    global_batch: PositiveInt = Field(32, description="Rows per step, over all ranks.")
    micro_batch: PositiveInt = Field(8, description="Rows per forward on one rank.")
    row_tokens: PositiveInt | None = Field(
        None,
        description="Tokens of a row: as many samples as fit, each a clean copy and its masked blocks; null is "
        "max_sequence_tokens + anchors * block_length, rounded up to a multiple of 128.",
    )
    max_sequence_tokens: PositiveInt = Field(
        4096, description="Blocks that would end beyond so many student tokens are left out."
    )
    learning_rate: PositiveFloat = Field(2e-5, description="The peak, after the warm-up; a cosine follows.")
    min_learning_rate: float = Field(0.1, ge=0, le=1, description="Share of the rate that the cosine ends on.")
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps that warm up.")
    weight_decay: NonNegativeFloat = Field(0.0, description="Of AdamW.")
    grad_clip: PositiveFloat = Field(1.0, description="Largest norm of a step's gradient.")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto",
        description="Of the weights in forward and backward; the optimizer keeps float32. auto is bfloat16, but "
        "float32 on a CPU without AVX-512, where products in bfloat16 take 48 times as long.",
    )
    world_size: PositiveInt | None = Field(
        None, description="Ranks that `make train` launches; null uses the GPUs present."
    )
    deepspeed: Path = Field(Path("configs/deepspeed/zero2.json"), description="DeepSpeed's own configuration.")
    activation_checkpointing: bool = Field(
        False, description="Compute activations again in the backward: less memory, a third more time."
    )
    checkpoint_steps: PositiveInt | None = Field(
        None, description="Save every so many steps; null saves at the end only."
    )
    keep_checkpoints: PositiveInt = Field(2, description="Newest checkpoints that are kept.")

    @property
    def packed_row_tokens(self) -> int:
        """Tokens of a row."""
        return self.row_tokens or -(-self._longest_sample // 128) * 128

    @property
    def _longest_sample(self) -> int:
        return self.max_sequence_tokens + self.anchors * self.block_length

    @model_validator(mode="after")
    def _has_an_end(self) -> TrainConfig:
        if self.steps is None and self.epochs is None:
            raise ValueError("set train.steps or train.epochs, otherwise training has no end")
        return self
