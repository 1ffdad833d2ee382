"""The `train` section."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from shared.config.section import Section

LossName = Literal["auto", "ce", "kl", "hybrid"]


class ObjectivesConfig(Section):
    """What is masked: every visit of a sample draws one of these, with a probability in proportion to its weight."""

    blocks: NonNegativeFloat = Field(1.0, description="Masked blocks after a clean prefix: how a draft is made.")
    random_masking: NonNegativeFloat = Field(0.0, description="A random part of the answer: LLaDA's own objective.")

    @model_validator(mode="after")
    def _has_one(self) -> ObjectivesConfig:
        if self.blocks == self.random_masking == 0:
            raise ValueError("train.objectives: every weight is 0, expected one above 0: nothing would be trained")
        return self


class RandomMaskingConfig(Section):
    """Of `objectives.random_masking`."""

    end_tokens: NonNegativeInt = Field(8, description="End-of-text tokens after each answer, trained like the others.")
    antithetic: bool = Field(False, description="Mask ratio t in even epochs, 1 - t in the odd ones after them.")
    complementary: bool = Field(False, description="Lay each sample out twice, the second time with the rest masked.")

    @property
    def copies(self) -> int:
        """How often a sample is laid out."""
        return 2 if self.complementary else 1


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
    objectives: ObjectivesConfig = Field(ObjectivesConfig(), description="What is masked.")
    random_masking: RandomMaskingConfig = Field(RandomMaskingConfig(), description="Of that objective.")
    depth_decay: float = Field(1.0, gt=0, le=1, description="Weight of depth d is depth_decay^(d-1).")
    block_length: PositiveInt = Field(8, description="Masked tokens per block: the longest draft, in student tokens.")
    sequential_rank: PositiveInt | None = Field(
        None,
        description="Rank of a head that corrects each token of a block by the one drafted before it, trained with the "
        "rest and stored beside the weights; null has none.",
    )
    anchors: PositiveInt = Field(8, description="Masked blocks per sequence and forward.")
    steps: PositiveInt | None = Field(None, description="Optimizer steps; set this or epochs.")
    epochs: PositiveFloat | None = Field(None, description="Passes over the training samples; set this or steps.")
    global_batch: PositiveInt = Field(32, description="Rows per step, over all ranks.")
    micro_batch: PositiveInt = Field(8, description="Rows per forward on one rank.")
    row_tokens: PositiveInt | None = Field(
        None,
        description="Tokens of a row: as many samples as fit, each a clean copy and its masked blocks; null is "
        "what the longest sample takes, max_sequence_tokens + anchors * block_length, rounded up to a multiple of 128.",
    )
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
    compile: bool = Field(
        True,
        description="On GPUs under ZeRO 0 to 2, compile the model's blocks: the first step takes a minute longer, the "
        "others a quarter less. Without effect elsewhere.",
    )
    checkpoint_steps: PositiveInt | None = Field(
        None,
        description="Save every so many steps and at the end, so that a run can go on, or be made longer; null never.",
    )
    data_workers: NonNegativeInt = Field(
        1, description="Processes on each rank that make its batches ahead; 0 makes each when it is needed."
    )
    keep_checkpoints: PositiveInt = Field(2, description="Newest checkpoints that are kept, the best beside them.")
    evaluate_checkpoints: bool = Field(
        False, description="Measure the student on held-out text at every checkpoint; not under ZeRO-3."
    )
    patience: PositiveInt | None = Field(
        None, description="End after so many measured checkpoints without a better one; null trains to the end."
    )
    publish: Literal["last", "best"] = Field(
        "last", description="Which weights become the model: the last, or the best that was measured."
    )
    trackers: list[str] = Field(
        default_factory=lambda: ["tensorboard"],
        description="Of accelerate's trackers, such as tensorboard (into RUN/tracking), wandb, mlflow.",
    )
    gradient_statistics_steps: PositiveInt | None = Field(
        50, description="Look at every gradient's largest value and zeros each so many steps; null never."
    )
    hang_minutes: PositiveFloat = Field(8, description="A step that takes longer ends the job with every rank's stack.")
    grace_seconds: PositiveInt = Field(
        120, description="How long ranks may save after a signal, or after one of them failed, before they are killed."
    )

    @property
    def packed_row_tokens(self) -> int:
        """Tokens of a row."""
        return self.row_tokens or -(-self._longest_sample // 128) * 128

    @property
    def _longest_sample(self) -> int:
        blocks = self.max_sequence_tokens + self.anchors * self.block_length
        masked = self.random_masking.copies * self.max_sequence_tokens
        return max(blocks if self.objectives.blocks else 0, masked if self.objectives.random_masking else 0)

    @model_validator(mode="after")
    def _holds_the_longest_sample(self) -> TrainConfig:
        if self.packed_row_tokens < self._longest_sample:
            raise ValueError(
                f"train.row_tokens is {self.row_tokens}, but a sample takes up to {self._longest_sample} "
                f"(max_sequence_tokens {self.max_sequence_tokens}, {self.anchors} anchors of block_length "
                f"{self.block_length}, complementary masks); raise it, or lower max_sequence_tokens"
            )
        return self

    @model_validator(mode="after")
    def _trains_something(self) -> TrainConfig:
        if self.loss == "hybrid" and self.alpha == self.beta == self.tv_weight == self.path_weight == 0:
            raise ValueError(
                "train.loss is 'hybrid' with train.alpha, beta, tv_weight and path_weight all 0, expected one above 0: "
                "nothing would be trained"
            )
        return self

    @model_validator(mode="after")
    def _measures_what_it_chooses_by(self) -> TrainConfig:
        chooses = [name for name, set_ in (("patience", self.patience), ("publish", self.publish == "best")) if set_]
        if chooses and not (self.evaluate_checkpoints and self.checkpoint_steps):
            raise ValueError(
                f"train.{chooses[0]} chooses among measured checkpoints, and there are none: set "
                "train.checkpoint_steps and train.evaluate_checkpoints"
            )
        return self

    @model_validator(mode="after")
    def _has_an_end(self) -> TrainConfig:
        if self.steps is None and self.epochs is None:
            raise ValueError("set train.steps or train.epochs, otherwise training has no end")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"train.steps is {self.steps} and train.epochs is {self.epochs}, expected one of them: set "
                "train.steps=null to train so many epochs, or train.epochs=null to train so many steps"
            )
        return self
