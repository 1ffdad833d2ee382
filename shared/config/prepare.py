"""The `prepare` section."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from shared.config.section import Section


class PrepareConfig(Section):
    """How stored rows become targets over the student's vocabulary (`student/alignment/README.md`)."""

    min_known_mass: float = Field(
        0.5, ge=0, le=1, description="Below this known conditional mass a position has no soft target."
    )
    changed_text: Literal["drop", "encode"] = Field(
        "encode",
        description="Text that the student's normalizer would change: drop the response, or encode its exact bytes.",
    )
    workers: PositiveInt | None = Field(None, description="Parallel processes; null uses the machine's cores.")
