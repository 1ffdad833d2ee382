"""Units of work through an engine into shards: what every runner does with its units, on whatever machine.

`Collector.collect_units` does units from their prompts to their shards, and logits never leave the process that
computed them. The requests of the next units are in flight while the last ones of a unit finish, and shards are written
by threads beside the decoding. Memory holds the units that have a request in flight, and `WRITERS` + 1 that wait for
the disk, however many there are in all.

A request that fails (the engine says so, or its rows are not the text's) is asked again, twice; then the unit is
published without it, and its commit says why. Where more than a tenth of the responses fail, the collection stops.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from shared.config import PipelineConfig
from shared.dataset.manifest import UnitEntry
from shared.dataset.records import Record
from shared.dataset.writer import DatasetWriter
from shared.errors import AlignmentError, CheckpointError, EngineError, UserError
from shared.tokenizer.vocabulary import Vocabulary
from teacher.capture import response_columns, to_distributions
from teacher.engine import Answer, Request, TeacherEngine
from teacher.prompts import Renderer
from teacher.units import Task, Unit, is_retry

WRITERS = 1
"""Threads that write shards. At 6 to 8 µs a token (k = 64) one keeps up with 100,000 tokens a second and leaves
decoding the processor (`python -m tests.benchmarks.bench_teacher`)."""
_ATTEMPTS = 3
_FEW = 3
"""Failures that are never too many."""


@dataclass(slots=True)
class Counts:
    """What a collector has done so far.

    Attributes:
        responses, tokens: answered. failures: responses given up. units: published.
        kept_mass: probability inside the candidates, summed over `tokens`.
    """

    responses: int = 0
    tokens: int = 0
    failures: int = 0
    units: int = 0
    kept_mass: float = 0.0


class Collector:
    """Turns units into shards. One engine, one writer; workers on one dataset each have their own.

    Attributes:
        counts: so far.
        on_answer: called after every response, for a progress bar. What it raises ends the collection; units whose
            answers are all in are published all the same.
    """

    def __init__(
        self,
        config: PipelineConfig,
        renderer: Renderer,
        vocabulary: Vocabulary,
        writer: DatasetWriter,
        engine: TeacherEngine,
    ) -> None:
        self._collect = config.collect
        self._renderer = renderer
        self._vocabulary = vocabulary
        self._writer = writer
        self._engine = engine
        self.counts = Counts()
        self.on_answer: Callable[[], None] = lambda: None

    def collect_units(self, units: Iterable[Unit]) -> Iterator[UnitEntry]:
        """Collect and publish `units`, in the order in which they are complete.

        Raises:
            AlignmentError, CheckpointError, EngineError: as the last response that failed, if too many do.
            DatasetError: if a shard cannot be written.
        """
        in_flight: dict[str, _Pending] = {}
        again: deque[_Pending] = deque()

        def requests() -> Iterator[Request]:
            yield from repeated()
            for unit in units:
                opened = _OpenUnit(unit)
                for task in unit.tasks:
                    text, request = self._request(task)
                    in_flight[request.key] = _Pending(opened, task, text, request)
                    yield request
                    yield from repeated()

        def repeated() -> Iterator[Request]:
            while again:
                pending = again.popleft()
                in_flight[pending.request.key] = pending
                yield pending.request

        def answers() -> Iterator[Answer]:
            yield from self._engine.stream(requests())
            while again:  # failed after the engine had taken the last request
                yield from self._engine.stream(repeated())

        with ThreadPoolExecutor(WRITERS, thread_name_prefix="shards") as pool:
            writing: list[Future[UnitEntry]] = []
            for answer in answers():
                pending = in_flight.pop(answer.key)
                opened = pending.opened
                try:
                    opened.records[answer.key] = self._record(pending, answer)
                except (AlignmentError, CheckpointError, EngineError) as error:
                    pending.attempts += 1
                    if pending.attempts < _ATTEMPTS:
                        again.append(pending)
                        continue
                    opened.failures[answer.key] = str(error)
                    self._count_failure(opened.unit, error)
                if len(opened.records) + len(opened.failures) == len(opened.unit.tasks):
                    records = [opened.records[t.sample_id] for t in opened.unit.tasks if t.sample_id in opened.records]
                    writing.append(pool.submit(self._writer.write_unit, opened.unit.name, records, opened.failures))
                self.on_answer()
                while writing and (writing[0].done() or len(writing) > WRITERS + 1):
                    yield self._written(writing.pop(0))
            for future in writing:
                yield self._written(future)

    def _written(self, future: Future[UnitEntry]) -> UnitEntry:
        entry = future.result()
        self.counts.units += 1
        return entry

    def _count_failure(self, unit: Unit, error: UserError) -> None:
        """Count it, and raise it where failing has become the rule; in a unit of failures that is no wonder."""
        counts = self.counts
        counts.failures += 1
        total = counts.responses + counts.failures
        if not is_retry(unit.name) and counts.failures > max(_FEW, total // 10):
            raise type(error)(
                f"{counts.failures} of {total} responses failed, each {_ATTEMPTS} times; the last: {error}"
            ) from error

    def _request(self, task: Task) -> tuple[str, Request]:
        """The prompt as text, and what is asked of the engine."""
        if task.given is not None:
            given = task.given
            return given.prompt_text, Request(task.sample_id, given.prompt_ids, task.sampling, given.response_ids)
        rendered = self._renderer.render(task.prompt)
        ids = None if task.prompt.response is None else self._renderer.encode_response(task.prompt)
        return rendered.text, Request(task.sample_id, rendered.ids, task.sampling, ids)

    def _record(self, pending: _Pending, answer: Answer) -> Record:
        """Raises `EngineError` where the engine gave no answer, others as `to_distributions`."""
        if answer.error is not None:
            raise EngineError(f"{answer.key}: {answer.error}")
        assert answer.columns is not None
        task, request, columns, finish = pending.task, pending.request, answer.columns, answer.finish_reason
        if request.response_ids is not None:
            columns = response_columns(columns, len(request.prompt_ids), len(request.response_ids))
            finish = "stop" if task.prompt.finished else "length"
        if task.given is not None:
            finish = task.given.finish_reason
        distributions = to_distributions(
            columns, answer.response_ids, len(self._vocabulary), self._collect.retained_mass
        )
        self.counts.responses += 1
        self.counts.tokens += len(answer.response_ids)
        self.counts.kept_mass += len(answer.response_ids) - float(distributions.tail.sum(dtype=np.float64))
        return Record(
            sample_id=task.sample_id,
            prompt_id=task.prompt.id,
            split=task.split,
            skill=task.prompt.skill,
            messages=task.prompt.messages,
            prompt_text=pending.prompt_text,
            prompt_ids=request.prompt_ids,
            response_ids=answer.response_ids,
            response_bytes=self._vocabulary.decode(answer.response_ids),
            finish_reason=finish,
            sampling=task.sampling,
            distributions=distributions,
        )


@dataclass(slots=True)
class _OpenUnit:
    """A unit that is being answered: its records, and why there is none, by sample id."""

    unit: Unit
    records: dict[str, Record] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Pending:
    """A request in flight, and what its record needs beside the answer."""

    opened: _OpenUnit
    task: Task
    prompt_text: str
    request: Request
    attempts: int = 0
