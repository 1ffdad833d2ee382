"""The `student` section."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, PositiveInt

from shared.config.section import Section

BlockLayer = Literal["q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"]


class StudentTokenizerConfig(Section):
    """The student's vocabulary: its own, trained on the dataset's training text, or an existing one."""

    kind: Literal["trained", "checkpoint", "teacher"] = Field(
        "checkpoint", description="Trained on the dataset's training text, the student checkpoint's, or the teacher's."
    )
    vocab_size: PositiveInt = Field(8192, description="Of a trained tokenizer: its tokens, specials included.")
    individual_digits: bool = Field(False, description="Of a trained tokenizer: every digit is its own token.")
    mask_token: str | None = Field(
        None, description="An unused special token to serve as mask; null appends one where there is none."
    )


class LoraConfig(Section):
    """Low-rank adapters: only they are trained, and they are merged when the student is saved."""

    rank: PositiveInt = Field(16, description="Of each adapter.")
    alpha: PositiveInt = Field(32, description="The adapters are scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Of the adapters' inputs.")
    targets: list[BlockLayer] = Field(
        default_factory=lambda: list(get_args(BlockLayer)),
        min_length=1,
        description="Layers of LLaDA's block, by their own names.",
    )


class StudentConfig(Section):
    """How the student starts. `checkpoint` may be a LLaDA or any LLaMA-architecture checkpoint, or null for random."""

    checkpoint: str | None = Field(
        description="LLaDA or LLaMA-architecture checkpoint to start from; null starts random.",
        examples=["GSAI-ML/LLaDA-8B-Instruct"],
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub name; null is its default branch.")
    layers: list[int] | None = Field(None, description="Layers of the checkpoint to keep, in order; null keeps all.")
    shape: dict[str, Any] | Path = Field(
        default_factory=dict, description="LladaConfig fields for a random start, or a YAML file of them."
    )
    weight_tying: bool | None = Field(
        None, description="false gives a checkpoint that ties its embeddings a head of its own; null keeps what it has."
    )
    tokenizer: StudentTokenizerConfig = Field(StudentTokenizerConfig(), description="The student's vocabulary.")
    lora: LoraConfig | None = Field(None, description="Train adapters only; null trains every weight.")
    max_sequence_tokens: PositiveInt = Field(4096, description="Longest sequence of the student, in its tokens.")
