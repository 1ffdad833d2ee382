"""Records to Arrow tables and back, whole batches at a time.

`records_to_table` refuses what cannot be stored faithfully, naming the record, the row and the value: it is the one
way into a shard. `RecordGroup` decodes a row group in a few passes; its records are slices of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shared.dataset.checks import check_record
from shared.dataset.encoding import decode_logprobs, encode_gaps, round_sampled, round_tail, row_matches
from shared.dataset.records import Distributions, Message, Record, Sampling, offsets_of
from shared.dataset.schema import DISTRIBUTION_COLUMNS, SCHEMA

_FLAT_COLUMNS = frozenset(
    field.name for field in SCHEMA if pa.types.is_list(field.type) and pa.types.is_primitive(field.type.value_type)
)
"""Lists of numbers, which numpy sees without a copy."""
_SAMPLING_COLUMNS = tuple(field.name for field in fields(Sampling))


def records_to_table(records: Sequence[Record], vocabulary_size: int | None = None, check: bool = True) -> pa.Table:
    """The records as a table of `shared.dataset.schema.SCHEMA`.

    Args:
        vocabulary_size: ids must be below it, where it is given.
        check: False stores rows that contradict their own text, for tests that need a damaged dataset.

    Raises:
        DatasetError: as `shared.dataset.checks.check_record`.
    """
    if check:
        for record in records:
            check_record(record, vocabulary_size)
    plain: dict[str, Any] = {
        "sample_id": [r.sample_id for r in records],
        "prompt_id": [r.prompt_id for r in records],
        "split": [r.split for r in records],
        "skill": [r.skill for r in records],
        "rule": [r.sampling.rule for r in records],
        "messages": [[{"role": m.role, "content": m.content} for m in r.messages] for r in records],
        "prompt_text": [r.prompt_text for r in records],
        "response_bytes": [r.response_bytes for r in records],
        "finish_reason": [r.finish_reason for r in records],
        "temperature": [r.sampling.temperature for r in records],
        "top_p": [r.sampling.top_p for r in records],
        "top_k": [r.sampling.top_k for r in records],
        "max_tokens": [r.sampling.max_tokens for r in records],
        "seed": [r.sampling.seed for r in records],
    }
    arrays: dict[str, pa.Array] = {name: pa.array(values, SCHEMA.field(name).type) for name, values in plain.items()}
    arrays["prompt_ids"] = _list_array("prompt_ids", [r.prompt_ids for r in records])
    arrays["response_ids"] = _list_array("response_ids", [r.response_ids for r in records])
    stored = [_store(r) for r in records]
    for name in DISTRIBUTION_COLUMNS:
        arrays[name] = _list_array(name, [None if s is None else s[name] for s in stored])
    return pa.Table.from_arrays([arrays[name] for name in SCHEMA.names], schema=SCHEMA)


class RecordGroup:
    """The records of a row group: their numbers decoded at once, each record made when it is asked for.

    A record is some fifteen objects. Made by the thread that uses them they cost less than half of what they cost made
    by another, handed over and freed here; so a reader's thread makes the group, and its consumer the records.

    A record's arrays are read-only views of the group's, and keep them in memory.
    """

    def __init__(self, table: pa.Table) -> None:
        """Decode `table`, which has the columns of `shared.dataset.schema.SCHEMA`; without its distribution columns
        `Record.distributions` is None."""
        self._length: int = table.num_rows
        self._objects = table.select([name for name in table.schema.names if name not in _FLAT_COLUMNS])
        self._prompt_ids, prompt_at = flat_list(table["prompt_ids"])
        self._response_ids, response_at = flat_list(table["response_ids"])
        self._prompt_at, self._response_at = prompt_at.tolist(), response_at.tolist()
        self._rows = None
        if set(DISTRIBUTION_COLUMNS).issubset(table.schema.names):
            self._rows = _Rows(table, self._response_ids, response_at)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Record]:
        return map(self.__getitem__, range(self._length))

    def __getitem__(self, index: int) -> Record:
        index = range(self._length)[index]
        sample_id, prompt_id, split, skill, messages, prompt_text, response_bytes, reason, sampling = self._plain[index]
        return Record(
            sample_id,
            prompt_id,
            split,
            skill,
            messages,
            prompt_text,
            self._prompt_ids[self._prompt_at[index] : self._prompt_at[index + 1]],
            self._response_ids[self._response_at[index] : self._response_at[index + 1]],
            response_bytes,
            reason,
            sampling,
            self._rows.of(index) if self._rows else None,
        )

    def where(self, split: str | None, rule: str | None) -> Sequence[int]:
        """The numbers of the records of that split and that decoding rule; None is any."""
        if split is None and rule is None:
            return range(self._length)
        return [
            number
            for number, (_, _, own_split, *_, sampling) in enumerate(self._plain)
            if split in (None, own_split) and rule in (None, sampling.rule)
        ]

    @cached_property
    def _plain(self) -> list[Any]:
        """What is no array, by record."""
        columns = {name: self._objects[name].to_pylist() for name in self._objects.schema.names}
        settings = list(zip(*(columns[name] for name in _SAMPLING_COLUMNS), strict=True))
        samplings = {values: Sampling(*values) for values in set(settings)}
        messages = [tuple(Message(m["role"], m["content"]) for m in turns) for turns in columns["messages"]]
        plain = zip(
            columns["sample_id"],
            columns["prompt_id"],
            columns["split"],
            columns["skill"],
            messages,
            columns["prompt_text"],
            columns["response_bytes"],
            columns["finish_reason"],
            map(samplings.__getitem__, settings),
            strict=True,
        )
        return list(plain)


class _Rows:
    """The distributions of a group's records, decoded."""

    def __init__(self, table: pa.Table, response_ids: NDArray[np.int32], response_at: NDArray[np.int64]) -> None:
        widths, token_at = flat_list(table["width"])
        self._ids, candidate_at = flat_list(table["candidate_ids"])
        gaps, _ = flat_list(table["candidate_gaps"])
        self._tail, _ = flat_list(table["tail_mass"])
        stored, _ = flat_list(table["sampled_logprob"])
        self._logprobs = decode_logprobs(widths, gaps, self._tail)
        present = is_present(table["width"])
        # In the row the entry is the value: the column holds it rounded.
        self._sampled = stored.copy()
        tokens, entries = row_matches(widths, self._ids, response_ids[np.repeat(present, np.diff(response_at))])
        self._sampled[tokens] = self._logprobs[entries]
        self._present, self._token_at, self._candidate_at = present.tolist(), token_at.tolist(), candidate_at.tolist()
        # Offsets begin at 0 in every record: where all rows are of one width they are the beginning of one array.
        self._is_even = bool(len(widths)) and bool((widths == widths[0]).all())
        rows = int(np.diff(token_at).max()) if self._is_even else len(widths)
        self._row_ends = offsets_of(widths[:rows])
        for own in (self._logprobs, self._sampled, self._row_ends):  # the other arrays are Arrow's, and read-only
            own.flags.writeable = False

    def of(self, index: int) -> Distributions | None:
        """Those of one record; None where the columns are null."""
        if not self._present[index]:
            return None
        tokens = slice(first := self._token_at[index], last := self._token_at[index + 1])
        candidates = slice(start := self._candidate_at[index], self._candidate_at[index + 1])
        return Distributions(
            self._row_ends[: last - first + 1] if self._is_even else self._row_ends[first : last + 1] - start,
            self._ids[candidates],
            self._logprobs[candidates],
            self._tail[tokens],
            self._sampled[tokens],
        )


def same_content(left: pa.Table, right: pa.Table) -> bool:
    """Whether two tables of this schema hold the same values; NaN, an unknown, is the same as NaN."""
    if left.num_rows != right.num_rows or left.schema.names != right.schema.names:
        return False
    for name in left.schema.names:
        if pa.types.is_list(left.schema.field(name).type) and pa.types.is_floating(
            left.schema.field(name).type.value_type
        ):
            (values, at), (others, other_at) = flat_list(left[name]), flat_list(right[name])
            same = np.array_equal(values, others, equal_nan=True) and np.array_equal(at, other_at)
            if not same or not left[name].is_null().equals(right[name].is_null()):
                return False
        elif not left[name].equals(right[name]):
            return False
    return True


def _store(record: Record) -> dict[str, NDArray[Any]] | None:
    """The distribution columns of one record."""
    d = record.distributions
    if d is None:
        return None
    widths = np.diff(d.offsets).astype(np.int32)
    gaps, tail = encode_gaps(d.offsets, d.logprobs), round_tail(d.tail)
    sampled = np.array(d.sampled, np.float32)
    tokens, entries = row_matches(widths, d.ids, record.response_ids)
    sampled[tokens] = decode_logprobs(widths, gaps, tail)[entries]
    return {
        "sampled_logprob": round_sampled(sampled),
        "width": widths,
        "candidate_ids": d.ids,
        "candidate_gaps": gaps,
        "tail_mass": tail,
    }


def _list_array(name: str, values: Sequence[NDArray[Any] | None]) -> pa.Array:
    kind = SCHEMA.field(name).type
    lengths = [0 if v is None else len(v) for v in values]
    offsets = offsets_of(lengths).astype(np.int32)
    present = [np.asarray(v) for v in values if v is not None]
    flat = np.concatenate(present) if present else np.zeros(0)
    mask = pa.array([v is None for v in values], pa.bool_()) if any(v is None for v in values) else None
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(flat.astype(kind.value_type.to_pandas_dtype())), type=kind, mask=mask
    )


def flat_list(column: pa.ChunkedArray) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """A list column's values and int64 [rows + 1] offsets into them."""
    array = _one_chunk(column)
    offsets, values = _numpy(array.offsets).astype(np.int64), _numpy(array.values)
    return values[offsets[0] : offsets[-1]], offsets - offsets[0]


def is_present(column: pa.ChunkedArray) -> NDArray[np.bool_]:
    """bool [rows], where a column is not null."""
    if not column.null_count:  # Arrow's own functions take 60 ms to load
        return np.ones(len(column), np.bool_)
    return _numpy(_one_chunk(column).is_valid().cast(pa.uint8())).astype(np.bool_)


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    """The column as one array; `combine_chunks` would copy even a single chunk."""
    if column.num_chunks == 0:
        return pa.array([], column.type)
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _numpy(array: pa.Array) -> NDArray[Any]:
    """A view of an array of numbers without nulls. Arrow's own `to_numpy` imports pandas, which takes a second."""
    return np.from_dlpack(array) if len(array) else np.zeros(0, array.type.to_pandas_dtype())
