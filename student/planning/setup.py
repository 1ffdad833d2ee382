"""What the arithmetic of a training starts from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from shared.config import LoraConfig, TrainConfig
from student.model.configuration_llada import LladaConfig
from student.planning.memory import Device, Dtype, Memory, Parameters, Zero, memory


@dataclass(frozen=True, slots=True)
class Setup:
    """What the arithmetic takes: a shape, and how it is trained."""

    shape: LladaConfig
    train: TrainConfig
    settings: dict[str, Any]
    lora: LoraConfig | None
    ranks: int
    device: Device = "cuda"

    @property
    def dtype(self) -> Dtype:
        return "float32" if self.train.dtype == "float32" else "bfloat16"

    @property
    def accumulation(self) -> int:
        return -(-self.train.global_batch // (self.ranks * self.train.micro_batch))

    @property
    def zero(self) -> Zero:
        return Zero.of(self.settings, self.ranks, self.dtype)

    @property
    def parameters(self) -> Parameters:
        return Parameters.of(self.shape, self.lora, self.train.sequential_rank)

    def memory(self) -> Memory:
        zero = self.zero
        if self.device == "cpu":  # what nothing is ever written to takes no memory of a host
            zero = replace(zero, reduce_bucket=min(zero.reduce_bucket, self.parameters.trained))
        return memory(self.shape, self.train, zero, self.dtype, self.lora, self.accumulation, self.device)

    def changed(
        self,
        *,
        stage: int | None = None,
        offload: bool = False,
        lora: bool = False,
        ranks: int | None = None,
        **train: Any,
    ) -> Setup:
        """The same with other settings."""
        zero = dict(self.settings.get("zero_optimization", {}))
        if stage is not None:
            zero["stage"] = stage
        if offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        settings = self.settings | {"zero_optimization": zero}
        if zero.get("stage") and self.dtype == "bfloat16":
            settings["data_types"] = {"grad_accum_dtype": "fp32"} | settings.get("data_types", {})
        return replace(
            self,
            train=self.train.model_copy(update=train),
            settings=settings,
            lora=LoraConfig() if lora else self.lora,
            ranks=ranks or self.ranks,
        )
