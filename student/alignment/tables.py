"""What two vocabularies say about each other, computed once per pair and kept on disk.

For teacher tokens v and student tokens s, with T(·) and S(·) the tokenizers' own (canonical) encodings:

* `spelling(v)` = S(bytes of v), v in student tokens; its first token is f(v).
* `first_teacher[s]` = first token of T(bytes of s), called g(s).
* `extensions(v)` = {s : g(s) = v}, the student tokens that a text starting with v may start with, if they reach at
  least as far as v. Every s is in at most one such list, so all lists together hold at most |V_S| entries.

Special tokens correspond by role and have no bytes. Under equal tokenizers all of this is the identity.

A pair of 128k vocabularies takes a few seconds; the result is cached under the user's cache directory (or
`LLADA_DRAFTER_CACHE`) by the fingerprints of both vocabularies and both encoders.
"""

from __future__ import annotations

import hashlib
import logging
import os
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.vocabulary import Encoder, Vocabulary

_VERSION = 2
_logger = logging.getLogger(__name__)


@dataclass(eq=False)
class PairTables:
    """Tables of one (teacher, student) pair; rows are CSR.

    Attributes:
        identity: both tokenizers are the same.
        special_of: int32 [V_T], the student's special of the same role; -1 for text and for roles that it lacks.
        spelling_offsets, spelling_ids: int64 [V_T + 1] and int32, S(bytes of v); of a special its counterpart.
        first_teacher: int32 [V_S], g(s); -1 for specials without a counterpart.
        extension_offsets, extension_ids: int64 [V_T + 1] and int32, {s : g(s) = v}, rising.
    """

    teacher: Vocabulary
    student: Vocabulary
    student_encoder: Encoder
    teacher_encoder: Encoder | None
    identity: bool
    special_of: NDArray[np.int32]
    spelling_offsets: NDArray[np.int64]
    spelling_ids: NDArray[np.int32]
    first_teacher: NDArray[np.int32]
    extension_offsets: NDArray[np.int64]
    extension_ids: NDArray[np.int32]
    _conditional: dict[tuple[int, int], NDArray[np.int32]] = field(default_factory=dict, repr=False)
    _contextual: dict[tuple[bytes, int], NDArray[np.int32]] = field(default_factory=dict, repr=False)
    _continuing: dict[tuple[int, int, tuple[int, ...]], NDArray[np.int32]] = field(default_factory=dict, repr=False)

    def spelling(self, teacher_id: int) -> NDArray[np.int32]:
        """S(bytes of v); of a special its counterpart, or nothing."""
        return self.spelling_ids[self.spelling_offsets[teacher_id] : self.spelling_offsets[teacher_id + 1]]

    def extensions(self, teacher_id: int) -> NDArray[np.int32]:
        """{s : g(s) = v}, rising."""
        return self.extension_ids[self.extension_offsets[teacher_id] : self.extension_offsets[teacher_id + 1]]

    def spelling_after(self, before: bytes, teacher_id: int) -> NDArray[np.int32]:
        """S(before + bytes of v), for a student token that starts before the teacher's token does. Memoised."""
        key = (before, teacher_id)
        found = self._contextual.get(key)
        if found is None:
            text = before + self.teacher.tokens[teacher_id]
            found = self._contextual[key] = self.student_encoder.encode_fragments([text])[0]
        return found

    def extensions_after(self, fixed: int, teacher_id: int) -> NDArray[np.int32]:
        """{s : s starts with v's bytes after the first `fixed`, and T(those `fixed` bytes + s) starts with v}, rising.

        Memoised: one corpus meets few (fixed, v), and each costs one batch through the teacher's tokenizer.
        """
        if not fixed:
            return self.extensions(teacher_id)
        key = (fixed, teacher_id)
        found = self._conditional.get(key)
        if found is None:
            found = self._conditional[key] = self._find_extensions(fixed, teacher_id)
        return found

    def continuations(self, fixed: int, student_id: int, path: tuple[int, ...]) -> NDArray[np.int32]:
        """{s : s starts with x's bytes, and T(h + s) starts with the teacher tokens `path`}, rising; h + x is their
        bytes and h their first `fixed`. Empty without a path. Memoised.
        """
        key = (fixed, student_id, path)
        found = self._continuing.get(key)
        if found is None:
            found = self._continuing[key] = self._find_continuations(fixed, student_id, path)
        return found

    def _find_continuations(self, fixed: int, student_id: int, path: tuple[int, ...]) -> NDArray[np.int32]:
        if not path:
            return np.empty(0, np.int32)
        tokens, ids = self._starting_with(self.student.tokens[student_id])
        h = self.teacher.tokens[path[0]][:fixed]
        texts = [h + token for token in tokens]
        if self.teacher_encoder is None:
            starts = [self._greedy_starts_with(text, path) for text in texts]
        else:
            encoded = self.teacher_encoder.spell_fragments(texts, partial=True)
            starts = [tuple(ids[: len(path)]) == path for ids in encoded]
        return np.sort(ids[np.array(starts, dtype=np.bool_)])

    def _greedy_starts_with(self, text: bytes, path: tuple[int, ...]) -> bool:
        for v in path:
            if _first_tokens(self.teacher, None, [text])[0] != v:
                return False
            text = text[len(self.teacher.tokens[v]) :]
        return True

    def _find_extensions(self, fixed: int, teacher_id: int) -> NDArray[np.int32]:
        token = self.teacher.tokens[teacher_id]
        h = token[:fixed]
        tokens, ids = self._starting_with(token[fixed:])
        first = _first_tokens(self.teacher, self.teacher_encoder, [h + token for token in tokens])
        return np.sort(ids[first == teacher_id])

    def _starting_with(self, prefix: bytes) -> tuple[list[bytes], NDArray[np.int32]]:
        """Bytes and ids of the student's tokens that start with `prefix`."""
        tokens, ids = self.sorted_student
        first, stop = range_of(tokens, prefix)
        return tokens[first:stop], ids[first:stop]

    @cached_property
    def sorted_student(self) -> tuple[list[bytes], NDArray[np.int32]]:
        """Bytes and ids of the student's text tokens in order of bytes."""
        return _in_order(self.student)

    @cached_property
    def sorted_teacher(self) -> tuple[list[bytes], NDArray[np.int32]]:
        """Bytes and ids of the teacher's text tokens in order of bytes."""
        return _in_order(self.teacher)

    def teacher_range(self, prefix: bytes) -> tuple[int, int]:
        """(first, stop) within `sorted_teacher` of the tokens that start with `prefix`."""
        return range_of(self.sorted_teacher[0], prefix)

    @cached_property
    def teacher_offsets(self) -> NDArray[np.int64]:
        """int64 [V_T + 1], where each token starts in `teacher_blob`."""
        return np.concatenate([[0], np.cumsum(self.teacher.byte_lengths)]).astype(np.int64)

    @cached_property
    def teacher_blob(self) -> NDArray[np.uint8]:
        """uint8, the bytes of all teacher tokens one after the other."""
        return np.frombuffer(b"".join(self.teacher.tokens), dtype=np.uint8)


def pair_tables(
    teacher: Vocabulary,
    student: Vocabulary,
    student_encoder: Encoder,
    teacher_encoder: Encoder | None,
    cache: Path | None = None,
) -> PairTables:
    """The tables of a pair, from the cache if they are there.

    Args:
        teacher_encoder: without it g(s) is the longest teacher token that s starts with, which is what greedy
            tokenization would do and merges of BPE mostly do; give it wherever it is known.
        cache: directory of the cache; None takes the user's.

    Raises:
        VocabularyError: if one tokenizer has no tokens for bytes of the other.
    """
    parts = [teacher.fingerprint, teacher_encoder.fingerprint if teacher_encoder else "greedy", repr(teacher.roles)]
    parts += [student.fingerprint, student_encoder.fingerprint, repr(student.roles), str(_VERSION)]
    file = (cache or _cache_directory()) / f"{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:32]}.npz"
    arrays: dict[str, Any] | None = _load(file)
    if arrays is None:
        arrays = _build(teacher, student, student_encoder, teacher_encoder)
        _save(file, arrays)
    same_encoder = teacher_encoder is None or teacher_encoder.fingerprint == student_encoder.fingerprint
    identity = teacher.fingerprint == student.fingerprint and same_encoder
    return PairTables(teacher, student, student_encoder, teacher_encoder, identity, **arrays)


def special_counterparts(teacher: Vocabulary, student: Vocabulary) -> NDArray[np.int32]:
    """int32 [V_T], the student's special of the same role, -1 elsewhere; never by id or spelling."""
    counterparts = np.full(len(teacher), -1, dtype=np.int32)
    for index, role in teacher.role_of.items():
        counterparts[index] = student.roles.get(role, -1)
    return counterparts


def _build(
    teacher: Vocabulary, student: Vocabulary, student_encoder: Encoder, teacher_encoder: Encoder | None
) -> dict[str, Any]:
    same_encoder = teacher_encoder is None or teacher_encoder.fingerprint == student_encoder.fingerprint
    if teacher.fingerprint == student.fingerprint and same_encoder:
        ids, offsets = np.arange(len(teacher), dtype=np.int32), np.arange(len(teacher) + 1, dtype=np.int64)
        special_of = np.where(teacher.is_special, ids, -1).astype(np.int32)
        return {
            "special_of": special_of,
            "spelling_offsets": offsets,
            "spelling_ids": ids,
            "first_teacher": ids,
            "extension_offsets": offsets,
            "extension_ids": ids,
        }
    special_of = special_counterparts(teacher, student)
    text_ids = np.flatnonzero(~teacher.is_special)
    spellings: list[NDArray[np.int32]] = [np.empty(0, np.int32)] * len(teacher)
    for index, ids in zip(
        text_ids, student_encoder.encode_fragments([teacher.tokens[i] for i in text_ids]), strict=True
    ):
        spellings[index] = ids
    for index in np.flatnonzero(special_of >= 0):
        spellings[index] = special_of[index : index + 1]
    first_teacher = np.full(len(student), -1, dtype=np.int32)
    student_text = np.flatnonzero(~student.is_special)
    first_teacher[student_text] = _first_tokens(teacher, teacher_encoder, [student.tokens[i] for i in student_text])
    mapped = np.flatnonzero(special_of >= 0)
    by_teacher = np.argsort(first_teacher, kind="stable").astype(np.int32)
    by_teacher = by_teacher[first_teacher[by_teacher] >= 0]
    counts = np.bincount(first_teacher[by_teacher], minlength=len(teacher))
    # Several specials of the teacher may share one counterpart, so these lists hold it in each.
    extensions = [by_teacher[stop - count : stop] for count, stop in zip(counts, np.cumsum(counts), strict=True)]
    for index in mapped:
        extensions[index] = special_of[index : index + 1]
        first_teacher[special_of[index]] = index
    return {
        "special_of": special_of,
        "spelling_offsets": _offsets(spellings),
        "spelling_ids": np.concatenate(spellings).astype(np.int32),
        "first_teacher": first_teacher,
        "extension_offsets": _offsets(extensions),
        "extension_ids": np.concatenate(extensions).astype(np.int32),
    }


def _first_tokens(vocabulary: Vocabulary, encoder: Encoder | None, texts: Sequence[bytes]) -> NDArray[np.int32]:
    if not texts:
        return np.empty(0, np.int32)
    if encoder is not None:
        # A student token with bytes that the teacher cannot spell follows nothing: no text of the teacher has it.
        return encoder.first_of_fragments(texts)
    longest = int(vocabulary.byte_lengths.max())
    known = vocabulary.ids
    return np.array(
        [
            next((known[text[:stop]] for stop in range(min(len(text), longest), 0, -1) if text[:stop] in known), -1)
            for text in texts
        ],
        dtype=np.int32,
    )


def _in_order(vocabulary: Vocabulary) -> tuple[list[bytes], NDArray[np.int32]]:
    order = sorted((token, index) for index, token in enumerate(vocabulary.tokens) if token)
    return [token for token, _ in order], np.array([index for _, index in order], dtype=np.int32)


def range_of(tokens: list[bytes], prefix: bytes) -> tuple[int, int]:
    """(first, stop) of those that start with `prefix`; `tokens` are sorted."""
    first = bisect_left(tokens, prefix)
    return first, bisect_right(tokens, prefix, lo=first, key=lambda token: token[: len(prefix)])


def _offsets(rows: Sequence[NDArray[np.int32]]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)


def _cache_directory() -> Path:
    explicit = os.environ.get("LLADA_DRAFTER_CACHE")
    base = (
        Path(explicit) if explicit else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llada-drafter"
    )
    return base / "alignment"


def _load(file: Path) -> dict[str, Any] | None:
    try:
        with np.load(file, allow_pickle=False) as archive:
            return dict(archive)
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged cache is no reason to stop: the tables are computed again
        _logger.warning("the cached vocabulary tables %s cannot be read (%s); computing them again", file, error)
        return None


def _save(file: Path, arrays: dict[str, Any]) -> None:
    partial = file.with_name(f"{file.stem}.{os.getpid()}.partial.npz")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(partial, **arrays)
        partial.replace(file)
    except OSError as error:
        _logger.warning("cannot cache the vocabulary tables in %s (%s); the next run computes them again", file, error)
