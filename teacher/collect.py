"""A collection: what a config asks for, checked; its units through a runner; the finished dataset and its figures.

`teacher.collector` has the work on a unit, `teacher.runners` who does which units where.
"""

from __future__ import annotations

import datetime
import logging
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shared.config import PipelineConfig
from shared.dataset.manifest import Manifest, Provenance
from shared.dataset.reader import Dataset
from shared.dataset.writer import DatasetWriter
from shared.errors import ConfigError
from shared.stopping import REQUEUE_EXIT_CODE
from shared.tokenizer.vocabulary import Vocabulary
from teacher.checkpoints import ensure_checkpoint, fingerprint, hub_commit, vocabulary_size
from teacher.engine import prepare_environment, version_of
from teacher.prompts import Renderer, load_renderer, load_sources, prompts_fingerprint, split_prompts
from teacher.prompts.lengths import FittingPrompts, fit_prompts
from teacher.runners.local import Job, Kind, run_here
from teacher.runners.ray_pool import run_on_ray
from teacher.summary import Summary, read_summary, summarize, write_failures
from teacher.units import Unit, cut_units, open_failures, retry_units

log = logging.getLogger(__name__)

_PLACEMENT = frozenset({"distributed_executor_backend", "nnodes", "node_rank", "master_addr", "master_port"})
"""Arguments of vLLM that say where it runs, not what it computes."""
_ADVICE = (
    "restore the earlier settings to finish or keep this dataset; another `name` starts a new one, for which every "
    "response is generated again"
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a config asks for, checked: nothing is written and no engine started until this exists."""

    fitting: FittingPrompts
    units: list[Unit]
    renderer: Renderer


def prepare(config: PipelineConfig) -> Plan:
    """Read and check everything that a user can get wrong, before a directory is made or the engine started.

    Raises:
        PromptError, ConfigError, CheckpointError: naming the value seen, the one expected and the fix.
    """
    collect = config.collect
    prepare_environment(config.teacher)
    prompts = load_sources(collect)
    check_top_k(config)
    renderer = load_renderer(config)
    fitting = fit_prompts(prompts, renderer, config)
    units = cut_units(split_prompts(fitting.prompts, collect.held_out), collect, config.seed)
    if not units:
        raise ConfigError(
            f"collect.decoding is for the splits {[d.split for d in collect.decoding]}, but no prompt "
            f"is in one of them; change collect.held_out (now {collect.held_out})"
        )
    return Plan(fitting, units, renderer)


def check_top_k(config: PipelineConfig) -> None:
    """Raises `ConfigError` where more candidates are asked for than the teacher has tokens."""
    size = vocabulary_size(config.teacher)
    if config.collect.top_k > size:
        raise ConfigError(
            f"collect.top_k is {config.collect.top_k}, but the teacher's vocabulary has {size} tokens; "
            f"choose at most {size}, such as 64"
        )


@dataclass(frozen=True, slots=True)
class Launch:
    """How the units of a collection are run.

    Attributes:
        runner: in this process, or on a Ray cluster.
        workers: of the Ray runner; None is as many as the cluster has GPUs for.
        shard: the share of the units that this process does.
        retry_failed: ask again for the responses that failed in earlier sessions.
    """

    runner: Literal["local", "ray"] = "local"
    workers: int | None = None
    shard: slice = field(default_factory=lambda: slice(None))
    retry_failed: bool = False


def collect(config: PipelineConfig, launch: Launch) -> Summary | None:
    """Collect everything that `config` asks for and is not there yet; resumes where it was interrupted."""
    plan = prepare(config)
    plan.fitting.save(config.run_dir)
    return run(config, plan.units, plan.renderer, prompts_fingerprint(plan.fitting.prompts), "collect", launch)


def run(
    config: PipelineConfig,
    units: Sequence[Unit],
    renderer: Renderer,
    prompts_sha256: str,
    kind: Kind,
    launch: Launch,
) -> Summary | None:
    """Bring the dataset of `config` to hold exactly `units`, or the share of them that `launch` says.

    Returns:
        What is there, once everything is; None where other shards are still missing.

    Raises:
        SystemExit: with `REQUEUE_EXIT_CODE`, where a scheduler's signal left units undone.
    """
    version_of(config.teacher)
    if launch.runner == "ray" and config.teacher.service is not None:
        raise ConfigError(
            f"teacher.service {config.teacher.service.urls} answers through servers that run already, and --runner ray "
            "starts engines of its own: leave one of the two out"
        )
    model = ensure_checkpoint(config.teacher)
    vocabulary = Vocabulary.from_tokenizer(model)
    provenance = provenance_of(config, vocabulary, renderer, prompts_sha256, kind)
    writer = DatasetWriter(config.shards_dir, provenance, vocabulary, model, advice=_ADVICE)
    ours = units[launch.shard]
    ours = [*ours, *retry_units(ours, writer.failures, writer.begun(), launch.retry_failed)]
    missing = sum(unit.name not in writer.committed for unit in ours)
    log.info("%d of %d units are there, %d to %s", len(ours) - missing, len(ours), missing, kind)
    before, outcome = read_summary(config.run_dir), None
    if missing:
        job = Job(config, provenance, vocabulary, kind)
        if launch.runner == "ray":
            outcome = run_on_ray(job, writer, ours, launch.workers)
        else:
            outcome = run_here(job, renderer, writer, ours)
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
        ratio = outcome.capture_ratio or before.capture_ratio
        rates = Summary(tokens_per_s=rate, workers=outcome.workers, capture_ratio=ratio)
    return summarize(config, Dataset.open(config.shards_dir), rates, len(failures))


def provenance_of(
    config: PipelineConfig, vocabulary: Vocabulary, renderer: Renderer, prompts_sha256: str, kind: str
) -> Provenance:
    """What decides the content of the dataset, and who made it when."""
    teacher, collect = config.teacher, config.collect
    return Provenance(
        teacher=teacher.model,
        revision=hub_commit(teacher) or teacher.revision,
        teacher_fingerprint=fingerprint(teacher),
        tokenizer_fingerprint=vocabulary.fingerprint,
        chat_template_fingerprint=renderer.template_fingerprint,
        engine="vllm",
        engine_version=version_of(teacher),
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
            **_departures(config),
        },
        git_commit=_git_commit(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        config=config.model_dump(mode="json"),
    )


def _departures(config: PipelineConfig) -> dict[str, Any]:
    """Settings that change the content and that most collections leave as they are; these are not named then."""
    teacher = config.teacher
    further = {name: value for name, value in teacher.engine_args.items() if name.replace("-", "_") not in _PLACEMENT}
    collect = config.collect
    own = collect.write_prompts
    named = {str(collect.prompts), *(source.path for source in collect.sources)}
    rules = [[rule.model_dump(mode="json") for rule in source.decoding] for source in collect.sources]
    settings = {
        "quantization": teacher.quantization,
        "engine_args": further,
        "overlong": collect.overlong if collect.overlong != "skip" else None,
        "source_decoding": rules if any(rules) else None,
        "write_prompts": own.model_dump(mode="json", exclude={"path", "count"})
        if own is not None and str(own.path) in named
        else None,
    }
    return {name: value for name, value in settings.items() if value}


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
