"""vLLM's arguments from the teacher section, and the mistakes that can be made there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from shared import vllm_settings
from shared.config import TeacherConfig
from shared.errors import ConfigError
from shared.vllm_settings import check_devices, check_engine_args, engine_arguments, server_command


def teacher(**settings: Any) -> TeacherConfig:
    return TeacherConfig(model="someone/model", **settings)


def test_every_setting_reaches_vllm_under_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_settings, "is_cpu_build", lambda: False)
    arguments = engine_arguments(
        teacher(
            quantization="fp8", prefill_tokens=4096, prefix_caching=False, pipeline_parallel=2, tensor_parallel=8,
            engine_args={"distributed-executor-backend": "ray", "hf_overrides": {"rope_theta": 1.0}},
        )
    )  # fmt: skip
    assert arguments["quantization"] == "fp8"
    assert arguments["max_num_batched_tokens"] == 4096
    assert arguments["enable_prefix_caching"] is False
    assert (arguments["tensor_parallel_size"], arguments["pipeline_parallel_size"]) == (8, 2)
    assert arguments["distributed_executor_backend"] == "ray"
    assert arguments["hf_overrides"] == {"head_dtype": "float32", "rope_theta": 1.0}
    assert not {"quantization", "max_num_batched_tokens"} & engine_arguments(teacher()).keys()


def test_on_a_cpu_no_prompt_is_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_settings, "is_cpu_build", lambda: True)
    for prefill_tokens, most in ((64, 1000), (4096, 4096)):
        arguments = engine_arguments(teacher(prefill_tokens=prefill_tokens, max_sequence_tokens=1000))
        assert arguments["enable_chunked_prefill"] is False
        assert arguments["max_num_batched_tokens"] == most


@pytest.mark.parametrize("cpu", [True, False])
def test_the_server_is_this_environments(monkeypatch: pytest.MonkeyPatch, cpu: bool) -> None:
    monkeypatch.setattr(vllm_settings, "is_cpu_build", lambda: cpu)
    monkeypatch.setenv("PATH", "/nowhere")
    program, *rest = server_command({"model": "someone/model", "port": 8000})
    assert Path(program).parent == Path(sys.executable).parent
    assert Path(program).name == (Path(sys.executable).name if cpu else "vllm")
    assert rest[-3:] == ["someone/model", "--port", "8000"]


def test_all_arguments_are_vllms_own() -> None:
    """Of the installed version: a name that it drops would be seen at the first start on a cluster otherwise."""
    arg_utils = pytest.importorskip("vllm.engine.arg_utils")
    names = set(arg_utils.EngineArgs.__dataclass_fields__)
    assert engine_arguments(teacher(quantization="fp8", prefill_tokens=1)).keys() <= names
    check_engine_args(teacher(engine_args={"distributed_executor_backend": "ray", "nnodes": 2}), names)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensor_parallel_size", r"tensor_parallel_size is teacher\.tensor_parallel; set that instead"),
        ("max-model-len", r"max_model_len is teacher\.max_sequence_tokens"),
        ("kv_cache_dtype", r"kv_cache_dtype decides what is captured .* take it out"),
        ("speculative_config", "speculative_config decides what is captured"),
    ],
)
def test_what_is_set_elsewhere_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        teacher(engine_args={name: 1})


def test_an_unknown_argument_is_named_with_the_one_that_was_meant() -> None:
    with pytest.raises(ConfigError, match=r"teacher\.engine_args\.swap_spice is not .*; did you mean 'swap_space'"):
        check_engine_args(teacher(engine_args={"swap_spice": 1}), {"swap_space", "seed"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_parallel": 8}, r"tensor_parallel is 8, but vLLM sees 4 GPU\(s\).* teacher\.pipeline_parallel"),
        ({"tensor_parallel": 4, "pipeline_parallel": 2}, r"4 x teacher.pipeline_parallel 2 needs 8 GPUs, vLLM sees 4"),
        ({"tensor_parallel": 4, "pipeline_parallel": 2, "engine_args": {"distributed_executor_backend": "ray"}}, None),
        ({"tensor_parallel": 4}, None),
    ],
)
def test_more_gpus_than_there_are_is_refused(settings: dict[str, Any], message: str | None) -> None:
    if message is None:
        check_devices(teacher(**settings), gpus=4)
    else:
        with pytest.raises(ConfigError, match=message):
            check_devices(teacher(**settings), gpus=4)


def test_a_service_is_named_by_urls() -> None:
    service = teacher(service={"urls": ["http://a:8000/", "https://b/v1"]}).service
    assert service is not None
    assert service.urls == ["http://a:8000", "https://b"]
    with pytest.raises(ValidationError, match="'a:8000' is no URL of a server"):
        teacher(service={"urls": ["a:8000"]})
