"""The real runners with a real vLLM: whoever dies, and however many work at once, the dataset is one process's."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from shared.dataset.reader import Dataset
from shared.dataset.records import Record
from shared.stopping import REQUEUE_EXIT_CODE
from tests.fixtures.random_teacher import save_random_teacher, write_run
from tests.teacher.conftest import write_config

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.usefixtures("warm_serving")]

ROOT = Path(__file__).parents[2]
TOLERANCE = 1 / 16 + 2e-3  # other batches round other last bits, which may turn a stored gap into the next one
LENGTH = 48
PROMPTS = 60


class Run:
    """A dataset, the processes that work on it, and the units that each of them published."""

    def __init__(self, folder: Path, base: Path, name: str) -> None:
        decoding = [
            {"split": "train", "temperature": 0, "max_response_tokens": LENGTH},
            {"split": "train", "temperature": 1, "max_response_tokens": LENGTH},
            {"split": "held_out", "temperature": 0, "max_response_tokens": LENGTH},
        ]
        self.config = write_run(base, name, decoding=decoding)
        self.shards = folder / "runs" / name / "shards"
        self.logs = [folder / f"{name}-{i}.log" for i in range(12)]
        self.started = 0

    def start(self, *arguments: str, cli: str = "teacher.cli", command: str = "collect") -> subprocess.Popen[bytes]:
        """`teacher …` in a process group of its own."""
        started = [sys.executable, "-m", cli, command, str(self.config), "--log-level", "debug", *arguments]
        with self.logs[self.started].open("wb") as log:
            self.started += 1
            # Ray would print one of two actors' similar lines.
            environment = os.environ | {"RAY_DEDUP_LOGS": "0"}
            return subprocess.Popen(started, cwd=ROOT, stdout=log, stderr=log, env=environment, start_new_session=True)

    def commits(self) -> int:
        return len(list((self.shards / "commits").glob("*.json")))

    def wait_for_commits(self, number: int, *processes: subprocess.Popen[bytes]) -> None:
        until = time.monotonic() + 600
        while self.commits() < number:
            assert time.monotonic() < until, self.said()
            assert all(process.poll() is None for process in processes), self.said()
            time.sleep(0.02)

    def said(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in self.logs if log.exists())

    def published(self) -> list[str]:
        """The units that a process published, once for each time that one did."""
        return re.findall(r"unit ([\w.-]+): \d+ responses", self.said())


@pytest.fixture(scope="module")
def base(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runners")
    return write_config(folder, save_random_teacher(tiny_checkpoint, folder / "teacher"), prompts=PROMPTS)


@pytest.fixture(scope="module")
def whole(base: Path) -> Run:
    """What one process collects in one go."""
    run = Run(base.parent, base, "whole")
    assert run.start().wait(600) == 0, run.said()
    return run


def records(run: Run) -> dict[str, Record]:
    return {record.sample_id: record for record in Dataset.open(run.shards).records()}


def assert_same(whole: Run, run: Run) -> None:
    """The same records, and all of `assert_whole`."""
    assert_whole(whole, run)
    ours, theirs = records(whole), records(run)
    for key, record in ours.items():
        again = theirs[key]
        np.testing.assert_array_equal(record.response_ids, again.response_ids)
        assert record.distributions is not None
        assert again.distributions is not None
        np.testing.assert_allclose(record.distributions.sampled, again.distributions.sampled, atol=TOLERANCE)


def assert_whole(whole: Run, run: Run) -> None:
    """Records of the same names, nothing left over, and no unit published twice."""
    assert list(records(whole)) == list(records(run))
    names = [sorted(str(p.relative_to(one.shards)) for p in one.shards.rglob("*")) for one in (whole, run)]
    assert names[0] == names[1]
    assert len(run.published()) == len(set(run.published()))
    assert "Traceback" not in run.said()


@contextmanager
def ended(*processes: subprocess.Popen[bytes]) -> Iterator[None]:
    """Ends what a failed test leaves behind."""
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def test_two_collectors_share_the_units_and_one_that_is_killed_is_replaced(whole: Run, base: Path) -> None:
    run = Run(base.parent, base, "two")
    first, second = run.start(), run.start()
    with ended(first, second):
        run.wait_for_commits(5, first, second)
        second.kill()
        second.wait()
        third = run.start()
        with ended(third):
            assert first.wait(600) == 0, run.said()
            assert third.wait(600) == 0, run.said()
    assert_same(whole, run)
    assert len(run.published()) >= len(Dataset.open(run.shards).manifest.units) - 4  # the killed one logs late


def test_two_array_tasks_stopped_and_interrupted(whole: Run, base: Path) -> None:
    run = Run(base.parent, base, "array")
    stopped, interrupted = run.start("--shard", "1/2"), run.start("--shard", "0/2")
    with ended(stopped, interrupted):
        run.wait_for_commits(3, stopped, interrupted)
        stopped.send_signal(signal.SIGTERM)
        interrupted.send_signal(signal.SIGINT)
        assert stopped.wait(60) == REQUEUE_EXIT_CODE, run.said()
        assert interrupted.wait(60) not in (0, REQUEUE_EXIT_CODE), run.said()
    assert not (run.shards / "manifest.json").exists()
    again = [run.start("--shard", f"{i}/2") for i in (1, 0)]
    with ended(*again):
        assert [process.wait(600) for process in again] == [0, 0], run.said()
    assert_same(whole, run)


def test_a_ray_driver_that_is_stopped_is_gone_on_with(whole: Run, base: Path) -> None:
    """Its actors' engine is scripted, which starts at once."""
    pytest.importorskip("ray")
    run = Run(base.parent, base, "ray_scripted")
    launch = ("--runner", "ray", "--workers", "2")
    driver = run.start(*launch, cli="tests.teacher.scripted_ray")
    with ended(driver):
        run.wait_for_commits(4, driver)
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(120) == REQUEUE_EXIT_CODE, run.said()
    driver = run.start(*launch, cli="tests.teacher.scripted_ray")
    with ended(driver):
        assert driver.wait(600) == 0, run.said()
    assert_whole(whole, run)


def test_a_worker_on_ray_gives_the_records_of_one_here(whole: Run, base: Path) -> None:
    """With the real engine; `test_ray_pool.py` has what becomes of workers that die."""
    pytest.importorskip("ray")
    run = Run(base.parent, base, "ray")
    driver = run.start("--runner", "ray", "--workers", "1")
    with ended(driver):
        assert driver.wait(600) == 0, run.said()
    assert_same(whole, run)


def test_a_finished_run_is_not_started_again(whole: Run) -> None:
    before, number = (whole.shards / "manifest.json").read_bytes(), whole.started
    started = time.monotonic()
    assert whole.start().wait(600) == 0, whole.said()
    assert time.monotonic() - started < 60
    output = whole.logs[number].read_text()
    assert "0 to collect" in " ".join(output.split())
    assert "vLLM" not in output
    assert (whole.shards / "manifest.json").read_bytes() == before


def test_the_summary_is_measured(whole: Run) -> None:
    summary = json.loads((whole.shards.parent / "collect.json").read_text())
    found = records(whole)
    assert summary["responses"] == len(found)
    assert 1.5 * PROMPTS < len(found) < 2 * PROMPTS  # those in training two times
    assert summary["tokens"] == sum(len(record.response_ids) for record in found.values())
    assert summary["tokens_per_s"] > 0
    kept = [record.distributions.tail for record in found.values() if record.distributions is not None]
    assert summary["mean_topk_mass"] == pytest.approx(1 - np.concatenate(kept).mean(), abs=1e-3)
    assert summary["capture_ratio"] is None  # it was not asked for


def test_a_scored_dataset_has_the_collected_rows(whole: Run, base: Path) -> None:
    run = Run(base.parent, base, "scored")
    process = run.start("--set", f"collect.responses={whole.shards}", command="score")
    with ended(process):
        assert process.wait(600) == 0, run.said()
    ours, theirs = records(whole), records(run)
    assert ours.keys() == theirs.keys()
    for key, record in ours.items():
        again = theirs[key]
        np.testing.assert_array_equal(record.response_ids, again.response_ids)
        assert (record.sampling, record.finish_reason) == (again.sampling, again.finish_reason)
        assert record.distributions is not None
        assert again.distributions is not None
        np.testing.assert_allclose(record.distributions.sampled, again.distributions.sampled, atol=TOLERANCE)
