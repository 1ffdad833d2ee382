"""Every flipped byte is reported, and a reader never returns another value without saying so."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from shared.dataset.reader import Dataset
from shared.dataset.records import Record
from shared.dataset.validate import validate_dataset
from shared.errors import DatasetError
from tests.fixtures.records import small_units, write_dataset
from tests.shared.dataset.test_reader import assert_same
from tests.shared.dataset.test_writer import contents


def damage(path: Path, data: bytes) -> None:
    # A new file each time: within one tick of the clock a rewritten one could not be told from the one before.
    path.unlink()
    path.write_bytes(data)


def read_all(path: Path) -> list[Record]:
    dataset = Dataset.open(path)
    assert len(dataset.vocabulary) == 300
    assert dataset.provenance.teacher == "toy"
    return list(dataset.records())


@pytest.mark.slow
def test_500_flipped_bytes_are_all_reported(tmp_path: Path) -> None:
    directory = tmp_path / "d"
    write_dataset(directory, small_units())
    files = contents(directory)
    assert {name.partition("/")[0] for name in files} == {
        "manifest.json", "provenance.json", "vocabulary.parquet", "data", "commits", "README.md",
    }  # fmt: skip
    expected = read_all(directory)
    choose = random.Random(11)
    refused = 0
    for trial in range(500):
        # Shards and the manifest in turn, and every fifth time one of the other files.
        kinds = ["data/", "manifest.json"] if trial % 5 else ["commits/", "provenance.json", "vocabulary.parquet"]
        kind = choose.choice(kinds)
        name = choose.choice([file for file in files if file.startswith(kind)])
        flipped = bytearray(files[name])
        position, bit = choose.randrange(len(flipped)), choose.randrange(8)
        flipped[position] ^= 1 << bit
        damage(directory / name, bytes(flipped))
        report = validate_dataset(directory)
        assert any(name in problem for problem in report.problems), (name, position, bit, report.problems)
        try:
            for read, record in zip(read_all(directory), expected, strict=True):
                assert_same(read, record)
        except DatasetError as error:
            assert name in str(error)  # noqa: PT017 - a reader may also not have needed the damaged file
            refused += 1
        damage(directory / name, files[name])
    assert validate_dataset(directory).problems == []
    # Readers do not need the commit files; everything else they refuse.
    assert refused >= 450


def test_a_shard_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", small_units())
    shard = tmp_path / "d/data/unit-001.parquet"
    data = shard.read_bytes()
    for keep in (0, 4, len(data) // 2, len(data) - 1):
        damage(shard, data[:keep])
        with pytest.raises(DatasetError, match=r"unit-001.parquet is damaged: its sha256 is"):
            read_all(tmp_path / "d")
        assert any("unit-001.parquet is damaged" in p for p in validate_dataset(tmp_path / "d").problems)


@pytest.mark.parametrize("passes_before", [0, 1])
def test_nothing_of_a_damaged_shard_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes_before: int
) -> None:
    write_dataset(tmp_path / "d", small_units())
    dataset = Dataset.open(tmp_path / "d")
    for _ in range(passes_before):
        assert len(list(dataset.records())) == 12
    shard = tmp_path / "d/data/unit-002.parquet"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    damage(shard, bytes(data))
    opened: list[str] = []

    def record_and_open(source: Path, **options: Any) -> pq.ParquetFile:
        opened.append(source.name)
        return parquet_file(source, **options)

    parquet_file = pq.ParquetFile
    monkeypatch.setattr(pq, "ParquetFile", record_and_open)
    with pytest.raises(DatasetError, match=r"unit-002.parquet is damaged"):
        list(dataset.records())
    assert set(opened) <= {"unit-000.parquet", "unit-001.parquet"}
