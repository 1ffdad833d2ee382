"""The teacher's rows laid over the text: probabilities, matching bytes, and what only a tokenizer can answer."""

from __future__ import annotations

import numpy as np
from numba import njit

from student.alignment.kernels.arrays import Floats, Ids, Ints, Rows, TeacherTokens
from student.alignment.spans import Spans

# A row's own tail and 1 - sum of its probabilities may differ by what quantized logprobs lose, not by more.
TAIL_TOLERANCE = 0.02
# The same for the observed token's logprob against its own in the row, in nats.
LOGPROB_TOLERANCE = 0.1


@njit(cache=True)
def read_rows(offsets: Ints, ids: Ids, logprobs: Floats, tails: Floats, sampled: Floats, teacher_ids: Ids) -> Rows:
    """The stored rows as probabilities, the observed token added by its own logprob where it is outside the top k."""
    rows = len(teacher_ids)
    out_offsets = np.zeros(rows + 1, np.int64)
    out_ids = np.empty(len(ids) + rows, np.int32)
    out_mass = np.empty(len(ids) + rows, np.float64)
    out_tail = np.empty(rows, np.float64)
    usable, contradicts = np.zeros(rows, np.bool_), np.zeros(rows, np.bool_)
    observed, place, least = np.empty(rows, np.float64), np.full(rows, -1, np.int64), np.zeros(rows, np.float64)
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
        usable[j] = n > first and not np.isnan(tails[j]) and abs(1 - total - tails[j]) <= TAIL_TOLERANCE
        if place[j] >= 0:
            stored = np.log(out_mass[place[j]])
            if abs(own - stored) > LOGPROB_TOLERANCE:
                contradicts[j], own = True, np.nan
            elif np.isnan(own):
                own = stored
        elif np.exp(own) > 1 - total + TAIL_TOLERANCE:
            contradicts[j], own = True, np.nan
        elif not np.isnan(own):
            out_ids[n], out_mass[n], place[j] = teacher_ids[j], np.exp(own), n
            total += out_mass[n]
            n += 1
        if total > 1:
            out_mass[first:n] /= total
        observed[j] = own
        out_tail[j] = max(0.0, 1 - total)
        out_offsets[j + 1] = n
    return Rows(out_offsets, out_ids[:n], out_mass[:n], out_tail, usable, contradicts, observed, place, least)


@njit(cache=True)
def match_lengths(spans: Spans, rows: Rows, tokens: TeacherTokens) -> tuple[Ids, Ints]:
    """`Candidates.matches` and `Candidates.reach`."""
    text, blob, starts, row_ids = spans.text, tokens.blob, tokens.offsets, rows.ids
    matches = np.zeros(len(rows.ids), np.int32)
    reach = np.full(len(rows.tail), -1, np.int64)
    for j in range(len(rows.tail)):
        a, stop = spans.teacher_starts[j], spans.teacher_ends[spans.run_stop[j] - 1]
        width = spans.teacher_ends[j] - a
        for n in range(rows.offsets[j], rows.offsets[j + 1]):
            first = starts[row_ids[n]]
            length = starts[row_ids[n] + 1] - first
            limit, m = min(length, stop - a), 0
            while m < limit and blob[first + m] == text[a + m]:
                m += 1
            matches[n] = m
            if width and m >= width and length > width:
                reach[j] = max(reach[j], a + m)
    return matches, reach


@njit(cache=True)
def need_context(spans: Spans, rows: Rows, matches: Ids) -> tuple[Ints, Ints]:
    """Candidates whose tokenization depends on bytes before their row, and their rows: the student token that covers
    the row's start begins earlier, and they reach its end."""
    found, row_of = np.empty(len(rows.ids), np.int64), np.empty(len(rows.ids), np.int64)
    count = 0
    for j in range(len(spans.base)):
        if spans.base[j] < 0 or spans.starts[spans.base[j]] == spans.teacher_starts[j]:
            continue
        width = spans.ends[spans.base[j]] - spans.teacher_starts[j]
        for n in range(rows.offsets[j], rows.offsets[j + 1]):
            if matches[n] >= width:
                found[count], row_of[count] = n, j
                count += 1
    return found[:count], row_of[:count]
