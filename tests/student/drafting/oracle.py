"""A proposer that knows what the teacher will say: what vLLM does not accept of it is a fault of the plumbing."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from student.drafting.vllm_proposer import LladaProposer


class OracleDrafter:
    """Continues each context with the stored sequence that starts with it; a request's context only ever grows."""

    def __init__(self, sequences: list[list[int]], draft_tokens: int) -> None:
        self.sequences = [np.array(ids) for ids in sequences]
        self.draft_tokens = draft_tokens
        self.seen: dict[Hashable, np.ndarray] = {}

    def propose(self, request_ids: Sequence[Hashable], contexts: Sequence[np.ndarray]) -> list[list[int]]:
        drafts = []
        for request_id, context in zip(request_ids, contexts, strict=True):
            before = self.seen.get(request_id, context[:0])
            assert np.array_equal(before, context[: len(before)]), "another request's id"
            self.seen[request_id] = np.array(context)
            # A row that has just reached its last token may hold one more, the target's own, which vLLM cuts off.
            matches = [ids for ids in self.sequences if np.array_equal(ids[: len(context)], context[: len(ids)])]
            assert matches, "vLLM's rows are not what it generated"
            drafts.append(matches[0][len(context) :][: self.draft_tokens].tolist())
        return drafts

    def release(self, request_ids: Sequence[Hashable]) -> None:
        for request_id in request_ids:
            self.seen.pop(request_id, None)


class OracleProposer(LladaProposer):
    """`student` names a JSON file of sequences, prompt and response."""

    def load_drafter(self, _device: Any = None) -> None:
        self.drafter = OracleDrafter(json.loads(Path(self.options.student).read_text()), self.draft_tokens)  # type: ignore[assignment]
