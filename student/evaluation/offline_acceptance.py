"""Acceptance as serving would see it, from stored responses alone.

Nothing is decoded: a stored response is what the teacher said, so a drafted token counts as accepted where it is the
stored one. On greedy text this is what greedy speculative decoding does, draft for draft. On text sampled at T = 1 its
expectation is that of one-hot verification, which accepts x with probability p(x). The contexts are those of serving:
after n accepted tokens the teacher adds one of its own, so that the next draft starts n + 1 tokens later.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shared.dataset.records import Record
from student.drafting import confidence
from student.drafting.steps import Step
from student.drafting.tokens import leading_matches


class Proposer(Protocol):
    """What is needed of a drafter."""

    @property
    def confidence(self) -> Mapping[Hashable, list[float]]:
        """As `Drafter`'s; empty where it has none."""

    def propose(self, request_ids: Sequence[str], contexts: Sequence[np.ndarray]) -> list[list[int]]:
        """Up to k teacher tokens for each context of teacher tokens."""
        ...

    def release(self, request_ids: Sequence[str]) -> None:
        """Forget these requests."""
        ...


@dataclass(frozen=True, slots=True)
class OfflineAcceptance:
    """Accepted tokens of every draft, by response.

    Attributes:
        accepted: {sample id: accepted tokens of each of its drafts}.
        proposed: {sample id: drafted tokens of each}; a draft may be empty.
        skills: {sample id: skill}.
        draft_tokens: tokens drafted at most.
        by_confidence: [2, bins] tokens verified and accepted, by the drafter's confidence in them (`confidence.count`).
    """

    accepted: dict[str, list[int]]
    proposed: dict[str, list[int]]
    skills: dict[str, str]
    draft_tokens: int
    by_confidence: NDArray[np.int64]

    @classmethod
    def merged(cls, parts: Sequence[OfflineAcceptance]) -> OfflineAcceptance:
        """Of responses that were drafted along in parts."""
        accepted, proposed, skills = (
            {key: value for part in parts for key, value in getattr(part, name).items()}
            for name in ("accepted", "proposed", "skills")
        )
        counts = np.sum([part.by_confidence for part in parts], axis=0)
        return cls(accepted, proposed, skills, parts[0].draft_tokens, counts)

    @property
    def drafts(self) -> int:
        return sum(len(counts) for counts in self.accepted.values())

    @property
    def mean_accepted(self) -> float:
        """Accepted tokens per draft; the acceptance length tau is this plus the teacher's own token."""
        return float(np.mean(np.concatenate([np.asarray(counts) for counts in self.accepted.values() if counts])))

    @property
    def acceptance_length(self) -> float:
        """1 + accepted tokens per draft that is not empty: what vLLM counts, which sees no empty draft."""
        drafts = sum(length > 0 for lengths in self.proposed.values() for length in lengths)
        return 1 + sum(map(sum, self.accepted.values())) / max(drafts, 1)

    def by_depth(self) -> list[float]:
        """Share of drafts whose first d tokens were accepted, d = 1 …"""
        counts = np.concatenate([np.asarray(c, np.int64) for c in self.accepted.values()])
        return [float(np.mean(counts >= depth)) for depth in range(1, self.draft_tokens + 1)]

    def chances(self) -> list[dict[str, Any]]:
        """Of each bin of confidence: where it starts, the tokens verified, and the share accepted, null for none."""
        starts = [0.0, *confidence.EDGES.tolist()]
        return [
            {"from": start, "tokens": int(verified), "accepted": float(accepted / verified) if verified else None}
            for start, verified, accepted in zip(starts, *self.by_confidence, strict=True)
        ]

    def by_skill(self) -> dict[str, float]:
        """Acceptance length of each skill."""
        pooled: defaultdict[str, list[int]] = defaultdict(list)
        for sample_id, counts in self.accepted.items():
            pooled[self.skills[sample_id]] += counts
        return {skill: 1 + float(np.mean(counts)) for skill, counts in sorted(pooled.items()) if counts}


def draft_along(
    drafter: Proposer,
    records: Sequence[Record],
    draft_tokens: int,
    batch: int,
    on_response: Callable[[], None] = lambda: None,
) -> OfflineAcceptance:
    """Draft along `records`, `batch` at a time. The first response token is the teacher's own, as in serving."""
    accepted: dict[str, list[int]] = {record.sample_id: [] for record in records}
    proposed: dict[str, list[int]] = {record.sample_id: [] for record in records}
    by_confidence = np.zeros((2, confidence.BINS), np.int64)
    for start in range(0, len(records), batch):
        group = records[start : start + batch]
        for record, _, draft, matches in _drafts(drafter, group, draft_tokens):
            sample_id = record.sample_id
            accepted[sample_id].append(matches)
            proposed[sample_id].append(len(draft))
            by_confidence += confidence.count(drafter.confidence.get(sample_id, [])[:draft_tokens], matches)
        for _ in group:
            on_response()
    skills = {record.sample_id: record.skill for record in records}
    return OfflineAcceptance(accepted, proposed, skills, draft_tokens, by_confidence)


def steps_along(drafter: Proposer, record: Record, draft_tokens: int) -> list[Step]:
    """The steps in which the teacher would have said this response. The first token is its own."""
    said = record.response_ids
    steps = [Step.of([], said[:1])]
    for _, start, draft, matches in _drafts(drafter, [record], draft_tokens):
        stop = start + matches + 1
        steps.append(Step.of(draft, said[start:stop], ended=stop >= len(said)))
    return steps


def _drafts(
    drafter: Proposer, records: Sequence[Record], draft_tokens: int
) -> Iterator[tuple[Record, int, list[int], int]]:
    """Every draft along `records`, which advance together: whose it is, where it starts in the response, its tokens,
    and how many of them are accepted."""
    by_id = {record.sample_id: record for record in records}
    position = dict.fromkeys(by_id, 1)
    while active := [i for i in position if position[i] < len(by_id[i].response_ids)]:
        contexts = [np.concatenate([by_id[i].prompt_ids, by_id[i].response_ids[: position[i]]]) for i in active]
        for sample_id, whole in zip(active, drafter.propose(active, contexts), strict=True):
            record, start, draft = by_id[sample_id], position[sample_id], whole[:draft_tokens]
            matches = leading_matches(draft, record.response_ids[start:])
            position[sample_id] += matches + 1
            yield record, start, draft, matches
    drafter.release(list(position))
