"""Validation finds what is wrong with the content, rows that are shifted against their text first of all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from shared.dataset.columns import records_to_table
from shared.dataset.reader import Dataset
from shared.dataset.schema import SCHEMA
from shared.dataset.validate import table_problems, validate_dataset
from shared.errors import DatasetError
from tests.fixtures.records import (
    VOCABULARY_SIZE,
    byte_vocabulary,
    make_record,
    make_records,
    shifted,
    small_units,
    write_dataset,
)
from tests.shared.dataset.test_writer import contents

RECORDS = [make_record("greedy", 3, length=6), make_record("sample", 4, length=6, rule="sample")]


def edited(**columns: Callable[[list[Any]], Any]) -> list[str]:
    """Problems of the table of `RECORDS` with the first record's lists changed."""
    table = records_to_table(RECORDS, VOCABULARY_SIZE)
    for name, edit in columns.items():
        values = table[name].to_pylist()
        values[0] = edit(values[0])
        table = table.set_column(
            SCHEMA.names.index(name), SCHEMA.field(name), pa.array(values, SCHEMA.field(name).type)
        )
    return list(table_problems(table, byte_vocabulary()))


def put(position: int, value: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda values: [value if i == position else v for i, v in enumerate(values)]


def test_a_sound_dataset_has_no_problems(tmp_path: Path) -> None:
    assert edited() == []
    units = small_units()
    write_dataset(tmp_path / "d", units)
    report = validate_dataset(tmp_path / "d")
    assert report.problems == []
    assert (report.units, report.rows) == (3, 12)
    assert report.tokens == sum(len(r.response_ids) for records in units.values() for r in records)


@pytest.mark.parametrize("rule", ["greedy", "sample"])
def test_rows_shifted_by_one_position_fail(tmp_path: Path, rule: str) -> None:
    records = [shifted(record) for record in make_records(6, rule=rule)]
    # The writer refuses them; `check=False` is how they get onto a disk at all.
    with pytest.raises(DatasetError, match=r"shifted against the response"):
        write_dataset(tmp_path / "refused", {"u": records})
    write_dataset(tmp_path / "d", {"u": records}, check=False)
    problems = validate_dataset(tmp_path / "d").problems
    assert len([p for p in problems if "shifted against the response" in p]) >= 6
    # The checksums are right: it is the content that gives it away.
    assert list(Dataset.open(tmp_path / "d").records())


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "prompt id": ({"prompt_ids": put(1, 300)}, r"record 'greedy/greedy/0': prompt token 1 has the id 300"),
    "response id": ({"response_ids": put(2, 400)}, r"response token 2 has the id 400, expected 0 to 299"),
    "bytes": ({"response_bytes": lambda b: b[:3] + b"#" + b[4:]}, r"response_bytes differ .* at byte 3: b'#"),
    "cut bytes": ({"response_bytes": lambda b: b[:-1]}, r"response_bytes differ from the tokens' bytes"),
    "candidate id": ({"candidate_ids": put(12, 300)}, r"token 1: candidate id 300, expected 0 to 299"),
    "duplicate": ({"candidate_ids": lambda v: put(12, v[11])(v)}, r"token 1: candidate id \d+ stands twice"),
    "first gap": ({"candidate_gaps": put(16, 3)}, r"token 2: the row's first gap is 3, expected 0"),
    "wide gaps": ({"candidate_gaps": lambda v: put(17, 65535)(v)}, r"token 2: gaps add up to \d+ steps"),
    "tail": ({"tail_mass": put(3, 1.5)}, r"token 3: tail mass 1\.5, expected 0 to 1"),
    "sampled nan": ({"sampled_logprob": put(3, float("inf"))}, r"token 3: sampled logprob inf"),
    "sampled": ({"sampled_logprob": put(3, -4.0)}, r"token 3: sampled with logprob -4\.0000, but its row gives"),
    "short tails": ({"tail_mass": lambda v: v[:-1]}, r"tail_mass has 5 values, expected 6 for 6 response tokens"),
    "long widths": ({"width": lambda v: [*v, 0]}, r"width has 7 values, expected 6"),
    "negative width": ({"width": put(0, -1)}, r"a width of -1 candidates"),
    "widths": ({"width": put(0, 9)}, r"candidate_ids has 48 values, expected 49"),
    "null": ({"tail_mass": lambda _: None}, r"tail_mass is null, width is not"),
    "rule": ({"rule": lambda _: "sample"}, r"rule 'sample', its sampling settings make it 'greedy'"),
    "split": ({"split": lambda _: "test"}, r"split 'test', expected one of held_out, train"),
    "finish": ({"finish_reason": lambda _: "abort"}, r"finish_reason 'abort', expected one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_each_kind_of_damage_has_its_message(name: str) -> None:
    edits, message = BAD[name]
    problems = edited(**edits)
    pattern = pytest.raises(DatasetError, match=message)
    with pattern:
        raise DatasetError("\n".join(problems))
    assert not any("'sample/sample/0'" in problem for problem in problems)


def test_a_greedy_token_must_lead_its_row() -> None:
    table = records_to_table([make_record("p", 4, length=8, rule="sample")], VOCABULARY_SIZE)
    for name, value in (("rule", "greedy"), ("temperature", 0.0)):
        column = pa.array([value], SCHEMA.field(name).type)
        table = table.set_column(SCHEMA.names.index(name), SCHEMA.field(name), column)
    assert any("decoded greedily with logprob" in problem for problem in table_problems(table, byte_vocabulary()))


def test_a_token_outside_its_row_must_fit_below_it() -> None:
    record = make_record("p", 5, length=6, rule="sample")
    d = record.distributions
    assert d is not None
    outside = [position for position in range(6) if record.response_ids[position] not in d.row(position)[0]] or [0]
    table = records_to_table([record], VOCABULARY_SIZE)
    sampled = np.array(table["sampled_logprob"][0].as_py(), np.float32)
    sampled[outside[0]] = -0.01
    column = pa.array([sampled], SCHEMA.field("sampled_logprob").type)
    table = table.set_column(SCHEMA.names.index("sampled_logprob"), SCHEMA.field("sampled_logprob"), column)
    assert any(f"token {outside[0]}: sampled with logprob -0.0" in p for p in table_problems(table, byte_vocabulary()))


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", small_units())
    whole = contents(tmp_path / "d")
    (tmp_path / "d/README.md").unlink()  # the card belongs to whoever keeps the dataset
    assert not validate_dataset(tmp_path / "d").problems
    for name in whole:
        if name not in ("manifest.json", "README.md"):
            (tmp_path / "d" / name).unlink()
            problems = validate_dataset(tmp_path / "d").problems
            assert any(f"{name} is missing, but the manifest names it" in problem for problem in problems), name
            (tmp_path / "d" / name).write_bytes(whole[name])
    (tmp_path / "d/data/extra.parquet").write_bytes(whole["data/unit-000.parquet"])
    assert any("data/extra.parquet is not in manifest.json" in p for p in validate_dataset(tmp_path / "d").problems)
    with pytest.raises(DatasetError, match=r"is not valid, 1 problems:\n  .*extra.parquet is not in"):
        validate_dataset(tmp_path / "d").raise_if_damaged(tmp_path / "d")
