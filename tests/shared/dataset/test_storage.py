"""Datasets on a real S3-compatible server: one PUT a file, resumed, read back and validated."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from shared.dataset.manifest import MANIFEST
from shared.dataset.reader import Dataset
from shared.dataset.storage import LocalStorage, ObjectStorage, open_storage
from shared.dataset.validate import validate_dataset
from shared.dataset.writer import DatasetWriter
from shared.errors import DatasetError, MissingExtraError
from tests.fixtures.records import byte_vocabulary, make_records, provenance, small_units, write_dataset
from tests.fixtures.s3 import BUCKET
from tests.shared.dataset.test_reader import assert_same
from tests.shared.dataset.test_writer import contents


def objects(client: Any, prefix: str) -> dict[str, Any]:
    found = client.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/").get("Contents", [])
    return {entry["Key"].removeprefix(f"{prefix}/"): entry for entry in found}


def test_a_dataset_is_written_resumed_and_read(s3: Any, tmp_path: Path) -> None:
    units = small_units()
    url = f"s3://{BUCKET}/plain"
    vocabulary = byte_vocabulary()
    DatasetWriter(url, provenance(vocabulary), vocabulary, None).write_unit("unit-001", units["unit-001"])
    with pytest.raises(DatasetError, match=r"s3://datasets/plain is unfinished"):
        Dataset.open(url)
    second = DatasetWriter(url, provenance(vocabulary), vocabulary, None)
    assert second.committed == {"unit-001"}
    for name, records in units.items():
        second.write_unit(name, records)
    second.finish(units)
    with pytest.raises(DatasetError, match="top_k: 8 there, 9 here"):
        DatasetWriter(url, provenance(vocabulary, top_k=9), vocabulary, None)
    # The same bytes as on a disk, the marker last, and no parts: each object came in one PUT.
    write_dataset(tmp_path / "local", units)
    stored = objects(s3, "plain")
    local = contents(tmp_path / "local")
    assert stored.keys() == local.keys()
    for name, data in local.items():
        assert s3.get_object(Bucket=BUCKET, Key=f"plain/{name}")["Body"].read() == data
    assert all("-" not in entry["ETag"] for entry in stored.values())
    assert max(stored, key=lambda name: stored[name]["LastModified"]) == MANIFEST or len(
        {entry["LastModified"] for entry in stored.values()}
    ) < len(stored)
    dataset = Dataset.open(url)
    for read, record in zip(dataset.records(), Dataset.open(tmp_path / "local").records(), strict=True):
        assert_same(read, record)
    assert validate_dataset(url).problems == []
    assert dataset.vocabulary.fingerprint == vocabulary.fingerprint


def test_damage_in_the_store_is_found(s3: Any) -> None:
    url = f"s3://{BUCKET}/damaged"
    write_dataset(url, small_units())
    key = "damaged/data/unit-001.parquet"
    data = bytearray(s3.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    data[len(data) // 2] ^= 4
    s3.put_object(Bucket=BUCKET, Key=key, Body=bytes(data))
    with pytest.raises(DatasetError, match=r"unit-001.parquet is damaged"):
        list(Dataset.open(url).records())
    assert any("unit-001.parquet is damaged" in problem for problem in validate_dataset(url).problems)
    s3.delete_object(Bucket=BUCKET, Key=key)
    assert any("unit-001.parquet is missing" in problem for problem in validate_dataset(url).problems)


@pytest.mark.usefixtures("s3")
def test_records_by_number_fetch_a_shard_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.dataset.writer.ROW_GROUP_CANDIDATES", 1)  # a row group a record
    url = f"s3://{BUCKET}/numbers"
    write_dataset(url, {f"u{i}": make_records(12, seed=i) for i in range(3)})
    dataset = Dataset.open(url)
    fetched: list[str] = []
    read = dataset.storage.read
    monkeypatch.setattr(dataset.storage, "read", lambda name: fetched.append(name) or read(name))
    by_number = [dataset[number] for number in range(len(dataset))]
    assert fetched == [f"data/u{i}.parquet" for i in range(3)]
    for read_by_number, record in zip(by_number, dataset.records(), strict=True):
        assert_same(read_by_number, record)


def test_the_tokenizer_of_a_store_is_a_local_directory(s3: Any, tmp_path: Path) -> None:
    del s3
    source = tmp_path / "tokenizer"
    source.mkdir()
    (source / "tokenizer.json").write_text('{"model": {}}')
    (source / "model.safetensors").write_bytes(b"weights stay where they are")
    vocabulary = byte_vocabulary()
    writer = DatasetWriter(f"s3://{BUCKET}/tokenizer", provenance(vocabulary), vocabulary, source)
    writer.finish([])
    directory = Dataset.open(f"s3://{BUCKET}/tokenizer").tokenizer_dir
    # The dataset that fetched it may be gone by the time that its files are read.
    assert contents(directory) == {"tokenizer.json": b'{"model": {}}'}


def test_a_missing_bucket_is_one_message(s3: Any) -> None:
    del s3
    with pytest.raises(DatasetError, match=r"s3://nowhere/d.*"):
        Dataset.open("s3://nowhere/d")
    vocabulary = byte_vocabulary()
    with pytest.raises(DatasetError, match=r"cannot write s3://nowhere/d/provenance.json: .*check the bucket"):
        DatasetWriter("s3://nowhere/d", provenance(vocabulary), vocabulary, None)


def test_any_file_system_of_fsspec_holds_a_dataset() -> None:
    units = small_units()
    write_dataset("memory://datasets/one", units)
    assert len(Dataset.open("memory://datasets/one")) == sum(map(len, units.values()))
    assert validate_dataset("memory://datasets/one").problems == []


def test_urls_and_paths_find_their_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_storage(tmp_path), LocalStorage)
    assert isinstance(open_storage(f"file://{tmp_path}"), LocalStorage)
    assert isinstance(open_storage("memory://x"), ObjectStorage)
    with pytest.raises(DatasetError, match=r"nosuch://x: .*; expected a local path, or a URL such as s3://"):
        open_storage("nosuch://x")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'llada-drafter\[gcs\]'"):
        open_storage("gs://bucket/x")


def test_a_store_whose_folder_gets_its_first_file_while_it_is_listed(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """s3fs looks twice where a listing is empty; the folder that it finds then is no file of the dataset."""
    from s3fs import S3FileSystem

    list_once = S3FileSystem._lsdir

    async def listed(self: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        found = await list_once(self, path, *args, **kwargs)
        s3.put_object(Bucket=BUCKET, Key="racing/commits/unit-0.json", Body=b"{}")
        return found

    storage = open_storage(f"s3://{BUCKET}/racing")
    monkeypatch.setattr(S3FileSystem, "_lsdir", listed)
    assert storage.list("commits") == {}
    monkeypatch.undo()
    assert storage.list("commits") == {"commits/unit-0.json": 2}
