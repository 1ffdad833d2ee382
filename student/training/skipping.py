"""Steps with NaN or Inf: skipped by all ranks, counted, and logged with their samples.

DeepSpeed skips a step whose gradient has a norm that is not finite, and leaves weights, optimizer and schedule as they
are. The norm is one number for all ranks, so all skip. Three things are missing there, and are here: a loss that is not
finite while its gradient is (`spread`); float32 without ZeRO, where DeepSpeed steps the bare optimizer (`guard`); and
Muon, whose momentum may take in finite matrices of the same step before the norm is known (`check_before_muon`).
The first two add no collective.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from shared.config import TrainConfig
from shared.errors import USER_ERROR_EXIT_CODE, TrainingError
from student.losses.objective import named_sums

logger = logging.getLogger(__name__)


def spread(total: Tensor, scale: float) -> Tensor:
    """`total * scale`; where `total` is NaN or Inf, its gradient is NaN throughout: 0 x Inf = NaN."""
    return total * (scale + 0 * total.detach())


def guard(optimizer: Any, max_norm: float) -> None:
    """Clip the gradient of an optimizer that DeepSpeed steps bare, and step it only where the norm is finite."""
    step = optimizer.step
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def guarded(self: Any) -> None:
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        self._global_grad_norm, self.overflow = norm, not bool(norm.isfinite())  # the engine looks for both
        if not self.overflow:
            step()

    optimizer.step = MethodType(guarded, optimizer)


def check_before_muon(engine: Any) -> None:
    """Look for NaN and Inf before the momentum is touched, as DeepSpeed 0.19 does for float16 alone. A collective of
    one byte a step."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        optimizer._overflow_check_and_loss_scale_update = lambda **_: optimizer.check_overflow()
    elif hasattr(optimizer, "check_grad_overflow"):
        optimizer.check_grad_overflow = True


def finite(values: Any) -> Any:
    """`values`, a figure or lists and mappings of them, with None for NaN and Inf, which JSON does not have."""
    if isinstance(values, dict):
        return {key: finite(value) for key, value in values.items()}
    if isinstance(values, list):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def after_skip(engine: Any, step: int, sample_ids: Sequence[Sequence[str]], sums: Sequence[Tensor], limit: int) -> None:
    """Forget the gradients of the skipped step `step` (1-based), and log its samples. A collective.

    Args:
        sample_ids, sums: of each of this rank's micro-batches, `sums` those of the loss.
    """
    gradients = getattr(engine.optimizer, "averaged_gradients", {})
    for group in gradients if getattr(engine.optimizer, "cpu_offload", False) else ():
        gradients[group] = None  # ZeRO-2 with offload would add the next step's to those that were skipped
    mine = [
        (list(ids), bool(named_sums(values)["total"].isfinite())) for ids, values in zip(sample_ids, sums, strict=True)
    ]
    everyones: list[list[tuple[list[str], bool]]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(everyones, mine)
    batches = [batch for of_rank in everyones for batch in of_rank]
    bad = [ids for ids, is_finite in batches if not is_finite]
    what = "the loss is not finite over" if bad else "the gradient is not finite over one of"
    samples = ", ".join(name for ids in bad or [ids for ids, _ in batches] for name in ids)
    if torch.distributed.get_rank() == 0:
        logger.warning(
            "step %d is skipped, %d of at most %d: %s the samples %s", step, engine.skipped_steps, limit, what, samples
        )


def require_few(skipped: int, train: TrainConfig) -> None:
    """End the run on all ranks where more steps were skipped than `train.max_skipped_steps`.

    Raises:
        TrainingError: on rank 0. SystemExit: on the others.
    """
    if skipped <= train.max_skipped_steps:
        return
    if torch.distributed.get_rank() > 0:
        sys.exit(USER_ERROR_EXIT_CODE)
    raise TrainingError(
        f"{skipped} steps were skipped for NaN or Inf, train.max_skipped_steps is {train.max_skipped_steps}. If the "
        "log names the same samples again and again, look at them (`shards show`) and leave them out. Otherwise try a "
        f"lower train.learning_rate (now {train.learning_rate:g}), a longer train.warmup (now {train.warmup:g}), a "
        f"lower train.grad_clip (now {train.grad_clip:g}) or train.dtype=float32, with --fresh. With a higher "
        "train.max_skipped_steps the run goes on from its newest checkpoint"
    )
