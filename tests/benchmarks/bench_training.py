"""What makes a better drafter: arms of training against the demo's defaults, the same data and time, several seeds.

    python -m tests.benchmarks.bench_training [--config FILE] [--arms NAME …] [--seeds N …] [--steps N] [--jobs N]
        [--json FILE]

Needs the shards of the config's run (`make collect-logits`). Every arm and seed is a run of its own under
`runs/ablation`, made by the commands that a user has; a finished one is read, an interrupted one goes on, so the whole
may be stopped and started at will, and figures that the JSON file has are not made again. An arm takes about as long as
`make train`: all of them, nights. `make bench` leaves this one out.

An arm whose step costs more takes fewer of them. On CPUs `--jobs 2` trains two arms at once with one rank on half of
the cores each, which spares the collectives.

The table has the mean over seeds with the sample standard deviation: τ of the held-out text of each decoding rule,
the difference of the greedy one to the first arm with the same seeds, and the seconds of training.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from shared.config import load_config
from shared.console import stdout


class Arm(NamedTuple):
    """Settings over the config's, and its steps for each of the config's: as many as take the same time.

    The time of a step is counted in parameters times tokens of a row: 3.5 million in a layer, of which the last one and
    the head's 4.3 million apply to the supervised tokens alone.
    """

    changes: list[str]
    steps: float = 1


ARMS = {
    "default": Arm([]),
    "2 layers": Arm(["student.layers=[0,1]"], 2),
    "3 layers": Arm(["student.layers=[0,1,2]"], 1.33),
    "6 layers": Arm(["student.layers=[0,1,2,3,4,5]"], 0.67),
    "8 layers": Arm(["student.layers=[0,1,2,3,4,5,6,7]"], 0.5),
    "first 3, last layer": Arm(["student.layers=[0,1,2,29]"]),
    "no sequential head": Arm(["train.sequential_rank=null"]),
    "sequential head of rank 32": Arm(["train.sequential_rank=32"]),
    "ce": Arm(["train.loss=ce"]),
    "kl": Arm(["train.loss=kl"]),
    "tv": Arm(["train.tv_weight=0.5"]),
    "path term": Arm(["train.path_weight=0.25"]),
    "path term, no decay": Arm(["train.path_weight=0.25", "train.depth_decay=1"]),
    "no depth decay": Arm(["train.depth_decay=1"]),
    "depth decay 0.8": Arm(["train.depth_decay=0.8"]),
    "depth decay 0.4": Arm(["train.depth_decay=0.4"]),
    "8 anchors": Arm(["train.anchors=8", "train.row_tokens=640"]),
    "48 anchors": Arm(["train.anchors=48", "train.row_tokens=768"], 640 / 768),
    "4 rows a step": Arm(["train.global_batch=4"], 0.5),
    "learning rate 1e-3": Arm(["train.learning_rate=1e-3"]),
    "learning rate 4e-3": Arm(["train.learning_rate=4e-3"]),
    "no EMA": Arm(["train.ema=null"]),
    "Muon": Arm(["train.optimizer=muon"]),
    "blocks of 8": Arm(["train.block_length=8", "train.row_tokens=768"], 640 / 768),
    "a fifth of random masking": Arm(["train.objectives.random_masking=0.2", "train.objectives.blocks=0.8"]),
}
RUNS = Path("runs/ablation")
Figures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="NAME", help="; ".join(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--steps", type=int, help="of training the default; the config's by default")
    parser.add_argument("--jobs", type=int, default=1, help="arms at once")
    parser.add_argument("--json", type=Path, help="read the figures from here and write them here")
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    if not (config.shards_dir / "manifest.json").exists():
        sys.exit(f"{config.shards_dir} holds no dataset: run `make collect-logits CONFIG={arguments.config}` first")
    steps = arguments.steps or config.train.steps
    known: dict[str, Any] = {"steps": steps, "arms": {}}
    if arguments.json and arguments.json.exists():
        known = json.loads(arguments.json.read_text())
        if known["steps"] != steps:
            sys.exit(f"{arguments.json} has figures of {known['steps']} steps, not of {steps}: name another file")
    results: dict[str, dict[str, Figures]] = {arm: known["arms"].get(arm, {}) for arm in ARMS}
    # Seed after seed, so that a night that ends early has all arms.
    missing = [(arm, seed) for seed in arguments.seeds for arm in arguments.arms if str(seed) not in results[arm]]
    for arm, seed, found in run_arms(arguments.config, config.shards_dir, missing, steps, arguments.jobs):
        results[arm][str(seed)] = found
        stdout.print(arm, f"seed {seed}", found)
        if arguments.json:
            arguments.json.write_text(json.dumps({"steps": steps, "arms": results}, indent=1))
    stdout.print(table({arm: runs for arm, runs in results.items() if runs}))


def run_arms(
    config: Path, shards: Path, arms: list[tuple[str, int]], steps: int, jobs: int
) -> Iterator[tuple[str, int, Figures]]:
    """The figures of each arm and seed, `jobs` at once, each on its own share of the cores."""
    cores = sorted(os.sched_getaffinity(0))
    context = get_context("spawn")
    shares = context.Queue()
    for job in range(jobs):
        shares.put(cores[job::jobs])
    with ProcessPoolExecutor(jobs, context, initializer=keep_to, initargs=(shares,)) as pool:
        calls = []
        for arm, seed in arms:
            name = f"{arm}-{steps}-{seed}".replace(" ", "_").replace(",", "")
            changes = [*ARMS[arm].changes, f"train.steps={round(steps * ARMS[arm].steps)}", f"seed={seed}"]
            if jobs > 1:
                changes.append("train.world_size=1")
            calls.append((arm, seed, pool.submit(train, config, RUNS / name, changes, shards)))
        for arm, seed, call in calls:
            yield arm, seed, call.result()


def keep_to(shares: Any) -> None:
    """Keep this process, and those that it starts, to one of the shares of cores."""
    os.sched_setaffinity(0, shares.get())


def train(config: Path, run: Path, changes: list[str], shards: Path) -> Figures:
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


def acceptance(run: Path) -> Figures:
    """τ by decoding rule of the trained student of a run."""
    rules = json.loads((run / "evaluate.json").read_text())["after"]["rules"]
    return {rule: rules[rule]["tau"] for rule in rules}


def table(results: dict[str, dict[str, Figures]]) -> Table:
    """A row an arm; `results` has the figures by arm and seed."""
    shown = Table("arm", "seeds", "τ greedy", "difference", "τ T = 1", "training, s")
    base = next(iter(results.values()))
    for arm, runs in results.items():
        difference = [run["greedy"] - base[seed]["greedy"] for seed, run in runs.items() if seed in base]
        cells = [_spread([run[name] for run in runs.values()], 3) for name in ("greedy", "sample")]
        seconds = _spread([run["seconds"] for run in runs.values()], 0)
        shown.add_row(arm, str(len(runs)), cells[0], _spread(difference, 3), cells[1], seconds)
    return shown


def _spread(values: list[float], digits: int) -> str:
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):,.{digits}f}{deviation}"


if __name__ == "__main__":
    main()
