"""A dataset that version 1 wrote stays readable, and gives the values that it gave then."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from shared.commands.merge import merge
from shared.dataset.reader import Dataset
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


def test_a_later_manifest_is_refused_before_anything_else_of_it_is_believed(tmp_path: Path) -> None:
    shutil.copytree(VERSION_1, tmp_path / "d")
    text = (tmp_path / "d/manifest.json").read_text()
    (tmp_path / "d/manifest.json").write_text(text.replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(DatasetError, match=r"manifest.json has schema version 2, this release reads versions up to 1"):
        Dataset.open(tmp_path / "d")


def test_units_of_two_splits_are_read_and_not_merged(tmp_path: Path) -> None:
    """Early imports have some."""
    with pytest.raises(DatasetError, match=r"unit u holds records of held_out and train, .*: import its file again"):
        merge([VERSION_1, VERSION_1], tmp_path / "m")
    assert not (tmp_path / "m").exists()
