"""Which prompts fit: their lengths in tokens, measured in batches and kept; what is too long is skipped or cut.

A million prompts take about two minutes to render and tokenize on two cores, and every resumed session and every worker
of a job array would spend them again. So a collection keeps the lengths of many prompts in `prompt_lengths.npz` of its
run, four bytes each, under a key of the prompts and of all that decides their tokens; another key measures them anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.config import PipelineConfig
from shared.console import progress
from shared.errors import PromptError
from shared.files import new_file, write_text
from teacher.prompts.prompt import Prompt, prompts_fingerprint
from teacher.prompts.render import Renderer

log = logging.getLogger(__name__)

OVERLONG = "overlong.jsonl"
_KEPT = "prompt_lengths.npz"
_MANY = 10_000
"""Fewer prompts than these, a second or two, are measured again and without a progress bar."""
_NAMED = 20
"""Prompts that a message names."""


@dataclass(frozen=True, slots=True)
class Overlong:
    """A prompt that left no room for an answer. `kept` is its tokens after it was cut; None where it is not asked."""

    id: str
    tokens: int
    kept: int | None


@dataclass(frozen=True, slots=True)
class FittingPrompts:
    """Prompts that leave room for an answer.

    Attributes:
        tokens: of every prompt and, where one is given, its response, by id.
        overlong: those that did not.
    """

    prompts: list[Prompt]
    tokens: dict[str, int]
    overlong: list[Overlong]
    _key: str
    _lengths: NDArray[np.int32]

    def save(self, run_dir: Path) -> None:
        """Name the overlong prompts in overlong.jsonl, and keep the lengths of many for the next session."""
        lines = [
            json.dumps({"id": o.id, "tokens": o.tokens, "action": "skipped"} if o.kept is None else
                       {"id": o.id, "tokens": o.tokens, "action": "truncated", "kept_tokens": o.kept})
            for o in self.overlong
        ]  # fmt: skip
        if lines:
            write_text(run_dir / OVERLONG, "\n".join(lines) + "\n")
        else:
            (run_dir / OVERLONG).unlink(missing_ok=True)
        if len(self._lengths) >= _MANY and _read_kept(run_dir, self._key) is None:
            with new_file(run_dir / _KEPT) as partial:
                np.savez(partial, key=np.array(self._key), lengths=self._lengths)


def fit_prompts(prompts: Sequence[Prompt], renderer: Renderer, config: PipelineConfig) -> FittingPrompts:
    """Measure `prompts`, and skip, cut or refuse those that are too long, as `collect.overlong` says.

    A prompt fits where one token of an answer fits behind it; one that is cut leaves room for the longest answer that
    its rules allow, but keeps at least half of the context. Given responses are never cut: theirs are skipped.

    Raises:
        PromptError: if all prompts are too long, or one is and they are to be refused, naming them; or as
            `Renderer.render`.
    """
    room = config.teacher.max_sequence_tokens
    key = hashlib.sha256(f"{prompts_fingerprint(prompts)} {renderer.fingerprint}".encode()).hexdigest()
    lengths = _read_kept(config.run_dir, key)
    if lengths is None:
        lengths = np.fromiter(_measured(prompts, renderer), np.int32, len(prompts))
    too_long = np.flatnonzero(lengths >= room)
    if len(too_long) and (config.collect.overlong == "refuse" or len(too_long) == len(prompts)):
        _refuse(prompts, lengths, too_long, config)
    tokens = {prompt.id: int(n) for prompt, n in zip(prompts, lengths, strict=True) if n < room}
    overlong: list[Overlong] = []
    cut: dict[str, Prompt] = {}
    for index in too_long:
        prompt = prompts[index]
        if config.collect.overlong == "truncate" and prompt.response is None:
            shorter = renderer.truncate(prompt, room - min(_longest_answer(prompt, config), room // 2))
            if shorter is not None:
                cut[prompt.id], tokens[prompt.id] = shorter, len(renderer.render(shorter).ids)
        overlong.append(Overlong(prompt.id, int(lengths[index]), tokens.get(prompt.id)))
    fitting = [cut.get(prompt.id, prompt) for prompt in prompts if prompt.id in tokens]
    if overlong:
        log.warning(
            "%d of %d prompts have %d tokens (teacher.max_sequence_tokens) or more: %d are cut, %d are not asked; "
            "`teacher collect` names them in %s",
            len(overlong), len(prompts), room, len(cut), len(overlong) - len(cut), config.run_dir / OVERLONG,
        )  # fmt: skip
    asked = [prompt for prompt in fitting if prompt.response is None]
    short = sum(tokens[prompt.id] + _longest_answer(prompt, config) > room for prompt in asked)
    if short:
        log.warning(
            "%d prompts leave less room than max_response_tokens (%d) below teacher.max_sequence_tokens (%d): their "
            "answers may be cut short",
            short, max(_longest_answer(prompt, config) for prompt in asked), room,
        )  # fmt: skip
    return FittingPrompts(fitting, tokens, overlong, key, lengths)


def _measured(prompts: Sequence[Prompt], renderer: Renderer) -> Iterator[int]:
    if len(prompts) < _MANY:
        yield from renderer.lengths(prompts)
        return
    with progress() as bar:
        task = bar.add_task("tokenizing prompts", total=len(prompts), note="")
        for number, length in enumerate(renderer.lengths(prompts), start=1):
            if number % 1000 == 0:
                bar.update(task, completed=number)
            yield length


def _read_kept(run_dir: Path, key: str) -> NDArray[np.int32] | None:
    """The lengths that an earlier session kept under `key`; None where there are none."""
    try:
        with np.load(run_dir / _KEPT) as kept:
            return kept["lengths"] if str(kept["key"]) == key else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _longest_answer(prompt: Prompt, config: PipelineConfig) -> int:
    return max(rule.max_response_tokens for rule in prompt.decoding or config.collect.decoding)


def _refuse(
    prompts: Sequence[Prompt], lengths: NDArray[np.int32], too_long: NDArray[np.int64], config: PipelineConfig
) -> None:
    room = config.teacher.max_sequence_tokens
    order = too_long[np.argsort(-lengths[too_long], kind="stable")]
    named = ", ".join(f"{prompts[index].id!r} ({lengths[index]})" for index in order[:_NAMED])
    others = f" and {len(order) - _NAMED} others" if len(order) > _NAMED else ""
    need = int(lengths[order[0]]) + _longest_answer(prompts[order[0]], config)
    raise PromptError(
        f"{len(order)} of {len(prompts)} prompts have {room} tokens or more, responses to score included, and "
        f"teacher.max_sequence_tokens is {room}: {named}{others}; shorten them or take them out, or raise "
        f"teacher.max_sequence_tokens to {need}, with room for an answer"
    )
