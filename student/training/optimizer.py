"""The optimizer and the schedule of its learning rate.

AdamW (https://arxiv.org/abs/1711.05101) with beta = (0.9, 0.95) for all parameters, or Muon
(https://kellerjordan.github.io/posts/muon/) for the matrices inside the blocks, LoRA's included, and AdamW for the
others: embeddings, head, norms, biases. Muon is DeepSpeed's own, which gathers a matrix that ZeRO has cut up and
orthogonalizes it on each rank that holds a part. Both run torch's fused AdamW, which exists for CUDA and for CPUs, so
an optimizer that DeepSpeed offloads needs no kernel of its own compiled.

States, float32, shared out over the ranks by ZeRO: 8 bytes per parameter with AdamW, 4 per matrix element with Muon.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from shared.config import TrainConfig

BETAS = (0.9, 0.95)
MATCHED_RMS = 0.2
"""Root mean square of AdamW's usual update, in learning rates (https://arxiv.org/abs/2502.16982)."""


def build_optimizer(module: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """What `train.optimizer` names, over the trainable parameters of `module`, which may be ZeRO-3's shares."""
    trainable = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    adamw: dict[str, Any] = {
        "lr": train.learning_rate, "betas": BETAS, "eps": 1e-8, "weight_decay": train.weight_decay,
    }  # fmt: skip
    if train.optimizer == "adamw":
        return torch.optim.AdamW([parameter for _, parameter in trainable], fused=True, **adamw)

    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    by_columns: dict[int, list[nn.Parameter]] = defaultdict(list)
    others: list[nn.Parameter] = []
    for name, parameter in trainable:
        # DeepSpeed would mark by the names `embed` and `lm_head`; LLaDA's are `wte` and `ff_out`.
        shape = getattr(parameter, "ds_shape", parameter.shape)  # the whole one, where ZeRO-3 leaves but a share
        parameter.use_muon = ".blocks." in name and len(shape) == 2  # type: ignore[attr-defined]
        (by_columns[shape[1]] if parameter.use_muon else others).append(parameter)  # type: ignore[attr-defined]
    groups = [
        {
            "params": matrices,
            "use_muon": True,
            # DeepSpeed's update of an R x C matrix has a root mean square of 1 / sqrt(C): one learning rate is right
            # for both optimizers where it is brought to that of AdamW.
            "lr": MATCHED_RMS * columns**0.5 * train.learning_rate,
            "weight_decay": train.weight_decay,
        }
        for columns, matrices in by_columns.items()
    ]
    if others:
        groups.append({"params": others, "use_muon": False, **adamw})
    return MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={"fused": True})


def build_schedule(optimizer: torch.optim.Optimizer, train: TrainConfig, steps: int) -> LRScheduler:
    """A linear warm-up over `train.warmup` of the steps, then `train.schedule`."""
    from transformers import get_scheduler

    names = {"cosine": "cosine_with_min_lr", "constant": "constant_with_warmup", "linear": "linear"}
    return get_scheduler(
        names[train.schedule],
        optimizer,
        num_warmup_steps=round(train.warmup * steps),
        num_training_steps=steps,
        scheduler_specific_kwargs={"min_lr_rate": train.min_learning_rate} if train.schedule == "cosine" else {},
    )


def schedule_factor(schedule: LRScheduler) -> float:
    """What the schedule makes of `train.learning_rate` in the step that comes next."""
    return float(schedule.lr_lambdas[0](schedule.last_epoch))  # type: ignore[attr-defined]  # all groups have one


def follow_schedule(schedule: LRScheduler) -> None:
    """Give the optimizer the rates of the step that comes next; a loaded one has those of the schedule it was saved
    with, which may have been shorter."""
    for group, base in zip(schedule.optimizer.param_groups, schedule.base_lrs, strict=True):
        group["lr"] = base * schedule_factor(schedule)
