"""Other people's tools read a shard with no code of ours, and find the same sums."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from shared.dataset.reader import Dataset
from shared.dataset.schema import SCHEMA
from tests.fixtures.records import make_records, write_dataset

SUMS = ("response_ids", "candidate_ids", "candidate_gaps", "width")


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tools") / "d"
    write_dataset(directory, {"u": [*make_records(9), *make_records(4, seed=1, soft=False)]})
    return directory / "data/u.parquet"


@pytest.fixture(scope="module")
def expected(shard: Path) -> dict[str, float]:
    records = list(Dataset.open(shard.parents[1]).records())
    rows = [r.distributions for r in records if r.distributions is not None]
    return {
        "rows": len(records),
        "response_ids": int(sum(r.response_ids.sum() for r in records)),
        "candidate_ids": int(sum(d.ids.sum() for d in rows)),
        "width": int(sum(d.offsets[-1] for d in rows)),
        "candidate_gaps": int(sum(sum(x or []) for x in pq.read_table(shard)["candidate_gaps"].to_pylist())),
        "tail_mass": float(sum(d.tail.astype(np.float64).sum() for d in rows)),
        "response_bytes": sum(len(r.response_bytes) for r in records),
    }


def test_duckdb_finds_the_same_sums(shard: Path, expected: dict[str, float]) -> None:
    duckdb = pytest.importorskip("duckdb")
    columns = ", ".join(f"sum(list_sum({name}))" for name in (*SUMS, "tail_mass"))
    *sums, tail, size, rows = duckdb.sql(
        f"select {columns}, sum(octet_length(response_bytes)), count(*) from '{shard}'"
    ).fetchall()[0]
    assert dict(zip(SUMS, sums, strict=True)) == {name: expected[name] for name in SUMS}
    assert tail == pytest.approx(expected["tail_mass"], rel=1e-6)
    assert (size, rows) == (expected["response_bytes"], expected["rows"])


def test_duckdb_computes_the_stored_logprobs(shard: Path) -> None:
    """The schema's formula in SQL alone, for the first token of every record."""
    duckdb = pytest.importorskip("duckdb")
    found = duckdb.sql(f"""
        with first as (
            select sample_id, tail_mass[1] as tail, list_slice(candidate_gaps, 1, width[1]) as gaps
            from '{shard}' where width is not null
        ), levels as (
            select sample_id, tail,
                list_transform(range(1, len(gaps) + 1), lambda i: list_sum(gaps[1:i]) / 16.0) as g
            from first
        )
        select sample_id, list_transform(
            g, lambda x: ln(1 - tail) - ln(list_sum(list_transform(g, lambda y: exp(-y)))) - x
        ) from levels
    """).fetchall()
    records = {r.sample_id: r for r in Dataset.open(shard.parents[1]).records() if r.distributions is not None}
    assert len(found) == len(records) > 0
    for sample_id, logprobs in found:
        d = records[sample_id].distributions
        assert d is not None
        np.testing.assert_allclose(logprobs, d.row(0)[1], atol=1e-5)


def test_pandas_finds_the_same_sums(shard: Path, expected: dict[str, float]) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_parquet(shard)
    assert list(frame.columns) == SCHEMA.names
    for name in SUMS:
        assert frame[name].dropna().map(lambda values: int(values.sum(dtype=np.int64))).sum() == expected[name]
    assert frame["tail_mass"].dropna().map(lambda v: v.astype(np.float64).sum()).sum() == pytest.approx(
        expected["tail_mass"]
    )
    assert frame["response_bytes"].map(len).sum() == expected["response_bytes"]
    assert (frame["rule"] == "greedy").all()


def test_datasets_finds_the_same_sums(
    shard: Path, expected: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    table = datasets.load_dataset("parquet", data_files=str(shard), split="train", cache_dir=str(tmp_path))
    assert len(table) == expected["rows"]
    for name in SUMS:
        assert sum(sum(values or []) for values in table[name]) == expected[name]
    assert sum(sum(values or []) for values in table["tail_mass"]) == pytest.approx(expected["tail_mass"], rel=1e-6)
    assert sum(map(len, table["response_bytes"])) == expected["response_bytes"]
    assert table[0]["messages"][0]["role"] == "user"
