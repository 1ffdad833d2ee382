from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed

from shared.config import load_config
from shared.errors import CheckpointError
from shared.files import write_json
from student.training.checkpoint import COMPLETE, complete, damage, prune, require_same_run, run_identity, save

DEMO = Path("configs/demo.yaml")


def test_what_does_not_change_the_result_does_not_change_the_identity() -> None:
    plain = run_identity(load_config(DEMO), {"prepared data": "abc"})
    assert (
        run_identity(
            load_config(DEMO, ["train.checkpoint_steps=7", "train.keep_checkpoints=9"]), {"prepared data": "abc"}
        )
        == plain
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [("train.learning_rate=1.0", r"train.learning_rate: .* there, 1.0 now"), ("seed=5", "seed: 0 there, 5 now")],
)
def test_another_run_is_refused_with_both_values(override: str, message: str) -> None:
    found = run_identity(load_config(DEMO), {"prepared data": "abc"})
    with pytest.raises(CheckpointError, match=message):
        require_same_run(found, run_identity(load_config(DEMO, [override]), {"prepared data": "abc"}), Path("x"))


def test_other_data_are_another_run_and_another_number_of_ranks_is_not() -> None:
    found = run_identity(load_config(DEMO), {"prepared data": "abc"})
    with pytest.raises(CheckpointError, match=r"\(prepared data: 'abc' there, 'xyz' now\)"):
        require_same_run(found, run_identity(load_config(DEMO), {"prepared data": "xyz"}), Path("x"))
    elsewhere = load_config(DEMO, ["train.world_size=5", "train.deepspeed=zero3.json", "train.micro_batch=1"])
    require_same_run(found, run_identity(elsewhere, {"prepared data": "abc"}), Path("x"))


IDENTITY = {"seed": 0}


def write_checkpoint(directory: Path, step: int, **changes: Any) -> Path:
    """A folder as `save` leaves it, of two files."""
    folder = directory / f"step-{step}"
    folder.mkdir(parents=True)
    for name in ("model.pt", "optimizer.pt"):
        torch.save({"weight": torch.arange(2000.0)}, folder / name)
    sizes = {name: (folder / name).stat().st_size for name in ("model.pt", "optimizer.pt")}
    record = {"step": step, "ranks": 2, "zero_stage": 2, "identity": IDENTITY, "sizes": sizes}
    write_json(folder / COMPLETE, record | changes)
    return folder


def test_the_newest_whole_one_comes_first_and_an_interrupted_save_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (9, 100, 20):
        write_checkpoint(tmp_path, step)
    (tmp_path / "step-100" / COMPLETE).unlink()
    (tmp_path / "latest").write_text("step-7")  # DeepSpeed's, of an earlier version: not asked
    assert [found.step for found in complete(tmp_path, IDENTITY)] == [20, 9]
    assert f"step-100 has no {COMPLETE}: its save was interrupted or" in caplog.text
    assert complete(tmp_path / "nothing", IDENTITY) == []


def test_what_interrupted_saves_and_conversions_left_goes_with_the_checkpoints_that_are_not_kept(
    tmp_path: Path,
) -> None:
    for step, score in ((10, 1.2), (20, 1.4), (30, 1.3), (35, None), (40, 1.1), (50, 1.0), (60, None)):
        write_checkpoint(tmp_path, step, score=score)
    for step in (35, 60):  # 60 is after the newest whole one: a run that goes on may be writing it
        (tmp_path / f"step-{step}" / COMPLETE).unlink()
    (tmp_path / "step-30-universal").mkdir()
    prune(tmp_path, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {"step-20", "step-40", "step-50", "step-60"}


def test_a_checkpoint_of_another_run_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 5, identity={"seed": 3})
    with pytest.raises(
        CheckpointError, match=r"step-5 was trained with other settings or inputs \(seed: 3 there, 0 now"
    ):
        complete(tmp_path, IDENTITY)


@pytest.mark.parametrize("kind", ["truncated", "missing", "flipped", "longer"])
def test_every_kind_of_damage_is_found_by_the_rank_that_looks(tmp_path: Path, kind: str) -> None:
    path = write_checkpoint(tmp_path, 5) / "optimizer.pt"
    (found,) = complete(tmp_path, IDENTITY)
    assert list(damage(found, 0, 1)) == []
    data = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(data[:-100])
    elif kind == "longer":
        path.write_bytes(data + b"0")
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    expected = {
        "missing": "optimizer.pt is missing",
        "truncated": f"optimizer.pt has {len(data) - 100} bytes, expected {len(data)}",
        "longer": f"optimizer.pt has {len(data) + 1} bytes, expected {len(data)}",
        "flipped": "optimizer.pt does not read back",
    }
    (problem,) = damage(found, 0, 1)
    assert expected[kind] in problem
    assert list(damage(found, 0, 2)) == []
    assert list(damage(found, 1, 2)) == [problem]


def save_in_two_ranks(rank: int, port: int, directory: Path) -> None:
    """Rank 1 of the engine is slow in its first save and dies in its second."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)

    def write(directory: str, tag: str, save_latest: bool) -> None:
        assert not save_latest
        (Path(directory) / tag).mkdir(parents=True, exist_ok=True)
        if rank == 1:
            multiprocessing.Event().wait(1)
            assert not (Path(directory) / tag / COMPLETE).exists()
            if tag == "step-2":
                os._exit(9)
        torch.save(torch.zeros(9), Path(directory, tag, f"rank-{rank}.pt"))

    engine = SimpleNamespace(save_checkpoint=write, zero_optimization_stage=lambda: 1)
    save(engine, directory, 1, IDENTITY, 1, rank)
    save(engine, directory, 2, IDENTITY, 1, rank)


def test_a_checkpoint_is_complete_when_the_slowest_rank_is_done(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=save_in_two_ranks, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert ranks[1].exitcode == 9
    assert ranks[0].exitcode != 0
    (found,) = complete(tmp_path, IDENTITY)
    assert found.step == 1
    assert found.sizes.keys() == {"rank-0.pt", "rank-1.pt"}
    assert list(damage(found, 0, 1)) == []
