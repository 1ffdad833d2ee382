"""What two vocabularies say about each other, computed once for a pair.

For teacher tokens v and student tokens s, with T(·) and S(·) the tokenizers' own (canonical) encodings:

* `tokenization(v)` = S(bytes of v).
* `extensions(v)` = {s : T(bytes of s) starts with v}, the student tokens that a text starting with v may start with, if
  they reach at least as far as v. No s that is text is in two such lists.

Special tokens correspond by role and have no bytes. Under equal tokenizers all of this is the identity.

A pair of 128k vocabularies takes a few seconds. What depends on the text around a token is asked when it is met, and
the last answers are remembered.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shared.dataset.records import offsets_of
from shared.tokenizer.vocabulary import Encoder, Vocabulary

_REMEMBERED = 1 << 17
"""Answers of one kind that are kept, of about 300 bytes each."""


class Csr(NamedTuple):
    """Rows of ids: row n is `values[offsets[n] : offsets[n + 1]]`; int64 [n + 1], int32."""

    offsets: NDArray[np.int64]
    values: NDArray[np.int32]

    @classmethod
    def of(cls, rows: Iterable[ArrayLike]) -> Csr:
        """These rows, in order."""
        arrays = [np.asarray(row, dtype=np.int32) for row in rows]
        return cls(offsets_of([len(row) for row in arrays]), np.concatenate([*arrays, np.empty(0, np.int32)]))

    def row(self, number: int) -> NDArray[np.int32]:
        """One row, as a view."""
        return self.values[self.offsets[number] : self.offsets[number + 1]]


class PairTables:
    """Tables of one (teacher, student) pair, each made when it is first needed.

    Args:
        teacher, student: the two vocabularies.
        student_encoder, teacher_encoder: their tokenizers.

    Attributes:
        same_tokenizer: both tokenizers are the same.
    """

    def __init__(
        self, teacher: Vocabulary, student: Vocabulary, student_encoder: Encoder, teacher_encoder: Encoder
    ) -> None:
        self.teacher, self.student = teacher, student
        self.student_encoder, self.teacher_encoder = student_encoder, teacher_encoder
        self.same_tokenizer = (
            teacher.fingerprint == student.fingerprint and teacher_encoder.fingerprint == student_encoder.fingerprint
        )
        self.tokenization_after = lru_cache(_REMEMBERED)(self._tokenization_after)
        self.extensions_after = lru_cache(_REMEMBERED)(self._extensions_after)
        self.continuations = lru_cache(_REMEMBERED)(self._continuations)
        self.count_longer = lru_cache(_REMEMBERED)(self._count_longer)

    @cached_property
    def tokenizations(self) -> Csr:
        """A row for each teacher token v, S(bytes of v); of a special its counterpart, or nothing.

        Raises:
            VocabularyError: if the student has no tokens for some of the bytes.
        """
        if self.same_tokenizer:
            return Csr.of(np.arange(len(self.teacher))[:, None])
        rows = self._rows_of_specials()
        text_ids = np.flatnonzero(~self.teacher.is_special).tolist()
        encoded = self.student_encoder.encode_fragments([self.teacher.tokens[v] for v in text_ids])
        for v, ids in zip(text_ids, encoded, strict=True):
            rows[v] = ids
        return Csr.of(rows)

    @cached_property
    def extensions(self) -> Csr:
        """A row for each teacher token v, {s : T(bytes of s) starts with v}, rising; of a special its counterpart."""
        if self.same_tokenizer:
            return self.tokenizations
        rows = self._rows_of_specials()
        text_ids = np.flatnonzero(~self.student.is_special).tolist()
        # A student token with bytes that the teacher has no tokens for follows nothing: no text of the teacher has it.
        encoded = self.teacher_encoder.encode_fragments([self.student.tokens[s] for s in text_ids], partial=True)
        for s, ids in zip(text_ids, encoded, strict=True):
            if ids:
                rows[ids[0]].append(s)
        return Csr.of(rows)

    def _rows_of_specials(self) -> list[list[int]]:
        counterparts = special_counterparts(self.teacher, self.student)
        return [[s] if s >= 0 else [] for s in counterparts.tolist()]

    def _tokenization_after(self, before: bytes, teacher_id: int) -> NDArray[np.int32]:
        """S(before + bytes of v), for a student token that starts before the teacher's token does."""
        (ids,) = self.student_encoder.encode_fragments([before + self.teacher.tokens[teacher_id]])
        return np.array(ids, dtype=np.int32)

    def _extensions_after(self, fixed: int, teacher_id: int) -> NDArray[np.int32]:
        """{s : s starts with v's bytes after the first `fixed`, and T(these bytes + s) starts with v}, rising."""
        token = self.teacher.tokens[teacher_id]
        return self._continuing(token[:fixed], token[fixed:], (teacher_id,))

    def _continuations(self, fixed: int, student_id: int, path: tuple[int, ...]) -> NDArray[np.int32]:
        """{s : s starts with x's bytes, and T(h + s) starts with the teacher tokens `path`}, rising; h + x is their
        bytes and h their first `fixed`. Empty without a path."""
        if not path:
            return np.empty(0, np.int32)
        return self._continuing(self.teacher.tokens[path[0]][:fixed], self.student.tokens[student_id], path)

    def _continuing(self, before: bytes, start: bytes, path: tuple[int, ...]) -> NDArray[np.int32]:
        """{s : s starts with `start`, and T(before + s) starts with `path`}, rising."""
        tokens, ids = self.sorted_student
        first, stop = range_of(tokens, start)
        encoded = self.teacher_encoder.encode_fragments([before + token for token in tokens[first:stop]], partial=True)
        return np.sort(ids[first:stop][[tuple(row[: len(path)]) == path for row in encoded]])

    def _count_longer(self, fixed: int, teacher_id: int) -> int:
        """How many of the teacher's tokens start with the first `fixed` bytes of v and go on after them."""
        tokens, _ = self.sorted_teacher
        prefix = self.teacher.tokens[teacher_id][:fixed]
        first, stop = range_of(tokens, prefix)
        return stop - bisect_right(tokens, prefix, first, stop)

    @cached_property
    def sorted_student(self) -> tuple[list[bytes], NDArray[np.int32]]:
        """Bytes and ids of the student's text tokens in order of bytes."""
        return _in_order(self.student)

    @cached_property
    def sorted_teacher(self) -> tuple[list[bytes], NDArray[np.int32]]:
        """Bytes and ids of the teacher's text tokens in order of bytes."""
        return _in_order(self.teacher)


def special_counterparts(teacher: Vocabulary, student: Vocabulary) -> NDArray[np.int32]:
    """int32 [V_T], the student's special of the same role, -1 elsewhere; never by id or name."""
    counterparts = np.full(len(teacher), -1, dtype=np.int32)
    for index, role in teacher.role_of.items():
        counterparts[index] = student.roles.get(role, -1)
    return counterparts


def _in_order(vocabulary: Vocabulary) -> tuple[list[bytes], NDArray[np.int32]]:
    order = sorted((token, index) for index, token in enumerate(vocabulary.tokens) if token)
    return [token for token, _ in order], np.array([index for _, index in order], dtype=np.int32)


def range_of(tokens: list[bytes], prefix: bytes) -> tuple[int, int]:
    """(first, stop) of those that start with `prefix`; `tokens` are sorted."""
    first = bisect_left(tokens, prefix)
    return first, bisect_right(tokens, prefix, lo=first, key=lambda token: token[: len(prefix)])
