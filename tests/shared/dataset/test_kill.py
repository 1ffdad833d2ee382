"""A collection that is killed again and again ends as if nobody had touched it."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.dataset.manifest import Provenance
from shared.dataset.reader import Dataset
from shared.dataset.validate import validate_dataset
from shared.dataset.writer import DatasetWriter
from tests.fixtures.records import byte_vocabulary, make_records, provenance
from tests.shared.dataset.test_writer import contents

UNITS = [f"unit-{i:02d}" for i in range(8)]


def collect(path: str) -> None:
    """A whole collection from a source that makes its records in no time; a unit's records follow from its name."""
    vocabulary = byte_vocabulary()
    source: Provenance = provenance(vocabulary)
    writer = DatasetWriter(path, source, vocabulary, None)
    for name in UNITS:
        if name not in writer.committed:
            writer.write_unit(name, make_records(3, seed=int(name[-2:])))
    writer.finish(UNITS)


def run_and_kill(target: Callable[[str], None], path: str, after: float | None) -> bool:
    """Run `target(path)` in a process of its own, killed after so many seconds; whether it ended by itself.

    Processes are forked from a server that holds the imports, so that the time is the collection's own. The server
    keeps the environment that it was started in; its processes get this one.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.shared.dataset.warm"])
    process = context.Process(target=_in_environment, args=(dict(os.environ), target, path))
    process.start()
    process.join(after)
    process.kill()  # SIGKILL, if it still runs
    process.join()
    return process.exitcode == 0


def _in_environment(environment: dict[str, str], target: Callable[[str], None], path: str) -> None:
    os.environ.update(environment)
    target(path)


@pytest.mark.slow
def test_fifty_kills_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    run_and_kill(collect, str(reference), None)  # starts the server, which takes longer than a collection
    shutil.rmtree(reference)
    started = time.monotonic()
    assert run_and_kill(collect, str(reference), None)
    duration = time.monotonic() - started
    expected = contents(reference)
    assert len(Dataset.open(reference)) == 3 * len(UNITS)
    moments = random.Random(7)
    kills, rounds, stages = 0, 0, set()
    while kills < 50:
        path = tmp_path / f"round-{rounds}"
        while not run_and_kill(collect, str(path), moments.uniform(0, 0.8 * duration)):
            kills += 1
            stages.add(len(list((path / "commits").glob("*"))) if path.exists() else -1)
        rounds += 1
        assert contents(path) == expected
        assert not [p for p in path.rglob("*") if p.is_dir() and p.name not in ("data", "commits")]
        shutil.rmtree(path)
    assert validate_dataset(reference).problems == []
    # The moments were spread over the collection, not all before it began.
    assert len(stages) >= 4, stages
