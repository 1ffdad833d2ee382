"""Collecting: units of work stream through the engine and are published one by one.

`Collector.collect_unit` does one unit from its prompts to its shard; a local loop, an actor or an array job call this
same function, and logits never leave the process that computed them. `collect_units` does the same for many, with the
requests of the next units in flight while the last ones of a unit finish, and with shards written by a thread beside
the decoding. A unit that is committed is never collected again.
"""

from __future__ import annotations

import datetime
import logging
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from shared.config import PipelineConfig
from shared.console import progress
from shared.dataset.manifest import UnitEntry
from shared.dataset.reader import Dataset, DatasetWriter, Manifest, Provenance
from shared.dataset.records import Record
from shared.errors import ConfigError
from shared.tokenizer.vocabulary import Vocabulary
from teacher.capture import response_columns, to_distributions
from teacher.checkpoints import (
    check_checkpoint,
    ensure_checkpoint,
    fingerprint,
    hub_commit,
    load_tokenizer,
    vocabulary_size,
)
from teacher.engine import Answer, Request, open_engine, prepare_environment, version_of
from teacher.interrupts import lasting_interrupts
from teacher.prompts import Prompt, Renderer, load_sources, prompts_fingerprint, split_prompts
from teacher.prompts.lengths import FittingPrompts, fit_prompts
from teacher.summary import Summary, measure_capture, read_summary, summarize
from teacher.units import Task, Unit, cut_units

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

    @property
    def prompts(self) -> list[Prompt]:
        return self.fitting.prompts

    @property
    def prompt_tokens(self) -> dict[str, int]:
        return self.fitting.tokens


class AnsweringEngine(Protocol):
    """What a collector needs of an engine; `teacher.engine.Engine` is the one in this process."""

    def stream(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """Answers in the order in which they are complete, taking requests as there is room."""
        ...


class Collector:
    """Turns units into shards. One engine, one writer; workers on one dataset each have their own.

    Attributes:
        tokens: response tokens answered so far.
        on_answer: called after every response, for a progress bar.
    """

    def __init__(
        self,
        config: PipelineConfig,
        renderer: Renderer,
        vocabulary: Vocabulary,
        writer: DatasetWriter,
        engine: AnsweringEngine,
    ) -> None:
        self._collect = config.collect
        self._renderer = renderer
        self._vocabulary = vocabulary
        self._writer = writer
        self._engine = engine
        self.tokens = 0
        self.on_answer: Callable[[], None] = lambda: None

    def collect_unit(self, unit: Unit) -> UnitEntry:
        """Collect and publish one unit; one that is committed already stays as it is."""
        if unit.name in self._writer.committed:
            return self._writer.write_unit(unit.name, [])
        (entry,) = self.collect_units([unit])
        return entry

    def collect_units(self, units: Iterable[Unit]) -> Iterator[UnitEntry]:
        """Collect and publish `units`, in the order in which they are complete.

        Raises:
            AlignmentError, CheckpointError: if captured rows are not the text's, or not probabilities.
            DatasetError: if a shard cannot be written.
        """
        in_flight: dict[str, _Pending] = {}

        def requests() -> Iterator[Request]:
            for unit in units:
                opened = _OpenUnit(unit)
                for task in unit.tasks:
                    text, request = self._request(task)
                    in_flight[request.key] = _Pending(opened, task, text, request)
                    yield request

        with ThreadPoolExecutor(1, thread_name_prefix="shards") as pool:
            writing: list[Future[UnitEntry]] = []
            for answer in self._engine.stream(requests()):
                pending = in_flight.pop(answer.key)
                opened = pending.opened
                opened.records[answer.key] = self._record(pending, answer)
                self.on_answer()
                if len(opened.records) == len(opened.unit.tasks):
                    records = [opened.records[task.sample_id] for task in opened.unit.tasks]
                    writing.append(pool.submit(self._writer.write_unit, opened.unit.name, records))
                # At most two shards wait in memory for the disk.
                while writing and (writing[0].done() or len(writing) > 2):
                    yield writing.pop(0).result()
            for future in writing:
                yield future.result()

    def _request(self, task: Task) -> tuple[str, Request]:
        """The prompt as text, and what is asked of the engine."""
        if task.given is not None:
            given = task.given
            return given.prompt_text, Request(task.sample_id, given.prompt_ids, task.sampling, given.response_ids)
        rendered = self._renderer.render(task.prompt)
        ids = None if task.prompt.response is None else self._renderer.encode_response(task.prompt)
        return rendered.text, Request(task.sample_id, rendered.ids, task.sampling, ids)

    def _record(self, pending: _Pending, answer: Answer) -> Record:
        assert answer.columns is not None
        task, request, columns, finish = pending.task, pending.request, answer.columns, answer.finish_reason
        if request.response_ids is not None:
            columns = response_columns(columns, len(request.prompt_ids), len(request.response_ids))
            finish = "stop" if task.prompt.finished else "length"
        if task.given is not None:
            finish = task.given.finish_reason
        self.tokens += len(answer.response_ids)
        return Record(
            sample_id=task.sample_id,
            prompt_id=task.prompt.id,
            split=task.split,
            skill=task.prompt.skill,
            messages=task.prompt.messages,
            prompt_text=pending.prompt_text,
            prompt_ids=request.prompt_ids,
            response_ids=answer.response_ids,
            response_bytes=self._vocabulary.decode(answer.response_ids),
            finish_reason=finish,
            sampling=task.sampling,
            distributions=to_distributions(
                columns, answer.response_ids, len(self._vocabulary), self._collect.retained_mass
            ),
        )


@dataclass(slots=True)
class _OpenUnit:
    """A unit that is being answered, with its records by sample id."""

    unit: Unit
    records: dict[str, Record] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Pending:
    """A request in flight, and what its record needs beside the answer."""

    opened: _OpenUnit
    task: Task
    prompt_text: str
    request: Request


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


def collect(config: PipelineConfig) -> Summary:
    """Collect everything that `config` asks for and is not there yet; resumes where it was interrupted."""
    plan = prepare(config)
    plan.fitting.save(config.run_dir)
    return run(config, plan.units, plan.renderer, prompts_fingerprint(plan.prompts), kind="collect")


def run(config: PipelineConfig, units: Sequence[Unit], renderer: Renderer, prompts_sha256: str, kind: str) -> Summary:
    """Bring the dataset of `config` to hold exactly `units`; `kind` is `collect` or `score`."""
    version = version_of(config.teacher)
    model = ensure_checkpoint(config.teacher)
    vocabulary = Vocabulary.from_tokenizer(model)
    provenance = provenance_of(config, vocabulary, renderer, prompts_sha256, kind)
    writer = DatasetWriter(config.shards_dir, provenance, vocabulary, model, advice=_ADVICE)
    names = [unit.name for unit in units]
    missing = [unit for unit in units if unit.name not in writer.committed]
    log.info("%d of %d units are there, %d to %s", len(units) - len(missing), len(units), len(missing), kind)
    before = read_summary(config.run_dir)
    tokens, seconds, ratio = 0, 0.0, before.capture_ratio
    if missing:
        with lasting_interrupts() as check_interrupt:
            started = time.monotonic()
            engine = open_engine(config, score=kind == "score")
            log.info(
                "vLLM %s is up after %.0f s: %s, head in %s, rows captured through %s",
                version, time.monotonic() - started, config.teacher.dtype, engine.head_dtype, engine.capture,
            )  # fmt: skip
            try:
                if config.collect.measure_capture and kind == "collect":
                    ratio = measure_capture(engine, [renderer.render(t.prompt).ids for u in units[:4] for t in u.tasks])
                collector = Collector(config, renderer, vocabulary, writer, engine)
                tokens, seconds = _work(collector, missing, units, kind, check_interrupt)
            finally:
                engine.close()
    manifest: Manifest = writer.finish(names)
    if not missing:
        return (
            before if before.tokens == manifest.tokens else summarize(config, Dataset.open(config.shards_dir), before)
        )
    rate = tokens / seconds if seconds else None
    before = Summary(tokens_per_s=rate, capture_ratio=ratio)
    return summarize(config, Dataset.open(config.shards_dir), before)


def _work(
    collector: Collector, missing: Sequence[Unit], units: Sequence[Unit], kind: str, check_interrupt: Callable[[], None]
) -> tuple[int, float]:
    """Collect the missing units under a progress bar; tokens and seconds that it took."""
    label = {"collect": "answering", "score": "scoring"}[kind]
    responses = sum(len(unit.tasks) for unit in units)
    there = responses - sum(len(unit.tasks) for unit in missing)
    started = time.monotonic()
    with progress() as bar:
        task = bar.add_task(label, total=responses, completed=there, note="")

        def show() -> None:
            check_interrupt()
            bar.update(task, advance=1, note=f"{collector.tokens / (time.monotonic() - started):,.0f} tokens/s")

        collector.on_answer = show
        for entry in collector.collect_units(missing):
            log.debug("unit %s: %d responses, %d tokens, %d bytes", entry.unit, entry.rows, entry.tokens, entry.bytes)
    return collector.tokens, time.monotonic() - started


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
