"""From one command to one process per rank.

`student train` run by hand starts its own ranks with `torchrun` on this node. Started as one of several ranks, by
`torchrun`, by `deepspeed` (which set RANK) or by `srun`, it joins them. Run by hand on each of several nodes, with
torchrun's own variables (PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR), it is one job of all their ranks, and ends with
the exit code of theirs, where `torchrun` itself would end with 1.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import NoReturn

from shared.config import TrainConfig
from shared.errors import ConfigError
from shared.stopping import REQUEUE_EXIT_CODE, SIGNALS

CHECKED = "LLADA_DRAFTER_CHECKED"
"""Set for ranks whose launcher, this program, has checked the run already."""


def is_rank() -> bool:
    """Whether a launcher has started this process as one of several. Slurm's variables become PyTorch's then.

    Slurm sets SLURM_PROCID in batch scripts too, where nobody has started ranks; a step of several tasks is `srun`'s.

    Raises:
        ConfigError: if Slurm's list of nodes cannot be read.
    """
    if "RANK" in os.environ:
        return True
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks == 1:
        return False
    import torch

    # A task that was given a GPU of its own (--gpus-per-task) sees no other.
    local_rank = int(os.environ["SLURM_LOCALID"]) % max(torch.cuda.device_count(), 1)
    os.environ.update(RANK=os.environ["SLURM_PROCID"], WORLD_SIZE=str(tasks), LOCAL_RANK=str(local_rank))
    os.environ.setdefault("MASTER_ADDR", first_host(os.environ["SLURM_STEP_NODELIST"]))
    os.environ.setdefault("MASTER_PORT", str(20_000 + int(os.environ["SLURM_JOB_ID"]) % 10_000))
    return True


def first_host(nodes: str) -> str:
    """The first host of Slurm's compressed list, such as `gpu[03-06,12]`.

    Raises:
        ConfigError: if `scontrol` cannot expand the list.
    """
    if "[" not in nodes:
        return nodes.split(",")[0]
    try:
        command = ["scontrol", "show", "hostnames", nodes]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise ConfigError(f"scontrol cannot name the first of the nodes {nodes} ({error}); set MASTER_ADDR") from error


def ranks_here(train: TrainConfig) -> int:
    """Ranks to start on this node: `train.world_size`, or one per GPU, or one."""
    import torch

    return train.world_size or max(torch.cuda.device_count(), 1)


def nodes_by_hand() -> int:
    """Nodes that each run this command by hand for one job: PET_NNODES, from which torchrun reads `--nnodes`.

    Raises:
        ConfigError: if it is no whole number.
    """
    value = os.environ.get("PET_NNODES", "1")
    if not value.isdecimal() or int(value) == 0:
        raise ConfigError(f"PET_NNODES is {value!r}: expected how many nodes run this command, as a whole number")
    return int(value)


def ranks_of_node(world_size: int) -> int:
    """Ranks on this node of a rank's: as torchrun, DeepSpeed or Slurm say, else all."""
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0].partition(",")[0]
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or tasks or world_size)


def run_ranks(count: int, train: TrainConfig, arguments: list[str]) -> NoReturn:
    """Run `count` ranks of this same command under `torchrun` in this process, and end with the code of theirs.

    They are all there are, or this node's; the nodes then meet as torchrun's environment variables say.

    Cores are shared out between the ranks, because each rank's thread pool would otherwise claim them all.
    """
    import torch.distributed.run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    threads = max(len(os.sched_getaffinity(0)) // count, 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ[CHECKED] = "1"
    signals = ",".join(["SIGINT", "SIGHUP", "SIGQUIT", *(number.name for number in SIGNALS)])
    options = [f"--nproc-per-node={count}", f"--signals-to-handle={signals}"]
    options.append(f"--shutdown-timeout={train.grace_seconds}")
    if nodes_by_hand() == 1:
        options.append("--standalone")
    try:
        torchrun.run(torchrun.parse_args([*options, "-m", "student.cli", *arguments]))
    except SignalException as stopped:
        sys.exit(REQUEUE_EXIT_CODE if stopped.sigval in SIGNALS else 128 + stopped.sigval)
    except ChildFailedError as failed:
        code = failed.get_first_failure()[1].exitcode
        sys.exit(code if code > 0 else 128 - code)
    sys.exit(0)
