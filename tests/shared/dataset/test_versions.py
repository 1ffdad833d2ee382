"""A dataset that version 1 wrote stays readable, and gives the values that it gave then."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from shared.dataset.reader import Dataset
from shared.dataset.schema import SCHEMA_VERSION, VERSION_KEY, check_metadata
from shared.dataset.validate import validate_dataset
from shared.errors import DatasetError
from tests.fixtures.records import make_records
from tests.shared.dataset.test_reader import assert_same

VERSION_1 = Path(__file__).parent / "data/version-1"


def test_version_1_is_read() -> None:
    assert Dataset.open(VERSION_1).manifest.schema_version == 1
    expected = [
        *make_records(2),
        *make_records(1, seed=1, rule="sample", split="held_out"),
        *make_records(1, seed=2, soft=False),
    ]
    for read, record in zip(Dataset.open(VERSION_1).records(), expected, strict=True):
        assert_same(read, record, exact=False)
    assert validate_dataset(VERSION_1).problems == []


def test_a_later_shard_is_refused_by_name(tmp_path: Path) -> None:
    metadata = pq.ParquetFile(VERSION_1 / "data/u.parquet").schema_arrow.metadata
    check_metadata(metadata, "u.parquet")
    later = {**metadata, VERSION_KEY.encode(): str(SCHEMA_VERSION + 1).encode()}
    with pytest.raises(DatasetError, match=rf"u.parquet has schema version {SCHEMA_VERSION + 1}, this release reads"):
        check_metadata(later, "u.parquet")
    with pytest.raises(DatasetError, match=r"u.parquet has no llada_drafter.schema_version in its metadata"):
        check_metadata({}, "u.parquet")
    # A manifest of a later version is refused before anything else of it is believed.
    shutil.copytree(VERSION_1, tmp_path / "d")
    text = (tmp_path / "d/manifest.json").read_text()
    (tmp_path / "d/manifest.json").write_text(text.replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(DatasetError, match=r"manifest.json has schema version 2, this release reads versions up to 1"):
        Dataset.open(tmp_path / "d")
