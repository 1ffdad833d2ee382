"""vLLM's logprobs as the numpy rows that they arrive as, in place of a Python object for every number.

`install` puts a subclass of vLLM's `LogprobsProcessor`, a private class, in that class's place. It runs where requests
are assembled, in the front end, so it also works where the engine itself is another process. Whether vLLM's class is
the one that this file expects is not taken on trust: while `checking` is on, rows are captured both ways and compared
(`teacher.engine` does that at every start with two short requests). One core at K = 64: `FlatLogprobs` costs 30 µs a
token, these rows 5.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher.capture import Columns, reshape_flat

_INITIAL_ROWS = 32


class ColumnBuffer:
    """Rows of K + 1 columns that grow by doubling; the rows are copied, so vLLM's messages can be freed."""

    def __init__(self, width: int) -> None:
        self._ids = np.empty((_INITIAL_ROWS, width), dtype=np.int32)
        self._logprobs = np.empty((_INITIAL_ROWS, width), dtype=np.float32)
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    def append(self, ids: NDArray[Any], logprobs: NDArray[Any]) -> None:
        """Add rows; a batch in which others asked for more candidates has more columns, which are left out."""
        width, end = self._ids.shape[1], self._rows + len(ids)
        while end > len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
            self._logprobs = np.concatenate([self._logprobs, np.empty_like(self._logprobs)])
        self._ids[self._rows : end] = ids[:, :width]
        self._logprobs[self._rows : end] = logprobs[:, :width]
        self._rows = end

    def columns(self) -> Columns:
        """What was appended, without the spare room."""
        return Columns(self._ids[: self._rows].copy(), self._logprobs[: self._rows].copy())


def install() -> tuple[Any, Callable[[], None]]:
    """Put the processor that keeps numpy rows in the place of vLLM's.

    Returns: its class, with `checking` (compare from now on) and `compared` (request key → equal), and what undoes it.

    Raises:
        ImportError, AttributeError, TypeError: if this vLLM has no such class.
    """
    output_processor: Any = importlib.import_module("vllm.v1.engine.output_processor")
    original: Any = importlib.import_module("vllm.v1.engine.logprobs").LogprobsProcessor

    class NumpyRows(original):
        """Keeps rows as they arrive, for requests with `flat_logprobs`; others see vLLM's own behavior."""

        checking = False
        compared: dict[str, bool] = {}  # noqa: RUF012

        @classmethod
        def from_new_request(cls, tokenizer: Any, request: Any) -> Any:
            processor = super().from_new_request(tokenizer, request)
            if request.sampling_params.flat_logprobs:
                processor._key = request.external_req_id
                processor._flat = {"logprobs": processor.logprobs, "prompt_logprobs": processor.prompt_logprobs}
                if processor.logprobs is not None:
                    processor.logprobs = ColumnBuffer(processor.num_logprobs + 1)
                if processor.prompt_logprobs is not None:
                    processor.prompt_logprobs = ColumnBuffer(processor.num_prompt_logprobs + 1)
            return processor

        def _update_sample_logprobs(self, logprobs_lists: Any) -> None:
            self._take("logprobs", logprobs_lists, super()._update_sample_logprobs)

        def _update_prompt_logprobs(self, prompt_logprobs_tensors: Any) -> None:
            self._take("prompt_logprobs", prompt_logprobs_tensors, super()._update_prompt_logprobs)

        def _take(self, name: str, arrays: Any, update: Callable[[Any], None]) -> None:
            """Append rows to the buffer `name`; `update` does it vLLM's own way, to what has that name then."""
            buffer = getattr(self, name)
            if not isinstance(buffer, ColumnBuffer):
                update(arrays)
                return
            buffer.append(np.asarray(arrays[0]), np.asarray(arrays[1]))
            if NumpyRows.checking:
                setattr(self, name, self._flat[name])
                update(arrays)
                setattr(self, name, buffer)
                self._compare(buffer, self._flat[name])

        def _compare(self, buffer: ColumnBuffer, flat: Any) -> None:
            ours, theirs = buffer.columns(), reshape_flat(flat.token_ids, flat.logprobs, len(buffer))
            NumpyRows.compared[self._key] = np.array_equal(ours.ids, theirs.ids) and np.array_equal(
                ours.logprobs, theirs.logprobs
            )

    def restore() -> None:
        output_processor.LogprobsProcessor = original

    if output_processor.LogprobsProcessor is not original:
        raise AttributeError("vLLM's output processor uses another class")
    output_processor.LogprobsProcessor = NumpyRows
    return NumpyRows, restore
