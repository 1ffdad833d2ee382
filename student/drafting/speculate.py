"""`student speculate`: real speculative decoding of the held-out prompts, and the same without a draft.

vLLM serves the teacher twice, each time in a process of its own: with the trained student as its draft model, then
alone. Both decode the same prompts greedily. Reported are vLLM's own acceptance metrics, wall-clock tokens per second
of both, and whether the outputs are the same. Where one differs, the second engine scores both candidates at the first
differing token, which tells a numerical tie from a wrong output. Costs two loads of the teacher and
2 x prompts x max_response_tokens tokens.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shared.config import PipelineConfig
from shared.console import progress
from shared.dataset.reader import Dataset
from shared.errors import CheckpointError, DatasetError, MissingExtraError, VocabularyError
from shared.files import write_json
from shared.tokenizer.vocabulary import Vocabulary
from shared.vllm_settings import engine_arguments, environment
from student.drafting.serve import Difference, Job, Result, read_result
from student.drafting.vllm_proposer import OPTIONS_KEY
from student.lineage import IDENTITY, require_current_model, speculation_identity

logger = logging.getLogger(__name__)

# Two logits this close may change places with the shape of the batch: some units in the last place of a logit
# between 16 and 32 (bfloat16 keeps 8 bits, float16 11, float32 24, accumulated over a forward).
TIE = {"bfloat16": 0.25, "float16": 0.03, "float32": 1e-3}


def speculate(config: PipelineConfig) -> dict[str, Any]:
    """Decode with and without the draft; writes `speculate.json` and the outputs into the run's directory.

    Raises:
        DatasetError: if the dataset is missing or holds no held-out prompt.
        CheckpointError: if the trained student or the teacher is missing.
        StaleError: if the student was trained from another dataset or start than those that are there.
        VocabularyError: if the teacher's tokenizer is not the one that the dataset was collected with.
        MissingExtraError: if vLLM is not installed.
    """
    dataset = Dataset.open(config.shards_dir)
    prompts = held_out_prompts(dataset, config.speculate.max_prompts, config.teacher.max_sequence_tokens)
    student = _check_student(config)
    require_current_model(config)
    _check_teacher(config, dataset)
    if importlib.util.find_spec("vllm") is None:
        raise MissingExtraError(
            "speculative decoding needs vLLM, which is not installed; `make setup` installs it, and so does "
            "pip install 'llada-drafter[serve]' with the vLLM of your machine"
        )
    directory = config.run_dir / "speculate"
    identity = speculation_identity(config)
    engine = shared_arguments(config)
    variables = _environment(config)
    drafting = engine | drafter_arguments(config, dataset, student)
    drafted = run(_job(config, dataset, drafting, prompts), directory / "with_draft", "with the draft", variables)
    alone = _job(config, dataset, engine, prompts, compare_with=directory / "with_draft.json")
    baseline = run(alone, directory / "baseline", "without the draft", variables)
    result = summarize(drafted, baseline, list(prompts), _dtype(config)) | {IDENTITY: identity}
    write_json(config.run_dir / "speculate.json", result)
    logger.info(
        "acceptance length %.3f over %d drafts, outputs %s, %.1f tokens/s against %.1f without the draft",
        result["acceptance_length"] or float("nan"),
        result["drafts"],
        "identical" if result["outputs_identical"] else f"differ in {len(result['differences'])}",
        result["tokens_per_s"],
        result["baseline_tokens_per_s"],
    )
    return result


def held_out_prompts(dataset: Dataset, most: int | None, max_sequence_tokens: int) -> dict[str, list[int]]:
    """Prompt id → the teacher's tokens, each held-out prompt once, in order of id.

    Raises:
        DatasetError: if there is none, or one leaves no room for an answer.
    """
    prompts: dict[str, list[int]] = {}
    for record in dataset.records(split="held_out", distributions=False):
        prompts.setdefault(record.prompt_id, record.prompt_ids.tolist())
    if not prompts:
        raise DatasetError(
            "the dataset holds no held-out prompt; collect with collect.held_out above 0 and a held_out decoding"
        )
    too_long = next((name for name, ids in prompts.items() if len(ids) >= max_sequence_tokens), None)
    if too_long is not None:
        raise DatasetError(
            f"held-out prompt {too_long!r} has {len(prompts[too_long])} tokens, but teacher.max_sequence_tokens is "
            f"{max_sequence_tokens}; raise it to what the dataset was collected with"
        )
    return {name: prompts[name] for name in sorted(prompts)[:most]}


def shared_arguments(config: PipelineConfig) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that both runs share."""
    return engine_arguments(config.teacher, _dtype(config)) | {
        "max_num_seqs": config.speculate.max_num_seqs,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "seed": config.seed,
    }


def drafter_arguments(config: PipelineConfig, dataset: Dataset, student: Path) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that make the student its draft model."""
    return {
        "speculative_config": {
            "method": "custom_class",
            "model": "student.drafting.vllm_proposer.LladaProposer",
            "num_speculative_tokens": config.speculate.draft_tokens,
        },
        "additional_config": {
            OPTIONS_KEY: {
                "student": str(student),
                "teacher_tokenizer": str(dataset.tokenizer_dir),
                "teacher_roles": dataset.vocabulary.roles,
                "block_length": config.train.block_length,
                "max_context_tokens": config.speculate.max_context_tokens,
            }
        },
    }


def run(job: Job, base: Path, name: str, environment: dict[str, str]) -> Result:
    """Run `job` in a process of its own; leaves BASE.json (the result) and BASE.log (what vLLM said).

    Args:
        environment: variables that the process has beside this one's.

    Raises:
        RuntimeError: if the process fails; the end of its log is in the message.
    """
    base.parent.mkdir(parents=True, exist_ok=True)
    result_file, log_file = base.with_suffix(".json"), base.with_suffix(".log")
    job_file = base.with_suffix(".job.json")
    result_file.unlink(missing_ok=True)
    write_json(job_file, asdict(job))
    command = [sys.executable, "-m", "student.drafting.serve", str(job_file), str(result_file)]
    with log_file.open("w", encoding="utf-8") as log, progress() as bar:
        task = bar.add_task(f"decoding {name}", total=len(job.prompts), note="starting vLLM")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | environment)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("progress "):
                    _, done, _total, note = line.rstrip("\n").split(" ", 3)
                    bar.update(task, completed=int(done), note=note)
                else:
                    log.write(line)
        finally:
            if process.poll() is None and sys.exc_info()[0] is not None:
                process.terminate()
            code = process.wait()
    if code != 0 or not result_file.exists():
        with log_file.open(encoding="utf-8") as log:
            end = "".join(deque(log, maxlen=20))
        raise RuntimeError(f"vLLM {name} ended with exit code {code}; {log_file} ends with\n{end}")
    job_file.unlink()
    return read_result(result_file)


def summarize(drafted: Result, baseline: Result, prompt_ids: list[str], dtype: str) -> dict[str, Any]:
    """The report's figures of two runs over the same prompts."""
    drafts = drafted.counters.get("drafts", 0)
    accepted = drafted.counters.get("accepted_tokens", 0)
    differences = [_described(entry, prompt_ids, TIE[dtype]) for entry in baseline.differences]
    return {
        "rule": "greedy",
        "dtype": dtype,
        "prompts": len(prompt_ids),
        "drafts": drafts,
        "draft_tokens": drafted.counters.get("draft_tokens", 0),
        "accepted_tokens": accepted,
        # A draft is one forward of the teacher: it emits what was accepted and one token more.
        "acceptance_length": 1 + accepted / drafts if drafts else None,
        "accepted_per_position": [count / drafts for count in drafted.accepted_per_position] if drafts else None,
        "outputs_identical": not differences,
        "differences": differences,
        "differences_are_ties": all(entry["tie"] for entry in differences),
        "tokens": drafted.tokens,
        "tokens_per_s": drafted.tokens / drafted.seconds,
        "baseline_tokens_per_s": baseline.tokens / baseline.seconds,
        "speedup": (drafted.tokens / drafted.seconds) / (baseline.tokens / baseline.seconds),
    }


def _described(entry: Difference, prompt_ids: list[str], tie: float) -> dict[str, Any]:
    return {
        "prompt_id": prompt_ids[entry.prompt],
        "position": entry.position,
        "token": entry.there,
        "baseline_token": entry.here,
        "logprob_gap": entry.gap,
        "tie": entry.gap is not None and abs(entry.gap) <= tie,
    }


def _job(
    config: PipelineConfig,
    dataset: Dataset,
    engine: dict[str, Any],
    prompts: dict[str, list[int]],
    compare_with: Path | None = None,
) -> Job:
    roles = dataset.vocabulary.roles
    return Job(
        engine=engine,
        prompts=list(prompts.values()),
        max_tokens=config.speculate.max_response_tokens,
        stop_token_ids=sorted({roles[role] for role in ("end_of_turn", "end_of_text") if role in roles}),
        compare_with=str(compare_with) if compare_with else None,
    )


def _environment(config: PipelineConfig) -> dict[str, str]:
    return environment(config.teacher) | {"VLLM_LOGGING_LEVEL": "WARNING", "TOKENIZERS_PARALLELISM": "false"}


def _dtype(config: PipelineConfig) -> str:
    return config.speculate.dtype or config.teacher.dtype


def _check_student(config: PipelineConfig) -> Path:
    from student.model.export import read_config

    directory = config.student_final_dir
    if not (directory / "config.json").exists():
        raise CheckpointError(f"{directory} holds no trained student; run `make train` with this config first")
    trained = read_config(directory).draft_block_length
    if trained is None:
        logger.warning("%s does not say which block length it was trained with", directory)
    return directory


def _check_teacher(config: PipelineConfig, dataset: Dataset) -> None:
    """A local checkpoint must be there, and be the one that the dataset's tokens belong to."""
    directory = Path(config.teacher.model)
    if not directory.exists():
        if config.teacher.gguf is not None or directory.is_absolute() or config.teacher.model.count("/") != 1:
            raise CheckpointError(
                f"teacher.model {config.teacher.model} is not there; run `make collect-logits`, which makes it, or "
                "point teacher.model at the checkpoint"
            )
        return  # a hub name: fetching it is vLLM's business
    served = Vocabulary.from_tokenizer(directory)
    if served.fingerprint != dataset.vocabulary.fingerprint:
        raise VocabularyError(
            f"the tokenizer of teacher.model {directory} has the fingerprint {served.fingerprint[:12]} "
            f"({len(served)} tokens), but {config.shards_dir} was collected with {dataset.vocabulary.fingerprint[:12]} "
            f"({len(dataset.vocabulary)} tokens): serve the teacher that the student was trained on"
        )
