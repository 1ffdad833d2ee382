"""One record as it lies in Parquet: the Arrow schema, its version, what each column means and how it is stored.

Columns are plain Arrow types that pandas, DuckDB, Polars and Hugging Face `datasets` open without this code.
Everything of a response's tokens is a flat list in the response's row: per token (`response_ids`, `sampled_logprob`,
`width`, `tail_mass`) or per candidate, token after token (`candidate_ids`, `candidate_gaps`).

Logprobs are stored as gaps (the README of this folder has the formula): mass and tail sum to 1 whatever the rounding
was, rows stay monotone, and an error of half a step changes the KL by its square only. The choice was measured:
`tests/benchmarks/RESULTS.md`, bytes of the dataset.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from shared.errors import DatasetError

SCHEMA_VERSION = 1
STEPS_PER_NAT = 16
"""Logprob gaps are whole steps of 1/16 nat."""
SAMPLED_STEPS_PER_NAT = 1024
"""`sampled_logprob` is a multiple of 1/1024 nat."""
MAX_STEPS = 65_535
"""A candidate further than 4096 nats below the first is stored at that distance; its probability is 0 either way."""

VERSION_KEY = "llada_drafter.schema_version"
STEPS_KEY = "llada_drafter.steps_per_nat"
FORMULA_KEY = "llada_drafter.logprob"
FAILURES_KEY = "llada_drafter.failures"
"""JSON, sample id → reason: samples of the unit that have no response. Absent where there are none."""
_FORMULA = (
    "log p_i = log(1 - tail_mass) - log(sum_j exp(-G_j / steps_per_nat)) - G_i / steps_per_nat, where G_i is the "
    "sum of the token's candidate_gaps up to i. A tail_mass of NaN is unknown; p is then relative to the candidates."
)


@dataclass(frozen=True, slots=True)
class Column:
    """One column: `shuffled` columns are split into byte streams before compression."""

    name: str
    type: pa.DataType
    meaning: str
    nullable: bool = False
    shuffled: bool = False


def _list(of: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", of, nullable=False))


COLUMNS: tuple[Column, ...] = (
    Column("sample_id", pa.string(), "stable and unique: the prompt, the decoding rule, the sample's number"),
    Column("prompt_id", pa.string(), "stable id of the prompt; one prompt may have several samples"),
    Column("split", pa.string(), "train or held_out, a property of the prompt"),
    Column("skill", pa.string(), "the prompt's kind"),
    Column("rule", pa.string(), "greedy, sample (temperature 1, unfiltered) or filtered; follows from the sampling"),
    Column(
        "messages",
        pa.list_(
            pa.field(
                "element",
                pa.struct([pa.field("role", pa.string(), False), pa.field("content", pa.string(), False)]),
                nullable=False,
            )
        ),
        "the conversation before the response",
    ),
    Column("prompt_text", pa.string(), "the conversation as the teacher's chat template rendered it"),
    Column("prompt_ids", _list(pa.int32()), "teacher tokens of prompt_text", shuffled=True),
    Column("response_ids", _list(pa.int32()), "teacher tokens of the response, end of turn included", shuffled=True),
    Column("response_bytes", pa.binary(), "bytes of the response's non-special tokens; may end inside a character"),
    Column("finish_reason", pa.string(), "stop, length or unknown"),
    Column("temperature", pa.float64(), "of sampling; 0 is greedy"),
    Column("top_p", pa.float64(), "of sampling; 1 filters nothing"),
    Column("top_k", pa.int32(), "of sampling; 0 filters nothing. Not the number of candidates stored"),
    Column("max_tokens", pa.int32(), "the response's limit"),
    Column("seed", pa.int64(), "of sampling", nullable=True),
    Column(
        "sampled_logprob",
        _list(pa.float32()),
        "per token: log p of the token that stands there, at temperature 1 before any filter, rounded to 1/1024; "
        "NaN where unknown. Null, like the columns below, in records without distributions",
        nullable=True,
        shuffled=True,
    ),
    Column("width", _list(pa.int32()), "per token: how many candidates it has", nullable=True),
    Column(
        "candidate_ids",
        _list(pa.int32()),
        "per candidate: token id; each token's candidates in order of falling probability",
        nullable=True,
        shuffled=True,
    ),
    Column(
        "candidate_gaps",
        _list(pa.uint16()),
        "per candidate: steps of 1/16 nat below the candidate before it; 0 at each token's first",
        nullable=True,
        shuffled=True,
    ),
    Column(
        "tail_mass",
        _list(pa.float32()),
        "per token: probability outside the candidates, rounded to 11 bits; NaN where unknown",
        nullable=True,
        shuffled=True,
    ),
)

DISTRIBUTION_COLUMNS = ("sampled_logprob", "width", "candidate_ids", "candidate_gaps", "tail_mass")

SCHEMA = pa.schema(
    [pa.field(column.name, column.type, column.nullable) for column in COLUMNS],
    metadata={VERSION_KEY: str(SCHEMA_VERSION), STEPS_KEY: str(STEPS_PER_NAT), FORMULA_KEY: _FORMULA},
)


def parquet_options() -> dict[str, Any]:
    """How shards are compressed: arguments of `pyarrow.parquet.ParquetWriter`."""
    shuffled = {f"{column.name}.list.element": "BYTE_STREAM_SPLIT" for column in COLUMNS if column.shuffled}
    return {
        "compression": "zstd",
        # 16 takes fifteen times as long and saves 3 % (`tests/benchmarks/RESULTS.md`).
        "compression_level": 1,
        "use_dictionary": [
            "prompt_id", "split", "skill", "rule", "finish_reason", "temperature", "top_p", "top_k", "max_tokens",
            "seed", "width.list.element", "messages.list.element.role",
        ],
        "column_encoding": shuffled,
        "data_page_size": 8 << 20,
        "version": "2.6",
        # A reader needs neither: types and nullability are Parquet's own, and lists are never searched by value.
        "store_schema": False,
        "write_statistics": ["sample_id", "split", "rule"],
    }  # fmt: skip


def check_version(version: int, source: str) -> None:
    """Refuse what a later release wrote.

    Raises:
        DatasetError: if `version` is not one that this code reads.
    """
    if version > SCHEMA_VERSION:
        raise DatasetError(
            f"{source} has schema version {version}, this release reads versions up to {SCHEMA_VERSION}; "
            "install the release that wrote it, or a later one"
        )
    if version < 1:
        raise DatasetError(f"{source} has schema version {version}, expected 1 to {SCHEMA_VERSION}; it is damaged")
