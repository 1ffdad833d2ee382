"""The runner on a Ray cluster: an actor for each replica of the engine, all of them workers on one dataset.

Actors divide the units by claims beside the dataset, as workers without Ray do; so no unit passes through this process
and every engine stays full across the borders of units. An actor writes what it collects, and only counts come back.
This process starts the actors, shows their progress and puts another one in the place of one that died, whose units are
then repeated.

A replica of several GPUs is a placement group with one bundle a GPU, on one node unless `teacher.pipeline_parallel`
spreads it; its actor holds no GPU itself, and vLLM's own workers take the bundles. CPU builds share the cores.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any

from shared.console import configure_logging
from shared.dataset.claims import Claims, end_worker
from shared.dataset.writer import DatasetWriter
from shared.errors import ConfigError, EngineError, MissingExtraError, UserError
from shared.stopping import StopRequest
from shared.vllm_settings import is_cpu_build
from teacher.collector import Collector, Counts
from teacher.engine import TeacherEngine, prepare_environment
from teacher.prompts import load_renderer
from teacher.runners.local import LABELS, Job, Outcome, engine_for
from teacher.runners.progress import Display
from teacher.runners.worker import GRACE_S, Worker
from teacher.units import Unit

log = logging.getLogger(__name__)

_MOST_DEATHS = 3
"""Actors that may die one after the other, with no unit done in between."""
_BACKEND = "distributed_executor_backend"


class Replica:
    """One engine on the cluster; `work` runs in a thread, so that the other methods answer meanwhile."""

    def __init__(self, job: Job, worker: str, log_level: int) -> None:
        configure_logging(logging.getLevelName(log_level))
        prepare_environment(job.config.teacher)
        self._job, self._worker = job, worker
        self._counts = Counts()
        self._stopped = False

    def work(self, units: Sequence[Unit]) -> Counts:
        """As `Worker.work`."""
        job, config = self._job, self._job.config
        renderer = load_renderer(config)
        # The tokenizer's files are there: the process that started this actor put them there.
        writer = DatasetWriter(config.shards_dir, job.provenance, job.vocabulary, tokenizer_dir=None)
        engine = self.open_engine()
        try:
            collector = Collector(config, renderer, job.vocabulary, writer, engine)
            self._counts = collector.counts
            with Claims(writer.store.storage, worker=self._worker) as claims:
                Worker(collector, writer, claims, lambda: self._stopped).work(units)
        finally:
            engine.close()
        return self._counts

    def open_engine(self) -> TeacherEngine:
        """The teacher, with the GPUs of this actor's placement group."""
        return engine_for(self._job)

    def counts(self) -> Counts:
        """So far."""
        return self._counts

    def stop(self) -> None:
        """Let `work` end as at a scheduler's signal."""
        self._stopped = True


@dataclass(slots=True)
class _Started:
    """An actor at work, its place on the cluster, and what it said last."""

    worker: str
    group: Any
    actor: Any
    counts: Counts = field(default_factory=Counts)


def run_on_ray(job: Job, writer: DatasetWriter, units: Sequence[Unit], workers: int | None) -> Outcome:
    """Do the missing ones of `units` on the cluster that Ray finds (`RAY_ADDRESS`, or this machine).

    Args:
        workers: replicas of the engine; None is as many as there are GPUs for, on CPU builds one.

    Raises:
        MissingExtraError: if Ray is not installed. ConfigError: if the cluster is too small.
        EngineError: if actors keep dying. UserError: as `Worker.work`.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError(
            "--runner ray needs Ray, which is not installed: run `make setup EXTRAS=teacher,ray`"
        ) from error
    ours = not ray.is_initialized()
    if ours:
        ray.init(include_dashboard=False, logging_level=logging.WARNING)
    try:
        stop = StopRequest()  # after Ray, which has a handler of its own
        return _Pool(ray, job, writer, units, workers).run(stop)
    finally:
        if ours:
            ray.shutdown()


class _Pool:
    def __init__(self, ray: Any, job: Job, writer: DatasetWriter, units: Sequence[Unit], workers: int | None) -> None:
        self._ray, self._writer, self._units = ray, writer, units
        self._missing = [unit for unit in units if unit.name not in writer.committed]
        teacher, cluster = job.config.teacher, ray.cluster_resources()
        gpus, cpus = int(cluster.get("GPU", 0)), int(cluster.get("CPU", 1))
        if is_cpu_build():
            self._workers = min(workers or 1, len(self._missing))
            self._bundles = [{"CPU": max(1, cpus // self._workers)}]
            if cpus < self._workers:
                raise ConfigError(f"--workers {self._workers} need a core each, the cluster has {cpus}; ask for fewer")
        else:
            gpus_each = teacher.tensor_parallel * teacher.pipeline_parallel
            self._workers = min(workers or max(1, gpus // gpus_each), len(self._missing))
            self._bundles = [{"GPU": 1, "CPU": 1}] * gpus_each
            need = self._workers * gpus_each
            if gpus < need:
                raise ConfigError(
                    f"{self._workers} workers of teacher.tensor_parallel {teacher.tensor_parallel} x pipeline_parallel "
                    f"{teacher.pipeline_parallel} need {need} GPUs, the Ray cluster has {gpus}; ask for fewer --workers"
                )
        self._strategy = "STRICT_PACK" if teacher.pipeline_parallel == 1 else "PACK"
        self._job = _placed(job, "ray" if len(self._bundles) > 1 else None)
        self._ended = Counts()  # of actors that are gone
        self._working: dict[Any, _Started] = {}
        self._units_ref = ray.put(self._missing)

    def run(self, stop: StopRequest) -> Outcome:
        """Until all units are done or a stop is asked for; the cluster's resources are free again then."""
        from ray.util.placement_group import placement_group, remove_placement_group

        groups = [placement_group(self._bundles, strategy=self._strategy) for _ in range(self._workers)]
        started = time.monotonic()
        deaths, done, deadline = 0, 0, float("inf")
        with Display(LABELS[self._job.kind], self._units, self._writer.committed) as display:
            try:
                for group in groups:
                    self._start(group)
                while self._working:
                    if stop.name and deadline == float("inf"):
                        # Nothing is in hand while the engines are being loaded.
                        deadline = time.monotonic() + (GRACE_S + 5 if self._counts().responses else 0)
                        for one in self._working.values():
                            one.actor.stop.remote()
                    if time.monotonic() > deadline:
                        break
                    ready, _ = self._ray.wait(list(self._working), timeout=1.0)
                    committed = self._writer.store.committed_names()
                    deaths, done = (0 if len(committed) > done else deaths), len(committed)
                    for future in ready:
                        one = self._working.pop(future)
                        error = self._result(future, one)
                        if error is not None and not stop.name:
                            deaths += 1
                            if deaths > _MOST_DEATHS:
                                raise EngineError(
                                    f"{deaths} of Ray's actors died one after the other, with no unit done in between: "
                                    f"{error}; Ray's logs say why, often the memory of a node"
                                )
                            log.warning("%s died (%s); another one takes its place", one.worker, error)
                            self._start(one.group)
                    self._poll()
                    if not self._counts().responses:  # the engines are being loaded
                        started = time.monotonic()
                    display.units_done(committed)
                    display.show(self._counts())
            finally:
                for one in self._working.values():
                    self._ray.kill(one.actor)
                    end_worker(self._writer.store.storage, one.worker)
                for group in groups:
                    remove_placement_group(group)
        return Outcome(self._counts(), time.monotonic() - started, stopped_by=stop.name, workers=self._workers)

    def _start(self, group: Any) -> None:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        worker = f"ray-{secrets.token_hex(6)}"
        alone = len(self._bundles) == 1
        actor = (
            self._ray.remote(Replica)
            .options(
                num_cpus=self._bundles[0]["CPU"] if alone else 0,
                num_gpus=self._bundles[0].get("GPU", 0) if alone else 0,
                max_concurrency=3,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=0 if alone else -1, placement_group_capture_child_tasks=True
                ),
            )
            .remote(self._job, worker, logging.getLogger().level)
        )
        self._working[actor.work.remote(self._units_ref)] = _Started(worker, group, actor)

    def _result(self, future: Any, one: _Started) -> Exception | None:
        """Add up what an actor did; the error that it died of, if it did.

        Raises:
            UserError: what `Worker.work` raised there.
        """
        try:
            one.counts = self._ray.get(future)
        except self._ray.exceptions.RayActorError as error:
            # It may only be out of reach: alive, it would keep the place of the one that follows it.
            self._ray.kill(one.actor)
            end_worker(self._writer.store.storage, one.worker)
            self._ended = _sum([self._ended, one.counts])
            return error
        except self._ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, UserError) else error) from None
        self._ended = _sum([self._ended, one.counts])
        return None

    def _poll(self) -> None:
        """Ask the actors how far they are; one that is busy keeps its last word."""
        asked = {one.actor.counts.remote(): one for one in self._working.values()}
        ready, _ = self._ray.wait(list(asked), num_returns=len(asked), timeout=1.0) if asked else ([], [])
        for future in ready:
            try:
                asked[future].counts = self._ray.get(future)
            except self._ray.exceptions.RayError:
                continue  # its work says so, too

    def _counts(self) -> Counts:
        return _sum([self._ended, *(one.counts for one in self._working.values())])


def _placed(job: Job, executor: str | None) -> Job:
    """The job with vLLM's `distributed_executor_backend` for a replica here, whatever the config has for other runs."""
    teacher = job.config.teacher
    given = {name: value for name, value in teacher.engine_args.items() if name.replace("-", "_") != _BACKEND}
    placed = teacher.model_copy(update={"engine_args": given | {_BACKEND: executor}})
    return replace(job, config=job.config.model_copy(update={"teacher": placed}))


def _sum(all_counts: Sequence[Counts]) -> Counts:
    return Counts(*map(sum, zip(*map(astuple, all_counts), strict=True)))
