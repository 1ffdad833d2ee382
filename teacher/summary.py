"""What a collection cost and kept: runs/NAME/collect.json, and the same as a table."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from rich.table import Table

from shared.config import PipelineConfig
from shared.console import titled_table
from shared.dataset.reader import Dataset
from shared.dataset.records import Sampling
from shared.files import write_json, write_text
from teacher.engine import Request, TeacherEngine

log = logging.getLogger(__name__)

FILE = "collect.json"
FAILURES = "failures.jsonl"
_PROBE_REQUESTS = 64
_PROBE_TOKENS = 12


class Summary(BaseModel):
    """A figure that was not measured is None.

    Attributes:
        responses, tokens: in the dataset. bytes_per_token: all shards over all response tokens.
        failures: responses that failed, three times each; failures.jsonl names them.
        tokens_per_s: of the last session that collected anything, from its first request to its last shard: of all its
            workers on Ray, of the one that ended last where several processes worked. workers: that it is of.
        mean_topk_mass: probability inside the stored candidates, mean over response tokens.
        capture_ratio: tokens per second with logprobs over without, by `measure_capture`.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    responses: int | None = None
    tokens: int | None = None
    failures: int | None = None
    tokens_per_s: float | None = None
    workers: int = 1
    bytes_per_token: float | None = None
    mean_topk_mass: float | None = None
    capture_ratio: float | None = None

    def table(self) -> Table:
        """For people."""
        table = titled_table("collected")
        for name, value, form in (
            ("responses", self.responses, ",d"),
            ("response tokens", self.tokens, ",d"),
            ("responses that failed", self.failures, ",d"),
            ("tokens per second", self.tokens_per_s, ",.0f"),
            ("bytes per token on disk", self.bytes_per_token, ".1f"),
            ("probability kept per token", self.mean_topk_mass, ".4f"),
            ("speed with capture / without", self.capture_ratio, ".2f"),
        ):
            table.add_row(name, "not measured" if value is None else format(value, form))
        return table


def read_summary(run_dir: Path) -> Summary:
    """The run's collect.json; an empty summary where there is none or it cannot be read."""
    try:
        return Summary.model_validate(json.loads((run_dir / FILE).read_text()))
    except (OSError, ValueError):  # of pydantic, too
        return Summary()


def write_failures(run_dir: Path, failures: Mapping[str, str]) -> None:
    """Write failures.jsonl, sample ids with the reason; no file where there are none."""
    path = run_dir / FAILURES
    if failures:
        lines = (json.dumps({"id": name, "reason": reason}, ensure_ascii=False) for name, reason in failures.items())
        write_text(path, "".join(f"{line}\n" for line in lines))
        log.warning("%d responses failed: %s; `teacher collect --retry-failed` asks again", len(failures), path)
    else:
        path.unlink(missing_ok=True)


def summarize(config: PipelineConfig, dataset: Dataset, rates: Summary, failures: int = 0) -> Summary:
    """Count the dataset, take the rates from `rates`, and write collect.json in one step."""
    kept = 0.0
    for table in dataset.tables(["tail_mass"]):
        tail = pc.list_flatten(table["tail_mass"]).to_numpy()
        kept += float((1.0 - tail.astype(np.float64)).sum())
    manifest = dataset.manifest
    summary = Summary(
        responses=manifest.rows,
        tokens=manifest.tokens,
        failures=failures,
        tokens_per_s=rates.tokens_per_s,
        workers=rates.workers,
        bytes_per_token=manifest.bytes / manifest.tokens if manifest.tokens else None,
        mean_topk_mass=kept / manifest.tokens if manifest.tokens else None,
        capture_ratio=rates.capture_ratio,
    )
    write_json(config.run_dir / FILE, summary.model_dump())
    return summary


def measure_capture(engine: TeacherEngine, prompts: Sequence[NDArray[np.int32]]) -> float | None:
    """Tokens per second with logprobs over without, on a sample of prompts in the loaded engine.

    Both are run twice in the order without, with, with, without, so that a drift of the machine's speed cancels, after
    a run that leaves the prompts in the prefix cache for all four. Ten to fifteen seconds on two cores.
    """
    chosen = prompts[:_PROBE_REQUESTS]
    if not chosen:
        return None
    seconds = {True: 0.0, False: 0.0}
    _timed(engine, chosen, capture=True)
    for capture in (False, True, True, False):
        seconds[capture] += _timed(engine, chosen, capture)
    ratio = seconds[False] / seconds[True]
    log.info(
        "capture ratio %.2f: %d tokens without logprobs in %.1f s, with them in %.1f s",
        ratio, 2 * len(chosen) * _PROBE_TOKENS, seconds[False], seconds[True],
    )  # fmt: skip
    return ratio


def _timed(engine: TeacherEngine, prompts: Sequence[NDArray[np.int32]], capture: bool) -> float:
    sampling = Sampling(0, 1, 0, _PROBE_TOKENS, None)
    started = time.monotonic()
    requests = (Request(f"measure-{i}", ids, sampling, ignore_end=True) for i, ids in enumerate(prompts))
    for _ in engine.stream(requests, capture=capture):
        pass
    return time.monotonic() - started
