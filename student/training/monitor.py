"""What a step cost and how its gradients look: time by part, memory, utilization, gradient statistics."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import psutil
import torch
import torch.distributed
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# Dense bfloat16 peaks in TFLOP/s, as the vendor's data sheets give them.
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "B200": 2250.0}
PARTS = ("data", "forward", "backward", "optimizer", "communication")
COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_to_all", "all_to_all_single",
    "broadcast", "reduce", "reduce_scatter", "reduce_scatter_tensor",
)  # fmt: skip


def peak_flops() -> float | None:
    """FLOP/s of this device at best, where its name is known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((1e12 * peak for key, peak in PEAK_TFLOPS.items() if key in name), None)


class StepMonitor:
    """Times the parts of a step and reads memory when it is over.

    On a GPU the parts are timed by events on its stream, so nothing waits for them. `communication` is how long
    collectives held up their stream (on a CPU the process), waiting for slower ranks included. DeepSpeed's run inside
    forward, backward and optimizer, beside the computing where `overlap_comm` says so: the parts do not add up.

    Args:
        flops: of a step on this rank.
    """

    def __init__(self, flops: float) -> None:
        self._flops, self._peak = flops, peak_flops()
        self._cuda = torch.cuda.is_available()
        self._process = psutil.Process()
        self._marks: dict[str, list[Any]] = defaultdict(list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block as a part of the step, one of `PARTS`."""
        if name == "data" or not self._cuda:
            start = time.perf_counter()
            yield
            self._marks[name].append(time.perf_counter() - start)
            return
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        yield
        end_event.record()
        self._marks[name].append((start_event, end_event))

    @contextmanager
    def watching_collectives(self) -> Iterator[None]:
        """Count the collectives that DeepSpeed calls meanwhile as communication."""
        import deepspeed.comm.comm as comm

        backend = comm.cdb
        for name in COLLECTIVES:
            setattr(backend, name, self._timed(getattr(backend, name)))
        try:
            yield
        finally:
            for name in COLLECTIVES:
                delattr(backend, name)  # the class has them still

    def _timed(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part("communication"):
                handle = collective(*args, **kwargs)
            return None if handle is None else _Awaited(handle, self)

        return timed

    def finish(self, step_s: float) -> dict[str, Any]:
        """The figures of the step that took `step_s` seconds, the largest memory of any rank; starts the next. A
        collective."""
        if self._cuda:
            torch.cuda.synchronize()
        seconds = {name: sum(map(_seconds, self._marks[name])) for name in PARTS}
        self._marks.clear()
        memory = torch.tensor([torch.cuda.max_memory_allocated() if self._cuda else 0, self._process.memory_info().rss])
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            memory = memory.cuda()
        torch.distributed.all_reduce(memory, torch.distributed.ReduceOp.MAX)
        device, host = (value / 2**30 for value in memory.tolist())
        return {
            "seconds": seconds | {"step": step_s},
            "data_wait": seconds["data"] / step_s,
            "device_gib": device if self._cuda else None,
            "host_gib": host,
            "utilization": None if self._peak is None else self._flops / self._peak / step_s,
        }


class _Awaited:
    """A collective under way; what counts is how long it is waited for."""

    def __init__(self, handle: Any, monitor: StepMonitor) -> None:
        self._handle, self._monitor = handle, monitor

    def wait(self, *args: Any) -> Any:
        with self._monitor.part("communication"):
            return self._handle.wait(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)


def _seconds(mark: Any) -> float:
    return mark if isinstance(mark, float) else mark[0].elapsed_time(mark[1]) / 1e3


class GradientStatistics:
    """The largest gradient and the share of zeros, on chosen steps; by layer at DEBUG.

    Of each micro-batch's own gradient on each rank, before they are added up. It is read three times more on those
    steps, and not at all on the others.
    """

    def __init__(self, module: nn.Module) -> None:
        self.watching = False
        self._layers: dict[str, Tensor] = {}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(partial(self._see, _layer(name)))

    def _see(self, layer: str, gradient: Tensor) -> None:
        if not self.watching or not gradient.numel():
            return
        values = gradient.detach()
        largest, zeros = values.abs().max().float(), (values == 0).sum().float()
        seen = torch.stack([largest, zeros, zeros.new_tensor(values.numel()), values.float().square().sum()])
        before = self._layers.get(layer)
        if before is not None:
            seen = torch.cat([torch.maximum(seen[:1], before[:1]), seen[1:] + before[1:]])
        self._layers[layer] = seen

    def finish(self) -> dict[str, float]:
        """What was seen since `watching` was set, over all ranks, and watch no more. A collective."""
        self.watching = False
        seen = torch.stack([*self._layers.values()])
        names = list(self._layers)
        self._layers.clear()
        largest, sums = seen[:, 0].contiguous(), seen[:, 1:].contiguous()
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        torch.distributed.all_reduce(sums)
        if logger.isEnabledFor(logging.DEBUG) and torch.distributed.get_rank() == 0:
            for name, top, (zeros, count, squares) in zip(names, largest.tolist(), sums.tolist(), strict=True):
                share = 100 * zeros / count
                logger.debug("gradient of %s: norm %.3g, largest %.3g, zeros %.2f%%", name, squares**0.5, top, share)
        zeros, count, _ = sums.sum(0).tolist()
        return {"grad_largest": float(largest.max()), "grad_zeros": zeros / count}


def _layer(name: str) -> str:
    """`blocks.3` of a parameter of block 3, else its module's name."""
    parts = name.split(".")
    if "blocks" in parts:
        at = parts.index("blocks")
        return ".".join(parts[at : at + 2])
    return parts[-2]
