"""What a row of candidates must be: one list of rules, for what is to be stored and for what is.

The writer raises the first problem of its records before they are stored (`check_records`); `shards validate` lists all
problems of a decoded row group (`shared.dataset.validate`). The last rules find rows that are shifted against their
text: where the response's token is in its row the two must agree, where it is not it must lie below the row and inside
the tail. Costs one sort and a few passes of numpy over the candidates.

Legend: T response tokens, N candidates of all of them (CSR, as in `shared.dataset.records`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.dataset.encoding import row_matches
from shared.dataset.records import Record, offsets_of
from shared.dataset.schema import STEPS_PER_NAT
from shared.errors import DatasetError

MASS_TOLERANCE = 1e-3
"""Teachers compute in float32: a row's mass and tail may miss 1 by this much before it is an error."""
SAMPLED_TOLERANCE = 1e-2
"""The sampled token's own logprob and its entry come from one computation: further apart, they are not of one row."""
OUTSIDE_TOLERANCE = 1 / STEPS_PER_NAT + 2e-2
"""A stored row has its last candidate rounded by up to half a step, and its mass made to fit the tail."""
SHIFTED = "the rows are shifted against the response, or belong to another one"


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of T response tokens.

    Attributes:
        response_ids: int32 [T], the tokens that stand there. widths: [T], candidates of each row.
        ids: int32 [N]. logprobs: float32 [N]. tail, sampled: float32 [T], NaN where unknown.
    """

    response_ids: NDArray[np.int32]
    widths: NDArray[np.int32]
    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    tail: NDArray[np.float32]
    sampled: NDArray[np.float32]

    def entries(self) -> NDArray[np.float32]:
        """float32 [T], the logprob that each token has in its own row; NaN where it is not in it."""
        tokens, entries = row_matches(self.widths, self.ids, self.response_ids)
        found: NDArray[np.float32] = np.full(len(self.widths), np.nan, np.float32)
        found[tokens] = self.logprobs[entries]
        return found


def stack_rows(records: Sequence[Record]) -> Rows:
    """The rows of all records that have any, one after the other; the records' own arrays have the right lengths."""
    every = [(r.response_ids, d) for r in records if (d := r.distributions) is not None]

    def joined(values: Iterable[NDArray[Any]], kind: type) -> NDArray[Any]:
        return np.concatenate([np.zeros(0, kind), *values]).astype(kind, copy=False)

    return Rows(
        joined((ids for ids, _ in every), np.int32),
        joined((np.diff(d.offsets) for _, d in every), np.int32),
        joined((d.ids for _, d in every), np.int32),
        joined((d.logprobs for _, d in every), np.float32),
        joined((d.tail for _, d in every), np.float32),
        joined((d.sampled for _, d in every), np.float32),
    )


def check_records(records: Sequence[Record], vocabulary_size: int | None) -> Rows:
    """The rows of all records, or the first record that must not be stored.

    All are checked at once, which takes a third of the time; only where there is a problem, record by record.

    Raises:
        DatasetError: if arrays disagree in length, hold NaN, infinities, duplicates or ids outside the vocabulary, do
            not fall in probability, or do not belong to the response's tokens.
    """
    texts = [np.asarray(ids) for record in records for ids in (record.prompt_ids, record.response_ids)]
    if texts and _outside(np.concatenate(texts), vocabulary_size).any():
        for record in records:
            _check_ids(record, vocabulary_size)
    for record in records:
        _check_lengths(record)
    rows = stack_rows(records)
    if next(row_problems(rows, vocabulary_size), None) is not None:
        for record in records:
            for token, problem in row_problems(stack_rows([record]), vocabulary_size):
                raise DatasetError(f"record {record.sample_id!r}, token {token}: {problem}")
    return rows


def _check_ids(record: Record, vocabulary_size: int | None) -> None:
    for what, ids in (("prompt", record.prompt_ids), ("response", record.response_ids)):
        for _, problem in id_problems(np.asarray(ids), what, vocabulary_size):
            raise DatasetError(f"record {record.sample_id!r}: {problem}")


def _check_lengths(record: Record) -> None:
    who, d = f"record {record.sample_id!r}", record.distributions
    if d is None:
        return
    widths, sizes = np.diff(d.offsets), {"width": len(d.offsets) - 1, "tail_mass": len(d.tail)}
    sizes |= {"sampled_logprob": len(d.sampled), "candidate_ids": len(d.ids), "candidate_gaps": len(d.logprobs)}
    if (len(d.offsets) and d.offsets[0] != 0) or (widths < 0).any():
        raise DatasetError(f"{who}: offsets that do not start at 0 or fall, expected where each row of candidates ends")
    for problem in size_problems(len(record.response_ids), int(widths.sum()), sizes):
        raise DatasetError(f"{who}: {problem}")


def id_problems(ids: NDArray[np.int32], what: str, vocabulary_size: int | None) -> Iterator[tuple[int, str]]:
    """Index and message of each of `ids` that the vocabulary does not have."""
    for at in np.flatnonzero(_outside(ids, vocabulary_size)):
        yield int(at), f"{what} token {at} has the id {ids[at]}, {_expected_ids(vocabulary_size)}"


def size_problems(tokens: int, candidates: int, sizes: Mapping[str, int]) -> Iterator[str]:
    """Columns of a record of so many response tokens that have another number of values.

    Args:
        candidates: sum of the rows' widths. sizes: number of values by the name of their column.
    """
    for name, size in sizes.items():
        expected = candidates if name.startswith("candidate_") else tokens
        if size != expected:
            yield f"{name} has {size} values, expected {expected} for {tokens} response tokens"


def row_problems(rows: Rows, vocabulary_size: int | None) -> Iterator[tuple[int, str]]:
    """Token and message of everything that is wrong with `rows`, whose arrays have the right lengths."""
    ids, logprobs, tail, sampled = rows.ids, rows.logprobs, rows.tail, rows.sampled
    count = len(rows.widths)
    filled = rows.widths > 0
    ends = offsets_of(rows.widths)[1:]
    starts = (ends - rows.widths)[filled]

    def row_of(at: np.intp) -> np.intp:
        return np.searchsorted(ends, at, side="right")

    for at in np.flatnonzero(_outside(ids, vocabulary_size)):
        yield int(row_of(at)), f"candidate id {ids[at]}, {_expected_ids(vocabulary_size)}"
    for token, double in _doubles(rows.widths, ids):
        yield token, f"candidate id {double} stands twice in the row"
    for at in np.flatnonzero(~np.isfinite(logprobs)):
        yield int(row_of(at)), f"candidate logprob {logprobs[at]}, expected a finite number"
    rises = np.flatnonzero(logprobs[1:] > logprobs[:-1]) + 1
    for at in rises[~np.isin(rises, starts)]:
        yield int(row_of(at)), f"candidate logprob {logprobs[at]}, expected not above the {logprobs[at - 1]} before it"
    known = ~np.isnan(tail)
    for token in np.flatnonzero(known & ~((tail >= -MASS_TOLERANCE) & (tail <= 1 + MASS_TOLERANCE))):
        yield token, f"tail mass {tail[token]}, expected 0 to 1"
    mass = np.zeros(count)
    if len(starts):
        # float32 here: its error is a thousandth of the tolerance.
        mass[filled] = np.add.reduceat(np.exp(logprobs), starts)
    total = mass + np.where(known, tail, 0)
    for token in np.flatnonzero(np.where(known, np.abs(total - 1), total - 1) > MASS_TOLERANCE):
        yield (
            token,
            f"candidates' mass plus tail mass {total[token]:.6f}, expected 1 (logprobs are natural logs at temperature "
            "1, before any filter)",
        )
    for token in np.flatnonzero(sampled == -np.inf):
        yield (
            token,
            "sampled logprob -inf, expected a finite number: the teacher gives this token of the response probability "
            "0; it is not the teacher's text: leave the response out, or pass the tokenizer that it was written with",
        )
    for token in np.flatnonzero(sampled > MASS_TOLERANCE):
        yield token, f"sampled logprob {sampled[token]}, expected a finite number up to 0"
    entry = rows.entries()
    for token in np.flatnonzero(np.abs(sampled - entry) > SAMPLED_TOLERANCE):
        yield (
            token,
            f"sampled with logprob {sampled[token]:.4f}, but its row gives it {entry[token]:.4f}; {SHIFTED}",
        )
    last = np.full(count, np.inf)
    last[filled] = logprobs[ends[filled] - 1]
    outside = np.isnan(entry) & ~np.isnan(sampled)
    too_likely = (sampled > last + OUTSIDE_TOLERANCE) | (known & (np.exp(sampled) > tail * 1.02 + MASS_TOLERANCE))
    for token in np.flatnonzero(outside & too_likely):
        yield (
            token,
            f"sampled with logprob {sampled[token]:.4f} from outside the row, whose last candidate has "
            f"{last[token]:.4f} and whose tail mass is {tail[token]:.6f}; {SHIFTED}",
        )


def _doubles(widths: NDArray[np.int32], ids: NDArray[np.int32]) -> Iterator[tuple[int, int]]:
    """Token and id of candidates that stand twice in their row. Rows of one width are sorted as a matrix."""
    if len(widths) and (widths == widths[0]).all():
        ordered = np.sort(ids.reshape(len(widths), -1), axis=1)
        for token, at in np.argwhere(ordered[:, 1:] == ordered[:, :-1]):
            yield int(token), int(ordered[token, at])
        return
    keys = np.sort(np.repeat(np.arange(len(widths)), widths) << 32 | ids)
    for key in keys[1:][keys[1:] == keys[:-1]]:
        yield int(key >> 32), int(key & 0xFFFFFFFF)


def _outside(ids: NDArray[np.int32], vocabulary_size: int | None) -> NDArray[np.bool_]:
    outside: NDArray[np.bool_] = ids < 0
    return outside if vocabulary_size is None else outside | (ids >= vocabulary_size)


def _expected_ids(vocabulary_size: int | None) -> str:
    size = "0 or more" if vocabulary_size is None else f"0 to {vocabulary_size - 1}"
    return f"expected {size}: it is another tokenizer's token"
