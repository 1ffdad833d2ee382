"""What more training is worth: τ of one held-out text at several times the demo's training, with data that grows along.

    python -m tests.benchmarks.bench_learning_curve [--config FILE] [--times N …] [--json FILE] [--picture FILE]

Needs the config's run (`make demo`), which is the point at 1. N times its steps are taken on N times its training
prompts: its own, and ones that the teacher writes itself. Below 1 there are fewer steps on the same prompts, of which a
short run does not see all. Everything lies under `runs/learning_curve` and is made by the commands that a user has:
what is finished is read, what was interrupted goes on. 9 times the demo takes some eight hours on two cores, so
`make bench` leaves it out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table

from shared.config import PipelineConfig, load_config
from shared.console import stdout
from shared.dataset.reader import Dataset
from student.evaluation import plots
from tests.benchmarks.bench_training import acceptance, execute, train

RUNS = Path("runs/learning_curve")
TIMES = (1 / 9, 1 / 3, 1.0, 3.0, 9.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--times", type=float, nargs="+", default=TIMES, metavar="N")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--picture", type=Path, help="draw the curve here, an SVG")
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    if not (config.run_dir / "evaluate.json").exists():
        sys.exit(f"{config.run_dir} holds no trained student: run `make demo CONFIG={arguments.config}` first")
    times = sorted(arguments.times)
    points = []
    for n in times:
        shards = grown(arguments.config, config, [1.0, *(size for size in times if 1 < size <= n)])
        steps = round(config.train.steps * n)
        if n == 1:
            found = acceptance(config.run_dir)
        else:
            found = train(arguments.config, RUNS / f"times-{n:.2g}", [f"train.steps={steps}"], shards)
        manifest = Dataset.open(shards).manifest
        responses = sum(count for kind, count in manifest.counts.items() if kind.startswith("train/"))
        points.append({"times": n, "steps": steps, "responses": responses, "tokens": manifest.tokens, **found})
        stdout.print(points[-1])
        if arguments.json:
            arguments.json.write_text(json.dumps(points, indent=2))
    table = Table("times", "steps", "training responses", "tokens of the dataset", "τ greedy", "τ T = 1")
    for point in points:
        cells = (f"{point[name]:,}" for name in ("steps", "responses", "tokens"))
        table.add_row(f"{point['times']:.2g}", *cells, *(f"{point[rule]:.3f}" for rule in ("greedy", "sample")))
    stdout.print(table)
    if arguments.picture:
        arguments.picture.write_text(curve(points))


def grown(file: Path, config: PipelineConfig, sizes: list[float]) -> Path:
    """Shards with the last of `sizes` times the config's training prompts; the first is 1, its own.

    Each size is the one before it and the answers to prompts that are new.
    """
    parts, whole = [config.shards_dir], RUNS / f"shards-{sizes[-1]:g}"
    if len(sizes) == 1:
        return parts[0]
    assert config.collect.prompts is not None
    known = {json.loads(line).get("prompt") for line in config.collect.prompts.read_text().splitlines()}
    columns = pa.concat_tables(Dataset.open(parts[0]).tables(["prompt_id", "split"]))
    trained = len(pc.unique(columns.filter(pc.equal(columns["split"], "train"))["prompt_id"]))
    decoding = [rule.model_dump(mode="json") for rule in config.collect.decoding if rule.split == "train"]
    for before, size in pairwise(sizes):
        name, written = f"more-{size:g}", RUNS / f"written-{size:g}.jsonl"
        asked = written.with_name(f"asked-{size:g}.jsonl")
        if not written.exists():
            drafts = {"path": str(written), "count": round((size - before) * trained), "temperature": 0.8}
            settings = [f"collect.write_prompts={json.dumps(drafts)}", f"seed={round(size)}"]
            execute("teacher", "write-prompts", file, settings)
        lines = [line for line in written.read_text().splitlines() if json.loads(line)["prompt"] not in known]
        known |= {json.loads(line)["prompt"] for line in lines}
        asked.write_text("".join(f"{line}\n" for line in lines))
        settings = [f"runs={RUNS}", f"name={name}", f"collect.prompts={asked}", "collect.held_out=0"]
        execute("teacher", "collect", file, [*settings, f"collect.decoding={json.dumps(decoding)}"])
        parts.append(RUNS / name / "shards")
    subprocess.run([sys.executable, "-m", "shared.commands.cli", "merge", *map(str, parts), str(whole)], check=True)
    return whole


def curve(points: list[dict[str, Any]]) -> str:
    """τ over the multiples, greedy and at temperature 1."""
    figure, axes = plt.subplots(figsize=(6, 3.2))
    for rule, label, color in (("greedy", "greedy", plots.AFTER), ("sample", "temperature 1", plots.SERVED)):
        axes.plot([p["times"] for p in points], [p[rule] for p in points], marker="o", color=color, label=label)
    axes.set_xscale("log")
    axes.set_xticks([p["times"] for p in points], [f"{p['times']:.2g}" for p in points], minor=False)
    axes.minorticks_off()
    axes.set(xlabel="times the demo's training", ylabel="acceptance length τ")
    axes.legend()
    return plots.svg(figure)


if __name__ == "__main__":
    main()
