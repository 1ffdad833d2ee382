"""vLLM's arguments and environment from the teacher section: what collecting, scoring and speculating have in common.

It imports no vLLM. The teacher's engine and the student's each add what only they need.
"""

from __future__ import annotations

import importlib.metadata
import os
from typing import Any

from shared.config import TeacherConfig


def engine_arguments(teacher: TeacherConfig, dtype: str | None = None) -> dict[str, Any]:
    """Arguments of `vllm.LLM` or `vllm.EngineArgs` that load this teacher.

    Args:
        dtype: in place of `teacher.dtype`.
    """
    dtype = dtype or teacher.dtype
    arguments: dict[str, Any] = {
        "model": teacher.model,
        "revision": teacher.revision,
        "dtype": dtype,
        "tensor_parallel_size": teacher.tensor_parallel,
        "pipeline_parallel_size": teacher.pipeline_parallel,
        "max_model_len": teacher.max_sequence_tokens,
        "max_num_seqs": teacher.max_num_seqs,
        "gpu_memory_utilization": teacher.gpu_memory_utilization,
        "enforce_eager": teacher.enforce_eager,
        # A quantized KV cache makes decoding and scoring disagree by up to half a nat.
        "kv_cache_dtype": "auto",
    }
    if teacher.fp32_head and dtype != "float32":
        arguments["hf_overrides"] = {"head_dtype": "float32"}
    return arguments


def environment(teacher: TeacherConfig) -> dict[str, str]:
    """Variables that vLLM and OpenMP read as they are imported; what the user has set comes first."""
    variables = {
        # Threads that wait by spinning make an engine crawl as soon as anything else runs on the machine.
        "OMP_WAIT_POLICY": "passive",
        "GOMP_SPINCOUNT": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if teacher.kv_cache_gib is not None:
        variables["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(teacher.kv_cache_gib)))  # vLLM reads whole GiB
    if is_cpu_build() and teacher.tensor_parallel == teacher.pipeline_parallel == 1:
        # In this process the engine loads in a third of the time and decodes as fast (measured), and a killed
        # command leaves no process behind. vLLM then takes one thread, unless this says otherwise.
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        variables["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
    return {name: value for name, value in variables.items() if name not in os.environ}


def is_cpu_build() -> bool:
    """Whether the vLLM that is installed is the CPU build."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
