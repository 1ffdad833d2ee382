"""The `speculate` section."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from shared.config.section import Section


class SpeculateConfig(Section):
    """Real speculative decoding of the held-out prompts, and the same without a draft."""

    draft_tokens: PositiveInt = Field(4, description="Teacher tokens drafted per target forward.")
    max_response_tokens: PositiveInt = Field(64, description="Longest answer.")
    max_prompts: PositiveInt | None = Field(None, description="Held-out prompts that are decoded; null takes all.")
    max_num_seqs: PositiveInt = Field(8, description="Requests in flight, in both runs.")
    max_context_tokens: PositiveInt | None = Field(
        None, description="Longest context that is drafted for, in student tokens; null is the student's limit."
    )
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        None, description="Teacher's dtype; null takes teacher.dtype."
    )
