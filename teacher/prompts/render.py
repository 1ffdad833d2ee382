"""Prompts as the teacher's tokens: the chat template, then the tokenizer.

Templates are Python's work, 30 to 100 µs a prompt; tokenizing is native and shares a batch among all cores, 60 to 100
µs a prompt on one of them. A million prompts take two minutes on two cores.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.config import PipelineConfig
from shared.errors import ConfigError, PromptError
from shared.tokenizer.chat import ChatEncoder, RenderedPrompt
from shared.tokenizer.files import of_tree
from teacher.checkpoints import load_tokenizer
from teacher.prompts.prompt import Prompt

_BATCH = 1000
"""Prompts that are rendered before their batch is tokenized."""
_TRIES = 8


class Renderer:
    """The teacher's tokenizer and chat template. Loading takes seconds, a prompt some hundred microseconds.

    Args:
        tokenizer: of transformers, with the fast tokenizer that `tokenizer.json` holds.
        template_arguments: of the chat template.
        rendered: whether prompts are rendered text already; None recognizes those that are.

    Attributes:
        template_fingerprint: sha256 of the chat template.
        fingerprint: sha256 of all that decides the tokens of a prompt.
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
        stated = json.dumps([source, settings, dict(template_arguments or {}), rendered], sort_keys=True, default=str)
        self.fingerprint = hashlib.sha256((json.dumps(tree) + stated).encode()).hexdigest()
        assert self._chat.template is not None
        self.template_fingerprint = self._chat.template.fingerprint
        self.probe = self._chat.template.probe

    def render(self, prompt: Prompt) -> RenderedPrompt:
        """The prompt up to and including the header of the assistant's turn.

        Raises:
            PromptError: as `ChatEncoder.prompt`, naming the prompt.
        """
        with _naming(prompt):
            return self._chat.prompt(prompt.messages, prompt.rendered)

    def lengths(self, prompts: Sequence[Prompt]) -> Iterator[int]:
        """Tokens of every prompt, and of its response where one is given, in batches.

        Raises:
            PromptError: as `render` and `encode_response`.
        """
        for start in range(0, len(prompts), _BATCH):
            batch = prompts[start : start + _BATCH]
            counts = self._chat.count_tokens([self._marked(prompt) for prompt in batch])
            for prompt, count in zip(batch, counts, strict=True):
                yield count + (0 if prompt.response is None else len(self.encode_response(prompt)))

    def truncate(self, prompt: Prompt, most: int) -> Prompt | None:
        """`prompt` in at most `most` tokens: the end of its longest turn is cut off.

        None where that cannot be done: the text is rendered already, or the rest alone is too long.
        """
        if self._chat.takes_as_rendered(prompt.messages, prompt.rendered):
            return None
        for _ in range(_TRIES):  # a cut text may have a token more than its part of the whole
            excess = len(self.render(prompt).ids) - most
            if excess <= 0:
                return prompt
            longest = max(range(len(prompt.messages)), key=lambda index: len(prompt.messages[index].content))
            message = prompt.messages[longest]
            shorter = replace(message, content=self._chat.cut(message.content, excess))
            if not shorter.content.strip():
                return None
            prompt = replace(prompt, messages=(*prompt.messages[:longest], shorter, *prompt.messages[longest + 1 :]))
        return None

    def _marked(self, prompt: Prompt) -> str:
        with _naming(prompt):
            return self._chat.marked(prompt.messages, prompt.rendered)[1]

    def encode_user_header(self, system_prompt: str | None) -> NDArray[np.int32]:
        """Token ids of all that the template writes before the words of a conversation's first user turn.

        Raises:
            PromptError: if the template refuses a system turn.
        """
        return self._chat.encode(self._chat.user_header(system_prompt))

    def encode_response(self, prompt: Prompt) -> NDArray[np.int32]:
        """Token ids of a given response, with the end-of-turn token where it is finished.

        Raises:
            PromptError: as `ChatEncoder.response`, naming the prompt.
        """
        assert prompt.response is not None
        with _naming(prompt):
            return self._chat.response(prompt.response, prompt.finished, rendered=prompt.rendered)


@contextmanager
def _naming(prompt: Prompt) -> Iterator[None]:
    """What is wrong with the prompt, said with its id."""
    try:
        yield
    except PromptError as error:
        raise PromptError(f"prompt {prompt.id!r}: {error}") from error


def load_renderer(config: PipelineConfig) -> Renderer:
    """The teacher's tokenizer with the template's arguments; errors as `Renderer` and `load_tokenizer`."""
    return Renderer(load_tokenizer(config.teacher), config.collect.template_arguments, config.collect.rendered)


def _stop_ids(model: str) -> Any:
    """Tokens that end an answer, as generation_config.json names them; None where it does not."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        return None
