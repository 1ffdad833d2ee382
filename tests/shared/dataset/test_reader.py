"""A dataset gives back what was written, in the stored and in a random order."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shared.dataset.reader import Dataset
from shared.dataset.records import Record
from shared.dataset.schema import STEPS_PER_NAT
from shared.dataset.validate import validate_dataset
from shared.errors import DatasetError
from tests.fixtures.records import byte_vocabulary, small_units, write_dataset


def assert_same(left: Record, right: Record, exact: bool = True) -> None:
    """Equal in everything; logprobs to half a step where `right` was never stored."""
    for name in (
        "sample_id", "prompt_id", "split", "skill", "messages", "prompt_text", "response_bytes",
        "finish_reason", "sampling",
    ):  # fmt: skip
        assert getattr(left, name) == getattr(right, name), name
    assert np.array_equal(left.prompt_ids, right.prompt_ids)
    assert np.array_equal(left.response_ids, right.response_ids)
    assert (left.distributions is None) == (right.distributions is None)
    if left.distributions is None or right.distributions is None:
        return
    assert np.array_equal(left.distributions.offsets, right.distributions.offsets)
    assert np.array_equal(left.distributions.ids, right.distributions.ids)
    for name in ("logprobs", "tail", "sampled"):
        a, b = getattr(left.distributions, name), getattr(right.distributions, name)
        np.testing.assert_allclose(a, b, rtol=0, atol=0 if exact else 1 / STEPS_PER_NAT)


def arrays_of(record: Record) -> list[NDArray[Any]]:
    assert record.distributions is not None
    own = [getattr(record.distributions, field.name) for field in fields(record.distributions)]
    return [record.prompt_ids, record.response_ids, *own]


def test_a_dataset_gives_back_what_was_written(tmp_path: Path) -> None:
    units = small_units()
    write_dataset(tmp_path / "d", units)
    dataset = Dataset.open(tmp_path / "d")
    written = [record for records in units.values() for record in records]
    assert len(dataset) == len(written)
    for read, record in zip(dataset.records(), written, strict=True):
        assert_same(read, record, exact=False)
    for index in (0, 5, -1):
        assert_same(dataset[index], list(dataset.records())[index])
        assert not any(array.flags.writeable for array in arrays_of(dataset[index]))
    assert dataset.vocabulary.fingerprint == byte_vocabulary().fingerprint
    assert dataset.provenance.teacher == "toy"
    assert validate_dataset(tmp_path / "d").problems == []


def test_records_are_chosen_by_split_and_rule(tmp_path: Path) -> None:
    units = small_units()
    write_dataset(tmp_path / "d", units)
    dataset = Dataset.open(tmp_path / "d")
    held_out = list(dataset.records(split="held_out", rule="sample", distributions=False))
    assert [r.sample_id for r in held_out] == [units["unit-002"][row].sample_id for row in (1, 3)]
    assert all(r.distributions is None for r in held_out)
    assert list(dataset.records(split="held_out", rule="filtered")) == []


def test_an_index_outside_the_dataset_is_an_index_error(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", small_units())
    with pytest.raises(IndexError, match="record 12 of 12"):
        Dataset.open(tmp_path / "d")[12]


def test_a_directory_without_a_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"holds no dataset .*teacher collect"):
        Dataset.open(tmp_path)
