"""Which prompts are held out: the one rule, of collections and of imports."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping


def stable_hash(*parts: object) -> int:
    """63 bits of sha256 over `parts`, the same on every machine."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def held_out(skills: Mapping[str, str], share: float) -> set[str]:
    """The prompts that training never sees.

    Args:
        skills: prompt id → its kind. share: from 0 to 1.

    Returns:
        Of n prompts of a skill round(share n), the first by a hash of their ids; with a share between 0 and 1 at least
        one and at most n - 1 where n > 1, so that every skill is on both sides.
    """
    members: dict[str, list[str]] = defaultdict(list)
    for prompt, skill in skills.items():
        members[skill].append(prompt)
    chosen: set[str] = set()
    for prompts in members.values():
        count = round(share * len(prompts))
        if 0 < share < 1 and len(prompts) > 1:
            count = min(max(count, 1), len(prompts) - 1)
        chosen.update(sorted(prompts, key=stable_hash)[:count])
    return chosen
