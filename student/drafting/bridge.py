"""The byte bridge: the teacher's context as student tokens, the student's draft as teacher tokens.

Both vocabularies spell the same bytes. The context's text is re-encoded by the student's own tokenization and its
special tokens go over by role. A draft's bytes are encoded by the teacher's own tokenization *in context*: with
the text before them, so that merges and digit groups fall where the teacher's would.

What it costs: a step re-encodes only the text after the last *stable boundary*, some ten bytes of ordinary
text, whatever the length of the context. A boundary is a place where no token of either vocabulary reaches
across and neither splits text otherwise: a letter before, a splitting character (a space, most punctuation)
after. Which characters split is found in the vocabularies, not assumed: a character is out if any token has it
after a letter. Where a script has no such places the run is re-encoded whole, which is slower and as exact.

Equal tokenizers are the special case in which ids go over as they are, in both directions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shared.errors import VocabularyError
from shared.tokenizer.vocabulary import Encoder, Vocabulary
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
        stable: how many of `student_ids` no later text can change.
        open_bytes: text after the last stable boundary, or after the last special token.
    """

    teacher_ids: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    student_ids: list[int] = field(default_factory=list)
    stable: int = 0
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
        self.identity = (
            teacher.fingerprint == student.fingerprint and teacher_encoder.fingerprint == student_encoder.fingerprint
        )
        self._encode_teacher, self._encode_student = teacher_encoder.encode, student_encoder.encode
        counterparts = special_counterparts(teacher, student)
        self._student_special = {int(index): int(counterparts[index]) for index in np.flatnonzero(counterparts >= 0)}
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

    def translate(self, teacher_ids: ArrayLike) -> BridgedContext:
        """The whole context at once; `extend` in any number of steps comes to the same."""
        return self.extend(BridgedContext(), teacher_ids)

    def extend(self, context: BridgedContext, new_teacher_ids: ArrayLike) -> BridgedContext:
        """Append tokens to `context`, in place; returns it.

        Raises:
            VocabularyError: if an id is outside the teacher's vocabulary.
        """
        new = np.asarray(new_teacher_ids, dtype=np.int64)
        if new.size and (new.min() < 0 or new.max() >= len(self.teacher)):
            raise VocabularyError(
                f"token id {new.max() if new.min() >= 0 else new.min()} is outside the teacher's vocabulary of "
                f"{len(self.teacher)}: the drafter was given another teacher's tokens"
            )
        context.teacher_ids = np.concatenate((context.teacher_ids, new))
        if self.identity:
            context.student_ids.extend(new.tolist())
            context.stable = len(context.student_ids)
            return context
        del context.student_ids[context.stable :]
        start = 0
        for stop in [*np.flatnonzero(self.teacher.is_special[new]), len(new)]:
            context.open_bytes += b"".join([self.teacher.tokens[index] for index in new[start:stop]])
            if stop < len(new):
                self._close(context, int(new[stop]))
            start = stop + 1
        self._settle(context)
        return context

    def _close(self, context: BridgedContext, special: int) -> None:
        """End the open text at a special token, which goes over by role, or not at all if the student has no such."""
        context.student_ids.extend(self._encode_student(context.open_bytes).tolist())
        if special in self._student_special:
            context.student_ids.append(self._student_special[special])
        context.stable, context.open_bytes = len(context.student_ids), b""

    def _settle(self, context: BridgedContext) -> None:
        """Encode the open text and move the stable boundary as far as it goes."""
        tail = self._encode_student(context.open_bytes)
        context.student_ids.extend(tail.tolist())
        cut = self._last_boundary(context.open_bytes)
        if cut:
            ends = self.student.byte_ends(tail)
            tokens = int(np.searchsorted(ends, cut, side="right"))
            assert ends[tokens - 1] == cut, "a token reaches across a stable boundary"
            context.stable += tokens
            context.open_bytes = context.open_bytes[cut:]

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
        if self.identity:
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
    order = sorted(range(len(vocabulary)), key=vocabulary.tokens.__getitem__)
    extendable = np.zeros(len(vocabulary), dtype=np.bool_)
    # In order of bytes, a token's extensions follow it; equal tokens stand between.
    following = b""
    for index, after in zip(reversed(order), [None, *reversed(order)], strict=False):
        token = vocabulary.tokens[index]
        if after is not None and vocabulary.tokens[after] != token:
            following = vocabulary.tokens[after]
        extendable[index] = bool(token) and len(following) > len(token) and following.startswith(token)
    return extendable


def _whole_characters(text: bytes) -> int:
    """Length of the longest prefix of `text` that is whole UTF-8 characters."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return error.start
    return len(text)
