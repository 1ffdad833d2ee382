"""Reading in stable shuffled order against pyarrow's plain scan of the same columns, and the memory that it takes.

    python -m tests.benchmarks.bench_dataset_reading --dataset runs/demo/shards --copies 4

The dataset is grown by copying its records under new names, so that sizes differ and content does not. Every measure
is a process of its own; plain scan and shuffled read take turns, and the table gives the median and the ratio. The
first read of a shard includes its checksum; `again` is a second pass of the same process, as later epochs are.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from shared.dataset import Dataset
from shared.writer import DatasetWriter

WINDOW = 1 << 21


def grow(source: Path, destination: Path, copies: int) -> int:
    """Write `copies` of the dataset's records; response tokens of the result."""
    dataset = Dataset.open(source)
    records = list(dataset.records())
    writer = DatasetWriter(destination, dataset.provenance, dataset.vocabulary, None)
    units = []
    for copy in range(copies):
        for start in range(0, len(records), 256):
            units.append(f"copy-{copy:03d}-{start:06d}")
            batch = [replace(r, sample_id=f"{r.sample_id}/{copy}") for r in records[start : start + 256]]
            writer.write_unit(units[-1], batch)
    return writer.finish(units).tokens


def scan(directory: Path) -> int:
    """Read every shard with pyarrow alone, one row group at a time; response tokens seen."""
    tokens = 0
    for path in sorted((directory / "data").iterdir()):
        file = pq.ParquetFile(path)
        for group in range(file.metadata.num_row_groups):
            table = file.read_row_group(group)
            tokens += len(table["response_ids"].combine_chunks().values)
    return tokens


def shuffled(directory: Path) -> int:
    """Read every record in shuffled order, logprobs decoded; response tokens seen."""
    return sum(len(r.response_ids) for r in Dataset.open(directory).shuffled(1, window_candidates=WINDOW))


def measure(way: str, directory: Path) -> dict[str, float]:
    """One process's times; runs in the child."""
    import shared.columns  # noqa: F401 - imports and pyarrow's first call are not what is measured

    for path in sorted((directory / "data").iterdir())[:1]:
        pq.read_table(path)
    started = time.perf_counter()
    tokens = {"scan": scan, "shuffled": shuffled}[way](directory)
    first = time.perf_counter() - started
    started = time.perf_counter()
    {"scan": scan, "shuffled": shuffled}[way](directory)
    return {
        "tokens": tokens,
        "first": tokens / first,
        "again": tokens / (time.perf_counter() - started),
        "peak_mib": peak_mib(),
    }


def peak_mib() -> float:
    """This process's largest resident set; `getrusage` would give the parent's, where that was larger."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, default=Path("runs/demo/shards"))
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--measure", nargs=2, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure[0], Path(arguments.measure[1]))))
        return
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for copies in (1, arguments.copies):
            directory = Path(folder) / f"copies-{copies}"
            grow(arguments.dataset, directory, copies)
            rounds: dict[str, list[dict[str, float]]] = {"scan": [], "shuffled": []}
            for _ in range(arguments.rounds):
                for way, runs in rounds.items():
                    command = [sys.executable, "-m", __spec__.name, "--measure", way, str(directory)]
                    runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            for way, runs in rounds.items():
                middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                results.append({"copies": copies, "way": way, **middle})
    title = f"tokens/s, every column, window of {WINDOW:,} candidates"
    table = Table("dataset", "way", "first pass", "again", "ratio", "ratio again", "peak MiB", title=title)
    for plain, ours in zip(results[::2], results[1::2], strict=True):
        ours["ratio"], ours["ratio_again"] = ours["first"] / plain["first"], ours["again"] / plain["again"]
        for row in (plain, ours):
            table.add_row(
                f"{row['tokens']:,.0f} tokens", row["way"], f"{row['first']:,.0f}", f"{row['again']:,.0f}",
                f"{row['ratio']:.2f}" if "ratio" in row else "",
                f"{row['ratio_again']:.2f}" if "ratio" in row else "", f"{row['peak_mib']:.0f}",
            )  # fmt: skip
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
