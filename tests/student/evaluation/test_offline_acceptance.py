from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from shared.dataset.records import Record, Sampling
from student.drafting.confidence import BINS, bins
from student.evaluation.offline_acceptance import draft_along


def record(name: str, response: list[int]) -> Record:
    return Record(
        sample_id=name,
        prompt_id=name,
        split="held_out",
        skill=name[0],
        messages=(),
        prompt_text="",
        prompt_ids=np.array([100, 101], np.int32),
        response_ids=np.array(response, np.int32),
        response_bytes=b"",
        finish_reason="stop",
        sampling=Sampling(0, 1, 0, 64, None),
        distributions=None,
    )


class Oracle:
    """Knows the responses; `shift` makes it propose what stands that many tokens later."""

    draft_tokens = 3

    def __init__(self, records: Sequence[Record], shift: int = 0, right: int = 99) -> None:
        self.responses = {r.sample_id: r.response_ids for r in records}
        self.shift, self.right, self.contexts = shift, right, []
        self.confidence: dict[Hashable, list[float]] = {}

    def propose(self, request_ids: Sequence[str], contexts: Sequence[np.ndarray]) -> list[list[int]]:
        self.contexts += [context.tolist() for context in contexts]
        drafts = []
        for request, context in zip(request_ids, contexts, strict=True):
            start = len(context) - 2 + self.shift
            draft = self.responses[request][start : start + 3].tolist()
            drafts.append([t if i < self.right else -1 for i, t in enumerate(draft)])
        return drafts

    def release(self, request_ids: Sequence[str]) -> None:
        for request in request_ids:
            del self.responses[request]


def test_a_perfect_drafter_is_accepted_to_the_end() -> None:
    records = [record("a1", [1, 2, 3, 4, 5, 6, 7, 8, 9]), record("b1", [1, 2, 3])]
    drafter = Oracle(records)
    result = draft_along(drafter, records, batch=2)
    assert result.counts == {("a", 3): 2, ("b", 2): 1}
    assert drafter.contexts[0] == [100, 101, 1], "the first response token is the teacher's own"
    assert drafter.responses == {}, "requests are released"


def test_after_n_accepted_tokens_the_teacher_adds_one() -> None:
    records = [record("a1", [1, 2, 3, 4, 5, 6, 7, 8, 9])]
    result = draft_along(Oracle(records, right=1), records, batch=1)
    assert result.counts == {("a", 1): 4}
    assert result.mean_accepted == 1
    assert result.by_depth() == [1, 0, 0]
    assert result.by_skill() == {"a": 2}


class EverySecond(Oracle):
    """Drafts right after contexts of odd length and nothing after even ones."""

    def propose(self, request_ids: Sequence[str], contexts: Sequence[np.ndarray]) -> list[list[int]]:
        drafts = super().propose(request_ids, contexts)
        return [draft if len(context) % 2 else [] for draft, context in zip(drafts, contexts, strict=True)]


def test_empty_drafts_count_for_tau_but_not_for_what_vllm_counts() -> None:
    records = [record("a1", list(range(8)))]
    result = draft_along(EverySecond(records, right=2), records, batch=1)
    # Contexts of 3, 6 and 7 tokens (two of them the prompt): 2 accepted, nothing drafted, the last 2 accepted.
    assert result.counts == {("a", 2): 2, ("a", 0): 1}
    assert result.empty == 1
    assert result.mean_accepted == 4 / 3
    assert result.acceptance_length == 3


def test_a_drafter_that_is_off_by_one_is_worth_nothing() -> None:
    records = [record("a1", list(range(1, 30)))]
    assert draft_along(Oracle(records, shift=1), records, batch=1).mean_accepted == 0


class Sure(Oracle):
    """Sure of its first token, less of the second, and not of the third."""

    def propose(self, request_ids: Sequence[str], contexts: Sequence[np.ndarray]) -> list[list[int]]:
        drafts = super().propose(request_ids, contexts)
        self.confidence = {name: [0.97, 0.55, 0.02][: len(d)] for name, d in zip(request_ids, drafts, strict=True)}
        return drafts


def test_acceptance_is_counted_by_confidence() -> None:
    """Of each draft the tokens up to the first rejected one, which is among those verified."""
    records = [record("a1", [1, 2, 3, 4, 5, 6, 7, 8, 9])]
    high, middle, low = bins(np.array([0.97, 0.55, 0.02]))
    counts = draft_along(Sure(records, right=1), records, batch=1).by_confidence
    assert counts.shape == (2, BINS)
    assert counts[:, high].tolist() == [4, 4], "after 1, 3, 5 and 7 tokens"
    assert counts[:, middle].tolist() == [4, 0]
    assert not counts[:, low].any(), "what stands behind a rejected token is not verified"
    result = draft_along(Sure(records), records, batch=1)
    shares = {entry["from"]: entry["accepted"] for entry in result.chances() if entry["tokens"]}
    assert shares == {0.95: 1.0, 0.5: 1.0, 0.0: 1.0}


def test_parts_add_up() -> None:
    records = [record("a1", [1, 2, 3, 4, 5, 6, 7, 8, 9]), record("b1", [1, 2, 3]), record("b2", [4, 5, 6, 7])]
    first, rest = (draft_along(Sure(part, right=2), part, batch=2) for part in (records[:1], records[1:]))
    whole, both = draft_along(Sure(records, right=2), records, batch=2), first + rest
    for figure in ("drafts", "mean_accepted", "acceptance_length"):
        assert getattr(both, figure) == getattr(whole, figure)
    for figures in ("by_depth", "by_skill", "chances"):
        assert getattr(both, figures)() == getattr(whole, figures)()
