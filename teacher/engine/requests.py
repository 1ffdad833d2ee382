"""What a collector asks of an engine and what comes back, whichever engine it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

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


class TeacherEngine(Protocol):
    """A teacher that answers requests: in this process, or behind servers."""

    @property
    def capture(self) -> str:
        """How rows come to this process, for the log."""

    @property
    def head_dtype(self) -> str:
        """The dtype that logits are computed in."""

    def stream(self, requests: Iterable[Request], capture: bool = True) -> Iterator[Answer]:
        """Answers in the order in which they are complete, taking requests as there is room."""

    def close(self) -> None:
        """Free what the engine holds; it answers nothing more."""
