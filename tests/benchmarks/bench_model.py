"""Forward and training-step time and model-FLOPs utilization of LLaDA's block.

    python -m tests.benchmarks.bench_model [--json FILE]

On a GPU: the 8B block in bfloat16 at 4,096 tokens, as many of its 32 layers as fit, under plain bidirectional
attention and under AnchoredLayout with flex attention. Without one: a few layers of the demo's width, and the table
says so. FLOPs are the model's own: 6 per parameter and token for a training step (2 for a forward) in the matrix
products, and attention's 12 L D (4 for a forward) per layer and token over the pairs that the layout lets see each
other; recomputation does not count. The peak is taken from the device's name or from --peak-tflops.
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
from student.model.modeling_llada import AnchoredLayout, LladaForMaskedDiffusion
from student.training.monitor import PEAK_TFLOPS

BLOCK, ANCHORS = 16, 32


def main(
    length: Annotated[int | None, typer.Option(help="Tokens a row; 4,096 on a GPU, 512 without.")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers; as many as fit on a GPU, 2 without.")] = None,
    checkpointing: Annotated[bool, typer.Option(help="Recompute activations in the backward.")] = False,
    repeats: Annotated[int, typer.Option(help="Timed repeats after one warm-up.")] = 5,
    peak_tflops: Annotated[float | None, typer.Option(help="The device's dense peak for this dtype.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
) -> None:
    """Time the model and relate it to the device's peak."""
    cuda = torch.cuda.is_available()
    device, name = ("cuda", torch.cuda.get_device_name()) if cuda else ("cpu", "CPU (no GPU: 8B block not measured)")
    length = length or (4096 if cuda else 512)
    wide: dict[str, Any] = {} if cuda else {"d_model": 576, "n_heads": 9, "n_kv_heads": 3, "mlp_hidden_size": 1536}
    vocabulary = {"vocab_size": 8192, "mask_token_id": 8191, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    layers = layers or (layers_that_fit(length) if cuda else 2)
    config = LladaConfig(**wide, **vocabulary, n_layers=layers, max_sequence_length=2 * length)
    torch.manual_seed(0)
    with torch.device(device):
        model = LladaForMaskedDiffusion(config).to(torch.bfloat16 if cuda else torch.float32)
    if cuda:
        model.set_attn_implementation("flex_attention")
    if checkpointing:
        model.gradient_checkpointing_enable()
    peak = peak_tflops or next((value for key, value in PEAK_TFLOPS.items() if key in name), None)
    rows = [
        measure(model, layout_name, length, training, repeats, device, peak)
        for layout_name in ("bidirectional", "anchored")
        for training in (False, True)
    ]
    table = Table(title=f"{layers} layers of width {config.d_model}, {length} tokens, {model.dtype}, {name}")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(v if isinstance(v, str) else "not known" if v is None else f"{v:.4g}" for v in row.values()))
    Console().print(table)
    if json_path is not None:
        result = {"device": name, "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "layers": layers}
        json_path.write_text(json.dumps(result | {"length": length, "rows": rows}, indent=2), encoding="utf-8")


def layers_that_fit(length: int) -> int:
    """Layers of the 8B block whose weights, gradients and activations take 80% of the GPU's free memory."""
    config = LladaConfig()
    parameters = 4 * config.d_model**2 + 3 * config.d_model * config.mlp_hidden_size
    # Weights and gradients in two bytes; some 14 D + 4 F numbers a token are kept for the backward.
    each = 4 * parameters + 2 * length * (14 * config.d_model + 4 * config.mlp_hidden_size)
    return max(1, min(config.n_layers, int(0.8 * torch.cuda.mem_get_info()[0]) // each))


def measure(
    model: LladaForMaskedDiffusion,
    layout_name: str,
    length: int,
    training: bool,
    repeats: int,
    device: str,
    peak: float | None,
) -> dict[str, Any]:
    """One row of the table."""
    ids = torch.randint(2, 8000, (1, length), device=device)
    layout = None if layout_name == "bidirectional" else anchored(length, device)
    pairs = length**2 if layout is None else int(layout.mask().sum())

    def step() -> None:
        if not training:
            with torch.no_grad():
                model.hidden_states(ids, layout=layout)
            return
        model.zero_grad()
        model.hidden_states(ids, layout=layout).float().square().mean().backward()

    times = []
    for _ in range(repeats + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[1:])
    weights = sum(p.numel() for p in model.model.transformer["blocks"].parameters())
    config = model.config
    flops = (3 if training else 1) * (2 * weights * length + 4 * config.n_layers * config.d_model * pairs)
    return {
        "attention": layout_name,
        "what": "training step" if training else "forward",
        "ms": seconds * 1e3,
        "tokens/s": length / seconds,
        "TFLOP/s": flops / seconds / 1e12,
        "MFU": None if peak is None else flops / seconds / 1e12 / peak,
    }


def anchored(length: int, device: str) -> AnchoredLayout:
    """One document: a clean copy and as many blocks as belong into a row of `length`."""
    anchors = min(ANCHORS, length // (4 * BLOCK))
    clean = length - anchors * BLOCK
    starts = torch.linspace(1, clean - BLOCK, anchors).long()
    positions = torch.cat((torch.arange(clean), (starts[:, None] + torch.arange(BLOCK)).flatten()))
    blocks = torch.cat((torch.zeros(clean, dtype=torch.int64), torch.arange(1, anchors + 1).repeat_interleave(BLOCK)))
    return AnchoredLayout(*(t.to(device)[None] for t in (torch.zeros(length, dtype=torch.int64), blocks, positions)))


if __name__ == "__main__":
    typer.run(main)
