"""What two vocabularies say about each other, computed once per pair and kept on disk.

For teacher tokens v and student tokens s, with T(·) and S(·) the tokenizers' own (canonical) encodings:

* `tokenization(v)` = S(bytes of v).
* `first_teacher[s]` = first token of T(bytes of s), called g(s).
* `extensions(v)` = {s : g(s) = v}, the student tokens that a text starting with v may start with, if they reach at
  least as far as v. Every s is in at most one such list, so all lists together hold at most |V_S| entries.

Special tokens correspond by role and have no bytes. Under equal tokenizers all of this is the identity.

A pair of 128k vocabularies takes a few seconds; the result is cached under the user's cache directory (or
`LLADA_DRAFTER_CACHE`) by the fingerprints of both vocabularies and both encoders. What depends on the text around a
token is asked when it is met, and the last answers are remembered.
"""

from __future__ import annotations

import hashlib
import logging
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.dataset.records import offsets_of
from shared.files import new_file
from shared.tokenizer.vocabulary import Encoder, Vocabulary

_VERSION = 3
_REMEMBERED = 1 << 17
"""Answers of one kind that are kept, of about 300 bytes each."""
_logger = logging.getLogger(__name__)


class GreedyEncoder:
    """In place of a teacher's tokenizer that is not known: always the longest token that the text starts with."""

    fingerprint = "greedy"

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._known, self._longest = vocabulary.ids, int(vocabulary.byte_lengths.max(initial=1))

    def encode_fragments(self, texts: Sequence[bytes], *, partial: bool = True) -> list[list[int]]:  # noqa: ARG002
        """The ids of every text, up to the first byte that no token starts with."""
        return [list(self._encode(text)) for text in texts]

    def _encode(self, text: bytes) -> Iterable[int]:
        while text:
            stops = range(min(len(text), self._longest), 0, -1)
            stop = next((stop for stop in stops if text[:stop] in self._known), None)
            if stop is None:
                return
            yield self._known[text[:stop]]
            text = text[stop:]


@dataclass(eq=False)
class PairTables:
    """Tables of one (teacher, student) pair; rows are CSR.

    Attributes:
        same_tokenizer: both tokenizers are the same.
        tokenization_offsets, tokenization_ids: int64 [V_T + 1] and int32, S(bytes of v); of a special its counterpart.
        first_teacher: int32 [V_S], g(s); -1 for specials without a counterpart.
        extension_offsets, extension_ids: int64 [V_T + 1] and int32, {s : g(s) = v}, rising.
    """

    teacher: Vocabulary
    student: Vocabulary
    student_encoder: Encoder
    teacher_encoder: Encoder | GreedyEncoder
    same_tokenizer: bool
    tokenization_offsets: NDArray[np.int64]
    tokenization_ids: NDArray[np.int32]
    first_teacher: NDArray[np.int32]
    extension_offsets: NDArray[np.int64]
    extension_ids: NDArray[np.int32]

    def __post_init__(self) -> None:
        self.tokenization_after = lru_cache(_REMEMBERED)(self._tokenization_after)
        self.extensions_after = lru_cache(_REMEMBERED)(self._extensions_after)
        self.continuations = lru_cache(_REMEMBERED)(self._continuations)

    def tokenization(self, teacher_id: int) -> NDArray[np.int32]:
        """S(bytes of v); of a special its counterpart, or nothing."""
        return self.tokenization_ids[self.tokenization_offsets[teacher_id] : self.tokenization_offsets[teacher_id + 1]]

    def _tokenization_after(self, before: bytes, teacher_id: int) -> NDArray[np.int32]:
        """S(before + bytes of v), for a student token that starts before the teacher's token does."""
        (ids,) = self.student_encoder.encode_fragments([before + self.teacher.tokens[teacher_id]])
        return np.array(ids, dtype=np.int32)

    def _extensions_after(self, fixed: int, teacher_id: int) -> NDArray[np.int32]:
        """{s : s starts with v's bytes after the first `fixed`, and T(these bytes + s) starts with v}, rising."""
        if not fixed:
            return self.extension_ids[self.extension_offsets[teacher_id] : self.extension_offsets[teacher_id + 1]]
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

    @cached_property
    def sorted_student(self) -> tuple[list[bytes], NDArray[np.int32]]:
        """Bytes and ids of the student's text tokens in order of bytes."""
        return _in_order(self.student)

    @cached_property
    def sorted_teacher(self) -> tuple[list[bytes], NDArray[np.int32]]:
        """Bytes and ids of the teacher's text tokens in order of bytes."""
        return _in_order(self.teacher)


def pair_tables(
    teacher: Vocabulary,
    student: Vocabulary,
    student_encoder: Encoder,
    teacher_encoder: Encoder | None,
    cache: Path | None = None,
) -> PairTables:
    """The tables of a pair, from the cache if they are there.

    Args:
        teacher_encoder: without it T is taken as greedy, which merges of BPE mostly are; give it wherever it is known.
        cache: directory of the cache; None takes the user's.

    Raises:
        VocabularyError: if one tokenizer has no tokens for bytes of the other.
    """
    encoder = teacher_encoder or GreedyEncoder(teacher)
    parts = [teacher.fingerprint, encoder.fingerprint, repr(teacher.roles)]
    parts += [student.fingerprint, student_encoder.fingerprint, repr(student.roles), str(_VERSION)]
    file = (cache or _cache_directory()) / f"{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:32]}.npz"
    same_tokenizer = teacher.fingerprint == student.fingerprint and (
        teacher_encoder is None or teacher_encoder.fingerprint == student_encoder.fingerprint
    )
    arrays: dict[str, Any] | None = _load(file)
    if arrays is None:
        arrays = _identity(teacher) if same_tokenizer else _build(teacher, student, student_encoder, encoder)
        _save(file, arrays)
    return PairTables(teacher, student, student_encoder, encoder, same_tokenizer, **arrays)


def special_counterparts(teacher: Vocabulary, student: Vocabulary) -> NDArray[np.int32]:
    """int32 [V_T], the student's special of the same role, -1 elsewhere; never by id or name."""
    counterparts = np.full(len(teacher), -1, dtype=np.int32)
    for index, role in teacher.role_of.items():
        counterparts[index] = student.roles.get(role, -1)
    return counterparts


def _identity(vocabulary: Vocabulary) -> dict[str, Any]:
    ids, offsets = np.arange(len(vocabulary), dtype=np.int32), np.arange(len(vocabulary) + 1, dtype=np.int64)
    return _arrays(offsets, ids, ids, offsets, ids)


def _build(
    teacher: Vocabulary, student: Vocabulary, student_encoder: Encoder, teacher_encoder: Encoder | GreedyEncoder
) -> dict[str, Any]:
    special_of = special_counterparts(teacher, student)
    mapped = np.flatnonzero(special_of >= 0)
    tokenizations: list[Sequence[int]] = [()] * len(teacher)
    text_ids = np.flatnonzero(~teacher.is_special)
    encoded = student_encoder.encode_fragments([teacher.tokens[v] for v in text_ids])
    for v, ids in zip(text_ids, encoded, strict=True):
        tokenizations[v] = ids
    for v in mapped:
        tokenizations[v] = (special_of[v],)
    first_teacher = np.full(len(student), -1, dtype=np.int32)
    text_ids = np.flatnonzero(~student.is_special)
    # A student token with bytes that the teacher has no tokens for follows nothing: no text of the teacher has it.
    encoded = teacher_encoder.encode_fragments([student.tokens[s] for s in text_ids], partial=True)
    first_teacher[text_ids] = [ids[0] if ids else -1 for ids in encoded]
    by_teacher = np.argsort(first_teacher, kind="stable").astype(np.int32)
    by_teacher = by_teacher[first_teacher[by_teacher] >= 0]
    counts = np.bincount(first_teacher[by_teacher], minlength=len(teacher))
    # Several specials of the teacher may share one counterpart, so these lists hold it in each.
    extensions = np.split(by_teacher, np.cumsum(counts)[:-1])
    for v in mapped:
        extensions[v] = special_of[v : v + 1]
        first_teacher[special_of[v]] = v
    return _arrays(
        offsets_of([len(row) for row in tokenizations]),
        np.fromiter(chain.from_iterable(tokenizations), np.int32),
        first_teacher,
        offsets_of([len(row) for row in extensions]),
        np.concatenate(extensions).astype(np.int32),
    )


def _arrays(*arrays: NDArray[Any]) -> dict[str, Any]:
    names = ("tokenization_offsets", "tokenization_ids", "first_teacher", "extension_offsets", "extension_ids")
    return dict(zip(names, arrays, strict=True))


def _in_order(vocabulary: Vocabulary) -> tuple[list[bytes], NDArray[np.int32]]:
    order = sorted((token, index) for index, token in enumerate(vocabulary.tokens) if token)
    return [token for token, _ in order], np.array([index for _, index in order], dtype=np.int32)


def range_of(tokens: list[bytes], prefix: bytes) -> tuple[int, int]:
    """(first, stop) of those that start with `prefix`; `tokens` are sorted."""
    first = bisect_left(tokens, prefix)
    return first, bisect_right(tokens, prefix, lo=first, key=lambda token: token[: len(prefix)])


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
    try:
        with new_file(file) as partial:
            np.savez(partial, **arrays)
    except OSError as error:
        _logger.warning("cannot cache the vocabulary tables in %s (%s); the next run computes them again", file, error)
