"""Time and peak memory of the loss with its gradients, forward and backward: chunked against the plain ways.

    python -m tests.benchmarks.bench_losses --device cpu          # V = 126,464, d = 1,024, N up to 1,024
    python -m tests.benchmarks.bench_losses --device cuda         # V = 126,464, d = 4,096, N = 8,192, with Liger's

The device is the GPU where there is one.

Every case runs in a process of its own, rounds interleaved, so that a busy machine slows all alike; time is the
median of the rounds, and processor time, which other work disturbs less, stands beside it. Peak extra memory is what
the computation adds to a process that already holds states, head and targets: the resident set's high-water mark on
the CPU (reset through /proc/self/clear_refs), the allocator's on a GPU. Each way must end with the gradients of states
and head, so the table also gives the peak beyond these.

Ways: `plain` materializes logits and log-softmax and takes the tail as log(1 - sum); it does nothing else, no sums for
the log. `dense` is `tests.fixtures.dense_loss`. `torch-ce` is torch's own chunked linear cross-entropy. `liger-*`
are Liger's fused linear losses (Triton, GPU only); its KL needs dense target probabilities.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from student.losses import chunked
from student.losses.settings import LossSettings
from student.losses.targets import TargetBatch
from tests.fixtures import dense_loss

BLOCK_LENGTH = 8
CPU_WAYS = ("plain-ce", "torch-ce", "chunked-ce", "plain-kl", "dense-kl", "chunked-kl")
CUDA_WAYS = (*CPU_WAYS, "liger-ce", "liger-ce-fp32", "liger-kl")
# Each way against the one that does the same work plainly; on a GPU Liger's is compared too.
MEASURED = ("seconds", "cpu_seconds", "peak_extra_bytes", "beyond_gradients_bytes")
BASELINE = {"chunked-ce": "plain-ce", "torch-ce": "plain-ce", "chunked-kl": "plain-kl", "dense-kl": "plain-kl"}


def make_targets(
    positions: int, vocabulary: int, events: int, generator: torch.Generator, device: torch.device | str
) -> TargetBatch:
    """Top-k rows of one token an event, the tail holding what is left, as an equal vocabulary gives."""
    mass = torch.rand(positions, events + 1, generator=generator).pow(8) + 1e-6
    mass /= mass.sum(1, keepdim=True)
    members = torch.stack([torch.randperm(vocabulary, generator=generator)[:events] for _ in range(positions)])
    offsets = torch.arange(0, positions * events + 1, events)
    targets = TargetBatch(
        observed_ids=members[:, 0].clone(),
        observed_logprob=mass[:, 0].log(),
        depth=torch.arange(positions) % BLOCK_LENGTH + 1,
        block=torch.arange(positions) // BLOCK_LENGTH,
        weight=torch.ones(positions),
        has_soft=torch.ones(positions, dtype=torch.bool),
        event_offsets=offsets,
        event_mass=mass[:, :-1].reshape(-1),
        member_offsets=torch.arange(positions * events + 1),
        members=members.reshape(-1),
        tail=mass[:, -1].clone(),
        known=torch.ones(positions),
    )
    return targets.changed(lambda tensor: tensor.to(device))


def plain_kl(hidden: Tensor, head: Tensor, targets: TargetBatch) -> Tensor:
    """Truncated KL as one would write it: the whole log-softmax, the tail from what is left of one."""
    log_q = F.log_softmax((hidden @ head.T).float(), dim=1)
    log_q = log_q.gather(1, targets.members.view(len(targets), -1))
    mass = targets.event_mass.view(len(targets), -1)
    tail_q = (1 - log_q.exp().sum(1)).clamp(min=1e-12)
    entropy = (mass * mass.log()).sum() + (targets.tail * targets.tail.log()).sum()
    return entropy - (mass * log_q).sum() - (targets.tail * tail_q.log()).sum()


def computation(way: str, hidden: Tensor, head: Tensor, targets: TargetBatch) -> Callable[[], Tensor]:
    """The forward of `way`, as a closure over its inputs."""
    name, loss = way.split("-", 1)
    if name in ("chunked", "dense"):
        settings = LossSettings("ce" if loss == "ce" else "kl", BLOCK_LENGTH)
        if name == "chunked":
            return lambda: chunked.distillation_loss(hidden, head, targets, settings).total
        return lambda: dense_loss.distillation_loss(hidden @ head.T, targets, settings).total
    if name == "plain":
        if loss == "kl":
            return lambda: plain_kl(hidden, head, targets)
        return lambda: F.cross_entropy((hidden @ head.T).float(), targets.observed_ids, reduction="sum")
    if name == "torch":
        options = torch.nn.LinearCrossEntropyOptions()
        return lambda: F.linear_cross_entropy(hidden, head, targets.observed_ids, reduction="sum", options=options)
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy, liger_fused_linear_kl_div

    if loss == "kl":
        teacher = torch.zeros(len(targets), head.shape[0], device=hidden.device)
        teacher.scatter_(1, targets.members.view(len(targets), -1), targets.event_mass.view(len(targets), -1))
        return lambda: liger_fused_linear_kl_div(hidden, head, teacher, reduction="sum")
    accumulate = torch.float32 if loss == "ce-fp32" else None
    return lambda: liger_fused_linear_cross_entropy(
        hidden, head, targets.observed_ids, reduction="sum", accum_dtype=accumulate
    )


def peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return _status_kib("VmHWM") * 1024


def reset_peak(device: str) -> int:
    """Start a new high-water mark; returns the bytes in use now."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status_kib("VmRSS") * 1024


def _status_kib(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(way: str, positions: int, arguments: argparse.Namespace) -> dict[str, float]:
    """One case in this process: seconds, peak extra bytes, bytes of the gradients, and the value for a check."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    dtype, device = getattr(torch, arguments.dtype), arguments.device
    shape = (arguments.vocabulary, arguments.width)
    head = torch.empty(shape).normal_(generator=generator).mul_(arguments.width**-0.5)
    hidden = torch.randn(positions, arguments.width, generator=generator)
    targets = make_targets(positions, arguments.vocabulary, arguments.events, generator, device)
    hidden = hidden.to(device, dtype).requires_grad_()
    head = head.to(device, dtype).requires_grad_(not arguments.frozen_head)
    # Kernels are loaded and thread pools started on a small case first.
    small = make_targets(BLOCK_LENGTH, 128, 4, generator, device)
    computation(
        way, hidden[:BLOCK_LENGTH].detach().requires_grad_(), head[:128].detach().requires_grad_(), small
    )().backward()
    run = computation(way, hidden, head, targets)
    before = reset_peak(device)
    start, cpu_start = time.perf_counter(), time.process_time()
    loss = run()
    loss.backward()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    gradients = sum(t.grad.numel() * t.grad.element_size() for t in (head, hidden) if t.grad is not None)
    result = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak": peak_bytes(device) - before,
        "gradients": gradients,
        "value": float(loss.detach()),
    }
    if device == "cuda":
        # The first call tunes and compiles: time the second.
        head.grad = hidden.grad = None
        torch.cuda.synchronize()
        start = time.perf_counter()
        run().backward()
        torch.cuda.synchronize()
        result["seconds"] = time.perf_counter() - start
    return result


def run_cases(arguments: argparse.Namespace) -> list[dict]:
    """All cases, each in fresh processes, rounds interleaved."""
    ways = arguments.ways or (CUDA_WAYS if arguments.device == "cuda" else CPU_WAYS)
    rounds: dict[tuple[int, str], list[dict]] = {}
    for _ in range(arguments.rounds):
        for positions in arguments.positions:
            for way in ways:
                command = [
                    sys.executable,
                    "-m",
                    "tests.benchmarks.bench_losses",
                    *sys.argv[1:],
                    "--case",
                    way,
                    str(positions),
                ]
                done = subprocess.run(command, check=False, capture_output=True, text=True)
                if done.returncode:
                    # A way that runs out of memory is a result; the others go on.
                    print(f"{way} N={positions} failed: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                    continue
                rounds.setdefault((positions, way), []).append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for (positions, way), results in rounds.items():
        rows.append(
            {
                "positions": positions,
                "way": way,
                "seconds": statistics.median(r["seconds"] for r in results),
                "cpu_seconds": statistics.median(r["cpu_seconds"] for r in results),
                "peak_extra_bytes": max(r["peak"] for r in results),
                "beyond_gradients_bytes": max(r["peak"] - r["gradients"] for r in results),
                "value": results[0]["value"],
            }
        )
    by_case = {(row["positions"], row["way"]): row for row in rows}
    for row in rows:
        plain = by_case.get((row["positions"], BASELINE.get(row["way"], "")))
        for key in MEASURED:
            row[f"{key}_ratio"] = row[key] / plain[key] if plain else None
    return rows


def print_table(rows: list[dict], title: str) -> None:
    table = Table(title=title)
    for column in (
        "N",
        "way",
        "seconds",
        "× plain",
        "CPU s",
        "× plain",
        "peak extra MiB",
        "× plain",
        "beyond gradients MiB",
        "× plain",
    ):
        table.add_column(column, justify="left" if column == "way" else "right")
    for row in rows:
        cells = []
        for key in MEASURED:
            in_bytes, ratio = key.endswith("bytes"), row[f"{key}_ratio"]
            cells.append(f"{row[key] / 2**20:.0f}" if in_bytes else f"{row[key]:.3f}")
            cells.append("" if ratio is None else f"{ratio:.3f}")
        table.add_row(str(row["positions"]), row["way"], *cells)
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: float32 on the CPU, bfloat16 on a GPU"
    )
    parser.add_argument("--vocabulary", type=int, default=126_464)
    parser.add_argument("--width", type=int, help="default: 1024 on the CPU, 4096 on a GPU")
    parser.add_argument("--positions", type=int, nargs="+", help="default: 128 512 1024 on the CPU, 8192 on a GPU")
    parser.add_argument("--events", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--frozen-head", action="store_true", help="the head needs no gradient, as under LoRA")
    parser.add_argument("--ways", nargs="+", help="only these ways")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--case", nargs=2, metavar=("WAY", "N"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    arguments.dtype = arguments.dtype or ("bfloat16" if on_gpu else "float32")
    arguments.width = arguments.width or (4096 if on_gpu else 1024)
    arguments.positions = arguments.positions or ([8192] if on_gpu else [128, 512, 1024])
    if arguments.case:
        print(json.dumps(measure(arguments.case[0], int(arguments.case[1]), arguments)))
        return
    device = (
        torch.cuda.get_device_name()
        if on_gpu
        else f"{platform.processor() or platform.machine()}, {arguments.threads or torch.get_num_threads()} threads"
    )
    rows = run_cases(arguments)
    title = (
        f"loss + gradients, V={arguments.vocabulary:,} d={arguments.width:,} {arguments.dtype}, "
        f"{device}, torch {torch.__version__}, {datetime.date.today()}"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps({"title": title, "rows": rows}, indent=2) + "\n")
    print_table(rows, title)


if __name__ == "__main__":
    main()
