"""A ctrl-C that no library swallows, and a scheduler's signal that does not wait until a teacher is loaded."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from shared.stopping import REQUEUE_EXIT_CODE, SIGNALS, StopRequest

log = logging.getLogger(__name__)


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


@contextmanager
def nothing_in_hand(stop: StopRequest) -> Iterator[None]:
    """A block in which a scheduler's signal ends the process at once, with `REQUEUE_EXIT_CODE`.

    A large teacher takes minutes to load, longer than schedulers wait, and nothing is lost by leaving it. After the
    signal an error is no error: one to the whole process group takes vLLM's own processes with it, and then it raises.
    """
    previous = {}

    def leave(number: int, _frame: FrameType | None) -> None:
        stop.name = signal.Signals(number).name
        sys.exit(REQUEUE_EXIT_CODE)

    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, leave) for number in SIGNALS}
    try:
        yield
    except Exception as error:
        if stop.name is None:
            raise
        log.debug("%s", error)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if stop.name is not None:
            log.info("stopped by %s before the first request, run it again", stop.name)
            sys.exit(REQUEUE_EXIT_CODE)
