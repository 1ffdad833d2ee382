"""The compiled loops of the fast path. `student.alignment.reference` says what they compute, in the same order.

Legend: S student tokens, T teacher rows, N candidates of all rows, B bytes. CSR everywhere. A candidate is known by
its place n in 0…N-1. All kernels are pure functions of their arrays, compiled once and cached by numba.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

_PLACE_BITS = 20  # candidates of one row are numbered in this many bits
Ints = NDArray[np.int64]
Ids = NDArray[np.int32]
Floats = NDArray[np.float64]
Flags = NDArray[np.uint8]
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


@njit(cache=True)
def build_events(
    student: Any, rows: Any, special_token: Flags, spelling: Any, extensions: Any, inside: Any, inside_extensions: Any,
    longer: Any, anchored: Floats, teacher_ends: Ints, seen: Ints, round_: int,
) -> Any:  # fmt: skip
    """Events of every position: `reference.events`. `seen` [V_S] is scratch, kept between calls: the round
    in which a student token was last met and the candidate that it was met with, in one number. `round_` is new."""
    ids, starts, ends, is_special, index, _, teacher_starts = student
    row_offsets, row_ids, mass, tails, usable, place = rows
    inside_offsets, inside_found, inside_next, kept, scale, known = inside
    ext_offsets, ext_ids = extensions
    in_offsets, in_ids = inside_extensions
    longer_offsets, longer_ids = longer
    spelling_offsets, spelling_ids = spelling
    count = len(ids)
    event_counts = np.zeros(count, np.int32)
    event_mass = np.empty(1024, np.float64)
    member_counts = np.empty(1024, np.int32)
    members = np.empty(4096, np.int32)
    tail_out = np.full(count, np.nan)
    known_out = np.full(count, np.nan)
    disagreements = 0
    events_total, members_total = 0, 0
    widest = 1
    for j in range(len(row_offsets) - 1):
        widest = max(widest, row_offsets[j + 1] - row_offsets[j])
    parent, sums = np.empty(widest, np.int64), np.empty(widest, np.float64)
    sizes, slot = np.empty(widest, np.int64), np.empty(widest, np.int64)
    related = np.empty(1024, np.int32)
    related_of = np.empty(1024, np.int64)
    for i in range(count):
        j = index[i]
        fixed = 0 if is_special[i] else starts[i] - teacher_starts[j]
        if not usable[j] or (fixed > 0 and place[j] < 0):
            continue
        if fixed > 0:
            known_out[i] = known[i]
            first, stop = inside_offsets[i], inside_offsets[i + 1]
            if first == stop:
                continue
            norm, whole = scale[i], kept[i] * scale[i]
        else:
            known_out[i] = 1 - tails[j]
            first, stop = row_offsets[j], row_offsets[j + 1]
            norm, whole = 1.0, 0.0
            for n in range(first, stop):
                whole += mass[n]
        x = ids[i]
        width = stop - first
        # 1. Every (candidate, student token) that belong together; a token met twice joins its candidates.
        total = 0
        for q in range(width):
            parent[q] = q
            sums[q], sizes[q], slot[q] = 0.0, 0, -1
        for q in range(width):
            n = inside_found[first + q] if fixed > 0 else first + q
            v = row_ids[n]
            a, b, token, tokens = 0, 0, -1, ext_ids
            if special_token[v]:
                if spelling_offsets[v + 1] > spelling_offsets[v]:
                    token = spelling_ids[spelling_offsets[v]]
            elif fixed > 0:
                a, b, tokens, token = in_offsets[first + q], in_offsets[first + q + 1], in_ids, inside_next[first + q]
            else:
                a, b, token = ext_offsets[v], ext_offsets[v + 1], spelling_ids[spelling_offsets[v]]
            has_x = token == x
            needed = total + b - a + 2
            if needed > len(related):
                related = np.concatenate((related, np.empty(needed, np.int32)))
                related_of = np.concatenate((related_of, np.empty(needed, np.int64)))
            for k in range(a, b):
                s = tokens[k]
                has_x = has_x or s == x
                total = _relate(s, q, seen, round_, parent, related, related_of, total)
            if token >= 0:
                total = _relate(token, q, seen, round_, parent, related, related_of, total)
            if n == place[j] and not has_x:
                disagreements += 1
                total = _relate(x, q, seen, round_, parent, related, related_of, total)
        round_ += 1
        # 2. Masses and sizes of the components.
        for q in range(width):
            n = inside_found[first + q] if fixed > 0 else first + q
            sums[_root(parent, q)] += mass[n] * norm
        for r in range(total):
            related_of[r] = _root(parent, related_of[r])
            sizes[related_of[r]] += 1
        # 3. Lay the events down, in order of their first candidate.
        if events_total + width + 1 > len(event_mass):
            event_mass = np.concatenate((event_mass, np.empty(len(event_mass) + width + 1, np.float64)))
            member_counts = np.concatenate((member_counts, np.empty(len(member_counts) + width + 1, np.int32)))
        if members_total + total > len(members):
            members = np.concatenate((members, np.empty(len(members) + total, np.int32)))
        first_event, first_member = events_total, members_total
        for q in range(width):
            if sizes[q]:
                event_mass[events_total], member_counts[events_total] = sums[q], sizes[q]
                slot[q] = members_total
                events_total += 1
                members_total += sizes[q]
        at_x = -1
        for r in range(total):
            q = related_of[r]
            if related[r] == x:
                at_x = q
            members[slot[q]] = related[r]
            slot[q] += 1
        offset = first_member
        for e in range(first_event, events_total):
            _sort(members, offset, offset + member_counts[e])
            offset += member_counts[e]
        # 4. A realised token that reaches past y_j.
        if not is_special[i] and ends[i] > teacher_ends[j] and at_x >= 0 and not np.isnan(anchored[i]):
            split = _split(
                x, np.exp(anchored[i]) * whole, first_event, events_total, first_member, members_total, event_mass,
                member_counts, members, longer_ids[longer_offsets[i] : longer_offsets[i + 1]],
            )  # fmt: skip
            events_total += split
        event_counts[i] = events_total - first_event
        assigned = 0.0
        for e in range(first_event, events_total):
            assigned += event_mass[e]
        tail_out[i] = max(0.0, 1 - assigned)
    return (
        event_counts, event_mass[:events_total], member_counts[:events_total], members[:members_total], tail_out,
        known_out, disagreements, round_,
    )  # fmt: skip


@njit(cache=True)
def _relate(
    s: int, q: int, seen: Ints, round_: int, parent: Ints, related: Ids, related_of: Ints, total: int
) -> int:  # fmt: skip
    """Note that candidate q and student token s belong together; returns the new number of tokens met."""
    if seen[s] >> _PLACE_BITS == round_:
        _join(parent, q, seen[s] & ((1 << _PLACE_BITS) - 1))
        return total
    seen[s] = (round_ << _PLACE_BITS) | q
    related[total], related_of[total] = s, q
    return total + 1


@njit(cache=True)
def _sort(values: Ids, first: int, stop: int) -> None:
    """Sort a slice that is a few rising runs: one late token is inserted, anything else is sorted."""
    late = 0
    for k in range(first + 1, stop):
        if values[k] < values[k - 1]:
            late += 1
    if late == 0:
        return
    if late == 1 and values[stop - 1] < values[stop - 2]:
        value, k = values[stop - 1], stop - 1
        while k > first and values[k - 1] > value:
            values[k] = values[k - 1]
            k -= 1
        values[k] = value
        return
    values[first:stop].sort()


@njit(cache=True)
def _split(
    x: int, probability: float, first_event: int, last_event: int, first_member: int, last_member: int,
    event_mass: Floats, member_counts: Ids, members: Ids, continuations: Ids,
) -> int:  # fmt: skip
    """Take x and its continuations out of their event into one of their own, at the end; 1 if there is a rest."""
    offset = first_member
    for e in range(first_event, last_event):
        size = member_counts[e]
        mine = members[offset : offset + size].copy()
        place = np.searchsorted(mine, x)
        if place == size or mine[place] != x:
            offset += size
            continue
        is_own = np.zeros(size, np.uint8)
        is_own[place] = 1
        for s in continuations:
            k = np.searchsorted(mine, s)
            if k < size and mine[k] == s:
                is_own[k] = 1
        own = 0
        for k in range(size):
            own += is_own[k]
        if own == size:
            return 0
        kept = offset
        for k in range(size):
            if not is_own[k]:
                members[kept] = mine[k]
                kept += 1
        for k in range(offset + size, last_member):
            members[k - own] = members[k]
        kept = last_member - own
        for k in range(size):
            if is_own[k]:
                members[kept] = mine[k]
                kept += 1
        member_counts[e] = size - own
        member_counts[last_event] = own
        event_mass[last_event] = min(event_mass[e], probability)
        event_mass[e] = max(0.0, event_mass[e] - probability)
        return 1
    return 0


@njit(cache=True)
def _root(parent: Ints, q: int) -> int:
    while parent[q] != q:
        parent[q] = parent[parent[q]]
        q = parent[q]
    return q


@njit(cache=True)
def _join(parent: Ints, a: int, b: int) -> None:
    """The smaller place becomes the root, so that events keep the order of their first candidates."""
    a, b = _root(parent, a), _root(parent, b)
    if a < b:
        parent[b] = a
    else:
        parent[a] = b
