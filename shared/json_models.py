"""What JSON that people hand in may say: strict types, ranges and keys, checked before anything is made of them.

`checked` turns the first problem into one message. A null stands for a key that is not there.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from shared.dataset.records import Message
from shared.errors import UserError
from shared.json_input import is_schematic


def _whole_characters(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} is the lone surrogate {text[error.start]!r}, half of a character; "
            "take it out, or write the whole character"
        ) from error
    return text


Text = Annotated[str, AfterValidator(_whole_characters)]
Name = Annotated[Text, Field(min_length=1)]


class Strict(BaseModel):
    """Base: exact types, no unknown keys, no infinities; nulls are left out."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


class Turn(Strict):
    """One turn of a conversation."""

    role: Name
    content: Text


Turns = Annotated[list[Turn], Field(min_length=1)]


def to_messages(turns: list[Turn]) -> tuple[Message, ...]:
    """The turns as records have them."""
    return tuple(Message(turn.role, turn.content) for turn in turns)


Model = TypeVar("Model", bound=Strict)


def checked(model: type[Model], value: Any, where: str, kind: type[UserError], example: str) -> Model:
    """`value` as a `model`.

    Args:
        where: the place of `value`, for messages. example: of what was expected there.

    Raises:
        kind: naming the key, the value seen and the one expected, for the first of the problems.
    """
    known = list(model.model_fields)
    if not isinstance(value, dict):
        raise kind(f"{where} holds {_seen(value)}, expected an object; the file should be {example}")
    if not value.keys() & set(known):
        inside = [key for key, held in value.items() if isinstance(held, list) and held and isinstance(held[0], dict)]
        if inside:
            raise kind(
                f"{where} is an object whose {inside[0]!r} is a list of entries; "
                f"save that list alone as the file (jq .{inside[0]} FILE); expected {example}"
            )
    for key in value.keys() - set(known):
        near = difflib.get_close_matches(_plain(key), map(_plain, known), n=1, cutoff=0.86)
        if near or model.model_config["extra"] == "forbid":
            meant = [name for name in known if near and _plain(name) == near[0]]
            hint = f"did you mean {meant[0]!r}?" if meant else f"known keys: {', '.join(known)}"
            raise kind(f"{where}: unknown key {key!r}, correct it or take it out; {hint}")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problem = min(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"])[1:]
    seen = problem["input"]
    if problem["type"] == "missing":
        raise kind(f"{where}: {path} is missing; expected {example}")
    if problem["type"] == "extra_forbidden":
        raise kind(f"{where}: {path} is not a known key; take it out")
    expected = _EXPECTED.get(problem["type"], problem["msg"].removeprefix("Input should be "))
    if problem["type"] == "value_error":
        expected = f"whole text: {problem['ctx']['error']}" if path else str(problem["ctx"]["error"])
    if isinstance(seen, str) and problem["type"] in ("int_type", "float_type"):
        expected += f", without quotes; {example}" if is_schematic(seen) else ", without quotes"
    elif problem["type"] == "list_type" and path in ("prompt", "messages"):
        expected = "a list of {role, content}" if path == "messages" else "text, or a list of {role, content}"
    elif is_schematic(seen):
        expected += f": dots stand for values in a schematic example; a real one is {example}"
    elif problem["type"] in ("float_type", "finite_number") and isinstance(problem["loc"][-1], int):
        expected += ", or null where it is unknown"
    raise kind(f"{where}: {path} is {_seen(seen)}, expected {expected}" if path else f"{where}: {expected}")


_EXPECTED = {
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "list_type": "a list",
    "too_short": "one that is not empty",
    "model_type": "an object",
    "model_attributes_type": "an object",
}


def _plain(key: str) -> str:
    return key.lower().replace("_", "").replace("-", "")


def _seen(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, list | dict) and len(repr(value)) > 60:
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
