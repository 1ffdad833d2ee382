"""Training as its user runs it: `student train`, real DeepSpeed, two ranks, on the toy teacher's shards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from shared.config import PipelineConfig, load_config
from student.alignment.prepare import prepare
from student.model.initialize import initialize_student
from tests.fixtures.toy_run import toy_config, write_toy_shards

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy run up to and with its prepared targets."""
    directory = tmp_path_factory.mktemp("toy")
    config = load_config(toy_config(directory))
    write_toy_shards(config)
    initialize_student(config)
    prepare(config)
    return directory


@pytest.fixture
def run(prepared: Path, tmp_path: Path) -> Path:
    """A copy of that run to train in; the config's path."""
    shutil.copytree(prepared / "runs", tmp_path / "runs")
    shutil.copytree(prepared / "teacher", tmp_path / "teacher")
    return toy_config(tmp_path)


def command(path: Path, overrides: Sequence[str]) -> list[str]:
    options = [word for override in overrides for word in ("--set", override)]
    return [sys.executable, "-m", "student.cli", "train", str(path), *options]


def train(path: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command(path, overrides), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done


def metrics(path: Path, *overrides: str) -> list[dict[str, Any]]:
    config = load_config(path, list(overrides))
    entries = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    clocks = ("time", "tokens_per_s", "eta_s")
    return [{key: value for key, value in entry.items() if key not in clocks} for entry in entries]


def weights(config: PipelineConfig) -> dict[str, torch.Tensor]:
    return load_file(config.student_final_dir / "model.safetensors")


@pytest.mark.parametrize("loss", ["ce", "kl", "hybrid"])
def test_each_loss_trains_on_two_ranks(run: Path, loss: str) -> None:
    done = train(run, f"train.loss={loss}", "train.world_size=2", "train.steps=40")
    assert f"loss: {loss}, as train.loss says" in " ".join(done.stderr.split())
    losses = [entry["loss"] for entry in metrics(run)]
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    # Whatever is trained, the student comes closer to both the text and the teacher.
    first, last = metrics(run)[0], metrics(run)[-1]
    assert last["ce"] < 0.75 * first["ce"]
    assert last["kl"] < 0.75 * first["kl"]


def test_ranks_micro_batches_and_zero_stage_change_nothing(run: Path, tmp_path: Path) -> None:
    zero3 = tmp_path / "zero3.json"
    zero3.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    layouts = {
        "one rank": ("train.world_size=1", "train.micro_batch=16"),
        "two ranks": ("train.world_size=2", "train.micro_batch=8"),
        "two ranks, accumulating": ("train.world_size=2", "train.micro_batch=3"),
        "two ranks, ZeRO-3": ("train.world_size=2", "train.micro_batch=8", f"train.deepspeed={zero3}"),
    }
    losses = {}
    for name, overrides in layouts.items():
        train(run, "train.steps=12", *overrides)
        losses[name] = torch.tensor([entry["loss"] for entry in metrics(run)])
        shutil.rmtree(load_config(run).student_final_dir)
    for name, of_layout in losses.items():
        torch.testing.assert_close(of_layout, losses["one rank"], rtol=1e-4, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_killed_and_resumed_equals_never_killed(run: Path) -> None:
    overrides = ("train.world_size=2", "train.steps=60", "train.checkpoint_steps=10")
    train(run, *overrides)
    config = load_config(run)
    whole, whole_weights = metrics(run), weights(config)
    shutil.rmtree(config.student_final_dir)
    (config.run_dir / "metrics.jsonl").unlink()

    with subprocess.Popen(
        command(run, overrides),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        latest = config.checkpoints_dir / "latest"
        deadline = time.monotonic() + 300
        while not (latest.exists() and latest.read_text().strip() == "step-20"):
            assert process.poll() is None, "training ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        # A launcher's ranks are not in its process group: each is killed by name, as a node's failure would.
        for started in (*psutil.Process(process.pid).children(recursive=True), process):
            started.kill()
    assert not config.student_final_dir.exists()

    log = train(run, *overrides).stderr
    assert "resuming after step" in log
    assert metrics(run) == whole
    resumed = weights(config)
    assert resumed.keys() == whole_weights.keys()
    for name, value in whole_weights.items():
        assert torch.equal(resumed[name], value), name


def test_a_finished_run_is_left_alone_and_other_settings_are_refused(run: Path) -> None:
    log = " ".join(train(run, "train.steps=3").stderr.split())
    assert "auto chose kl: the training records hold teacher distributions" in log
    published = load_config(run).student_final_dir / "model.safetensors"
    stamp = published.stat().st_mtime_ns
    assert "already trained" in train(run, "train.steps=3").stderr
    assert published.stat().st_mtime_ns == stamp
    refused = subprocess.run(command(run, ["train.steps=4"]), capture_output=True, text=True)
    assert refused.returncode == 2
    assert "train.steps: 3 there, 4 now" in " ".join(refused.stderr.split())
    assert published.stat().st_mtime_ns == stamp
