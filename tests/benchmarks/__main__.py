"""`make bench`: every benchmark in turn, each in a process of its own; tables on the screen, JSON in `runs/bench/`.

What drafts with the demo's student is left out, with a line that says so, until `make demo` has made it. Two take a
night and are started by themselves: `python -m tests.benchmarks.bench_training` (the ablation) and
`python -m tests.benchmarks.bench_learning_curve`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
OVERNIGHT = {"bench_learning_curve", "bench_training"}
AFTER_THE_DEMO = {"bench_draft_options", "bench_serving"}
STUDENT = Path("runs/demo/student/final")


def main() -> int:
    results = Path("runs/bench")
    results.mkdir(parents=True, exist_ok=True)
    failed = []
    for path in sorted(HERE.glob("bench_*.py")):
        name = path.stem
        if name in OVERNIGHT:
            continue
        if name in AFTER_THE_DEMO and not STUDENT.is_dir():
            print(f"\n== {name}: left out, {STUDENT} is not there; `make demo` makes it", flush=True)
            continue
        print(f"\n== {name}", flush=True)
        command = [sys.executable, "-m", f"tests.benchmarks.{name}", "--json", str(results / f"{name}.json")]
        if subprocess.run(command).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
