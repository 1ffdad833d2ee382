"""Training speed with packed rows against one sample a row, on a run's own prepared samples.

    python -m tests.benchmarks.bench_packing [CONFIG] [--json FILE]

Both ways run forward and backward of the run's student over the samples of the same steps, in forwards of about as many
tokens. `padded` is what training did before rows were packed: samples sorted by length, one a row, padded to the
longest of their forward; attention over whole rows, and every block over all tokens. Tokens are counted without
padding; times are interleaved, so that a busy machine slows both.
The run needs its start and its prepared targets (`make train` makes them); by default the tests' toy run is made.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from shared.config import PipelineConfig, load_config
from student.alignment.prepare import prepare
from student.data.batch import MicroBatch, collate
from student.data.data_loader import TrainingDataLoader
from student.losses.settings import LossSettings
from student.model.attention import AnchoredLayout
from student.model.export import load_student
from student.model.initialize import initialize_student
from student.training.engine import training_device, training_dtype
from student.training.module import DistillationModule
from tests.fixtures.toy_run import toy_config, write_toy_shards


def main(
    config_path: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="A run that is prepared.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of the run whose samples are taken.")] = 12,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
) -> None:
    """Time both ways of laying out the same samples."""
    with tempfile.TemporaryDirectory() as folder:
        if config_path is None:
            config = load_config(toy_config(Path(folder)))
            write_toy_shards(config)
            initialize_student(config)
            prepare(config)
        else:
            config = load_config(config_path)
        rows = measure(config, steps)
    table = Table(title=f"forward and backward of {config.name}, {steps} steps, {training_device()}")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
    if json_path is not None:
        json_path.write_text(json.dumps({"date": time.strftime("%Y-%m-%d"), "rows": rows}, indent=2))


class BeforePacking(DistillationModule):
    """The module as it was when every sample had a row of its own."""

    def hidden_states(self, batch: MicroBatch) -> Tensor:
        layout = AnchoredLayout(batch.document_ids, batch.block_ids, batch.position_ids)
        return self.model.hidden_states(batch.input_ids, layout=layout).flatten(0, 1).index_select(0, batch.supervised)


def measure(config: PipelineConfig, steps: int) -> list[dict[str, Any]]:
    """A row for each way; the ratio is to `padded`."""
    model, tokenizer = load_student(config.student_init_dir, getattr(torch, training_dtype(config.train)))
    device = training_device()
    model.to(device).train()
    settings = LossSettings(loss="kl", block_length=config.train.block_length)
    modules = {"padded": BeforePacking(model, settings), "packed": DistillationModule(model, settings)}
    loader = TrainingDataLoader.open(config, 1)
    forwards: dict[str, list[MicroBatch]] = {"padded": [], "packed": []}
    for step in range(steps):
        packed = [loader.lay_out(row, tokenizer.mask_token_id, 0) for row in loader.sampler.step_rows(step)]
        one_a_row = sorted(([pair] for row in packed for pair in row), key=lambda row: -len(row[0][1]))
        size = -(-len(one_a_row) // len(packed))
        forwards["packed"] += [collate([row], pad_id=0, row_tokens=config.train.packed_row_tokens) for row in packed]
        forwards["padded"] += [collate(one_a_row[i : i + size], pad_id=0) for i in range(0, len(one_a_row), size)]
    seconds = dict.fromkeys(forwards, 0.0)
    for turn in range(-1, min(map(len, forwards.values()))):
        for name, batches in forwards.items():
            batch = batches[max(turn, 0)].to(device)
            start = time.perf_counter()
            modules[name](batch)[0].backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name] += (time.perf_counter() - start) * (turn >= 0)  # the first turn warms up
            model.zero_grad()
    rows = []
    for name, batches in forwards.items():
        batches = batches[: min(map(len, forwards.values()))]
        tokens, laid_out = sum(b.tokens for b in batches), sum(b.input_ids.numel() for b in batches)
        rows.append({"way": name, "padding": 1 - tokens / laid_out, "tokens/s": tokens / seconds[name]})
    return [row | {"ratio": row["tokens/s"] / rows[0]["tokens/s"]} for row in rows]


if __name__ == "__main__":
    typer.run(main)
