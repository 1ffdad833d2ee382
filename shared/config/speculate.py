"""The `speculate` section."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt

from shared.config.section import Section


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
    drafter: dict[str, Any] = Field(
        default_factory=dict,
        description="Further options of the drafter, by the names of student.drafting.vllm_proposer.DrafterOptions, "
        "such as {memory_gib: 2, draft_vocabulary: 16384, denoising_steps: 2}.",
    )
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        None, description="Teacher's dtype; null takes teacher.dtype."
    )
