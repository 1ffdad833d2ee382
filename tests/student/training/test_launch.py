"""Whoever starts the ranks, `student train` finds out which rank it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.errors import ConfigError
from student.training import launch

SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu-1,gpu-2",
    "SLURM_JOB_ID": "1234567",
}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", *SLURM):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_by_hand_a_process_is_no_rank() -> None:
    assert not launch.is_rank()


def test_a_batch_script_or_a_shell_under_slurm_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert not launch.is_rank()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # srun --pty bash
    assert not launch.is_rank()


def test_a_task_of_srun_is_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert launch.is_rank()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ[name] for name in names] == ["5", "8", "0", "gpu-1", "24567"]  # no GPU here: device 0


def test_nodes_that_run_the_command_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PET_NNODES", raising=False)
    assert launch.nodes_by_hand() == 1
    monkeypatch.setenv("PET_NNODES", "2")
    assert launch.nodes_by_hand() == 2
    for value in ("1:4", "0", ""):
        monkeypatch.setenv("PET_NNODES", value)
        with pytest.raises(ConfigError, match=f"PET_NNODES is '{value}': expected how many nodes"):
            launch.nodes_by_hand()


def test_ranks_of_this_node(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    assert launch.ranks_of_node(8) == 8
    for name, value in (("SLURM_STEP_TASKS_PER_NODE", "4(x2)"), ("LOCAL_SIZE", "2"), ("LOCAL_WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
        assert launch.ranks_of_node(8) == int(value[0])


def test_the_first_host_of_a_compressed_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\necho gpu03\necho gpu04\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert launch.first_host("gpu[03-04]") == "gpu03"
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=r"cannot name the first of the nodes gpu\[03-04\] .*; set MASTER_ADDR"):
        launch.first_host("gpu[03-04]")
