"""A response in both tokenizations: who covers which bytes, where both have a boundary, and the prompt's student ids.

Text between special tokens is encoded by the student's own tokenizer, byte-exactly. Special tokens go over by
role; those whose role the student lacks are left out. One pass, linear in the response.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from student.alignment.tables import PairTables


class Spans(NamedTuple):
    """S student and T teacher tokens over the same B bytes; positions are bytes within the response.

    Attributes:
        text: uint8 [B].
        ids, starts, ends: int32, int64, int64 [S], the student's tokens; specials have no width.
        is_special: bool [S].
        teacher_index: int32 [S], the teacher token that covers the first byte, or the special itself.
        teacher_ids, teacher_starts, teacher_ends: int32, int64, int64 [T].
        run_start: int32 [T], the teacher token that starts the run of text which each token belongs to; a special
            is a run of its own.
        run_stop: int32 [T], one after the run's last.
        base: int64 [T], the student token that covers the teacher token's first byte; -1 for specials.
    """

    text: NDArray[np.uint8]
    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    is_special: NDArray[np.bool_]
    teacher_index: NDArray[np.int32]
    teacher_ids: NDArray[np.int32]
    teacher_starts: NDArray[np.int64]
    teacher_ends: NDArray[np.int64]
    run_start: NDArray[np.int32]
    run_stop: NDArray[np.int32]
    base: NDArray[np.int64]

    @property
    def is_anchor(self) -> NDArray[np.bool_]:
        """bool [S], token i starts where a teacher token starts."""
        return self.starts == self.teacher_starts[self.teacher_index]


def lay_spans(tables: PairTables, teacher_ids: NDArray[np.int32]) -> Spans:
    """Encode the response of `teacher_ids` for the student and lay the two tokenizations over each other.

    Raises:
        VocabularyError: if an id is outside the teacher's vocabulary.
    """
    teacher, student = tables.teacher, tables.student
    ends = teacher.byte_ends(teacher_ids)
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    text = np.frombuffer(teacher.decode(teacher_ids), dtype=np.uint8)
    run_start, run_stop = np.empty(len(teacher_ids), np.int32), np.empty(len(teacher_ids), np.int32)
    ids: list[NDArray[np.int32]] = []
    special_rows: list[NDArray[np.int32]] = []  # the teacher's special behind each student token, -1 for text
    for first, stop in _runs(teacher.is_special[teacher_ids]):
        run_start[first:stop], run_stop[first:stop] = first, stop
        if teacher.is_special[teacher_ids[first]]:
            counterpart = tables.tokenizations.row(teacher_ids[first])
            ids.append(counterpart)
            special_rows.append(np.full(len(counterpart), first, np.int32))
            continue
        if tables.same_tokenizer:
            encoded = np.asarray(teacher_ids[first:stop], dtype=np.int32)
        else:
            encoded = tables.student_encoder.encode(text[starts[first] : ends[stop - 1]].tobytes())
        ids.append(encoded)
        special_rows.append(np.full(len(encoded), -1, np.int32))
    student_ids = np.concatenate([*ids, np.empty(0, np.int32)]).astype(np.int32)
    specials = np.concatenate([*special_rows, np.empty(0, np.int32)]).astype(np.int32)
    student_ends = student.byte_ends(student_ids)
    student_starts = student_ends - student.byte_lengths[student_ids]
    # The first teacher token that ends after the byte; specials have no width, so they are never found this way.
    covering = np.searchsorted(ends, student_starts, side="right").astype(np.int32)
    return Spans(
        text=text,
        ids=student_ids,
        starts=student_starts,
        ends=student_ends,
        is_special=specials >= 0,
        teacher_index=np.where(specials >= 0, specials, covering).astype(np.int32),
        teacher_ids=np.array(teacher_ids, dtype=np.int32),  # a copy: writable, as the kernels' other arrays
        teacher_starts=starts,
        teacher_ends=ends,
        run_start=run_start,
        run_stop=run_stop,
        base=_covering_tokens(student_ends, specials < 0, starts, ends),
    )


def covered_path(spans: Spans, i: int) -> tuple[int, int, tuple[int, ...]]:
    """Bytes of y_j that are fixed at x_i, x_i, and the teacher tokens from y_j on that x_i covers; no tokens if the
    last of them goes on after x_i."""
    j = int(spans.teacher_index[i])
    stop = int(np.searchsorted(spans.teacher_ends, spans.ends[i], side="left")) + 1
    whole = spans.teacher_ends[stop - 1] == spans.ends[i]
    fixed = int(spans.starts[i] - spans.teacher_starts[j])
    return fixed, int(spans.ids[i]), tuple(spans.teacher_ids[j:stop].tolist()) if whole else ()


def retokenize(tables: PairTables, teacher_ids: ArrayLike) -> NDArray[np.int32]:
    """The student's ids of a text in the teacher's ids: runs of text re-encoded, specials by role.

    Specials whose role the student lacks are left out.

    Raises:
        VocabularyError: if an id is outside the teacher's vocabulary.
    """
    ids = np.asarray(teacher_ids, dtype=np.int32)
    return ids if not len(ids) or tables.same_tokenizer else lay_spans(tables, ids).ids


def _covering_tokens(
    ends: NDArray[np.int64], is_text: NDArray[np.bool_], starts: NDArray[np.int64], stops: NDArray[np.int64]
) -> NDArray[np.int64]:
    texts = np.flatnonzero(is_text)
    if not len(texts):
        return np.full(len(starts), -1, np.int64)
    found = np.searchsorted(ends[texts], starts, side="right")
    return np.where(stops > starts, texts[np.minimum(found, len(texts) - 1)], -1)


def _runs(is_special: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """(first, stop) of every run of text and of every single special."""
    cuts = np.flatnonzero(is_special)
    bounds = sorted({0, len(is_special), *cuts.tolist(), *(cuts + 1).tolist()})
    yield from pairwise(bounds)
