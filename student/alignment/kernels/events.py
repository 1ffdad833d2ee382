"""Events: connected components of candidates and the student tokens that belong to them, laid out in CSR.

Lists of extensions are disjoint (a student token is spelt with one first teacher token), and hold nearly all members.
At a position where a teacher token starts they are copied whole: only the next token of a candidate's own spelling
can lie in another's list, and one look at the table of first teacher tokens says in whose. Elsewhere every token met
is noted in `seen`. Cost: one copy of the members, about 10 ns each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from student.alignment.tables import PairTables

_PLACE_BITS = 20  # candidates of one row are numbered in this many bits
Ints = NDArray[np.int64]
Ids = NDArray[np.int32]
Floats = NDArray[np.float64]


def table_heads(tables: PairTables) -> tuple[Ids, Ids]:
    """What `build_events` needs of the tables at a position where a teacher token starts.

    int32 [V_T, 4], one cache line for each candidate v: the first token of its spelling (-1 without one), the teacher
    token in whose list of extensions that is (-1 if in none), first and stop of v's own list, which a special has none
    of. And int32 [V_S], the teacher token in whose list s is, -1 if in none.
    """
    special = tables.teacher.is_special
    first, stop = tables.spelling_offsets[:-1], tables.spelling_offsets[1:]
    padded = np.append(tables.spelling_ids, np.int32(-1))
    token = np.where(stop > first, padded[first], -1)
    owners = np.where((tables.first_teacher >= 0) & ~special[tables.first_teacher], tables.first_teacher, -1)
    listed = (np.where(special, 0, tables.extension_offsets[at:][: len(special)]) for at in (0, 1))
    heads = np.stack([token, np.where(token >= 0, owners[token], -1), *listed], axis=1)
    return heads.astype(np.int32), owners.astype(np.int32)


@njit(cache=True)
def build_events(
    student: Any, rows: Any, heads: Ids, owners: Ids, extension_ids: Ids, inside: Any, inside_extensions: Any,
    longer: Any, anchored: Floats, teacher_ends: Ints, seen: Ints, met: Ints, round_: int,
) -> Any:  # fmt: skip
    """Events of every position: `reference.events`.

    `heads` and `owners` are `table_heads`; `seen` [V_S] and `met` [V_T] are scratch, kept between calls: the round in
    which a student token, or a candidate, was last met, and the place of its candidate, in one number. `round_` is new.
    """
    ids, starts, ends, is_special, index, _, teacher_starts = student
    row_offsets, row_ids, mass, tails, usable, place = rows
    inside_offsets, inside_found, inside_next, kept, scale, known = inside
    in_offsets, in_ids = inside_extensions
    longer_offsets, longer_ids = longer
    count = len(ids)
    event_counts = np.zeros(count, np.int32)
    event_mass, member_counts, members = np.empty(1024), np.empty(1024, np.int32), np.empty(4096, np.int32)
    tail_out, known_out = np.full(count, np.nan), np.full(count, np.nan)
    disagreements, events_total, members_total, widest = 0, 0, 0, 1
    for j in range(len(row_offsets) - 1):
        widest = max(widest, row_offsets[j + 1] - row_offsets[j])
    parent, sums = np.empty(widest, np.int64), np.empty(widest, np.float64)
    sizes, slot = np.empty(widest, np.int64), np.empty(widest, np.int64)
    related = np.empty(1024, np.int32)
    runs = np.zeros(widest + 1, np.int64)  # where each candidate's tokens start in `related`
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
        x, width = ids[i], stop - first
        owner_of_x = -1 if fixed > 0 else owners[x]
        # 1. Every (candidate, student token) that belong together; a token met twice joins its candidates.
        for q in range(width):
            parent[q], sums[q], sizes[q], slot[q] = q, 0.0, 0, -1
        if fixed == 0:
            for q in range(width):
                met[row_ids[first + q]] = (round_ << _PLACE_BITS) | q
        total = 0
        for q in range(width):
            n = inside_found[first + q] if fixed > 0 else first + q
            runs[q] = total
            if fixed > 0:
                a, b, token, owner, has_x = (
                    in_offsets[first + q],
                    in_offsets[first + q + 1],
                    inside_next[first + q],
                    -1,
                    False,
                )
                if total + b - a + 2 > len(related):
                    related = np.concatenate((related, np.empty(total + b - a + 2, np.int32)))
                for k in range(a, b):
                    has_x = has_x or in_ids[k] == x
                    total = _relate(in_ids[k], q, seen, round_, parent, related, total)
            else:
                v = row_ids[n]
                token, owner = heads[v, 0], heads[v, 1]
                sizes[q] = heads[v, 3] - heads[v, 2]
                has_x = owner_of_x == v
            if total + 2 > len(related):
                related = np.concatenate((related, np.empty(len(related), np.int32)))
            if token >= 0:
                has_x = has_x or token == x
                total = _meet(token, owner, q, met, seen, round_, parent, related, total)
            if n == place[j] and not has_x:
                disagreements += 1
                total = _meet(x, owner_of_x, q, met, seen, round_, parent, related, total)
        runs[width] = total
        met_x = seen[x] >> _PLACE_BITS == round_ or (owner_of_x >= 0 and met[owner_of_x] >> _PLACE_BITS == round_)
        round_ += 1
        # 2. Masses and sizes of the components.
        listed = 0
        for q in range(width):
            n = inside_found[first + q] if fixed > 0 else first + q
            root, size = _root(parent, q), sizes[q] + runs[q + 1] - runs[q]
            listed += size
            sizes[q] = 0
            sums[root] += mass[n] * norm
            sizes[root] += size
        # 3. Lay the events down, in order of their first candidate.
        if events_total + width + 1 > len(event_mass):
            event_mass = np.concatenate((event_mass, np.empty(len(event_mass) + width + 1)))
            member_counts = np.concatenate((member_counts, np.empty(len(member_counts) + width + 1, np.int32)))
        if members_total + listed > len(members):
            members = np.concatenate((members, np.empty(len(members) + listed, np.int32)))
        first_event, first_member = events_total, members_total
        for q in range(width):
            if sizes[q]:
                event_mass[events_total], member_counts[events_total] = sums[q], sizes[q]
                slot[q] = members_total
                events_total += 1
                members_total += sizes[q]
        for q in range(width):
            root = _root(parent, q)
            at = slot[root]
            if fixed == 0:
                v = row_ids[first + q]
                for k in range(heads[v, 2], heads[v, 3]):
                    members[at] = extension_ids[k]
                    at += 1
            for r in range(runs[q], runs[q + 1]):
                members[at] = related[r]
                at += 1
            slot[root] = at
        offset = first_member
        for e in range(first_event, events_total):
            _sort(members, offset, offset + member_counts[e])
            offset += member_counts[e]
        # 4. A realised token that reaches past y_j.
        if not is_special[i] and ends[i] > teacher_ends[j] and met_x and not np.isnan(anchored[i]):
            events_total += _split(
                x, np.exp(anchored[i]) * whole, first_event, events_total, first_member, members_total, event_mass,
                member_counts, members, longer_ids[longer_offsets[i] : longer_offsets[i + 1]],
            )  # fmt: skip
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
def _meet(
    s: int, owner: int, q: int, met: Ints, seen: Ints, round_: int, parent: Ints, related: Ids, total: int
) -> int:  # fmt: skip
    """Note that candidate q and student token s belong together, and so q and the candidate in whose list s is."""
    if owner >= 0 and met[owner] >> _PLACE_BITS == round_:
        _join(parent, q, met[owner] & ((1 << _PLACE_BITS) - 1))
        return total
    return _relate(s, q, seen, round_, parent, related, total)


@njit(cache=True)
def _relate(s: int, q: int, seen: Ints, round_: int, parent: Ints, related: Ids, total: int) -> int:
    """Note that candidate q and student token s belong together; returns the new number of tokens met."""
    if seen[s] >> _PLACE_BITS == round_:
        _join(parent, q, seen[s] & ((1 << _PLACE_BITS) - 1))
        return total
    seen[s] = (round_ << _PLACE_BITS) | q
    related[total] = s
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
