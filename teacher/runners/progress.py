"""How far a collection is: a bar where there is a terminal, a log line every minute where there is none."""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Collection, Sequence

from shared.console import progress, stderr
from teacher.collector import Counts
from teacher.units import Unit

log = logging.getLogger(__name__)

_LINE_S = 60.0


class Display:
    """Shows the counts of one or several collectors, and the units that are done by anyone.

    Args:
        label: what is done, such as `answering`. units: all of them. committed: those that are done.
    """

    def __init__(self, label: str, units: Sequence[Unit], committed: Collection[str]) -> None:
        self._label = label
        self._sizes = {unit.name: len(unit.tasks) for unit in units}
        self._total = sum(self._sizes.values())
        self._done: set[str] = set()
        self._answered = 0  # in units that are done
        self.units_done(committed)
        self._units_before, self._answered_before = len(self._done), self._answered
        self._started = self._line_at = time.monotonic()
        self._bar = progress()
        self._task = self._bar.add_task(label, total=self._total, completed=self._answered, note="")
        self._is_terminal = stderr.is_terminal

    def __enter__(self) -> Display:
        if self._is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._bar.stop()

    def units_done(self, committed: Collection[str]) -> None:
        """Units that are done by anyone."""
        new = (self._sizes.keys() & set(committed)) - self._done
        self._done |= new
        self._answered += sum(self._sizes[name] for name in new)

    def show(self, counts: Counts) -> None:
        """Call it often: it costs microseconds."""
        now = time.monotonic()
        if not self._is_terminal and now - self._line_at < _LINE_S:
            return
        self._line_at = now
        # Units of others count when they are whole, ours response by response.
        answered = max(self._answered_before + counts.responses + counts.failures, self._answered)
        units = max(self._units_before + counts.units, len(self._done))
        note = self._note(counts, units, now - self._started)
        if self._is_terminal:
            self._bar.update(self._task, completed=answered, note=note)
            return
        rate = (answered - self._answered_before) / (now - self._started)
        left = datetime.timedelta(seconds=round((self._total - answered) / rate)) if rate else "unknown"
        log.info("%s: %d of %d responses, %s, left: %s", self._label, answered, self._total, note, left)

    def _note(self, counts: Counts, units: int, seconds: float) -> str:
        parts = [f"{units}/{len(self._sizes)} units", f"{counts.tokens / seconds:,.0f} tokens/s"]
        if counts.tokens:
            parts.append(f"{counts.kept_mass / counts.tokens:.4f} of the mass kept")
        if counts.failures:
            parts.append(f"{counts.failures} failed")
        return ", ".join(parts)
