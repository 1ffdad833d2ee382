"""What a collector asks of an engine and what comes back, whichever engine it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.dataset.records import FinishReason, Sampling
from teacher.capture import Columns


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to answer, or, where `response_ids` is given, one response to score.

    Attributes:
        key: unique among the requests in flight.
        prompt_ids: int32 [P]. response_ids: int32 [T].
        ignore_end: decode to `sampling.max_tokens` whatever the model says; for measuring.
    """

    key: str
    prompt_ids: NDArray[np.int32]
    sampling: Sampling
    response_ids: NDArray[np.int32] | None = None
    ignore_end: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back.

    Attributes:
        response_ids: int32 [T]; the given ones where a response was scored.
        columns: T rows where a prompt was answered, P + T - 1 where a response was scored; None if not captured.
        error: why there is no answer, where there is none.
    """

    key: str
    response_ids: NDArray[np.int32]
    finish_reason: FinishReason
    columns: Columns | None
    error: str | None = None
