"""The formulas of `student/alignment/README.md` as they read, position by position: what the kernels are held to.

About a millisecond a position. Letters are the README's: student token x_i starts at byte u inside teacher token y_j,
whose bytes up to u are h.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from shared.dataset.records import Distributions, offsets_of
from student.alignment.kernels.rows import LOGPROB_TOLERANCE, TAIL_TOLERANCE
from student.alignment.spans import Spans, covered_path
from student.alignment.tables import PairTables, range_of
from student.alignment.targets import SparseTargets, Targets

Event = tuple[float, list[int]]
"""Mass and members."""
PositionEvents = tuple[list[Event], float, float]
"""Events, tail mass and known mass of one position."""


@dataclass(frozen=True, slots=True)
class Row:
    """One teacher row: candidates with their probabilities, the observed token always among them where known.

    `usable` is False where the tail is unknown or does not fit the candidates. `contradicts`: the observed token's own
    logprob is not what the row says of it, or, outside the top k, more than the tail holds; then it is another row's,
    it is not added, and `observed_logprob` is NaN. `least`: the smallest stored probability, which none
    outside exceeds.
    """

    ids: list[int]
    mass: list[float]
    tail: float
    usable: bool
    contradicts: bool
    observed_logprob: float
    least: float


def read_row(distributions: Distributions, position: int, observed: int) -> Row:
    """Row `position`, the observed token added by its own logprob where it is outside the top k."""
    stored_ids, logprobs = distributions.row(position)
    ids, mass = [int(v) for v in stored_ids], [math.exp(float(p)) for p in logprobs]
    tail, sampled = float(distributions.tail[position]), float(distributions.sampled[position])
    usable = bool(ids) and not math.isnan(tail) and abs(1 - sum(mass) - tail) <= TAIL_TOLERANCE
    contradicts, least = False, min(mass, default=0.0)
    if observed in ids:
        own = math.log(mass[ids.index(observed)])
        contradicts = abs(sampled - own) > LOGPROB_TOLERANCE
        sampled = math.nan if contradicts else own if math.isnan(sampled) else sampled
    elif math.exp(sampled) > 1 - sum(mass) + TAIL_TOLERANCE:
        contradicts, sampled = True, math.nan
    elif not math.isnan(sampled):
        ids.append(observed)
        mass.append(math.exp(sampled))
    total = sum(mass)
    if total > 1:
        mass = [m / total for m in mass]
    return Row(ids, mass, max(0.0, 1 - total), usable, contradicts, sampled, least)


class ReferenceAlignment:
    """One response's targets, position by position; about a millisecond each."""

    def __init__(self, tables: PairTables, spans: Spans, distributions: Distributions, min_known_mass: float) -> None:
        self.tables, self.spans, self.min_known_mass = tables, spans, min_known_mass
        self.rows = [read_row(distributions, j, int(v)) for j, v in enumerate(spans.teacher_ids)]
        self.text = spans.text.tobytes()
        self.counts: Counter[str] = Counter()
        self.longest = int(tables.teacher.byte_lengths.max(initial=1))
        self.base = spans.base.tolist()

    def compute(self) -> Targets:
        """Targets of all S positions."""
        count = len(self.spans.ids)
        observed, anchor = np.full(count, np.nan, np.float32), np.full(count, np.nan, np.float32)
        for i in range(count):
            observed[i], anchor[i] = self.observed_logprobs(i)
        sparse = pack([self.events(i, float(logprob)) for i, logprob in enumerate(anchor)])
        return Targets(sparse, observed, anchor, self.counts)

    def tokenization(self, row: int, candidate: int) -> list[int]:
        """Student tokens of `candidate` in place of y_row, from the student token that covers its first byte."""
        start = int(self.spans.starts[self.base[row]])
        before = self.text[start : self.spans.teacher_starts[row]]
        if before:
            return self.tables.tokenization_after(before, candidate).tolist()
        return self.tables.tokenizations.row(candidate).tolist()

    def reaches(self, row: int, candidate: int, position: int) -> bool:
        """`candidate` in place of y_row has the text's bytes up to the start of student token `position`, and perhaps
        more, and has the observed student tokens up to there."""
        a = int(self.spans.teacher_starts[row])
        u = int(self.spans.ends[position - 1]) if position else 0
        token = self.tables.teacher.tokens[candidate]
        if not token.startswith(self.text[a:u]):
            return False
        if candidate == self.spans.teacher_ids[row]:
            return True  # it happened
        base = self.base[row]
        return self.tokenization(row, candidate)[: position - base] == self.spans.ids[base:position].tolist()

    def reaches_over(self, row: int, candidate: int, position: int) -> bool:
        """`reaches`, and `candidate` goes on after that."""
        u = int(self.spans.ends[position - 1]) if position else 0
        longer = len(self.tables.teacher.tokens[candidate]) > u - self.spans.teacher_starts[row]
        return bool(longer) and self.reaches(row, candidate, position)

    # --- events ----------------------------------------------------------------------------------------------

    def events(self, i: int, anchor_logprob: float) -> PositionEvents:
        """[(mass, members)], tail mass and known mass m at student position i; no events and NaN without a target."""
        j = int(self.spans.teacher_index[i])
        row, observed = self.rows[j], int(self.spans.teacher_ids[j])
        fixed = int(self.spans.starts[i] - self.spans.teacher_starts[j])
        self.counts["contradictions"] += row.contradicts
        if not row.usable:
            self.counts["unusable_rows"] += 1
            return [], math.nan, math.nan
        if fixed and observed not in row.ids:
            return [], math.nan, math.nan  # its logprob is unknown, and with it every conditional
        survivors = self.survivors(j, i)
        kept = sum(mass for _, mass in survivors)
        known, scale = 1 - row.tail, 1.0
        if fixed:
            expected, possible = self.tail_inside(j, i, row)
            known = kept / (kept + possible)
            scale = 1 / (kept + expected)
            if known < self.min_known_mass:
                self.counts["below_known_mass"] += 1
                return [], math.nan, known

        parts: list[tuple[float, list[int]]] = []
        for v, mass in survivors:
            related = self.related(j, v, i, fixed)
            if v == observed and int(self.spans.ids[i]) not in related:
                self.counts["disagreements"] += 1
                related = [*related, int(self.spans.ids[i])]
            parts.append((mass * scale, related))
        events = join_events(parts)
        events = self.split_observed(i, j, events, math.exp(anchor_logprob) * kept * scale)
        return events, max(0.0, 1 - sum(mass for mass, _ in events)), known

    def survivors(self, j: int, i: int) -> list[tuple[int, float]]:
        """Candidates of row j, and their probabilities, that are possible at the start of x_i."""
        candidates = zip(self.rows[j].ids, self.rows[j].mass, strict=True)
        if self.spans.is_special[i] or self.spans.starts[i] == self.spans.teacher_starts[j]:
            return list(candidates)
        return [(v, mass) for v, mass in candidates if self.reaches_over(j, v, i)]

    def related(self, j: int, v: int, i: int, fixed: int) -> list[int]:
        """Student tokens at position i that belong to candidate v of row j."""
        if self.tables.teacher.is_special[v]:
            return self.tables.tokenizations.row(v).tolist()
        extensions = self.tables.extensions_after(fixed, v) if fixed else self.tables.extensions.row(v)
        related = set(extensions.tolist())
        skip = i - self.base[j] if fixed else 0
        tokens = self.tokenization(j, v) if fixed else self.tables.tokenizations.row(v).tolist()
        if not fixed or tokens[:skip] == self.spans.ids[self.base[j] : i].tolist():
            related.add(tokens[skip])
        return sorted(related)

    def split_observed(self, i: int, j: int, events: list[Event], probability: float) -> list[Event]:
        """An observed student token that reaches past y_j has its own probability and its own event.

        The probability is that of the text's bytes up to the end of x_i. Where x_i ends with a teacher token, longer
        student tokens that go on through the same teacher tokens are part of that, so they are in the event too.
        """
        x = int(self.spans.ids[i])
        if self.spans.is_special[i] or self.spans.ends[i] <= self.spans.teacher_ends[j] or math.isnan(probability):
            return events
        at = next(n for n, (_, members) in enumerate(events) if x in members)
        mass, members = events[at]
        own = {x, *self.tables.continuations(*covered_path(self.spans, i))}.intersection(members)
        others = [s for s in members if s not in own]
        if not others:
            return events
        rest = (max(0.0, mass - probability), others)
        return [*events[:at], rest, *events[at + 1 :], (min(mass, probability), sorted(own))]

    def tail_inside(self, j: int, i: int, row: Row) -> tuple[float, float]:
        """Row j's tail among what is possible at x_i: what can be expected there, and the most that there can be.

        Expected is the share of tokens outside the row that start with h and go on: a uniform guess. No token outside
        the row is more probable than the least candidate, which bounds it. Both are exact where the tail is empty.
        """
        h = self.text[self.spans.teacher_starts[j] : self.spans.starts[i]]
        inside = set(row.ids)
        tokens, ids = self.tables.sorted_teacher
        first, stop = range_of(tokens, h)
        outside = sum(1 for k in range(first, stop) if ids[k] not in inside and len(tokens[k]) > len(h))
        possible = min(row.tail, outside * row.least)
        return min(possible, row.tail * outside / max(1, len(ids) - len(inside))), possible

    # --- observed probabilities ------------------------------------------------------------------------------

    def observed_logprobs(self, i: int) -> tuple[float, float]:
        """log p(x_i | x_<i), and the same where the teacher tokens before y_j are known to have ended."""
        spans, j = self.spans, int(self.spans.teacher_index[i])
        if not spans.is_special[i]:
            first = self._first_row(j, int(spans.run_start[j]), i)
            before = self._path_mass(first, int(spans.run_stop[j]), i)
            after = self._path_mass(first, int(spans.run_stop[j]), i + 1)
            anchored = self._path_mass(j, int(spans.run_stop[j]), i + 1) / self.survivor_mass(j, i)
            return log(after / before), log(anchored)
        own = self.rows[j].observed_logprob
        follows_text = (
            i > 0 and j > 0 and not spans.is_special[i - 1] and spans.run_stop[spans.teacher_index[i - 1]] == j
        )
        if not follows_text:
            return own, own
        # The teacher's last token of text ended where the text did; it could have gone on.
        first = self._first_row(j, int(spans.run_start[j - 1]), i)
        ended = math.exp(sum(row.observed_logprob for row in self.rows[first:j]))
        return own + math.log(ended / self._path_mass(first, j, i)), own

    def survivor_mass(self, j: int, i: int) -> float:
        """The part of row j that is possible at the start of x_i: all of it where y_j starts there."""
        if self.spans.starts[i] == self.spans.teacher_starts[j]:
            return 1.0
        return sum(mass for _, mass in self.survivors(j, i)) or math.nan

    def _first_row(self, j: int, start: int, i: int) -> int:
        """The earliest row from `start` on whose candidates may reach over the start of x_i; stops at a row whose
        observed logprob is unknown."""
        spans, first = self.spans, j
        while (
            first > start
            and not math.isnan(self.rows[first - 1].observed_logprob)
            and spans.starts[i] - spans.teacher_starts[first - 1] <= self.longest
        ):
            first -= 1
        return first

    def _path_mass(self, first: int, stop: int, position: int) -> float:
        """W at the start of student token `position`, relative to the start of row `first`; rows end at `stop`.

        NaN if an observed logprob that it needs is unknown.
        """
        spans = self.spans
        c = int(spans.ends[position - 1]) if position else 0
        total, path = 0.0, 0.0
        for row in range(first, stop):
            if spans.teacher_starts[row] >= c:
                break
            if math.isnan(self.rows[row].observed_logprob):
                return math.nan
            end, observed = int(spans.teacher_ends[row]), int(spans.teacher_ids[row])
            shortest = c if end > c else end + 1  # a candidate of the same bytes as y_row is not another path
            for v, mass in zip(self.rows[row].ids, self.rows[row].mass, strict=True):
                stop_byte = spans.teacher_starts[row] + len(self.tables.teacher.tokens[v])
                if v != observed and stop_byte >= shortest and self.reaches(row, v, position):
                    total += math.exp(path) * mass
            path += self.rows[row].observed_logprob
            if end > c:
                return total + math.exp(path)
        return total + math.exp(path)


def pack(found: Sequence[PositionEvents]) -> SparseTargets:
    """The events of every position as arrays."""
    events = [event for position, _, _ in found for event in position]
    return SparseTargets(
        event_offsets=offsets_of([len(e) for e, _, _ in found]),
        event_mass=np.array([mass for mass, _ in events], dtype=np.float32),
        member_offsets=offsets_of([len(members) for _, members in events]),
        members=np.array([s for _, members in events for s in members], dtype=np.int32),
        tail=np.array([tail for _, tail, _ in found], dtype=np.float32),
        known=np.array([known for _, _, known in found], dtype=np.float32),
    )


def join_events(parts: Iterable[tuple[float, Iterable[int]]]) -> list[Event]:
    """[(mass, members)] of the connected components of (mass, student tokens), in order of their first part; parts
    without student tokens are in no event."""
    masses: list[float] = []
    first_with: dict[int, int] = {}
    parent: list[int] = []

    def find(n: int) -> int:
        while parent[n] != n:
            parent[n] = parent[parent[n]]
            n = parent[n]
        return n

    for n, (mass, tokens) in enumerate(parts):
        masses.append(mass)
        parent.append(n)
        for s in tokens:
            a, b = find(n), find(first_with.setdefault(s, n))
            parent[max(a, b)] = min(a, b)
    joined: dict[int, float] = {}
    for n, mass in enumerate(masses):
        joined[find(n)] = joined.get(find(n), 0.0) + mass
    members: dict[int, list[int]] = {}
    for s, n in first_with.items():
        members.setdefault(find(n), []).append(s)
    return [(joined[root], sorted(members[root])) for root in sorted(members)]


def log(value: float) -> float:
    """Natural log; NaN of what is not known or not possible."""
    return math.log(value) if value > 0 else math.nan
