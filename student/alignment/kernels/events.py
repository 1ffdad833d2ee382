"""Events: connected components of candidates and the student tokens that belong to them, laid out in CSR.

The candidates of a position are numbered by their place q. Each brings student tokens: its extensions, and the next
token of its own tokenization. Candidates that bring the same token are joined (union-find). Cost: about 10 ns for each
member of an event.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from student.alignment.kernels.arrays import Floats, Ids, Inside, Ints, Rows, Scratch
from student.alignment.spans import Spans
from student.alignment.tables import Csr


@njit(cache=True)
def build_events(
    spans: Spans, rows: Rows, inside: Inside, tokenizations: Csr, extensions: Csr, inside_extensions: Csr, longer: Csr,
    anchored: Floats, scratch: Scratch,
) -> tuple[Ids, Floats, Ids, Ids, Floats, Floats, int]:  # fmt: skip
    """Events of every position: their counts [S], mass and member counts of each event, members, tail and known mass
    [S], and how often the observed pair was not related.

    Args:
        tokenizations, extensions: of every teacher token [V_T].
        inside_extensions: extensions of each survivor of `inside`.
        longer: continuations of each observed student token that reaches past its teacher token [S].
        anchored: logprob of each observed student token [S].
    """
    count, widest = len(spans.ids), 0
    for j in range(len(rows.tail)):
        widest = max(widest, rows.offsets[j + 1] - rows.offsets[j])
    event_counts = np.zeros(count, np.int32)
    event_mass, member_counts = np.empty(count * (widest + 1)), np.empty(count * (widest + 1), np.int32)
    members = np.empty(len(scratch.related), np.int32)
    tail, known = np.full(count, np.nan), np.full(count, np.nan)
    disagreements, events_total, members_total = 0, 0, 0
    # Of each place: its parent; where its tokens start in `related`. Of each root: mass and members of its component;
    # where its next member goes.
    parent, runs = np.empty(widest, np.int64), np.empty(widest + 1, np.int64)
    sums, sizes, slot = np.empty(widest), np.empty(widest, np.int64), np.empty(widest, np.int64)
    mass, met_by, related = rows.mass, scratch.met_by, scratch.related
    for i in range(count):
        j, x = spans.teacher_index[i], spans.ids[i]
        is_inside = not spans.is_special[i] and spans.starts[i] > spans.teacher_starts[j]
        if not rows.usable[j] or (is_inside and rows.place[j] < 0):
            continue
        if is_inside:
            first, stop = inside.offsets[i], inside.offsets[i + 1]
            known[i] = inside.known[i]
            if first == stop:
                continue
            norm, whole = inside.scale[i], inside.kept[i] * inside.scale[i]
        else:
            first, stop = rows.offsets[j], rows.offsets[j + 1]
            known[i] = 1 - rows.tail[j]
            norm, whole = 1.0, 0.0
            for n in range(first, stop):
                whole += mass[n]
        width = stop - first
        disagreements += _relate(
            is_inside, first, width, x, rows.place[j], rows, inside, tokenizations, extensions, inside_extensions,
            scratch, parent, runs,
        )  # fmt: skip
        met_x = met_by[x] >= 0
        for s in related[: runs[width]]:
            met_by[s] = -1

        # Masses and sizes of the components.
        sums[:width] = 0.0
        sizes[:width] = 0
        for q in range(width):
            n = inside.found[first + q] if is_inside else first + q
            root = _root(parent, q)
            sums[root] += mass[n] * norm
            sizes[root] += runs[q + 1] - runs[q]
        # The events, in order of their first candidate.
        first_event, first_member = events_total, members_total
        for q in range(width):
            if sizes[q]:
                event_mass[events_total], member_counts[events_total] = sums[q], sizes[q]
                slot[q] = members_total
                events_total += 1
                members_total += sizes[q]
        if members_total > len(members):
            members = np.concatenate((members, np.empty(members_total, np.int32)))
        for q in range(width):
            root = _root(parent, q)
            at = slot[root]
            for s in related[runs[q] : runs[q + 1]]:
                members[at] = s
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
    return (
        event_counts, event_mass[:events_total], member_counts[:events_total], members[:members_total].copy(),
        tail, known, disagreements,
    )  # fmt: skip


@njit(cache=True)
def _relate(
    is_inside: bool, first: int, width: int, x: int, place: int, rows: Rows, inside: Inside, tokenizations: Csr,
    extensions: Csr, inside_extensions: Csr, scratch: Scratch, parent: Ints, runs: Ints,
) -> int:  # fmt: skip
    """Join all candidates that share a student token. The observed pair belongs together: 1 if nothing else says so.

    `scratch.related[runs[q] : runs[q + 1]]` are the tokens that candidate q is the first to bring.
    """
    # Arrays leave their tuples once, not in the loops: each time costs a reference count.
    met_by, related, row_ids = scratch.met_by, scratch.related, rows.ids
    total, disagreements = 0, 0
    for q in range(width):
        parent[q], runs[q] = q, total
        if is_inside:
            n, token = inside.found[first + q], inside.following[first + q]
            listed = inside_extensions.values[
                inside_extensions.offsets[first + q] : inside_extensions.offsets[first + q + 1]
            ]
        else:
            n, v = first + q, row_ids[first + q]
            own = tokenizations.values[tokenizations.offsets[v] : tokenizations.offsets[v + 1]]
            token = own[0] if len(own) else -1
            listed = extensions.values[extensions.offsets[v] : extensions.offsets[v + 1]]
        has_x = token == x
        for s in listed:
            has_x = has_x or s == x
            total = _bring(s, q, met_by, parent, related, total)
        if token >= 0:
            total = _bring(token, q, met_by, parent, related, total)
        if n == place and not has_x:
            disagreements += 1
            total = _bring(x, q, met_by, parent, related, total)
    runs[width] = total
    return disagreements


@njit(cache=True)
def _bring(s: int, q: int, met_by: Ids, parent: Ints, related: Ids, total: int) -> int:
    """Candidate q brings student token s; returns the new number of tokens met."""
    if met_by[s] >= 0:
        _join(parent, q, met_by[s])
        return total
    met_by[s] = q
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
        mine = members[offset : offset + member_counts[e]].copy()
        is_own = mine == x
        if not is_own.any():
            offset += len(mine)
            continue
        for s in continuations:
            k = np.searchsorted(mine, s)
            if k < len(mine) and mine[k] == s:
                is_own[k] = True
        own, others = mine[is_own], mine[~is_own]
        if not len(others):
            return 0
        after = members[offset + len(mine) : last_member]
        members[offset:last_member] = np.concatenate((others, after, own))
        member_counts[e], member_counts[last_event] = len(others), len(own)
        event_mass[last_event] = min(event_mass[e], probability)
        event_mass[e] = max(0.0, event_mass[e] - probability)
        return 1
    return 0
