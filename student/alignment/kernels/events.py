"""Events: connected components of candidates and the student tokens that belong to them, laid out in CSR.

Lists of extensions are disjoint (a student token starts with one first teacher token), and hold nearly all members.
At a position where a teacher token starts they are copied whole: only the first token of a candidate's own tokenization
can lie in another's list, and one look at the table of first teacher tokens says in whose. Elsewhere every token met
is noted in `seen`. Cost: one copy of the members, about 10 ns each.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from student.alignment.kernels.arrays import Csr, Events, Floats, Heads, Ids, Inside, Ints, Rows, Scratch
from student.alignment.spans import Spans

_PLACE_BITS = 20  # candidates of one row are numbered in this many bits


class _Components(NamedTuple):
    """The components of one position, a place q for each of its candidates.

    `related`: student tokens that were met outside the lists of extensions, those of q from `runs[q]` to
    `runs[q + 1]`. `sums`, `sizes`: mass and members of the component with root q; `slot`: where its next member goes.
    """

    parent: Ints
    sums: Floats
    sizes: Ints
    slot: Ints
    related: Ids
    runs: Ints


@njit(cache=True)
def build_events(
    spans: Spans, rows: Rows, heads: Heads, inside: Inside, extensions: Csr, longer: Csr, anchored: Floats,
    scratch: Scratch,
) -> Events:  # fmt: skip
    """Events of every position. `extensions`: those of each survivor of `inside`; `longer`: continuations of each
    observed student token that reaches past its teacher token [S]; `anchored`: its logprob [S]."""
    count = len(spans.ids)
    most_events, most_members, work = _allocate(spans, rows, heads, inside, extensions)
    event_counts = np.zeros(count, np.int32)
    event_mass, member_counts = np.empty(most_events), np.empty(most_events, np.int32)
    members = np.empty(most_members, np.int32)
    tail, known = np.full(count, np.nan), np.full(count, np.nan)
    disagreements, events_total, members_total = 0, 0, 0
    parent, sums, sizes, slot, related, runs = work
    row_ids, mass, of_teacher, extension_ids = rows.ids, rows.mass, heads.of_teacher, heads.extensions
    round_ = scratch.round[0]
    for i in range(count):
        j, x = spans.teacher_index[i], spans.ids[i]
        is_inside = _is_inside(spans, i)
        if not rows.usable[j] or (is_inside and rows.place[j] < 0):
            continue
        first, stop = _bounds(spans, rows, inside, i)
        if is_inside:
            known[i] = inside.known[i]
            if first == stop:
                continue
            norm, whole = inside.scale[i], inside.kept[i] * inside.scale[i]
        else:
            known[i] = 1 - rows.tail[j]
            norm, whole = 1.0, 0.0
            for n in range(first, stop):
                whole += mass[n]
        disagreements += _relate(
            is_inside, first, stop, x, rows.place[j], rows, heads, inside, extensions, scratch, round_, work
        )
        owner = -1 if is_inside else heads.owners[x]
        met_x = _is_new(scratch.seen[x], round_) or (owner >= 0 and _is_new(scratch.met[owner], round_))
        round_ += 1

        # Masses and sizes of the components.
        width = stop - first
        for q in range(width):
            n = inside.found[first + q] if is_inside else first + q
            root, size = _root(parent, q), sizes[q] + runs[q + 1] - runs[q]
            sizes[q] = 0
            sums[root] += mass[n] * norm
            sizes[root] += size
        # The events, in order of their first candidate.
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
            if not is_inside:
                v = row_ids[first + q]
                for k in range(of_teacher[v, 2], of_teacher[v, 3]):
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
        # An observed token that reaches past y_j.
        is_longer = not spans.is_special[i] and spans.ends[i] > spans.teacher_ends[j]
        if is_longer and met_x and not np.isnan(anchored[i]):
            events_total += _split(
                x, np.exp(anchored[i]) * whole, first_event, events_total, first_member, members_total, event_mass,
                member_counts, members, longer.values[longer.offsets[i] : longer.offsets[i + 1]],
            )  # fmt: skip
        event_counts[i] = events_total - first_event
        assigned = 0.0
        for e in range(first_event, events_total):
            assigned += event_mass[e]
        tail[i] = max(0.0, 1 - assigned)
    scratch.round[0] = round_
    return Events(
        event_counts, event_mass[:events_total], member_counts[:events_total], members[:members_total].copy(),
        tail, known, disagreements,
    )  # fmt: skip


@njit(cache=True)
def _is_inside(spans: Spans, i: int) -> bool:
    """x_i starts inside a teacher token."""
    return not spans.is_special[i] and spans.starts[i] > spans.teacher_starts[spans.teacher_index[i]]


@njit(cache=True)
def _bounds(spans: Spans, rows: Rows, inside: Inside, i: int) -> tuple[int, int]:
    """First and stop of position i's candidates: in `inside.found` inside a teacher token, in the rows elsewhere."""
    if _is_inside(spans, i):
        return inside.offsets[i], inside.offsets[i + 1]
    return rows.offsets[spans.teacher_index[i]], rows.offsets[spans.teacher_index[i] + 1]


@njit(cache=True)
def _allocate(spans: Spans, rows: Rows, heads: Heads, inside: Inside, extensions: Csr) -> tuple[int, int, _Components]:
    """The most events and members that there can be, and memory for the widest position."""
    events, members, widest, most = 0, 0, 0, 0
    for i in range(len(spans.ids)):
        first, stop = _bounds(spans, rows, inside, i)
        width = stop - first
        # Outside the lists: the next token of each tokenization, and x_i.
        outside, listed = width + 1, 0
        if _is_inside(spans, i):
            outside += extensions.offsets[stop] - extensions.offsets[first]
        else:
            for v in rows.ids[first:stop]:
                listed += heads.of_teacher[v, 3] - heads.of_teacher[v, 2]
        events, members = events + width + 1, members + listed + outside
        widest, most = max(widest, width), max(most, outside)
    work = _Components(
        np.empty(widest, np.int64), np.empty(widest, np.float64), np.empty(widest, np.int64),
        np.empty(widest, np.int64), np.empty(most, np.int32), np.empty(widest + 1, np.int64),
    )  # fmt: skip
    return events, members, work


@njit(cache=True)
def _relate(
    is_inside: bool, first: int, stop: int, x: int, place: int, rows: Rows, heads: Heads, inside: Inside,
    extensions: Csr, scratch: Scratch, round_: int, work: _Components,
) -> int:  # fmt: skip
    """Join all candidates that share a student token. The observed pair belongs together: 1 if nothing else says so."""
    # Arrays leave their tuples once, not in the loops: each time costs a reference count.
    met, seen, parent, related, runs = scratch.met, scratch.seen, work.parent, work.related, work.runs
    sums, sizes, slot, row_ids, of_teacher = work.sums, work.sizes, work.slot, rows.ids, heads.of_teacher
    width, total, disagreements = stop - first, 0, 0
    for q in range(width):
        parent[q], sums[q], sizes[q], slot[q] = q, 0.0, 0, -1
        if not is_inside:
            met[row_ids[first + q]] = (round_ << _PLACE_BITS) | q
    owner_of_x = -1 if is_inside else heads.owners[x]
    for q in range(width):
        runs[q] = total
        if is_inside:
            n, token, owner, has_x = inside.found[first + q], inside.following[first + q], -1, False
            for s in extensions.values[extensions.offsets[first + q] : extensions.offsets[first + q + 1]]:
                has_x = has_x or s == x
                total = _note(s, q, seen, round_, parent, related, total)
        else:
            n, v = first + q, row_ids[first + q]
            token, owner, has_x = of_teacher[v, 0], of_teacher[v, 1], owner_of_x == v
            sizes[q] = of_teacher[v, 3] - of_teacher[v, 2]
        if token >= 0:
            has_x = has_x or token == x
            total = _meet(token, owner, q, met, seen, round_, parent, related, total)
        if n == place and not has_x:
            disagreements += 1
            total = _meet(x, owner_of_x, q, met, seen, round_, parent, related, total)
    runs[width] = total
    return disagreements


@njit(cache=True)
def _is_new(mark: int, round_: int) -> bool:
    """The mark was made in this round."""
    return mark >> _PLACE_BITS == round_


@njit(cache=True)
def _meet(
    s: int, owner: int, q: int, met: Ints, seen: Ints, round_: int, parent: Ints, related: Ids, total: int
) -> int:  # fmt: skip
    """Note that candidate q and student token s belong together, and so q and the candidate in whose list s is."""
    if owner >= 0 and _is_new(met[owner], round_):
        _join(parent, q, met[owner] & ((1 << _PLACE_BITS) - 1))
        return total
    return _note(s, q, seen, round_, parent, related, total)


@njit(cache=True)
def _note(s: int, q: int, seen: Ints, round_: int, parent: Ints, related: Ids, total: int) -> int:
    """Note that candidate q and student token s belong together; returns the new number of tokens met."""
    if _is_new(seen[s], round_):
        _join(parent, q, seen[s] & ((1 << _PLACE_BITS) - 1))
        return total
    seen[s] = (round_ << _PLACE_BITS) | q
    related[total] = s
    return total + 1


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
    parent[max(a, b)] = min(a, b)


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
        is_own = mine == x
        for s in continuations:
            k = np.searchsorted(mine, s)
            if k < size and mine[k] == s:
                is_own[k] = True
        own, others = mine[is_own], mine[~is_own]
        if not len(others):
            return 0
        members[offset : offset + len(others)] = others
        for k in range(offset + size, last_member):
            members[k - len(own)] = members[k]
        members[last_member - len(own) : last_member] = own
        member_counts[e], member_counts[last_event] = len(others), len(own)
        event_mass[last_event] = min(event_mass[e], probability)
        event_mass[e] = max(0.0, event_mass[e] - probability)
        return 1
    return 0
