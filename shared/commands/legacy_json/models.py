"""What entries of the legacy JSON may say.

Rows of logits stay lists here, since there may be millions of numbers in one: `shared.commands.legacy_json.layout`
checks them as arrays.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from shared.dataset.records import FinishReason
from shared.json_models import Name, Strict, Text, Turn, Turns

ENTRY_EXAMPLE = "a JSON list of entries, or one a line, as in configs/examples/legacy.json"

Number = Annotated[Name, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
"""A name that may be written as a whole number."""


class SamplingSettings(Strict):
    """How a response was decoded; ranges are those of `shared.dataset.schema`'s columns."""

    temperature: float = Field(ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, lt=1 << 31)
    max_tokens: int = Field(0, ge=0, lt=1 << 31)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)


class Entry(Strict):
    """One entry of the legacy JSON; `layout` says what the keys mean. Foreign keys are left out."""

    model_config = ConfigDict(extra="ignore")

    id: Number | None = None
    prompt_id: Number | None = None
    split: Literal["train", "held_out"] | None = None
    skill: Text = ""
    prompt: Annotated[
        Turns, BeforeValidator(lambda value: [Turn(role="user", content=value)] if isinstance(value, str) else value)
    ] | None = None  # fmt: skip
    messages: Turns | None = None
    rendered: bool | None = None
    prompt_text: Text | None = None
    prompt_ids: list[Any] | None = None
    response: Text | None = None
    response_ids: list[Any] | None = None
    finish_reason: FinishReason = "unknown"
    sampling: SamplingSettings | None = None
    logits: list[Any] | None = None
    tokenID: list[Any] | None = None
    token: list[Any] | None = None
    tail: list[float | None] | None = None
    sampled: list[float | None] | None = None
