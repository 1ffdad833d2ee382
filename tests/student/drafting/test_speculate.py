"""Speculative decoding in vLLM itself, on a random teacher: lossless whatever is drafted, counted as vLLM counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.config import PipelineConfig
from shared.dataset.manifest import Provenance
from shared.dataset.reader import DatasetWriter
from shared.dataset.records import Message, Record, Sampling
from shared.errors import CheckpointError, DatasetError, VocabularyError
from shared.tokenizer.vocabulary import Vocabulary
from student.drafting.serve import Difference, Job, Result, first_differences
from student.drafting.speculate import TIE, held_out_prompts, run, shared_arguments, speculate, summarize
from tests.student.drafting.conftest import CORPUS

PROMPTS = Path(__file__).parents[3] / "configs" / "prompts" / "demo.jsonl"
BLOCK = 5
ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_KVCACHE_SPACE": "1"}


def texts() -> list[str]:
    return [json.loads(line)["prompt"] for line in PROMPTS.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA that vLLM serves, small and random."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from student.model.tokenizer import train_tokenizer

    directory = tmp_path_factory.mktemp("teacher")
    tokenizer = train_tokenizer([*texts(), *CORPUS], 1500)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=len(tokenizer),
            max_position_embeddings=256,
            initializer_range=0.3,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def run_dir(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a dataset of prompts and a student that was never trained."""
    import torch
    from transformers import AutoTokenizer

    from student.model.configuration_llada import LladaConfig
    from student.model.export import save_student
    from student.model.modeling_llada import LladaForMaskedDiffusion
    from student.model.tokenizer import train_tokenizer

    directory = tmp_path_factory.mktemp("runs") / "tiny"
    vocabulary = Vocabulary.from_tokenizer(teacher)
    tokenizer: Any = AutoTokenizer.from_pretrained(teacher)
    records: list[Record] = []
    for number, text in enumerate(texts()[::40]):
        chat = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        record = Record(
            sample_id=f"p{number}/0",
            prompt_id=f"p{number}",
            split="held_out" if number % 2 else "train",
            skill="any",
            messages=(Message("user", text),),
            prompt_text=tokenizer.decode(prompt),
            prompt_ids=np.array(prompt, np.int32),
            response_ids=np.array([vocabulary.roles["end_of_turn"]], np.int32),
            response_bytes=b"",
            finish_reason="stop",
            sampling=Sampling(0, 1, 0, 1, None),
            distributions=None,
        )
        records += [record, replace(record, sample_id=f"p{number}/1")]
    provenance = Provenance(
        teacher="tiny", tokenizer_fingerprint=vocabulary.fingerprint, engine="tests", dtype="float32", top_k=1
    )
    writer = DatasetWriter(directory / "shards", provenance, vocabulary, teacher)
    writer.write_unit("unit-0", records)
    writer.finish(["unit-0"])
    student_tokenizer = train_tokenizer(texts(), 700)
    torch.manual_seed(1)
    config = LladaConfig(
        d_model=64,
        n_layers=2,
        n_heads=2,
        n_kv_heads=2,
        mlp_hidden_size=96,
        vocab_size=len(student_tokenizer),
        max_sequence_length=256,
        bos_token_id=student_tokenizer.bos_token_id,
        eos_token_id=student_tokenizer.eos_token_id,
        pad_token_id=student_tokenizer.pad_token_id,
        mask_token_id=student_tokenizer.mask_token_id,
        draft_block_length=BLOCK,
    )
    save_student(LladaForMaskedDiffusion(config), student_tokenizer, directory / "student" / "final")
    return directory


def pipeline(run_dir: Path, teacher: Path, **changes: Any) -> PipelineConfig:
    tree: dict[str, Any] = {
        "name": run_dir.name,
        "runs": str(run_dir.parent),
        "teacher": {
            "model": str(teacher),
            "dtype": "float32",
            "max_sequence_tokens": 256,
            "enforce_eager": True,
            "kv_cache_gib": 1,
        },
        "collect": {"prompts": str(PROMPTS), "decoding": [{"split": "held_out", "temperature": 0}]},
        "student": {"checkpoint": None},
        "train": {"steps": 1, "block_length": BLOCK},
        "speculate": {"draft_tokens": 3, "max_response_tokens": 24, "max_num_seqs": 4},
    }
    for section, values in changes.items():
        tree[section] |= values
    return PipelineConfig.model_validate(tree)


@pytest.mark.slow
@pytest.mark.vllm
def test_an_untrained_student_slows_the_teacher_down_and_changes_nothing(run_dir: Path, teacher: Path) -> None:
    config = pipeline(run_dir, teacher)
    result = speculate(config)
    assert result == json.loads((run_dir / "speculate.json").read_text())
    assert result["outputs_identical"] or result["differences_are_ties"]
    assert result["drafts"] > 0
    assert result["acceptance_length"] == 1 + result["accepted_tokens"] / result["drafts"]
    assert len(result["accepted_per_position"]) == 3
    assert result["tokens_per_s"] > 0 < result["baseline_tokens_per_s"]
    outputs = json.loads((run_dir / "speculate" / "baseline.json").read_text())["outputs"]
    assert len(outputs) == result["prompts"] == 8
    assert {len(ids) for ids in outputs} <= set(range(1, 25))
    assert not list((run_dir / "speculate").glob("*.job.json"))

    # What the teacher says, drafted word for word: all of it is accepted, while requests are preempted for want
    # of cache, return, and change rows. One draft off by one position would be rejected.
    prompts = list(held_out_prompts_of(config).values())
    stored = run_dir / "sequences.json"
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
    stop = [Vocabulary.from_tokenizer(teacher).roles["end_of_turn"]]
    told = run(Job(engine, prompts, 24, stop), run_dir / "oracle", "with an oracle", ENVIRONMENT)
    assert told.outputs == outputs
    assert told.counters["preemptions"] > 0
    assert told.counters["accepted_tokens"] == told.counters["draft_tokens"] > 0
    # Every draft is of three tokens but the last of a request, and adds one of the target's.
    assert told.counters["drafts"] <= sum((len(ids) + 2) // 4 + 1 for ids in outputs) + 8


def open_dataset(config: PipelineConfig) -> Any:
    from shared.dataset.reader import Dataset

    return Dataset.open(config.shards_dir)


def held_out_prompts_of(config: PipelineConfig) -> dict[str, list[int]]:
    return held_out_prompts(open_dataset(config), None, 256)


@pytest.mark.slow
@pytest.mark.vllm
def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    job = Job({"model": str(tmp_path / "nothing"), "max_num_seqs": 1}, [[1, 2]], 4, [])
    with pytest.raises(RuntimeError, match=r"ended with exit code 1; .*failing\.log ends with"):
        run(job, tmp_path / "failing", "with a missing model", ENVIRONMENT)


def test_each_held_out_prompt_is_decoded_once(run_dir: Path, teacher: Path) -> None:
    config = pipeline(run_dir, teacher)
    prompts = held_out_prompts_of(config)
    assert sorted(prompts) == list(prompts)
    assert len(prompts) == 8
    assert list(held_out_prompts(open_dataset(config), 3, 256)) == list(prompts)[:3]
    with pytest.raises(DatasetError, match=r"teacher\.max_sequence_tokens is 10"):
        held_out_prompts(open_dataset(config), None, 10)


def test_mistakes_are_named_before_anything_is_written(run_dir: Path, teacher: Path, tmp_path: Path) -> None:
    before = sorted(run_dir.rglob("*"))
    with pytest.raises(DatasetError, match=str(tmp_path)):
        speculate(pipeline(tmp_path / "none", teacher))
    with pytest.raises(CheckpointError, match="run `make collect-logits`"):
        speculate(pipeline(run_dir, tmp_path / "no" / "teacher"))
    other = tmp_path / "other"
    other.mkdir()
    from student.model.tokenizer import train_tokenizer

    train_tokenizer(CORPUS, 300).save_pretrained(other)
    with pytest.raises(VocabularyError, match="serve the teacher that the student was trained on"):
        speculate(pipeline(run_dir, other))
    untrained = tmp_path / "untrained"
    untrained.mkdir()
    (untrained / "shards").symlink_to(run_dir / "shards")
    with pytest.raises(CheckpointError, match="run `make train`"):
        speculate(pipeline(untrained, teacher))
    assert sorted(run_dir.rglob("*")) == before
    assert [path.name for path in untrained.iterdir()] == ["shards"]


def test_differences_are_found_at_their_first_token() -> None:
    ours = [[1, 2, 3], [1, 2, 3], [1, 2], [4]]
    theirs = [[1, 2, 3], [1, 5, 3], [1, 2, 3], [4]]
    assert first_differences(ours, theirs) == [Difference(1, 1, 2, 5), Difference(2, 2, None, 3)]


def test_the_figures_are_vllms_own() -> None:
    drafted = Result([[1, 2, 3, 4]], 2.0, 4, {"drafts": 10, "draft_tokens": 40, "accepted_tokens": 15}, [8, 5, 2, 0])
    tie = replace(Difference(0, 1, 7, 8), gap=0.5 * TIE["float32"])
    figures = summarize(drafted, Result([[1, 7]], 4.0, 4, differences=[tie]), ["p"], "float32")
    assert figures["acceptance_length"] == 2.5
    assert figures["accepted_per_position"] == [0.8, 0.5, 0.2, 0.0]
    assert (figures["tokens_per_s"], figures["baseline_tokens_per_s"], figures["speedup"]) == (2.0, 1.0, 2.0)
    assert figures["outputs_identical"] is False
    assert figures["differences_are_ties"] is True
    assert figures["differences"][0]["logprob_gap"] == tie.gap
    wrong = replace(tie, gap=2.0)
    assert not summarize(drafted, Result([[1, 7]], 4.0, 4, differences=[wrong]), ["p"], "float32")[
        "differences_are_ties"
    ]
    unknown = replace(tie, gap=None)
    assert not summarize(drafted, Result([[1]], 4.0, 4, differences=[unknown]), ["p"], "float32")[
        "differences_are_ties"
    ]
    none = summarize(replace(drafted, counters={}), Result([[1]], 4.0, 4), ["p"], "float32")
    assert none["acceptance_length"] is None
