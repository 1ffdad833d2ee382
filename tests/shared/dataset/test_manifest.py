"""The JSON files of a dataset: found damaged at every byte, compared key by key."""

from __future__ import annotations

import pytest

from shared.dataset.manifest import Provenance, UnitEntry, dump, load
from shared.errors import DatasetError
from tests.fixtures.records import byte_vocabulary, provenance

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
