"""What the targets of the Makefile promise."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks import __main__ as benchmarks
from tests.test_house import ROOT
from tests.test_readme import TARGETS

MAKEFILE = (ROOT / "Makefile").read_text()


def test_a_target_is_made_whatever_files_are_there() -> None:
    phony = re.findall(r"^\.PHONY: (.*)$", MAKEFILE.replace("\\\n", " "), re.MULTILINE)
    assert {name for line in phony for name in line.split()} == TARGETS.keys()


def test_clean_keeps_what_was_collected_and_trained(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("runs/mine/shards", ".venv", ".pytest_cache"):
        (tmp_path / name).mkdir(parents=True)
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True)
    assert (tmp_path / "runs" / "mine" / "shards").is_dir()
    assert (tmp_path / ".venv").is_dir()
    assert not (tmp_path / ".pytest_cache").exists()


def test_the_tests_of_a_file_run_in_one_process(tmp_path: Path) -> None:
    """pytest 9.2 with xdist 3.8 ignores groups without a word: fixtures that start vLLM were set up by both workers."""
    for name in ("a", "b"):
        (tmp_path / f"test_{name}.py").write_text(
            f'def pytest_generate_tests(metafunc): metafunc.parametrize("n", range(6))\n'
            f'def test_it(n, worker_id): open("{name}", "a").write(worker_id + "\\n")\n'
        )
    options = re.search(r"^TWO_WORKERS := (.+)$", MAKEFILE, re.MULTILINE)
    assert options
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options[1].split()]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert [len(set((tmp_path / name).read_text().split())) for name in ("a", "b")] == [1, 1]


@pytest.mark.parametrize("made", [False, True])
def test_bench_leaves_out_what_needs_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], made: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    if made:
        benchmarks.STUDENT.mkdir(parents=True)
    started: list[str] = []

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        started.append(command[2].rpartition(".")[2])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    assert benchmarks.main() == 0
    assert "bench_losses" in started
    assert ("bench_serving" in started) == made
    assert ("left out, runs/demo/student/final is not there; `make demo`" in capsys.readouterr().out) != made
