"""What the kernels take and give: named tuples of arrays. The legend is the package's."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from student.alignment.tables import Csr

Ints = NDArray[np.int64]
Ids = NDArray[np.int32]
Floats = NDArray[np.float64]
Bytes = NDArray[np.uint8]
Flags = NDArray[np.bool_]


class TeacherTokens(NamedTuple):
    """Bytes of the teacher's tokens: blob, offsets [V_T + 1], length of the longest; the number of text tokens."""

    blob: Bytes
    offsets: Ints
    longest: int
    texts: int


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


class Scratch(NamedTuple):
    """Kept between calls. `met_by` [V_S]: at the position in work, the first candidate that a student token was met
    with, -1 where it was not. `related` [V_S]: the student tokens met there, in that order."""

    met_by: Ids
    related: Ids
