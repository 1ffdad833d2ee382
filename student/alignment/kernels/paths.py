"""Which candidates go on like the text, and the probabilities of the observed tokens that follow from them."""

from __future__ import annotations

import numpy as np
from numba import njit

from student.alignment.kernels.arrays import Candidates, Floats, Inside, Ints, Rows, TeacherTokens
from student.alignment.spans import Spans


@njit(cache=True)
def survivors(
    spans: Spans, rows: Rows, candidates: Candidates, tokens: TeacherTokens, longer: Ints, min_known_mass: float
) -> Inside:
    """The candidates that are possible at every position inside a teacher token; none below `min_known_mass`.

    `longer`: how many of the teacher's tokens have y_j's bytes before x_i and go on [S].
    """
    count = len(spans.ids)
    bound = 0
    for i in range(count):
        j = spans.teacher_index[i]
        if spans.starts[i] > spans.teacher_starts[j]:
            bound += rows.offsets[j + 1] - rows.offsets[j]
    offsets = np.zeros(count + 1, np.int64)
    found, following = np.empty(bound, np.int64), np.empty(bound, np.int32)
    kept, scale, known = np.zeros(count), np.ones(count), np.full(count, np.nan)
    row_ids, mass, matches, starts = rows.ids, rows.mass, candidates.matches, tokens.offsets
    total = 0
    for i in range(count):
        j = spans.teacher_index[i]
        fixed = spans.starts[i] - spans.teacher_starts[j]
        if spans.is_special[i] or fixed == 0 or not rows.usable[j] or rows.place[j] < 0:
            offsets[i + 1] = total
            continue
        first, alike = total, 0
        for n in range(rows.offsets[j], rows.offsets[j + 1]):
            v = row_ids[n]
            if matches[n] < fixed or starts[v + 1] - starts[v] <= fixed:
                continue
            alike += 1
            same, token = _tokenized_alike(n, v, i - spans.base[j], spans, spans.base[j], candidates)
            if not same and v != spans.teacher_ids[j]:
                continue
            found[total], following[total] = n, token
            total += 1
            kept[i] += mass[n]
        # The tail inside the token: what can be expected there, and the most that there can be.
        others = longer[i] - alike
        outside = max(1, tokens.texts - (rows.offsets[j + 1] - rows.offsets[j]))
        possible = min(rows.tail[j], others * rows.least[j])
        known[i] = kept[i] / (kept[i] + possible)
        scale[i] = 1 / (kept[i] + min(possible, rows.tail[j] * others / outside))
        if known[i] < min_known_mass:
            total = first
        offsets[i + 1] = total
    return Inside(offsets, found[:total], following[:total], kept, scale, known)


@njit(cache=True)
def _tokenized_alike(n: int, v: int, depth: int, spans: Spans, base: int, candidates: Candidates) -> tuple[bool, int]:
    """Whether candidate n's tokens start with student tokens base…base+depth-1, and the token after them or -1."""
    if candidates.context_of[n] >= 0:
        row, listed = candidates.context_of[n], candidates.in_context
    else:
        row, listed = v, candidates.alone
    first, stop = listed.offsets[row], listed.offsets[row + 1]
    if stop - first < depth:
        return False, -1
    for k in range(depth):
        if listed.values[first + k] != spans.ids[base + k]:
            return False, -1
    return True, listed.values[first + depth] if stop - first > depth else -1


@njit(cache=True)
def observed_logprobs(
    spans: Spans, rows: Rows, candidates: Candidates, tokens: TeacherTokens, kept: Floats
) -> tuple[Floats, Floats]:
    """[S] twice: log p(x_i | x_<i), and the same where the teacher tokens before y_j are known to have ended."""
    count = len(spans.ids)
    chained, anchored = np.full(count, np.nan), np.full(count, np.nan)
    for i in range(count):
        j = spans.teacher_index[i]
        if spans.is_special[i]:
            own = rows.observed[j]
            chained[i] = anchored[i] = own
            if i == 0 or j == 0 or spans.is_special[i - 1] or spans.run_stop[spans.teacher_index[i - 1]] != j:
                continue
            # The teacher's last token of text ended where the text did; it could have gone on.
            first = _first_row(j, spans.run_start[j - 1], spans.starts[i], spans, rows, candidates.reach, tokens)
            if first < j:
                ended = rows.observed[first:j].sum()
                chained[i] = own + ended - np.log(_path_mass(first, j, i, spans, rows, candidates, tokens))
            continue
        is_inside, stop = spans.starts[i] > spans.teacher_starts[j], spans.run_stop[j]
        first = _first_row(j, spans.run_start[j], spans.starts[i], spans, rows, candidates.reach, tokens)
        before = 1.0
        if first < j or is_inside:
            before = _path_mass(first, stop, i, spans, rows, candidates, tokens)
        chained[i] = _log_ratio(_path_mass(first, stop, i + 1, spans, rows, candidates, tokens), before)
        if first == j and not is_inside:
            anchored[i] = chained[i]
            continue
        after = _path_mass(j, stop, i + 1, spans, rows, candidates, tokens)
        anchored[i] = _log_ratio(after, kept[i] if is_inside else 1.0)
    return chained, anchored


@njit(cache=True)
def _log_ratio(after: float, before: float) -> float:
    return np.log(after / before) if after > 0 and before > 0 else np.nan


@njit(cache=True)
def _first_row(j: int, start: int, u: int, spans: Spans, rows: Rows, reach: Ints, tokens: TeacherTokens) -> int:
    """The earliest row whose candidates reach over u, with observed logprobs known from there to y_j; j if none."""
    first, row = j, j
    while row > start and not np.isnan(rows.observed[row - 1]) and u - spans.teacher_starts[row - 1] <= tokens.longest:
        row -= 1
        if reach[row] >= u:
            first = row
    return first


@njit(cache=True)
def _path_mass(
    first: int, stop: int, position: int, spans: Spans, rows: Rows, candidates: Candidates, tokens: TeacherTokens
) -> float:
    """W at the start of student token `position`, relative to the start of row `first`; rows end at `stop`.

    NaN if an observed logprob that it needs is unknown.
    """
    # Arrays leave their tuples once, not in the loops: each time costs a reference count.
    starts, ends, observed, matches = spans.teacher_starts, spans.teacher_ends, rows.observed, candidates.matches
    ids, mass, place, offsets = rows.ids, rows.mass, rows.place, tokens.offsets
    c = spans.ends[position - 1] if position else 0
    total, path = 0.0, 0.0
    for row in range(first, stop):
        a = starts[row]
        if a >= c:
            break
        if np.isnan(observed[row]):
            return np.nan
        over = ends[row] > c
        if over or candidates.reach[row] >= c:
            width = c - a
            # A candidate of the same bytes as y_row is not another path.
            shortest = width if over else ends[row] - a + 1
            for n in range(rows.offsets[row], rows.offsets[row + 1]):
                v = ids[n]
                length = offsets[v + 1] - offsets[v]
                if n == place[row] or matches[n] < width or length < shortest:
                    continue
                if _tokenized_alike(n, v, position - spans.base[row], spans, spans.base[row], candidates)[0]:
                    total += np.exp(path) * mass[n]
        path += observed[row]
        if over:
            break
    return total + np.exp(path)
