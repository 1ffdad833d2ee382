"""The `teacher` section."""

from __future__ import annotations

import re
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from shared.config.section import Section

OWN_ARGUMENTS = {
    "model": "model",
    "revision": "revision",
    "dtype": "dtype",
    "tensor_parallel_size": "tensor_parallel",
    "pipeline_parallel_size": "pipeline_parallel",
    "data_parallel_size": "data_parallel",
    "quantization": "quantization",
    "max_model_len": "max_sequence_tokens",
    "max_num_seqs": "max_num_seqs",
    "max_num_batched_tokens": "prefill_tokens",
    "enable_prefix_caching": "prefix_caching",
    "gpu_memory_utilization": "gpu_memory_utilization",
    "enforce_eager": "enforce_eager",
}
"""Arguments of vLLM that have keys of their own in this section, which `shared.vllm_settings` passes on."""
FIXED_ARGUMENTS = frozenset(
    {"max_logprobs", "logprobs_mode", "kv_cache_dtype", "speculative_config", "generation_config"}
)
"""Arguments of vLLM that a collection needs as they are."""
_IS_WRITTEN = "and the config is written beside every output"


class ServiceConfig(Section):
    """Running `vllm serve` processes that answer in place of an engine of our own."""

    urls: list[str] = Field(
        min_length=1, description="Of the servers, which take turns.", examples=[["http://localhost:8000"]]
    )
    requests_in_flight: PositiveInt | None = Field(
        None, description="At one server; null is twice what its copies decode at once, which keeps it full."
    )
    patience_minutes: PositiveFloat = Field(
        30, description="How long a request is tried again while no server answers it: a restart fits in."
    )

    @field_validator("urls")
    @classmethod
    def _urls_are_roots(cls, value: list[str]) -> list[str]:
        for url in value:
            is_url = re.fullmatch(r"https?://[^/\s]+(/[^\s]*)?", url)
            if "@" in (urlsplit(url).netloc if is_url else url) or "?" in url:
                raise ValueError(
                    f"a URL carries a key or a password, {_IS_WRITTEN}; put the servers' key into VLLM_API_KEY"
                )
            if not is_url:
                raise ValueError(f"{url!r} is no URL of a server, expected such as http://localhost:8000")
        return [url.rstrip("/").removesuffix("/v1") for url in value]


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
    data_parallel: PositiveInt = Field(
        1, description="Copies of the model behind one server: `teacher serve` only; in process, start more collectors."
    )
    quantization: str | None = Field(
        None,
        description="Of the weights as they are loaded, such as fp8; null is what the checkpoint has. The rows are "
        "then those of the quantized model.",
        examples=["fp8"],
    )
    max_sequence_tokens: PositiveInt = Field(
        8192, description="Longest prompt and answer together, in the teacher's tokens."
    )
    max_num_seqs: PositiveInt = Field(256, description="Requests that decode at once.")
    prefill_tokens: PositiveInt | None = Field(
        None,
        description="Tokens of one forward, long prompts being prefilled in chunks beside the decoding; null is "
        "vLLM's choice.",
    )
    prefix_caching: bool = Field(True, description="Keep the keys and values of beginnings that prompts share.")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="Share of each GPU's memory that vLLM takes.")
    kv_cache_gib: PositiveFloat | None = Field(None, description="CPU only: memory for the KV cache, in GiB.")
    enforce_eager: bool = Field(False, description="Skip compilation and CUDA graphs: starts sooner, decodes slower.")
    fp32_head: bool = Field(
        True, description="Compute the output head in float32, so that logprobs are not rounded to bf16."
    )
    engine_args: dict[str, Any] = Field(
        default_factory=dict,
        description="Further arguments of vLLM by its own names, such as distributed_executor_backend: ray.",
    )
    service: ServiceConfig | None = None

    @field_validator("engine_args")
    @classmethod
    def _names_are_free(cls, value: dict[str, Any]) -> dict[str, Any]:
        names = [name.replace("-", "_") for name in value]
        if found := [name for name in names if re.fullmatch(r"(.*_)?(api_key|token|password|secret)", name)]:
            raise ValueError(
                f"{found[0]} is a secret, {_IS_WRITTEN}; put it into HF_TOKEN, or VLLM_API_KEY of a server"
            )
        for name in names:
            if name in OWN_ARGUMENTS:
                raise ValueError(f"{name} is teacher.{OWN_ARGUMENTS[name]}; set that instead")
            if name in FIXED_ARGUMENTS:
                raise ValueError(f"{name} decides what is captured and is set by this project; take it out")
        return value
