"""A scheduler's signals: what is in hand ends first, and the exit code says that the same command goes on."""

from __future__ import annotations

import signal
import threading

REQUEUE_EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: what was done is saved, and the same command goes on with it."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers that a scheduler asked this process to stop. Only the main thread is sent signals."""

    def __init__(self) -> None:
        self.name: str | None = None
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: object) -> None:
        self.name = signal.Signals(number).name
