"""What capturing and writing cost the teacher: `python -m tests.benchmarks.bench_teacher [--json FILE]`.

For each dtype, one engine in a process of its own answers the same requests without logprobs; with them through numpy
rows, and so cut into units that are written to disk, at several k; through vLLM's FlatLogprobs; and with vLLM's own
lists, which nothing reads. Then a server of the same teacher answers them over HTTP. Plain generation stands between
all ways, so that a drift of the machine's speed cancels: a ratio is to the mean of the plain runs before and after, for
the server to the median of all. Figures are medians of the rounds. The writer's own cost is the processor time of the
threads that write, per token: beside decoding, which takes both their cores and caches, and alone, where a process that
has no engine writes the last round's units again. Where `make demo` has run, so many of its records as the 70B config
has prompts in a unit are written so, too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from shared.config import PipelineConfig, ServiceConfig, TeacherConfig, dump_config, load_config
from shared.dataset.manifest import MANIFEST, Provenance
from shared.dataset.reader import Dataset
from shared.dataset.writer import DatasetWriter
from shared.tokenizer.vocabulary import Vocabulary
from teacher.engine import Answer
from teacher.engine.service import ServiceEngine
from tests.fixtures.teacher_server import Server

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs" / "demo.yaml"
PRODUCTION = ROOT / "configs" / "llama-3.3-70b.yaml"
K = 64
WRITTEN = (20, 64, 128)
AGAIN = 15
VARIANTS = {
    "float32": ("float32", True),
    "bfloat16, float32 head": ("bfloat16", True),
    "bfloat16": ("bfloat16", False),
}


def measure(
    dtype: str, fp32_head: bool, requests: int, tokens: int, rounds: int, unit: int, written_only: bool
) -> dict[str, Any]:
    """Tokens per second of one engine in every way, and the writer's microseconds a token."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from shared.dataset.records import Sampling
    from teacher.checkpoints import ensure_checkpoint, load_tokenizer
    from teacher.collect import provenance_of
    from teacher.collector import Collector
    from teacher.engine import Engine, Request, prepare_environment
    from teacher.prompts import Renderer, load_prompts
    from teacher.units import Task, Unit

    config = load_config(DEMO, [f"teacher.dtype={dtype}", f"teacher.fp32_head={str(fp32_head).lower()}"])
    prepare_environment(config.teacher)
    checkpoint = ensure_checkpoint(config.teacher)
    vocabulary = Vocabulary.from_tokenizer(checkpoint)
    renderer = Renderer(load_tokenizer(config.teacher))
    prompts = load_prompts(ROOT / config.collect.prompts)[:requests]
    rendered = [renderer.render(prompt).ids for prompt in prompts]
    sampling = Sampling(0, 1, 0, tokens, None)
    provenance = provenance_of(config, vocabulary, renderer, "benchmark", "collect")
    started = time.monotonic()
    engine = Engine(config.teacher, str(checkpoint), K)
    found: dict[str, Any] = {"load_s": time.monotonic() - started, "captured": engine.capture}
    rates: dict[str, list[float]] = {}
    ratios: dict[str, list[float]] = {}
    beside: dict[int, list[float]] = {}
    units: dict[int, list[Any]] = {}
    """What `write_unit` was given, by k."""

    def asked() -> Iterator[Request]:
        return (Request(str(i), ids, sampling) for i, ids in enumerate(rendered))

    def tokens_of(answers: Iterable[Answer]) -> int:
        return sum(len(answer.response_ids) for answer in answers)

    def stream(capture: bool) -> int:
        return tokens_of(engine.stream(asked(), capture=capture))

    def lists() -> int:
        parameters = SamplingParams(
            temperature=0, max_tokens=tokens, logprobs=K, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        core = engine._engine
        for request in asked():
            core.add_request(request.key, {"prompt_token_ids": request.prompt_ids.tolist()}, parameters)
        count = 0
        while core.has_unfinished_requests():
            count += sum(len(output.outputs[0].token_ids) for output in core.step() if output.finished)
        return count

    def written(k: int) -> int:
        seconds: list[float] = []

        class Timed(DatasetWriter):
            def write_unit(self, *arguments: Any) -> Any:
                began = time.thread_time()
                entry = super().write_unit(*arguments)
                seconds.append(time.thread_time() - began)
                units[k].append(arguments)
                return entry

        engine._top_k, units[k] = k, []
        with tempfile.TemporaryDirectory() as folder:
            writer = Timed(folder, provenance, vocabulary, Path(checkpoint))
            collector = Collector(config, renderer, vocabulary, writer, engine)
            tasks = [Task(prompt.id, prompt, "train", sampling) for prompt in prompts]
            cut = [Unit(f"u-{i:05d}", tuple(tasks[i : i + unit])) for i in range(0, len(tasks), unit)]
            for _ in collector.collect_units(cut):
                pass
        engine._top_k = K
        beside.setdefault(k, []).append(1e6 * sum(seconds) / collector.counts.tokens)
        return collector.counts.tokens

    def rate(way: str, run: Callable[[], int]) -> float:
        began = time.monotonic()
        count = run()
        found = count / (time.monotonic() - began)
        rates.setdefault(way, []).append(found)
        return found

    def compare(ways: dict[str, Callable[[], int]]) -> None:
        before = rate("plain", lambda: stream(capture=False))
        for way, run in ways.items():
            tokens = rate(way, run)
            after = rate("plain", lambda: stream(capture=False))
            ratios.setdefault(way, []).append(2 * tokens / (before + after))
            before = after

    stream(capture=True)
    kept = {f"written, k = {k}": lambda k=k: written(k) for k in WRITTEN}
    others = {} if written_only else {"captured": lambda: stream(capture=True), "vLLM's lists": lists}
    for _ in range(rounds):
        compare(others | kept)
    if not written_only:
        engine.use_flat_logprobs()
        for _ in range(rounds):
            compare({"FlatLogprobs": lambda: stream(capture=True)})
    engine.close()
    if not written_only:
        with served(config) as teacher:
            service = ServiceEngine(teacher, K, False)
            list(service.stream(asked(), capture=True))
            for _ in range(rounds):
                for capture, way in ((True, "service"), (False, "service, without logprobs")):
                    rate(way, lambda capture=capture: tokens_of(service.stream(asked(), capture=capture)))
            service.close()
    found["tokens_per_s"] = {way: median(values) for way, values in rates.items()}
    plain = found["tokens_per_s"]["plain"]
    found["ratio"] = {
        way: median(ratios[way]) if way in ratios else value / plain for way, value in found["tokens_per_s"].items()
    }
    found["writer_us_per_token"] = {"beside decoding": {str(k): median(costs) for k, costs in beside.items()}}
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        alone = {str(k): pool.submit(written_again, provenance, vocabulary, units[k]).result() for k in WRITTEN}
    found["writer_us_per_token"]["alone"] = alone
    return found


def written_again(provenance: Provenance, vocabulary: Vocabulary, units: list[Any]) -> float:
    """Microseconds a token of writing `units`, which `DatasetWriter.write_unit` takes; the median of several times."""
    costs = []
    for _ in range(AGAIN):
        with tempfile.TemporaryDirectory() as folder:
            writer = DatasetWriter(folder, provenance, vocabulary, None)
            began = time.thread_time()
            entries = [writer.write_unit(*arguments) for arguments in units]
            costs.append(1e6 * (time.thread_time() - began) / sum(entry.tokens for entry in entries))
    return median(costs)


def production_unit() -> float | None:
    """`written_again` of as many of the demo's own records as the 70B config has in a unit, where there is a demo."""
    shards = load_config(DEMO).shards_dir
    if not (shards / MANIFEST).exists():
        return None
    dataset = Dataset.open(shards)
    records = [*itertools.islice(dataset.records(), load_config(PRODUCTION).collect.unit_prompts)]
    return written_again(dataset.provenance, dataset.vocabulary, [("large", records)])


@contextmanager
def served(config: PipelineConfig) -> Iterator[TeacherConfig]:
    """The same teacher behind a server of its own; the section that asks it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(dump_config(config))
        server = Server(path, Path(folder) / "server.log")
        server.start()
        try:
            server.wait()
            yield config.teacher.model_copy(update={"service": ServiceConfig(urls=[server.url])})
        finally:
            server.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--unit", type=int, default=32, help="prompts of a unit that is written")
    parser.add_argument("--written-only", action="store_true", help="plain generation and what is written, only")
    parser.add_argument("--variants", nargs="*", default=["float32"], choices=list(VARIANTS))
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for name in options.variants:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            arguments = (
                *VARIANTS[name],
                options.requests,
                options.tokens,
                options.rounds,
                options.unit,
                options.written_only,
            )
            found = results[name] = pool.submit(measure, *arguments).result()
        title = f"{name}: {options.requests} requests of {options.tokens} tokens, k = {K} unless another is named"
        table = Table("way", "tokens/s", "ratio", title=title)
        for way, value in found["tokens_per_s"].items():
            table.add_row(way, f"{value:.0f}", f"{found['ratio'][way]:.3f}")
        Console().print(table)
        for way, costs in found["writer_us_per_token"].items():
            values = ", ".join(f"{value:.1f} at k = {k}" for k, value in costs.items())
            Console().print(f"the writer's own cost {way}, microseconds a token: {values}")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        results["production_unit_us_per_token"] = large = pool.submit(production_unit).result()
    if large is not None:
        Console().print(f"the same of the demo's records in a unit of the 70B config's size: {large:.1f}")
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
