"""Does a teacher fit its GPUs? By arithmetic, before minutes go into loading weights that do not."""

from __future__ import annotations

import json
from pathlib import Path

from shared.config import TeacherConfig
from shared.console import bytes_text
from shared.errors import ConfigError

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def check_memory(teacher: TeacherConfig, directory: Path, gpu_bytes: int) -> None:
    """Check that the weights and the keys and values of one longest sequence fit what vLLM may take of each GPU.

    Activations and graphs come on top, some GB, so what passes may still be refused by vLLM. What the checkpoint does
    not state (sizes of weights, heads) is not checked.

    Args:
        directory: with config.json and the weights or their index. gpu_bytes: of one GPU.

    Raises:
        ConfigError: with the arithmetic.
    """
    config = json.loads((directory / "config.json").read_text())
    text = config.get("text_config", config)
    stored = _stored_bytes(directory)
    try:
        layers, heads, width = text["num_hidden_layers"], text["num_attention_heads"], text["hidden_size"]
    except KeyError:
        return
    if stored is None:
        return
    kv_heads = text.get("num_key_value_heads") or heads
    item = _BYTES[teacher.dtype]
    stored_as = _BYTES.get(text.get("dtype") or text.get("torch_dtype") or config.get("torch_dtype") or "")
    weights = stored if stored_as is None or "quantization_config" in config else stored * item // stored_as
    if teacher.quantization == "fp8" and "quantization_config" not in config:
        weights //= item
    token = 2 * layers * kv_heads * (text.get("head_dim") or width // heads) * item
    ranks = teacher.tensor_parallel * teacher.pipeline_parallel
    weights_each = weights / ranks
    sequence_each = (
        token * teacher.max_sequence_tokens / (min(teacher.tensor_parallel, kv_heads) * teacher.pipeline_parallel)
    )
    room = teacher.gpu_memory_utilization * gpu_bytes
    if weights_each + sequence_each > room:
        raise ConfigError(
            f"teacher.model {teacher.model} does not fit: {bytes_text(weights)} of weights on {ranks} GPU(s) are "
            f"{bytes_text(weights_each)} each, one sequence of {teacher.max_sequence_tokens} tokens takes "
            f"{bytes_text(sequence_each)} for its keys and values, and of {bytes_text(gpu_bytes)} a GPU "
            f"teacher.gpu_memory_utilization {teacher.gpu_memory_utilization:g} gives {bytes_text(room)}; raise "
            "teacher.tensor_parallel, set teacher.quantization to fp8, or lower teacher.max_sequence_tokens"
        )


def _stored_bytes(directory: Path) -> int | None:
    """Bytes of the weights, from their index or their files; None where neither is there."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        size = json.loads(index.read_text()).get("metadata", {}).get("total_size")
        return int(size) if size is not None else None
    return sum(file.stat().st_size for file in directory.glob("*.safetensors")) or None
