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
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from shared.config import Split
from shared.errors import ConfigError, PromptError
from shared.json_input import read_values
from shared.json_models import Name, Strict, Text, Turn, Turns, checked, to_messages
from shared.records import Message

DEFAULT_SKILL = "general"
_EXAMPLE = (
    'a JSON list, or one a line, of prompts like {"id": "a-1", "skill": "arithmetic", "prompt": "What is 2 + 2?"}'
)


class PromptLine(Strict):
    """One prompt as its file has it."""

    id: Name
    skill: Name = DEFAULT_SKILL
    prompt: Text | None = None
    messages: Turns | None = None
    response: Text | None = None
    finish_reason: Literal["stop", "length"] = "stop"

    @model_validator(mode="after")
    def _one_conversation(self) -> PromptLine:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError(f"expected either prompt or messages; the file should be {_EXAMPLE}")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError(f"prompt is {self.prompt!r}, expected text that is not blank")
        return self


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
    """Read prompts from JSON, a list or one a line, each `{"id", "skill", "prompt"}` or `{"id", "skill", "messages"}`.

    Args:
        system_prompt: put before conversations that do not begin with a system turn.
        responses: each prompt must have a `response` too.

    Raises:
        PromptError: if the file is missing, empty or malformed (naming the place), or an id comes twice.
    """
    system: tuple[Message, ...] = ()
    if system_prompt is not None:
        turn = {"role": "system", "content": system_prompt}
        system = to_messages([checked(Turn, turn, "collect.system_prompt", PromptError, "text")])
    prompts: dict[str, tuple[Prompt, str]] = {}
    for where, value in read_values(path, PromptError, _EXAMPLE):
        prompt = _parse(value, where, system, responses)
        if prompt.id in prompts:
            raise PromptError(f"{where}: id {prompt.id!r} is also that of {prompts[prompt.id][1]}; ids must be unique")
        prompts[prompt.id] = prompt, where
    return [prompt for prompt, _ in prompts.values()]


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


def _parse(value: Any, where: str, system: tuple[Message, ...], responses: bool) -> Prompt:
    line = checked(PromptLine, value, where, PromptError, _EXAMPLE)
    messages = to_messages(line.messages or [])
    if line.prompt is not None:
        messages = (Message("user", line.prompt),)
    if messages[0].role != "system":
        messages = (*system, *messages)
    if responses and line.response is None:
        raise PromptError(f"{where}: response is missing; expected the text to score")
    return Prompt(line.id, line.skill, messages, line.response if responses else None, line.finish_reason == "stop")
