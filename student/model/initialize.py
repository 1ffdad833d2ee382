"""`student init`: make the model that training starts from.

A body (layers of a LLaDA or LLaMA-architecture checkpoint, or random weights) and a vocabulary (the checkpoint's,
the teacher's, or one trained on the dataset's training text) are chosen apart; where they differ, the embedding and
the head are transplanted (`transplant`). What was done is written beside the weights as initialization.json.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from shared.config import PipelineConfig, dump_config
from shared.dataset.reader import Dataset
from shared.errors import ConfigError
from shared.files import new_directory, read_json, write_json
from shared.tokenizer.vocabulary import Vocabulary, load_tokenizer
from student.lineage import IDENTITY, SEQUENTIAL_HEAD, present, start_identity
from student.model.export import save_student
from student.model.source import EMBEDDING, HEAD, NO_IDS, Source, changed
from student.model.tokenizer import MASK, pretrained_tokenizer, train_tokenizer
from student.model.transplant import plan_transplant

if TYPE_CHECKING:
    from torch import Tensor

    from student.model.configuration_llada import LladaConfig

_logger = logging.getLogger(__name__)


def initialize_student(config: PipelineConfig) -> Path:
    """Write the student's starting point to `config.student_init_dir`, whole or not at all; an older one goes.

    One that the same settings and inputs made is left as it is.

    Raises:
        ConfigError: if the settings contradict one another or name layers that do not exist.
        CheckpointError: if the checkpoint is missing or not of a supported architecture.
        DatasetError: if the vocabulary comes from the dataset and there is none.
    """
    import torch

    from student.model.modeling_llada import LladaForMaskedDiffusion

    settings = config.student
    made_from = present(config, "dataset") if settings.tokenizer.kind == "trained" else {}
    identity = {IDENTITY: start_identity(config)} | made_from
    record = read_json(config.student_init_dir / "initialization.json") or {}
    if {key: record.get(key) for key in identity} == identity:
        _logger.info("already initialized: %s", config.student_init_dir)
        return config.student_init_dir
    source = None if settings.checkpoint is None else Source.open(settings.checkpoint, settings.revision)
    if source is not None and settings.layers is not None:
        source = source.keep_layers(settings.layers)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = _tokenizer(config, source)
        tokenizer.save_pretrained(scratch)
        # The mask is the one role that a tokenizer without settings for it must be told.
        new = Vocabulary.from_tokenizer(scratch, roles={"mask": tokenizer.mask_token_id})
    transplanted: dict[str, float] | None = None
    if source is None:
        shape = _student_config(_with_vocabulary(random_shape(settings.shape), new), new, config)
        torch.manual_seed(config.seed)
        model = LladaForMaskedDiffusion(shape)
        weights = model.state_dict()
    else:
        weights, shape, transplanted = _weights_of(source, new, settings.weight_tying)
        shape = _student_config(shape, new, config)
        with torch.device("meta"):
            model = LladaForMaskedDiffusion(shape)
    summary = _summary(config, source, shape, new, transplanted, sum(tensor.numel() for tensor in weights.values()))
    with new_directory(config.student_init_dir) as partial:
        save_student(model, tokenizer, partial, state_dict=weights)
        if source is not None and (draft_head := source.directory / SEQUENTIAL_HEAD).exists():
            shutil.copyfile(draft_head, partial / SEQUENTIAL_HEAD)
            _logger.info("its sequential head goes along: a train.sequential_rank equal to its rank trains it on")
        (partial / "resolved_config.yaml").write_text(dump_config(config), encoding="utf-8")
        write_json(partial / "initialization.json", summary | identity)
    _logger.info("%s: %s", config.student_init_dir, summary["text"])
    return config.student_init_dir


def _weights_of(
    source: Source, new: Vocabulary, weight_tying: bool | None
) -> tuple[dict[str, Tensor], LladaConfig, dict[str, float] | None]:
    """The checkpoint's weights with a row for each token of `new`, their shape, and what was transplanted for it."""
    weights = source.state_dict()
    tied = source.config.weight_tying if weight_tying is None else weight_tying
    if tied and not source.config.weight_tying:
        raise ConfigError(
            f"student.weight_tying is true, but {source.directory} has a head of its own, which tying would drop; "
            "leave the key out"
        )
    if not tied and source.config.weight_tying:
        weights[HEAD] = weights[EMBEDDING].clone()
    shape = changed(source.config, weight_tying=tied)
    known = {"mask": source.config.mask_token_id} if source.family == "llada" else None
    old, encoder = load_tokenizer(source.directory, roles=known)
    if (old.fingerprint, old.roles.get("mask")) == (new.fingerprint, new.roles["mask"]):
        return weights, shape, None
    transplant = plan_transplant(old, encoder, new)
    for name in {EMBEDDING, HEAD} & weights.keys():
        weights[name] = transplant.apply(weights[name])
    return weights, _with_vocabulary(shape, new), transplant.counts


def _with_vocabulary(shape: LladaConfig, vocabulary: Vocabulary) -> LladaConfig:
    return changed(shape, vocab_size=len(vocabulary), embedding_size=len(vocabulary))


def training_texts(config: PipelineConfig) -> Iterator[str]:
    """The text of the dataset's training split: every prompt once, and every response.

    Raises:
        DatasetError: if there is no dataset.
    """
    seen: set[str] = set()
    for record in Dataset.open(config.shards_dir).records(split="train", distributions=False):
        if record.prompt_id not in seen:
            seen.add(record.prompt_id)
            yield from (message.content for message in record.messages)
        yield record.response_bytes.decode("utf-8", "ignore")


def _tokenizer(config: PipelineConfig, source: Source | None) -> Any:
    """The student's tokenizer, with a mask token."""
    settings = config.student.tokenizer
    if settings.kind == "trained":
        return train_tokenizer(
            training_texts(config),
            settings.vocab_size,
            individual_digits=settings.individual_digits,
            max_sequence_tokens=config.student.max_sequence_tokens,
        )
    if settings.kind == "teacher":
        dataset = Dataset.open(config.shards_dir)  # held until the tokenizer is read: a remote one is a temporary copy
        directory = dataset.tokenizer_dir
    elif source is None:
        raise ConfigError(
            "student.tokenizer.kind is 'checkpoint' but student.checkpoint is null; choose 'trained' or 'teacher'"
        )
    else:
        directory = source.directory
    tokenizer = pretrained_tokenizer(directory)
    tokenizer.model_max_length = config.student.max_sequence_tokens
    mask = settings.mask_token
    if mask is not None and mask not in tokenizer.get_vocab():
        raise ConfigError(f"student.tokenizer.mask_token {mask!r} is not a token of {directory}")
    if mask is None and settings.kind == "checkpoint" and source is not None and source.family == "llada":
        mask = str(tokenizer.convert_ids_to_tokens(source.config.mask_token_id))
    if mask is not None or tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": mask or MASK})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def random_shape(given: dict[str, Any] | Path) -> LladaConfig:
    """The config of `student.shape`, without a vocabulary's ids.

    Raises:
        ConfigError: if its file cannot be read, or a field is unknown or wrong.
    """
    from student.model.configuration_llada import LladaConfig

    shape = read_shape(given) if isinstance(given, Path) else given
    unknown = [key for key in shape if not hasattr(LladaConfig(), key)]
    if unknown:
        raise ConfigError(f"student.shape.{unknown[0]} is not a field of LladaConfig")
    try:
        return LladaConfig(**(shape | NO_IDS))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"student.shape: {error}") from error


def read_shape(file: Path) -> dict[str, Any]:
    """What the YAML file of `student.shape` holds.

    Raises:
        ConfigError: if it cannot be read or is no mapping.
    """
    try:
        shape = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"student.shape: cannot read {file}: {error}") from error
    if not isinstance(shape, dict):
        raise ConfigError(f"student.shape: {file} holds no mapping of LladaConfig's fields")
    return shape


def _student_config(shape: LladaConfig, vocabulary: Vocabulary, config: PipelineConfig) -> LladaConfig:
    """`shape` with the vocabulary's special ids, and the configured length."""
    roles = vocabulary.roles
    length = config.student.max_sequence_tokens
    if config.student.checkpoint is not None and length > shape.max_sequence_length:
        raise ConfigError(
            f"student.max_sequence_tokens is {length}, but the checkpoint's positions end at "
            f"{shape.max_sequence_length}; lower it"
        )
    end = roles.get("end_of_text", roles.get("end_of_turn"))
    return changed(
        shape,
        max_sequence_length=length,
        bos_token_id=roles.get("bos"),
        eos_token_id=end,
        pad_token_id=roles.get("pad", end),
        mask_token_id=roles["mask"],
    )


def _summary(
    config: PipelineConfig,
    source: Source | None,
    shape: LladaConfig,
    vocabulary: Vocabulary,
    transplanted: dict[str, float] | None,
    parameters: int,
) -> dict[str, Any]:
    """What initialization.json says."""
    if source is None:
        origin = f"random weights (seed {config.seed})"
    else:
        layers = "all layers" if config.student.layers is None else f"layers {config.student.layers}"
        origin = f"{layers} of {config.student.checkpoint}"
    text = f"{parameters:,} parameters from {origin}, {shape.n_layers} layers"
    if transplanted is not None:
        text += (
            "; vocabulary transplanted, {tokens:,} tokens: {copied_share:.1%} copied from byte-equal tokens, "
            "{composed_share:.1%} composed from their pieces, {special} special tokens by role or name, {mean} started "
            "as the mean"
        ).format(**transplanted)
    return {
        "text": text,
        "checkpoint": config.student.checkpoint,
        "family": None if source is None else source.family,
        "layers": config.student.layers,
        "parameters": parameters,
        "tokenizer": config.student.tokenizer.model_dump(mode="json"),
        "vocabulary": {"tokens": len(vocabulary), "fingerprint": vocabulary.fingerprint, "roles": vocabulary.roles},
        "transplant": transplanted,
    }
