"""The teacher in vLLM, in this process: the only file of this package that imports it.

Requests stream through one engine: as many as keep it full are in flight, the next ones enter as others finish, and
answers come back in the order in which they finish. So a unit's end costs no throughput.

Logprobs are captured as numpy rows (`teacher.engine.numpy_rows`) where a short answer and a short score, captured so
and by vLLM's own `FlatLogprobs`, come out equal at start; through `FlatLogprobs` elsewhere.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from shared.config import TeacherConfig
from shared.dataset.records import FinishReason, Sampling
from shared.errors import AlignmentError, CheckpointError, ConfigError
from shared.vllm_settings import (
    check_devices,
    check_engine_args,
    engine_arguments,
    engine_version,
    environment,
    is_cpu_build,
)
from teacher.capture import Columns, reshape_flat
from teacher.checkpoints import hub_commit
from teacher.engine import numpy_rows
from teacher.engine.memory import check_memory
from teacher.engine.requests import Answer, Request

log = logging.getLogger(__name__)


class Engine:
    """A loaded teacher.

    Args:
        model: checkpoint directory; of a hub name, its snapshot, whose weights vLLM fetches.
        top_k: candidates per token, K.
        score_tokens: set for scoring: tokens per forward. Each needs a float32 row of the vocabulary, several times
            over: 1,024 tokens of a vocabulary of 128k take about 2 GB.

    Raises:
        MissingExtraError: if vLLM is not installed.
        CheckpointError: if vLLM refuses the checkpoint or the settings.
        ConfigError: if there are fewer GPUs or less memory than the settings ask for, or vLLM has no such argument.
    """

    def __init__(
        self,
        teacher: TeacherConfig,
        model: str,
        top_k: int,
        score_tokens: int | None = None,
    ) -> None:
        engine_version()
        if teacher.data_parallel > 1:
            raise ConfigError(
                f"teacher.data_parallel is {teacher.data_parallel}, but the engine in this process is one copy of the "
                "model; set it to 1 and start as many collectors, or collect through `teacher serve` (teacher.service)"
            )
        prepare_environment(teacher)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            from vllm import EngineArgs, SamplingParams
            from vllm.sampling_params import RequestOutputKind
            from vllm.v1.engine.llm_engine import LLMEngine
        check_engine_args(teacher, {field.name for field in dataclasses.fields(EngineArgs)})
        if not is_cpu_build():
            import torch
            from vllm.platforms import current_platform

            check_devices(teacher, torch.cuda.device_count())
            # Asked of the driver: torch would open a CUDA context here, half a GB of GPU 0 for the whole collection.
            check_memory(teacher, Path(model), current_platform.get_device_total_memory(0))
        self._sampling_params = SamplingParams
        self._final_only = RequestOutputKind.FINAL_ONLY
        self._top_k = top_k
        # Scoring computes the vocabulary's logprobs of every prompt token: few requests at a time bound the memory.
        self._in_flight = 8 if score_tokens is not None else 2 * teacher.max_num_seqs
        arguments = capturing_arguments(teacher, model) | {
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        if score_tokens is not None:
            arguments |= {"max_num_batched_tokens": score_tokens, "max_num_seqs": min(8, score_tokens)}
            arguments |= {"enable_chunked_prefill": True}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
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
        try:
            while True:
                for request in islice(waiting, self._in_flight - len(pending)):
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
        completion = output.outputs[0]
        if completion.finish_reason in ("abort", "error"):
            reason = f"vLLM ended it with finish_reason {completion.finish_reason!r}"
            return Answer(request.key, np.zeros(0, np.int32), "unknown", None, error=reason)
        if request.response_ids is not None:
            length = len(request.prompt_ids) + len(request.response_ids)
            columns = _as_columns(output.prompt_logprobs, length - 1)
            return Answer(request.key, request.response_ids, "unknown", columns)
        ids = np.asarray(completion.token_ids, dtype=np.int32)
        ended: FinishReason = completion.finish_reason if completion.finish_reason in ("stop", "length") else "unknown"
        return Answer(request.key, ids, ended, _as_columns(completion.logprobs, len(ids)) if capture else None)

    def _use_numpy_rows(self) -> None:
        """Capture a short answer and a short score both ways; keep the numpy rows if they are the same."""
        probe = np.arange(3, 3 + 4, dtype=np.int32)
        requests = [
            Request("probe-answer", probe, Sampling(0, 1, 0, 4, None), ignore_end=True),
            Request("probe-score", probe, Sampling(0, 1, 0, 1, None), response_ids=probe),
        ]
        try:
            processor, self._restore = numpy_rows.install()
        except (ImportError, AttributeError, TypeError) as error:
            log.warning("vLLM's logprobs processor is not as expected (%s): using FlatLogprobs, which is slower", error)
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
            log.warning("numpy rows differ from those of FlatLogprobs: using FlatLogprobs, which is slower")
            self.use_flat_logprobs()
        list(self.stream(requests))  # what the first use compiles is not part of the first unit


def capturing_arguments(teacher: TeacherConfig, directory: str) -> dict[str, Any]:
    """Arguments of vLLM, in this process or as a server, that make it this teacher and let its rows be captured.

    A hub name stays one, at its commit, which the machine of every rank can fetch itself.
    """
    commit = hub_commit(teacher)
    return engine_arguments(teacher) | {
        "model": directory if commit is None else teacher.model,
        "revision": commit,
        "tokenizer_revision": commit,
        "max_logprobs": -1,
        "logprobs_mode": "raw_logprobs",
    }


def _as_columns(container: Any, rows: int) -> Columns:
    """Columns from whichever container vLLM's processor filled."""
    if isinstance(container, numpy_rows.ColumnBuffer):
        columns = container.columns()
        if len(columns) != rows:
            raise AlignmentError(f"vLLM returned {len(columns)} rows of logprobs for {rows} tokens")
        return columns
    return reshape_flat(container.token_ids, container.logprobs, rows)


def prepare_environment(teacher: TeacherConfig) -> None:
    """Set what vLLM and OpenMP read from the environment; call it before torch is imported. What is set stays."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.update(environment(teacher))
    logging.getLogger("vllm").setLevel(logging.ERROR)
