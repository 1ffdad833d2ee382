"""One prompt, the split into training and held-out, and the fingerprint of them all.

The split is a property of the prompt's id and its conversation alone: ids are ordered by a hash within each skill,
and the first share of each skill is held out, so every skill is on both sides. Prompts of one and the same
conversation go to the same side, whatever their ids, so nothing held out is trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shared.config import DecodingConfig, Split
from shared.dataset.records import Message
from shared.dataset.split import held_out, stable_hash


@dataclass(frozen=True, slots=True)
class Prompt:
    """One conversation that the teacher answers; `response` where the answer is given and only to be scored.

    Attributes:
        rendered: whether its text is rendered already; None leaves that to `collect.rendered`.
        decoding: its source's rules; empty are those of `collect.decoding`.
    """

    id: str
    skill: str
    messages: tuple[Message, ...]
    response: str | None = None
    finished: bool = True
    rendered: bool | None = None
    decoding: tuple[DecodingConfig, ...] = ()

    @property
    def content(self) -> str:
        """The conversation as one string, equal for equal conversations."""
        return json.dumps([[message.role, message.content] for message in self.messages], ensure_ascii=False)


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
