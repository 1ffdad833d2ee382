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

from shared.commands.legacy_json.models import Name, Strict, Text, Turn, Turns, checked, to_messages
from shared.config import Split
from shared.dataset.records import Message
from shared.dataset.split import held_out, stable_hash
from shared.errors import ConfigError, PromptError
from shared.json_input import read_values
from shared.tokenizer.chat import ChatEncoder, RenderedPrompt
from shared.tokenizer.files import of_tree

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
    rendered: bool | None = None

    @model_validator(mode="after")
    def _one_conversation(self) -> PromptLine:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError(f"expected either prompt or messages; the file should be {_EXAMPLE}")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError(f"prompt is {self.prompt!r}, expected text that is not blank")
        return self


@dataclass(frozen=True, slots=True)
class Prompt:
    """One conversation that the teacher answers; `response` where the answer is given and only to be scored.

    `rendered` says whether its text is rendered already; None leaves that to `collect.rendered`.
    """

    id: str
    skill: str
    messages: tuple[Message, ...]
    response: str | None = None
    finished: bool = True
    rendered: bool | None = None

    @property
    def content(self) -> str:
        """The conversation as one string, equal for equal conversations."""
        return json.dumps([[message.role, message.content] for message in self.messages], ensure_ascii=False)


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


def split_prompts(prompts: Sequence[Prompt], share: float) -> dict[Split, list[Prompt]]:
    """Both splits, each in an order given by a hash of the ids, so that every slice mixes the skills.

    `share` of each skill's conversations is held out (`shared.dataset.split.held_out`).
    """
    groups: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        groups[prompt.content].append(prompt)
    for group in groups.values():
        group.sort(key=lambda prompt: stable_hash(prompt.id))
    chosen = held_out({group[0].id: group[0].skill for group in groups.values()}, share)
    splits: dict[Split, list[Prompt]] = {"train": [], "held_out": []}
    for group in groups.values():
        splits["held_out" if group[0].id in chosen else "train"] += group
    for split in splits.values():
        split.sort(key=lambda prompt: stable_hash(f"order:{prompt.id}"))
    return splits


def prompts_fingerprint(prompts: Iterable[Prompt]) -> str:
    """sha256 over ids, skills, conversations, given responses and what is stated of their rendering, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        parts = [prompt.id, prompt.skill, prompt.content, prompt.response, prompt.finished]
        stated = [] if prompt.rendered is None else [prompt.rendered]
        digest.update(json.dumps([*parts, *stated]).encode())
    return digest.hexdigest()


class Renderer:
    """The teacher's tokenizer and chat template. Loading takes seconds, a prompt some hundred microseconds.

    Args:
        tokenizer: of transformers, with the fast tokenizer that `tokenizer.json` holds.
        template_arguments: of the chat template.
        rendered: whether prompts are rendered text already; None recognizes those that are.

    Attributes:
        template_fingerprint: sha256 of the chat template.
        probe: fixed conversations as it renders them, by name.

    Raises:
        ConfigError: if the tokenizer has no chat template, the template reads the clock, or an argument is not its.
    """

    def __init__(
        self, tokenizer: Any, template_arguments: Mapping[str, Any] | None = None, rendered: bool | None = None
    ) -> None:
        self.tokenizer = tokenizer
        source = tokenizer.chat_template
        if not isinstance(source, str):
            raise ConfigError("teacher.model has no single chat template; add chat_template.jinja to the checkpoint")
        tree = json.loads(tokenizer.backend_tokenizer.to_str())
        settings = {**tokenizer.special_tokens_map, "generation_eos_token_id": _stop_ids(tokenizer.name_or_path)}
        file = of_tree(Path(tokenizer.name_or_path), tree, settings, source)
        self._chat = ChatEncoder(file, template_arguments, rendered)
        assert self._chat.template is not None
        self.template_fingerprint = self._chat.template.fingerprint
        self.probe = self._chat.template.probe

    def __len__(self) -> int:
        """Number of token ids."""
        return len(self.tokenizer)

    def render(self, prompt: Prompt) -> RenderedPrompt:
        """The prompt up to and including the header of the assistant's turn.

        Raises:
            PromptError: as `ChatEncoder.prompt`, naming the prompt.
        """
        try:
            return self._chat.prompt(prompt.messages, prompt.rendered)
        except PromptError as error:
            raise PromptError(f"prompt {prompt.id!r}: {error}") from error

    def encode_response(self, prompt: Prompt) -> NDArray[np.int32]:
        """Token ids of a given response, with the end-of-turn token where it is finished.

        Raises:
            PromptError: as `ChatEncoder.response`, naming the prompt.
        """
        assert prompt.response is not None
        try:
            return self._chat.response(prompt.response, prompt.finished, rendered=prompt.rendered)
        except PromptError as error:
            raise PromptError(f"prompt {prompt.id!r}: {error}") from error


def _stop_ids(model: str) -> Any:
    """Tokens that end an answer, as generation_config.json names them; None where it does not."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        return None


def _parse(value: Any, where: str, system: tuple[Message, ...], responses: bool) -> Prompt:
    line = checked(PromptLine, value, where, PromptError, _EXAMPLE)
    messages = to_messages(line.messages or [])
    if line.prompt is not None:
        messages = (Message("user", line.prompt),)
    if messages[0].role != "system":
        messages = (*system, *messages)
    if responses and line.response is None:
        raise PromptError(f"{where}: response is missing; expected the text to score")
    response, finished = line.response if responses else None, line.finish_reason == "stop"
    return Prompt(line.id, line.skill, messages, response, finished, line.rendered)
