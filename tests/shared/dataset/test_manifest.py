"""The JSON files of a dataset: found damaged at every byte, compared key by key, refused when they are too new."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from shared.commands.merge import merge
from shared.dataset.manifest import (
    COMMITS,
    MANIFEST,
    FileEntry,
    Manifest,
    Provenance,
    UnitEntry,
    check_file_name,
    dump,
    load,
)
from shared.dataset.reader import Dataset
from shared.dataset.schema import SCHEMA_VERSION
from shared.dataset.validate import validate_dataset
from shared.errors import DatasetError
from tests.fixtures.records import byte_vocabulary, provenance, small_units, write_dataset
from tests.shared.dataset.test_workers import start

UNIT = UnitEntry(
    unit="u", file="data/u.parquet", sha256="ab" * 32, bytes=9, rows=1, tokens=3, candidates=6,
    counts={"train/greedy": 1}, provenance="f" * 64,
)  # fmt: skip


def test_every_flipped_byte_is_found() -> None:
    data = dump(UNIT)
    assert load(UnitEntry, data, "commit") == UNIT
    for position in range(len(data)):
        for bit in (0, 5):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            with pytest.raises(DatasetError, match=r"commit (is damaged|is not|has schema version)"):
                load(UnitEntry, bytes(flipped), "commit")
    for cut in (0, 1, len(data) // 2, len(data) - 1):
        with pytest.raises(DatasetError, match="commit is damaged"):
            load(UnitEntry, data[:cut], "commit")


def test_a_later_version_is_refused_by_name() -> None:
    manifest = Manifest(
        schema_version=SCHEMA_VERSION + 1, provenance="", vocabulary_fingerprint="", rows=0, tokens=0, bytes=0,
        units=[], files=[FileEntry(name="x", bytes=0, sha256="")],
    )  # fmt: skip
    with pytest.raises(
        DatasetError, match=rf"schema version {SCHEMA_VERSION + 1}, this release reads versions up to {SCHEMA_VERSION}"
    ):
        load(Manifest, dump(manifest), "manifest.json")


def test_differences_name_the_key_and_both_values() -> None:
    first = provenance(byte_vocabulary())
    other = provenance(
        byte_vocabulary(), top_k=16, sampling=[{"split": "train", "temperature": 0.7}], details={"new": True}
    )
    assert other.differences(first) == [
        "details: {} there, nothing here",
        "details.new: nothing there, True here",
        "sampling[0].temperature: 0.0 there, 0.7 here",
        "sampling[1].split: 'train' there, nothing here",
        "sampling[1].temperature: 1.0 there, nothing here",
        "top_k: 8 there, 16 here",
    ]
    assert first.fingerprint != other.fingerprint


def test_who_collected_does_not_change_what_was_collected() -> None:
    first = provenance(byte_vocabulary())
    later = first.model_copy(update={"git_commit": "abc", "created": "2026-01-01", "config": {"name": "x"}})
    assert later.differences(first) == []
    assert later.fingerprint == first.fingerprint
    assert load(Provenance, dump(later), "p") == later


OUTSIDE = [
    "../outside.parquet", "data/../../outside.parquet", "/etc/passwd", "", ".", "data//x.parquet", "data/./x", "data/",
    "C:/x.parquet", "C:x", "c:\\x", "data\\..\\..\\x", "\\\\host\\share", "data/x\0.parquet", "s3://bucket/x", "file:///x",
]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("what", ["shard", "file", "tokenizer", "commit", "merge"])
def test_a_file_outside_the_dataset_is_not_followed(tmp_path: Path, what: str, name: str) -> None:
    """Files with right checksums, as somebody who wants them followed would write them."""
    write_dataset(tmp_path / "d", small_units())
    shutil.copy(tmp_path / "d/data/unit-000.parquet", tmp_path / "outside.parquet")
    manifest = Dataset.open(tmp_path / "d").manifest
    unit = manifest.units[0].model_copy(update={"file": name})
    entry = FileEntry(name="x", bytes=1, sha256="0" * 64).model_copy(update={"name": name})
    if what == "tokenizer":
        entry = entry.model_copy(update={"name": f"tokenizer/{name}"})
    changes: dict[str, Any] = {"units": [unit, *manifest.units[1:]]}
    if what in ("file", "tokenizer"):
        changes = {"files": [*manifest.files, entry]}
    message = r"json: the file name '.*' leads out of its directory .*, expected a relative one, .*: copy it again"
    if what == "commit":
        (tmp_path / "d" / COMMITS / "unit-000.json").write_bytes(dump(unit))
        with pytest.raises(DatasetError, match=message):
            start(tmp_path / "d")
        return
    if what == "tokenizer" and ":" in name:
        return  # a colon further on is a file's name
    (tmp_path / "d" / MANIFEST).write_bytes(dump(manifest.model_copy(update=changes)))
    if what == "merge":
        write_dataset(tmp_path / "e", {})
        with pytest.raises(DatasetError, match=message):
            merge([tmp_path / "e", tmp_path / "d"], tmp_path / "m")
        assert not (tmp_path / "m").exists()
        return
    with pytest.raises(DatasetError, match=message):
        Dataset.open(tmp_path / "d")
    assert any("leads out of its directory" in problem for problem in validate_dataset(tmp_path / "d").problems)


@pytest.mark.parametrize("name", ["../u", "a/b", "", ".hidden", "a" * 201, "u\n"])
def test_a_unit_that_cannot_be_a_file_is_refused(tmp_path: Path, name: str) -> None:
    write_dataset(tmp_path, small_units())
    manifest = Dataset.open(tmp_path).manifest
    units = [manifest.units[0].model_copy(update={"unit": name}), *manifest.units[1:]]
    (tmp_path / MANIFEST).write_bytes(dump(manifest.model_copy(update={"units": units})))
    with pytest.raises(DatasetError, match=r"manifest.json: unit name .* cannot be a file's name"):
        Dataset.open(tmp_path)


def test_names_inside_are_kept_and_the_users_links_followed(tmp_path: Path) -> None:
    for name in ("manifest.json", "data/a.b-c_d.parquet", "tokenizer/additional_chat_templates/x y.jinja", "a/..b"):
        assert check_file_name(name) == name
    write_dataset(tmp_path / "d", small_units())
    (tmp_path / "d/data").rename(tmp_path / "disk")
    (tmp_path / "d/data").symlink_to(tmp_path / "disk")
    assert validate_dataset(tmp_path / "d").problems == []
