"""`datasets.load_dataset(DIR)`, the real one and offline, finds every row in its split, and no other file."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from shared.commands.legacy_json.files import import_json
from shared.commands.legacy_json.layout import ImportSettings
from shared.commands.merge import merge
from shared.dataset.reader import Dataset
from shared.dataset.records import Record
from shared.dataset.validate import validate_dataset
from shared.hub import CARD
from tests.fixtures.records import make_records, save_byte_tokenizer, small_units, write_dataset
from tests.fixtures.toy_run import make_tokenizer
from tests.shared.dataset.test_versions import VERSION_1


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def loaded(path: Path) -> dict[str, Any]:
    """One line, as a user writes it."""
    from datasets import load_dataset

    return dict(load_dataset(str(path), cache_dir=str(path.parent / "cache")))


def assert_splits(path: Path) -> dict[str, int]:
    """Every row of the dataset comes once, in the split that it says; rows by split."""
    found = loaded(path)
    dataset = Dataset.open(path)
    for split, rows in found.items():
        assert set(rows["split"]) == {split}
    expected = Counter(record.split for record in dataset.records())
    assert {split: len(rows) for split, rows in found.items()} == expected
    samples = sorted(sample for rows in found.values() for sample in rows["sample_id"])
    assert samples == sorted(record.sample_id for record in dataset.records())
    assert validate_dataset(path).problems == []
    return dict(expected)


def collected() -> Mapping[str, Sequence[Record]]:
    """Units as the teacher names them."""
    return {
        "held_out-greedy-00000": make_records(3, seed=1, split="held_out"),
        "train-greedy-00000": make_records(4, seed=2),
        "train-greedy-00001": make_records(2, seed=3, soft=False),
        "train-sample-00000": make_records(3, seed=4, rule="sample"),
    }


def front_matter(path: Path) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((path / CARD).read_text().split("---\n")[1])
    return tree


def test_a_collected_dataset(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", collected())
    assert assert_splits(tmp_path / "d") == {"train": 9, "held_out": 3}
    files = front_matter(tmp_path / "d")["configs"][0]["data_files"]
    assert files == [
        {"split": "train", "path": ["data/train-*.parquet"]},
        {"split": "held_out", "path": ["data/held_out-*.parquet"]},
    ]
    row = loaded(tmp_path / "d")["train"][0]
    record = next(Dataset.open(tmp_path / "d").records(split="train"))
    assert row["response_ids"] == record.response_ids.tolist()


def test_only_training_rows(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", {"u": make_records(3)})
    assert assert_splits(tmp_path / "d") == {"train": 3}


def test_an_import_has_units_of_one_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.commands.legacy_json.files.UNIT_ENTRIES", 4)
    make_tokenizer(tmp_path / "tokenizer")
    entries = [
        {
            "id": f"e{i}",
            "messages": [{"role": "user", "content": "the cat" * i}, {"role": "assistant", "content": "runs"}],
        }
        for i in range(1, 24)
    ]
    (tmp_path / "in.json").write_text(json.dumps(entries))
    import_json(tmp_path / "in.json", tmp_path / "d", tmp_path / "tokenizer", ImportSettings(held_out=0.3))
    counts = assert_splits(tmp_path / "d")
    assert set(counts) == {"train", "held_out"}
    units = [unit.unit for unit in Dataset.open(tmp_path / "d").manifest.units]
    assert units[0] == "held_out-import-000000"
    assert units[-1].startswith("train-import-00000")
    assert all(unit.rows <= 4 for unit in Dataset.open(tmp_path / "d").manifest.units)


def test_a_merge_of_what_was_collected_and_of_units_of_other_names(tmp_path: Path) -> None:
    tokenizer = save_byte_tokenizer(tmp_path / "tokenizer")
    write_dataset(tmp_path / "a", collected(), tokenizer=tokenizer)
    write_dataset(tmp_path / "b", {"train-greedy-00000": make_records(5, seed=9), **small_units()}, tokenizer=tokenizer)
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    assert assert_splits(tmp_path / "m") == {"train": 9 + 5 + 8, "held_out": 3 + 4}
    files = {entry["split"]: entry["path"] for entry in front_matter(tmp_path / "m")["configs"][0]["data_files"]}
    assert files == {
        "train": ["data/train-*.parquet", "data/unit-000.01.parquet", "data/unit-001.01.parquet"],
        "held_out": ["data/held_out-*.parquet", "data/unit-002.01.parquet"],
    }
    before = (tmp_path / "m/manifest.json").read_bytes()
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    assert (tmp_path / "m/manifest.json").read_bytes() == before


def test_a_unit_with_the_name_of_the_other_split_is_named_itself(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", {"train-a": make_records(3, split="held_out"), "train-b": make_records(2, seed=5)})
    assert assert_splits(tmp_path / "d") == {"train": 2, "held_out": 3}


def test_a_card_that_is_there_is_kept_and_a_dataset_without_one_is_read(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", collected())
    (tmp_path / "d" / CARD).write_text("---\nlicense: mit\n---\n")
    write_dataset(tmp_path / "d", collected())
    assert (tmp_path / "d" / CARD).read_text() == "---\nlicense: mit\n---\n"
    assert validate_dataset(tmp_path / "d").problems == []
    shutil.copytree(VERSION_1, tmp_path / "old")
    assert not (tmp_path / "old" / CARD).exists()
    assert len(Dataset.open(tmp_path / "old")) == 4


def test_the_card_says_what_the_dataset_is(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", collected(), retained_mass=0.95)
    text = (tmp_path / "d" / CARD).read_text()
    for line in (
        "# Top-k distributions of toy",
        "| candidates per token (k) | as many as hold 0.95 of the mass, at most 8 |",
        "| responses | 12 |",
        "| train | sample | 3 |",
        "| `tail_mass` | `list<float>` | per token: probability outside",
        "splits: train, held_out",
    ):
        assert line in text, text
