"""Any number of workers on one dataset: every interleaving of two, and four that start, write and die."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import shared.dataset.writer
from shared.dataset.manifest import COMMITS, DATA, UnitEntry, load
from shared.dataset.reader import Dataset
from shared.dataset.records import Record
from shared.dataset.storage import LocalStorage, open_storage
from shared.dataset.validate import validate_dataset
from shared.errors import DatasetError
from tests.fixtures.records import make_record, start
from tests.fixtures.s3 import BUCKET

STARTS = int(os.environ.get("WORKER_STARTS", "24"))
"""Of the two tests that take long; more of them find more."""
UNITS = [f"unit-{i:02d}" for i in range(4)]


def records_of(unit: str, worker: int) -> list[Record]:
    """The same samples from every worker, answered by each in its own words, as another batch would."""
    return [make_record(f"{unit}-{i}", seed=100 * worker + i, length=4 + worker % 5) for i in range(2)]


def assert_whole(path: Any) -> None:
    """Every commit's shard is there and is the one that it names; every shard has a commit."""
    storage = open_storage(path)
    commits = {name: load(UnitEntry, storage.read(name), name) for name in storage.list(COMMITS)}
    assert {entry.file for entry in commits.values()} == set(storage.list(DATA))
    start(path).finish([entry.unit for entry in commits.values()])
    assert validate_dataset(path).problems == []


class Died(BaseException):
    """Stands for SIGKILL: no handler of the code under test may catch it."""


class Stepped:
    """A storage that calls `before(n)` before its n-th operation."""

    def __init__(self, storage: Any, before: Callable[[int], None]) -> None:
        self._storage, self._before, self._count = storage, before, 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._storage, name)
        if name not in ("read", "read_or_none", "write", "create", "size", "list", "delete", "clear_partial"):
            return found

        def operation(*arguments: Any, **options: Any) -> Any:
            self._before(self._count)
            self._count += 1
            return found(*arguments, **options)

        return operation


def interrupted(monkeypatch: pytest.MonkeyPatch, path: Any, step: int, meanwhile: Callable[[], object]) -> list[int]:
    """Make the next writer on `path` run `meanwhile` before its operation `step`; the steps that it reached."""
    reached: list[int] = []

    def before(number: int) -> None:
        reached.append(number)
        if number == step:
            meanwhile()

    waiting = [Stepped(open_storage(path), before)]
    monkeypatch.setattr(shared.dataset.writer, "open_storage", lambda p: waiting.pop() if waiting else open_storage(p))
    return reached


def dies_at(monkeypatch: pytest.MonkeyPatch, path: Any, step: int, work: Callable[[], object]) -> None:
    def die() -> None:
        raise Died

    interrupted(monkeypatch, path, step, die)
    with suppress(Died):
        work()


PLACES = ["local", "memory"]


@pytest.fixture(params=PLACES)
def places(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[int], Any]:
    """Where the n-th dataset of a test lies, on a disk or in a store."""
    prefix = f"memory://workers/{tmp_path.name}"
    return lambda n: tmp_path / str(n) if request.param == "local" else f"{prefix}/{n}"


def test_a_unit_published_at_any_moment_of_a_start_stays(
    places: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two listings of a start, too, where it once looked like a commit whose shard is gone."""
    for step in range(100):
        path = places(step)
        start(path).write_unit("unit-00", records_of("unit-00", 0))

        def publish(path: Any = path) -> None:
            start(path).write_unit("unit-01", records_of("unit-01", 1))

        reached = interrupted(monkeypatch, path, step, publish)
        late = start(path)
        for unit in UNITS:
            late.write_unit(unit, records_of(unit, 2))
        late.finish(UNITS)
        assert_whole(path)
        if step not in reached:
            break
    assert step > 10


def test_two_workers_at_one_unit_at_every_moment_of_both(places: Callable[[int], Any]) -> None:
    """The first stops anywhere in a unit, the second takes the same one and dies anywhere in it, the first goes on."""
    dataset = 0
    for first_step in range(100):
        for second_step in range(100):
            path = places(dataset := dataset + 1)
            reached: list[int] = []

            def second(path: Any = path, second_step: int = second_step, reached: list[int] = reached) -> None:
                def die(number: int) -> None:
                    reached.append(number)
                    if number == second_step:
                        raise Died

                worker = start(path)
                worker.store.storage = Stepped(worker.store.storage, die)  # type: ignore[assignment]
                with suppress(Died):
                    worker.write_unit("unit-00", records_of("unit-00", 1))

            first = start(path)
            steps: list[int] = []

            def before(
                number: int, steps: list[int] = steps, first_step: int = first_step, second: Any = second
            ) -> None:
                steps.append(number)
                if number == first_step:
                    second()

            first.store.storage = Stepped(first.store.storage, before)  # type: ignore[assignment]
            first.write_unit("unit-00", records_of("unit-00", 0))
            assert_whole(path)
            if second_step not in reached:
                break
        if first_step not in steps:
            break
    assert first_step >= 2


def test_a_worker_dies_at_any_moment_and_the_next_ends_it(
    places: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def collect(path: Any, worker: int) -> None:
        writer = start(path)
        for unit in UNITS[:2]:
            writer.write_unit(unit, records_of(unit, worker))
        writer.finish(UNITS[:2])

    for step in range(40):
        path = places(step)
        dies_at(monkeypatch, path, step, lambda path=path: collect(path, 0))
        collect(path, 1)
        assert_whole(path)
        assert len(Dataset.open(path)) == 4


def test_two_configurations_that_start_together_are_told_apart(
    places: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever comes second is refused, and whoever is of the same configuration is not."""
    for step in range(100):
        for k in (8, 16):
            path = places(2 * step + (k == 16))
            refused = []

            def meanwhile(path: Any = path, k: int = k, refused: list[str] = refused) -> None:
                try:
                    start(path, top_k=k).write_unit("unit-01", records_of("unit-01", 1))
                except DatasetError as error:
                    refused.append(str(error))

            reached = interrupted(monkeypatch, path, step, meanwhile)
            try:
                start(path).write_unit("unit-00", records_of("unit-00", 0))
            except DatasetError as error:
                refused.append(str(error))
            if step in reached:
                assert len(refused) == (k == 16)
                assert all("top_k: " in message for message in refused)
        if step not in reached:
            break
    assert step > 5


def test_a_temporary_folder_removed_under_a_writer_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`rmdir` of a worker that finished, between our making the folder and our opening a file in it."""
    writer = start(tmp_path)
    opened, removed = Path.open, []

    def open_late(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.parent.name == ".partial" and not removed:
            removed.append(path)
            path.parent.rmdir()
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_late)
    writer.write_unit("unit-00", records_of("unit-00", 0))
    assert removed
    assert_whole(tmp_path)


def test_a_temporary_folder_removed_while_it_is_looked_for_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`rmdir` of a worker that finished, after the system said that the folder is there."""
    writer = start(tmp_path)
    make, removed = os.mkdir, []

    def make_late(path: Any, *arguments: Any) -> None:
        if Path(path).name == ".partial" and not removed:
            removed.append(path)
            with suppress(FileNotFoundError):
                Path(path).rmdir()
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        make(path, *arguments)

    monkeypatch.setattr(os, "mkdir", make_late)
    writer.write_unit("unit-00", records_of("unit-00", 0))
    assert removed
    assert_whole(tmp_path)


def test_a_temporary_file_not_yet_locked_may_be_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another worker finishes between our opening a file and our locking it."""
    start(tmp_path).write_unit("unit-00", records_of("unit-00", 0))
    other, lock, cleared = start(tmp_path), fcntl.flock, []

    def lock_late(file: Any, operation: int) -> None:
        if not cleared:
            cleared.append(1)
            other.finish(["unit-00"])
        lock(file, operation)

    writer = start(tmp_path)
    monkeypatch.setattr(fcntl, "flock", lock_late)
    writer.write_unit("unit-01", records_of("unit-01", 0))
    assert cleared
    assert_whole(tmp_path)


def test_the_file_that_a_writer_holds_is_not_cleared(tmp_path: Path) -> None:
    (tmp_path / ".partial").mkdir()
    held, left = tmp_path / ".partial/held", tmp_path / ".partial/left"
    left.write_bytes(b"half")
    with held.open("xb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        LocalStorage(tmp_path).clear_partial()
        assert held.exists()
        assert not left.exists()
    LocalStorage(tmp_path).clear_partial()
    assert not (tmp_path / ".partial").exists()


def test_a_shard_that_nobody_expects_is_named_and_kept(tmp_path: Path) -> None:
    """It may be of a worker that has not yet written its commit."""
    writer = start(tmp_path)
    writer.write_unit("unit-00", records_of("unit-00", 0))
    stranger = tmp_path / "data/unit-77.parquet"
    stranger.write_bytes(b"PAR1")
    with pytest.raises(DatasetError, match=r"holds 1 units that this collection does not have, such as unit-77"):
        writer.finish(["unit-00"])
    assert stranger.exists()


def test_a_store_without_conditional_puts_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    storage: Any = open_storage("memory://workers/unconditional")
    pipe = storage._fs.pipe_file

    def without(path: str, data: bytes, mode: str = "overwrite") -> None:
        if mode == "create":
            raise NotImplementedError
        pipe(path, data)

    monkeypatch.setattr(storage._fs, "pipe_file", without)
    assert storage.create("a", b"1")
    assert not storage.create("a", b"2")
    assert storage.read("a") == b"1"
    assert "memory://workers/unconditional has no conditional PUT: let one worker at a time" in caplog.text


def work(path: str, units: list[str], worker: int) -> None:
    """A worker's whole life: start, collect what is missing in an order of its own, finish."""
    writer = start(path)
    for unit in random.Random(worker).sample(units, len(units)):
        if unit not in writer.committed:
            writer.write_unit(unit, records_of(unit, worker))
    writer.finish(units)


def supervise(path: str, failures: str, starts: int, units: list[str]) -> None:
    """Workers, four at a time, each killed at a random moment of twice the processor time that one takes for six units.

    They are forked from this process, which has the imports and no threads, so that the time is their own; processor
    time, so that a busy machine kills them no earlier.
    """
    import pandas  # noqa: F401 - pyarrow imports both at their first use
    import pyarrow.dataset  # noqa: F401
    import s3fs  # noqa: F401

    def fork(path: str, units: list[str], number: int, seconds: float) -> int:
        pid = os.fork()
        if pid:
            return pid
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal is not handled: it ends the process where it is
        try:
            work(path, units, number)
        except BaseException:
            Path(failures, str(number)).write_text(traceback.format_exc())
        os._exit(0)

    usage = os.wait4(fork(f"{path}-alone", units[:6], starts, seconds=0), 0)[2]
    moments, running = random.Random(0), 0
    for number in range(starts):
        fork(path, units, number, moments.uniform(0.01, 2 * (usage.ru_utime + usage.ru_stime)))
        running += 1
        if running == 4:
            os.wait()
            running -= 1
    for _ in range(running):
        os.wait()


def stress(path: Any, failures: Path, starts: int) -> dict[str, Any]:
    """Let that many workers live and die, then one end the collection; figures of it."""
    units = 4 * starts
    names = [f"unit-{i:04d}" for i in range(units)]
    failures.mkdir()
    arguments = {"path": str(path), "failures": str(failures), "starts": starts, "units": names}
    code = f"import json, sys; from {__name__} import supervise; supervise(**json.load(sys.stdin))"
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(arguments), text=True, check=True, cwd=Path(__file__).parents[3]
    )
    seconds = time.monotonic() - began
    tracebacks = [file.read_text() for file in failures.iterdir()]
    print(*tracebacks[:3], sep="\n")
    storage = open_storage(path)
    shards, commits = storage.list(DATA), storage.list(COMMITS)
    ends = {
        "starts": starts, "tracebacks": len(tracebacks), "seconds": round(seconds), "units": units,
        "committed": len(commits),
        "shards_without_commit": len({Path(s).stem for s in shards} - {Path(c).stem for c in commits}),
    }  # fmt: skip
    print(ends)
    assert len(start(path).committed) == len(commits)  # every commit has its shard
    work(str(path), names, starts)
    assert_whole(path)
    assert len(Dataset.open(path).manifest.units) == units
    return ends


@pytest.mark.slow
@pytest.mark.timeout(60 * STARTS)
def test_four_workers_that_start_write_and_die(tmp_path: Path) -> None:
    ends = stress(tmp_path / "d", tmp_path / "failures", STARTS)
    assert ends["tracebacks"] == 0, ends
    assert ends["committed"] >= STARTS // 2, ends
    assert not (tmp_path / "d/.partial").exists()


@pytest.mark.slow
@pytest.mark.timeout(60 * STARTS)
@pytest.mark.usefixtures("s3")
def test_four_workers_that_start_write_and_die_on_a_store(tmp_path: Path) -> None:
    starts = max(STARTS // 3, 4)  # each takes as long as three on a disk
    ends = stress(f"s3://{BUCKET}/stress", tmp_path / "failures", starts)
    assert ends["tracebacks"] == 0, ends
    # A start reads every commit, each by a request, so that workers get slower as a store fills.
    assert ends["committed"] >= starts // 10, ends
