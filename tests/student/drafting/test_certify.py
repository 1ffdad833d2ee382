"""The certificate: an honest drafter passes in vLLM itself; each kind of fault fails, and the page says which."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from shared.config.evaluate import EvaluateConfig
from shared.config.speculate import DrafterConfig
from student.drafting import decode
from student.drafting.certify import acceptance_check, certify, greedy_check, page, sampled_check
from student.drafting.decode import SAMPLED, THROUGHPUT, Decoded, Difference, Job, Pass, Result
from student.drafting.goodness_of_fit import CANDIDATES, Tally
from student.lineage import IDENTITY, evaluation_identity
from tests.fixtures.served_run import pipeline


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.usefixtures("warm_serving")
def test_an_untrained_student_is_certified(served_run: Path, served_teacher: Path) -> None:
    config = pipeline(served_run, served_teacher)
    certificate = certify(config, tokens=1000)
    assert certificate == json.loads((served_run / "certificate.json").read_text())
    assert certificate["passed"]
    greedy, sampled, acceptance = certificate["checks"].values()
    assert greedy["responses"] == 8
    assert sampled["drafted"]["tokens"] == sampled["plain"]["tokens"] == 6 * 8 * 24
    assert min(sampled["drafted"]["p"], sampled["plain"]["p"]) > 1e-3
    assert acceptance["passed"] is None  # nothing was evaluated
    assert acceptance["served"] >= 1
    text = (served_run / "certificate.md").read_text()
    assert text.startswith(f"# Passed: tiny drafts for {served_teacher}")
    assert "1152 tokens, p = " in text


def tally(ranks: list[int]) -> Tally:
    """Tokens of these ranks, of rows in which each of twenty has the probability 1/20."""
    made = Tally()
    logprob = -np.log(CANDIDATES)
    made.add(ranks, [logprob] * len(ranks), np.full((len(ranks), CANDIDATES), logprob))
    return made


FAIR = tally(list(range(1, 21)) * 10)


def result(differences: list[Difference], drafted: Tally) -> Result:
    decoded = Decoded([[1, 2]], 1.0, 2, {"drafts": 10, "accepted_tokens": 5})
    tallies = {"": {SAMPLED: FAIR}, "with_draft": {SAMPLED: drafted}}
    return Result({THROUGHPUT: decoded}, differences, None, tallies)


def test_a_response_that_fills_the_context_is_read_but_for_its_last_token(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = SimpleNamespace(vllm_config=SimpleNamespace(model_config=SimpleNamespace(max_model_len=8)))
    row = {token: SimpleNamespace(rank=token + 1, logprob=-np.log(CANDIDATES)) for token in range(CANDIDATES)}

    def read(_llm: object, texts: list[list[int]], **_rows: int) -> list[SimpleNamespace]:
        assert all(len(text) < 8 for text in texts)  # vLLM refuses a longer one
        return [SimpleNamespace(prompt_logprobs=[row] * len(text)) for text in texts]

    monkeypatch.setattr(decode, "_read", read)
    job = Job({}, [[1, 2, 3], [1] * 7], 16, [], {SAMPLED: Pass(samples=1)})
    made = Decoded([[4, 5, 6, 7, 8], [4]], 1.0, 6)
    tally = decode._tallies(SimpleNamespace(llm_engine=engine), job, {SAMPLED: made})[SAMPLED]
    assert sum(tally.observed_C) == 4


def test_acceptance_is_held_to_what_evaluate_found(served_run: Path, served_teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    for name in ("shards", "student"):
        (tmp_path / "tiny" / name).symlink_to(served_run / name)
    config = pipeline(tmp_path / "tiny", served_teacher)
    config = config.model_copy(update={"evaluate": EvaluateConfig(draft_tokens=3, rule="sample")})

    def check(evaluated: dict[str, Any], drafts: int = 100_000) -> dict[str, Any]:
        config.run_dir.joinpath("evaluate.json").write_text(json.dumps(evaluated))
        counters = {"drafts": drafts, "accepted_tokens": drafts // 2}
        return acceptance_check(config, Result({THROUGHPUT: Decoded([[1, 2]], 1.0, 2, counters)}))

    def evaluated(length: float, drafts: int = 100_000, **changes: Any) -> dict[str, Any]:
        # The headline is of sampled text; half of the drafts along greedy text were empty, which vLLM does not count.
        share = (length - 1) / 6  # of drafts, accepted whole
        greedy = {"tau": 1 + 3 * share, "acceptance_length": length, "drafts": drafts, "by_depth": [share] * 3}
        found = {"rule": "sample", "draft_tokens": 3, "after": {"tau": 1.2, "rules": {"greedy": greedy}}}
        return found | {IDENTITY: evaluation_identity(config)} | changes

    assert check(evaluated(1.45)) == {
        "passed": True, "served": 1.5, "offline": 1.45, "tolerance": 0.05, "reason": None
    }  # fmt: skip
    assert check(evaluated(1.6))["passed"] is False
    # Of 150 drafts, such a difference is chance.
    few = check(evaluated(1.6, drafts=150), drafts=150)
    assert few["passed"]
    assert few["tolerance"] == pytest.approx(2.576 * math.sqrt(0.9 - 0.3**2) * math.sqrt(2 / 150) / 1.6)
    assert not check(evaluated(2.5, drafts=150), drafts=150)["passed"]

    slower = config.speculate.model_copy(update={"drafter": DrafterConfig(denoising_steps=2)})
    other = config.model_copy(update={"speculate": slower})
    for unlike, reason in (
        ({}, "has measured no greedy text"),
        (evaluated(1.6, draft_tokens=4), "evaluate.draft_tokens is 4, speculate.draft_tokens 3"),
        (evaluated(1.6, **{IDENTITY: {}}), "evaluate.json is out of date (dataset: not recorded there"),
        (evaluated(1.6, **{IDENTITY: evaluation_identity(other)}), "speculate.drafter: {'denoising_steps': 2} there"),
    ):
        assert check(unlike)["passed"] is None
        assert reason in check(unlike)["reason"]


def test_each_fault_fails_its_check() -> None:
    tie = Difference(0, 1, 5, 6, 1e-4, "with_draft", THROUGHPUT)
    wrong = Difference(0, 1, 5, 6, 0.5, "with_draft", THROUGHPUT)
    assert greedy_check(result([], FAIR), ["a"], 1e-3)["passed"]
    assert greedy_check(result([tie], FAIR), ["a"], 1e-3)["passed"]
    assert not greedy_check(result([tie, wrong], FAIR), ["a"], 1e-3)["passed"]

    assert sampled_check(result([], FAIR))["passed"]
    always_the_first = sampled_check(result([], tally([1] * 200)))
    assert not always_the_first["passed"]
    assert always_the_first["control_passed"]

    checks = {
        "greedy": greedy_check(result([wrong], FAIR), ["a"], 1e-3),
        "sampled": always_the_first,
        "acceptance": {"passed": False, "served": 1.5, "offline": 1.6, "tolerance": 0.05, "reason": None},
    }
    about = {"date": "d", "vllm": "v", "torch": "t", "device": "CPU", "dtype": "float32", "teacher": "T"}
    counts = {"prompts": 1, "in_flight": 8, "draft_tokens": 3, IDENTITY: {"model": "m"}}
    lines = page("run", {"passed": False, "checks": checks} | about | counts).splitlines()
    assert lines[0] == "# FAILED: run drafts for T"
    assert sum("| FAILED |" in line for line in lines) == 3
    assert any("1 differ, and not at a tie" in line for line in lines)
    assert "| with the draft, observed | 200.0 | 0.0 | 0.0 | 0.0 | 0.0 |" in lines
