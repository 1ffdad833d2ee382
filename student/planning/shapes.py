"""The shape that a config's student has, without its weights: `student plan` works before anything is downloaded."""

from __future__ import annotations

from pathlib import Path

from shared.config import PipelineConfig
from shared.errors import ConfigError
from shared.hub import is_hub_name
from student.model.configuration_llada import LladaConfig
from student.model.export import read_config
from student.model.initialize import random_shape
from student.model.source import NO_IDS, changed, config_of_checkpoint

# LladaConfig's defaults are theirs.
PUBLISHED = ("GSAI-ML/LLaDA-8B-Base", "GSAI-ML/LLaDA-8B-Instruct", "GSAI-ML/LLaDA-1.5")


def shape_of(config: PipelineConfig, given: Path | None = None) -> tuple[LladaConfig, str]:
    """The shape, and where it is from.

    In this order: the YAML file `given`; the run's start; for a random start `student.shape`; the checkpoint's
    config.json, in its directory or in the hub's cache; what is published of LLaDA-8B.

    Raises:
        ConfigError: if none of these is there.
    """
    student = config.student
    if given is None and (config.student_init_dir / "config.json").exists():
        return read_config(config.student_init_dir), f"{config.student_init_dir}"
    if given is not None or student.checkpoint is None:
        asked = student.shape if given is None else given
        shape, source = random_shape(asked), "student.shape" if given is None else f"{given}"
    elif (directory := _directory(student.checkpoint, student.revision)) is not None:
        shape, source = config_of_checkpoint(directory)[1], student.checkpoint
    elif student.checkpoint in PUBLISHED:
        shape, source = LladaConfig(), f"{student.checkpoint}, as published"
    else:
        raise ConfigError(
            f"the shape of student.checkpoint {student.checkpoint} is unknown here: it is no directory and not in the "
            "hub's cache; run `student init` first, or give --shape FILE, such as configs/shapes/llada-8b.yaml"
        )
    if student.layers is not None:
        shape = changed(shape, n_layers=len(student.layers))
        source += f", {len(student.layers)} layers"
    if student.tokenizer.kind == "trained":
        size = student.tokenizer.vocab_size
        shape = changed(shape, vocab_size=size, embedding_size=size, **NO_IDS)
    if student.weight_tying is not None:
        shape = changed(shape, weight_tying=student.weight_tying)
    return shape, source


def _directory(name: str, revision: str | None) -> Path | None:
    """Where the checkpoint's config.json lies on this machine."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision) if is_hub_name(name) else None
    return Path(found).parent if isinstance(found, str) else None
