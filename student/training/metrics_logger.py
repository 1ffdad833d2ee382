"""What a run says about itself: a line a step for people, a JSON object a step for programs.

A resumed run first drops what was written after the checkpoint that it resumes from, so that both files read as if
the run had never stopped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.files import write_text


class MetricsLogger:
    """`metrics.jsonl` and `training_log.log` of a run; every line is flushed as it is written."""

    def __init__(self, directory: Path, resume_step: int) -> None:
        """Open both files for steps after `resume_step`."""
        directory.mkdir(parents=True, exist_ok=True)
        metrics, log = directory / "metrics.jsonl", directory / "training_log.log"
        kept = [entry for entry in read_metrics(metrics) if entry["step"] <= resume_step]
        self.entries = kept
        write_text(metrics, "".join(json.dumps(entry) + "\n" for entry in kept))
        write_text(log, "".join(describe(entry) + "\n" for entry in kept))
        self._metrics = metrics.open("a", encoding="utf-8")
        self._log = log.open("a", encoding="utf-8")

    def write(self, entry: dict[str, Any]) -> None:
        """Append one step to both files."""
        self.entries.append(entry)
        self._metrics.write(json.dumps(entry) + "\n")
        self._metrics.flush()
        self._log.write(describe(entry) + "\n")
        self._log.flush()

    def close(self) -> None:
        self._metrics.close()
        self._log.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The steps of a `metrics.jsonl`; a last line cut off by a crash is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return


def describe(entry: dict[str, Any]) -> str:
    """One step as people read it: when, where in the data, how well, how fast, how long still."""
    terms = " ".join(f"{name} {entry[name]:.4f}" for name in ("loss", "ce", "kl") if entry.get(name) is not None)
    norm = "skipped" if entry["grad_norm"] is None else f"{entry['grad_norm']:.2f}"
    minutes, seconds = divmod(round(entry["eta_s"]), 60)
    return (
        f"{entry['time']} step {entry['step']}/{entry['steps']} epoch {entry['epoch']:.2f} | "
        f"{terms} match@1 {entry['match_by_depth'][0] or 0:.3f} | "
        f"lr {entry['learning_rate']:.2e} grad {norm} | "
        f"{entry['tokens_per_s']:,.0f} tok/s eta {minutes}m{seconds:02d}s"
    )
