"""What the prefix cache saves: one draft of a block against the forward without a cache.

    python -m tests.benchmarks.bench_model_drafting [--json FILE]

Both compute the same block's states (the difference is printed). The cached draft appends `--new` clean tokens and
runs the block over the cached prefix; the uncached forward runs prefix and block under AnchoredLayout. Times are the
median of interleaved repeats in one process, so that a busy machine slows both alike.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from student.model.configuration_llada import LladaConfig
from student.model.modeling_llada import AnchoredLayout, LladaForMaskedDiffusion, PrefixCache


def main(
    context: Annotated[list[int] | None, typer.Option(help="Cached tokens; may be repeated.")] = None,
    block: Annotated[int, typer.Option(help="Masked tokens a draft.")] = 16,
    new: Annotated[int, typer.Option(help="Clean tokens appended by each draft.")] = 8,
    layers: Annotated[int, typer.Option(help="Of SmolLM2-135M's width.")] = 6,
    repeats: Annotated[int, typer.Option(help="Timed repeats of each.")] = 7,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
) -> None:
    """Time drafting with and without the prefix cache."""
    contexts = context or [256, 1024, 2048]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LladaConfig(
        d_model=576, n_layers=layers, n_heads=9, n_kv_heads=3, mlp_hidden_size=1536, vocab_size=8192,
        max_sequence_length=max(contexts) + new + block, mask_token_id=8191, bos_token_id=0, eos_token_id=1,
        pad_token_id=1, weight_tying=True, rope_theta=1e5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LladaForMaskedDiffusion(config).eval().to(device)
    rows = [measure(model, length, block, new, repeats, device) for length in contexts]
    table = Table(title=f"drafting a block of {block} after {new} new tokens, {layers} layers of width 576, {device}")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.2e}" if 0 < abs(value) < 1e-2 else f"{value:.4g}" for value in row.values()))
    Console().print(table)
    if json_path is not None:
        result = {"device": device, "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d"), "rows": rows}
        json_path.write_text(json.dumps(result, indent=2), encoding="utf-8")


@torch.no_grad()
def measure(
    model: LladaForMaskedDiffusion, context: int, block: int, new: int, repeats: int, device: str
) -> dict[str, Any]:
    """One row of the table; times in milliseconds."""
    total = context + new
    clean = torch.randint(2, 8000, (1, total), device=device)
    cache = PrefixCache.allocate(model.config, 1, total + block, torch.float32, device)
    model.draft_hidden_states(cache, [0], clean[:, :context], [context], 0)
    ids = torch.cat((clean, torch.full((1, block), model.config.mask_token_id, device=device)), dim=1)
    block_ids = torch.cat((torch.zeros(total), torch.ones(block))).long().to(device)[None]
    positions = torch.arange(total + block, device=device)[None]

    def cached() -> torch.Tensor:
        cache.truncate(0, context)
        return model.draft_hidden_states(cache, [0], clean[:, context:], [new], block)

    def uncached() -> torch.Tensor:
        layout = AnchoredLayout(torch.zeros_like(ids), block_ids, positions)
        return model.hidden_states(ids, layout=layout)[:, total:]

    difference = float((cached() - uncached()).abs().max())
    times: dict[str, list[float]] = {"cached": [], "uncached": []}
    for _ in range(repeats):
        for name, run in (("cached", cached), ("uncached", uncached)):
            _synchronize(device)
            start = time.perf_counter()
            run()
            _synchronize(device)
            times[name].append((time.perf_counter() - start) * 1e3)
    with_cache, without = statistics.median(times["cached"]), statistics.median(times["uncached"])
    return {
        "context": context,
        "cached ms": with_cache,
        "uncached ms": without,
        "cached / uncached": with_cache / without,
        "max difference": difference,
    }


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    typer.run(main)
