"""What a run says about itself: a line a step for people, a JSON object a step for programs.

A resumed run first drops what was written after the checkpoint that it resumes from, so that both files read as if
the run had never stopped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shared.errors import ConfigError
from shared.files import write_text


class MetricsLogger:
    """`metrics.jsonl` and `training_log.log` of a run; every line is flushed as it is written. And its trackers."""

    def __init__(self, directory: Path, resume_step: int, trackers: Sequence[str] = ()) -> None:
        """Open both files, and `trackers`, for steps after `resume_step`."""
        directory.mkdir(parents=True, exist_ok=True)
        metrics, log = directory / "metrics.jsonl", directory / "training_log.log"
        kept = [entry for entry in read_metrics(metrics) if entry["step"] <= resume_step]
        self.entries = kept
        write_text(metrics, "".join(json.dumps(entry) + "\n" for entry in kept))
        write_text(log, "".join(describe(entry) + "\n" for entry in kept))
        self._metrics = metrics.open("a", encoding="utf-8")
        self._log = log.open("a", encoding="utf-8")
        self._trackers = [start_tracker(name, directory, resume_step) for name in trackers]

    def write(self, entry: dict[str, Any]) -> None:
        """Append one step to both files."""
        self.entries.append(entry)
        self._metrics.write(json.dumps(entry) + "\n")
        self._metrics.flush()
        self._log.write(describe(entry) + "\n")
        self._log.flush()
        for tracker in self._trackers:
            tracker.log(dict(scalars(entry)), step=entry["step"])

    def close(self) -> None:
        self._metrics.close()
        self._log.close()
        for tracker in self._trackers:
            tracker.finish()


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that accelerate does not know, or whose package is not installed.

    Raises:
        ConfigError: naming it.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    installed = [tracker.value for tracker in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(f"train.trackers: {name!r} is none of {', '.join(LOGGER_TYPE_TO_CLASS)}")
        if name not in installed:
            raise ConfigError(f"train.trackers: {name} is not installed: pip install {name}, or leave it out")


def start_tracker(name: str, directory: Path, resume_step: int) -> Any:
    """One of accelerate's trackers, for the run in `directory`; files go into `directory/tracking`."""
    from accelerate.state import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's own log asks for it
    kind = LOGGER_TYPE_TO_CLASS[name]
    places = {"logging_dir": directory / "tracking"} if kind.requires_logging_directory else {}
    # TensorBoard hides what an interrupted run wrote after the step that is resumed.
    again = {"purge_step": resume_step + 1} if name == "tensorboard" else {}
    tracker = kind(directory.name, **places, **again)
    tracker.main_process_only = False  # only rank 0 is here
    if hasattr(tracker, "start"):
        tracker.start()
    return tracker


def scalars(entry: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of an entry, those of lists by depth, those of mappings by name."""
    for name, value in entry.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            yield from scalars({str(depth): item for depth, item in enumerate(value, 1)}, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", value


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
    """One step as people read it: when, where in the data, how well, at what cost, how long still."""
    terms = " ".join(
        f"{name} {entry[name]:.4f}" for name in ("loss", "ce", "kl", "tv", "path") if entry.get(name) is not None
    )
    norm = "skipped" if entry["grad_norm"] is None else f"{entry['grad_norm']:.2f}"
    if entry.get("grad_largest") is not None:
        norm += f" (largest {entry['grad_largest']:.1e}, zeros {entry['grad_zeros']:.1%})"
    parts = " ".join(f"{name} {seconds:.2f}" for name, seconds in entry["seconds"].items())
    memory = "" if entry["device_gib"] is None else f"{entry['device_gib']:.1f} + "
    used = "" if entry["utilization"] is None else f" MFU {entry['utilization']:.0%}"
    minutes, seconds = divmod(round(entry["eta_s"]), 60)
    line = (
        f"{entry['time']} step {entry['step']}/{entry['steps']} epoch {entry['epoch']:.2f} | "
        f"{terms} match@1 {entry['match_by_depth'][0] or 0:.3f} | "
        f"lr {entry['learning_rate']:.2e} grad {norm} | "
        f"s: {parts}, {entry['data_wait']:.1%} waiting, {entry['padding']:.1%} padding | "
        f"GiB {memory}{entry['host_gib']:.1f} | "
        f"{entry['tokens_per_s']:,.0f} tok/s{used} eta {minutes}m{seconds:02d}s"
    )
    measured = [(name, value) for name, value in entry.get("evaluation", {}).items() if value is not None]
    return line + "".join(f" | held out: {name} {value:.3f}" for name, value in measured)
