"""What each product of a run was made from, and whether that is still what lies beside it.

    dataset ──► start ──► prepared data ──► trained model ──► evaluate.json, speculate.json ──► report

Each product records its *identity*: a flat mapping of the settings and the fingerprints of the inputs that decide its
content. A command that joins products compares the identity of each with the config and with what lies in the run's
directory now. What is not there is not compared: a cluster that trains needs no shards once they are prepared.

No shard and no whole model is read for it. A dataset's fingerprint is over the checksums in its manifest, a model's
over three samples of each tensor (`student.model.export.weights_fingerprint`), a tokenizer's over its content, which
takes about two seconds at 128k tokens.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from shared.config import PipelineConfig, PrepareConfig, Section
from shared.dataset.manifest import MANIFEST, PROVENANCE, Manifest
from shared.dataset.reader import Dataset
from shared.errors import StaleError
from shared.files import read_json
from shared.tokenizer.vocabulary import Encoder, Vocabulary, load_tokenizer

IDENTITY = "identity"
"""The key under which a product's JSON file has its identity."""
RECORD = "training.json"
"""Beside a trained model: what it was trained from, and a summary."""
SEQUENTIAL_HEAD = "sequential_head.safetensors"
"""Beside a model's weights, where it has such a head (`student/model/sequential_head.py`)."""
TRAINED_FROM = ("dataset", "tokenizer", "start", "prepared data")
"""The inputs of a trained model that may lie in its run's directory."""

_logger = logging.getLogger(__name__)

# Settings that change how a product is made or kept, not what it is.
_WITHOUT_EFFECT = {"prepare": {"workers"}, "student": {"lora"}, "evaluate": {"batch"}}
_DECIDES_DRAFTS = {"block_length", "draft_vocabulary", "denoising_steps", "denoising_order", "keep_extendable"}


# --- fingerprints ---------------------------------------------------------------------------------------


def dataset_fingerprint(manifest: Manifest) -> str:
    """sha256 over the manifest's checksums of the shards, in order, and of the teacher's vocabulary and tokenizer."""
    parts = [f"{entry.name}={entry.sha256}" for entry in manifest.files if entry.name != PROVENANCE]
    parts += [f"{unit.unit}={unit.sha256}" for unit in manifest.units]
    return sha256_of(manifest.vocabulary_fingerprint, *parts)


def tokenizer_fingerprint(vocabulary: Vocabulary, encoder: Encoder) -> str:
    """sha256 over the tokens, their roles, and how text is encoded."""
    return sha256_of(vocabulary.fingerprint, json.dumps(vocabulary.roles, sort_keys=True), encoder.fingerprint)


def sha256_of(*parts: str) -> str:
    """In hex, over all of them in order."""
    return hashlib.sha256("|".join(parts).encode()).hexdigest()


def present(config: PipelineConfig, *names: str) -> dict[str, str]:
    """The fingerprints of those of `names`, of `INPUTS`, that lie in the run's directory now."""
    found = {name: INPUTS[name].fingerprint(INPUTS[name].place(config)) for name in names}
    return {name: fingerprint for name, fingerprint in found.items() if fingerprint is not None}


def manifest_of(shards: Path) -> Manifest | None:
    """The manifest of the dataset at `shards`, where there is one."""
    return Dataset.open(shards).manifest if (shards / MANIFEST).exists() else None


def _dataset(shards: Path) -> str | None:
    manifest = manifest_of(shards)
    return None if manifest is None else dataset_fingerprint(manifest)


def _teacher_vocabulary(shards: Path) -> str | None:
    manifest = manifest_of(shards)
    return None if manifest is None else manifest.vocabulary_fingerprint


def _tokenizer(directory: Path) -> str | None:
    return tokenizer_fingerprint(*load_tokenizer(directory)) if (directory / "tokenizer.json").exists() else None


def _prepared(directory: Path) -> str | None:
    return (read_json(directory / MANIFEST) or {}).get("fingerprint")


def _weights(directory: Path) -> str | None:
    from student.model.export import weights_fingerprint

    return weights_fingerprint(directory) if (directory / "config.json").exists() else None


class Input(NamedTuple):
    """Where an input lies in a run, and its fingerprint there; None where it is not."""

    place: Callable[[PipelineConfig], Path]
    fingerprint: Callable[[Path], str | None]


INPUTS = {
    "dataset": Input(lambda config: config.shards_dir, _dataset),
    "teacher vocabulary": Input(lambda config: config.shards_dir, _teacher_vocabulary),
    "tokenizer": Input(lambda config: config.student_init_dir, _tokenizer),
    "start": Input(lambda config: config.student_init_dir, _weights),
    "prepared data": Input(lambda config: config.prepared_dir, _prepared),
    "model": Input(lambda config: config.student_final_dir, _weights),
}


# --- identities -----------------------------------------------------------------------------------------


def start_identity(config: PipelineConfig) -> dict[str, Any]:
    """Of `student init`'s product.

    A vocabulary that was trained on an older dataset stays usable, so the dataset is no part of it. The teacher's
    vocabulary is, where it became the student's, and so is a checkpoint in a local directory.
    """
    identity = _settings("student", config.student) | shape_file(config)
    if config.student.checkpoint is None:
        identity["seed"] = config.seed
    elif (weights := _weights(Path(config.student.checkpoint))) is not None:
        identity["checkpoint"] = weights
    if config.student.tokenizer.kind == "teacher":
        identity |= present(config, "teacher vocabulary")
    return identity


def shape_file(config: PipelineConfig) -> dict[str, Any]:
    """What the file of `student.shape` holds, as part of an identity: its path stays when it is edited."""
    shape = config.student.shape
    if config.student.checkpoint is not None or not isinstance(shape, Path) or not shape.exists():
        return {}
    from student.model.initialize import read_shape

    return {"shape": read_shape(shape)}


def prepared_identity(settings: PrepareConfig, inputs: dict[str, str]) -> dict[str, Any]:
    """Of `student prepare`'s product; `inputs` are `dataset`, `teacher vocabulary` and `tokenizer`."""
    return _settings("prepare", settings) | inputs


def evaluation_identity(config: PipelineConfig) -> dict[str, Any]:
    """Of evaluate.json. Of the training's settings it has those by which held-out text is laid out and masked, of the
    drafter's those that decide what is drafted."""
    identity = _settings("evaluate", config.evaluate)
    identity["speculate.drafter"] = config.speculate.drafter.model_dump(include=_DECIDES_DRAFTS, exclude_defaults=True)
    identity["speculate.max_context_tokens"] = config.speculate.max_context_tokens
    identity |= present(config, "dataset", "prepared data", "start", "model")
    train = _settings("train", config.train)
    layout = {"train.block_length", "train.max_sequence_tokens", "train.objectives"}
    if config.train.objectives.random_masking:
        layout.add("train.random_masking")
        identity["seed"] = config.seed
    return identity | {key: train[key] for key in layout}


def speculation_identity(config: PipelineConfig) -> dict[str, Any]:
    """Of speculate.json, and of what else decodes with the student and the teacher."""
    identity = _settings("speculate", config.speculate) | present(config, "dataset", "model")
    identity["speculate.drafter"] = config.speculate.drafter.model_dump(exclude_defaults=True)
    if config.speculate.dtype is None:
        identity["teacher.dtype"] = config.teacher.dtype
    return identity | {"teacher.quantization": config.teacher.quantization}


def _settings(name: str, section: Section) -> dict[str, Any]:
    values = section.model_dump(mode="json", exclude=_WITHOUT_EFFECT.get(name))
    return {f"{name}.{key}": value for key, value in values.items()}


# --- comparison -----------------------------------------------------------------------------------------


def differences(made: Mapping[str, Any], now: Mapping[str, Any], config: PipelineConfig | None = None) -> list[str]:
    """`key: its value there, its value now` for all of `now` that `made` has recorded otherwise.

    Args:
        config: of the run, to say where an input lies.
    """
    return [
        f"{key}: {_shown(made[key])} there, {_shown(now[key])} now"
        + (f" in {INPUTS[key].place(config)}" if config is not None and key in INPUTS else "")
        for key in sorted(made.keys() & now.keys())
        if made[key] != now[key]
    ]


def unrecorded(made: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`key: …` for all of `now` that `made` does not say, where silence is no agreement."""
    return [f"{key}: not recorded there" for key in sorted(now.keys() - made.keys())]


def _shown(value: Any) -> str:
    is_fingerprint = isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
    return value[:12] if is_fingerprint else repr(value)


def require_same(
    where: Path, made: Mapping[str, Any], now: Mapping[str, Any], fix: str, config: PipelineConfig
) -> None:
    """Hold the identity of the product at `where` against what its inputs and settings are now.

    Raises:
        StaleError: naming all that differs, with both values, and `fix`.
    """
    if found := differences(made, now, config):
        raise StaleError(
            f"{where} was made from other inputs or settings than those of now ({'; '.join(found)}); {fix}"
        )


def require_current_start(config: PipelineConfig) -> None:
    """Refuse a start that other settings made. One without a record (made by hand, or long ago) is taken as it is.

    Raises:
        StaleError: if `student init` has to be run again.
    """
    directory = config.student_init_dir
    record = read_json(directory / "initialization.json") or {}
    made, now = record.get(IDENTITY) or {}, start_identity(config)
    require_same(directory, made, now, "run `student init` again, or restore the settings", config)
    if config.student.tokenizer.kind == "trained" and (
        found := differences(record, present(config, "dataset"), config)
    ):
        _logger.warning(
            "the vocabulary of %s was trained on another dataset (%s): it is usable, `student init` trains a new one",
            directory,
            found[0],
        )


def require_current_model(
    config: PipelineConfig, settings: dict[str, Any] | None = None, way_out: str = "restore what it was trained from"
) -> None:
    """Refuse a trained model that is not of the run's dataset, start and prepared data, or has other `settings`.

    Args:
        settings: of its training; None is the block length.

    Raises:
        StaleError: if it has to be trained again.
    """
    directory = config.student_final_dir
    record = read_json(directory / RECORD)
    if record is None:
        _logger.warning("%s does not say what it was trained from (no training.json); it is taken as it is", directory)
        return
    made = record.get(IDENTITY) or {}
    settings = {"train.block_length": config.train.block_length} if settings is None else settings
    now = present(config, *TRAINED_FROM) | settings
    if unknown := sorted(now.keys() - made.keys()):
        _logger.warning("%s does not record its %s, which is not checked", directory, ", ".join(unknown))
    require_same(directory, made, now, f"run `student train --fresh`, or {way_out}", config)


def config_of(run: Path) -> PipelineConfig:
    """A config that knows the paths of the run at `run`, and nothing else."""
    return PipelineConfig.model_construct(runs=run.parent, name=run.name)  # type: ignore[call-arg]


def require_start_of_run(run: Path, checkpoint: Path, made: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of the run at `run` whose start, which completes it, is there no more.

    Args:
        made: the identity that the checkpoint records.

    Raises:
        StaleError: naming what differs.
    """
    config = config_of(run)
    fix = "restore the start that it was trained from, or train anew"
    require_same(checkpoint, made, present(config, "tokenizer", "start"), fix, config)


def warn_of_another_teacher(student: Path, teacher: Vocabulary) -> None:
    """Say so where a student is about to draft for another vocabulary than it was trained for. The output is the
    target's all the same, and a served checkpoint may have a token more: so this is no error."""
    made = (read_json(student / RECORD) or {}).get(IDENTITY) or {}
    if found := differences(made, {"teacher vocabulary": teacher.fingerprint}):
        _logger.warning("%s was trained for another teacher (%s); few drafts may be accepted", student, found[0])
