"""The byte bridge: the teacher's context as student tokens, the student's draft as teacher tokens.

Both vocabularies are made of bytes. The context's text is encoded by the student's tokenizer; special tokens go over by
role. A draft's bytes are encoded by the teacher's tokenizer together with the text before them, so that merges and
groups of digits fall where the teacher's would.

Cost: a step encodes only the text after the last *stable boundary*, some ten bytes of ordinary text, however long the
context is. A stable boundary is a place where no token of either vocabulary reaches across and later text changes no
token before it: a letter, then a splitting character (a space, most punctuation). Which characters split is found in
the vocabularies: a character is out if any token has it after a letter. In scripts without such places all text since
the last special token is encoded again, which is slower and gives the same ids.

Equal tokenizers are the special case in which ids go over as they are, in both directions.

Related: a draft that crosses between vocabularies as text and is verified by exact match is string-level exact match
(Timor et al., arXiv:2502.05202); transformers has it as universal assisted generation. That one encodes a window of the
last tokens again in each step and goes on where old and new ids match longest. Here byte positions say where to go on,
so that the ids equal those of encoding the whole text, and a last token that further text could change is withheld.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shared.errors import VocabularyError
from shared.tokenizer.vocabulary import Encoder, Vocabulary, first_difference
from student.alignment.tables import special_counterparts

# No apostrophes: contractions (`I'll`) are tokens that start with one, and split unlike other punctuation.
_SPLITTER_CANDIDATES = ' \t\r\n.,;:!?()[]{}<>"/*=，。、；：！？（）「」'
_LETTER = r"[^\W\d_]"
# Bytes that are no whole character, as `surrogateescape` shows them: they may be part of a letter.
_LETTER_OR_PART = r"(?:[^\W\d_]|[\udc80-\udcff])"


@dataclass(slots=True)
class BridgedContext:
    """One request's context in both vocabularies; made and extended by `ByteBridge`.

    Attributes:
        teacher_ids: what has been bridged so far.
        student_ids: the same text; a later `extend` may change what lies beyond the last stable boundary.
        stable: how many tokens of `student_ids` no later text can change.
        unchanged: how many tokens of `student_ids` the last `extend` left as they were.
        open_bytes: text after the last stable boundary, or after the last special token.
    """

    teacher_ids: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    student_ids: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    stable: int = 0
    unchanged: int = 0
    open_bytes: bytes = b""


class ByteBridge:
    """Teacher ids ↔ student ids of the same bytes.

    Raises:
        VocabularyError: if the vocabularies share no way to end a turn.
    """

    def __init__(
        self, teacher: Vocabulary, teacher_encoder: Encoder, student: Vocabulary, student_encoder: Encoder
    ) -> None:
        self.teacher, self.student = teacher, student
        self.same_tokenizer = (
            teacher.fingerprint == student.fingerprint and teacher_encoder.fingerprint == student_encoder.fingerprint
        )
        self._encode_teacher, self._encode_student = teacher_encoder.encode, student_encoder.encode
        self._counterparts = special_counterparts(teacher, student)
        self._teacher_end = {
            index: teacher.roles[role]
            for index, role in student.role_of.items()
            if role in ("end_of_turn", "end_of_text") and role in teacher.roles
        }
        if not self._teacher_end:
            raise VocabularyError(
                f"no token ends a turn or a text in both vocabularies: the teacher's roles are {teacher.roles}, the "
                f"student's {student.roles}; name the tokens in their tokenizer settings or chat templates"
            )
        self._boundary = _boundary_pattern(teacher, student)
        self._extendable = _extendable_tokens(teacher)

    @property
    def draftable_ids(self) -> NDArray[np.int64]:
        """Student ids that mean something to the teacher: text, and the ends of turn and text."""
        return np.flatnonzero(~self.student.is_special | np.isin(np.arange(len(self.student)), [*self._teacher_end]))

    # --- context: teacher → student ------------------------------------------------------------------------

    def extend(self, context: BridgedContext, new_teacher_ids: ArrayLike) -> BridgedContext:
        """Append tokens to `context`, in place; returns it. Any number of steps comes to the same.

        Raises:
            VocabularyError: if an id is outside the teacher's vocabulary.
        """
        new = np.asarray(new_teacher_ids, dtype=np.int64)
        if new.size and (new.min() < 0 or new.max() >= len(self.teacher)):
            raise VocabularyError(
                f"token id {new.max() if new.min() >= 0 else new.min()} is outside the teacher's vocabulary of "
                f"{len(self.teacher)}: the drafter was given another teacher's tokens"
            )
        first = context.stable
        ids, stable, text = self._student_tokens(context, new)
        context.unchanged = first + first_difference(context.student_ids[first:], ids)
        context.teacher_ids = np.concatenate((context.teacher_ids, new.astype(np.int32)))
        context.student_ids = np.concatenate((context.student_ids[:first], ids))
        context.stable, context.open_bytes = stable, text
        return context

    def _student_tokens(self, context: BridgedContext, new: NDArray[np.int64]) -> tuple[NDArray[np.int32], int, bytes]:
        """Student tokens from the stable boundary on; then the new boundary, and the text after it."""
        if self.same_tokenizer:
            return new.astype(np.int32), context.stable + len(new), b""
        parts: list[NDArray[np.int32]] = []
        text, done = context.open_bytes, 0
        for stop in [*np.flatnonzero(self.teacher.is_special[new]), len(new)]:
            text += b"".join([self.teacher.tokens[index] for index in new[done:stop]])
            if stop < len(new):
                # A special token ends the text; it goes over by role, or not at all if the student has no such role.
                counterpart = self._counterparts[new[stop : stop + 1]]
                parts += [self._encode_student(text), counterpart[counterpart >= 0]]
                text = b""
            done = stop + 1
        stable = context.stable + sum(map(len, parts))
        parts.append(tail := self._encode_student(text))
        if cut := self._last_boundary(text):
            ends = self.student.byte_ends(tail)
            tokens = int(np.searchsorted(ends, cut, side="right"))
            assert ends[tokens - 1] == cut, "a token reaches across a stable boundary"
            stable, text = stable + tokens, text[cut:]
        return np.concatenate(parts), stable, text

    def _last_boundary(self, text: bytes) -> int:
        """Bytes before the last stable boundary of `text`; 0 if there is none."""
        characters = text.decode("utf-8", "surrogateescape")
        match = self._boundary.match(characters)
        return len(characters[: match.end()].encode("utf-8", "surrogateescape")) if match else 0

    # --- draft: student → teacher --------------------------------------------------------------------------

    def to_teacher(self, context: BridgedContext, draft: ArrayLike, keep_extendable: bool = False) -> list[int]:
        """The teacher's tokens of a draft after `context`.

        The draft ends at its first special token; the end of a turn or text is proposed by role, any other is
        not. Withheld: bytes of an incomplete character, and a last token that further bytes could still merge
        into a longer one (unless `keep_extendable`).

        Args:
            draft: student ids, as drafted from `context.student_ids`.
        """
        ids = np.asarray(draft, dtype=np.int64)
        specials = np.flatnonzero(self.student.is_special[ids])
        end = self._teacher_end.get(int(ids[specials[0]])) if specials.size else None
        if specials.size:
            ids = ids[: specials[0]]
        if self.same_tokenizer:
            return [*ids.tolist(), *([] if end is None else [end])]
        text = context.open_bytes + self.student.decode(ids)
        whole = _whole_characters(text)
        cut_short = whole < len(text)
        tokens = self._teacher_tokens(context.open_bytes, text[len(context.open_bytes) : whole])
        if end is not None:
            # A turn does not end inside a character: such a draft contradicts itself.
            return tokens if cut_short else [*tokens, end]
        if tokens and self._extendable[tokens[-1]] and not keep_extendable:
            tokens.pop()
        return tokens

    def rests_on(self, draft: ArrayLike, proposed: list[int]) -> NDArray[np.int64]:
        """How many of the draft's first student tokens each token of its `to_teacher` needs, [len(proposed)]."""
        ids, own = np.asarray(draft, np.int64), np.asarray(proposed, np.int64)
        if self.same_tokenizer:
            return np.arange(1, len(own) + 1)
        text = int(np.append(np.flatnonzero(self.student.is_special[ids]), len(ids))[0])
        needed = np.searchsorted(self.student.byte_ends(ids[:text]), self.teacher.byte_ends(own)) + 1
        needed[self.teacher.is_special[own]] = text + 1
        return needed

    def _teacher_tokens(self, before: bytes, new: bytes) -> list[int]:
        """The teacher's tokens of `new` after the text `before`."""
        if not new:
            return []
        joined = self._encode_teacher(before + new)
        ends = self.teacher.byte_ends(joined)
        first = int(np.searchsorted(ends, len(before), side="right"))
        if before and (first == 0 or ends[first - 1] != len(before)):
            # The teacher's own tokenization would have gone over this place, but the teacher has stopped here:
            # whatever it says next starts a token here.
            joined, first = self._encode_teacher(new), 0
        tokens: list[int] = joined[first:].tolist()
        return tokens


def _boundary_pattern(*vocabularies: Vocabulary) -> re.Pattern[str]:
    """Matches up to the last letter that has a splitting character after it, as all of `vocabularies` split."""
    crossing = re.compile(f"{_LETTER_OR_PART}([{re.escape(_SPLITTER_CANDIDATES)}])")
    crossed = {
        match.group(1)
        for vocabulary in vocabularies
        for token in vocabulary.tokens
        if len(token) > 1
        for match in crossing.finditer(token.decode("utf-8", "surrogateescape"))
    }
    splitters = [character for character in _SPLITTER_CANDIDATES if character not in crossed]
    if not splitters:
        return re.compile(r"(?!)")
    return re.compile(f"(?s:.*){_LETTER}(?=[{re.escape(''.join(splitters))}])")


def _extendable_tokens(vocabulary: Vocabulary) -> NDArray[np.bool_]:
    """bool [V]: some longer token starts with this one's bytes."""
    # In order of bytes, a token's extensions follow it.
    in_order = sorted(set(vocabulary.tokens))
    following = dict(pairwise(in_order))
    return np.array([bool(token) and following.get(token, b"").startswith(token) for token in vocabulary.tokens])


def _whole_characters(text: bytes) -> int:
    """Length of the longest prefix of `text` that is whole UTF-8 characters."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return error.start
    return len(text)
