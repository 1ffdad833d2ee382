"""vLLM's batch, row by row: the proposer without vLLM, on batches that move as vLLM's do."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from shared.errors import ConfigError
from student.drafting.vllm_proposer import OPTIONS_KEY, DrafterOptions, LladaProposer
from tests.fixtures.oracle_drafter import OracleProposer

MAX_LENGTH = 64


def vllm_config(options: Any, max_num_seqs: int = 4, draft_tokens: int = 3) -> Any:
    """The parts of a VllmConfig that the proposer reads."""
    return SimpleNamespace(
        additional_config=options,
        speculative_config=SimpleNamespace(num_speculative_tokens=draft_tokens),
        model_config=SimpleNamespace(max_model_len=MAX_LENGTH, tokenizer="teacher"),
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs),
    )


class Batch:
    """vLLM's persistent batch: a row for each running request; the last row fills a hole."""

    def __init__(self, rows: int) -> None:
        self.tokens = np.zeros((rows, MAX_LENGTH), np.int32)
        self.lengths = np.zeros(rows, np.int32)
        self.requests: list[int] = []

    def add(self, request: int, ids: np.ndarray) -> None:
        row = len(self.requests)
        self.requests.append(request)
        self.tokens[row, : len(ids)], self.lengths[row] = ids, len(ids)

    def remove(self, request: int) -> None:
        row, last = self.requests.index(request), len(self.requests) - 1
        self.tokens[row], self.lengths[row] = self.tokens[last], self.lengths[last]
        self.requests[row] = self.requests[last]
        self.requests.pop()


@pytest.mark.parametrize("same_prompt", [False, True])
def test_requests_are_followed_through_a_moving_batch(tmp_path: Path, same_prompt: bool) -> None:
    """Requests start, end, are preempted and resumed, rows move: every row is drafted for from its own tokens."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(10, 100, 5)
    whole = {
        request: np.concatenate([prompt if same_prompt else rng.integers(10, 100, 5), rng.integers(10, 100, 30)])
        for request in range(12)
    }
    sequences = tmp_path / "sequences.json"
    sequences.write_text(json.dumps([ids.tolist() for ids in whole.values()]))
    proposer = OracleProposer(vllm_config({OPTIONS_KEY: {"student": str(sequences)}}))
    proposer.load_drafter()
    preempted: list[int] = []
    batch, waiting, at = Batch(4), list(whole), dict.fromkeys(whole, 5)
    accepted = drafted = 0
    drafts: dict[int, list[int]] = {}
    while waiting or preempted or batch.requests:
        while len(batch.requests) < 4 and (preempted or waiting):
            request = preempted.pop() if preempted and rng.random() < 0.5 else (waiting or preempted).pop(0)
            batch.add(request, whole[request][: at[request]])
        sampled: list[list[int]] = []
        for row, request in enumerate(batch.requests):
            # The target accepts the matching part of the draft and adds its own token; some rows are mid-prompt.
            if at[request] == 5 and rng.random() < 0.3:
                sampled.append([])
                continue
            draft = drafts.pop(request, [])
            truth = whole[request][at[request] : at[request] + len(draft)].tolist()
            assert draft == truth, "an oracle's draft is the truth"
            accepted, drafted = accepted + len(truth), drafted + len(draft)
            new = whole[request][at[request] : at[request] + len(draft) + 1]
            batch.tokens[row, at[request] : at[request] + len(new)] = new
            at[request] += len(new)
            batch.lengths[row] = at[request]
            sampled.append(new.tolist())
        proposed = proposer.propose(sampled, batch.lengths, batch.tokens, slot_mappings=None)
        assert [bool(ids) or not draft for ids, draft in zip(sampled, proposed, strict=True)] == [True] * len(sampled)
        drafts |= dict(zip(batch.requests, proposed, strict=True))
        for request in list(batch.requests):
            if at[request] == len(whole[request]):
                batch.remove(request)
            elif rng.random() < 0.1:
                batch.remove(request)
                drafts.pop(request, None)
                preempted.append(request)
    assert accepted == drafted > 100


def test_no_draft_beyond_the_model_length_or_after_the_end(tmp_path: Path) -> None:
    ids = np.arange(10, 10 + MAX_LENGTH)
    sequences = tmp_path / "sequences.json"
    sequences.write_text(json.dumps([ids.tolist()]))
    proposer = OracleProposer(vllm_config({OPTIONS_KEY: {"student": str(sequences)}}, draft_tokens=8))
    proposer.load_drafter()
    tokens = ids[None].astype(np.int32)
    assert proposer.propose([[1]], np.array([MAX_LENGTH - 3]), tokens) == [ids[-3:].tolist()]
    assert proposer.propose([[1]], np.array([MAX_LENGTH]), tokens) == [[]]
    proposer.ends = frozenset({int(ids[20])})
    assert proposer.propose([[int(ids[20])]], np.array([21]), tokens) == [[]]


@pytest.mark.parametrize("options", [None, {}, {OPTIONS_KEY: {}}, {OPTIONS_KEY: {"student": "x", "slot": 3}}])
def test_options_must_name_the_student(options: Any) -> None:
    with pytest.raises(ConfigError, match="'student', the trained student's directory"):
        LladaProposer(vllm_config(options))


def test_options_are_read() -> None:
    config = vllm_config({OPTIONS_KEY: {"student": "runs/x", "memory_gib": 0.5, "keep_extendable": True}})
    assert DrafterOptions.of(config) == DrafterOptions("runs/x", memory_gib=0.5, keep_extendable=True)
    with pytest.raises(ConfigError, match="'float16', expected one of"):
        DrafterOptions.of(vllm_config({OPTIONS_KEY: {"student": "runs/x", "dtype": "float16"}}))
