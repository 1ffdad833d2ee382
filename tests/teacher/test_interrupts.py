from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from shared.stopping import REQUEUE_EXIT_CODE, SIGNALS, StopRequest
from teacher.interrupts import lasting_interrupts, nothing_in_hand
from teacher.runners import local


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


@pytest.fixture
def handlers() -> Iterator[None]:
    """Puts back what a `StopRequest` replaces for good."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def stop_while_loading(_job: object) -> None:
    signal.raise_signal(signal.SIGTERM)
    raise AssertionError("it went on loading")


def stop_that_vllm_swallows(_job: object) -> None:
    with suppress(SystemExit):
        signal.raise_signal(signal.SIGUSR1)
    raise RuntimeError("Engine core initialization failed")  # as where the signal has ended vLLM's own processes


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("load", [stop_while_loading, stop_that_vllm_swallows])
def test_a_stop_while_the_teacher_is_loaded_does_not_wait_for_it(
    load: Callable[[object], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "engine_for", load)
    nothing: Any = SimpleNamespace(committed=set())
    with pytest.raises(SystemExit) as left:
        local.run_here(nothing, nothing, nothing, [])
    assert left.value.code == REQUEUE_EXIT_CODE


@pytest.mark.usefixtures("handlers")
def test_a_stop_after_that_is_remembered_and_an_error_before_one_is_an_error() -> None:
    stop = StopRequest()
    with pytest.raises(RuntimeError, match="no such model"), nothing_in_hand(stop):
        raise RuntimeError("no such model")
    with nothing_in_hand(stop):
        pass
    signal.raise_signal(signal.SIGTERM)
    assert stop.name == "SIGTERM"
