"""The teacher's rows laid over the text: probabilities, matching bytes, and what only a tokenizer can answer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Ids = NDArray[np.int32]
Floats = NDArray[np.float64]
Bytes = NDArray[np.uint8]


@njit(cache=True)
def read_rows(
    offsets: Ints,
    ids: Ids,
    logprobs: Floats,
    tails: Floats,
    sampled: Floats,
    teacher_ids: Ids,
    tail_tolerance: float,
    logprob_tolerance: float,
) -> Any:
    """`reference.read_row` of every row: offsets, ids and masses of candidates, tails, usable, contradicts, realised
    logprobs, the realised token's place among the candidates (-1 where it has none), the least stored mass."""
    rows = len(teacher_ids)
    out_offsets = np.zeros(rows + 1, np.int64)
    out_ids = np.empty(len(ids) + rows, np.int32)
    out_mass = np.empty(len(ids) + rows, np.float64)
    out_tail = np.empty(rows, np.float64)
    usable = np.zeros(rows, np.uint8)
    contradicts = np.zeros(rows, np.uint8)
    realized = np.empty(rows, np.float64)
    place = np.full(rows, -1, np.int64)
    least = np.zeros(rows, np.float64)
    n = 0
    for j in range(rows):
        first, total, own = n, 0.0, sampled[j]
        for k in range(offsets[j], offsets[j + 1]):
            out_ids[n] = ids[k]
            out_mass[n] = np.exp(logprobs[k])
            total += out_mass[n]
            if ids[k] == teacher_ids[j]:
                place[j] = n
            n += 1
        if n > first:
            least[j] = out_mass[first:n].min()
        usable[j] = n > first and not np.isnan(tails[j]) and abs(1 - total - tails[j]) <= tail_tolerance
        if place[j] >= 0:
            stored = np.log(out_mass[place[j]])
            if abs(own - stored) > logprob_tolerance:
                contradicts[j], own = 1, np.nan
            elif np.isnan(own):
                own = stored
        elif np.exp(own) > 1 - total + tail_tolerance:
            contradicts[j], own = 1, np.nan
        elif not np.isnan(own):
            out_ids[n], out_mass[n], place[j] = teacher_ids[j], np.exp(own), n
            total += out_mass[n]
            n += 1
        if total > 1:
            out_mass[first:n] /= total
        realized[j] = own
        out_tail[j] = max(0.0, 1 - total)
        out_offsets[j + 1] = n
    return out_offsets, out_ids[:n], out_mass[:n], out_tail, usable, contradicts, realized, place, least


@njit(cache=True)
def match_lengths(
    text: Bytes,
    row_offsets: Ints,
    row_ids: Ids,
    teacher_starts: Ints,
    run_stop: Ids,
    teacher_ends: Ints,
    blob: Bytes,
    blob_offsets: Ints,
) -> Any:
    """int32 [N], leading bytes of each candidate that are the text's from the row's start to the end of its run; and
    int64 [T], the end of the longest match of a candidate that starts with y_row and is longer, or -1."""
    matches = np.zeros(len(row_ids), np.int32)
    reach = np.full(len(row_offsets) - 1, -1, np.int64)
    for j in range(len(row_offsets) - 1):
        a, stop = teacher_starts[j], teacher_ends[run_stop[j] - 1]
        width = teacher_ends[j] - a
        for n in range(row_offsets[j], row_offsets[j + 1]):
            first = blob_offsets[row_ids[n]]
            length = blob_offsets[row_ids[n] + 1] - first
            limit, m = min(length, stop - a), 0
            while m < limit and blob[first + m] == text[a + m]:
                m += 1
            matches[n] = m
            if width and m >= width and length > width:
                reach[j] = max(reach[j], a + m)
    return matches, reach


@njit(cache=True)
def context_requests(
    student_starts: Ints,
    student_ends: Ints,
    base: Ints,
    teacher_starts: Ints,
    row_offsets: Ints,
    row_ids: Ids,
    matches: Ids,
) -> Ints:
    """Candidates whose spelling depends on bytes before their row: the student token that covers the row's start
    begins earlier, and they reach its end."""
    found = np.empty(len(row_ids), np.int64)
    count = 0
    for j in range(len(base)):
        if base[j] < 0 or student_starts[base[j]] == teacher_starts[j]:
            continue
        width = student_ends[base[j]] - teacher_starts[j]
        for n in range(row_offsets[j], row_offsets[j + 1]):
            if matches[n] >= width:
                found[count] = n
                count += 1
    return found[:count]
