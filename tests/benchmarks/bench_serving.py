"""A server with the drafter under load: `python -m tests.benchmarks.bench_serving [--config FILE] [--json FILE]`.

Needs the config's trained student (`make demo`). Two servers, one after the other, `student serve` and the same without
the drafter, get the same greedy requests through an OpenAI client, 16 in flight, while others are cancelled in the
middle and the KV cache is too small for all, so that vLLM preempts. Among them are all kinds of requests that a drafter
could get wrong. Then two more, with a KV cache for all requests and 64 MiB for the drafter, get the same 500 requests,
32 in flight, with longer contexts than fit into the drafter's memory. Ends with 1 where an output differs, a request
fails, a server's log has a traceback, or the server with the drafter grows by more than the other one does. All servers
give large blocks back to the system at once: what the C library keeps in pieces grows with the variety of shapes, and
hides what is held.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from openai import AsyncOpenAI, BadRequestError
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from shared.config import load_config
from shared.dataset.reader import Dataset
from shared.dataset.records import Message
from shared.tokenizer.chat import ChatEncoder
from shared.tokenizer.files import read_tokenizer_file
from tests.fixtures.teacher_server import free_port

MEMORY_MIB, COMPARED, LOADED = 64, 200, 500
BLOCK_TOKENS, FEW_BLOCKS = 32, 40
RETURNED_AT_ONCE = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}
KINDS: dict[str, dict[str, Any]] = {
    "logprobs": {"logprobs": 3},
    "a JSON schema": {
        "extra_body": {"structured_outputs": {"json": {"type": "object", "properties": {"word": {"type": "string"}}}}}
    },
    "stop strings": {"stop": [".", "\n"]},
    "penalties": {"presence_penalty": 0.7, "frequency_penalty": 0.7},
    "min_tokens": {"extra_body": {"min_tokens": 20}},
}
"""Greedy requests of which the outputs are compared."""


class Failures(list[str]):
    """What went wrong."""

    def expect(self, holds: bool, message: str) -> None:
        if not holds:
            self.append(message)


@contextmanager
def serving(command: list[str], blocks: int, log: Path) -> Iterator[tuple[str, psutil.Process]]:
    """The server of this command, with a KV cache of so many blocks: its address and its process."""
    port = free_port()
    with log.open("wb") as sink, tempfile.TemporaryDirectory() as metrics:
        environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": metrics} | RETURNED_AT_ONCE
        words = [*command, "--host", "127.0.0.1", "--port", str(port)]
        words += ["--block-size", str(BLOCK_TOKENS), "--num-gpu-blocks-override", str(blocks)]
        process = subprocess.Popen(words, stdout=sink, stderr=sink, env=environment)
        url = f"http://127.0.0.1:{port}"
        try:
            while True:
                if process.poll() is not None:
                    sys.exit(log.read_text()[-4000:])
                try:
                    with urllib.request.urlopen(url + "/health", timeout=5):
                        break
                except OSError:
                    time.sleep(1)
            yield url, psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(120)


def client_of(url: str) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600, max_retries=0)


def contexts(config: Any) -> list[list[int]]:
    """Prompts that no run was trained on: two of the config's in one turn."""
    dataset = Dataset.open(config.shards_dir)
    chat = ChatEncoder(read_tokenizer_file(dataset.tokenizer_dir), config.collect.template_arguments)
    texts = [json.loads(line)["prompt"] for line in Path(config.collect.prompts).read_text("utf-8").splitlines()]
    pairs = np.random.default_rng(0).permutation(len(texts))[: 2 * COMPARED].reshape(-1, 2)
    return [chat.prompt([Message("user", f"{texts[a]}\n\n{texts[b]}")]).ids.tolist() for a, b in pairs]


async def together(count: int, jobs: list[Callable[[], Awaitable[Any]]]) -> list[Any]:
    """All jobs, so many at a time."""
    room = asyncio.Semaphore(count)

    async def one(job: Callable[[], Awaitable[Any]]) -> Any:
        async with room:
            return await job()

    return await asyncio.gather(*map(one, jobs))


async def compared(url: str, model: str, prompts: list[list[int]], limit: int) -> dict[str, Any]:
    """Outputs by name of the request, of greedy requests of every kind, while others are cancelled."""
    client = client_of(url)

    def ask(prompt: list[int], **more: Any) -> Awaitable[Any]:
        body = {"return_token_ids": True} | more.pop("extra_body", {})
        settings = {"max_tokens": 64, "temperature": 0} | more
        return client.completions.create(model=model, prompt=prompt, extra_body=body, **settings)

    async def whole(name: str, prompt: list[int], **more: Any) -> tuple[str, Any]:
        answer = (await ask(prompt, **more)).choices[0]
        return name, (answer.token_ids, answer.finish_reason)

    async def cancelled(prompt: list[int]) -> tuple[str, Any]:
        task = asyncio.ensure_future(ask(prompt))
        await asyncio.sleep(2)
        task.cancel()
        return "", None

    async def refused(prompt: list[int]) -> tuple[str, Any]:
        try:
            await ask(prompt, n=2)
        except BadRequestError as error:
            return "n = 2", str(error)
        return "n = 2", "was not refused"

    jobs: list[Callable[[], Awaitable[Any]]] = []
    for number, prompt in enumerate(prompts):
        jobs.append(lambda n=number, p=prompt: whole(f"plain {n}", p))
        if number % 20 == 0:
            jobs.append(lambda p=prompt: cancelled(p))
        if number % 25 == 0:
            for kind, more in KINDS.items():
                jobs.append(lambda p=prompt, name=f"{kind} {number}", more=more: whole(name, p, **more))
    filled = (prompts[0] * (limit // len(prompts[0]) + 1))[: limit - 2]
    jobs += [lambda: whole("two tokens before the limit", filled, max_tokens=2), lambda: refused(prompts[0])]
    return {name: found for name, found in await together(16, jobs) if name}


async def load(url: str, model: str, prompts: list[list[int]], limit: int) -> None:
    """Requests of very different lengths, many at temperature 1."""
    rng, client = np.random.default_rng(1), client_of(url)

    def job(number: int) -> Callable[[], Awaitable[Any]]:
        length = int(rng.integers(30, limit - 40))
        joined = [token for _ in range(8) for token in prompts[int(rng.integers(len(prompts)))]][:length]
        settings = {"temperature": float(number % 2), "max_tokens": int(rng.integers(4, 32)), "seed": number}
        return lambda: client.completions.create(model=model, prompt=joined, **settings)

    await together(32, [job(number) for number in range(LOADED)])


def counters(url: str) -> dict[str, float]:
    """The server's counters by name and labels."""
    with urllib.request.urlopen(url + "/metrics") as response:
        families = text_string_to_metric_families(response.read().decode())
    samples = [sample for family in families for sample in family.samples]
    kept = ("llada_drafter_", "vllm:num_preemptions", "vllm:spec_decode")
    return {
        " ".join([s.name, *(v for k, v in s.labels.items() if k in ("maker", "reason", "error"))]): s.value
        for s in samples
        if s.name.startswith(kept) and s.name.endswith("_total")
    }


class Memory(threading.Thread):
    """Resident MiB of a process and its children, once a second."""

    def __init__(self, process: psutil.Process) -> None:
        super().__init__(daemon=True)
        self.process, self.seen, self.ended = process, [], threading.Event()

    def quarter(self, number: int) -> float:
        """The median of one of four parts of the time."""
        return float(np.median(np.array_split(np.array(self.seen), 4)[number]))

    def run(self) -> None:
        while not self.ended.wait(1):
            members = [self.process, *self.process.children(recursive=True)]
            self.seen.append(sum(member.memory_info().rss for member in members) / 2**20)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    overrides = [
        f"speculate.drafter={{memory_gib: {MEMORY_MIB / 1024}}}",
        "teacher.kv_cache_gib=1",
        "teacher.max_num_seqs=32",
        "speculate.policy=false",  # a draft for every request in every step: the most that there can be
    ]
    config = load_config(arguments.config, overrides)
    words = [sys.executable, "-m", "student.cli", "serve", str(arguments.config)]
    words += [word for override in overrides for word in ("--set", override)]
    printed = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    command = ["env", *(word for word in shlex.split(printed)[1:] if not word.startswith("PROMETHEUS_"))]
    plain = list(command)
    for flag in ("--speculative-config", "--additional-config"):
        place = plain.index(flag)
        del plain[place : place + 2]
    prompts, limit, model = contexts(config), config.teacher.max_sequence_tokens, config.teacher.model
    failures, figures = Failures(), {}
    outputs, memories, after, logs = {}, {}, {}, ""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "server.log")
        for name, server in (("with the drafter", command), ("without", plain)):
            with serving(server, FEW_BLOCKS, log) as (url, _):
                started = time.monotonic()
                outputs[name] = asyncio.run(compared(url, model, prompts, limit))
                figures[f"greedy requests, s, {name}"] = time.monotonic() - started
                figures[f"preemptions, {name}"] = counters(url).get("vllm:num_preemptions_total", 0.0)
                logs += log.read_text()  # before it is stopped: vLLM's front end may log that its engine has ended
            # As many blocks as 32 requests need, so that the cache's own pages are all touched early.
            with serving(server, 32 * limit // BLOCK_TOKENS, log) as (url, process):
                memories[name] = memory = Memory(process)
                memory.start()
                started = time.monotonic()
                asyncio.run(load(url, model, prompts, limit))
                figures[f"{LOADED} requests, s, {name}"] = time.monotonic() - started
                memory.ended.set()
                after = counters(url) if server is command else after
                logs += log.read_text()
            for number in range(4):
                figures[f"resident MiB, quarter {number + 1}, {name}"] = memory.quarter(number)
    drafted, expected = outputs.values()
    differing = [name for name in expected if drafted[name] != expected[name]]
    growth = {name: memory.quarter(3) - memory.quarter(1) for name, memory in memories.items()}
    figures |= {
        "greedy outputs compared": len(expected),
        "of these different": len(differing),
        "n = 2 at temperature 0": expected["n = 2"][:120],
        **{name.removeprefix("llada_drafter_"): value for name, value in after.items() if "llada_drafter" in name},
    }
    failures.expect(not differing, f"outputs differ: {differing[:5]}")
    failures.expect(figures["preemptions, with the drafter"] > 0, "nothing was preempted")
    failures.expect(after.get("llada_drafter_undrafted_total no room", 0) > 0, "every context found room")
    failures.expect(not any("failures_total" in name for name in after), "drafting failed")
    failures.expect(
        growth["with the drafter"] <= growth["without"] + MEMORY_MIB,
        f"from the second quarter to the last, MiB: {growth}",
    )
    before, found, following = logs.partition("Traceback")
    failures.expect(not found, f"a server's log has a traceback: {before[-500:]}{found}{following[:3000]}")
    table = Table("figure", "value", title="a server with the drafter")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.1f}" if isinstance(value, float) else str(value))
    Console().print(table)
    for failure in failures:
        Console().print(f"FAILED: {failure}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures | {"failures": failures}, indent=2))
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
