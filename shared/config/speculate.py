"""The `speculate` section."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from shared.config.section import Section

Way = Literal["float32", "bfloat16", "float16_weights"]
Order = Literal["confidence", "left_to_right"]
Chances = Annotated[list[float | None], Field(min_length=13, max_length=13)]
"""By bin of `student/drafting/confidence.py`."""


class DrafterConfig(Section):
    """How the student drafts: in vLLM, and along the held-out text in `student evaluate`."""

    block_length: PositiveInt | None = Field(
        None, description="Student tokens filled per draft; null is what the student was trained on."
    )
    draft_vocabulary: PositiveInt | None = Field(
        None,
        description="Draft only so many student tokens, the most frequent of the training responses, and the ends of "
        "turn and text; null is all.",
    )
    denoising_steps: PositiveInt = Field(1, description="Forwards in which a block is filled.")
    denoising_order: Order = Field(
        "confidence",
        description="What is fixed first between them: the tokens that the model is surest of, as LLaDA does, or those "
        "on the left, which decide about the ones behind them.",
    )
    keep_extendable: bool = Field(False, description="Also propose a last token that further bytes could still merge.")
    dtype: Way | None = Field(
        None, description="Of the student's products in vLLM; null measures which is fastest on the device."
    )
    memory_gib: PositiveFloat | None = Field(
        None,
        description="Of the contexts' keys and values, allocated when vLLM loads its model; a request that finds no "
        "room is not drafted for. Null is room for 16 contexts of the longest length, or a tenth of what is free.",
    )
    acceptance_by_confidence: Chances | None = Field(
        None,
        description="Chances that the policy starts from, by the student's confidence; null takes those that `student "
        "evaluate` has measured, or the confidence itself.",
    )
    teacher_tokenizer: str | None = Field(
        None,
        description="Directory of the teacher's tokenizer; null is the dataset's, or the one that vLLM serves with.",
    )
    teacher_roles: dict[str, int] | None = Field(
        None, description="Role → id of its special tokens, where its settings and chat template do not say."
    )


class SpeculateConfig(Section):
    """Real speculative decoding of the held-out prompts, many in flight and one, and the same without a draft."""

    draft_tokens: PositiveInt = Field(4, description="Teacher tokens drafted per target forward.")
    max_response_tokens: PositiveInt = Field(64, description="Longest answer.")
    max_prompts: PositiveInt | None = Field(None, description="Held-out prompts that are decoded; null takes all.")
    max_num_seqs: PositiveInt = Field(8, description="Requests in flight where there are many.")
    latency_prompts: PositiveInt = Field(16, description="Of the prompts, so many are also decoded one at a time.")
    compare: list[Literal["ngram", "suffix"]] = Field(
        ["ngram", "suffix"],
        description="vLLM's own drafts to measure beside; each loads the teacher once more. suffix is left out where "
        "its package, arctic-inference, is not installed.",
    )
    policy: bool = Field(True, description="Draft only where it is expected to pay; false drafts in every step.")
    lookup: bool = Field(True, description="Also propose what followed the same tokens before in the context.")
    max_context_tokens: PositiveInt | None = Field(
        None, description="Longest context that is drafted for, in student tokens; null is the student's limit."
    )
    drafter: DrafterConfig = DrafterConfig()
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        None, description="Teacher's dtype; null takes teacher.dtype."
    )
