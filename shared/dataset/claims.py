"""Which worker does which unit: claims that end with their worker, without a coordinator and without a common clock.

    DIR/.claims/units/UNIT.0       the worker that has the unit; UNIT.1 the one that took it over, and so on
    DIR/.claims/workers/ID.json    a worker at work, with a number that grows while it lives

A claim is a file that can be created once (`Storage.create`), so one of several workers gets it. It holds as long as
its worker lives. A worker is dead

- when its file is gone: it left, whole or stopped;
- when it ran on this machine and its process is gone;
- when its number has not grown for `lease_s` seconds of the observer's own clock. Clocks are never compared.

The units of a dead worker are taken over by creating the claim's next number: again one of several gets it. A worker
that was only slow, or cut off, goes on: the unit is then done twice and the first shard stays (`shared.dataset.units`).
So claims save work, and the dataset does not depend on them. Where a file cannot be created once (`hf://`), two workers
may both get a claim; divide the units there (`teacher collect --shard`).
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from pathlib import Path, PurePosixPath
from typing import Any

from shared.dataset.storage import Storage
from shared.errors import DatasetError

log = logging.getLogger(__name__)

FOLDER = ".claims"
_UNITS = f"{FOLDER}/units"
_WORKERS = f"{FOLDER}/workers"


class Claims:
    """This worker's claims; it lives from entering the block to leaving it.

    Args:
        beat_s: seconds between two signs of life. lease_s: seconds without one after which a worker counts as dead; the
            longest that the units of a worker that was killed on another machine wait.
        worker: its name, unlike any other's; by default the machine's, the process number and a random number.
    """

    def __init__(
        self, storage: Storage, beat_s: float = 10.0, lease_s: float = 60.0, worker: str | None = None
    ) -> None:
        self.worker = worker or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._storage, self._beat_s, self._lease_s = storage, beat_s, lease_s
        self._machine = _machine()
        self._seen: dict[str, tuple[int, float]] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._live, name="claims", daemon=True)

    def __enter__(self) -> Claims:
        self._beat(0)
        for name in self._storage.list(_WORKERS):  # the sooner others are looked at, the sooner the dead ones are known
            self._lives(PurePosixPath(name).stem)
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stopped.set()
        self._thread.join()
        self._storage.delete(_worker_file(self.worker))

    def take(self, unit: str) -> bool:
        """Whether the unit is this worker's to do, from now on if it was nobody's or a dead worker's.

        Whoever takes one looks at its commit afterwards: a worker may have done it and left in between.
        """
        generation = 0
        while True:
            name = f"{_UNITS}/{unit}.{generation}"
            if self._storage.create(name, self.worker.encode()):
                return True
            holder = self._storage.read_or_none(name)
            if holder is None:  # cleared away: the dataset is finished
                return False
            if holder == self.worker.encode():
                return True
            if self._lives(holder.decode(errors="replace")):
                return False
            generation += 1

    def taken(self) -> set[str]:
        """Units that anyone has claimed, ever."""
        return {PurePosixPath(name).name.rpartition(".")[0] for name in self._storage.list(_UNITS)}

    def others(self) -> list[str]:
        """The other workers that live."""
        workers = [PurePosixPath(name).stem for name in self._storage.list(_WORKERS)]
        return [worker for worker in workers if worker != self.worker and self._lives(worker)]

    def _live(self) -> None:
        beat = 0
        while not self._stopped.wait(self._beat_s):
            beat += 1
            try:
                self._beat(beat)
            except DatasetError as error:  # the next one may pass; if none does, others take over our units
                log.warning("no sign of life could be written: %s", error)

    def _beat(self, beat: int) -> None:
        pid = os.getpid()
        state = {"beat": beat, "machine": self._machine, "pid": pid, "started": _started(pid)}
        self._storage.write(_worker_file(self.worker), json.dumps(state).encode())

    def _lives(self, worker: str) -> bool:
        data = self._storage.read_or_none(_worker_file(worker))
        if data is None:
            return False
        try:
            state: dict[str, Any] = json.loads(data)
            beat, machine, pid, started = (state[key] for key in ("beat", "machine", "pid", "started"))
        except (ValueError, KeyError, TypeError):
            return False
        if machine is not None and machine == self._machine and _started(pid) != started:
            return False
        now = time.monotonic()
        seen, since = self._seen.setdefault(worker, (beat, now))
        if seen != beat:
            self._seen[worker] = beat, now
            return True
        return now - since < self._lease_s


def end_worker(storage: Storage, worker: str) -> None:
    """End the claims of a worker that is known to be dead."""
    storage.delete(_worker_file(worker))


def clear_claims(storage: Storage) -> None:
    """Remove all claims and workers: the dataset is finished."""
    for name in storage.list(FOLDER):
        storage.delete(name)


def _worker_file(worker: str) -> str:
    return f"{_WORKERS}/{worker}.json"


def _machine() -> str | None:
    """This machine since it started, and the container whose process numbers are ours; None where it cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When a process of this machine started, in ticks since the machine did; None where it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in ("Z", "X") else fields[18]
