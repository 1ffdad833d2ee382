"""The fast path: `student.alignment.reference` with compiled loops, and one look-up per distinct question.

Most positions start where a teacher token starts, and need only the tables of the vocabulary pair. The rest (inside a
teacher token, or reaching past one) ask the tokenizers; their answers are memoised for the life of the process.
Per teacher token at k = 64 this costs 8 to 40 µs on one core.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from shared.records import Distributions
from student.alignment.kernels import events, paths, rows
from student.alignment.reference import LOGPROB_TOLERANCE, TAIL_TOLERANCE, Targets, path_of
from student.alignment.spans import Spans, base_tokens
from student.alignment.tables import PairTables
from student.alignment.targets import SparseTargets


class FastAlignment:
    """Computes targets for one pair of vocabularies; keeps scratch memory of the size of the student's."""

    def __init__(self, tables: PairTables, min_known_mass: float) -> None:
        self.tables, self.min_known_mass = tables, min_known_mass
        self._seen, self._met = np.zeros(len(tables.student), np.int64), np.zeros(len(tables.teacher), np.int64)
        self._round = 1
        self._heads, self._owners = events.table_heads(tables)
        self._sorted_teacher = tables.sorted_teacher[1].astype(np.int64)
        self._longest = int(tables.teacher.byte_lengths.max(initial=1))
        self._spelling = (tables.spelling_offsets, tables.spelling_ids)

    def compute(self, spans: Spans, distributions: Distributions) -> Targets:
        """Targets of all S positions of one response."""
        tables = self.tables
        blob, blob_offsets = tables.teacher_blob, tables.teacher_offsets
        offsets, ids, mass, tails, usable, contradicts, realized, place, least = rows.read_rows(
            distributions.offsets,
            distributions.ids,
            distributions.logprobs.astype(np.float64),
            distributions.tail.astype(np.float64),
            distributions.sampled.astype(np.float64),
            spans.teacher_ids,
            TAIL_TOLERANCE,
            LOGPROB_TOLERANCE,
        )
        read = (offsets, ids, mass, tails, usable, place)
        student = (
            spans.ids,
            spans.starts,
            spans.ends,
            spans.is_special.astype(np.uint8),
            spans.teacher_index,
            spans.teacher_ids,
            spans.teacher_starts,
        )
        base = base_tokens(spans)
        matches, reach = rows.match_lengths(
            spans.text, offsets, ids, spans.teacher_starts, spans.run_stop, spans.teacher_ends, blob, blob_offsets
        )
        requests = rows.context_requests(spans.starts, spans.ends, base, spans.teacher_starts, offsets, ids, matches)
        context_of, context = self._spell_in_context(spans, base, offsets, ids, requests)
        inside = paths.survivors(
            student, read, base, matches, context_of, context, self._spelling, self._sorted_teacher,
            blob, blob_offsets, least, self.min_known_mass,
        )  # fmt: skip
        chained, anchored = paths.realized_logprobs(
            student, read, base, spans.run_start, spans.run_stop, spans.teacher_ends, realized,
            matches, reach, context_of, context, self._spelling, blob_offsets, self._longest, inside[3],
        )  # fmt: skip
        built = events.build_events(
            student, read, self._heads, self._owners, tables.extension_ids, inside,
            self._extend_inside(spans, ids, inside[0], inside[1]), self._continue_longer(spans), anchored,
            spans.teacher_ends, self._seen, self._met, self._round,
        )  # fmt: skip
        event_counts, event_mass, member_counts, members, tail, known, disagreements, self._round = built
        sparse = SparseTargets(
            event_offsets=_offsets(event_counts),
            event_mass=event_mass.astype(np.float32),
            member_offsets=_offsets(member_counts),
            members=members,
            tail=tail.astype(np.float32),
            known=known.astype(np.float32),
        )
        counts = Counter(
            contradictions=int(contradicts[spans.teacher_index].sum()),
            unusable_rows=int((usable[spans.teacher_index] == 0).sum()),
            disagreements=disagreements,
            below_known_mass=int((known[~spans.is_anchor] < self.min_known_mass).sum()),
        )
        return Targets(sparse, chained.astype(np.float32), anchored.astype(np.float32), counts)

    def _spell_in_context(
        self,
        spans: Spans,
        base: NDArray[np.int64],
        offsets: NDArray[np.int64],
        ids: NDArray[np.int32],
        requests: NDArray[np.int64],
    ) -> tuple[NDArray[np.int32], tuple[NDArray[np.int64], NDArray[np.int32]]]:
        """For each candidate its number among the spellings in context, -1 if it needs none; and the spellings."""
        context_of = np.full(len(ids), -1, np.int32)
        context_of[requests] = np.arange(len(requests), dtype=np.int32)
        rows = np.searchsorted(offsets, requests, side="right") - 1
        spellings = [
            self.tables.spelling_after(
                spans.text[spans.starts[base[row]] : spans.teacher_starts[row]].tobytes(), int(ids[n])
            )
            for n, row in zip(requests.tolist(), rows.tolist(), strict=True)
        ]
        return context_of, _csr(spellings)

    def _extend_inside(
        self, spans: Spans, ids: NDArray[np.int32], offsets: NDArray[np.int64], found: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Extensions of the survivors inside teacher tokens, one row per survivor."""
        fixed = np.repeat(spans.starts - spans.teacher_starts[spans.teacher_index], np.diff(offsets))
        pairs = zip(fixed.tolist(), ids[found].tolist(), strict=True)
        return _csr([self.tables.extensions_after(known, v) for known, v in pairs])

    def _continue_longer(self, spans: Spans) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Continuations of the realised tokens that reach past their teacher token, one row per position."""
        counts = np.zeros(len(spans.ids), np.int32)
        rows = []
        for i in np.flatnonzero(~spans.is_special & (spans.ends > spans.teacher_ends[spans.teacher_index])).tolist():
            rows.append(self.tables.continuations(*path_of(spans, i)))
            counts[i] = len(rows[-1])
        return _offsets(counts), np.concatenate([*rows, np.empty(0, np.int32)]).astype(np.int32)


def _csr(rows: list[NDArray[np.int32]]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    lengths = np.fromiter(map(len, rows), np.int32, len(rows))
    return _offsets(lengths), np.concatenate([*rows, np.empty(0, np.int32)]).astype(np.int32)


def _offsets(counts: NDArray[np.int32]) -> NDArray[np.int64]:
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets
