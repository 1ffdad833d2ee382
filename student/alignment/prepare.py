"""`student prepare`: a dataset's rows as targets over the student's vocabulary, once, in parallel and resumable.

A unit of the dataset is a unit here. Its key covers the shard's checksum, both tokenizers and the settings: a rerun
does the units whose key has no finished file, and nothing else. Workers are processes with one unit at a time, so
memory is bounded by a unit's records. Costs about 30 µs a teacher token and core at k = 64.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shared.config import PipelineConfig, PrepareConfig
from shared.console import progress
from shared.dataset.manifest import COMMITS, DATA, MANIFEST
from shared.dataset.reader import Dataset
from shared.dataset.units import UnitStore
from shared.errors import AlignmentError, CheckpointError, DatasetError
from shared.files import write_json
from shared.tokenizer.vocabulary import Encoder, load_tokenizer
from student.alignment.align import Aligner
from student.alignment.prepared import (
    INDEX,
    INDEX_SCHEMA,
    VERSION,
    PreparedDataset,
    PreparedUnit,
    damaged_units,
    data_file,
    unit_bytes,
    unit_store,
)
from student.alignment.tables import PairTables
from student.alignment.targets import AlignedSample
from student.lineage import (
    IDENTITY,
    dataset_fingerprint,
    prepared_identity,
    require_current_start,
    sha256_of,
    tokenizer_fingerprint,
)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Source:
    """What samples are made from: the dataset and an aligner for it.

    Attributes:
        key: sha256 over the tokenizers and settings, which decide the samples of a shard.
        identity: names the dataset and the student's tokenizer, beside the settings (`student.lineage`).
    """

    dataset: Dataset
    aligner: Aligner
    key: str
    identity: dict[str, Any]


@dataclass(frozen=True, slots=True)
class PrepareSummary:
    """What `prepare` did, for people; `summary.json` holds the same.

    Attributes:
        positions: student tokens of responses. supervised_fraction: share of them with a soft target.
        mapped_mass: mean mass in events at those.
        counts: as `Aligner.align`, summed over the dataset.
        units_done: units aligned by this call; the others were there.
    """

    samples: int
    positions: int
    supervised_fraction: float
    mapped_mass: float | None
    teacher_tokens: int
    seconds: float
    tokens_per_s: float | None
    units_done: int
    counts: dict[str, float]


def open_source(dataset_path: str | Path, tokenizer: Path, settings: PrepareConfig) -> Source:
    """The dataset at `dataset_path` with an aligner for the student's `tokenizer`.

    Raises:
        DatasetError, VocabularyError: if one of them is missing, damaged, or not what the other expects.
    """
    dataset = Dataset.open(dataset_path)
    teacher = dataset.vocabulary
    teacher_encoder = Encoder.from_tokenizer(dataset.tokenizer_dir, teacher)
    student, encoder = load_tokenizer(tokenizer)
    tables = PairTables(teacher, student, encoder, teacher_encoder)
    key = sha256_of(
        str(VERSION),
        teacher.fingerprint,
        json.dumps(teacher.roles),
        teacher_encoder.fingerprint,
        student.fingerprint,
        json.dumps(student.roles),
        encoder.fingerprint,
        settings.model_dump_json(exclude={"workers"}),
    )
    inputs = {
        "dataset": dataset_fingerprint(dataset.manifest),
        "teacher vocabulary": teacher.fingerprint,
        "tokenizer": tokenizer_fingerprint(student, encoder),
    }
    return Source(dataset, Aligner(tables, settings), key, prepared_identity(settings, inputs))


def prepare(config: PipelineConfig) -> PrepareSummary:
    """Align every record of `config.shards_dir` into `config.prepared_dir`.

    Raises:
        DatasetError: if there is no dataset, or it is damaged.
        CheckpointError: if the student has no tokenizer yet. StaleError: if other settings made it.
        VocabularyError: if a tokenizer is not the one expected or lacks bytes.
        AlignmentError: if no record can be used, with the reasons.
    """
    if not config.student_init_dir.is_dir():
        raise CheckpointError(
            f"{config.student_init_dir} does not exist, so there is no student's tokenizer to prepare for; "
            "run `student init` with this config first"
        )
    require_current_start(config)
    started = time.monotonic()
    source = open_source(config.shards_dir, config.student_init_dir, config.prepare)
    target = config.prepared_dir
    units = source.dataset.manifest.units
    keys = {unit.unit: sha256_of(source.key, unit.sha256) for unit in units}
    store = unit_store(target)
    store.storage.clear_partial()
    done = _done_units(target, store, keys)
    pending = [unit for unit in keys if unit not in done]
    if not pending and (finished := _finished(config, source, keys)):
        _logger.info("already prepared: %s", target)
        return finished
    if pending:
        (target / MANIFEST).unlink(missing_ok=True)  # what is there is about to change
    with progress() as bar:
        task = bar.add_task("Preparing targets", total=len(units), completed=len(units) - len(pending), note="")
        tokens = 0
        for entry in _align_units(config, source, pending, keys):
            done[entry.unit] = entry
            tokens += int(entry.counts.get("teacher_tokens", 0))
            bar.update(task, advance=1, note=f"{tokens / (time.monotonic() - started):,.0f} tokens/s")
    entries = [done[unit] for unit in keys]
    summary = _summarize(entries, len(pending), tokens, time.monotonic() - started)
    if not summary.samples:
        reasons = ", ".join(_met(summary.counts)) or "it is empty"
        raise AlignmentError(f"no record of {config.shards_dir} can be used: {reasons}")
    _publish(target, source, entries, summary)
    PreparedDataset.open(target).verify()  # reads back what was written; training then need not
    _report(summary)
    return summary


def _finished(config: PipelineConfig, source: Source, keys: dict[str, str]) -> PrepareSummary | None:
    """The summary of an earlier call that published exactly these units."""
    try:
        published = PreparedDataset.open(config.prepared_dir)
    except DatasetError:
        return None
    if (published.fingerprint, published.identity) != (_fingerprint(keys), source.identity):
        return None
    return PrepareSummary(**(published.manifest["summary"] | {"units_done": 0}))


def _fingerprint(keys: dict[str, str]) -> str:
    return sha256_of(*(f"{unit}={key}" for unit, key in keys.items()))


def _done_units(directory: Path, store: UnitStore[PreparedUnit], keys: dict[str, str]) -> dict[str, PreparedUnit]:
    """Units that are aligned already, by what `keys` say now, and whole."""

    def again(error: DatasetError) -> None:
        _logger.warning("%s; doing this unit again", error)

    current = {unit: entry for unit, entry in store.committed(again).items() if entry.key == keys.get(unit)}
    damaged = damaged_units(directory, {unit: entry.sha256 for unit, entry in current.items()}) if current else {}
    for error in damaged.values():
        again(error)
    return {unit: entry for unit, entry in current.items() if unit not in damaged}


# --- workers --------------------------------------------------------------------------------------------

_source: Source | None = None


def _align_units(
    config: PipelineConfig, source: Source, pending: list[str], keys: dict[str, str]
) -> Iterator[PreparedUnit]:
    """Align units as they get done; in this process where one worker is enough."""
    workers = min(config.prepare.workers or len(os.sched_getaffinity(0)), len(pending))
    store = unit_store(config.prepared_dir)
    if workers <= 1:
        for unit in pending:
            yield _align_unit(source, unit, keys[unit], store)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes are the parallelism
    # spawn: a fork would copy the threads of tokenizers and Arrow mid-flight.
    context = multiprocessing.get_context("spawn")
    arguments = (str(config.shards_dir), config.student_init_dir, config.prepare)
    with ProcessPoolExecutor(workers, context, _start_worker, arguments) as pool:
        futures = [pool.submit(_work, unit, keys[unit], store) for unit in pending]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, no unit is begun any more


def _start_worker(dataset: str, tokenizer: Path, settings: PrepareConfig) -> None:
    global _source  # a worker process has one source for its life
    _source = open_source(dataset, tokenizer, settings)


def _work(unit: str, key: str, store: UnitStore[PreparedUnit]) -> PreparedUnit:
    assert _source is not None
    return _align_unit(_source, unit, key, store)


def _align_unit(source: Source, unit: str, key: str, store: UnitStore[PreparedUnit]) -> PreparedUnit:
    counts: Counter[str] = Counter()
    index: list[dict[str, Any]] = []

    def samples() -> Iterator[AlignedSample]:
        for record in source.dataset.records(unit=unit):
            sample, met = source.aligner.align(record)
            counts.update(met)
            if sample is not None:
                index.append(_index_entry(sample, unit, len(index)))
                yield sample

    data = unit_bytes(samples())
    digest = hashlib.sha256(data).hexdigest()
    entry = PreparedUnit(
        unit=unit, file=data_file(unit), sha256=digest, bytes=len(data), key=key, counts=dict(counts), index=index
    )
    # What is there is of other settings, or damaged.
    return store.publish(entry, data, adopt=lambda _: None)


def _index_entry(sample: AlignedSample, unit: str, batch: int) -> dict[str, Any]:
    derived = {
        "unit": unit,
        "batch": batch,
        "length": len(sample.input_ids),
        "soft": int((~np.isnan(sample.targets.tail)).sum()),
        "anchors": int(sample.is_anchor.sum()),
        "with_distributions": not bool(np.isnan(sample.targets.known).all()),
    }
    return {name: derived[name] if name in derived else getattr(sample, name) for name in INDEX_SCHEMA.names}


# --- summary and manifest -------------------------------------------------------------------------------


def _summarize(entries: list[PreparedUnit], done: int, tokens: int, seconds: float) -> PrepareSummary:
    counts: Counter[str] = Counter()
    for entry in entries:
        counts.update(entry.counts)
    positions, soft = counts["positions"], counts["soft"]
    return PrepareSummary(
        samples=sum(len(entry.index) for entry in entries),
        positions=positions,
        supervised_fraction=soft / positions if positions else 0.0,
        mapped_mass=counts["mapped_mass"] / soft if soft else None,
        teacher_tokens=counts["teacher_tokens"],
        seconds=seconds,
        tokens_per_s=tokens / seconds if done else None,
        units_done=done,
        counts=dict(sorted(counts.items())),
    )


def _publish(target: Path, source: Source, entries: list[PreparedUnit], summary: PrepareSummary) -> None:
    """Write what readers open, the manifest last, and take away what is of no unit."""
    index = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([row for entry in entries for row in entry.index], schema=INDEX_SCHEMA), index)
    index_bytes = index.getvalue().to_pybytes()
    figures = asdict(summary)
    manifest = {
        "version": VERSION,
        "fingerprint": _fingerprint({entry.unit: entry.key for entry in entries}),
        IDENTITY: source.identity,
        "units": {entry.unit: {"sha256": entry.sha256} for entry in entries},
        "index_sha256": hashlib.sha256(index_bytes).hexdigest(),
        "summary": figures,
    }
    storage = unit_store(target).storage
    storage.write(INDEX, index_bytes)
    write_json(target / "summary.json", figures)
    write_json(target / MANIFEST, manifest)
    kept = {entry.unit for entry in entries}
    for file in (*storage.list(DATA), *storage.list(COMMITS)):
        if Path(file).stem not in kept:
            (target / file).unlink()
    shutil.rmtree(target / "units", ignore_errors=True)  # where an earlier release had its commits
    storage.clear_partial()


REASONS = {
    "empty": "responses without tokens",
    "bytes_mismatch": "responses whose tokens are other bytes than their text",
    "outside_vocabulary": "texts with ids outside the teacher's vocabulary",
    "dropped_changed_text": "responses dropped because the student's normalizer would change them",
    "no_student_tokens": "responses of special tokens alone, whose roles the student lacks",
    "changed_text": "responses that the student's normalizer would change, encoded byte by byte",
    "cut_character": "responses cut inside a character",
    "unusable_rows": "positions whose row has an unknown tail, or probabilities that do not add up",
    "contradictions": "positions whose text is impossible by its own row: rows and tokens may be shifted",
    "unknown_observed": "positions where the teacher's probability of the text is unknown",
    "below_known_mass": "positions below prepare.min_known_mass",
    "disagreements": "positions where the teacher's token and the student's are unrelated by their vocabularies alone",
    "dropped_specials": "special tokens whose role the student lacks",
    "inner_specials": "special tokens inside a response",
}


def _met(counts: dict[str, float]) -> list[str]:
    return [f"{counts[name]:,.0f} {text}" for name, text in REASONS.items() if counts.get(name)]


def _report(summary: PrepareSummary) -> None:
    mass = "no soft targets" if summary.mapped_mass is None else f"{summary.mapped_mass:.3f} of the mass mapped"
    _logger.info(
        "prepared %s samples, %s positions, %.1f%% with a soft target, %s",
        f"{summary.samples:,}",
        f"{summary.positions:,}",
        100 * summary.supervised_fraction,
        mass,
    )
    for line in _met(summary.counts):
        _logger.info("  %s", line)
