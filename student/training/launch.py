"""From one command to one process per rank.

`student train` run by hand starts its own ranks with `torchrun` on this node. Run by `torchrun`, `deepspeed` or
a cluster's launcher, which set RANK, it is a rank already and just trains.
"""

from __future__ import annotations

import os
import sys

from shared.config import TrainConfig


def is_rank() -> bool:
    """Whether a launcher has started this process."""
    return "RANK" in os.environ


def ranks_here(train: TrainConfig) -> int:
    """Ranks to start on this node: `train.world_size`, or one per GPU, or one."""
    import torch

    return train.world_size or max(torch.cuda.device_count(), 1)


def replace_with_ranks(count: int, arguments: list[str]) -> None:
    """Become `torchrun` with `count` ranks of this same command. Does not return.

    Cores are shared out between the ranks, because each rank's thread pool would otherwise claim them all.
    """
    threads = max((os.cpu_count() or count) // count, 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m", "student.cli"]
    os.execv(sys.executable, [sys.executable, *command, *arguments])
