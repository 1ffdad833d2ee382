"""The targets of one response, kernel after kernel.

Most positions start where a teacher token starts, and need only the tables of the vocabulary pair. The rest (inside a
teacher token, or reaching past one) ask the tokenizers, whose answers the tables remember.
Per teacher token at k = 64 this costs 8 to 40 µs on one core.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from shared.dataset.records import Distributions, offsets_of
from student.alignment.kernels import events, paths, rows
from student.alignment.kernels.arrays import Candidates, Inside, Rows, Scratch, TeacherTokens
from student.alignment.spans import Spans, covered_path
from student.alignment.tables import Csr, PairTables
from student.alignment.targets import SparseTargets, Targets


class TargetKernels:
    """Computes targets for one pair of vocabularies; keeps scratch memory of the size of the student's."""

    def __init__(self, tables: PairTables, min_known_mass: float) -> None:
        self.tables, self.min_known_mass = tables, min_known_mass
        self._scratch = Scratch(np.full(len(tables.student), -1, np.int32), np.empty(len(tables.student), np.int32))
        lengths = tables.teacher.byte_lengths
        self._tokens = TeacherTokens(
            np.frombuffer(b"".join(tables.teacher.tokens), dtype=np.uint8),
            offsets_of(lengths),
            int(lengths.max(initial=1)),
            len(tables.sorted_teacher[0]),
        )

    def compute(self, spans: Spans, distributions: Distributions) -> Targets:
        """Targets of all S positions of one response."""
        read = rows.read_rows(
            distributions.offsets,
            distributions.ids,
            distributions.logprobs.astype(np.float64),
            distributions.tail.astype(np.float64),
            distributions.sampled.astype(np.float64),
            spans.teacher_ids,
        )
        candidates = self._find_candidates(spans, read)
        inside = paths.survivors(spans, read, candidates, self._tokens, self._count_longer(spans), self.min_known_mass)
        chained, anchored = paths.observed_logprobs(spans, read, candidates, self._tokens, inside.kept)
        event_counts, event_mass, member_counts, members, tail, known, disagreements = events.build_events(
            spans,
            read,
            inside,
            self.tables.tokenizations,
            self.tables.extensions,
            self._extend_inside(spans, read, inside),
            self._continue_longer(spans),
            anchored,
            self._scratch,
        )
        counts = Counter(
            contradictions=int(read.contradicts[spans.teacher_index].sum()),
            unusable_rows=int((~read.usable[spans.teacher_index]).sum()),
            disagreements=disagreements,
            below_known_mass=int((known[~spans.is_anchor] < self.min_known_mass).sum()),
        )
        sparse = SparseTargets(
            event_offsets=offsets_of(event_counts),
            event_mass=event_mass.astype(np.float32),
            member_offsets=offsets_of(member_counts),
            members=members,
            tail=tail.astype(np.float32),
            known=known.astype(np.float32),
        )
        return Targets(sparse, chained.astype(np.float32), anchored.astype(np.float32), counts)

    def _find_candidates(self, spans: Spans, read: Rows) -> Candidates:
        matches, reach = rows.match_lengths(spans, read, self._tokens)
        found, row_of = rows.need_context(spans, read, matches)
        context_of = np.full(len(read.ids), -1, np.int32)
        context_of[found] = np.arange(len(found), dtype=np.int32)
        before = [
            spans.text[a:b].tobytes()
            for a, b in zip(
                spans.starts[spans.base[row_of]].tolist(), spans.teacher_starts[row_of].tolist(), strict=True
            )
        ]
        in_context = Csr.of(map(self.tables.tokenization_after, before, read.ids[found].tolist()))
        return Candidates(matches, reach, context_of, in_context, self.tables.tokenizations)

    def _count_longer(self, spans: Spans) -> NDArray[np.int64]:
        """[S], the teacher's tokens that have y_j's bytes before x_i and go on; 0 where x_i is not inside y_j."""
        counts = np.zeros(len(spans.ids), np.int64)
        rows = spans.teacher_index
        inside = np.flatnonzero(~spans.is_anchor)
        fixed = spans.starts[inside] - spans.teacher_starts[rows[inside]]
        tokens = spans.teacher_ids[rows[inside]]
        counts[inside] = [*map(self.tables.count_longer, fixed.tolist(), tokens.tolist())]
        return counts

    def _extend_inside(self, spans: Spans, read: Rows, inside: Inside) -> Csr:
        """Extensions of the survivors inside teacher tokens, one row per survivor."""
        fixed = np.repeat(spans.starts - spans.teacher_starts[spans.teacher_index], np.diff(inside.offsets))
        return Csr.of(map(self.tables.extensions_after, fixed.tolist(), read.ids[inside.found].tolist()))

    def _continue_longer(self, spans: Spans) -> Csr:
        """Continuations of the observed tokens that reach past their teacher token, one row per position."""
        counts = np.zeros(len(spans.ids), np.int64)
        longer = np.flatnonzero(~spans.is_special & (spans.ends > spans.teacher_ends[spans.teacher_index]))
        found = Csr.of(self.tables.continuations(*covered_path(spans, i)) for i in longer.tolist())
        counts[longer] = np.diff(found.offsets)
        return Csr(offsets_of(counts), found.values)
