"""The pool of actors on a real Ray with a scripted engine, which starts at once; test_runners.py has the real one."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shared.config import PipelineConfig
from shared.dataset.claims import Claims
from shared.dataset.writer import DatasetWriter
from shared.errors import AlignmentError, ConfigError, EngineError
from shared.stopping import StopRequest
from shared.tokenizer.vocabulary import Vocabulary
from teacher.collect import prepare, provenance_of
from teacher.engine import Answer, Request
from teacher.prompts import prompts_fingerprint
from teacher.runners import ray_pool
from teacher.runners.local import Job
from teacher.runners.ray_pool import Replica
from teacher.units import Unit
from tests.teacher.test_collect import ScriptedEngine

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow

Maker = Callable[..., PipelineConfig]


class SlowEngine(ScriptedEngine):
    """A tenth of a second an answer."""

    def stream(self, requests: Iterable[Request], capture: bool = True) -> Iterator[Answer]:
        for answer in super().stream(requests, capture):
            time.sleep(0.1)
            yield answer

    def close(self) -> None:
        pass


class ScriptedReplica(Replica):
    def open_engine(self) -> Any:
        return SlowEngine(top_k=8, window=1)


class LoadingReplica(Replica):
    def open_engine(self) -> Any:
        time.sleep(10_000)


class DyingReplica(Replica):
    def work(self, units: Sequence[Unit]) -> Any:
        del units
        os.kill(os.getpid(), signal.SIGKILL)


class ShiftedReplica(Replica):
    def open_engine(self) -> Any:
        return SlowEngine(top_k=8, window=1, shift=1)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def started(config: PipelineConfig) -> tuple[Job, DatasetWriter, list[Unit]]:
    plan, directory = prepare(config), Path(config.teacher.model)
    vocabulary = Vocabulary.from_tokenizer(directory)
    provenance = provenance_of(config, vocabulary, plan.renderer, prompts_fingerprint(plan.fitting.prompts), "collect")
    writer = DatasetWriter(config.shards_dir, provenance, vocabulary, directory)
    return Job(config, provenance, vocabulary, "collect"), writer, plan.units


def pool(job: Job, writer: DatasetWriter, units: list[Unit], workers: int = 2) -> ray_pool._Pool:
    return ray_pool._Pool(ray, job, writer, units, workers)


def test_an_actor_that_dies_is_replaced_and_its_units_are_repeated(
    make_config: Maker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray_pool, "Replica", ScriptedReplica)
    job, writer, units = started(make_config(prompts=60))
    running = pool(job, writer, units)

    def kill_one() -> None:
        while not writer.store.committed_names():
            time.sleep(0.05)
        one = next(iter(running._working.values()))
        ray.kill(one.actor)

    killer = threading.Thread(target=kill_one)
    killer.start()
    outcome = running.run(StopRequest())
    killer.join()
    assert "another one takes its place" in caplog.text
    assert writer.store.committed_names() == {unit.name for unit in units}
    assert outcome.stopped_by is None
    # What the dead one had answered of units that were not done was asked again.
    assert outcome.counts.units <= len(units)
    assert outcome.counts.responses >= sum(len(unit.tasks) for unit in units) - 8
    writer.finish([unit.name for unit in units])


@pytest.mark.timeout(120)
def test_a_stop_does_not_wait_for_engines_that_are_being_loaded(
    make_config: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_pool, "Replica", LoadingReplica)
    monkeypatch.setattr(ray_pool, "GRACE_S", 10_000)
    stop = StopRequest()
    stop.name = "SIGTERM"
    assert pool(*started(make_config()), workers=1).run(stop).stopped_by == "SIGTERM"


def test_a_stop_ends_the_actors_and_another_pool_goes_on(make_config: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_pool, "Replica", ScriptedReplica)
    job, writer, units = started(make_config(prompts=60))
    stop = StopRequest()

    def ask() -> None:
        while len(writer.store.committed_names()) < 3:
            time.sleep(0.05)
        stop.name = "SIGTERM"

    asker = threading.Thread(target=ask)
    asker.start()
    outcome = pool(job, writer, units).run(stop)
    asker.join()
    assert outcome.stopped_by == "SIGTERM"
    done = writer.store.committed_names()
    assert 3 <= len(done) < len(units)
    assert outcome.counts.responses == sum(len(unit.tasks) for unit in units if unit.name in done)
    assert not Claims(writer.store.storage).others()
    writer.refresh()
    pool(job, writer, units).run(StopRequest())
    assert writer.store.committed_names() == {unit.name for unit in units}


def test_actors_that_keep_dying_end_the_collection(make_config: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_pool, "Replica", DyingReplica)
    with pytest.raises(EngineError, match="4 of Ray's actors died one after the other, with no unit done in between"):
        pool(*started(make_config()), workers=1).run(StopRequest())


def test_what_an_actor_finds_wrong_is_said_here(make_config: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_pool, "Replica", ShiftedReplica)
    with pytest.raises(AlignmentError, match="the rows are shifted against the text"):
        pool(*started(make_config()), workers=1).run(StopRequest())


def test_an_actor_out_of_reach_is_ended_before_another_takes_its_place(make_config: Maker) -> None:
    """After a hiccup of the network it may be at work still, and hold its place on the cluster."""
    running = pool(*started(make_config()), workers=1)
    killed: list[str] = []

    def unavailable(_future: object) -> None:
        raise ray.exceptions.ActorUnavailableError("the connection is gone", None)

    running._ray = SimpleNamespace(get=unavailable, kill=killed.append, exceptions=ray.exceptions)
    one = ray_pool._Started("ray-1", group=None, actor="the old one")
    assert "the connection is gone" in str(running._result(None, one))
    assert killed == ["the old one"]


def test_a_replica_of_several_gpus_is_ray_s_and_one_of_one_gpu_is_not(make_config: Maker) -> None:
    job, _, _ = started(make_config(teacher__engine_args={"distributed-executor-backend": "ray", "seed": 1}))
    for executor in ("ray", None):
        arguments = ray_pool._placed(job, executor).config.teacher.engine_args
        assert arguments == {"distributed_executor_backend": executor, "seed": 1}


def test_more_workers_than_the_cluster_has_room_for_are_refused(make_config: Maker) -> None:
    with pytest.raises(ConfigError, match="--workers 3 need a core each, the cluster has 2; ask for fewer"):
        pool(*started(make_config()), workers=3)
