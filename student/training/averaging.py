"""The exponential moving average of the weights: average <- decay x average + (1 - decay) x weights, after each step.

It starts as the weights after the first step, as `torch.optim.swa_utils.AveragedModel` does. It is one more state of
the optimizer, beside each float32 weight that the optimizer steps. So DeepSpeed shares it out over the ranks, offloads,
saves and loads it like Adam's moments. Cost: 4 bytes per trainable parameter, divided by the ranks under ZeRO 1 to 3,
and one pass over them a step. A skipped step leaves it as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch

KEY = "ema"


def keep_average(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """From now on, average whatever `optimizer` steps: whole parameters, or ZeRO's flat partitions of them."""

    @torch.no_grad()
    def update(stepped: torch.optim.Optimizer, *_: Any) -> None:
        # ZeRO leaves in the groups only what it steps right now.
        for weights in (weights for group in stepped.param_groups for weights in group["params"]):
            state = stepped.state[weights]
            if KEY in state:
                state[KEY].lerp_(weights, 1 - decay)
            else:
                state[KEY] = weights.detach().clone()

    optimizer.register_step_post_hook(update)


def averages(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and whole average, float32, of one trained parameter of the engine's module after another. A collective."""
    from deepspeed.utils import safe_get_full_optimizer_state

    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        # ZeRO 1 and 2 link parameters to states after the first group's first step, when other groups have none yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    bare = {} if engine.zero_optimization_stage() else _stepped_by_parameter(engine)
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            continue
        if bare:
            yield name, engine.basic_optimizer.state[bare[parameter]][KEY]
        else:
            yield name, safe_get_full_optimizer_state(parameter, KEY)


@contextmanager
def in_place_of_weights(engine: Any) -> Iterator[None]:
    """The module computes with the average inside the block; the weights wait in host memory. Not under ZeRO-3, where
    no rank has whole weights. A collective."""
    kept = []
    with torch.no_grad():
        for name, average in averages(engine):
            weights = engine.module.get_parameter(name)
            kept.append((weights, weights.to("cpu", copy=True)))
            weights.copy_(average)
        try:
            yield
        finally:
            for weights, value in reversed(kept):  # a tied one was kept twice, first as it was
                weights.copy_(value)


def _stepped_by_parameter(engine: Any) -> dict[torch.nn.Parameter, torch.Tensor]:
    """What the optimizer steps for each parameter without ZeRO: in bfloat16 a float32 copy, otherwise itself."""
    stepped = [group["params"] for group in engine.basic_optimizer.param_groups]
    parameters = getattr(engine.optimizer, "fp16_groups", stepped)
    return dict(zip(chain(*parameters), chain(*stepped), strict=True))


def add_to_universal(average: dict[str, torch.Tensor], universal: Path) -> None:
    """Put the whole average, by the student's names, beside the moments, which alone DeepSpeed's conversion knows."""
    for name, value in average.items():
        folder = universal / "zero" / f"model.{name}"
        if folder.exists():  # not of what is frozen
            torch.save({"param": value.float()}, folder / f"{KEY}.pt")


def load_universal(engine: Any, folder: Path) -> None:
    """Load the average from a universal checkpoint, which ZeRO-3, unlike 1 and 2, leaves out. A collective."""
    from deepspeed.utils import safe_set_full_optimizer_state

    if engine.zero_optimization_stage() != 3:
        return
    optimizer = engine.optimizer
    for weights in optimizer.fp32_partitioned_groups_flat:
        optimizer.optimizer.state[weights][KEY] = torch.zeros_like(weights)
    for parameter in (parameter for group in optimizer.fp16_groups for parameter in group):
        saved = torch.load(folder / "zero" / optimizer.param_names[parameter] / f"{KEY}.pt", weights_only=True)
        safe_set_full_optimizer_state(parameter, saved["param"], KEY)
