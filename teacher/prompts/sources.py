"""Where prompts come from: JSON, Parquet, text, Hugging Face datasets; each row checked, each prompt with a stable id.

A prompt without an id gets one from its content, so it is the same on every machine and in every order of the file. One
conversation given twice without ids is asked once; under two ids it is asked twice, on one side of the split.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import model_validator

from shared.config import CollectConfig, SourceConfig
from shared.dataset.records import Message
from shared.dataset.split import stable_hash
from shared.errors import MissingExtraError, PromptError
from shared.hub import is_hub_name
from shared.json_input import read_lines, read_values
from shared.json_models import Name, Strict, Text, Turn, Turns, checked, to_messages
from teacher.prompts.prompt import Prompt

log = logging.getLogger(__name__)

_EXAMPLE = (
    'a JSON list, or one a line, of prompts like {"id": "a-1", "skill": "arithmetic", "prompt": "What is 2 + 2?"}'
)
Role = Literal["system", "developer", "user", "assistant", "tool", "ipython"]
_OTHER_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}
_NAMED = 3
"""Duplicates that a message names."""


class PromptLine(Strict):
    """One prompt as its source has it."""

    id: Name | None = None
    skill: Name | None = None
    prompt: Text | None = None
    messages: Turns | None = None
    response: Text | None = None
    finish_reason: Literal["stop", "length"] = "stop"
    rendered: bool | None = None
    written_by: Name | None = None

    @model_validator(mode="after")
    def _one_conversation(self) -> PromptLine:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError(f"expected either prompt or messages; the file should be {_EXAMPLE}")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError(f"prompt is {self.prompt!r}, expected text that is not blank")
        for number, turn in enumerate(self.messages or []):
            if turn.role not in get_args(Role):
                meant = _OTHER_ROLES.get(turn.role.lower(), turn.role.lower())
                hint = f"; did you mean {meant!r}?" if meant in get_args(Role) else ""
                raise ValueError(
                    f"messages[{number}].role is {turn.role!r}, expected one of {', '.join(get_args(Role))}{hint}"
                )
        if self.messages is not None and not any(turn.content.strip() for turn in self.messages):
            raise ValueError("messages holds no text in any turn, expected a conversation")
        return self


def load_sources(collect: CollectConfig) -> list[Prompt]:
    """The prompts of `collect.prompts` and `collect.sources`, in their order.

    Raises:
        PromptError: as `load_prompts`, or if a source's weight leaves none of its prompts.
    """
    first = [] if collect.prompts is None else [SourceConfig(path=str(collect.prompts))]
    return _load([*first, *collect.sources], collect.system_prompt, responses=False)


def load_prompts(path: Path, system_prompt: str | None = None, responses: bool = False) -> list[Prompt]:
    """Read the prompts of one file, each `{"id", "skill", "prompt"}` or `{"id", "skill", "messages"}`.

    Args:
        system_prompt: put before conversations that do not begin with a system turn.
        responses: each prompt must have a `response` too.

    Raises:
        PromptError: if the file is missing, empty or malformed (naming the place), or an id comes twice.
    """
    return _load([SourceConfig(path=str(path))], system_prompt, responses)


def _load(sources: Sequence[SourceConfig], system_prompt: str | None, responses: bool) -> list[Prompt]:
    system: tuple[Message, ...] = ()
    if system_prompt is not None:
        turn = {"role": "system", "content": system_prompt}
        system = to_messages([checked(Turn, turn, "collect.system_prompt", PromptError, "text")])
    prompts: dict[str, tuple[Prompt, str]] = {}
    repeats: list[str] = []
    for source in sources:
        read = taken = 0
        for where, value in _rows(source):
            prompt, has_id = _parse(value, where, source, system, responses)
            read += 1
            if prompt.id in prompts:
                if not has_id:
                    repeats.append(where)
                    continue
                raise PromptError(
                    f"{where}: id {prompt.id!r} is also that of {prompts[prompt.id][1]}; ids must be unique"
                )
            if source.weight < 1 and stable_hash("weight", prompt.id) >= source.weight * 2**63:
                continue
            prompts[prompt.id] = prompt, where
            taken += 1
        if not taken and source.weight < 1:
            raise PromptError(
                f"{source.path}: the weight {source.weight:g} leaves none of its {read} prompts; raise it"
            )
    if repeats:
        named = "; ".join(repeats[:_NAMED])
        others = f" and {len(repeats) - _NAMED} others" if len(repeats) > _NAMED else ""
        log.warning("%d prompts repeat an earlier one and are asked once: %s%s", len(repeats), named, others)
    found = [prompt for prompt, _ in prompts.values()]
    same = len(found) - len({prompt.content for prompt in found})
    if same and not responses:
        log.warning("%d prompts have the conversation of another under an id of their own; they are all asked", same)
    return found


def _parse(
    value: Any, where: str, source: SourceConfig, system: tuple[Message, ...], responses: bool
) -> tuple[Prompt, bool]:
    """The prompt, and whether its id was given."""
    line = checked(PromptLine, value, where, PromptError, _EXAMPLE)
    messages = to_messages(line.messages or [])
    if line.prompt is not None:
        messages = (Message("user", line.prompt),)
    if messages[0].role != "system":
        messages = (*system, *messages)
    if responses and line.response is None:
        raise PromptError(f"{where}: response is missing; expected the text to score")
    prompt = Prompt(
        id=line.id or "",
        skill=line.skill or source.skill,
        messages=messages,
        response=line.response if responses else None,
        finished=line.finish_reason == "stop",
        rendered=source.rendered if line.rendered is None else line.rendered,
        decoding=tuple(source.decoding),
    )
    if line.id is not None:
        return prompt, True
    said = prompt.content + (prompt.response or "")
    return replace(prompt, id=hashlib.sha256(said.encode()).hexdigest()[:20]), False


def _rows(source: SourceConfig) -> Iterator[tuple[str, Any]]:
    """The source's rows as objects, each with its place for messages."""
    path = Path(source.path)
    rows: Iterator[tuple[str, Any]]
    match source.format or _format_of(source.path):
        case "text":
            rows = ((where, {"prompt": line}) for where, line in read_lines(path, PromptError, "one prompt a line"))
        case "parquet":
            rows = _read_parquet(source, path)
        case "dataset":
            rows = _read_dataset(source)
        case _:
            rows = read_values(path, PromptError, _EXAMPLE)
    for where, row in rows:
        if source.column is not None and isinstance(row, dict):
            if source.column not in row:
                raise PromptError(f"{where} has no {source.column!r}; its keys are {', '.join(row) or 'none'}")
            content = row.pop(source.column)
            row["messages" if isinstance(content, list) else "prompt"] = content
        yield where, row


def _format_of(name: str) -> str:
    path = Path(name)
    if path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet"))):
        return "parquet"
    if path.suffixes[-2:] == [".txt", ".gz"] or path.suffix == ".txt":
        return "text"
    is_elsewhere = not path.exists() and not path.parent.exists() and path.suffix not in (".json", ".jsonl", ".gz")
    if path.is_dir() or (is_elsewhere and is_hub_name(name)):
        return "dataset"
    return "json"


def _columns(source: SourceConfig, names: Sequence[str]) -> list[str]:
    """The columns that are of use, of a table that may have any others.

    Raises:
        PromptError: if there is none with a prompt.
    """
    content = [source.column] if source.column is not None else ["prompt", "messages"]
    if not set(content) & set(names):
        raise PromptError(
            f"{source.path} has the columns {', '.join(names)}, expected {' or '.join(content)}; name the one with the "
            "prompts as `column` of its source"
        )
    known = [name for name in PromptLine.model_fields if name not in ("prompt", "messages")]
    return [name for name in names if name in known or name in content]


def _read_parquet(source: SourceConfig, path: Path) -> Iterator[tuple[str, Any]]:
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    is_empty = True
    for file in files:
        number = 0
        try:
            parquet = pq.ParquetFile(file)
            columns = _columns(source, parquet.schema_arrow.names)
            for batch in parquet.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    yield f"{file}, row {number}", row
                    number += 1
        except (OSError, pa.ArrowException) as error:
            what = getattr(error, "strerror", None) or error
            raise PromptError(
                f"cannot read {file} as Parquet: {what}; expected columns `prompt` or `messages`"
            ) from error
        is_empty = is_empty and not number
    if is_empty:
        raise PromptError(f"{path} is empty: it holds no rows; expected columns `prompt` or `messages`")


def _read_dataset(source: SourceConfig) -> Iterator[tuple[str, Any]]:
    try:
        from datasets import DatasetDict, load_dataset, load_from_disk
        from datasets.exceptions import DatasetsError
        from datasets.utils.logging import disable_progress_bar
    except ImportError as error:
        raise MissingExtraError(
            f"{source.path} is read as a Hugging Face dataset, for which `datasets` is missing; "
            "pip install 'llada-drafter[hf]'"
        ) from error
    disable_progress_bar()
    try:
        if Path(source.path).is_dir():
            loaded = load_from_disk(source.path)
            if isinstance(loaded, DatasetDict):
                if source.split not in loaded:
                    raise ValueError(f"it has the splits {', '.join(loaded)}, not {source.split!r}")
                loaded = loaded[source.split]
        else:
            loaded = load_dataset(source.path, source.subset, split=source.split, revision=source.revision)
    except (OSError, ValueError, DatasetsError) as error:
        raise PromptError(
            f"{source.path} cannot be loaded as a Hugging Face dataset: {error}; correct path, subset, split or "
            "revision of its source, or log in with `hf auth login` where it is gated"
        ) from error
    columns = _columns(source, loaded.column_names)
    if not len(loaded):
        raise PromptError(f"{source.path} is empty: it holds no rows in its split {source.split!r}")
    for number, row in enumerate(loaded.select_columns(columns)):
        yield f"{source.path} {source.split}, row {number}", row
