"""What capturing costs the teacher: `python -m tests.benchmarks.bench_teacher [--json FILE]`.

For each dtype, one engine in a process of its own decodes the same prompts without logprobs, with them through numpy
rows, and with them through vLLM's FlatLogprobs; then the same requests once more cut into units of work, each written
to disk, against one stream without units. Rounds alternate, so that a drift of the machine's speed cancels; every
figure is tokens per second, and the ratios are within one engine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from shared.config import load_config

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs" / "demo.yaml"
VARIANTS = {
    "float32": ("float32", True),
    "bfloat16, float32 head": ("bfloat16", True),
    "bfloat16": ("bfloat16", False),
}


def measure(dtype: str, fp32_head: bool, requests: int, tokens: int, rounds: int, top_k: int) -> dict[str, Any]:
    """Tokens per second of one engine in every way of capturing, and through units of work."""
    from shared.dataset.reader import DatasetWriter
    from shared.dataset.records import Sampling
    from shared.tokenizer.vocabulary import Vocabulary
    from teacher.checkpoints import ensure_checkpoint, load_tokenizer
    from teacher.collect import provenance_of
    from teacher.collector import Collector
    from teacher.engine import Engine, Request, prepare_environment
    from teacher.prompts import Renderer, load_prompts
    from teacher.units import Task, Unit

    overrides = [f"teacher.dtype={dtype}", f"teacher.fp32_head={str(fp32_head).lower()}", f"collect.top_k={top_k}"]
    config = load_config(DEMO, overrides)
    prepare_environment(config.teacher)
    checkpoint = ensure_checkpoint(config.teacher)
    renderer = Renderer(load_tokenizer(config.teacher))
    prompts = load_prompts(ROOT / config.collect.prompts)[:requests]
    rendered = [renderer.render(prompt).ids for prompt in prompts]
    sampling = Sampling(0, 1, 0, tokens, None)
    started = time.monotonic()
    engine = Engine(config.teacher, str(checkpoint), top_k)
    found: dict[str, Any] = {"load_s": time.monotonic() - started}
    rates: dict[str, list[float]] = {"without": [], "numpy": [], "one stream": [], "units": [], "flat": []}

    def stream(capture: bool) -> float:
        began = time.monotonic()
        asked = (Request(str(i), ids, sampling, ignore_end=True) for i, ids in enumerate(rendered))
        count = sum(len(answer.response_ids) for answer in engine.stream(asked, capture=capture))
        return count / (time.monotonic() - began)

    def units(size: int) -> float:
        vocabulary = Vocabulary.from_tokenizer(checkpoint)
        with tempfile.TemporaryDirectory() as folder:
            provenance = provenance_of(config, vocabulary, renderer, "benchmark", "collect")
            writer = DatasetWriter(folder, provenance, vocabulary, Path(checkpoint))
            collector = Collector(config, renderer, vocabulary, writer, engine)
            tasks = [Task(p.id, p, "train", Sampling(0, 1, 0, tokens, None)) for p in prompts]
            cut = [Unit(f"u-{i:05d}", tuple(tasks[i : i + size])) for i in range(0, len(tasks), size)]
            began = time.monotonic()
            for _ in collector.collect_units(cut):
                pass
            return collector.counts.tokens / (time.monotonic() - began)

    stream(capture=True)
    for _ in range(rounds):
        rates["without"].append(stream(capture=False))
        rates["numpy"].append(stream(capture=True))
        rates["one stream"].append(units(len(prompts)))
        rates["units"].append(units(16))
    found["verified"] = engine.capture
    engine.use_flat_logprobs()
    for _ in range(rounds):
        rates["flat"].append(stream(capture=True))
    engine.close()
    return found | {name: sorted(values)[len(values) // 2] for name, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS))
    options = parser.parse_args()
    table = Table(title=f"teacher on {options.requests} requests of {options.tokens} tokens, k = {options.top_k}")
    columns = ("dtype", "load s", "tok/s without", "numpy", "ratio", "flat", "ratio", "units of 16 / one unit")
    for column in columns:
        table.add_column(column, justify="left" if column == "dtype" else "right")
    results = {}
    for name in options.variants:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            arguments = (*VARIANTS[name], options.requests, options.tokens, options.rounds, options.top_k)
            found = pool.submit(measure, *arguments).result()
        results[name] = found
        table.add_row(
            name, f"{found['load_s']:.0f}", f"{found['without']:.0f}", f"{found['numpy']:.0f}",
            f"{found['numpy'] / found['without']:.2f}", f"{found['flat']:.0f}",
            f"{found['flat'] / found['without']:.2f}", f"{found['units'] / found['one stream']:.2f}",
        )  # fmt: skip
    Console().print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
