"""Ends that are not the end: a scheduler's signal, and a rank that hangs."""

from __future__ import annotations

import faulthandler
import signal
from collections.abc import Iterator
from contextlib import contextmanager

REQUEUE_EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: the run is saved, and the same command goes on with it."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers that a scheduler asked this process to stop, so that the step at hand ends first."""

    def __init__(self) -> None:
        self.name: str | None = None
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: object) -> None:
        self.name = signal.Signals(number).name


@contextmanager
def stack_if_it_hangs(minutes: float) -> Iterator[None]:
    """Where the block takes longer, print the stack of every thread and end the process: the launcher ends the others.

    A collective that one rank never joins would otherwise wait in silence for the network's own time limit.
    """
    faulthandler.dump_traceback_later(minutes * 60, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
