"""The `evaluate` section."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from shared.config.section import Section


class EvaluateConfig(Section):
    """Acceptance on held-out text, from the shards alone."""

    rule: Literal["greedy", "sample"] = Field("greedy", description="Decoding rule that the headline tau is for.")
    draft_tokens: PositiveInt = Field(4, description="Teacher tokens drafted per target forward.")
    max_samples: PositiveInt | None = Field(None, description="Held-out responses per decoding rule; null takes all.")
    batch: PositiveInt = Field(16, description="Responses per forward.")
