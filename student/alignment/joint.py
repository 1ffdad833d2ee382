"""Which student tokens a text can have next, given the teacher tokens that it starts with, whatever follows them.

A byte-pair encoding gives exactly those sequences in which every two neighbours are what it makes of their bytes: a
merge across a boundary happens by the two tokens at it, or not at all. So the texts of a tokenizer are the chains of
such pairs, and a text of two tokenizers is a walk along two chains at once: the side that is behind takes its next
token, until both end at the same byte. What can follow depends on who is ahead, by which bytes, and on the last token
of each side; these states are searched depth first, and remembered.

At a place where more than `width` tokens would have to be asked about, the walk is taken to succeed. That can relate
too much, which makes events coarser; it never relates too little, which would make them wrong. The answers are
functions of the two tokenizers and `width` alone. Between vocabularies of 128k tokens the first answer for a teacher
token costs 10 to 100 ms of tokenizers' time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from shared.vocabulary import Encoder, Vocabulary
from student.alignment.tables import PairTables, range_of

START = -1
"""In place of a previous token: the text starts here."""

_SYMBOL = "§".encode()
"""Punctuation that hardly any vocabulary merges with what follows."""
_PAIRED_TOKENS = 256
_REMEMBERED_STATES = 1 << 20
_REMEMBERED_ANSWERS = 1 << 17

State = tuple[bool, int, int, bytes]
"""The student is ahead, the last token of the teacher and of the student, the bytes ahead."""


class Chain:
    """The canonical sequences of one tokenizer, as pairs of neighbours.

    Args:
        order: bytes and ids of its text tokens, in order of bytes.
    """

    def __init__(self, vocabulary: Vocabulary, encoder: Encoder, order: tuple[list[bytes], NDArray[np.int32]]) -> None:
        self.vocabulary, self.encoder = vocabulary, encoder
        self._tokens, self._ids = order
        # 0 unknown, 1 a pair, 2 none; for the tokens that were asked about last, a byte per token of the vocabulary.
        self._pairs: OrderedDict[int, NDArray[np.uint8]] = OrderedDict()
        self._symbol_tokens = len(encoder.encode_fragments([_SYMBOL], partial=True)[0])

    def agreeing(self, ahead: bytes) -> NDArray[np.int32]:
        """int32, the tokens that start with `ahead`, and those that it starts with."""
        found = []
        for length in range(1, len(ahead)):
            at = bisect_left(self._tokens, ahead[:length])
            while at < len(self._tokens) and self._tokens[at] == ahead[:length]:
                found.append(self._ids[at])
                at += 1
        first, stop = range_of(self._tokens, ahead)
        return np.concatenate([np.array(found, dtype=np.int32), self._ids[first:stop]])

    def followers(self, previous: int, ahead: bytes, width: int | None = None) -> list[int] | None:
        """The tokens of `agreeing(ahead)` that can stand after the token `previous`, or first after `START`.

        None if there are more than `width` to ask about.
        """
        options = self.agreeing(ahead)
        if width is not None and len(options) > width:
            return None
        known = self._pairs.get(previous)
        if known is None:
            known = self._pairs[previous] = np.zeros(len(self.vocabulary), np.uint8)
            if len(self._pairs) > _PAIRED_TOKENS:
                self._pairs.popitem(last=False)
        self._pairs.move_to_end(previous)
        new = options[known[options] == 0]
        known[new] = 2
        known[self.pairs(previous, new.tolist())] = 1
        return options[known[options] == 1].tolist()

    def pairs(self, previous: int, following: list[int]) -> list[int]:
        """Those of `following` that can stand after the token `previous`, or first after `START`."""
        found = self._pairs_in(previous, following, b"", b"")
        met = set(found)
        others = [t for t in following if t not in met]
        for left, right, tried in self._other_contexts(previous, others):
            found += self._pairs_in(previous, tried, left, right)
        return found

    def _pairs_in(self, previous: int, following: list[int], left: bytes, right: bytes) -> list[int]:
        """Those of `following` that are tokens after `previous` between the texts `left` and `right`."""
        if not following:
            return []
        tokens = self.vocabulary.tokens
        pair = [] if previous == START else [previous]
        before = left + b"".join(tokens[t] for t in pair)
        spelled = self.encoder.spell_fragments([before + tokens[t] + right for t in following], partial=True)
        at = self._symbol_tokens if left else 0
        stop = at + len(pair) + 1
        return [t for t, ids in zip(following, spelled, strict=True) if ids[at:stop] == [*pair, t]]

    def _other_contexts(self, previous: int, following: list[int]) -> Iterator[tuple[bytes, bytes, list[int]]]:
        """Contexts in which patterns that split text before merging may cut where they did not without: they look at
        what a space is followed by, and take punctuation together with what follows unless more stands before it."""
        ends = [t for t in following if _characters(self.vocabulary.tokens[t])[-1:].isspace()]
        for right in (b"x", b"0", _SYMBOL):
            yield b"", right, ends
        if previous != START and _is_symbol(_characters(self.vocabulary.tokens[previous])[:1]):
            letters = [t for t in following if _characters(self.vocabulary.tokens[t])[:1].isalpha()]
            yield _SYMBOL, b"", letters


class JointSearch:
    """Answers for one pair of vocabularies, remembered within bounds.

    Args:
        width: most tokens that are asked about at one place of a walk.
    """

    def __init__(self, tables: PairTables, width: int) -> None:
        assert tables.teacher_encoder is not None
        self.width = width
        self.teacher = Chain(tables.teacher, tables.teacher_encoder, tables.sorted_teacher)
        self.student = Chain(tables.student, tables.student_encoder, tables.sorted_student)
        self.next_tokens = lru_cache(_REMEMBERED_ANSWERS)(self._next_tokens)
        self._possible: dict[State, bool] = {}

    def _next_tokens(self, known: bytes, teacher_id: int, previous: int) -> tuple[int, ...]:
        """Student tokens that can stand after `previous` in a text that goes on with `known`, where the last teacher
        token of `known` is `teacher_id` and ends where `known` does. Rising; `known` is not empty."""
        options = self.student.followers(previous, known) or ()
        return tuple(sorted(s for s in options if self.is_possible(known, teacher_id, s)))

    def is_possible(self, known: bytes, teacher_id: int, student_id: int) -> bool:
        """Whether one of `next_tokens(known, teacher_id, …)` is `student_id`, if it can stand after what is before."""
        token = self.student.vocabulary.tokens[student_id]
        if len(token) > len(known):
            return token.startswith(known) and self._meets((True, teacher_id, student_id, token[len(known) :]))
        return known.startswith(token) and self._meets((False, teacher_id, student_id, known[len(token) :]))

    def _meets(self, start: State) -> bool:
        """Whether a walk from `start` can reach a byte at which both sides end."""
        if not start[3]:
            return True
        if start in self._possible:
            return self._possible[start]
        if len(self._possible) > _REMEMBERED_STATES:
            self._possible.clear()
        came_from: dict[State, State | None] = {start: None}
        waiting = [start]
        while waiting:
            state = waiting.pop()
            following = self._following(state)
            if following is None or any(self._possible.get(next_state) for next_state in following):
                step: State | None = state
                while step is not None:
                    self._possible[step] = True
                    step = came_from[step]
                return True
            for next_state in following:
                if next_state not in came_from and next_state not in self._possible:
                    came_from[next_state] = state
                    waiting.append(next_state)
        # All that could be reached was seen, so none of it ever meets.
        self._possible.update(dict.fromkeys(came_from, False))
        return False

    def _following(self, state: State) -> list[State] | None:
        """The states after one more token of the side that is behind; None if it can end where the other does, or is
        taken to."""
        student_ahead, teacher_last, student_last, ahead = state
        behind, last = (self.teacher, teacher_last) if student_ahead else (self.student, student_last)
        tokens = behind.followers(last, ahead, self.width)
        if tokens is None:
            return None
        states = []
        for t in tokens:
            token = behind.vocabulary.tokens[t]
            lasts = (t, student_last) if student_ahead else (teacher_last, t)
            if len(token) == len(ahead):
                return None
            if len(token) < len(ahead):
                states.append((student_ahead, *lasts, ahead[len(token) :]))
            else:
                states.append((not student_ahead, *lasts, token[len(ahead) :]))
        return states


def _characters(token: bytes) -> str:
    return token.decode("utf-8", "ignore")


def _is_symbol(text: str) -> bool:
    return bool(text) and not (text.isalnum() or text.isspace())
