"""A teacher that does not fit is refused with the arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.config import TeacherConfig
from shared.errors import ConfigError
from teacher.engine import in_process
from teacher.engine.memory import check_memory

H100 = 80 * 10**9
LLAMA_70B = {
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "hidden_size": 8192,
    "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    index = {"metadata": {"total_size": 141_107_412_992}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def teacher(directory: Path, **settings: Any) -> TeacherConfig:
    return TeacherConfig(model=str(directory), **settings)


def test_the_arithmetic_is_shown(llama: Path) -> None:
    with pytest.raises(ConfigError) as error:
        check_memory(teacher(llama, tensor_parallel=2, max_sequence_tokens=16_384), llama, H100)
    message = str(error.value)
    for part in ("141 GB of weights on 2 GPU(s) are 70.6 GB each", "16384 tokens takes 2.68 GB", "0.9 gives 72 GB"):
        assert part in message
    assert "raise teacher.tensor_parallel, set teacher.quantization to fp8" in message


@pytest.mark.parametrize(
    ("settings", "fits"),
    [
        ({"tensor_parallel": 2, "max_sequence_tokens": 16_384}, False),
        ({"tensor_parallel": 2, "max_sequence_tokens": 16_384, "gpu_memory_utilization": 0.95}, True),
        ({"tensor_parallel": 4}, True),
        ({"tensor_parallel": 2, "pipeline_parallel": 2}, True),
        ({"tensor_parallel": 4, "dtype": "float32", "max_sequence_tokens": 16_384}, False),
        ({"tensor_parallel": 1}, False),
        ({"tensor_parallel": 1, "quantization": "fp8", "max_sequence_tokens": 2048}, True),
        ({"tensor_parallel": 4, "max_sequence_tokens": 131_072, "gpu_memory_utilization": 0.5}, False),
    ],
)
def test_weights_and_one_sequence_must_fit(llama: Path, settings: dict[str, Any], fits: bool) -> None:
    if fits:
        check_memory(teacher(llama, **settings), llama, H100)
    else:
        with pytest.raises(ConfigError, match="does not fit"):
            check_memory(teacher(llama, **settings), llama, H100)


def test_what_is_not_stated_is_not_checked(llama: Path) -> None:
    (llama / "model.safetensors.index.json").unlink()
    check_memory(teacher(llama), llama, 1)
    (llama / "model.safetensors").write_bytes(bytes(1000))
    with pytest.raises(ConfigError, match="1 kB of weights"):
        check_memory(teacher(llama), llama, 1)
    (llama / "config.json").write_text("{}")
    check_memory(teacher(llama), llama, 1)


def test_the_engine_learns_a_gpus_memory_without_a_context_on_it(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own question would open one, which stays."""
    platform = pytest.importorskip("vllm.platforms").current_platform

    def context(*_: Any) -> None:
        raise AssertionError("a CUDA context")

    monkeypatch.setattr(in_process, "is_cpu_build", lambda: False)
    monkeypatch.setattr(in_process, "prepare_environment", lambda _: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "_lazy_init", context)
    monkeypatch.setattr(platform, "get_device_total_memory", {0: H100}.__getitem__)
    with pytest.raises(ConfigError, match="of 80 GB a GPU"):
        in_process.Engine(teacher(llama, tensor_parallel=2, max_sequence_tokens=16_384), str(llama), top_k=4)
