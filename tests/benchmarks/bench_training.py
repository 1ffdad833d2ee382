"""What makes a better drafter: arms of training against the demo's defaults, the same data and steps, several seeds.

    python -m tests.benchmarks.bench_training [--config FILE] [--arms NAME …] [--seeds N] [--steps N] [--json FILE]

Needs the shards of the config's run (`make collect-logits`). Every arm and seed is a run of its own under
`runs/ablation`, made by the commands that a user has; a finished one is read, an interrupted one goes on, so the whole
may be stopped and started at will. An arm takes about as long as `make train`: all of them, a night. `make bench`
leaves this one out.

The table has the mean over seeds with the sample standard deviation: τ of the held-out text of each decoding rule,
the greedy one as a ratio to the first arm, and the seconds of training.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from shared.config import load_config
from shared.console import stdout

ARMS: dict[str, list[str]] = {
    "default": [],
    "no sequential head": ["train.sequential_rank=null"],
    "sequential head of rank 32": ["train.sequential_rank=32"],
    "4 layers": ["student.layers=[0,1,2,3]"],
    "8 layers": ["student.layers=[0,1,2,3,4,5,6,7]"],
    "first 4, last 2 layers": ["student.layers=[0,1,2,3,28,29]"],
    "ce": ["train.loss=ce"],
    "kl": ["train.loss=kl"],
    "tv": ["train.tv_weight=0.5"],
    "path term": ["train.path_weight=0.25"],
    "depth decay 0.8": ["train.depth_decay=0.8"],
    "8 anchors": ["train.anchors=8", "train.row_tokens=640"],
    "48 anchors": ["train.anchors=48", "train.row_tokens=768"],
    "EMA": ["train.ema=0.98"],
    "Muon": ["train.optimizer=muon"],
    "blocks of 8": ["train.block_length=8", "train.row_tokens=768"],
    "a fifth of random masking": ["train.objectives.random_masking=0.2", "train.objectives.blocks=0.8"],
}
RUNS = Path("runs/ablation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="NAME", help="; ".join(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of training; the config's by default")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    shards = load_config(arguments.config).shards_dir
    if not (shards / "manifest.json").exists():
        sys.exit(f"{shards} holds no dataset: run `make collect-logits CONFIG={arguments.config}` first")
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in range(arguments.seeds):  # seed after seed, so that a night that ends early has all arms
        for arm in arguments.arms:
            changes = ARMS[arm] + ([f"train.steps={arguments.steps}"] if arguments.steps else [])
            name = f"{arm}-{arguments.steps or 'all'}-{seed}".replace(" ", "_").replace(",", "")
            found = train(arguments.config, RUNS / name, [*changes, f"seed={seed}"], shards)
            results.setdefault(arm, []).append(found)
            stdout.print(arm, f"seed {seed}", found)
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=2))
    stdout.print(table(results))


def train(config: Path, run: Path, changes: list[str], shards: Path) -> dict[str, float]:
    """The figures of one run: τ by rule, and the seconds that `student train` took."""
    figures, clock = run / "evaluate.json", run / "train_seconds.json"
    run.mkdir(parents=True, exist_ok=True)
    if not (run / "shards").exists():
        (run / "shards").symlink_to(shards.resolve())
    settings = [f"runs={run.parent}", f"name={run.name}", *changes]
    for command in ("init", "prepare", "train", "evaluate") if not figures.exists() else ():
        started = time.monotonic()
        execute("student", command, config, settings)
        if command == "train" and not clock.exists():
            clock.write_text(json.dumps(time.monotonic() - started))
    return acceptance(run) | {"seconds": json.loads(clock.read_text())}


def execute(package: str, command: str, config: Path, settings: list[str]) -> None:
    """One of the commands that a user has, with these settings over the config's."""
    overrides = [part for setting in settings for part in ("--set", setting)]
    subprocess.run([sys.executable, "-m", f"{package}.cli", command, str(config), *overrides], check=True)


def acceptance(run: Path) -> dict[str, float]:
    """τ by decoding rule of the trained student of a run."""
    rules = json.loads((run / "evaluate.json").read_text())["after"]["rules"]
    return {rule: rules[rule]["tau"] for rule in rules}


def table(results: dict[str, list[dict[str, Any]]]) -> Table:
    shown = Table("arm", "seeds", "τ greedy", "ratio", "τ T = 1", "training, s")
    first: float | None = None
    for arm, runs in results.items():
        mean = statistics.mean(run["greedy"] for run in runs)
        first = first or mean
        cells = [_spread([run[name] for run in runs], 3) for name in ("greedy", "sample")]
        seconds = _spread([run["seconds"] for run in runs], 0)
        shown.add_row(arm, str(len(runs)), cells[0], f"{mean / first:.3f}", cells[1], seconds)
    return shown


def _spread(values: list[float], digits: int) -> str:
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):,.{digits}f}{deviation}"


if __name__ == "__main__":
    main()
