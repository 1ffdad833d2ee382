from __future__ import annotations

from pathlib import Path
from typing import Any

from student.training.metrics_logger import MetricsLogger, describe, read_metrics


def entry(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "steps": 10,
        "epoch": step / 4,
        "loss": 2.0 / step,
        "ce": 1.5,
        "kl": None,
        "match_by_depth": [0.25, 0.1],
        "learning_rate": 1e-4,
        "grad_norm": 0.5,
        "tokens": 100,
        "tokens_per_s": 1234.5,
        "eta_s": 75.0,
        "positions": 10,
        "time": "12:00:00",
        "seconds": {"data": 0.01, "forward": 0.5, "backward": 1.0, "optimizer": 0.2, "step": 1.75},
        "data_wait": 0.006,
        "padding": 0.031,
        "device_gib": 61.5,
        "host_gib": 4.25,
        "utilization": 0.41,
    }


def written(directory: Path) -> tuple[str, str]:
    return (directory / "metrics.jsonl").read_text(), (directory / "training_log.log").read_text()


def test_a_resumed_journal_reads_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    whole = MetricsLogger(tmp_path / "whole", resume_step=0)
    for step in range(1, 7):
        whole.write(entry(step))
    whole.close()
    # Interrupted after step 5, whose line was cut short; the newest checkpoint is of step 3.
    broken = MetricsLogger(tmp_path / "broken", resume_step=0)
    for step in range(1, 6):
        broken.write(entry(step))
    broken.close()
    metrics = tmp_path / "broken" / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-20])
    resumed = MetricsLogger(tmp_path / "broken", resume_step=3)
    assert [kept["step"] for kept in resumed.entries] == [1, 2, 3]
    for step in range(4, 7):
        resumed.write(entry(step))
    resumed.close()
    assert written(tmp_path / "whole") == written(tmp_path / "broken")


def test_a_line_says_when_how_well_how_fast_and_how_long_still() -> None:
    line = describe(entry(4))
    for part in (
        "12:00:00",
        "step 4/10",
        "epoch 1.00",
        "loss 0.5000",
        "ce 1.5000",
        "match@1 0.250",
        "1,234 tok/s",
        "eta 1m15s",
    ):
        assert part in line
    assert "kl" not in line
    skipped = describe(entry(4) | {"loss": None, "ce": None, "grad_norm": None, "match_by_depth": [None, None]})
    assert "match@1 0.000 | lr 1.00e-04 grad skipped" in skipped


def test_no_file_no_metrics(tmp_path: Path) -> None:
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == []
