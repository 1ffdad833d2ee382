"""A ctrl-C that no library swallows."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def lasting_interrupts() -> Iterator[Callable[[], None]]:
    """A ctrl-C that is not lost; the function that it gives raises `KeyboardInterrupt` again if there was one.

    Python raises it wherever the main thread is, and not all native code hands an exception on: vLLM's step swallows
    one in 400. The program would then go on to its end as if nobody had asked it to stop. In other threads, which are
    sent no signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    was_interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal was_interrupted
        was_interrupted = True
        signal.default_int_handler(number, frame)

    def check() -> None:
        if was_interrupted:
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, previous)
