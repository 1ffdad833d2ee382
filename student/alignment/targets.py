"""What alignment makes of a record: the response in student tokens, with a sparse target at every position.

Legend: S response tokens of the student, T of the teacher, E events, M members. Rows are CSR. Positions are
0-based within the response; `input_ids[prompt_length + i]` is response token i.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class SparseTargets:
    """Event targets of S positions; `README.md` of this folder has their formulas.

    Position i has the events `event_offsets[i]:event_offsets[i + 1]`; event e has probability
    `event_mass[e]` and is the set of student tokens `members[member_offsets[e]:member_offsets[e + 1]]`.
    Events of a position are disjoint; what they leave is the tail event. `tail` is NaN, and there are no
    events, where a position has no soft target.

    Attributes:
        event_offsets: int64 [S + 1].
        event_mass: float32 [E]; with `tail` they sum to 1 at every soft position.
        member_offsets: int64 [E + 1].
        members: int32 [M], student token ids.
        tail: float32 [S], probability of all that is in no event.
        known: float32 [S], the known conditional mass m, before any threshold.
    """

    event_offsets: NDArray[np.int64]
    event_mass: NDArray[np.float32]
    member_offsets: NDArray[np.int64]
    members: NDArray[np.int32]
    tail: NDArray[np.float32]
    known: NDArray[np.float32]

    @classmethod
    def none(cls, count: int) -> SparseTargets:
        """`count` positions without a soft target."""
        unknown: NDArray[np.float32] = np.full(count, np.nan, np.float32)
        no_mass, no_members = np.empty(0, np.float32), np.empty(0, np.int32)
        return cls(np.zeros(count + 1, np.int64), no_mass, np.zeros(1, np.int64), no_members, unknown, unknown)


@dataclass(frozen=True, slots=True)
class Targets:
    """What the kernels compute: sparse targets, `observed_logprob` and `anchor_logprob` (float32 [S], as in
    `AlignedSample`), and what was met on the way."""

    sparse: SparseTargets
    observed_logprob: NDArray[np.float32]
    anchor_logprob: NDArray[np.float32]
    counts: Counter[str]


@dataclass(frozen=True, slots=True)
class AlignedSample:
    """One response over the student's vocabulary.

    Attributes:
        input_ids: int32 [P + S], the prompt re-tokenized (text encoded again, specials by role), then the response.
        prompt_length: P.
        byte_ends: int64 [S], end of each response token in the response's bytes; a special token has no bytes.
        is_anchor: bool [S], token i starts at a byte end common to both tokenizations: a block may start here.
        observed_logprob: float32 [S], log p(x_i | x_<i); NaN where unknown. A chain: it sums to the log probability
            of the whole response.
        anchor_logprob: float32 [S], log p(x_i) where the teacher's token is known to have ended before x_i, which is
            what the first position of a block knows; it differs from `observed_logprob` only after a token that the
            teacher could have made longer.
    """

    sample_id: str
    prompt_id: str
    split: str
    rule: str
    skill: str
    input_ids: NDArray[np.int32]
    prompt_length: int
    byte_ends: NDArray[np.int64]
    is_anchor: NDArray[np.bool_]
    observed_logprob: NDArray[np.float32]
    anchor_logprob: NDArray[np.float32]
    targets: SparseTargets
