"""Division by the global number of target tokens, over all ranks and all micro-batches of a step.

A sum-reduced loss L_rm of rank r and micro-batch m must reach the optimizer as (sum over r, m of grad L_rm) / N, N the
target tokens of the whole step. DeepSpeed divides twice on its own: `engine.backward` by the accumulation steps A
(`scale_wrt_gas`), and the reduction of gradients by the data-parallel ranks W. So the factor on L_rm is A W / N. N must
be known before the step's first backward: count the targets of all its micro-batches first, they need no forward.
One small all-reduce a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shared.errors import TrainingError


def loss_scale(global_targets: int, *, world_size: int, accumulation_steps: int) -> float:
    """Factor that turns a sum-reduced loss into what goes to `engine.backward`.

    Args:
        global_targets: target tokens of the whole step, `sum_over_ranks` of each rank's count over its micro-batches.
        world_size: data-parallel ranks (`engine.dp_world_size`). accumulation_steps: micro-batches of the step
            (`engine.gradient_accumulation_steps()`); 1 where `backward` is called with `scale_wrt_gas=False`.

    Returns:
        `accumulation_steps * world_size / global_targets`; 0 for a step with no target at all, whose loss is 0 anyway.

    Raises:
        TrainingError: if a count is impossible.
    """
    if global_targets < 0 or world_size < 1 or accumulation_steps < 1:
        raise TrainingError(
            f"cannot normalise by {global_targets} target tokens over {world_size} ranks and {accumulation_steps} "
            "accumulation steps: expected at least 0, 1 and 1"
        )
    return accumulation_steps * world_size / global_targets if global_targets else 0.0


def sum_over_ranks(values: Tensor) -> Tensor:
    """`values` summed over all ranks (a new tensor, on every rank); itself where there is one process.

    For target counts, and for `LossTerms.sums` before `summarize`. `values` must lie on the device that the process
    group's backend serves.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    total = values.clone()
    torch.distributed.all_reduce(total)
    return total
