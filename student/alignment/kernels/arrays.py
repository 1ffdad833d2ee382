"""What the kernels take and give: named tuples of arrays. The legend is the package's."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Ids = NDArray[np.int32]
Floats = NDArray[np.float64]
Bytes = NDArray[np.uint8]
Flags = NDArray[np.bool_]


class Csr(NamedTuple):
    """Rows of ids: row n is `values[offsets[n] : offsets[n + 1]]`."""

    offsets: Ints
    values: Ids


class TeacherTokens(NamedTuple):
    """Bytes of the teacher's tokens: blob, offsets [V_T + 1], text tokens in order of bytes, length of the longest."""

    blob: Bytes
    offsets: Ints
    in_order: Ints
    longest: int


class Rows(NamedTuple):
    """The teacher's rows as probabilities, the observed token always among the candidates where its own is known.

    Attributes:
        offsets: [T + 1]; ids, mass: [N].
        tail: [T], what the candidates leave of 1.
        usable: [T], False where the tail is unknown or does not fit the candidates.
        contradicts: [T], the observed token's logprob is not what the row says of it, or, outside the top k, more
            than the tail holds: it belongs to another row. It is not added, and `observed` is NaN.
        observed: [T], the observed token's logprob, NaN where unknown; place: [T], its candidate, or -1.
        least: [T], the smallest stored probability, which no token outside the row exceeds.
    """

    offsets: Ints
    ids: Ids
    mass: Floats
    tail: Floats
    usable: Flags
    contradicts: Flags
    observed: Floats
    place: Ints
    least: Floats


class Candidates(NamedTuple):
    """Candidates over the text.

    Attributes:
        matches: [N], leading bytes that are the text's, from the row's start to the end of its run of text.
        reach: [T], end of the longest match of a candidate that starts with the observed token and is longer, or -1.
        context_of: [N], row of `in_context` with the candidate's tokenization; -1 if it is that of `alone`.
        in_context: tokenizations from a student token on that starts before the candidate does.
        alone: tokenization of every teacher token [V_T].
    """

    matches: Ids
    reach: Ints
    context_of: Ids
    in_context: Csr
    alone: Csr


class Inside(NamedTuple):
    """Positions inside a teacher token: the candidates that are still possible there.

    Attributes:
        offsets: [S + 1], into `found` (candidates) and `following` (the student token next in their tokenization, -1
            if they are not tokenized like the text).
        kept: [S], their mass; scale: [S], one over it and the tail's expected share; known: [S], the share of `kept`.
    """

    offsets: Ints
    found: Ints
    following: Ids
    kept: Floats
    scale: Floats
    known: Floats


class Heads(NamedTuple):
    """What a position where a teacher token starts needs of the vocabulary pair.

    Attributes:
        of_teacher: [V_T, 4], one cache line for each v: the first token of its tokenization (-1 without one), the
            teacher token in whose list of extensions that is (-1 if in none), first and stop of v's own list, which
            a special has none of.
        owners: [V_S], the teacher token in whose list s is, -1 if in none.
        extensions: the lists, one after the other.
    """

    of_teacher: Ids
    owners: Ids
    extensions: Ids


class Scratch(NamedTuple):
    """Kept between calls. `seen` [V_S], `met` [V_T]: the round in which a student token, or a candidate, was last met,
    and the place of its candidate, in one number. `round` [1] counts positions."""

    seen: Ints
    met: Ints
    round: Ints


class Events(NamedTuple):
    """Events of every position: counts [S], mass and member counts of each event, members, tail and known mass [S],
    and how often the observed pair was not related."""

    counts: Ids
    mass: Floats
    member_counts: Ids
    members: Ids
    tail: Floats
    known: Floats
    disagreements: int
