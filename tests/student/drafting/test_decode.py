"""The process that decodes: which engine reads rows."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shared.files import write_json
from student.drafting import decode
from student.drafting.decode import SAMPLED, Decoded, Job, Pass, Result
from student.drafting.goodness_of_fit import CANDIDATES


def test_only_the_engine_that_compares_reads_rows_its_own_and_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, model = SimpleNamespace(async_scheduling=False), SimpleNamespace(max_model_len=16)
    llm = SimpleNamespace(vllm_config=SimpleNamespace(scheduler_config=scheduler, model_config=model))
    engine = SimpleNamespace(LLM=lambda **_: SimpleNamespace(llm_engine=llm))
    row = {token: SimpleNamespace(rank=token + 1, logprob=-3.0) for token in range(CANDIDATES)}
    read: list[list[int]] = []

    def answers(_llm: Any, texts: list[list[int]], prompt_logprobs: int) -> list[Any]:
        assert prompt_logprobs == CANDIDATES
        read.extend(texts)
        return [SimpleNamespace(prompt_logprobs=[row] * len(text)) for text in texts]

    monkeypatch.setitem(sys.modules, "vllm", engine)
    monkeypatch.setattr(decode, "_decode_pass", lambda *_: Decoded([[1, 2], [3, 4]], 1.0, 4))
    monkeypatch.setattr(decode, "_read", answers)
    monkeypatch.setattr(decode, "_wait_for", lambda _what: None)

    job = Job({}, [[7], [8]], 2, [], {SAMPLED: Pass(samples=1)})
    assert decode.decode(job).tallies == {}
    assert read == []

    other = tmp_path / "with_draft.json"
    write_json(other, asdict(Result({SAMPLED: Decoded([[5, 6], [6, 5]], 1.0, 4)})))
    baseline = Job({}, job.prompts, 2, [], job.passes, compare_with=[str(other)])
    tallies = decode.decode(baseline).tallies
    assert read == [[7, 1, 2], [8, 3, 4], [7, 5, 6], [8, 6, 5]]
    assert {file: sum(passes[SAMPLED].observed_C) for file, passes in tallies.items()} == {"": 4, "with_draft": 4}


@pytest.mark.parametrize("one_by_one", [False, True])
def test_engines_take_turns_within_a_pass_and_waiting_is_not_counted(
    monkeypatch: pytest.MonkeyPatch, one_by_one: bool
) -> None:
    """An engine of four requests in flight gives way after every two responses; each decoding takes a second."""
    clock, turns, left_out = [0.0], [], []

    class Engine:
        def generate(self, prompts: list[Any], sampling: Any, use_tqdm: Any) -> list[Any]:
            bar = use_tqdm(total=len(prompts)) if use_tqdm else None
            for _ in prompts if sampling.max_tokens == 7 else ():  # and not in the warm-up
                clock[0] += 1
                if bar is not None:
                    bar.update(1)
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1, 2])]) for _ in prompts]

        def collective_rpc(self, method: Any, args: tuple[float, ...] = (), kwargs: Any = None) -> list[Any]:  # noqa: ARG002
            if method is decode._pause_proposer:
                left_out.extend(args)
            return [{}]

        def get_metrics(self) -> list[Any]:
            return []

    def wait_for(_what: str) -> None:
        turns.append(clock[0])
        clock[0] += 100

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))
    monkeypatch.setitem(sys.modules, "vllm.inputs", SimpleNamespace(TokensPrompt=dict))
    monkeypatch.setattr(decode, "_wait_for", wait_for)
    monkeypatch.setattr(decode.time, "perf_counter", lambda: clock[0])
    job = Job({"max_num_seqs": 4}, [[1]] * 6, 7, [], {})
    made = decode._decode_pass(Engine(), job, Pass(one_by_one=one_by_one, options={}), 0, 6)
    assert (made.seconds, made.tokens, len(made.outputs)) == (6, 12, 6)
    assert len(turns) == 1 + (5 if one_by_one else 2)
    assert left_out == [100] * (len(turns) - 1)
