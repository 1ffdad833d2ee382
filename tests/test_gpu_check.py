"""The script for a GPU, rehearsed: a name that it no longer finds would only be seen on a lent machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_house import ROOT

REHEARSED = [
    "attention-equals-dense",
    "loss-equals-dense",
    "model-equals-cpu",
    "pruned-training-step",
    "lora-training-step",
    "draft-latency",
]
"""Those that start neither vLLM nor ranks, and compile nothing."""


@pytest.mark.slow
def test_a_rehearsal_passes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.gpu_check", "--rehearse", "--json", str(tmp_path / "rows.json"), *REHEARSED]
    subprocess.run(command, cwd=ROOT, check=True)
    verdicts = {row["check"]: row["verdict"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert verdicts == dict.fromkeys(REHEARSED, "passed")
