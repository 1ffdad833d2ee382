"""What the proposer did, counted: as a dict, and as Prometheus counters beside vLLM's own.

vLLM's `/metrics` shows them where engine and server are one process, or where `PROMETHEUS_MULTIPROC_DIR` names an empty
directory when the server starts, as `student serve` sees to. Only a rank that drafts counts.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

# name → (label, meaning)
_METRICS = {
    "drafts": ("maker", "Drafts that were handed to vLLM."),
    "draft_tokens": ("maker", "Tokens in these drafts."),
    "accepted_tokens": ("maker", "Tokens of these drafts that the target accepted."),
    "undrafted": ("reason", "Requests that a step drafted nothing for."),
    "seconds": ("part", "Time spent in the proposer."),
    "failures": ("error", "Errors while drafting; each is logged once."),
}


@functools.cache
def _prometheus(name: str) -> Any:
    """One for the process, as Prometheus wants it."""
    from prometheus_client import Counter as PrometheusCounter

    label, meaning = _METRICS[name]
    return PrometheusCounter(f"llada_drafter_{name}", meaning, [label])


class Counters:
    """Counts by name and label, since the start."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()

    def add(self, name: str, label: str, amount: float = 1) -> None:
        if amount:
            self.counts[name, label] += amount  # type: ignore[assignment]
            _prometheus(name).labels(label).inc(amount)

    def tree(self) -> dict[str, dict[str, float]]:
        """name → label → count, for JSON."""
        tree: dict[str, dict[str, float]] = {name: {} for name in _METRICS}
        for (name, label), count in sorted(self.counts.items()):
            tree[name][label] = count
        return tree
