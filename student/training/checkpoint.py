"""Saving and resuming a run.

DeepSpeed writes a checkpoint's files first and the file `latest`, which names it, last: an interrupted save leaves the
one before in force. A checkpoint carries the identity of its run, so that it is never resumed under other settings.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from shared.config import PipelineConfig
from shared.errors import CheckpointError
from shared.files import write_json
from student.lineage import differences, read_json
from student.training.engine import training_dtype

# Settings that change what is logged or kept, not what is learnt.
WITHOUT_EFFECT = {"checkpoint_steps", "keep_checkpoints"}


IDENTITY_FILE = "identity.json"


def run_identity(config: PipelineConfig, inputs: dict[str, str], world_size: int) -> dict[str, Any]:
    """Everything that decides the result of a run, flat: settings, fingerprints of its inputs, ranks."""
    train = config.train.model_dump(mode="json", exclude=WITHOUT_EFFECT)
    train["dtype"] = training_dtype(config.train)
    student = config.student.model_dump(mode="json")
    settings = {f"train.{key}": value for key, value in train.items()}
    settings |= {f"student.{key}": value for key, value in student.items()}
    return settings | inputs | {"seed": config.seed, "ranks": world_size}


def require_same_run(found: dict[str, Any], wanted: dict[str, Any], where: Path) -> None:
    """Refuse to go on with a run that other settings or other inputs began.

    Raises:
        CheckpointError: naming everything that differs, with both values.
    """
    if differing := differences(found, wanted):
        raise CheckpointError(
            f"{where} was trained with other settings or inputs ({'; '.join(differing)}); "
            "restore them, choose another `name`, or pass --fresh to train anew"
        )


def require_resumable(directory: Path, identity: dict[str, Any]) -> None:
    """Refuse the checkpoints of another run before their weights are loaded, which may not even fit.

    Raises:
        CheckpointError: as `require_same_run`.
    """
    if (directory / "latest").exists():
        require_same_run(read_json(directory / IDENTITY_FILE) or {}, identity, directory)


def save(engine: Any, directory: Path, step: int, identity: dict[str, Any], keep: int, rank: int) -> None:
    """Save a resumable checkpoint after `step` steps and delete all but the newest `keep`. A collective."""
    import torch.distributed

    if rank == 0:
        write_json(directory / IDENTITY_FILE, identity)
    engine.save_checkpoint(str(directory), tag=f"step-{step}", client_state={"step": step, "identity": identity})
    torch.distributed.barrier()
    if rank == 0:
        steps = sorted(int(path.name.removeprefix("step-")) for path in directory.glob("step-*"))
        for old in steps[:-keep]:
            shutil.rmtree(directory / f"step-{old}")


def resume(engine: Any, directory: Path, identity: dict[str, Any]) -> int:
    """Load the newest checkpoint, if there is one; the number of steps done. A collective.

    Raises:
        CheckpointError: if it belongs to other settings, or `latest` names none of this directory.
    """
    if not (directory / "latest").exists():
        return 0
    tag = (directory / "latest").read_text(errors="replace").strip()
    if not re.fullmatch(r"step-[0-9]+", tag):
        raise CheckpointError(
            f"{directory}/latest names {tag!r}, expected step-NUMBER, a checkpoint in this directory; "
            f"write the newest one's name into it, or delete {directory} to start over"
        )
    require_resumable(directory, identity)
    path, state = engine.load_checkpoint(str(directory))
    if path is None:
        raise CheckpointError(
            f"{directory}/latest names a checkpoint that cannot be read; delete {directory} to start over"
        )
    require_same_run(state["identity"], identity, directory)
    return int(state["step"])
