"""Acceptance as serving would see it, from stored responses alone.

Nothing is decoded: a stored response is what the teacher said, so a drafted token counts as accepted where it is the
stored one. On greedy text this is what greedy speculative decoding does, draft for draft. On text sampled at T = 1 its
expectation is that of one-hot verification, which accepts x with probability p(x). The contexts are those of serving:
after n accepted tokens the teacher adds one of its own, so that the next draft starts n + 1 tokens later.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from shared.dataset.records import Record
from student.drafting.tokens import leading_matches


class Proposer(Protocol):
    """What is needed of a drafter."""

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
    """

    accepted: dict[str, list[int]]
    proposed: dict[str, list[int]]
    skills: dict[str, str]
    draft_tokens: int

    @classmethod
    def merged(cls, parts: Sequence[OfflineAcceptance]) -> OfflineAcceptance:
        """Of responses that were drafted along in parts."""
        accepted, proposed, skills = (
            {key: value for part in parts for key, value in getattr(part, name).items()}
            for name in ("accepted", "proposed", "skills")
        )
        return cls(accepted, proposed, skills, parts[0].draft_tokens)

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
    for start in range(0, len(records), batch):
        group = records[start : start + batch]
        position = {record.sample_id: 1 for record in group}
        by_id = {record.sample_id: record for record in group}
        while active := [i for i in position if position[i] < len(by_id[i].response_ids)]:
            contexts = [np.concatenate([by_id[i].prompt_ids, by_id[i].response_ids[: position[i]]]) for i in active]
            for sample_id, draft in zip(active, drafter.propose(active, contexts), strict=True):
                matches = leading_matches(draft[:draft_tokens], by_id[sample_id].response_ids[position[sample_id] :])
                accepted[sample_id].append(matches)
                proposed[sample_id].append(len(draft[:draft_tokens]))
                position[sample_id] += matches + 1
        drafter.release(list(position))
        for _ in group:
            on_response()
    return OfflineAcceptance(accepted, proposed, {record.sample_id: record.skill for record in records}, draft_tokens)
