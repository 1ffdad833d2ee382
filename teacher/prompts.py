"""Prompts: reading them, splitting them into training and held-out, rendering them with the teacher's template.

The split is a property of the prompt's id and its conversation alone: ids are ordered by a hash within each skill,
and the first share of each skill is held out, so every skill is on both sides. Prompts of one and the same
conversation go to the same side, whatever their ids, so nothing held out is trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.config import Split
from shared.errors import ConfigError, PromptError
from shared.records import Message

DEFAULT_SKILL = "general"
_KEYS = frozenset({"id", "skill", "prompt", "messages", "response", "finish_reason"})
_EXAMPLE = '{"id": "a-1", "skill": "arithmetic", "prompt": "What is 2 + 2?"}'


@dataclass(frozen=True, slots=True)
class Prompt:
    """One conversation that the teacher answers; `response` where the answer is given and only to be scored."""

    id: str
    skill: str
    messages: tuple[Message, ...]
    response: str | None = None
    finished: bool = True

    @property
    def content(self) -> str:
        """The conversation as one string, equal for equal conversations."""
        return json.dumps([[message.role, message.content] for message in self.messages], ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A prompt in the teacher's own form: the template's text and int32 [P] token ids."""

    text: str
    ids: NDArray[np.int32]


def load_prompts(path: Path, system_prompt: str | None = None, responses: bool = False) -> list[Prompt]:
    """Read prompts from JSONL, one `{"id", "skill", "prompt"}` or `{"id", "skill", "messages"}` a line.

    Args:
        system_prompt: put before conversations that do not begin with a system turn.
        responses: each line must have a `response` too.

    Raises:
        PromptError: if the file is missing, empty or malformed (naming the line), or an id comes twice.
    """
    prompts: list[Prompt] = []
    lines: dict[str, int] = {}
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                prompt = _parse(line, f"{path} line {number}", system_prompt, responses)
                if prompt.id in lines:
                    raise PromptError(
                        f"{path} line {number}: id {prompt.id!r} was used on line {lines[prompt.id]}; every id once"
                    )
                lines[prompt.id] = number
                prompts.append(prompt)
    except UnicodeDecodeError as error:
        raise PromptError(f"{path} is not UTF-8 text: {error}; save it as UTF-8") from error
    except OSError as error:
        raise PromptError(
            f"cannot read the prompts {path}: {error.strerror}; expected lines like {_EXAMPLE}"
        ) from error
    if not prompts:
        raise PromptError(f"the prompts file {path} is empty; expected at least one line like {_EXAMPLE}")
    return prompts


def split_prompts(prompts: Sequence[Prompt], held_out: float) -> dict[Split, list[Prompt]]:
    """Both splits, each in an order given by a hash of the ids, so that every slice mixes the skills.

    Of n conversations of a skill, round(held_out n) are held out, at least one and at most n - 1 where n > 1.
    """
    groups: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        groups[prompt.content].append(prompt)
    by_skill: dict[str, list[list[Prompt]]] = defaultdict(list)
    for group in groups.values():
        group.sort(key=lambda prompt: stable_hash(prompt.id))
        by_skill[group[0].skill].append(group)
    splits: dict[Split, list[Prompt]] = {"train": [], "held_out": []}
    for members in by_skill.values():
        members.sort(key=lambda group: stable_hash(group[0].id))
        count = round(held_out * len(members))
        if held_out > 0 and len(members) > 1:
            count = min(max(count, 1), len(members) - 1)
        for index, group in enumerate(members):
            splits["held_out" if index < count else "train"] += group
    for split in splits.values():
        split.sort(key=lambda prompt: stable_hash(f"order:{prompt.id}"))
    return splits


def stable_hash(*parts: object) -> int:
    """63 bits of sha256 over `parts`, the same on every machine."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def prompts_fingerprint(prompts: Iterable[Prompt]) -> str:
    """sha256 over ids, skills, conversations and given responses, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.id, prompt.skill, prompt.content, prompt.response, prompt.finished]).encode())
    return digest.hexdigest()


class Renderer:
    """The teacher's tokenizer and chat template. Loading takes seconds, a prompt some hundred microseconds.

    Raises:
        ConfigError: if the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, template_arguments: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        template = tokenizer.chat_template
        if not isinstance(template, str):
            raise ConfigError("teacher.model has no single chat template; add chat_template.jinja to the checkpoint")
        self.template_fingerprint = hashlib.sha256(template.encode()).hexdigest()
        self._arguments = dict(template_arguments or {})

    def __len__(self) -> int:
        """Number of token ids."""
        return len(self.tokenizer)

    def render(self, prompt: Prompt) -> RenderedPrompt:
        """Apply the template, up to and including the header of the assistant's turn.

        Raises:
            PromptError: if the template refuses the conversation.
        """
        messages = [{"role": message.role, "content": message.content} for message in prompt.messages]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **self._arguments
            )
        except Exception as error:  # templates raise what they like
            raise PromptError(f"prompt {prompt.id!r}: the teacher's chat template refuses it: {error}") from error
        return RenderedPrompt(text, self.encode(text))

    def encode(self, text: str) -> NDArray[np.int32]:
        """Token ids of `text`, with no special tokens added."""
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)

    def encode_response(self, prompt: Prompt) -> NDArray[np.int32]:
        """Token ids of a given response, with the end-of-turn token where it is finished."""
        assert prompt.response is not None
        ids = self.encode(prompt.response)
        return np.append(ids, np.int32(self.tokenizer.eos_token_id)) if prompt.finished else ids


def _parse(line: str, where: str, system_prompt: str | None, responses: bool) -> Prompt:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptError(f"{where} is not JSON: {error}; expected a line like {_EXAMPLE}") from error
    if not isinstance(entry, dict):
        raise PromptError(f"{where} holds {type(entry).__name__}, expected an object like {_EXAMPLE}")
    unknown = sorted(entry.keys() - _KEYS)
    if unknown:
        raise PromptError(f"{where}: unknown key {unknown[0]!r}; known keys: {', '.join(sorted(_KEYS))}")
    name, skill = entry.get("id"), entry.get("skill", DEFAULT_SKILL)
    if not isinstance(name, str) or not name:
        raise PromptError(f"{where}: id is {name!r}, expected a string that is unique in the file")
    if not isinstance(skill, str) or not skill:
        raise PromptError(f"{where}: skill is {skill!r}, expected a string such as arithmetic")
    if ("prompt" in entry) == ("messages" in entry):
        raise PromptError(f"{where}: expected either prompt or messages, as in {_EXAMPLE}")
    if "prompt" in entry:
        if not isinstance(entry["prompt"], str) or not entry["prompt"].strip():
            raise PromptError(f"{where}: prompt is {entry['prompt']!r}, expected text")
        messages: tuple[Message, ...] = (Message("user", entry["prompt"]),)
    else:
        messages = _messages(entry["messages"], where)
    if system_prompt is not None and messages[0].role != "system":
        messages = (Message("system", system_prompt), *messages)
    response = entry.get("response")
    if responses and not isinstance(response, str):
        raise PromptError(f"{where}: response is {response!r}, expected the text to score")
    finish = entry.get("finish_reason", "stop")
    if finish not in ("stop", "length"):
        raise PromptError(f"{where}: finish_reason is {finish!r}, expected stop or length")
    return Prompt(name, skill, messages, response if responses else None, finish == "stop")


def _messages(value: object, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise PromptError(f'{where}: messages is {value!r}, expected a list of {{"role", "content"}}')
    messages = []
    for number, turn in enumerate(value):
        if (
            not isinstance(turn, dict)
            or turn.keys() != {"role", "content"}
            or not all(isinstance(part, str) for part in turn.values())
        ):
            raise PromptError(
                f'{where}: messages[{number}] is {turn!r}, expected {{"role": …, "content": …}} of strings'
            )
        messages.append(Message(turn["role"], turn["content"]))
    return tuple(messages)
