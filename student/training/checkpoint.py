"""Saving and resuming a run.

    checkpoints/step-N/…                    DeepSpeed's files, every rank's own
    checkpoints/step-N/average.safetensors  the moving average of the weights, whole, where the run has one
    checkpoints/step-N/complete.json        written last, when all ranks are done: names, sizes, identity of the run

A folder without `complete.json` is of a save that was interrupted. DeepSpeed's own marker, `latest`, is not used: its
rank 0 writes it before the other ranks are done.

A checkpoint is resumed by any number of ranks and under ZeRO 1, 2 or 3. Where they differ from those that saved it, it
is first converted to DeepSpeed's universal format (https://arxiv.org/abs/2406.18820), which holds whole parameters.
"""

from __future__ import annotations

import logging
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shared.config import PipelineConfig
from shared.errors import USER_ERROR_EXIT_CODE, CheckpointError, TrainingError
from shared.files import read_json, write_json
from student.lineage import IDENTITY, differences, shape_file
from student.training import averaging
from student.training.engine import training_dtype
from student.training.optimizer import follow_schedule

logger = logging.getLogger(__name__)

# Settings that change what is logged, kept or computed where, not what is learnt.
WITHOUT_EFFECT = {
    "activation_checkpointing", "checkpoint_steps", "compile", "data_workers", "deepspeed", "evaluate_checkpoints",
    "grace_seconds", "gradient_statistics_steps", "hang_minutes", "keep_checkpoints", "max_skipped_steps",
    "micro_batch", "trackers", "world_size",
}  # fmt: skip
COMPLETE, AVERAGE = "complete.json", "average.safetensors"
_UNIVERSAL = "-universal"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose save came to its end.

    Attributes:
        step: steps done.
        ranks, zero_stage: of the run that saved it.
        sizes: bytes of each of its files, by name.
        score: of the student then, more is better; None where it was not measured.
    """

    directory: Path
    step: int
    ranks: int
    zero_stage: int
    identity: dict[str, Any]
    sizes: dict[str, int]
    score: float | None

    @classmethod
    def read(cls, folder: Path) -> Checkpoint | None:
        """The checkpoint in `folder`; None if its save did not come to its end."""
        record = read_json(folder / COMPLETE)
        if record is None:
            return None
        step, ranks, stage, identity, sizes = (record[n] for n in ("step", "ranks", "zero_stage", IDENTITY, "sizes"))
        return cls(folder, step, ranks, stage, identity, sizes, record.get("score"))

    def fits(self, ranks: int, zero_stage: int) -> bool:
        """Whether it can be loaded as it is; without ZeRO every rank holds everything."""
        return zero_stage == self.zero_stage and (ranks == self.ranks or zero_stage == 0)


def run_identity(config: PipelineConfig, inputs: dict[str, str]) -> dict[str, Any]:
    """Everything that decides the result of a run, flat: settings, and fingerprints of its inputs."""
    train = config.train.model_dump(mode="json", exclude=WITHOUT_EFFECT)
    train["dtype"] = training_dtype(config.train)
    student = config.student.model_dump(mode="json")
    settings = {f"train.{key}": value for key, value in train.items()}
    settings |= {f"student.{key}": value for key, value in student.items()}
    if config.train.patience is not None or config.train.publish == "best":  # what their scores are measured by
        evaluate = config.evaluate.model_dump(mode="json", exclude={"batch"})
        settings |= {f"evaluate.{key}": value for key, value in evaluate.items()}
    return settings | shape_file(config) | inputs | {"seed": config.seed}


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


def save(
    engine: Any,
    directory: Path,
    step: int,
    identity: dict[str, Any],
    keep: int,
    rank: int,
    score: float | None = None,
    average: dict[str, Tensor] | None = None,
) -> None:
    """Save a resumable checkpoint after `step` steps and delete all but the newest `keep` and the best. A collective.

    Args:
        score: how good the student is by now, more is better; None where it was not measured.
        average: the moving average of the weights, whole on rank 0; None where the run keeps none.

    Raises:
        TrainingError: if a file cannot be written; the checkpoints before stay as they are.
    """
    folder = directory / f"step-{step}"
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)  # of a save that was interrupted, perhaps by other ranks
    torch.distributed.barrier()
    _pickle_by_value()
    try:
        engine.save_checkpoint(str(directory), tag=folder.name, save_latest=False)
        if average is not None and rank == 0:
            save_file({name: value.to("cpu", copy=True) for name, value in average.items()}, folder / AVERAGE)
    except (OSError, RuntimeError, SafetensorError) as error:  # PyTorch's writer has only RuntimeError
        raise TrainingError(
            f"cannot save {folder}: {error}; free some space and run the same command again: it goes on from the "
            "newest checkpoint that is whole"
        ) from error
    torch.distributed.barrier()
    if rank == 0:
        files = [path for path in folder.rglob("*") if path.is_file()]
        record = {
            "step": step,
            "ranks": torch.distributed.get_world_size(),
            "zero_stage": engine.zero_optimization_stage(),
            IDENTITY: identity,
            "score": score,
            "sizes": {str(path.relative_to(folder)): path.stat().st_size for path in files},
        }
        write_json(folder / COMPLETE, record)
        prune(directory, keep)
    torch.distributed.barrier()


def prune(directory: Path, keep: int) -> None:
    """Delete all but the newest `keep` and the best, and what was begun before and did not come to its end."""
    folders = _folders(directory)
    whole = [path for path in folders if (path / COMPLETE).exists()]
    leader = best(directory)
    kept = whole[:keep] + ([] if leader is None else [leader.directory])
    for old in folders[folders.index(whole[0]) :] if whole else ():
        if old not in kept:
            shutil.rmtree(old)
    for conversion in directory.glob(f"step-*{_UNIVERSAL}"):
        shutil.rmtree(conversion)


def complete(
    directory: Path, identity: dict[str, Any], is_longer: Callable[[dict[str, Any]], bool] = lambda _: False
) -> list[Checkpoint]:
    """Checkpoints whose save came to its end, the newest first; the log names the others.

    Args:
        is_longer: whether the run is, but for more steps, the one with the identity that was found.

    Raises:
        CheckpointError: if one belongs to other settings or inputs, before anything of it is loaded.
    """
    checkpoints = []
    for folder in _folders(directory):
        found = Checkpoint.read(folder)
        if found is None:
            logger.warning(
                "%s has no %s: its save was interrupted or is an earlier release's; it is not used", folder, COMPLETE
            )
            continue
        if not is_longer(found.identity):
            require_same_run(found.identity, identity, folder)
        checkpoints.append(found)
    return checkpoints


def undamaged(candidates: list[Checkpoint]) -> Checkpoint | None:
    """The first of the candidates whose files read back; None where there are no candidates. A collective.

    Raises:
        CheckpointError: on rank 0, if all are damaged. SystemExit: on the others then.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    damaged: list[str] = []
    for candidate in candidates:
        mine = list(damage(candidate, rank, ranks))
        everyones: list[list[str]] = [[] for _ in range(ranks)]
        torch.distributed.all_gather_object(everyones, mine)
        found = [problem for of_rank in everyones for problem in of_rank]
        if not found:
            return candidate
        damaged += found
        if rank == 0:
            logger.warning("%s is damaged (%s): it is not used", candidate.directory, "; ".join(found))
    if damaged:
        if rank > 0:
            sys.exit(USER_ERROR_EXIT_CODE)
        raise CheckpointError(
            f"no checkpoint in {candidates[0].directory.parent} is undamaged ({'; '.join(damaged)}); restore one, or "
            "pass --fresh to train anew"
        )
    return None


def damage(checkpoint: Checkpoint, part: int, parts: int) -> Iterator[str]:
    """What is wrong with every `parts`-th file, from file `part` on. Reads them: PyTorch's files carry checksums."""
    for name, size in sorted(checkpoint.sizes.items())[part::parts]:
        path = checkpoint.directory / name
        if not path.exists():
            yield f"{name} is missing"
        elif path.stat().st_size != size:
            yield f"{name} has {path.stat().st_size} bytes, expected {size}"
        elif path.suffix == ".pt":
            try:
                with zipfile.ZipFile(path) as archive:
                    entry = archive.testzip()
            except (zipfile.BadZipFile, OSError) as error:
                entry = str(error)
            if entry is not None:
                yield f"{name} does not read back: {entry}"
            elif (problem := _code_in(path)) is not None:
                yield problem


def _pickle_by_value() -> None:
    """Python 3.11.0 to 3.11.3 pickle an enum's member as a call of `getattr`, which `_code_in` refuses to let run."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    ZeroStageEnum.__reduce_ex__ = lambda self, _protocol: (ZeroStageEnum, (self.value,))


def _code_in(path: Path) -> str | None:
    """What a file of PyTorch's would run beyond making tensors, plain data and DeepSpeed's settings; None is nothing.

    Such a file is a pickle, and DeepSpeed's readers run whatever it calls. PyTorch's restricted reader, which loads no
    tensor here, comes before them.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError) as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        return f"{path.name} would call {found[1]} when it is read" if found else f"{path.name} is no file of PyTorch 2"
    return None


def reshard(checkpoint: Checkpoint, ranks: int, zero_stage: int) -> Path:
    """Convert a checkpoint to DeepSpeed's universal format, beside it; where it lies. For one rank.

    Raises:
        CheckpointError: if it cannot be converted.
    """
    if 0 in (zero_stage, checkpoint.zero_stage):
        raise CheckpointError(
            f"{checkpoint.directory} was saved under ZeRO stage {checkpoint.zero_stage}, the DeepSpeed file now has "
            f"stage {zero_stage}: only stages 1 to 3 can be converted into one another; restore the stage"
        )
    if checkpoint.identity.get("train.optimizer") == "muon":
        raise CheckpointError(
            f"{checkpoint.directory} was saved by {checkpoint.ranks} ranks under ZeRO-{checkpoint.zero_stage}, now "
            f"there are {ranks} under ZeRO-{zero_stage}: DeepSpeed converts the states of AdamW, not those of Muon; "
            "restore both, or pass --fresh to train anew"
        )
    target = checkpoint.directory.with_name(checkpoint.directory.name + _UNIVERSAL)
    shutil.rmtree(target, ignore_errors=True)
    logger.info(
        "converting %s: saved by %d ranks under ZeRO-%d, resumed by %d under ZeRO-%d",
        checkpoint.directory, checkpoint.ranks, checkpoint.zero_stage, ranks, zero_stage,
    )  # fmt: skip
    _to_universal(checkpoint.directory, target)
    if (checkpoint.zero_stage == 3) != (zero_stage == 3):
        _bridge_stages(target, to_zero3=zero_stage == 3)
    if _has_average(checkpoint):
        averaging.add_to_universal(_average(checkpoint), target)
    return target


def _to_universal(saved: Path, target: Path) -> None:
    command = ["-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(saved)]
    command += ["--output_folder", str(target), "--inject_missing_state"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        raise CheckpointError(f"{saved} cannot be converted: {done.stderr.strip()[-2000:]}")


def _has_average(checkpoint: Checkpoint) -> bool:
    return checkpoint.identity.get("train.ema") is not None


def _average(checkpoint: Checkpoint) -> dict[str, Tensor]:
    path = checkpoint.directory / AVERAGE
    if not path.exists():
        raise CheckpointError(
            f"{checkpoint.directory} has no {AVERAGE}, so it is an earlier release's: train on from it, by "
            f"{checkpoint.ranks} ranks under ZeRO-{checkpoint.zero_stage}"
        )
    return load_file(path)


def _bridge_stages(folder: Path, to_zero3: bool) -> None:
    """Store a universal checkpoint's global state where the other kind of stage looks for it.

    Between ZeRO 1 or 2 and ZeRO 3 DeepSpeed 0.19 agrees on little but the tensors' folders. It differs in the name of
    the file with the run's step and schedule, in where the optimizer's step and settings stand, and in whether a tensor
    is stored under a name.
    """
    import deepspeed

    files = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
    found, wanted = files if to_zero3 else reversed(files)
    (folder / found).rename(folder / wanted)
    parameters = [path for path in (folder / "zero").iterdir() if (path / "exp_avg.pt").exists()]
    path = folder / "zero/optimizer_state.pt"
    state = torch.load(path, weights_only=False)
    if to_zero3:
        step = torch.load(parameters[0] / "step.pt", weights_only=False)
        state["optimizer_state_dict"] = {"state": {0: {"step": step}}, "param_groups": state["param_groups"]}
    else:
        state["ds_version"] = deepspeed.__version__
        for parameter in parameters:
            torch.save(state["optimizer_state_dict"]["state"][0]["step"], parameter / "step.pt")
            for tensor in set(parameter.glob("*.pt")) - {parameter / "step.pt"}:
                torch.save({"param": torch.load(tensor)}, tensor)
    torch.save(state, path)


def load(engine: Any, checkpoint: Checkpoint, universal: Path | None, rank: int) -> None:
    """Load it into an engine that was built for it. A collective.

    Args:
        universal: what `reshard` made of it, which is loaded in its place and deleted then.

    Raises:
        CheckpointError: if DeepSpeed finds nothing to load.
    """
    folder = universal or checkpoint.directory
    path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if path is None:
        raise CheckpointError(f"{folder} cannot be loaded; pass --fresh to train anew")
    follow_schedule(engine.lr_scheduler)
    if universal is not None:
        if _has_average(checkpoint):
            averaging.load_universal(engine, folder)
        for weights, state in engine.basic_optimizer.state.items():
            # ZeRO-3 gives all its parts one counter, which each would advance; and it is to be where the weights are.
            state["step"] = state["step"].clone().to(weights.device)
    torch.distributed.barrier()
    if universal is not None and rank == 0:
        shutil.rmtree(folder)
        (folder.parent / "latest_universal").unlink(missing_ok=True)


def best(directory: Path) -> Checkpoint | None:
    """The measured checkpoint with the highest score, the earlier of equals; None where none was measured."""
    found = [checkpoint for folder in _folders(directory) if (checkpoint := Checkpoint.read(folder)) is not None]
    measured = [checkpoint for checkpoint in found if checkpoint.score is not None]
    return max(measured, key=lambda checkpoint: (checkpoint.score, -checkpoint.step), default=None)


def whole_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The student's weights in a checkpoint, float32 where they were trained, by the names that the model has; their
    moving average, in the dtype of the training, where the run keeps one.

    Raises:
        CheckpointError: if the average is missing, DeepSpeed cannot put them together, or a file would run code.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = checkpoint.directory
    if _has_average(checkpoint):
        return _average(checkpoint)
    for path in sorted(folder.rglob("*.pt")):
        if (problem := _code_in(path)) is not None:
            raise CheckpointError(f"{folder}: {problem}, so it is not of this project's training; train it anew here")
    try:
        if checkpoint.zero_stage == 0:
            state = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)["module"]
        else:
            state = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    return {name.removeprefix("model."): value for name, value in state.items()}


def _folders(directory: Path) -> list[Path]:
    """Folders of checkpoints, the newest first."""
    found = [path for path in directory.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=lambda path: -int(path.name.removeprefix("step-")))
