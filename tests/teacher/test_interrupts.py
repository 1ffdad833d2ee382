from __future__ import annotations

import signal
import threading
from contextlib import suppress

import pytest

from teacher.interrupts import lasting_interrupts


def test_an_interrupt_that_a_library_swallowed_is_raised_again() -> None:
    before = signal.getsignal(signal.SIGINT)
    with lasting_interrupts() as check:
        check()
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            check()
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_is_raised_at_once_and_other_threads_are_left_alone() -> None:
    with pytest.raises(KeyboardInterrupt), lasting_interrupts():
        signal.raise_signal(signal.SIGINT)
    checked: list[bool] = []

    def elsewhere() -> None:
        with lasting_interrupts() as check:
            check()
            checked.append(True)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert checked
