"""A rank that hangs."""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager


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
