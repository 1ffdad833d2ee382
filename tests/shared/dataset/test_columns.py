"""What must not be stored is refused, naming record, row, value and fix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shared.dataset.columns import records_to_table, table_to_records
from shared.dataset.records import Distributions, Record
from shared.dataset.schema import DISTRIBUTION_COLUMNS, SCHEMA
from shared.errors import DatasetError
from tests.fixtures.records import VOCABULARY_SIZE, make_record, make_records, shifted
from tests.shared.dataset.test_reader import assert_same


def change(record: Record, **changes: object) -> Record:
    """`record` with arrays of its distributions replaced; a callable is given a copy to change in place."""
    assert record.distributions is not None
    new: dict[str, Any] = {}
    for name, value in changes.items():
        array = getattr(record.distributions, name).copy()
        new[name] = value(array) if callable(value) else value
    return replace(record, distributions=replace(record.distributions, **new))


def put(position: int, value: float) -> Callable[[NDArray[Any]], NDArray[Any]]:
    def edit(array: NDArray[Any]) -> NDArray[Any]:
        array[position] = value
        return array

    return edit


RECORD = make_record("p", 3, length=6, k=8)
BAD: dict[str, tuple[Record, str]] = {
    "nan": (change(RECORD, logprobs=put(9, np.nan)), r"token 1: candidate logprob nan, expected a finite number"),
    "infinity": (change(RECORD, logprobs=put(15, -np.inf)), r"token 1: candidate logprob -inf"),
    "tail": (change(RECORD, tail=put(2, np.inf)), r"token 2: tail mass inf, expected 0 to 1"),
    "never": (
        change(RECORD, sampled=put(2, -np.inf)),
        r"token 2: sampled logprob -inf, expected a finite number: the teacher gives this token .* leave the resp",
    ),
    "id": (change(RECORD, ids=put(18, VOCABULARY_SIZE)), r"token 2: candidate id 300, expected 0 to 299"),
    "negative id": (change(RECORD, ids=put(0, -1)), r"token 0: candidate id -1, expected 0 to 299"),
    "duplicate": (change(RECORD, ids=lambda a: put(17, a[16])(a)), r"token 2: candidate id \d+ stands twice"),
    "order": (change(RECORD, logprobs=put(30, -0.001)), r"token 3: candidate logprob -0.001\d*, expected not above"),
    "mass": (change(RECORD, tail=put(4, 0.9)), r"token 4: candidates' mass plus tail mass 1\.[0-9]+, expected 1"),
    "sampled": (change(RECORD, sampled=put(3, -7.5)), r"token 3: sampled with logprob -7\.5000, but its row gives it"),
    "positive": (change(RECORD, sampled=put(3, 0.5)), r"token 3: sampled logprob 0\.5, expected a finite num"),
    "prompt": (replace(RECORD, prompt_ids=np.array([1, 999], np.int32)), r"prompt token 1 has the id 999, expected"),
    "response": (replace(RECORD, response_ids=RECORD.response_ids + 300), r"response token 0 has the id \d+"),
    "shifted": (shifted(RECORD), r"shifted against the response"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_must_not_be_stored_is_refused(name: str) -> None:
    record, message = BAD[name]
    with pytest.raises(DatasetError, match=message) as error:
        records_to_table([RECORD, record], VOCABULARY_SIZE)
    assert "record 'p/greedy/0'" in str(error.value)


def test_a_token_outside_its_row_cannot_be_likelier_than_the_row_ends() -> None:
    record = make_record("p", 4, length=6, k=8, rule="sample")
    assert record.distributions is not None
    gone = 2  # take the token out of its row, leave its logprob
    d = record.distributions
    ids = d.ids.copy()
    row = ids[gone * 8 : gone * 8 + 8]
    row[row == record.response_ids[gone]] = next(i for i in range(300) if i not in row)
    sampled = d.sampled.copy()
    sampled[gone] = d.logprobs[gone * 8]
    moved = replace(record, distributions=replace(d, ids=ids, sampled=sampled))
    with pytest.raises(DatasetError, match=r"token 2: sampled with logprob -\d\.\d+ from outside the row"):
        records_to_table([moved], VOCABULARY_SIZE)


def test_mixed_records_come_back_in_order() -> None:
    records = [
        make_record("a", 1, length=0),
        make_record("b", 2, length=5, soft=False),
        *make_records(3, rule="sample"),
        make_record("c", 3, length=1),
    ]
    table = records_to_table(records, VOCABULARY_SIZE)
    assert table.schema.equals(SCHEMA)
    for read, record in zip(table_to_records(table), records, strict=True):
        assert_same(read, record, exact=False)
    # Any slice of the table decodes to the same records.
    for read, record in zip(table_to_records(table.slice(2, 3)), records[2:5], strict=True):
        assert_same(read, record, exact=False)
    few = table_to_records(table.drop(DISTRIBUTION_COLUMNS))
    assert all(record.distributions is None for record in few)
    assert not list(table_to_records(table.slice(0, 0)))


def test_rows_of_unknown_tail_and_of_no_candidates_are_kept_as_such() -> None:
    record = make_record("p", 5, length=3, k=4)
    d = record.distributions
    assert d is not None
    offsets = np.array([0, 4, 4, 8])
    keep = np.r_[0:4, 8:12]
    unknown = Distributions(
        offsets,
        d.ids[keep],
        (d.logprobs[keep].reshape(2, 4) - np.log(np.exp(d.logprobs[keep].reshape(2, 4)).sum(1, keepdims=True))).reshape(
            -1
        ),
        np.full(3, np.nan, np.float32),
        np.full(3, np.nan, np.float32),
    )
    (read,) = table_to_records(records_to_table([replace(record, distributions=unknown)], VOCABULARY_SIZE))
    assert read.distributions is not None
    assert np.isnan(read.distributions.tail).all()
    assert read.distributions.offsets.tolist() == [0, 4, 4, 8]
    # A token without a row has no logprob; one in its row has the row's.
    assert np.isnan(read.distributions.sampled[1])
    assert not np.isnan(read.distributions.sampled[0])
