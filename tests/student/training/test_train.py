"""Training as its user runs it: `student train`, real DeepSpeed, two ranks, on the toy teacher's shards."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared.config import PipelineConfig, load_config
from shared.errors import CheckpointError, StaleError
from shared.stopping import REQUEUE_EXIT_CODE
from student.alignment.prepare import prepare
from student.evaluation.evaluate import evaluate
from student.model.export import export_student
from student.model.initialize import initialize_student
from student.training.checkpoint import complete, run_identity
from student.training.train import forget
from tests.fixtures.ranks import wait_for_lines
from tests.fixtures.toy_run import toy_config, write_toy_shards
from tests.fixtures.warm import COLD

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("warm_training")]

KILLS = int(os.environ.get("TRAINING_KILLS", "1"))
"""SIGKILLs; TRAINING_KILLS=20 is the run of the record."""
WHOLE = ("train.world_size=2", f"train.steps={max(40, 8 * KILLS)}")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy run up to and with its prepared targets."""
    directory = tmp_path_factory.mktemp("toy")
    config = load_config(toy_config(directory))
    write_toy_shards(config)
    initialize_student(config)
    prepare(config)
    return directory


def copied(prepared: Path, directory: Path) -> Path:
    """A copy of that run to train in; the config's path."""
    shutil.copytree(prepared / "runs", directory / "runs")
    shutil.copytree(prepared / "teacher", directory / "teacher")
    return toy_config(directory)


@pytest.fixture
def run(prepared: Path, tmp_path: Path) -> Path:
    return copied(prepared, tmp_path)


@pytest.fixture(scope="module")
def whole(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Metrics and weights of the run WHOLE that nothing interrupts; for one group, so that one worker trains it."""
    path = copied(prepared, tmp_path_factory.mktemp("whole"))
    train(path, *WHOLE)
    return metrics(path), weights(load_config(path))


def command(path: Path, overrides: Sequence[str], python: str | None = None) -> list[str]:
    options = [word for override in overrides for word in (["--set"] if "=" in override else []) + [override]]
    return [python or sys.executable, "-m", "student.cli", "train", str(path), *options]


def train(path: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command(path, overrides), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done


def metrics_of(config: PipelineConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


def metrics(path: Path, *overrides: str) -> list[dict[str, Any]]:
    """Without what a clock or the machine says."""
    entries = metrics_of(load_config(path, list(overrides)))
    clocks = ("time", "tokens_per_s", "eta_s", "seconds", "data_wait", "host_gib")
    return [{key: value for key, value in entry.items() if key not in clocks} for entry in entries]


def weights(config: PipelineConfig) -> dict[str, torch.Tensor]:
    return load_file(config.student_final_dir / "model.safetensors")


def test_a_hybrid_loss_trains_on_two_ranks(run: Path) -> None:
    done = train(run, "train.loss=hybrid", "train.world_size=2", "train.steps=40")
    assert "loss: hybrid, as train.loss says" in " ".join(done.stderr.split())
    losses = [entry["loss"] for entry in metrics(run)]
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    # The student comes closer to both the text and the teacher.
    first, last = metrics(run)[0], metrics(run)[-1]
    assert last["ce"] < 0.75 * first["ce"]
    assert last["kl"] < 0.75 * first["kl"]


def test_ranks_micro_batches_and_zero_stage_change_nothing(run: Path) -> None:
    """Gradients are compared by their norms: Adam's steps hide a scale."""
    zero3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    found = []
    for layout in (
        ("train.world_size=1", "train.micro_batch=4"),
        ("train.world_size=2", "train.micro_batch=1", f"train.deepspeed={json.dumps(zero3)}"),
    ):
        train(run, "train.steps=12", *layout)
        found.append(torch.tensor([(entry["loss"], entry["grad_norm"]) for entry in metrics(run)]))
        shutil.rmtree(load_config(run).student_final_dir)
    torch.testing.assert_close(found[1][:, 0], found[0][:, 0], rtol=1e-4, atol=0)
    torch.testing.assert_close(found[1][:, 1], found[0][:, 1], rtol=1e-3, atol=0)


def interrupt(path: Path, overrides: Sequence[str], step: int) -> None:
    """Start training and kill every process of it once the checkpoint of `step` is complete."""
    complete = load_config(path).checkpoints_dir / f"step-{step}/complete.json"
    with subprocess.Popen(
        command(path, overrides),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        deadline = time.monotonic() + 300
        while not complete.exists():
            assert process.poll() is None, "training ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        # A launcher's ranks are not in its process group: each is killed by name, as a node's failure would.
        for started in (*psutil.Process(process.pid).children(recursive=True), process):
            started.kill()
        process.communicate()  # until the last of them is gone


def assert_as_never_stopped(path: Path, whole: tuple[list[dict[str, Any]], dict[str, Any]]) -> None:
    """The same metrics, and the same weights to the bit."""
    assert metrics(path) == whole[0]
    resumed = weights(load_config(path))
    assert resumed.keys() == whole[1].keys()
    for name, value in whole[1].items():
        assert torch.equal(resumed[name], value), name


def test_killed_damaged_and_resumed_equals_never_killed(
    run: Path, whole: tuple[list[dict[str, Any]], dict[str, Any]]
) -> None:
    """The newest checkpoints are cut off, so the one before them is what is resumed."""
    overrides = (*WHOLE, "train.checkpoint_steps=10", "train.keep_checkpoints=9")
    config = load_config(run)
    interrupt(run, overrides, step=20)
    assert not config.student_final_dir.exists()
    for folder in config.checkpoints_dir.glob("step-[234]0"):
        part = next(folder.glob("zero_pp_rank_1_*optim_states.pt"))
        part.write_bytes(part.read_bytes()[:-1000])

    log = "".join(train(run, *overrides).stderr.split())  # a long path is broken anywhere
    assert "step-20isdamaged(zero_pp_rank_1_mp_rank_00_optim_states.pthas" in log
    assert "resumingafterstep10of" in log
    assert_as_never_stopped(run, whole)


def test_a_run_goes_on_with_other_ranks_and_another_stage(run: Path, tmp_path: Path) -> None:
    """One run under ZeRO-2 by two ranks, and one that is moved three times before it ends."""
    stages = {stage: tmp_path / f"zero{stage}.json" for stage in (1, 3)}
    for stage, path in stages.items():
        settings = {"stage": stage, "stage3_param_persistence_threshold": 0} if stage == 3 else {"stage": stage}
        path.write_text(json.dumps({"zero_optimization": settings}))
    steps = ("train.steps=16", "train.checkpoint_steps=4", "train.global_batch=6", "train.ema=0.9")
    train(run, "train.world_size=2", *steps)
    config = load_config(run)
    average = weights(config)
    whole = torch.tensor([entry["loss"] for entry in metrics(run)])
    forget(config)

    interrupt(run, ("train.world_size=2", *steps), step=4)
    interrupt(run, ("train.world_size=3", *steps), step=8)
    interrupt(run, ("train.world_size=2", f"train.deepspeed={stages[3]}", *steps), step=12)
    log = " ".join(train(run, "train.world_size=1", f"train.deepspeed={stages[1]}", *steps).stderr.split())
    assert "saved by 2 ranks under ZeRO-3, resumed by 1 under ZeRO-1" in log
    assert "resuming after step 12 of 16" in log
    assert [entry["step"] for entry in metrics(run)] == list(range(1, 17))
    losses = torch.tensor([entry["loss"] for entry in metrics(run)])
    torch.testing.assert_close(losses, whole, rtol=1e-3, atol=0)
    # The average came along: what is published is as near to it as the weights of two such runs are.
    torch.testing.assert_close(weights(config), average, rtol=0, atol=1e-4)
    assert not list(config.checkpoints_dir.glob("*universal*"))


def test_a_run_that_diverges_ends_with_what_to_try(run: Path) -> None:
    overrides = ("train.world_size=2", "train.learning_rate=1e30", "train.warmup=0", "train.max_skipped_steps=2")
    done = subprocess.run(command(run, overrides), capture_output=True, text=True)
    assert done.returncode != 0
    said = " ".join(done.stderr.split())
    assert "step 2 is skipped, 1 of at most 2: the loss is not finite over the samples sample-" in said
    assert "error: 3 steps were skipped for NaN or Inf, train.max_skipped_steps is 2." in said
    assert "lower train.learning_rate (now 1e+30)" in said
    entries = metrics(run)
    assert [entry["skipped"] for entry in entries] == [0, 1, 2, 3]
    assert [entry["loss"] is None for entry in entries] == [False, True, True, True]
    assert not load_config(run).student_final_dir.exists()


def test_muon_does_not_go_on_with_other_ranks(run: Path) -> None:
    steps = ("train.optimizer=muon", "train.steps=40", "train.checkpoint_steps=2")
    interrupt(run, ("train.world_size=2", *steps), step=2)
    refused = subprocess.run(command(run, ("train.world_size=1", *steps)), capture_output=True, text=True)
    assert refused.returncode == 2
    assert "DeepSpeed converts the states of AdamW, not those of Muon; restore both" in " ".join(refused.stderr.split())


def launched(path: Path, *launcher: str, options: Sequence[str] = (), **environment: str) -> subprocess.Popen[str]:
    """`student train`, started by `launcher`, or as it is."""
    program = [*launcher, "student.cli", "train", str(path), *options]
    return subprocess.Popen(
        program,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_every_launcher_starts_the_same_run(run: Path) -> None:
    config = load_config(run)
    options = ["--set", "train.steps=3"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    agent = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1"]
    nodes = ["--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
    bin_dir = Path(COLD).parent
    deepspeed = ["--num_accelerators=2", f"--master_port={port}"]
    path = {"PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}"}
    slurm = {
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_JOB_ID": "1", "MASTER_PORT": port,
    }  # fmt: skip
    by_hand = [sys.executable, "-m"]
    launchers: dict[str, Callable[[], list[subprocess.Popen[str]]]] = {
        "two torchrun agents": lambda: [
            launched(run, *agent, *nodes, f"--node-rank={node}", "-m", options=options) for node in range(2)
        ],
        "deepspeed, no local rank": lambda: [
            launched(
                run,
                *by_hand,
                "deepspeed.launcher.runner",
                *deepspeed,
                "--no_local_rank",
                "--module",
                options=options,
                **path,
            )
        ],
        "srun": lambda: [
            launched(run, *by_hand, options=options, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), **slurm)
            for rank in range(2)
        ],
    }
    losses = {}
    for name, start in launchers.items():
        shutil.rmtree(config.student_final_dir, ignore_errors=True)
        started = start()
        outputs = [process.communicate(timeout=300)[0] for process in started]
        assert [process.returncode for process in started] == [0] * len(started), f"{name}: {outputs}"
        losses[name] = [entry["loss"] for entry in metrics(run)]
        assert json.loads((config.student_final_dir / "training.json").read_text())["steps"] == 3
    assert all(of_launcher == losses["srun"] for of_launcher in losses.values()), losses


def test_a_finished_run_is_left_alone_and_other_settings_are_refused(run: Path) -> None:
    log = " ".join(train(run, "train.steps=3").stderr.split())
    assert "auto chose kl: the training records hold teacher distributions" in log
    published = load_config(run).student_final_dir / "model.safetensors"
    stamp = published.stat().st_mtime_ns
    assert "already trained" in train(run, "train.steps=3").stderr
    assert published.stat().st_mtime_ns == stamp
    for steps, message in ((2, "train.steps: 3 there, 2 now"), (4, "left no checkpoint to go on from")):
        refused = subprocess.run(command(run, [f"train.steps={steps}"]), capture_output=True, text=True)
        assert refused.returncode == 2
        assert message in " ".join(refused.stderr.split())
    assert published.stat().st_mtime_ns == stamp


def test_a_finished_run_is_made_longer_from_its_last_checkpoint(run: Path) -> None:
    """With a constant rate to the bit as if it had been that long; with another the log says what it is instead."""
    config = load_config(run)
    steps = ("train.schedule=constant", "train.warmup=0", "train.checkpoint_steps=4")
    train(run, *steps, "train.steps=14")
    whole, whole_weights = metrics(run), weights(config)
    train(run, *steps, "train.steps=6", "--fresh")
    log = " ".join(train(run, *steps, "train.steps=14").stderr.split())
    assert "a run of 6 steps is made one of 14: the same as if it had been that long" in log
    assert "resuming after step 6 of 14" in log
    without = [{key: value for key, value in entry.items() if key != "steps"} for entry in metrics(run)]
    assert without == [{key: value for key, value in entry.items() if key != "steps"} for entry in whole]
    assert all(torch.equal(weights(config)[name], value) for name, value in whole_weights.items())
    assert [path.name for path in config.checkpoints_dir.glob("step-*")] == ["step-14"]
    # Killed on its way, it goes on with the rest; until it ends there is the model of 14 steps.
    interrupt(run, (*steps, "train.steps=40"), step=16)
    assert (config.student_final_dir / "model.safetensors").exists()
    assert "resuming after step" in train(run, *steps, "train.steps=40").stderr
    assert [entry["step"] for entry in metrics(run)] == list(range(1, 41))

    cosine = ("train.checkpoint_steps=4", "train.schedule=cosine")
    train(run, *cosine, "train.steps=6", "--fresh")
    rates = [entry["learning_rate"] for entry in metrics(run)]
    log = " ".join(train(run, *cosine, "train.epochs=4", "train.steps=null").stderr.split())
    assert "after step 6 the learning rate follows the cosine schedule of" in log
    longer = [entry["learning_rate"] for entry in metrics(run)]
    assert longer[:6] == rates
    steps = len(longer)
    warmed = round(0.05 * steps)  # train.warmup
    expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (6 - warmed) / (steps - warmed)))
    assert longer[6] == pytest.approx(expected * max(longer), rel=1e-6)


def test_checkpoints_are_measured_the_best_is_kept_and_exported(run: Path, tmp_path: Path) -> None:
    overrides = (
        "train.world_size=2", "train.steps=40", "train.checkpoint_steps=5", "train.keep_checkpoints=1",
        "train.evaluate_checkpoints=true", "train.patience=2", "train.publish=best", "train.min_learning_rate=1",
        "train.trackers=[tensorboard]",
    )  # fmt: skip
    train(run, *overrides)
    config = load_config(run, list(overrides))
    entries = metrics_of(config)
    taus = {entry["step"]: entry["evaluation"]["tau"] for entry in entries if "evaluation" in entry}
    leader = max(taus, key=lambda step: (taus[step], -step))
    published = json.loads((config.student_final_dir / "training.json").read_text())
    kept = {int(path.name.removeprefix("step-")) for path in config.checkpoints_dir.glob("step-*")}
    assert leader in kept or leader == entries[-1]["step"]
    assert len(kept) <= 2
    # What is published drafts as well as the best checkpoint did when it was measured, on two ranks.
    alone = load_config(run, [*overrides, "train.world_size=1"])
    assert evaluate(alone)["after"]["tau"] == pytest.approx(taus[leader], abs=1e-9)
    if "published_step" in published:
        assert published["published_step"] == leader
        target = export_student(config.run_dir, tmp_path / "exported", checkpoint=leader)
        exported = load_file(target / "model.safetensors")
        assert all(torch.equal(exported[name], value) for name, value in weights(config).items())
    with pytest.raises(CheckpointError, match="step-999 is no whole checkpoint; there are step-"):
        export_student(config.run_dir, tmp_path / "none", checkpoint=999)
    # TensorBoard's own reader finds every step.
    events = EventAccumulator(str(next((config.run_dir / "tracking").rglob("events.*")).parent))
    events.Reload()
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == [entry["step"] for entry in entries]
    assert losses[3].value == pytest.approx(entries[3]["loss"])
    assert {"grad_norm", "seconds/step", "data_wait", "host_gib", "match_by_depth/1", "grad_zeros"} <= set(
        events.Tags()["scalars"]
    )


def test_the_average_is_what_is_measured_and_exported_and_dropout_survives_an_interruption(
    run: Path, tmp_path: Path
) -> None:
    overrides = [
        "train.world_size=2", "train.steps=8", "train.checkpoint_steps=4", "train.evaluate_checkpoints=true",
        "train.ema=0.8", "train.learning_rate=0.02", "student.lora={rank: 4, alpha: 8, dropout: 0.3}",
    ]  # fmt: skip
    train(run, *overrides)
    config = load_config(run, overrides)
    entries, trained = metrics(run), weights(config)
    measured = entries[-1]["evaluation"]
    figures = evaluate(load_config(run, [*overrides, "train.world_size=1"]))
    assert measured["ce"] == pytest.approx(figures["after"]["ratio"]["ce"], rel=1e-6)
    target = export_student(config.run_dir, tmp_path / "exported", checkpoint=8)
    assert all(torch.equal(load_file(target / "model.safetensors")[name], value) for name, value in trained.items())
    assert json.loads((target / "training.json").read_text())["published_step"] == 8
    assert (target / "token_counts.npy").read_bytes() == (config.student_final_dir / "token_counts.npy").read_bytes()
    start = config.student_init_dir / "model.safetensors"
    kept = start.read_bytes()
    save_file({name: value + 1 for name, value in load_file(start).items()}, start, {"format": "pt"})
    with pytest.raises(StaleError, match=r"step-8.*start"):
        export_student(config.run_dir, tmp_path / "exported", checkpoint=8)
    start.write_bytes(kept)

    forget(config)
    interrupt(run, overrides, step=4)
    train(run, *overrides)
    assert [entry["loss"] for entry in metrics(run)] == [entry["loss"] for entry in entries]
    assert all(torch.equal(weights(config)[name], value) for name, value in trained.items())


def test_a_signal_in_the_step_in_which_patience_ends_changes_nothing(run: Path) -> None:
    """Nothing is learnt, so that the second measured checkpoint is no better: training ends at step 4."""
    overrides = [
        "train.world_size=1", "train.steps=20", "train.checkpoint_steps=2", "train.evaluate_checkpoints=true",
        "train.patience=1", "train.learning_rate=1e-30",
    ]  # fmt: skip
    stopped_in_step_4 = (
        "import os, signal, sys\n"
        "from student.training import loop\n"
        "step = loop.TrainingRun.step\n"
        "def stopped(self, n):\n"
        "    if n == 3:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return step(self, n)\n"
        "loop.TrainingRun.step = stopped\n"
        "from pathlib import Path\n"
        "from shared.config import load_config\n"
        "from student.training.train import train\n"
        "train(load_config(Path(sys.argv[1]), sys.argv[2:]))\n"
    )
    subprocess.run([sys.executable, "-c", stopped_in_step_4, str(run), *overrides], check=True)
    config = load_config(run, overrides)
    assert len(metrics(run)) == 4
    # Killed between the checkpoint and the model: what is left is to publish it.
    shutil.rmtree(config.student_final_dir)
    train(run, *overrides)
    assert len(metrics(run)) == 4
    assert (config.student_final_dir / "model.safetensors").exists()
    # Scores by another rule are not compared with these.
    with pytest.raises(CheckpointError, match=r"evaluate\.draft_tokens: 3 there, 2 now"):
        complete(config.checkpoints_dir, run_identity(load_config(run, [*overrides, "evaluate.draft_tokens=2"]), {}))


def test_a_signal_saves_and_ends_with_the_code_for_requeue(
    run: Path, whole: tuple[list[dict[str, Any]], dict[str, Any]]
) -> None:
    overrides = (*WHOLE, "train.checkpoint_steps=1000")
    config = load_config(run)
    with subprocess.Popen(
        command(run, overrides), stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as process:
        wait_for_lines(config.run_dir / "metrics.jsonl", 3, process)
        process.send_signal(signal.SIGUSR1)
        said = " ".join(process.communicate(timeout=300)[1].split())
    assert process.returncode == REQUEUE_EXIT_CODE, said
    assert "SIGUSR1: saved after step" in said
    assert not config.student_final_dir.exists()
    train(run, *overrides)
    assert_as_never_stopped(run, whole)


def test_a_signal_to_one_of_two_nodes_saves_and_ends_both_with_that_code(run: Path) -> None:
    """`student train` by hand on each: torchrun itself would end with 1 on both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"PET_NNODES": "2", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(free.getsockname()[1])}
    options = ["--set", "train.steps=5000"]
    nodes = [launched(run, sys.executable, "-m", options=options, **meeting, PET_NODE_RANK=str(n)) for n in range(2)]
    wait_for_lines(load_config(run).run_dir / "metrics.jsonl", 2, *nodes)
    nodes[1].send_signal(signal.SIGTERM)
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [REQUEUE_EXIT_CODE] * 2, said
    assert "a signal to another rank: saved after step" in " ".join(said[0].split())


def test_a_rank_that_hangs_ends_the_job_with_a_stack(run: Path) -> None:
    overrides = ("train.world_size=2", "train.steps=5000", "train.hang_minutes=0.1", "train.grace_seconds=1")
    with subprocess.Popen(
        command(run, overrides, COLD), stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as process:
        wait_for_lines(load_config(run).run_dir / "metrics.jsonl", 3, process)
        ranks = psutil.Process(process.pid).children()
        ranks[0].suspend()
        said = process.communicate(timeout=120)[1]
    assert process.returncode not in (0, REQUEUE_EXIT_CODE)
    assert "Timeout (0:00:06)!" in said
    assert "in step" in said, "the stack says where it hangs"


def test_what_cannot_be_measured_or_tracked_is_refused(run: Path) -> None:
    zero3 = "train.deepspeed={zero_optimization: {stage: 3}}"
    for message, overrides in {
        "train.trackers: 'tensorbored' is none of": ["train.trackers=[tensorbored]"],
        "train.trackers: wandb is not installed": ["train.trackers=[wandb]"],
        "which no rank has under ZeRO-3": [zero3, "train.evaluate_checkpoints=true", "train.checkpoint_steps=5"],
        "train.patience chooses among measured checkpoints": ["train.patience=3"],
    }.items():
        refused = subprocess.run(command(run, overrides), capture_output=True, text=True)
        assert refused.returncode == 2
        assert message in " ".join(refused.stderr.split())


@pytest.mark.timeout(900 + 120 * KILLS)
def test_killed_at_any_moment_and_started_again_ends_as_if_nothing_had_happened(
    run: Path, whole: tuple[list[dict[str, Any]], dict[str, Any]]
) -> None:
    """Every rank and the launcher, DeepSpeed's, is killed at random moments, saves included; several epochs go by."""
    steps = (*WHOLE, "train.checkpoint_steps=2")
    config = load_config(run, list(steps))
    assert whole[0][-1]["epoch"] > 2

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = [
        *(sys.executable, "-m", "deepspeed.launcher.runner"),
        *("--num_accelerators=2", f"--master_port={port}", "--module"),
    ]
    options = [word for step in steps for word in ("--set", step)]
    path = {"PATH": f"{Path(COLD).parent}{os.pathsep}{os.environ['PATH']}"}
    journal, moments = config.run_dir / "metrics.jsonl", random.Random("deepspeed")
    killed = 0

    def done() -> int:
        return journal.read_text().count("\n") if journal.exists() else 0

    while not config.student_final_dir.exists():
        process = launched(run, *launcher, options=options, **path)
        before = done()
        if killed < KILLS:
            # A run gets ahead by a few steps, then is killed within the time of one or two.
            ahead, deadline = moments.randint(1, 4), time.monotonic() + 300
            while process.poll() is None and done() < before + ahead:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(moments.random() * 0.5)
            ranks = []
            with contextlib.suppress(psutil.NoSuchProcess):
                ranks = psutil.Process(process.pid).children(recursive=True)
            for started in (process, *ranks):
                with contextlib.suppress(psutil.NoSuchProcess):
                    started.kill()
            process.communicate()
            killed += 1
        else:
            output = process.communicate(timeout=600)[0]
            assert process.returncode == 0, output
    assert killed == KILLS
    assert_as_never_stopped(run, whole)
