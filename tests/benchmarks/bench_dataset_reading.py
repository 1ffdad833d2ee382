"""Reading in stable shuffled order against pyarrow's plain scan of the same columns, and the memory that it takes.

    python -m tests.benchmarks.bench_dataset_reading --dataset runs/demo/shards --copies 16

The dataset is grown by copying its records under new names, so that sizes differ and content does not. Reading has
a cost per response beside the one per token, so it is measured at the demo's short responses and at longer ones.
Every measure is a process of its own; plain scan and shuffled read take turns. The table gives medians, and the median
of each turn's ratio, because what else the machine does changes within seconds. `first` is all that a fresh process
does once its modules are loaded, the sha256 of every shard included; `again` is its second pass, as later epochs are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from shared.dataset import Dataset
from shared.records import Distributions, Record
from shared.schema import CONVERSATION_COLUMNS, SCHEMA
from shared.writer import DatasetWriter

WINDOW = 1 << 21
UNIT = 128
TRAINING_COLUMNS = [name for name in SCHEMA.names if name not in CONVERSATION_COLUMNS]
LONG = 400
"""Tokens of a response, as instruction data of a large teacher has them."""


def join(records: Sequence[Record], tokens: int) -> list[Record]:
    """Records with responses of at least `tokens` tokens, each made of several in a row; the rest is dropped."""
    joined: list[Record] = []
    parts: list[Record] = []
    for record in records:
        parts.append(record)
        if sum(len(part.response_ids) for part in parts) < tokens:
            continue
        rows = [part.distributions for part in parts if part.distributions]
        widths = np.concatenate([np.diff(row.offsets) for row in rows])
        distributions = Distributions(
            np.concatenate([[0], np.cumsum(widths)]).astype(np.int64),
            *(np.concatenate([getattr(row, name) for row in rows]) for name in ("ids", "logprobs", "tail", "sampled")),
        )
        joined.append(
            replace(
                parts[0],
                response_ids=np.concatenate([part.response_ids for part in parts]),
                response_bytes=b"".join(part.response_bytes for part in parts),
                distributions=distributions,
            )
        )
        parts = []
    return joined


def grow(source: Path, destination: Path, copies: int, tokens: int) -> int:
    """Write `copies` of the dataset's records, joined to `tokens` a response; response tokens of the result."""
    dataset = Dataset.open(source)
    records = join(list(dataset.records()), tokens)
    writer = DatasetWriter(destination, dataset.provenance, dataset.vocabulary, None)
    units = []
    for copy in range(copies):
        for start in range(0, len(records), UNIT):
            units.append(f"copy-{copy:03d}-{start:06d}")
            batch = [replace(r, sample_id=f"{r.sample_id}/{copy}") for r in records[start : start + UNIT]]
            writer.write_unit(units[-1], batch)
    return writer.finish(units).tokens


def scan(directory: Path) -> int:
    """Read every shard with pyarrow alone, one row group at a time; response tokens seen."""
    tokens = 0
    for path in sorted((directory / "data").iterdir()):
        file = pq.ParquetFile(path)
        for group in range(file.metadata.num_row_groups):
            table = file.read_row_group(group, columns=TRAINING_COLUMNS)
            tokens += len(table["response_ids"].combine_chunks().values)
    return tokens


def shuffled(directory: Path) -> int:
    """Read every record in shuffled order, logprobs decoded; response tokens seen."""
    records = Dataset.open(directory).shuffled(1, conversation=False, window_candidates=WINDOW)
    return sum(len(record.response_ids) for record in records)


def measure(way: str, directory: Path) -> dict[str, float]:
    """One process's times; runs in the child."""
    read = {"scan": scan, "shuffled": shuffled}[way]
    times = []
    for _ in range(2):
        started = time.perf_counter()
        tokens = read(directory)
        times.append(time.perf_counter() - started)
    first, again = times
    return {
        "tokens": tokens,
        "first": tokens / first,
        "again": tokens / again,
        "peak_mib": peak_mib(),
    }


def peak_mib() -> float:
    """This process's largest resident set; `getrusage` would give the parent's, where that was larger."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, default=Path("runs/demo/shards"))
    parser.add_argument("--copies", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--measure", nargs=2, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        way, place = arguments.measure
        print(json.dumps(measure(way, Path(place))))
        return
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for copies, length in itertools.product((arguments.copies // 4, arguments.copies), (0, LONG)):
            directory = Path(folder) / f"copies-{copies}-{length}"
            grow(arguments.dataset, directory, copies, length)
            rounds: dict[str, list[dict[str, float]]] = {"scan": [], "shuffled": []}
            for _ in range(arguments.rounds):
                for way, runs in rounds.items():
                    command = [sys.executable, "-m", __spec__.name, "--measure", way, str(directory)]
                    runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            shares = {
                f"ratio{suffix}": statistics.median(
                    ours[key] / plain[key] for plain, ours in zip(rounds["scan"], rounds["shuffled"], strict=True)
                )
                for suffix, key in (("", "first"), ("_again", "again"))
            }
            for way, runs in rounds.items():
                middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                results.append({"copies": copies, "tokens_per_response": length, "way": way, **middle})
            results[-1].update(shares)
    title = f"1,000 tokens (each second), the training columns, window of {WINDOW:,} candidates"
    columns = ("tokens", "each", "way", "first", "again", "ratio", "again", "MiB")
    table = Table(*columns, title=title)
    for plain, ours in zip(results[::2], results[1::2], strict=True):
        for row in (plain, ours):
            length = row["tokens_per_response"]
            ratios = [f"{row[key]:.2f}" if key in row else "" for key in ("ratio", "ratio_again")]
            table.add_row(
                f"{row['tokens'] / 1000:,.0f}", f"≥ {length}" if length else "stored", row["way"],
                f"{row['first'] / 1000:,.0f}", f"{row['again'] / 1000:,.0f}", *ratios, f"{row['peak_mib']:.0f}",
            )  # fmt: skip
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
