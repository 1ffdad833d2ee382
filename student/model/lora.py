"""Low-rank adapters on a student, through `peft`, under LLaDA's own module names.

The adapters are put into the model in place, so training code sees the same class, and `save_student` merges them
(W + scaling B A, in float32) whatever way the weights were gathered. Targets are names inside a block: `ff_out` is
the block's down projection, never the head of the same name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shared.config import LoraConfig

if TYPE_CHECKING:
    from torch import Tensor

    from student.model.modeling_llada import LladaForMaskedDiffusion

_ADAPTER = "default"


def add_lora(model: LladaForMaskedDiffusion, settings: LoraConfig) -> None:
    """Freeze `model` and put trainable adapters beside its target layers."""
    import peft

    model.requires_grad_(False)
    adapter = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=rf"model\.transformer\.blocks\.\d+\.({'|'.join(settings.targets)})",
        bias="none",
    )
    peft.inject_adapter_in_model(adapter, model, adapter_name=_ADAPTER)


def merge_lora(model: LladaForMaskedDiffusion, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """`weights` of a model with adapters as those of one without: every adapter added to its layer.

    Args:
        weights: the model's own state dict, or one gathered from all ranks; left as it is.
    """
    merged = {}
    for name, tensor in weights.items():
        if ".lora_" in name:
            continue
        if not name.endswith(".base_layer.weight"):
            merged[name] = tensor
            continue
        layer = name.removesuffix(".base_layer.weight")
        down = weights[f"{layer}.lora_A.{_ADAPTER}.weight"].float()
        up = weights[f"{layer}.lora_B.{_ADAPTER}.weight"].float()
        adapted: Any = model.get_submodule(layer)
        scaling = adapted.scaling[_ADAPTER]
        merged[f"{layer}.weight"] = (tensor.float() + scaling * (up @ down)).to(tensor.dtype)
    return merged
