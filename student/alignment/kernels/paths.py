"""Which candidates go on like the text, and the probabilities of the realised tokens that follow from them."""

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
def _spelled(
    n: int, v: int, depth: int, ids: Ids, base: int, context_of: Ids, context: Any, spelling: Any
) -> tuple[bool, int]:
    """Whether candidate n's spelling starts with student tokens base…base+depth-1, and the token after them or -1."""
    if context_of[n] >= 0:
        offsets, tokens = context
        first, stop = offsets[context_of[n]], offsets[context_of[n] + 1]
    else:
        offsets, tokens = spelling
        first, stop = offsets[v], offsets[v + 1]
    if stop - first < depth:
        return False, -1
    for k in range(depth):
        if tokens[first + k] != ids[base + k]:
            return False, -1
    return True, tokens[first + depth] if stop - first > depth else -1


@njit(cache=True)
def survivors(
    student: Any, rows: Any, base: Ints, matches: Ids, context_of: Ids, context: Any, spelling: Any,
    sorted_teacher: Ints, blob: Bytes, blob_offsets: Ints, least: Floats, min_known_mass: float,
) -> Any:  # fmt: skip
    """The surviving candidates at every position inside a teacher token: offsets [S + 1], their places, the student
    token next in their spelling (-1 if they are not spelt like the text), kept mass, scale and known mass [S]."""
    ids, starts, _, is_special, index, teacher_ids, teacher_starts = student
    row_offsets, row_ids, mass, tails, usable, place = rows
    count = len(ids)
    offsets = np.zeros(count + 1, np.int64)
    found, following = np.empty(len(row_ids) + 16, np.int64), np.empty(len(row_ids) + 16, np.int32)
    kept, scale, known = np.zeros(count), np.ones(count), np.full(count, np.nan)
    total = 0
    for i in range(count):
        j = index[i]
        fixed = starts[i] - teacher_starts[j]
        if is_special[i] or fixed == 0 or not usable[j] or place[j] < 0:
            offsets[i + 1] = total
            continue
        first, depth, alike = total, i - base[j], 0
        for n in range(row_offsets[j], row_offsets[j + 1]):
            v = row_ids[n]
            if matches[n] < fixed or blob_offsets[v + 1] - blob_offsets[v] <= fixed:
                continue
            alike += 1
            same, token = _spelled(n, v, depth, ids, base[j], context_of, context, spelling)
            if not same and v != teacher_ids[j]:
                continue
            if total == len(found):
                found = np.concatenate((found, np.empty(len(found), np.int64)))
                following = np.concatenate((following, np.empty(len(following), np.int32)))
            found[total], following[total] = n, token
            total += 1
            kept[i] += mass[n]
        v = teacher_ids[j]
        longer = _count_longer(sorted_teacher, blob, blob_offsets, blob_offsets[v], fixed) - alike
        outside = max(1, len(sorted_teacher) - (row_offsets[j + 1] - row_offsets[j]))
        possible = min(tails[j], longer * least[j])
        known[i] = kept[i] / (kept[i] + possible)
        scale[i] = 1 / (kept[i] + min(possible, tails[j] * longer / outside))
        if known[i] < min_known_mass:
            total = first
        offsets[i + 1] = total
    return offsets, found[:total], following[:total], kept, scale, known


@njit(cache=True)
def _count_longer(order: Ints, blob: Bytes, offsets: Ints, prefix: int, length: int) -> int:
    """Tokens longer than `length` that start with blob[prefix : prefix + length]; `order` sorts tokens by bytes."""
    low, high = 0, len(order)
    while low < high:  # first token that is longer than the prefix and starts with it, or sorts after all such
        middle = (low + high) // 2
        if _order(blob, offsets, order[middle], prefix, length) <= 0:
            low = middle + 1
        else:
            high = middle
    first, high = low, len(order)
    while low < high:
        middle = (low + high) // 2
        if _order(blob, offsets, order[middle], prefix, length) <= 1:
            low = middle + 1
        else:
            high = middle
    return low - first


@njit(cache=True)
def _order(blob: Bytes, offsets: Ints, token: int, prefix: int, length: int) -> int:
    """-1, 0, 1, 2: the token sorts before the prefix, is it, starts with it and goes on, sorts after all such."""
    start, stop = offsets[token], offsets[token + 1]
    for k in range(length):
        if start + k >= stop or blob[start + k] < blob[prefix + k]:
            return -1
        if blob[start + k] > blob[prefix + k]:
            return 2
    return 0 if stop - start == length else 1


@njit(cache=True)
def realized_logprobs(
    student: Any, rows: Any, base: Ints, run_start: Ids, run_stop: Ids, teacher_ends: Ints, realized: Floats,
    matches: Ids, reach: Ints, context_of: Ids, context: Any, spelling: Any, blob_offsets: Ints, longest: int,
    kept: Floats,
) -> Any:  # fmt: skip
    """`reference.realized_logprobs` of every position: float64 [S] twice."""
    ids, starts, _, is_special, index, _, teacher_starts = student
    count = len(ids)
    chained, anchored = np.full(count, np.nan), np.full(count, np.nan)
    for i in range(count):
        j = index[i]
        if is_special[i]:
            own = realized[j]
            chained[i] = anchored[i] = own
            if i == 0 or j == 0 or is_special[i - 1] or run_stop[index[i - 1]] != j:
                continue
            first = _first_row(j, run_start[j - 1], starts[i], teacher_starts, realized, reach, longest)
            if first == j:
                continue
            path = 0.0
            for row in range(first, j):
                path += realized[row]
            whole = _path_mass(
                first, j, i, student, rows, base, teacher_ends, realized, matches, reach, context_of, context, spelling,
                blob_offsets,
            )  # fmt: skip
            chained[i] = own + path - np.log(whole)
            continue
        first = _first_row(j, run_start[j], starts[i], teacher_starts, realized, reach, longest)
        for which in range(2):
            start = first if which == 0 else j
            if which == 1 and first == j and starts[i] == teacher_starts[j]:
                anchored[i] = chained[i]
                break
            before = 1.0
            if which == 1:
                before = kept[i] if starts[i] > teacher_starts[j] else 1.0
            elif start < j or starts[i] > teacher_starts[j]:
                before = _path_mass(
                    start, run_stop[start], i, student, rows, base, teacher_ends, realized, matches, reach, context_of,
                    context, spelling, blob_offsets,
                )  # fmt: skip
            after = _path_mass(
                start, run_stop[start], i + 1, student, rows, base, teacher_ends, realized, matches, reach, context_of,
                context, spelling, blob_offsets,
            )  # fmt: skip
            value = np.log(after / before) if after > 0 and before > 0 else np.nan
            if which == 0:
                chained[i] = value
            else:
                anchored[i] = value
    return chained, anchored


@njit(cache=True)
def _first_row(
    j: int, start: int, u: int, teacher_starts: Ints, realized: Floats, reach: Ints, longest: int
) -> int:  # fmt: skip
    """The earliest row whose candidates reach over u, with realised logprobs known from there to y_j; j if none."""
    first, row = j, j
    while row > start and not np.isnan(realized[row - 1]) and u - teacher_starts[row - 1] <= longest:
        row -= 1
        if reach[row] >= u:
            first = row
    return first


@njit(cache=True)
def _path_mass(
    first: int, stop: int, position: int, student: Any, rows: Any, base: Ints, teacher_ends: Ints, realized: Floats,
    matches: Ids, reach: Ints, context_of: Ids, context: Any, spelling: Any, blob_offsets: Ints,
) -> float:  # fmt: skip
    """`reference._path_mass`. Rows that end at or before c matter through candidates longer than y_row alone."""
    ids, _, ends, _, _, _, teacher_starts = student
    row_offsets, row_ids, mass, _, _, place = rows
    c = ends[position - 1] if position else 0
    total, path = 0.0, 0.0
    for row in range(first, stop):
        a = teacher_starts[row]
        if a >= c:
            break
        if np.isnan(realized[row]):
            return np.nan
        over = teacher_ends[row] > c
        if over or reach[row] >= c:
            width = c - a
            shortest = width if over else teacher_ends[row] - a + 1
            for n in range(row_offsets[row], row_offsets[row + 1]):
                v = row_ids[n]
                if n == place[row] or matches[n] < width or blob_offsets[v + 1] - blob_offsets[v] < shortest:
                    continue
                if _spelled(n, v, position - base[row], ids, base[row], context_of, context, spelling)[0]:
                    total += np.exp(path) * mass[n]
        path += realized[row]
        if over:
            break
    return total + np.exp(path)
