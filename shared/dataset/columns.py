"""Records to Arrow tables and back, whole batches at a time.

`records_to_table` refuses what cannot be stored faithfully, naming the record, the row and the value: it is the one
way into a shard. `table_to_records` decodes a row group in a few passes; its records are slices of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from shared.dataset.checks import Rows, check_records
from shared.dataset.encoding import decode_logprobs, encode_gaps, round_sampled, round_tail, row_matches
from shared.dataset.records import Distributions, Message, Record, Sampling, offsets_of
from shared.dataset.schema import DISTRIBUTION_COLUMNS, SCHEMA
from shared.errors import DatasetError

_FLAT_COLUMNS = frozenset(
    field.name for field in SCHEMA if pa.types.is_list(field.type) and pa.types.is_primitive(field.type.value_type)
)
"""Lists of numbers, which numpy sees without a copy."""
_SAMPLING_COLUMNS = tuple(field.name for field in fields(Sampling))


def records_to_table(records: Sequence[Record], vocabulary_size: int) -> pa.Table:
    """The records as a table of `shared.dataset.schema.SCHEMA`.

    Args:
        vocabulary_size: ids must be below it.

    Raises:
        DatasetError: as `shared.dataset.checks.check_records`.
    """
    rows = check_records(records, vocabulary_size)
    has_rows = [r.distributions is not None for r in records]
    tokens = [0 if r.distributions is None else len(r.response_ids) for r in records]
    candidates = [0 if r.distributions is None else len(r.distributions.ids) for r in records]
    stored = _stored_rows(rows)

    def column(name: str) -> pa.Array:
        if name in stored:
            lengths = candidates if name.startswith("candidate_") else tokens
            return _list_array(name, stored[name], lengths, None if all(has_rows) else has_rows)
        if name in _FLAT_COLUMNS:
            values = [getattr(r, name) for r in records]
            return _list_array(name, np.concatenate([*values, np.zeros(0, np.int32)]), [len(v) for v in values])
        if name == "rule" or name in _SAMPLING_COLUMNS:
            return pa.array([getattr(r.sampling, name) for r in records], SCHEMA.field(name).type)
        if name == "messages":
            turns = [[{"role": m.role, "content": m.content} for m in r.messages] for r in records]
            return pa.array(turns, SCHEMA.field(name).type)
        return pa.array([getattr(r, name) for r in records], SCHEMA.field(name).type)

    return pa.Table.from_arrays([column(field.name) for field in SCHEMA], schema=SCHEMA)


def table_to_records(table: pa.Table) -> Iterator[Record]:
    """The records of `table`, which has the columns of `shared.dataset.schema.SCHEMA`.

    Their numbers are decoded at once, each record is made when it is asked for; without the distribution columns
    `Record.distributions` is None. A record's arrays are read-only views of the table's, and keep it in memory.
    """
    plain = {name: table[name].to_pylist() for name in table.schema.names if name not in _FLAT_COLUMNS}
    samplings = map(Sampling, *(plain.pop(name) for name in _SAMPLING_COLUMNS))
    del plain["rule"]  # follows from the sampling
    prompt_ids, prompt_at = flat_list(table["prompt_ids"])
    response_ids, response_at = flat_list(table["response_ids"])
    has_rows = set(DISTRIBUTION_COLUMNS).issubset(table.schema.names)
    rows = _distributions(table, response_ids, response_at) if has_rows else itertools.repeat(None, table.num_rows)
    for i, (sampling, distributions) in enumerate(zip(samplings, rows, strict=True)):
        values = {name: column[i] for name, column in plain.items()}
        values["messages"] = tuple(Message(m["role"], m["content"]) for m in values["messages"])
        yield Record(
            **values,
            prompt_ids=prompt_ids[prompt_at[i] : prompt_at[i + 1]],
            response_ids=response_ids[response_at[i] : response_at[i + 1]],
            sampling=sampling,
            distributions=distributions,
        )


def _distributions(
    table: pa.Table, response_ids: NDArray[np.int32], response_at: NDArray[np.int64]
) -> Iterator[Distributions | None]:
    """Those of each record; None where the columns are null."""
    widths, token_at = flat_list(table["width"])
    ids, candidate_at = flat_list(table["candidate_ids"])
    gaps, _ = flat_list(table["candidate_gaps"])
    tail, _ = flat_list(table["tail_mass"])
    stored, _ = flat_list(table["sampled_logprob"])
    logprobs = decode_logprobs(widths, gaps, tail)
    present = is_present(table["width"])
    # In the row the entry is the value: the column holds it rounded.
    sampled = stored.copy()
    tokens, entries = row_matches(widths, ids, response_ids[np.repeat(present, np.diff(response_at))])
    sampled[tokens] = logprobs[entries]
    row_ends = offsets_of(widths)
    for own in (logprobs, sampled):  # the other arrays are Arrow's, and read-only
        own.flags.writeable = False
    for i, is_there in enumerate(present.tolist()):
        tokens_of = slice(token_at[i], token_at[i + 1])
        candidates = slice(candidate_at[i], candidate_at[i + 1])
        offsets = row_ends[token_at[i] : token_at[i + 1] + 1] - candidate_at[i]
        offsets.flags.writeable = False
        yield (
            Distributions(offsets, ids[candidates], logprobs[candidates], tail[tokens_of], sampled[tokens_of])
            if is_there
            else None
        )


def open_parquet(source: Path | bytes, name: str) -> pq.ParquetFile:
    """A shard, given by its path or its bytes; `name` is for messages.

    Raises:
        DatasetError: if it is no Parquet file, or not of this schema.
    """
    try:
        file = pq.ParquetFile(source if isinstance(source, Path) else pa.BufferReader(source))
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{name} is not a Parquet file: {error}") from error
    schema = file.schema_arrow
    if not schema.equals(SCHEMA, check_metadata=False):
        raise DatasetError(
            f"{name} has the columns {schema.names}, expected {SCHEMA.names}; "
            "it was rewritten by another tool: copy it again from where the dataset was collected"
        )
    return file


def same_content(left: pa.Table, right: pa.Table) -> bool:
    """Whether two tables of this schema hold the same bits; so NaN, an unknown, is the same as NaN."""

    def bits(column: pa.ChunkedArray) -> pa.Array:
        array = _one_chunk(column)
        return array.view(SCHEMA.field("width").type) if array.type == SCHEMA.field("tail_mass").type else array

    return left.schema.names == right.schema.names and all(
        bits(left[name]).equals(bits(right[name])) for name in left.schema.names
    )


def _stored_rows(rows: Rows) -> dict[str, NDArray[Any]]:
    """The distribution columns of `rows`, flat."""
    gaps, tail = encode_gaps(offsets_of(rows.widths), rows.logprobs), round_tail(rows.tail)
    # In float32 a tail may round to 1, which would leave the row's candidates the probability 0.
    tail[(tail == 1) & (rows.widths > 0)] = np.nextafter(np.float32(1), np.float32(0))
    sampled = rows.sampled.copy()
    tokens, entries = rows.matches
    sampled[tokens] = decode_logprobs(rows.widths, gaps, tail)[entries]
    return {
        "sampled_logprob": round_sampled(sampled),
        "width": rows.widths,
        "candidate_ids": rows.ids,
        "candidate_gaps": gaps,
        "tail_mass": tail,
    }


def _list_array(
    name: str, flat: NDArray[Any], lengths: Sequence[int], present: Sequence[bool] | None = None
) -> pa.Array:
    """A list column of values in one array; null where a record is not `present`."""
    kind = SCHEMA.field(name).type
    mask = None if present is None else pa.array([not there for there in present], pa.bool_())
    values = pa.array(flat.astype(kind.value_type.to_pandas_dtype(), copy=False))
    return pa.ListArray.from_arrays(pa.array(offsets_of(lengths).astype(np.int32)), values, type=kind, mask=mask)


def flat_list(column: pa.ChunkedArray) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """A list column's values and int64 [rows + 1] offsets into them."""
    array = _one_chunk(column)
    offsets, values = _numpy(array.offsets).astype(np.int64), _numpy(array.values)
    return values[offsets[0] : offsets[-1]], offsets - offsets[0]


def repeated(sample_ids: Sequence[pa.Array]) -> list[tuple[str, int]]:
    """Sample ids that come more than once, each with how often."""
    counts = pc.value_counts(pa.chunked_array(sample_ids, pa.string()))
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    return [(entry["values"], entry["counts"]) for entry in twice.to_pylist()]


def on_both_sides(tables: Sequence[pa.Table]) -> list[str]:
    """Prompts that are in two splits of tables with the columns `prompt_id` and `split`."""
    if not tables:
        return []
    sides = pa.concat_tables([table.select(["prompt_id", "split"]) for table in tables])
    once = sides.group_by(["prompt_id", "split"], use_threads=False).aggregate([])
    return [prompt for prompt, _ in repeated(once["prompt_id"].chunks)]


def is_present(column: pa.ChunkedArray) -> NDArray[np.bool_]:
    """bool [rows], where a column is not null."""
    return _numpy(_one_chunk(column).is_valid().cast(pa.uint8())).astype(np.bool_)


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    """The column as one array; `combine_chunks` would copy even a single chunk."""
    if column.num_chunks == 0:
        return pa.array([], column.type)
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _numpy(array: pa.Array) -> NDArray[Any]:
    """A view of an array of numbers without nulls. Arrow's own `to_numpy` imports pandas, which takes a second."""
    return np.from_dlpack(array) if len(array) else np.zeros(0, array.type.to_pandas_dtype())
