"""What ways of drafting give and cost on a trained run's held-out text: a head over the frequent tokens alone, and
more denoising steps.

    python -m tests.benchmarks.bench_draft_options configs/demo.yaml --sizes 512 --sizes 2048

`inside` is the share of held-out response tokens that can be drafted at all; `tau` the offline acceptance length on
greedy text, as `student evaluate` measures it; `ms a draft` the time of a call for one request.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, get_args

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from shared.config import load_config
from shared.config.speculate import DrafterConfig, Order
from shared.console import ConfigArgument, SetOption
from student.drafting.frequencies import FILE, count_tokens, frequent_tokens, write_counts
from student.drafting.propose import Drafter
from student.evaluation.measure import HeldOut
from student.evaluation.offline_acceptance import draft_along
from student.model.export import load_student


def main(
    config_path: ConfigArgument = Path("configs/demo.yaml"),
    overrides: SetOption = None,
    sizes: Annotated[list[int] | None, typer.Option(help="Tokens that can be drafted; may be repeated.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
) -> None:
    """Coverage, acceptance and time."""
    config = load_config(config_path, overrides)
    held_out, directory = HeldOut.open(config), config.student_final_dir
    model, _ = load_student(directory)
    if not (directory / FILE).exists():  # trained before counts were kept
        write_counts(directory, count_tokens(held_out.prepared, model.config.vocab_size))
    samples = [held_out.prepared[int(number)] for number in held_out.prepared.indices("held_out", "greedy")]
    said = np.concatenate([sample.input_ids[sample.prompt_length :] for sample in samples])
    records, tokens = held_out.records["greedy"], config.evaluate.draft_tokens
    variants = [DrafterConfig(draft_vocabulary=size) for size in sizes or [256, 512, 1024, 2048, 4096]]
    variants.append(DrafterConfig())
    variants += [DrafterConfig(denoising_steps=n, denoising_order=order) for n in (2, 4) for order in get_args(Order)]
    rows = []
    for options in variants:
        drafter = Drafter.from_student(
            model.eval(),
            directory,
            held_out.dataset.vocabulary,
            held_out.dataset.tokenizer_dir,
            tokens,
            options.model_copy(update={"block_length": config.train.block_length}),
            in_turns=True,
        )
        size, steps = options.draft_vocabulary, options.denoising_steps
        kept = drafter.forward._draftable_S.numpy() if size is None else frequent_tokens(directory, size)
        result = draft_along(drafter, records, config.evaluate.batch)
        started = time.perf_counter()
        alone = draft_along(drafter, records[:4], 1)
        rows.append(
            {
                "draft vocabulary": len(drafter.forward._draftable_S),
                "denoising": f"{steps}, {options.denoising_order}" if steps > 1 else "1",
                "inside": float(np.isin(said, kept).mean()),
                "tau": 1 + result.mean_accepted,
                "ms a draft": 1e3 * (time.perf_counter() - started) / alone.drafts,
            }
        )
    table = Table(title=f"{config.name}: {len(records)} held-out greedy responses, {len(said)} student tokens")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{value:,.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
    if json_path is not None:
        json_path.write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
