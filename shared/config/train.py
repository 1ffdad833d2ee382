"""The `train` section."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from shared.config.section import Section

LossName = Literal["auto", "ce", "kl", "hybrid"]


class TrainConfig(Section):
    """The student's training. Rates are per step; a step is `global_batch` sequences over all ranks."""

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
    global_batch: PositiveInt = Field(32, description="Sequences per step, over all ranks.")
    micro_batch: PositiveInt = Field(8, description="Sequences per forward on one rank.")
    max_sequence_tokens: PositiveInt = Field(
        4096, description="Blocks that would end beyond so many student tokens are left out."
    )
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw",
        description="muon: for the matrices inside the blocks, at AdamW's size of update; AdamW for the others.",
    )
    learning_rate: PositiveFloat = Field(2e-5, description="The peak, after the warm-up.")
    schedule: Literal["cosine", "constant", "linear"] = Field(
        "cosine", description="Of the rate after the warm-up; linear falls to 0."
    )
    min_learning_rate: float = Field(0.1, ge=0, le=1, description="Share of the rate that the cosine ends on.")
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps that warm up.")
    weight_decay: NonNegativeFloat = Field(0.0, description="Of the optimizer, decoupled from the gradient.")
    grad_clip: PositiveFloat = Field(
        1.0, description="Largest norm of a step's gradient; unused by muon, whose updates have a size of their own."
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Decay of the moving average of the weights, over about 1 / (1 - ema) steps. Where it is set, the "
        "average is what is exported and evaluated.",
    )
    max_skipped_steps: NonNegativeInt = Field(
        10, description="Steps with NaN or Inf that are skipped; one more ends the run."
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto",
        description="Of the weights in forward and backward; the optimizer keeps float32. auto is bfloat16, but "
        "float32 on a CPU without AVX-512, where products in bfloat16 take 48 times as long.",
    )
    world_size: PositiveInt | None = Field(
        None, description="Ranks that `make train` launches; null uses the GPUs present."
    )
    deepspeed: Path | dict[str, Any] = Field(
        Path("configs/deepspeed/zero2.json"), description="DeepSpeed's own configuration, its file or here in place."
    )
    activation_checkpointing: bool = Field(
        False, description="Compute activations again in the backward: less memory, a third more time."
    )
    checkpoint_steps: PositiveInt | None = Field(
        None, description="Save every so many steps; null saves at the end only."
    )
    keep_checkpoints: PositiveInt = Field(2, description="Newest checkpoints that are kept.")

    @model_validator(mode="after")
    def _has_an_end(self) -> TrainConfig:
        if self.steps is None and self.epochs is None:
            raise ValueError("set train.steps or train.epochs, otherwise training has no end")
        return self
