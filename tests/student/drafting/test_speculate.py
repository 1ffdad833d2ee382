"""Speculative decoding in vLLM itself, on a random teacher: lossless whatever is drafted, counted as vLLM counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shared.config import PipelineConfig
from shared.errors import CheckpointError, DatasetError, VocabularyError
from shared.tokenizer.vocabulary import Vocabulary
from student.drafting.decode import Decoded, Difference, Job, Pass, Result, first_differences, read_result
from student.drafting.engines import run
from student.drafting.policy import FIRST_DRAFTS, FIRST_PLAIN
from student.drafting.speculate import (
    BASELINE,
    LLADA_ALONE,
    TIE,
    WITH_DRAFT,
    drafter_arguments,
    headline,
    held_out_prompts,
    shared_arguments,
    speculate,
    summarize,
)
from tests.fixtures.served_run import pipeline
from tests.student.drafting.conftest import CORPUS

ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # as `student speculate` has it on a CPU
}


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.usefixtures("warm_serving")
def test_an_untrained_student_changes_nothing(served_run: Path, served_teacher: Path) -> None:
    config = pipeline(served_run, served_teacher, speculate={"policy": False})
    result = speculate(config)
    assert result == json.loads((served_run / "speculate.json").read_text())
    assert result["outputs_identical"] or result["differences_are_ties"]
    assert result["prompts"] == 8
    latency = result["latency"]
    for figures in (result, result["ngram"], latency, latency["llada_alone"], latency["ngram"]):
        assert figures["tokens_per_s"] > 0 < figures["baseline_tokens_per_s"]
        assert (figures["acceptance_length"] is None) == (figures["drafts"] == 0)
    assert latency["prompts"] == 3
    assert result["drafts"] > 0 < latency["llada_alone"]["drafts"]
    counted = latency["llada_alone"]["proposer"]
    assert set(counted["drafts"]) == {"llada"}
    assert set(counted["undrafted"]) <= {"nothing to propose"}
    assert not counted["failures"]
    assert result["suffix"] is None
    baseline = read_result(served_run / "speculate" / "baseline.json")
    assert result["baseline_async_scheduling"] == baseline.async_scheduling  # as the platform has it
    outputs = baseline.passes["throughput"].outputs
    assert len(outputs) == 8
    assert {len(ids) for ids in outputs} <= set(range(1, 25))
    assert not list((served_run / "speculate").glob("*.job.json"))

    # What the teacher says, drafted word for word: all of it is accepted, while requests are preempted for want
    # of cache, return, and change rows. One draft off by one position would be rejected.
    prompts = list(held_out_prompts_of(config).values())
    stored = served_run / "sequences.json"
    stored.write_text(json.dumps([prompt + ids for prompt, ids in zip(prompts, outputs, strict=True)]))
    engine = shared_arguments(config) | {
        # Room for five blocks of 32 tokens: four requests start, and do not all fit when they grow.
        "max_model_len": 128,
        "block_size": 32,
        "num_gpu_blocks_override": 6,
        "speculative_config": {
            "method": "custom_class",
            "model": "tests.fixtures.oracle_drafter.OracleProposer",
            "num_speculative_tokens": 3,
        },
        "additional_config": {"llada_drafter": {"student": str(stored)}},
    }
    stop = [Vocabulary.from_tokenizer(served_teacher).roles["end_of_turn"]]
    passes = {
        "throughput": Pass(options={"policy": False, "lookup": False}),
        "latency": Pass(one_by_one=True, options={"policy": True, "lookup": False}),
    }
    base = served_run / "oracle"
    told = run({base: Job(engine, prompts, 24, stop, passes)}, ENVIRONMENT)[base].passes
    assert told["throughput"].outputs == told["latency"].outputs == outputs
    counters = told["throughput"].counters
    assert counters["preemptions"] > 0
    assert counters["accepted_tokens"] == counters["draft_tokens"] > 0
    assert told["throughput"].proposer["accepted_tokens"]["llada"] == counters["accepted_tokens"]
    # Every draft is of three tokens but the last of a request, and adds one of the target's.
    assert counters["drafts"] <= sum((len(ids) + 2) // 4 + 1 for ids in outputs) + 8
    # One request in flight, by choice: once its cost is known, it is always drafted for.
    undrafted = told["latency"].proposer["undrafted"]
    assert undrafted.get("policy", 0) == 0
    assert undrafted.get("measuring", 0) <= FIRST_PLAIN + FIRST_DRAFTS


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.usefixtures("warm_serving")
def test_two_tensor_parallel_ranks_draft_together_and_say_what_one_says(served_run: Path, served_teacher: Path) -> None:
    config = pipeline(served_run, served_teacher)
    dataset = open_dataset(config)
    prompts = list(held_out_prompts_of(config).values())
    stop = [dataset.vocabulary.roles["end_of_turn"]]
    engine = shared_arguments(config)
    drafting = engine | drafter_arguments(config, str(config.student_final_dir), dataset) | {"tensor_parallel_size": 2}
    two_cores = ENVIRONMENT | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    passes = {"throughput": Pass(options={"policy": False, "lookup": False})}
    two, one = served_run / "two_drafted", served_run / "one_plain"
    drafted = run({two: Job(drafting, prompts, 24, stop, passes)}, two_cores)[two]
    plain = run({one: Job(engine, prompts, 24, stop, {"throughput": Pass()}, [f"{two}.json"])}, ENVIRONMENT)[one]
    counts = drafted.passes["throughput"].proposer
    assert counts["drafts"]["llada"] > 20
    assert not counts["failures"]
    ties = [entry.gap is not None and abs(entry.gap) <= TIE["float32"] for entry in plain.differences]
    assert all(ties)


def open_dataset(config: PipelineConfig) -> Any:
    from shared.dataset.reader import Dataset

    return Dataset.open(config.shards_dir)


def held_out_prompts_of(config: PipelineConfig) -> dict[str, list[int]]:
    return held_out_prompts(open_dataset(config), None, 256)


def test_each_held_out_prompt_is_decoded_once(served_run: Path, served_teacher: Path) -> None:
    config = pipeline(served_run, served_teacher)
    prompts = held_out_prompts_of(config)
    assert sorted(prompts) == list(prompts)
    assert len(prompts) == 8
    assert list(held_out_prompts(open_dataset(config), 3, 256)) == list(prompts)[:3]
    lengths = [len(ids) for ids in prompts.values()]
    with pytest.raises(DatasetError, match=rf"teacher\.max_sequence_tokens is {max(lengths)}"):
        held_out_prompts(open_dataset(config), None, max(lengths))
    shorter = lengths.index(max(lengths))  # so many before the longest one, which is not decoded then
    assert len(held_out_prompts(open_dataset(config), shorter, max(lengths))) == shorter > 0


def test_mistakes_are_named_before_anything_is_written(served_run: Path, served_teacher: Path, tmp_path: Path) -> None:
    before = sorted(served_run.rglob("*"))
    with pytest.raises(DatasetError, match=str(tmp_path)):
        speculate(pipeline(tmp_path / "none", served_teacher))
    with pytest.raises(CheckpointError, match="run `make collect-logits`"):
        speculate(pipeline(served_run, tmp_path / "no" / "teacher"))
    other = tmp_path / "other"
    other.mkdir()
    from student.model.tokenizer import train_tokenizer

    train_tokenizer(CORPUS, 300).save_pretrained(other)
    with pytest.raises(VocabularyError, match="serve the teacher that the student was trained on"):
        speculate(pipeline(served_run, other))
    untrained = tmp_path / "untrained"
    untrained.mkdir()
    (untrained / "shards").symlink_to(served_run / "shards")
    with pytest.raises(CheckpointError, match="run `make train`"):
        speculate(pipeline(untrained, served_teacher))
    assert sorted(served_run.rglob("*")) == before
    assert [path.name for path in untrained.iterdir()] == ["shards"]


def test_differences_are_found_at_their_first_token() -> None:
    ours = [[1, 2, 3], [1, 2, 3], [1, 2], [4]]
    theirs = [[1, 2, 3], [1, 5, 3], [1, 2, 3], [4]]
    assert first_differences(ours, theirs) == [Difference(1, 1, 2, 5), Difference(2, 2, None, 3)]


def test_the_figures_are_vllms_own() -> None:
    counters = {"drafts": 10, "draft_tokens": 40, "accepted_tokens": 15}
    fast = Decoded([[1, 2, 3, 4]], 2.0, 40, counters, [8, 5, 2, 0], {"seconds": {"all": 0.5}})
    alone, plain = replace(fast, seconds=2.5, counters={}), Decoded([[1, 7]], 4.0, 40)
    drafted = Result({"throughput": fast, "latency": fast, LLADA_ALONE: alone})
    tie = Difference(0, 1, 7, 8, 0.5 * TIE["float32"], WITH_DRAFT, "latency")

    def figures(*differences: Difference, **others: Result) -> dict[str, Any]:
        baseline = Result({"throughput": plain, "latency": plain, LLADA_ALONE: plain}, list(differences), True)
        return summarize({WITH_DRAFT: drafted, BASELINE: baseline} | others, ["p"], "float32")

    same = figures()
    assert same["outputs_identical"]
    for found in (same, same["latency"]):
        assert found["acceptance_length"] == 2.5
        assert found["accepted_per_position"] == [0.8, 0.5, 0.2, 0.0]
        assert (found["tokens_per_s"], found["baseline_tokens_per_s"], found["speedup"]) == (20.0, 10.0, 2.0)
        assert found["tokens_per_step"] == 40 / 25
        assert found["drafting_share"] == 0.25
        assert found["ngram"] is None
    assert same["latency"]["llada_alone"]["speedup"] == 1.6
    assert same["latency"]["llada_alone"]["acceptance_length"] is None
    assert figures(ngram=Result({"throughput": plain, "latency": fast}))["latency"]["ngram"]["speedup"] == 2.0
    assert headline(same, 8) == (
        "one request in flight: 2.00 × the speed without a draft (20.0 against 10.0 tokens/s; LLaDA alone 1.60 ×); "
        "8 in flight: 2.00 × (20.0 against 10.0); outputs identical"
    )

    differs = figures(tie)
    assert differs["outputs_identical"] is False
    assert differs["differences_are_ties"] is True
    assert differs["differences"][0]["logprob_gap"] == tie.gap
    assert headline(differs, 8).endswith("outputs differ in 1, all numerical ties")
    for wrong in (replace(tie, gap=2.0), replace(tie, gap=None)):
        assert not figures(wrong)["differences_are_ties"]
    assert figures(replace(tie, file="ngram"))["outputs_identical"]  # vLLM's own draft is not ours to answer for
