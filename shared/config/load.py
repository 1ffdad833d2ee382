"""Reading a config: YAML, overrides, validation, and messages that name the key."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from shared.config.pipeline import PipelineConfig
from shared.config.section import Section, section_of
from shared.errors import ConfigError

CHANGED_KEYS = {
    "collect.decoding.max_tokens": "now `max_response_tokens`",
    "prepare.events": "removed: events are always what `spelled` named; delete this line",
    "prepare.store": "removed: targets are always stored; delete this line",
    "prepare.search_width": "removed with `prepare.events: exact`, the only setting that used it; delete this line",
    "speculate.drafter.lookup": "now `speculate.lookup`",
    "speculate.drafter.max_context_tokens": "now `speculate.max_context_tokens`",
    "speculate.drafter.policy": "now `speculate.policy`",
    "speculate.max_context": "now `max_context_tokens`",
    "speculate.max_tokens": "now `max_response_tokens`",
    "student.max_sequence_length": "now `max_sequence_tokens`",
    "teacher.max_model_len": "now `max_sequence_tokens`",
    "train.max_length": "now `max_sequence_tokens`",
}
"""Keys of earlier versions, without the numbers of list items: what became of them and what to do."""
MAY_HOLD_SECRETS = ("teacher.service", "teacher.engine_args")
"""Keys whose values no message repeats."""


def load_config(path: Path, overrides: list[str] | None = None) -> PipelineConfig:
    """Read `path`, apply `KEY.PATH=VALUE` overrides (values are YAML) and validate the whole.

    Raises:
        ConfigError: if the file is missing or not a YAML mapping, an override is malformed, a key is unknown
            or a value is out of its range; every problem is listed with its key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot read the config {path}: {error.strerror}; pass a YAML file such as configs/demo.yaml"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text at byte {error.start}: {error.reason}; save it as UTF-8"
        ) from error
    tree = _parse(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path} holds {type(tree).__name__}, expected a mapping of sections such as teacher: and train:"
        )
    for override in overrides or []:
        apply_override(tree, override)
    try:
        return PipelineConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path} is not a valid config:\n" + "\n".join(_explain(error))) from error


def dump_config(config: PipelineConfig) -> str:
    """The resolved config as YAML, to be written beside every output."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def apply_override(tree: dict[str, Any], override: str, option: str = "--set", example: str = "train.loss=kl") -> None:
    """Put the value of `KEY.PATH=VALUE` into `tree`; `option` and its `example` are for messages.

    Raises:
        ConfigError: if it is malformed.
    """
    key, separator, value = override.partition("=")
    parts = key.split(".")
    if not separator or not all(parts):
        raise ConfigError(f"{option} {override!r} is not KEY.PATH=VALUE, for example {option} {example}")
    node = tree
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(
                f"{option} {override!r}: {part!r} is a value ({child!r}), not a section that can hold {parts[-1]!r}"
            )
        node = child
    node[parts[-1]] = _parse(value, f"{option} {override!r}: the value")


def _parse(text: str, what: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a ValueError: a date that no calendar has
        raise ConfigError(f"{what} is not valid YAML: {error}") from error


def _explain(error: ValidationError) -> list[str]:
    """One line a problem: the key, the value seen (unless it may hold a secret) and what was expected. For an unknown
    key: what became of it, if an earlier version had it, or a near miss."""
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        named = ".".join(part for part in problem["loc"] if isinstance(part, str))
        if problem["type"] == "extra_forbidden" and named in CHANGED_KEYS:
            lines.append(f"  {key}: {CHANGED_KEYS[named]}")
        elif problem["type"] == "extra_forbidden":
            known = _known_keys(problem["loc"][:-1])
            near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            lines.append(f"  {key}: unknown key; {hint}")
        elif problem["type"] == "missing":
            lines.append(f"  {key}: missing; this key is required")
        elif named.startswith(MAY_HOLD_SECRETS):
            lines.append(f"  {key}: {problem['msg']}")
        else:
            lines.append(f"  {key}: {problem['msg']} (got {problem['input']!r})" if key else f"  {problem['msg']}")
    return lines


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    section: type[Section] | None = PipelineConfig
    for part in location:
        if section is not None and isinstance(part, str):
            section = section_of(section.model_fields[part].annotation)
    return [] if section is None else list(section.model_fields)
