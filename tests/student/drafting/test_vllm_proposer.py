"""vLLM's batch, row by row: the proposer without vLLM, on batches that move as vLLM's do."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers.utils import hub

from shared.errors import ConfigError
from student.drafting import vllm_proposer
from student.drafting.confidence import BINS
from student.drafting.lookup import Lookup
from student.drafting.policy import FIRST_PLAIN
from student.drafting.vllm_proposer import OPTIONS_KEY, DrafterOptions, LladaProposer
from tests.fixtures.oracle_drafter import OracleProposer

MAX_LENGTH = 64


def vllm_config(options: Any, max_num_seqs: int = 4, draft_tokens: int = 3) -> Any:
    """The parts of a VllmConfig that the proposer reads."""
    return SimpleNamespace(
        additional_config=options,
        speculative_config=SimpleNamespace(num_speculative_tokens=draft_tokens),
        model_config=SimpleNamespace(max_model_len=MAX_LENGTH, tokenizer="teacher", tokenizer_revision="abc"),
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
    proposer = OracleProposer(vllm_config({OPTIONS_KEY: {"student": str(sequences), "policy": False}}))
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
    proposer = OracleProposer(vllm_config({OPTIONS_KEY: {"student": str(sequences), "policy": False}}, draft_tokens=8))
    proposer.load_drafter()
    tokens = ids[None].astype(np.int32)
    assert proposer.propose([[1]], np.array([MAX_LENGTH - 3]), tokens) == [ids[-3:].tolist()]
    assert proposer.propose([[1]], np.array([MAX_LENGTH]), tokens) == [[]]
    proposer.ends = frozenset({int(ids[20])})
    assert proposer.propose([[int(ids[20])]], np.array([21]), tokens) == [[]]


class FailingDrafter:
    """Raises for contexts that hold a certain token, alone or among others; has room for so many."""

    def __init__(self, bad: int, room: int = 100) -> None:
        self.bad, self.room, self.calls, self.released = bad, room, 0, 0
        self.passed_over: dict[int, str] = {}
        self.confidence: dict[int, list[float]] = {}

    def propose(self, rows: Any, contexts: Any) -> list[list[int]]:
        self.calls += 1
        if any(self.bad in ids for ids in contexts):
            raise RuntimeError("out of memory")
        self.passed_over = dict.fromkeys(rows[self.room :], "no room")
        return [[] if row in self.passed_over else [1, 2, 3] for row in rows]

    def release(self, _rows: Any) -> None:
        self.released += 1


def step(proposer: LladaProposer, tokens: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    """Every request gets one token more."""
    lengths += 1
    return proposer.propose(
        [[int(row[length - 1])] for row, length in zip(tokens, lengths, strict=True)], lengths, tokens
    )


def test_a_request_that_fails_is_drafted_for_no_more_and_the_others_are(caplog: pytest.LogCaptureFixture) -> None:
    proposer = LladaProposer(vllm_config({OPTIONS_KEY: {"student": "none", "policy": False}}))
    proposer.drafter = drafter = FailingDrafter(bad=77)  # type: ignore[assignment]
    tokens = np.random.default_rng(0).integers(10, 50, (3, MAX_LENGTH)).astype(np.int32)
    tokens[1, 5] = 77
    lengths = np.array([10, 11, 12])
    for _ in range(4):
        assert step(proposer, tokens, lengths) == [[1, 2, 3], [], [1, 2, 3]]
    assert drafter.calls == 1 + 3 + 3  # the batch, each alone, then the others together
    assert [record.message for record in caplog.records] == [
        "drafting failed; serving goes on, and this is logged once"
    ]
    assert "out of memory" in caplog.text
    counted = proposer.counters.tree()
    assert counted["failures"] == {"RuntimeError": 2}
    assert counted["undrafted"] == {"refused": 4}
    assert counted["drafts"] == {"llada": 8}
    # The refusal goes with the request, wherever its row is, and ends with it.
    assert step(proposer, tokens[[1, 0]], lengths[[1, 0]]) == [[], [1, 2, 3]]
    tokens[1, 5] = 10
    assert step(proposer, tokens, np.array([5, 6, 7])) == [[1, 2, 3]] * 3


def test_a_refused_request_stays_so_after_another_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    proposer = LladaProposer(vllm_config({OPTIONS_KEY: {"student": "none", "policy": False}}))
    proposer.drafter = drafter = FailingDrafter(bad=77)  # type: ignore[assignment]
    tokens, lengths = np.full((2, MAX_LENGTH), 7, np.int32), np.array([10, 12])
    tokens[1, 5] = 77
    assert step(proposer, tokens, lengths) == [[1, 2, 3], []]
    with monkeypatch.context() as broken:
        broken.setattr(proposer.policy, "plan", lambda *_: 1 / 0)
        assert step(proposer, tokens, lengths) == [[], []]
    drafter.calls = 0
    assert step(proposer, tokens, lengths) == [[1, 2, 3], []]
    assert drafter.calls == 1


def test_requests_without_room_in_the_cache_are_counted() -> None:
    proposer = LladaProposer(vllm_config({OPTIONS_KEY: {"student": "none", "policy": False}}))
    proposer.drafter = FailingDrafter(bad=77, room=2)  # type: ignore[assignment]
    tokens, lengths = np.full((3, MAX_LENGTH), 7, np.int32), np.array([10, 11, 12])
    assert step(proposer, tokens, lengths) == [[1, 2, 3], [1, 2, 3], []]
    assert step(proposer, tokens, lengths) == [[1, 2, 3], [1, 2, 3], []]
    assert proposer.counters.tree()["undrafted"] == {"no room": 2}


def test_nothing_that_goes_wrong_reaches_vllm(caplog: pytest.LogCaptureFixture) -> None:
    proposer = LladaProposer(vllm_config({OPTIONS_KEY: {"student": "none"}}))
    proposer.drafter = FailingDrafter(bad=77)  # type: ignore[assignment]
    tokens = np.full((2, MAX_LENGTH), 7, np.int32)
    for _ in range(3):
        assert proposer.propose([[7], None], np.array([10, 12]), tokens) == [[], []]  # type: ignore[list-item]
    too_many = np.full((9, MAX_LENGTH), 7, np.int32)
    assert proposer.propose([[7]] * 9, np.full(9, 12), too_many) == [[]] * 9
    assert len(caplog.records) == 2
    assert proposer.counters.tree()["undrafted"]["failed"] == 3 * 2 + 9


def test_the_first_steps_are_measured_without_a_draft() -> None:
    proposer = LladaProposer(vllm_config({OPTIONS_KEY: {"student": "none"}}, max_num_seqs=64))
    proposer.drafter = FailingDrafter(bad=77)  # type: ignore[assignment]
    tokens, lengths = np.full((64, MAX_LENGTH), 7, np.int32), np.full(64, 10)
    for _ in range(1 + FIRST_PLAIN):  # the first call ends the reading of the prompts
        assert proposer.counters.tree()["drafts"] == {}
        drafts = step(proposer, tokens, lengths)
    assert drafts == [[1, 2, 3]] + [[]] * 63
    assert proposer.counters.tree()["undrafted"] == {"measuring": 64 * FIRST_PLAIN + 63}


def test_the_time_that_an_engine_waits_is_no_part_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, seen = [0.0], []
    monkeypatch.setattr("student.drafting.vllm_proposer.time.perf_counter", lambda: clock[0])
    proposer = LladaProposer(vllm_config({OPTIONS_KEY: {"student": "none"}}))
    proposer.drafter = FailingDrafter(bad=77)  # type: ignore[assignment]
    observe = proposer.policy.observe
    monkeypatch.setattr(
        proposer.policy, "observe", lambda seconds, *rest: seen.append(seconds) or observe(seconds, *rest)
    )
    tokens, lengths = np.full((2, MAX_LENGTH), 7, np.int32), np.array([10, 12])
    for waits in (0.0, 100.0, 0.0):
        clock[0] += 1 + waits
        proposer.leave_out(waits)
        step(proposer, tokens, lengths)
    assert seen == [1, 1, 1]


def test_nothing_is_drafted_where_the_sampler_is_wrong(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    proposer = LladaProposer(vllm_config({OPTIONS_KEY: {"student": "never loaded"}}))
    monkeypatch.setattr("student.drafting.vllm_sampling.refusal", lambda _device: "the sampler is wrong")
    proposer.load_model()
    for _ in range(3):
        assert proposer.propose([[5], [6]], np.array([2, 2]), np.zeros((2, MAX_LENGTH), np.int64)) == [[], []]
    assert [record.message for record in caplog.records] == [
        "nothing is drafted: the sampler is wrong, so drafts would change what the target says"
    ]


def test_options_can_be_changed_while_serving() -> None:
    proposer = LladaProposer(vllm_config({OPTIONS_KEY: {"student": "none"}}))
    proposer.drafter = FailingDrafter(bad=77)  # type: ignore[assignment]
    tokens, lengths = np.full((2, MAX_LENGTH), 7, np.int32), np.array([10, 12])
    assert step(proposer, tokens, lengths) == [[], []]
    proposer.reset(policy=False)
    assert step(proposer, tokens, lengths) == [[1, 2, 3]] * 2
    assert proposer.counters.tree()["drafts"] == {"llada": 2}


def test_the_lookup_finds_what_vllm_finds() -> None:
    lookup = Lookup(draft_tokens=3, max_model_len=MAX_LENGTH)
    tokens = np.zeros((2, MAX_LENGTH), np.int32)
    tokens[0, :12] = [5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7]
    tokens[1, :4] = [5, 6, 7, 8]
    assert lookup.find([0, 1], np.array([12, 4], np.int32), tokens).tolist() == [[8, 9, 1], [-1, -1, -1]]
    assert lookup.find([], np.array([12, 4], np.int32), tokens).tolist() == [[-1, -1, -1]] * 2


@pytest.mark.parametrize("options", [None, {}, {OPTIONS_KEY: {}}, {OPTIONS_KEY: {"student": "x", "slot": 3}}])
def test_options_must_name_the_student(options: Any) -> None:
    with pytest.raises(ConfigError, match="'student', the trained student's directory"):
        LladaProposer(vllm_config(options))


def test_options_are_read() -> None:
    config = vllm_config({OPTIONS_KEY: {"student": "runs/x", "memory_gib": 0.5, "keep_extendable": True}})
    assert DrafterOptions.of(config) == DrafterOptions(student="runs/x", memory_gib=0.5, keep_extendable=True)
    with pytest.raises(ConfigError, match=r"\['dtype'\] is 'float16': Input should be 'float32'"):
        DrafterOptions.of(vllm_config({OPTIONS_KEY: {"student": "runs/x", "dtype": "float16"}}))
    with pytest.raises(ConfigError, match=r"\['memory_gib'\] is '2 GiB': Input should be a valid number"):
        DrafterOptions.of(vllm_config({OPTIONS_KEY: {"student": "runs/x", "memory_gib": "2 GiB"}}))
    with pytest.raises(ConfigError, match=rf"\['acceptance_by_confidence'\] is \[0.5\]: .* at least {BINS} items"):
        DrafterOptions.of(vllm_config({OPTIONS_KEY: {"student": "runs/x", "acceptance_by_confidence": [0.5]}}))


def test_a_tokenizer_of_the_hub_is_that_of_the_served_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cached_file(name: str, file: str, *, revision: str | None) -> str:
        return str(tmp_path / name / str(revision) / file)

    monkeypatch.setattr(hub, "cached_file", cached_file)
    proposer = LladaProposer(vllm_config({"llada_drafter": {"student": "student"}}))
    found = vllm_proposer._local_tokenizer("of/someone", proposer.tokenizer_revision)
    assert found == tmp_path / "of/someone/abc"
