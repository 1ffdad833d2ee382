"""Acceptance as serving would see it, from stored responses alone.

Nothing is decoded: a stored response is what the teacher said, so a drafted token counts as accepted where it is the
stored one. On greedy text this is what greedy speculative decoding does, draft for draft. On text sampled at T = 1 its
expectation is that of one-hot verification, which accepts x with probability p(x). The contexts are those of serving:
after n accepted tokens the teacher adds one of its own, so that the next draft starts n + 1 tokens later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.dataset.records import Record
from student.drafting import confidence
from student.drafting.propose import Drafter
from student.drafting.steps import Step
from student.drafting.tokens import leading_matches


@dataclass(frozen=True, slots=True)
class OfflineAcceptance:
    """What came of N drafts.

    Attributes:
        skills_N: of each draft's prompt.
        proposed_N, accepted_N: tokens of each draft, which may be empty, and those of them that were accepted.
        draft_tokens: tokens drafted at most.
        by_confidence: [2, bins] tokens verified and accepted, by the drafter's confidence in them (`confidence.count`).
    """

    skills_N: NDArray[np.str_]
    proposed_N: NDArray[np.int64]
    accepted_N: NDArray[np.int64]
    draft_tokens: int
    by_confidence: NDArray[np.int64]

    @classmethod
    def merged(cls, parts: Sequence[OfflineAcceptance]) -> OfflineAcceptance:
        """Of responses that were drafted along in parts."""
        skills_N, proposed_N, accepted_N = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("skills_N", "proposed_N", "accepted_N")
        )
        counts = np.sum([part.by_confidence for part in parts], axis=0)
        return cls(skills_N, proposed_N, accepted_N, parts[0].draft_tokens, counts)

    @property
    def drafts(self) -> int:
        return len(self.accepted_N)

    @property
    def mean_accepted(self) -> float:
        """Accepted tokens per draft; the acceptance length tau is this plus the teacher's own token."""
        return float(self.accepted_N.sum()) / max(self.drafts, 1)

    @property
    def acceptance_length(self) -> float:
        """1 + accepted tokens per draft that is not empty: what vLLM counts, which sees no empty draft."""
        return 1 + float(self.accepted_N.sum()) / max(int((self.proposed_N > 0).sum()), 1)

    def by_depth(self) -> list[float]:
        """Share of drafts whose first d tokens were accepted, d = 1 …"""
        depths = range(1, self.draft_tokens + 1)
        return [float((self.accepted_N >= depth).sum()) / max(self.drafts, 1) for depth in depths]

    def chances(self) -> list[dict[str, Any]]:
        """Of each bin of confidence: where it starts, the tokens verified, and the share accepted, null for none."""
        starts = [0.0, *confidence.EDGES.tolist()]
        return [
            {"from": start, "tokens": int(verified), "accepted": float(accepted / verified) if verified else None}
            for start, verified, accepted in zip(starts, *self.by_confidence, strict=True)
        ]

    def by_skill(self) -> dict[str, float]:
        """Acceptance length of each skill."""
        skills = np.unique(self.skills_N).tolist()
        return {skill: 1 + float(self.accepted_N[self.skills_N == skill].mean()) for skill in skills}


def draft_along(
    drafter: Drafter, records: Sequence[Record], batch: int, advance: Callable[[int], None] = lambda _: None
) -> OfflineAcceptance:
    """Draft along `records`, `batch` at a time. The first response token is the teacher's own, as in serving.

    Args:
        advance: is told how many responses have been drafted along since the last call.
    """
    skills, proposed, accepted = [], [], []
    by_confidence = np.zeros((2, confidence.BINS), np.int64)
    for start in range(0, len(records), batch):
        group = records[start : start + batch]
        for record, _, draft, matches in _drafts(drafter, group):
            skills.append(record.skill)
            proposed.append(len(draft))
            accepted.append(matches)
            sure = np.array([drafter.confidence.get(record.sample_id, [])])
            by_confidence += confidence.count(sure, np.array([matches]))
        advance(len(group))
    return OfflineAcceptance(
        np.array(skills, np.str_),
        np.array(proposed, np.int64),
        np.array(accepted, np.int64),
        drafter.draft_tokens,
        by_confidence,
    )


def steps_along(drafter: Drafter, record: Record) -> list[Step]:
    """The steps in which the teacher would have said this response. The first token is its own."""
    said = record.response_ids
    steps = [Step.of([], said[:1])]
    for _, start, draft, matches in _drafts(drafter, [record]):
        stop = start + matches + 1
        steps.append(Step.of(draft, said[start:stop], ended=stop >= len(said)))
    return steps


def _drafts(drafter: Drafter, records: Sequence[Record]) -> Iterator[tuple[Record, int, list[int], int]]:
    """Every draft along `records`, which advance together: whose it is, where it starts in the response, its tokens,
    and how many of them are accepted."""
    by_id = {record.sample_id: record for record in records}
    position = dict.fromkeys(by_id, 1)
    while active := [i for i in position if position[i] < len(by_id[i].response_ids)]:
        contexts = [np.concatenate([by_id[i].prompt_ids, by_id[i].response_ids[: position[i]]]) for i in active]
        for sample_id, draft in zip(active, drafter.propose(active, contexts), strict=True):
            record, start = by_id[sample_id], position[sample_id]
            matches = leading_matches(draft, record.response_ids[start:])
            position[sample_id] += matches + 1
            yield record, start, draft, matches
    drafter.release(list(position))
