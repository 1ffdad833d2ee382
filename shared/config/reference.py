"""`configs/reference.yaml`: every key of the configuration with its default, its type and its meaning.

    python -m shared.config.reference > configs/reference.yaml

It is made of the models in `shared/config/` and is itself a config that loads; a test holds the file to them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from shared.config import PipelineConfig, Section
from shared.config.section import section_of

_HEADER = """\
# Every key of a config, generated from the models by `python -m shared.config.reference`; not meant to be run as it is.
# A value shown is the default. Keys marked "required" have none, and an example stands in its place. A key that is left
# out takes its default, an unknown key is an error, and `--set train.loss=kl` overrides a key for one command.
"""


def reference() -> str:
    """The text of configs/reference.yaml."""
    return _HEADER + "".join(f"{line}\n" for line in _section(PipelineConfig, ""))


def _section(model: type[Section], indent: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        nested = section_of(field.annotation)
        if not indent and nested is not None:
            yield ""
        yield from _comment(_meaning(field, nested), indent)
        yield from _value(name, field, nested, indent)


def _value(name: str, field: FieldInfo, nested: type[Section] | None, indent: str) -> Iterator[str]:
    if nested is None:
        value = (field.examples or [None])[0] if field.is_required() else field.get_default(call_default_factory=True)
        yield f"{indent}{name}: {_scalar(value)}"
    elif field.default is None:  # a section that may be absent: its keys are shown, commented out
        yield f"{indent}{name}: null"
        yield from (f"{indent}#{line[len(indent) :]}" for line in _section(nested, indent + "  "))
    elif "list" in str(field.annotation):
        yield f"{indent}{name}:"
        lines = list(_section(nested, indent + "    "))
        first = next(i for i, line in enumerate(lines) if not line.lstrip().startswith("#"))
        lines[first] = f"{indent}  - {lines[first].strip()}"
        yield from lines
    else:
        yield f"{indent}{name}:"
        yield from _section(nested, indent + "  ")


def _meaning(field: FieldInfo, nested: type[Section] | None) -> str:
    text = field.description or (nested.__doc__ or "").strip()
    if nested is not None:
        return text
    notes = [_kind(field.annotation), *_limits(field.metadata), *(["required"] if field.is_required() else [])]
    return f"{text} [{'; '.join(notes)}]"


def _kind(annotation: Any) -> str:
    """A type as a reader of YAML calls it, its limits included."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return "; ".join([_kind(parts[0]), *_limits(parts[1:])])
    if origin is Literal:
        return ", ".join(map(str, parts))
    if origin in (Union, UnionType):
        return " or ".join(map(_kind, parts))
    if origin in (list, dict):
        return "mapping" if origin is dict else f"list of {_kind(parts[0])}"
    return {NoneType: "null", Path: "path"}.get(annotation, annotation.__name__)


def _limits(metadata: Sequence[Any]) -> list[str]:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    return [f"{sign} {getattr(item, key)}" for item in metadata for key, sign in signs.items() if hasattr(item, key)]


def _comment(text: str, indent: str) -> Iterator[str]:
    for line in textwrap.wrap(" ".join(text.split()), 118 - len(indent), break_long_words=False):
        yield f"{indent}# {line}"


def _scalar(value: Any) -> str:
    plain = value if value is None or isinstance(value, bool | int | float | list | dict) else str(value)
    return yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")


if __name__ == "__main__":
    print(reference(), end="")
