"""Events whose masses are probabilities whatever follows: `prepare.events: exact`.

The relation of `student.alignment.reference` pairs a candidate with the student tokens that spell it if nothing
follows. What follows can move a boundary: a text of the teacher's token `ab` may start with the student's `a`, if its
next letter makes `bc` there. Here a candidate is paired with every student token that *some* text pairs it with
(`student.alignment.joint`), and events are the connected components.

*Parts.* What the text can start with at y_j: the row's candidates, and in place of y_j itself what the next rows say
of it (y_j and a candidate of row j + 1, …), until the realised tokens reach the end of x_i (METHOD 2.3) and leave one
student token possible. Texts of different parts are different, and a part's probability is a product of stored ones.

*Inside a teacher token* the student tokens already written are known. A part of which some continuations are spelt
with them and others are not has an unknown probability: it counts as unknown mass, as the tail does, and below
`prepare.min_known_mass` there is no target.

Every text has its part and its student token in one event. So with complete rows and canonical texts each mass *is*
the probability that the student's next token is in the event, no matter what the teacher says after the rows that were
read. What a row's tail holds has unknown student tokens, as ever; the tail of a row after j goes to those tokens that
may follow the path and that no part claims.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from student.alignment.joint import START, JointSearch
from student.alignment.reference import PositionEvents, ReferenceAlignment, join_events, pack
from student.alignment.targets import SparseTargets

_ROUNDING = 1e-9
_ROWS_BEYOND = 3
"""How many rows after row j may be read once x_i is covered, to settle which student tokens are possible."""

Part = tuple[float, tuple[int, ...]]
"""A probability, and the student tokens that its texts can have at the position."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """The student tokens that texts with a given start can have at a position.

    `certain`: all of these texts have the realised student tokens before the position; otherwise some have others.
    """

    tokens: tuple[int, ...]
    certain: bool


class ExactEvents:
    """Events of one response by joint search; rows, spans and the tail inside a token are the reference's."""

    def __init__(self, alignment: ReferenceAlignment, search: JointSearch) -> None:
        self.alignment, self.search = alignment, search
        self.tables, self.spans, self.rows = alignment.tables, alignment.spans, alignment.rows
        self.counts: Counter[str] = Counter()

    def sparse_targets(self) -> SparseTargets:
        """Events of all S positions."""
        return pack([self.events(i) for i in range(len(self.spans.ids))])

    def events(self, i: int) -> PositionEvents:
        """[(mass, members)], tail mass and known mass m at student position i; no events and NaN without a target."""
        j = int(self.spans.teacher_index[i])
        row = self.rows[j]
        is_inside = bool(self.spans.starts[i] > self.spans.teacher_starts[j]) and not self.spans.is_special[i]
        self.counts["contradictions"] += row.contradicts
        if not row.usable:
            self.counts["unusable_rows"] += 1
            return [], math.nan, math.nan
        if is_inside and self.spans.teacher_ids[j] not in row.ids:
            return [], math.nan, math.nan
        parts, rests, unsure = self.parts(i, is_inside)
        self.counts["unsettled"] += unsure > _ROUNDING
        known, scale = 1 - row.tail, 1.0
        if is_inside:
            expected, possible = self.alignment.tail_inside(j, i, row)
            kept = sum(mass for mass, _ in parts) + sum(mass for mass, _ in rests)
            known = kept / (kept + possible + unsure) if kept else 0.0
            if not kept or known < self.alignment.min_known_mass:
                self.counts["below_known_mass"] += 1
                return [], math.nan, known
            scale = 1 / (kept + expected + unsure)
        events = join_events(parts)
        claimed = {s for _, members in events for s in members}
        events += join_events((mass, [s for s in tokens if s not in claimed]) for mass, tokens in rests)
        events = [(mass * scale, members) for mass, members in events]
        return events, max(0.0, 1 - sum(mass for mass, _ in events)), known

    def parts(self, i: int, is_inside: bool) -> tuple[list[Part], list[Part], float]:
        """(probability, student tokens at i) of what the text can start with at y_j; the same of what later rows leave
        out; and the probability of what may or may not be spelt like the text before i."""
        spans, teacher = self.spans, self.tables.teacher
        j = int(spans.teacher_index[i])
        h = self.alignment.text[spans.teacher_starts[j] : spans.starts[i]] if is_inside else b""
        parts: list[Part] = []
        rests: list[Part] = []
        unsure, path, likely = 0.0, b"", 1.0
        outlook: Outlook | None = None
        for r in range(j, len(self.rows)):
            row, realized = self.rows[r], int(spans.teacher_ids[r])
            if outlook is not None and row.tail > 0:
                if outlook.certain:
                    rests.append((likely * row.tail, outlook.tokens))
                else:
                    unsure += likely * row.tail
            for v, mass in zip(row.ids, row.mass, strict=True):
                token = teacher.tokens[v]
                if v == realized or (r == j and is_inside and not (token.startswith(h) and len(token) > len(h))):
                    continue
                seen = self.outlook(i, is_inside, path, v, outlook)
                if seen is not None and seen.certain:
                    parts.append((likely * mass, seen.tokens))
                elif seen is not None:
                    unsure += likely * mass
            if realized not in row.ids:
                break
            likely *= row.mass[row.ids.index(realized)]
            outlook = self._of_the_text(i, is_inside, path, realized, outlook)
            path += teacher.tokens[realized]
            if self._is_settled(i, r, outlook) or not self._goes_on(i, r):
                if outlook.certain:
                    parts.append((likely, outlook.tokens))
                else:
                    unsure += likely
                break
        return parts, rests, unsure

    def outlook(self, i: int, is_inside: bool, path: bytes, v: int, so_far: Outlook | None) -> Outlook | None:
        """What the student can have at i if teacher tokens of the bytes `path` and then v stand from y_j on; None if
        it cannot have spelt the text before i as it did. `so_far` is the outlook after `path` alone."""
        spans = self.spans
        j, start = spans.teacher_index[i], self.alignment.base[spans.teacher_index[i]] if is_inside else i
        before = self.alignment.text[spans.starts[start] : spans.teacher_starts[j]] + path
        realized = spans.ids[start:i].tolist()
        if self.tables.teacher.is_special[v]:
            spelled = self.tables.student_encoder.spell_fragments([before], partial=True)[0] if before else []
            spelled += self.tables.spelling(v).tolist()
            if spelled[: len(realized)] != realized:
                return None
            return Outlook(tuple(spelled[len(realized) : len(realized) + 1]), True)
        known = before + self.tables.teacher.tokens[v]
        if so_far is not None and so_far.certain:
            known = known[spans.starts[i] - spans.starts[start] :]
            left = tuple(s for s in so_far.tokens if self.search.is_possible(known, v, s))
            return Outlook(left, True) if left else None
        previous, certain = START, True
        for s in realized:
            options = self.search.next_tokens(known, v, previous)
            if s not in options:
                return None
            certain = certain and len(options) == 1
            known, previous = known[len(self.tables.student.tokens[s]) :], s
        tokens = self.search.next_tokens(known, v, previous)
        return Outlook(tokens, certain) if tokens else None

    def _of_the_text(self, i: int, is_inside: bool, path: bytes, realized: int, so_far: Outlook | None) -> Outlook:
        """The outlook after realised tokens. It holds x_i, because that happened: where the search excludes it the
        tokenizer is no chain of pairs there, which is counted."""
        x = int(self.spans.ids[i])
        outlook = self.outlook(i, is_inside, path, realized, so_far)
        if outlook is not None and x in outlook.tokens:
            return outlook
        self.counts["disagreements"] += 1
        return Outlook((*outlook.tokens, x), outlook.certain) if outlook else Outlook((x,), True)

    def _is_settled(self, i: int, r: int, outlook: Outlook) -> bool:
        return (
            outlook.certain
            and len(outlook.tokens) == 1
            and bool(self.spans.is_special[i] or self.spans.teacher_ends[r] >= self.spans.ends[i])
        )

    def _goes_on(self, i: int, r: int) -> bool:
        """Row r + 1 is known and may be used to split what starts with the realised tokens up to y_r."""
        spans = self.spans
        if r + 1 == len(self.rows) or self.tables.teacher.is_special[spans.teacher_ids[r]]:
            return False
        reached = int(spans.teacher_index[i]) + _ROWS_BEYOND
        follows = self.rows[r + 1]
        is_far = spans.teacher_ends[r] >= spans.ends[i] and r >= reached
        return follows.usable and spans.teacher_ids[r + 1] in follows.ids and not is_far
