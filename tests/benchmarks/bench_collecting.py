"""Collecting from many short prompts: memory over the run, and how long the first token takes.

    python -m tests.benchmarks.bench_collecting [--prompts 20000] [--json FILE]

`teacher collect` runs in a process of its own with a tiny random LLaMA in vLLM; the resident memory of it and its
children is read twice a second. Quarters are of the time between the engine's start and the end. Beside it stands how
long a process takes that starts the same engine and nothing else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from rich.console import Console
from rich.table import Table

from shared.config import PipelineConfig, load_config
from shared.vllm_settings import engine_arguments, environment
from tests.fixtures.conversations import teacher_tokenizer
from tests.fixtures.random_teacher import save_random_teacher


def main(
    prompts: Annotated[int, typer.Option(help="How many.")] = 20_000,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Collect once and print what it took."""
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), prompts)
    table = Table("figure", "value", title=f"{prompts:,} prompts, a tiny random teacher")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.3g}" if isinstance(value, float) else str(value))
    Console().print(table)
    if json_path is not None:
        json_path.write_text(json.dumps(figures, indent=2))


def measure(folder: Path, prompts: int) -> dict[str, Any]:
    """Collect in `folder`; seconds, MiB and their ratios."""
    save_random_teacher(teacher_tokenizer(folder / "tokenizer"), folder / "teacher")
    words = ["bridge", "river", "light", "stone", "winter", "paper", "music", "garden", "letter", "window"]
    rng = np.random.default_rng(0)
    lines = [{"id": str(n), "prompt": " ".join(rng.choice(words, 6)) + f" {n}"} for n in range(prompts)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    settings = {
        "name": "many",
        "runs": folder / "runs",
        "teacher.model": folder / "teacher",
        "teacher.gguf": "null",
        "teacher.max_sequence_tokens": 256,
        "teacher.kv_cache_gib": 1,
        "collect.prompts": folder / "prompts.jsonl",
        "collect.held_out": 0,
        "collect.measure_capture": "false",
        "collect.decoding": "[{split: train, temperature: 1, max_response_tokens: 8}]",
    }
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "teacher.cli", "collect", "configs/demo.yaml", *overrides]
    alone = _engine_alone(load_config(Path("configs/demo.yaml"), [f"{key}={value}" for key, value in settings.items()]))
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=(folder / "log").open("w"))
    tree, samples = psutil.Process(process.pid), []
    up = None
    while process.poll() is None:
        if up is None and "is up after" in (folder / "log").read_text():
            up = time.monotonic() - started
        try:
            members = [tree, *tree.children(recursive=True)]
            samples.append((time.monotonic() - started, sum(member.memory_info().rss for member in members)))
        except psutil.NoSuchProcess:
            continue
        time.sleep(0.5)
    log = (folder / "log").read_text()
    if process.returncode or up is None:
        sys.exit(log)
    seconds, resident = np.array(samples).T
    quarters = np.array_split(resident[seconds >= up] / 2**20, 4)
    second, last = quarters[1].max(), quarters[3].max()
    return {
        "responses/s": prompts / (seconds[-1] - up),
        "command to engine, s": up,
        "engine alone, s": alone,
        "ratio": up / alone,
        "MiB, second quarter": float(second),
        "MiB, last quarter": float(last),
        "ratio of memory": float(last / second),
    }


def _engine_alone(config: PipelineConfig) -> float:
    """Seconds of a process that imports vLLM and starts this teacher."""
    code = f"from vllm import LLM; LLM(**{engine_arguments(config.teacher)!r})"
    started = time.monotonic()
    variables = os.environ | environment(config.teacher)
    subprocess.run([sys.executable, "-c", code], env=variables, check=True, capture_output=True)
    return time.monotonic() - started


if __name__ == "__main__":
    typer.run(main)
