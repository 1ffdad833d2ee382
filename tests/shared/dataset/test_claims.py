"""Claims: one of several workers gets a unit, keeps it while it lives, and nobody waits for the dead."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.dataset.claims import Claims, end_worker
from shared.dataset.storage import Storage, open_storage
from tests.fixtures.records import start
from tests.fixtures.s3 import BUCKET
from tests.shared.dataset.test_workers import UNITS, records_of

NAMES = [f"unit-{i:02d}" for i in range(24)]


@pytest.fixture(params=["disk", "store"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    if request.param == "store":
        request.getfixturevalue("s3")
        yield open_storage(f"s3://{BUCKET}/{tmp_path.name}")
    else:
        yield open_storage(tmp_path / "dataset")


def test_workers_that_start_together_get_every_unit_once(storage: Storage) -> None:
    taken: list[str] = []
    ready = threading.Barrier(4)

    def work() -> None:
        with Claims(storage) as claims:
            ready.wait()
            mine = [name for name in NAMES if claims.take(name)]
            taken.extend(mine)
            assert all(claims.take(name) for name in mine)  # a claim is kept
            ready.wait()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(taken) == Counter(NAMES)


def test_the_units_of_a_worker_that_left_are_free_at_once(storage: Storage) -> None:
    with Claims(storage) as first, Claims(storage) as second:
        assert first.take("unit-00")
        assert not second.take("unit-00")
        assert second.others() == [first.worker]
    with Claims(storage) as third, Claims(storage) as fourth:
        assert third.take("unit-00")
        assert not fourth.take("unit-00")
        end_worker(storage, third.worker)
        assert fourth.take("unit-00")
        assert fourth.taken() == {"unit-00"}


def test_a_worker_without_a_sign_of_life_loses_its_units_and_a_slow_one_does_not(storage: Storage) -> None:
    slow, silent = Claims(storage, beat_s=0.1), Claims(storage, beat_s=3600)
    with slow, silent, Claims(storage, lease_s=1.0) as other:
        assert slow.take("unit-00")
        assert silent.take("unit-01")
        assert not other.take("unit-00")
        assert not other.take("unit-01")
        time.sleep(1.2)
        assert not other.take("unit-00")
        assert other.take("unit-01")
        # A third sees the one that took it over, not the silent one's first claim.
        with Claims(storage, lease_s=1.0) as third:
            time.sleep(1.2)
            other._beat(1)
            assert not third.take("unit-01")


KILLED = """
import sys, time
from shared.dataset.claims import Claims
from shared.dataset.storage import open_storage
with Claims(open_storage(sys.argv[1])) as claims:
    print(claims.take("unit-00"), flush=True)
    time.sleep(600)
"""


def test_a_process_that_was_killed_on_this_machine_is_dead_at_once(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    with Claims(open_storage(tmp_path)) as claims:
        assert not claims.take("unit-00")
        process.kill()
        until = time.monotonic() + 10
        while not claims.take("unit-00"):  # nobody has waited for the process yet: it is a zombie
            assert time.monotonic() < until
            time.sleep(0.01)
    process.wait()


def test_a_finished_dataset_has_no_claims(storage: Storage) -> None:
    writer = start(storage.url)
    with Claims(writer.store.storage) as claims:
        for unit in UNITS:
            assert claims.take(unit)
            writer.write_unit(unit, records_of(unit, 0))
        late = Claims(writer.store.storage)
        with late:
            writer.finish(UNITS)
            assert not storage.list(".claims/units")
    assert not storage.list(".claims")
    if not storage.url.startswith("s3"):
        assert not Path(storage.url, ".claims").exists()


def test_two_workers_that_fail_at_other_requests_agree_on_one_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first has published its shard, not its commit, when the second publishes: both commit that shard."""
    records = records_of("unit-00", 0)
    first, second = start(tmp_path), start(tmp_path)
    write = first.store.storage.write
    entries: list[Any] = []

    def interrupted(name: str, data: bytes) -> None:
        if not entries:
            entries.append(second.write_unit("unit-00", records))
        write(name, data)

    monkeypatch.setattr(first.store.storage, "write", interrupted)
    failures = {records[1].sample_id: "no answer"}
    entries.append(first.write_unit("unit-00", records[:1], failures))
    assert entries[0] == entries[1]
    assert entries[0].failures == failures
    assert first.finish(["unit-00"]).rows == 1
    assert start(tmp_path).failures == {"unit-00": failures}
