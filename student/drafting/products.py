"""Products of a handful of rows with a large matrix: which way is fastest on this device, and layers that use it.

A draft multiplies five to fifty rows with every weight of the model, so reading the weights is what it pays for. Ways:

- `float32`, `bfloat16`: torch's own product in that type. GPUs and CPUs with AVX-512 are fastest in bfloat16. A CPU
  with AVX2 converts every bfloat16 number first.
- `float16_weights` (x86 CPUs): FBGEMM's product of float32 rows with float16 weights, laid out for it when they are
  loaded. It reads half of the bytes of float32, and each row's result does not depend on the rows beside it. Dynamic
  int8 of the same library has a scale for all rows together: a request's draft would depend on its company.

`fastest_way` measures instead of knowing, once a process and device, in some 0.1 s.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.config.speculate import Way

logger = logging.getLogger(__name__)

Linear = Callable[[Tensor], Tensor]

_ROWS, _ROUNDS = 6, 5
_SHAPE = {"cpu": (16, 1024), "cuda": (2, 8192)}
"""Matrices and their width: more bytes than caches hold, and on a GPU products that take longer than their start."""


def activation_dtype(way: Way) -> torch.dtype:
    """Of the rows that a way multiplies."""
    return torch.bfloat16 if way == "bfloat16" else torch.float32


def available_ways(device: torch.device) -> list[Way]:
    """Those that this device and this build of torch have."""
    packs = device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines
    return [way for way in get_args(Way) if packs or way != "float16_weights"]


@functools.cache
def fastest_way(device: torch.device) -> Way:
    """By measurement; the same answer for the life of the process."""
    ways = available_ways(device)
    matrices, width = _SHAPE.get(device.type, _SHAPE["cpu"])
    generator = torch.Generator(device).manual_seed(0)
    weights = [torch.randn(width, width, device=device, generator=generator).mul_(width**-0.5) for _ in range(matrices)]
    rows = torch.randn(_ROWS, width, device=device, generator=generator)
    seconds = dict.fromkeys(ways, float("inf"))
    linears = {way: [_linear(way, weight) for weight in weights] for way in ways}
    with torch.inference_mode():
        # The least time of single products, the ways in turns: a busy machine leaves some of them alone.
        for number in range(_ROUNDS * matrices):
            for way in ways:
                x, linear = rows.to(activation_dtype(way)), linears[way][number % matrices]
                _synchronize(device)
                started = time.perf_counter()
                linear(x)
                _synchronize(device)
                seconds[way] = min(seconds[way], time.perf_counter() - started)
    best = min(ways, key=seconds.__getitem__)
    shown = ", ".join(f"{way} {1e6 * seconds[way]:.0f}" for way in ways)
    logger.info(
        "drafts are computed in %s on %s: %d rows times %d x %d take %s µs", best, device, _ROWS, width, width, shown
    )
    return best


def fused(way: Way, modules: Sequence[nn.Module]) -> Linear:
    """One product for linear layers of the same input; their outputs follow one another.

    Where the weights keep their type, the modules' own become views of the fused ones, so that nothing is held twice
    and the modules go on working.
    """
    weights = [local(module.weight) for module in modules]  # type: ignore[arg-type]
    if way == "float16_weights" or weights[0].dtype != activation_dtype(way):
        return _linear(way, torch.cat([weight.detach().to(activation_dtype(way)) for weight in weights]))
    if len(weights) == 1:
        return functools.partial(F.linear, weight=weights[0].detach())
    whole = torch.cat([weight.detach() for weight in weights])
    for weight, view in zip(weights, whole.split([len(weight) for weight in weights]), strict=True):
        weight.data = view
    return functools.partial(F.linear, weight=whole)


def separate(modules: Sequence[nn.Module]) -> Linear:
    """The modules' outputs side by side, for modules in training: their weights stay theirs, adapters are called."""
    if len(modules) == 1:
        return modules[0]

    def apply(x: Tensor) -> Tensor:
        return torch.cat([module(x) for module in modules], dim=-1)

    return apply


def of_weight(way: Way | None, weight: Tensor) -> Linear:
    """The product with a weight that is no module's, such as the head's rows of the tokens that can be drafted."""
    return functools.partial(F.linear, weight=weight) if way is None else _linear(way, weight)


def local(weight: Tensor) -> Tensor:
    """This rank's part of a weight that tensor parallelism has shared out; any other is itself."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


def _linear(way: Way, weight: Tensor) -> Linear:
    if way != "float16_weights":
        return functools.partial(F.linear, weight=weight.to(activation_dtype(way)))
    packed = torch.ops.quantized.linear_prepack_fp16(weight.float().contiguous(), None)
    multiply: Any = torch.ops.quantized.linear_dynamic_fp16
    return lambda x: multiply(x, packed)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
