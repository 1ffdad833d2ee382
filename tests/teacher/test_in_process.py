"""What the engine in process asks of vLLM and makes of its answers, without a model; test_vllm.py has a real one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from shared.config import TeacherConfig
from shared.dataset.records import Sampling
from shared.errors import CheckpointError
from teacher.engine import Request, in_process
from teacher.engine.in_process import Engine


def test_where_the_config_wants_the_engine_reaches_vllm(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm_engine = pytest.importorskip("vllm.v1.engine.llm_engine")
    asked: list[Any] = []

    def refuse(arguments: Any) -> None:
        asked.append(arguments)
        raise ValueError("this test has no engine")

    monkeypatch.setattr(in_process, "prepare_environment", lambda _: None)
    monkeypatch.setattr(llm_engine.LLMEngine, "from_engine_args", refuse)
    settings = {"model": str(tiny_checkpoint), "engine_args": {"distributed-executor-backend": "ray"}}
    with pytest.raises(CheckpointError, match="this test has no engine"):
        Engine(TeacherConfig.model_validate(settings), str(tiny_checkpoint), top_k=4)
    assert asked[0].distributed_executor_backend == "ray"


@pytest.mark.parametrize("scored", [False, True])
def test_a_request_that_vllm_aborts_is_one_failure(scored: bool) -> None:
    ids = np.arange(4, dtype=np.int32)
    request = Request("r", ids, Sampling(0, 1, 0, 4, None), response_ids=ids if scored else None)
    output = SimpleNamespace(prompt_logprobs=None, outputs=[SimpleNamespace(finish_reason="abort", token_ids=[])])
    answer = Engine.__new__(Engine)._answer(request, output, capture=True)
    assert answer.error == "vLLM ended it with finish_reason 'abort'"
