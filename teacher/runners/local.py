"""The runner of one process: one engine, here. Several such processes on one dataset share its units.

So it is also the runner of a Slurm array, whose tasks take a share of the units each (`--shard I/N`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Literal

from shared.config import PipelineConfig
from shared.dataset.claims import Claims
from shared.dataset.manifest import Provenance
from shared.dataset.writer import DatasetWriter
from shared.errors import ConfigError
from shared.stopping import StopRequest
from shared.tokenizer.vocabulary import Vocabulary
from teacher.collector import Collector, Counts
from teacher.engine import TeacherEngine, open_engine
from teacher.interrupts import lasting_interrupts, nothing_in_hand
from teacher.prompts import Renderer
from teacher.runners.progress import Display
from teacher.runners.worker import Worker
from teacher.summary import measure_capture
from teacher.units import Unit

log = logging.getLogger(__name__)

Kind = Literal["collect", "score"]
LABELS: dict[Kind, str] = {"collect": "answering", "score": "scoring"}


def parse_shard(text: str | None) -> slice:
    """Share `I/N` of the units: every Nth from I on; all of them where none is asked for.

    Raises:
        ConfigError: if it is not `I/N`, or I is not below N.
    """
    if text is None:
        return slice(None)
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ConfigError(f"--shard {text!r} is not I/N with I from 0 to N - 1, for example --shard 0/4")
    return slice(int(index), None, int(count))


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker on any machine needs to know to do units."""

    config: PipelineConfig
    provenance: Provenance
    vocabulary: Vocabulary
    kind: Kind


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a runner did.

    Attributes:
        seconds: from the first request to the last shard; on Ray from the first response.
        capture_ratio: see `teacher.summary.Summary`; None if not measured.
        stopped_by: the signal after which units were left undone.
        workers: at work at once.
    """

    counts: Counts
    seconds: float
    capture_ratio: float | None = None
    stopped_by: str | None = None
    workers: int = 1


def engine_for(job: Job) -> TeacherEngine:
    """The teacher, as the job wants it; arguments and errors as `open_engine`."""
    started = time.monotonic()
    engine = open_engine(job.config, job.kind == "score")
    log.info(
        "vLLM %s is up after %.0f s: %s, head in %s, rows captured through %s",
        job.provenance.engine_version,
        time.monotonic() - started,
        job.config.teacher.dtype,
        engine.head_dtype,
        engine.capture,
    )
    return engine


def run_here(job: Job, renderer: Renderer, writer: DatasetWriter, units: Sequence[Unit]) -> Outcome:
    """Do the missing ones of `units` in this process, the other workers' in flight excepted."""
    missing = [unit for unit in units if unit.name not in writer.committed]
    stop = StopRequest()
    ratio = None
    with lasting_interrupts() as check_interrupt, ExitStack() as opened:
        with nothing_in_hand(stop):
            engine = opened.enter_context(closing(engine_for(job)))
            if job.config.collect.measure_capture and job.kind == "collect":
                ratio = measure_capture(engine, [renderer.render(t.prompt).ids for u in missing[:4] for t in u.tasks])
        collector = Collector(job.config, renderer, job.vocabulary, writer, engine)
        started = time.monotonic()
        display = Display(LABELS[job.kind], units, writer.committed)
        with Claims(writer.store.storage) as claims, display:

            def show() -> None:
                check_interrupt()
                display.show(collector.counts)

            Worker(collector, writer, claims, lambda: stop.name is not None, show, display.units_done).work(missing)
        return Outcome(collector.counts, time.monotonic() - started, ratio, stop.name)
