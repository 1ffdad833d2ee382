"""One worker: it does the units that no other worker does, until all of them are done or a scheduler stops it.

Workers need not know of one another; claims beside the dataset (`shared.dataset.claims`) divide the units. A worker
with nothing left to take waits for the units of the others, and takes over those of one that died. Asked to stop, it
takes no further unit, finishes those at hand within `GRACE_S` seconds and abandons the rest.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence

from shared.dataset.claims import Claims
from shared.dataset.writer import DatasetWriter
from teacher.collector import Collector
from teacher.units import Unit

log = logging.getLogger(__name__)

GRACE_S = 20.0
"""Schedulers kill 30 seconds after their signal (Slurm, Kubernetes), unless they are told otherwise."""
_LONGEST_POLL_S = 5.0
_NEWS_S = 60.0


class Stopping(Exception):
    """The grace is over: what is not published is abandoned."""


class Worker:
    """The loop of one worker.

    Args:
        is_stopped: asked often; once true, it stays so.
        on_answer: called after every response; it may raise.
        on_others: told how many units are done by all workers, when that is looked at.
    """

    def __init__(
        self,
        collector: Collector,
        writer: DatasetWriter,
        claims: Claims,
        is_stopped: Callable[[], bool],
        on_answer: Callable[[], None] = lambda: None,
        on_others: Callable[[set[str]], None] = lambda _: None,
    ) -> None:
        self._collector, self._writer, self._claims = collector, writer, claims
        self._is_stopped, self._on_answer, self._on_others = is_stopped, on_answer, on_others
        self._deadline: float | None = None
        collector.on_answer = self._answered

    def work(self, units: Sequence[Unit]) -> None:
        """Return when all `units` are committed, by whomever, or this worker is stopped.

        Raises:
            UserError: as `Collector.collect_units`.
        """
        try:
            while units := self._pass(units):
                if not self._wait(units):
                    return
        except Stopping:
            return
        except Exception as error:
            # A signal to the whole process group takes vLLM's own processes with it, and then it raises.
            if not self._is_stopped():
                raise
            log.info("stopped while the engine was at work (%s)", error)

    def _pass(self, units: Sequence[Unit]) -> list[Unit]:
        """Do what can be taken of `units`; those that are not committed then."""
        for entry in self._collector.collect_units(self._taken(units)):
            log.debug("unit %s: %d responses, %d tokens, %d bytes", entry.unit, entry.rows, entry.tokens, entry.bytes)
        committed = self._committed()
        return [unit for unit in units if unit.name not in committed]

    def _taken(self, units: Sequence[Unit]) -> Iterator[Unit]:
        """Those of `units` that are this worker's, each claimed when it is asked for."""
        passed: set[str] = set()
        for unit in units:
            if self._is_stopped():
                return
            if unit.name in passed:
                continue
            if not self._claims.take(unit.name):
                # Somebody else is at work here: one listing says where, in place of a request for every unit.
                passed = self._claims.taken() | self._committed()
            elif not self._writer.store.is_committed(unit.name):
                yield unit

    def _wait(self, units: Sequence[Unit]) -> bool:
        """Until another worker ended a unit or died; False where this one is to stop."""
        names = {unit.name for unit in units}
        news, pause = time.monotonic(), 0.2
        while not self._is_stopped():
            if self._committed() & names or any(self._claims.take(unit.name) for unit in units):
                return True
            if time.monotonic() >= news:
                who = ", ".join(self._claims.others()) or "workers that may be dead"
                log.info("waiting for %d units of %s", len(units), who)
                news += _NEWS_S
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_POLL_S)
        return False

    def _committed(self) -> set[str]:
        committed = self._writer.store.committed_names()
        self._on_others(committed)
        return committed

    def _answered(self) -> None:
        self._on_answer()
        if self._is_stopped():
            now = time.monotonic()
            self._deadline = self._deadline or now + GRACE_S
            if now > self._deadline:
                raise Stopping
