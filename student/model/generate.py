"""`student generate`: talk to a student, or to any LLaDA checkpoint, with LLaDA's sampler."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from shared.dataset.records import Message
from shared.tokenizer.chat import ChatEncoder
from shared.tokenizer.files import read_tokenizer_file
from student.model.export import load_student
from student.model.sampler import SamplerSettings, sample


def generate(
    directory: Path,
    prompt: str,
    *,
    system: str | None = None,
    raw: bool = False,
    seed: int = 0,
    **changes: Any,
) -> str:
    """The model's answer to `prompt`, up to the end of its turn.

    Args:
        raw: continue `prompt` as it stands, without the chat template.
        changes: fields of `SamplerSettings`; for those that are None, `default_settings` says. A length alone brings as
            many steps.

    Raises:
        CheckpointError: if the directory holds no model.
        ConfigError: if the settings contradict one another, or the text does not fit.
    """
    model, tokenizer = load_student(directory)
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    given = {name: value for name, value in changes.items() if value is not None}
    if "length" in given:
        given.setdefault("steps", given["length"])
    settings = replace(default_settings(model.config), **given)
    turns = [Message("system", system)] if system and not raw else []
    return answer(model, tokenizer, directory, [*turns, Message("user", prompt)], settings, raw=raw, seed=seed)


def answer(
    model: Any,
    tokenizer: Any,
    directory: Path,
    turns: Sequence[Message],
    settings: SamplerSettings,
    *,
    raw: bool = False,
    seed: int = 0,
) -> str:
    """What a loaded model, in evaluation mode, says to `turns`.

    Args:
        directory: has its tokenizer.
    """
    chat = ChatEncoder(read_tokenizer_file(directory), rendered=raw, now=datetime.datetime.now())
    ids = chat.prompt(turns).ids.tolist()
    generator = torch.Generator().manual_seed(seed)
    said = sample(model, torch.tensor([ids], device=model.device), settings, generator, chat.ends)[0].tolist()
    end = next((i for i, token in enumerate(said) if token in chat.ends), len(said))
    return str(tokenizer.decode(said[:end], skip_special_tokens=True))


def default_settings(config: Any) -> SamplerSettings:
    """What suits a model: 128 tokens, in draft blocks of the length it was trained on, or as LLaDA itself decodes."""
    block = config.draft_block_length
    if block is None:
        return SamplerSettings()
    blocks = -(-128 // block)
    return SamplerSettings(length=blocks * block, block_length=block, steps=blocks * block, attention="draft")
