"""Prompts that the teacher writes itself, for teams that have none (Magpie, arXiv 2406.08464).

The teacher is given all that its chat template writes before a user's words, and nothing behind it. What it continues
with, up to the end of the turn, is a prompt of the kind that it was trained on. Turns that do not end, are too short,
hold special tokens or repeat an earlier one (case and white space aside) are dropped.

Drafts are numbered, and each has its seed by its number. They are written in rounds, and after each round the file
`PATH.partial` says which drafts were kept so far; a command that was killed goes on behind its last whole round.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from shared.config import PipelineConfig, WritePromptsConfig
from shared.console import progress, titled_table
from shared.dataset.records import Message, Sampling
from shared.dataset.split import stable_hash
from shared.errors import ConfigError, PromptError
from shared.files import new_file
from shared.tokenizer.vocabulary import Vocabulary
from teacher.checkpoints import ensure_checkpoint, fingerprint, hub_commit
from teacher.engine import Answer, Request, open_engine, prepare_environment
from teacher.interrupts import lasting_interrupts
from teacher.prompts.prompt import Prompt
from teacher.prompts.render import Renderer, load_renderer

log = logging.getLogger(__name__)

SKILL = "self-generated"
_ROUND = 128
"""Drafts between two looks at the file: a few minutes' work of a small machine, seconds of a cluster's."""
_BARREN_ROUNDS = 8
"""Rounds in a row that add nothing, after which the command gives up."""


@dataclass(slots=True)
class Drafts:
    """What became of the drafts so far."""

    written: int = 0
    repeats: int = 0
    unusable: int = 0
    texts: list[str] = field(default_factory=list)

    def table(self) -> Table:
        """For people."""
        table = titled_table("prompts by the teacher")
        table.add_row("drafts", f"{self.written:,}")
        table.add_row("kept", f"{len(self.texts):,}")
        table.add_row("repeats", f"{self.repeats:,} ({self.repeats / max(self.written, 1):.1%} of the drafts)")
        table.add_row("unfinished, short or broken", f"{self.unusable:,}")
        for text in self.texts[:3]:
            table.add_row("for example", " ".join(text.split())[:100])
        return table


def write_prompts(config: PipelineConfig) -> Drafts:
    """Write `collect.write_prompts.count` prompts to its path; goes on where an earlier session was interrupted.

    Raises:
        ConfigError: if the section is missing, the file is there already, or the teacher repeats itself.
        PromptError: if the partial file is of other settings.
    """
    settings = config.collect.write_prompts
    if settings is None:
        raise ConfigError(
            "collect.write_prompts is not set, but `teacher write-prompts` needs it: "
            "--set 'collect.write_prompts={path: data/self.jsonl, count: 1000}'"
        )
    if settings.path.exists():
        raise ConfigError(
            f"{settings.path} (collect.write_prompts.path) is there already; collect with it, or name another file"
        )
    prepare_environment(config.teacher)
    # First of all: what decides the drafts is read from the checkpoint, which may have to be converted.
    vocabulary = Vocabulary.from_tokenizer(ensure_checkpoint(config.teacher))
    renderer = load_renderer(config)
    partial = PartialFile(settings.path.with_name(settings.path.name + ".partial"), _key(config, renderer))
    drafts = partial.read()
    if len(drafts.texts) < settings.count:
        log.info("%d of %d prompts are there", len(drafts.texts), settings.count)
        _write(config, settings, renderer, vocabulary, partial, drafts)
    del drafts.texts[settings.count :]
    commit = hub_commit(config.teacher)
    author = config.teacher.model + (f"@{commit}" if commit is not None else "")
    with new_file(settings.path) as file:
        lines = ({"skill": SKILL, "prompt": text, "rendered": False, "written_by": author} for text in drafts.texts)
        file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    partial.path.unlink()
    return drafts


@dataclass(frozen=True, slots=True)
class PartialFile:
    """The rounds of earlier sessions, a line each: prompts, the counts so far, the key of all that decides them."""

    path: Path
    key: str

    def read(self) -> Drafts:
        """What the rounds hold; a line that a killed session did not end is cut off.

        Raises:
            PromptError: if it was written under another key.
        """
        drafts = Drafts()
        if not self.path.exists():
            return drafts
        end = 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            value: dict[str, Any] = json.loads(line)
            if value.get("settings") != self.key:
                raise PromptError(
                    f"{self.path} was begun with another teacher, seed or settings of collect.write_prompts; restore "
                    "them to go on, or delete it to begin again"
                )
            drafts.texts += value["prompts"]
            drafts.written, drafts.repeats, drafts.unusable = value["drafts"], value["repeats"], value["unusable"]
            end += len(line)
        os.truncate(self.path, end)
        return drafts

    def append(self, texts: list[str], drafts: Drafts) -> None:
        """One round, in one write."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        counts = {"drafts": drafts.written, "repeats": drafts.repeats, "unusable": drafts.unusable}
        with self.path.open("ab") as file:
            file.write(json.dumps({"settings": self.key, "prompts": texts, **counts}).encode() + b"\n")


def _write(
    config: PipelineConfig,
    settings: WritePromptsConfig,
    renderer: Renderer,
    vocabulary: Vocabulary,
    partial: PartialFile,
    drafts: Drafts,
) -> None:
    header = renderer.encode_user_header(config.collect.system_prompt)
    seen = {_plain(text) for text in drafts.texts}
    barren = 0

    def requests(start: int) -> Iterator[Request]:
        for number in range(start, start + _ROUND):
            seed = None if settings.temperature == 0 else stable_hash(config.seed, "write", number)
            sampling = Sampling(settings.temperature, settings.top_p, settings.top_k, settings.max_prompt_tokens, seed)
            yield Request(str(number), header, sampling)

    with lasting_interrupts() as check_interrupt, progress() as bar, closing(open_engine(config)) as engine:
        task = bar.add_task("writing prompts", total=settings.count, completed=len(drafts.texts), note="")
        while len(drafts.texts) < settings.count:
            answers = {int(a.key): a for a in engine.stream(requests(drafts.written), capture=False)}
            check_interrupt()
            kept = []
            for number in sorted(answers):
                text = _text(answers[number], vocabulary, renderer, settings)
                if text is None:
                    drafts.unusable += 1
                elif _plain(text) in seen:
                    drafts.repeats += 1
                else:
                    seen.add(_plain(text))
                    kept.append(text)
            drafts.written += _ROUND
            drafts.texts += kept
            partial.append(kept, drafts)
            bar.update(task, completed=min(len(drafts.texts), settings.count), note=f"{drafts.written:,} drafts")
            barren = 0 if kept else barren + 1
            if barren == _BARREN_ROUNDS:
                raise ConfigError(
                    f"the last {barren * _ROUND} drafts gave no new prompt, {len(drafts.texts)} of "
                    f"{settings.count} are there; raise temperature or max_prompt_tokens of "
                    "collect.write_prompts, or lower count"
                )


def _text(answer: Answer, vocabulary: Vocabulary, renderer: Renderer, settings: WritePromptsConfig) -> str | None:
    """The turn as text; None where it is not one that a person could have written."""
    if answer.finish_reason != "stop":
        return None
    ids = answer.response_ids[:-1]
    if vocabulary.is_special[ids].any():
        return None
    try:
        text = vocabulary.decode(ids).decode().strip()
        renderer.render(Prompt("draft", SKILL, (Message("user", text),), rendered=False))
    except (UnicodeDecodeError, PromptError):
        return None
    return text if len(text) >= settings.min_characters else None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _key(config: PipelineConfig, renderer: Renderer) -> str:
    """Of all that decides the drafts; how many are wanted and where may change."""
    assert config.collect.write_prompts is not None
    settings = config.collect.write_prompts.model_dump(mode="json", exclude={"path", "count"})
    parts = [fingerprint(config.teacher), renderer.fingerprint, config.collect.system_prompt, config.seed, settings]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
