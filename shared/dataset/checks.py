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
from functools import cached_property
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


@dataclass(frozen=True)
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

    @cached_property
    def matches(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens that are in their own row, and where their entries are, as `row_matches`."""
        return row_matches(self.widths, self.ids, self.response_ids)

    def entries(self) -> NDArray[np.float32]:
        """float32 [T], the logprob that each token has in its own row; NaN where it is not in it."""
        tokens, entries = self.matches
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
        joined((d.offsets[1:] - d.offsets[:-1] for _, d in every), np.int32),
        joined((d.ids for _, d in every), np.int32),
        joined((d.logprobs for _, d in every), np.float32),
        joined((d.tail for _, d in every), np.float32),
        joined((d.sampled for _, d in every), np.float32),
    )


def check_records(records: Sequence[Record], vocabulary_size: int) -> Rows:
    """The rows of all records, or the first problem of the first record that must not be stored.

    All are checked at once, which takes a third of the time; only where there is a problem, record by record.

    Raises:
        DatasetError: if rows hold NaN, infinities, duplicates or ids outside the vocabulary, do not fall in
            probability, or do not belong to the response's tokens.
    """
    for record in records:
        if (d := record.distributions) is not None:
            assert len(d.offsets) == len(record.response_ids) + 1, record.sample_id
            assert len(d.tail) == len(d.sampled) == len(record.response_ids), record.sample_id
            assert d.offsets[0] == 0, record.sample_id
            assert len(d.ids) == len(d.logprobs) == d.offsets[-1], record.sample_id
    rows = stack_rows(records)
    assert (rows.widths >= 0).all()
    if _first_problem(records, rows, vocabulary_size) is not None:
        for record in records:
            problem = _first_problem([record], stack_rows([record]), vocabulary_size)
            if problem is not None:
                raise DatasetError(f"record {record.sample_id!r}{problem}")
    return rows


def _first_problem(records: Sequence[Record], rows: Rows, vocabulary_size: int) -> str | None:
    """What a message says after the record's name."""
    for what, texts in (("prompt", [r.prompt_ids for r in records]), ("response", [r.response_ids for r in records])):
        for _, problem in id_problems(np.concatenate([np.zeros(0, np.int32), *texts]), what, vocabulary_size):
            return f": {problem}"
    for token, problem in row_problems(rows, vocabulary_size):
        return f", token {token}: {problem}"
    return None


def id_problems(ids: NDArray[np.int32], what: str, vocabulary_size: int) -> Iterator[tuple[int, str]]:
    """Index and message of each of `ids` that the vocabulary does not have."""
    for at, problem in _foreign_ids(ids, vocabulary_size):
        yield int(at), f"{what} token {at} has the {problem}"


def size_problems(
    tokens: NDArray[np.int64], candidates: NDArray[np.int64], sizes: Mapping[str, NDArray[np.int64]]
) -> Iterator[tuple[int, str]]:
    """Record and message of each column that has another number of values than its record's response needs.

    Args:
        tokens: [R], of the responses. candidates: [R], sums of their rows' widths. sizes: column → [R], its values.
    """
    expected = {name: candidates if name.startswith("candidate_") else tokens for name in sizes}
    wrong = {name: size != expected[name] for name, size in sizes.items()}
    for record in np.flatnonzero(np.any([*wrong.values()], axis=0)):
        for name in sizes:
            if wrong[name][record]:
                values, needed = sizes[name][record], expected[name][record]
                yield (
                    int(record),
                    f"{name} has {values} values, expected {needed} for {tokens[record]} response tokens",
                )


def row_problems(rows: Rows, vocabulary_size: int) -> Iterator[tuple[int, str]]:
    """Token and message of everything that is wrong with `rows`, whose arrays have the right lengths."""
    ids, logprobs, tail, sampled = rows.ids, rows.logprobs, rows.tail, rows.sampled
    count = len(rows.widths)
    filled = rows.widths > 0
    ends = offsets_of(rows.widths)[1:]
    starts = (ends - rows.widths)[filled]

    def row_of(at: np.intp) -> np.intp:
        return np.searchsorted(ends, at, side="right")

    for at, problem in _foreign_ids(ids, vocabulary_size):
        yield int(row_of(at)), f"candidate {problem}"
    for token, double in _doubles(rows.widths, ids):
        yield token, f"candidate id {double} stands twice in the row"
    for at in np.flatnonzero(~np.isfinite(logprobs)):
        yield int(row_of(at)), f"candidate logprob {logprobs[at]}, expected a finite number"
    rises = logprobs[1:] > logprobs[:-1]
    rises[starts[1:] - 1] = False  # from one row to the next
    for at in np.flatnonzero(rises) + 1:
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
    keys = np.repeat(np.arange(len(widths)) << 32, widths)
    keys |= ids
    keys.sort()
    for key in keys[1:][keys[1:] == keys[:-1]]:
        yield int(key >> 32), int(key & 0xFFFFFFFF)


def _foreign_ids(ids: NDArray[np.int32], vocabulary_size: int) -> Iterator[tuple[np.intp, str]]:
    for at in np.flatnonzero((ids < 0) | (ids >= vocabulary_size)):
        yield at, f"id {ids[at]}, expected 0 to {vocabulary_size - 1}: it is another tokenizer's token"
