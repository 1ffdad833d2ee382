"""A collection: what a config asks for, checked; its units through a runner; the finished dataset and its figures.

`teacher.collector` has the work on a unit, `teacher.runners` who does which units where.
"""

from __future__ import annotations

import datetime
import logging
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shared.config import PipelineConfig
from shared.dataset.reader import Dataset, DatasetWriter, Manifest, Provenance
from shared.errors import ConfigError, PromptError
from shared.stopping import REQUEUE_EXIT_CODE
from shared.tokenizer.vocabulary import Vocabulary
from teacher.checkpoints import check_checkpoint, ensure_checkpoint, fingerprint, load_tokenizer, vocabulary_size
from teacher.engine import engine_version, prepare_environment
from teacher.prompts import Prompt, Renderer, load_prompts, prompts_fingerprint, split_prompts
from teacher.runners.local import Job, Kind, Shard, run_here
from teacher.runners.ray_pool import run_on_ray
from teacher.summary import Summary, read_summary, summarize, write_failures
from teacher.units import Unit, cut_units, open_failures, retry_units

log = logging.getLogger(__name__)

_MOST_NAMED = 20
"""Prompts that a message names."""
_ADVICE = (
    "restore the earlier settings to finish or keep this dataset; another `name` starts a new one, for which every "
    "response is generated again"
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a config asks for, checked: nothing is written and no engine started until this exists."""

    prompts: list[Prompt]
    units: list[Unit]
    renderer: Renderer
    prompt_tokens: dict[str, int]


def prepare(config: PipelineConfig) -> Plan:
    """Read and check everything that a user can get wrong, before a directory is made or the engine started.

    Raises:
        PromptError, ConfigError, CheckpointError: naming the value seen, the one expected and the fix.
    """
    collect = config.collect
    prepare_environment(config.teacher)
    prompts = load_prompts(collect.prompts, collect.system_prompt)
    check_top_k(config)
    renderer = load_renderer(config)
    prompt_tokens = check_lengths(prompts, renderer, config)
    units = cut_units(split_prompts(prompts, collect.held_out), collect, config.seed)
    if not units:
        raise ConfigError(
            f"collect.decoding is for the splits {[d.split for d in collect.decoding]}, but no prompt of "
            f"{collect.prompts} is in one of them; change collect.held_out (now {collect.held_out})"
        )
    return Plan(prompts, units, renderer, prompt_tokens)


def load_renderer(config: PipelineConfig) -> Renderer:
    """The teacher's tokenizer with the template's arguments; errors as `Renderer` and `load_tokenizer`."""
    return Renderer(load_tokenizer(config.teacher), config.collect.template_arguments, config.collect.rendered)


def check_top_k(config: PipelineConfig) -> None:
    """Raises `ConfigError` where more candidates are asked for than the teacher has tokens."""
    check_checkpoint(config.teacher)
    size = vocabulary_size(config.teacher)
    if config.collect.top_k > size:
        raise ConfigError(
            f"collect.top_k is {config.collect.top_k}, but the teacher's vocabulary has {size} tokens; "
            f"choose at most {size}, such as 64"
        )


def check_lengths(prompts: Sequence[Prompt], renderer: Renderer, config: PipelineConfig) -> dict[str, int]:
    """Tokens of every prompt (and its response where one is given), by id.

    Raises:
        PromptError: if prompts leave no room for an answer, naming them with their lengths, the longest first.
    """
    room = config.teacher.max_sequence_tokens
    longest = max(decoding.max_response_tokens for decoding in config.collect.decoding)
    lengths: dict[str, int] = {}
    for prompt in prompts:
        lengths[prompt.id] = len(renderer.render(prompt).ids)
        if prompt.response is not None:
            lengths[prompt.id] += len(renderer.encode_response(prompt))
    too_long = sorted((name for name in lengths if lengths[name] >= room), key=lambda name: -lengths[name])
    if too_long:
        named = ", ".join(f"{name!r} ({lengths[name]})" for name in too_long[:_MOST_NAMED])
        others = f" and {len(too_long) - _MOST_NAMED} others" if len(too_long) > _MOST_NAMED else ""
        raise PromptError(
            f"{len(too_long)} of {len(prompts)} prompts have {room} tokens or more, responses to score included, and "
            f"teacher.max_sequence_tokens is {room}: {named}{others}; shorten them or take them out, or raise "
            f"teacher.max_sequence_tokens to {lengths[too_long[0]] + longest}, with room for an answer"
        )
    cut = sum(length + longest > room for length in lengths.values() if prompts[0].response is None)
    if cut:
        log.warning(
            "%d prompts leave less room than max_response_tokens (%d) below teacher.max_sequence_tokens (%d): their "
            "answers may be cut short",
            cut,
            longest,
            room,
        )
    return lengths


@dataclass(frozen=True, slots=True)
class Launch:
    """How the units of a collection are run.

    Attributes:
        runner: in this process, or on a Ray cluster.
        workers: of the Ray runner; None is as many as the cluster has GPUs for.
        shard: the share of the units that this process does; None is all that no other process does.
        retry_failed: ask again for the responses that failed in earlier sessions.
    """

    runner: Literal["local", "ray"] = "local"
    workers: int | None = None
    shard: Shard | None = None
    retry_failed: bool = False


DEFAULT = Launch()


def collect(config: PipelineConfig, launch: Launch = DEFAULT) -> Summary | None:
    """Collect everything that `config` asks for and is not there yet; resumes where it was interrupted."""
    plan = prepare(config)
    return run(config, plan.units, plan.renderer, prompts_fingerprint(plan.prompts), "collect", launch)


def run(
    config: PipelineConfig,
    units: Sequence[Unit],
    renderer: Renderer,
    prompts_sha256: str,
    kind: Kind,
    launch: Launch = DEFAULT,
) -> Summary | None:
    """Bring the dataset of `config` to hold exactly `units`, or the share of them that `launch` says.

    Returns:
        What is there, once everything is; None where other shards are still missing.

    Raises:
        SystemExit: with `REQUEUE_EXIT_CODE`, where a scheduler's signal left units undone.
    """
    engine_version()
    model = ensure_checkpoint(config.teacher)
    tokenizer_dir = model if isinstance(model, Path) else fetch_tokenizer(config, renderer)
    vocabulary = Vocabulary.from_tokenizer(tokenizer_dir)
    provenance = provenance_of(config, vocabulary, renderer, prompts_sha256, kind)
    writer = DatasetWriter(config.shards_dir, provenance, vocabulary, tokenizer_dir, advice=_ADVICE)
    ours = units if launch.shard is None else launch.shard.of(units)
    ours = [*ours, *retry_units(ours, writer.failures, writer.begun(), launch.retry_failed)]
    missing = sum(unit.name not in writer.committed for unit in ours)
    log.info("%d of %d units are there, %d to %s", len(ours) - missing, len(ours), missing, kind)
    before, outcome = read_summary(config.run_dir), None
    if missing:
        job = Job(config, provenance, vocabulary, kind)
        if launch.runner == "ray":
            outcome = run_on_ray(job, writer, ours, launch.workers)
        else:
            outcome = run_here(job, str(model), renderer, writer, ours)
        writer.refresh()
    names = {unit.name for unit in [*units, *retry_units(units, writer.failures, writer.begun(), again=False)]}
    left = names - writer.committed
    if left and outcome is not None and outcome.stopped_by:
        log.info(
            "stopped by %s: %d of %d units are there, run it again", outcome.stopped_by, len(names - left), len(names)
        )
        sys.exit(REQUEUE_EXIT_CODE)
    if left:
        log.info(
            "this share is done; %d of all %d units are not there yet: whoever does the last one finishes the dataset",
            len(left), len(names),
        )  # fmt: skip
        return None
    manifest: Manifest = writer.finish(names)
    failures = open_failures(names, writer.failures)
    write_failures(config.run_dir, failures)
    if outcome is None and before.tokens == manifest.tokens:
        return before
    rates = before
    if outcome is not None:
        rate = outcome.counts.tokens / outcome.seconds if outcome.seconds else None
        rates = Summary(tokens_per_s=rate, capture_ratio=outcome.capture_ratio or before.capture_ratio)
    return summarize(config, Dataset.open(config.shards_dir), rates, len(failures))


def fetch_tokenizer(config: PipelineConfig, renderer: Renderer) -> Path:
    """A hub teacher's tokenizer as files in the run's directory."""
    directory = config.run_dir / "teacher-tokenizer"
    renderer.tokenizer.save_pretrained(directory)
    return directory


def provenance_of(
    config: PipelineConfig, vocabulary: Vocabulary, renderer: Renderer, prompts_sha256: str, kind: str
) -> Provenance:
    """What decides the content of the dataset, and who made it when."""
    teacher, collect = config.teacher, config.collect
    local = Path(teacher.model)
    return Provenance(
        teacher=teacher.model,
        revision=teacher.revision,
        teacher_fingerprint=fingerprint(local) if local.exists() else None,
        tokenizer_fingerprint=vocabulary.fingerprint,
        chat_template_fingerprint=renderer.template_fingerprint,
        engine="vllm",
        engine_version=engine_version(),
        dtype=teacher.dtype,
        head_dtype="float32" if teacher.fp32_head else teacher.dtype,
        top_k=collect.top_k,
        retained_mass=collect.retained_mass,
        sampling=[decoding.model_dump(mode="json") for decoding in collect.decoding] if kind == "collect" else [],
        seed=config.seed,
        prompts_fingerprint=prompts_sha256,
        unit_prompts=collect.unit_prompts,
        details={
            "kind": kind,
            "held_out": collect.held_out,
            "max_model_len": teacher.max_sequence_tokens,
            "template_arguments": collect.template_arguments,
            "rendered": collect.rendered,
            "rendered_probe": renderer.probe,
        },
        git_commit=_git_commit(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        config=config.model_dump(mode="json"),
    )


def _git_commit() -> str | None:
    """The commit of this code, with a mark where files differ from it; None outside a repository."""
    try:
        text = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=-modified"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return text.strip()
