"""The `teacher` section."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from shared.config.section import Section


class TeacherConfig(Section):
    """Which model teaches and how vLLM holds it."""

    model: str = Field(
        description="Directory or hub name of the teacher's checkpoint.", examples=["meta-llama/Llama-3.3-70B-Instruct"]
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub name; null is its default branch.")
    gguf: str | None = Field(
        None, description="GGUF file, or PACKAGE/FILE inside an installed package; converted once into `model`."
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="Of the weights and the computation."
    )
    tensor_parallel: PositiveInt = Field(1, description="GPUs that share each layer; within a node.")
    pipeline_parallel: PositiveInt = Field(1, description="Stages of layers, each on its own GPUs; across nodes.")
    max_sequence_tokens: PositiveInt = Field(
        8192, description="Longest prompt and answer together, in the teacher's tokens."
    )
    max_num_seqs: PositiveInt = Field(256, description="Requests that decode at once.")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="Share of each GPU's memory that vLLM takes.")
    kv_cache_gib: PositiveFloat | None = Field(None, description="CPU only: memory for the KV cache, in GiB.")
    enforce_eager: bool = Field(False, description="Skip compilation and CUDA graphs: starts sooner, decodes slower.")
    fp32_head: bool = Field(
        True, description="Compute the output head in float32, so that logprobs are not rounded to bf16."
    )
