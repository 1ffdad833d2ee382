"""Acceptance as serving would see it, from stored responses alone.

Nothing is decoded: a stored response is what the teacher said, so a drafted token counts as accepted where it is the
stored one. On greedy text this is what greedy speculative decoding does, draft for draft. On text sampled at T = 1 its
expectation is that of one-hot verification, which accepts x with probability p(x). The contexts are those of serving:
after n accepted tokens the teacher adds one of its own, so that the next draft starts n + 1 tokens later.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.dataset.records import Record
from shared.tokenizer.vocabulary import first_difference
from student.drafting import confidence
from student.drafting.propose import Drafter
from student.drafting.steps import Step


@dataclass(slots=True)
class OfflineAcceptance:
    """What came of some drafts; that of more of them is the sum.

    Attributes:
        draft_tokens: tokens drafted at most.
        counts: drafts by the skill of their prompt and the number of their tokens that were accepted.
        empty: drafts without a token, which are among them.
        by_confidence: [2, bins] tokens verified and accepted, by the drafter's confidence in them (`confidence.count`).
    """

    draft_tokens: int
    counts: Counter[tuple[str, int]] = field(default_factory=Counter)
    empty: int = 0
    by_confidence: NDArray[np.int64] = field(default_factory=lambda: np.zeros((2, confidence.BINS), np.int64))

    def __add__(self, other: OfflineAcceptance) -> OfflineAcceptance:
        return OfflineAcceptance(
            self.draft_tokens,
            self.counts + other.counts,
            self.empty + other.empty,
            self.by_confidence + other.by_confidence,
        )

    def of_skill(self, skill: str) -> OfflineAcceptance:
        """Of the prompts of one skill, without what is not counted by skill."""
        counts = {key: count for key, count in self.counts.items() if key[0] == skill}
        return OfflineAcceptance(self.draft_tokens, Counter(counts))

    @property
    def drafts(self) -> int:
        return self.counts.total()

    @property
    def accepted(self) -> int:
        """Tokens, of all drafts."""
        return sum(accepted * count for (_, accepted), count in self.counts.items())

    @property
    def mean_accepted(self) -> float:
        """Accepted tokens per draft; the acceptance length tau is this plus the teacher's own token."""
        return self.accepted / max(self.drafts, 1)

    @property
    def acceptance_length(self) -> float:
        """1 + accepted tokens per draft that is not empty: what vLLM counts, which sees no empty draft."""
        return 1 + self.accepted / max(self.drafts - self.empty, 1)

    def by_depth(self) -> list[float]:
        """Share of drafts whose first d tokens were accepted, d = 1 …"""
        reached = (
            sum(count for (_, accepted), count in self.counts.items() if accepted >= depth)
            for depth in range(1, self.draft_tokens + 1)
        )
        return [drafts / max(self.drafts, 1) for drafts in reached]

    def chances(self) -> list[dict[str, Any]]:
        """Of each bin of confidence: where it starts, the tokens verified, and the share accepted, null for none."""
        starts = [0.0, *confidence.EDGES.tolist()]
        return [
            {"from": start, "tokens": int(verified), "accepted": float(accepted / verified) if verified else None}
            for start, verified, accepted in zip(starts, *self.by_confidence, strict=True)
        ]

    def by_skill(self) -> dict[str, float]:
        """Acceptance length of each skill."""
        return {skill: 1 + self.of_skill(skill).mean_accepted for skill in sorted({skill for skill, _ in self.counts})}


def draft_along(
    drafter: Drafter, records: Sequence[Record], batch: int, advance: Callable[[int], None] = lambda _: None
) -> OfflineAcceptance:
    """Draft along `records`, `batch` at a time. The first response token is the teacher's own, as in serving.

    Args:
        advance: is told how many responses have been drafted along since the last call.
    """
    found = OfflineAcceptance(drafter.draft_tokens)
    for start in range(0, len(records), batch):
        group = records[start : start + batch]
        for record, _, draft, matches in _drafts(drafter, group):
            found.counts[record.skill, matches] += 1
            found.empty += not draft
            sure = np.array([drafter.confidence.get(record.sample_id, [])])
            found.by_confidence += confidence.count(sure, np.array([matches]))
        advance(len(group))
    return found


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
            matches = first_difference(draft, record.response_ids[start:])
            position[sample_id] += matches + 1
            yield record, start, draft, matches
    drafter.release(list(position))
