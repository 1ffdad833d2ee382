"""`student speculate`: real speculative decoding of the held-out prompts, and the same without a draft.

vLLM serves the teacher in several processes: with the trained student as its draft model, with its own drafts
(`ngram`, `suffix`), and alone at its best settings. Each decodes the same prompts greedily, with many requests in
flight (throughput) and some of them one at a time (latency), in turns where they fit together (`engines.py`). Reported
are vLLM's own acceptance metrics, wall-clock tokens per second, and whether the outputs are the same. Where one
differs, the last engine scores both candidates at the first differing token, which tells a numerical tie (`TIE`) from a
wrong output. In `speculate.json` many requests in flight stand at the top level, one in flight in `latency`;
`acceptance_length` is 1 + accepted / drafts, as vLLM counts; `tokens_per_step` counts a request's steps without a draft
too.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from shared.config import PipelineConfig
from shared.dataset.reader import Dataset
from shared.errors import CheckpointError, DatasetError
from shared.files import read_json, write_json
from shared.hub import is_hub_name
from shared.tokenizer.vocabulary import Vocabulary
from shared.vllm_settings import engine_arguments, engine_version, environment
from student.drafting.decode import LATENCY, THROUGHPUT, Decoded, Difference, Job, Pass, Result
from student.drafting.engines import run
from student.drafting.lookup import LONGEST, SHORTEST
from student.drafting.vllm_proposer import OPTIONS_KEY, DrafterOptions
from student.lineage import IDENTITY, require_current_model, speculation_identity
from student.model.export import read_config

logger = logging.getLogger(__name__)

WITH_DRAFT, BASELINE = "with_draft", "baseline"
VLLMS_OWN = ("ngram", "suffix")
LLADA_ALONE = f"{LATENCY}_llada_alone"

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
    job, prompt_ids, drafting = inputs(config)
    directory, identity = config.run_dir / "speculate", speculation_identity(config)
    jobs = {
        directory / name: replace(job, engine=job.engine | arguments, passes=passes)
        for name, arguments, passes in variants(config, drafting)
    }
    *others, baseline = jobs
    jobs[baseline] = replace(jobs[baseline], compare_with=[f"{other}.json" for other in others])
    results = {base.name: result for base, result in decode_all(config, jobs).items()}
    result = summarize(results, prompt_ids, dtype_of(config)) | {IDENTITY: identity}
    write_json(config.run_dir / "speculate.json", result)
    logger.info("%s", headline(result, config.speculate.max_num_seqs))
    return result


def inputs(config: PipelineConfig) -> tuple[Job, list[str], dict[str, Any]]:
    """What decodes the run's held-out prompts: a job without passes, the prompts' ids, and the arguments of `vllm.LLM`
    that make the trained student the draft model. They belong together. Raises as `speculate` does."""
    dataset = Dataset.open(config.shards_dir)
    prompts = held_out_prompts(dataset, config.speculate.max_prompts, config.teacher.max_sequence_tokens)
    student = check_student(config)
    require_current_model(config)
    check_teacher(config, dataset)
    engine_version()
    most, stop = config.speculate.max_response_tokens, sorted(dataset.vocabulary.end_ids)
    job = Job(shared_arguments(config), list(prompts.values()), most, stop, passes={})
    return job, list(prompts), drafter_arguments(config, str(student), dataset)


def decode_all(config: PipelineConfig, jobs: Mapping[Path, Job]) -> dict[Path, Result]:
    """`engines.run` with what the config says of the teacher's engine."""
    return run(jobs, decoding_environment(config), config.teacher.kv_cache_gib or 0)


def variants(
    config: PipelineConfig, with_student: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any], dict[str, Pass]]]:
    """(name, its arguments of `vllm.LLM`, what it decodes) of each load of the teacher; the last is the baseline."""
    settings = config.speculate
    many, one = Pass(), Pass(one_by_one=True, prompts=settings.latency_prompts)
    chosen = {"policy": settings.policy, "lookup": settings.lookup}
    drafting = {THROUGHPUT: replace(many, options=chosen), LATENCY: replace(one, options=chosen)}
    if settings.lookup:
        drafting[LLADA_ALONE] = replace(one, options=chosen | {"lookup": False})
    yield WITH_DRAFT, with_student, drafting
    for method in settings.compare:
        if method == "suffix" and importlib.util.find_spec("arctic_inference") is None:
            logger.info("vLLM's suffix drafts are not measured: pip install arctic-inference provides them")
            continue
        speculation = {"method": method, "num_speculative_tokens": settings.draft_tokens}
        if method == "ngram":
            speculation |= {"prompt_lookup_min": SHORTEST, "prompt_lookup_max": LONGEST}
        yield method, {"speculative_config": speculation}, {THROUGHPUT: many, LATENCY: one}
    yield BASELINE, {}, {name: replace(each, options=None) for name, each in drafting.items()}


def held_out_prompts(dataset: Dataset, most: int | None, max_sequence_tokens: int) -> dict[str, list[int]]:
    """Prompt id → the teacher's tokens, each held-out prompt once, in order of id, the first `most`.

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
    prompts = {name: prompts[name] for name in sorted(prompts)[:most]}
    too_long = next((name for name, ids in prompts.items() if len(ids) >= max_sequence_tokens), None)
    if too_long is not None:
        raise DatasetError(
            f"held-out prompt {too_long!r} has {len(prompts[too_long])} tokens, but teacher.max_sequence_tokens is "
            f"{max_sequence_tokens}; raise it to what the dataset was collected with"
        )
    return prompts


def shared_arguments(config: PipelineConfig) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that both runs share."""
    return engine_arguments(config.teacher, dtype_of(config)) | {
        "max_num_seqs": config.speculate.max_num_seqs,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "seed": config.seed,
    }


def drafter_arguments(config: PipelineConfig, student: str, dataset: Dataset | None = None) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that make the student its draft model.

    Args:
        dataset: whose copy of the teacher's tokenizer is taken; null takes the one that vLLM serves with.

    Raises:
        CheckpointError: if there is no student.
    """
    settings = config.speculate
    found: dict[str, Any] = {
        "block_length": read_config(Path(student)).draft_block_length or config.train.block_length,
        "acceptance_by_confidence": measured_chances(config),
    }
    if dataset is not None:
        found |= {"teacher_tokenizer": str(dataset.tokenizer_dir), "teacher_roles": dataset.vocabulary.roles}
    options = DrafterOptions(
        student=student,
        max_context_tokens=settings.max_context_tokens,
        policy=settings.policy,
        lookup=settings.lookup,
        **found | settings.drafter.model_dump(exclude_none=True),
    )
    return {
        "speculative_config": {
            "method": "custom_class",
            "model": "student.drafting.vllm_proposer.LladaProposer",
            "num_speculative_tokens": config.speculate.draft_tokens,
        },
        "additional_config": {OPTIONS_KEY: options.model_dump(exclude_defaults=True)},
    }


def measured_chances(config: PipelineConfig) -> list[float | None] | None:
    """How often drafted tokens are accepted, by the student's confidence (`confidence.py`), as `student evaluate` has
    found for `evaluate.rule`; null where it has not."""
    measured = (read_json(config.run_dir / "evaluate.json") or {}).get("after", {}).get("rules", {})
    chances = measured.get(config.evaluate.rule, {}).get("by_confidence")
    return None if chances is None else [entry["accepted"] for entry in chances]


def summarize(results: dict[str, Result], prompt_ids: list[str], dtype: str) -> dict[str, Any]:
    """The report's figures of all runs over the same prompts."""
    baseline = results[BASELINE]
    drafted = results[WITH_DRAFT].passes
    found = [described(entry, prompt_ids, TIE[dtype]) for entry in baseline.differences]
    differences = [entry for entry in found if entry["with"] == WITH_DRAFT]

    def figures(name: str, run: str) -> dict[str, Any] | None:
        if name not in results:
            return None
        return figures_of(results[name].passes[run], baseline.passes[run])

    latency = figures(WITH_DRAFT, LATENCY) or {}
    return {
        "rule": "greedy",
        "dtype": dtype,
        **(figures(WITH_DRAFT, THROUGHPUT) or {}),
        "outputs_identical": not differences,
        "differences": differences,
        "differences_are_ties": all(entry["tie"] for entry in differences),
        "baseline_async_scheduling": baseline.async_scheduling,
        "latency": latency
        | {
            "llada_alone": figures(WITH_DRAFT, LLADA_ALONE if LLADA_ALONE in drafted else LATENCY),
            **{method: figures(method, LATENCY) for method in VLLMS_OWN},
        },
        **{method: figures(method, THROUGHPUT) for method in VLLMS_OWN},
    }


def figures_of(drafted: Decoded, baseline: Decoded) -> dict[str, Any]:
    """What one pass gave, against the same without a draft."""
    drafts, accepted = (drafted.counters.get(name, 0) for name in ("drafts", "accepted_tokens"))
    speed, plain = (made.tokens / made.seconds for made in (drafted, baseline))
    spent = drafted.proposer.get("seconds", {}).get("all")
    return {
        "prompts": len(drafted.outputs),
        "drafts": drafts,
        "draft_tokens": drafted.counters.get("draft_tokens", 0),
        "accepted_tokens": accepted,
        # A draft is one forward of the teacher: it emits what was accepted and one token more.
        "acceptance_length": 1 + accepted / drafts if drafts else None,
        # This one compares drafters that draft at different places.
        "tokens_per_step": drafted.tokens / max(drafted.tokens - accepted, 1),
        "accepted_per_position": [count / drafts for count in drafted.accepted_per_position] if drafts else None,
        "tokens": drafted.tokens,
        "tokens_per_s": speed,
        "baseline_tokens_per_s": plain,
        "speedup": speed / plain,
        "drafting_share": None if spent is None else spent / drafted.seconds,
        "proposer": drafted.proposer,
    }


def headline(result: dict[str, Any], in_flight: int) -> str:
    """What a person came for, in a line."""
    latency, differences = result["latency"], result["differences"]
    if not differences:
        same = "identical"
    else:
        same = f"differ in {len(differences)}, {'all' if result['differences_are_ties'] else 'NOT all'} numerical ties"
    return (
        f"one request in flight: {latency['speedup']:.2f} × the speed without a draft "
        f"({latency['tokens_per_s']:.1f} against {latency['baseline_tokens_per_s']:.1f} tokens/s; "
        f"LLaDA alone {latency['llada_alone']['speedup']:.2f} ×); {in_flight} in flight: {result['speedup']:.2f} × "
        f"({result['tokens_per_s']:.1f} against {result['baseline_tokens_per_s']:.1f}); outputs {same}"
    )


def described(entry: Difference, prompt_ids: list[str], tie: float) -> dict[str, Any]:
    return {
        "with": entry.file,
        "pass": entry.run,
        "prompt_id": prompt_ids[entry.prompt],
        "position": entry.position,
        "token": entry.there,
        "baseline_token": entry.here,
        "logprob_gap": entry.gap,
        "tie": entry.gap is not None and abs(entry.gap) <= tie,
    }


def decoding_environment(config: PipelineConfig) -> dict[str, str]:
    return environment(config.teacher) | {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "TOKENIZERS_PARALLELISM": "false",
        # Our functions go to vLLM's workers by pickle, from this machine's own process to its own.
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    }


def dtype_of(config: PipelineConfig) -> str:
    return config.speculate.dtype or config.teacher.dtype


def check_student(config: PipelineConfig) -> Path:
    """The run's trained student.

    Raises:
        CheckpointError: if there is none.
    """
    directory = config.student_final_dir
    if not (directory / "config.json").exists():
        raise CheckpointError(f"{directory} holds no trained student; run `make train` with this config first")
    trained = read_config(directory).draft_block_length
    if trained is None:
        logger.warning("%s does not say which block length it was trained with", directory)
    return directory


def check_teacher(config: PipelineConfig, dataset: Dataset | None) -> None:
    """A local checkpoint must be there, and be the one that the dataset's tokens belong to, where there is a dataset.

    Raises:
        CheckpointError: if it is missing.
        VocabularyError: if its tokenizer is another one.
    """
    directory = Path(config.teacher.model)
    if not directory.exists():
        if config.teacher.gguf is not None or not is_hub_name(config.teacher.model):
            raise CheckpointError(
                f"teacher.model {config.teacher.model} is not there; run `make collect-logits`, which makes it, or "
                "point teacher.model at the checkpoint"
            )
        return  # a hub name: fetching it is vLLM's business
    if dataset is None:
        return
    Vocabulary.from_tokenizer(directory).require_equal(
        dataset.vocabulary,
        directory,
        config.shards_dir,
        "serve the teacher that the student was trained on",
    )
