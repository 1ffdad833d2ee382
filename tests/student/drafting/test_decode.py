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
