"""`student serve`: vLLM's OpenAI server for the teacher, with the student as its drafter.

The command and its environment are those that a person could type; it is printed, and started with `--run`.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from shared import vllm_settings
from shared.config import PipelineConfig
from shared.dataset.manifest import MANIFEST
from shared.dataset.reader import Dataset
from shared.vllm_settings import engine_arguments, engine_version, environment
from student.drafting.speculate import check_student, check_teacher, drafter_arguments, dtype_of

METRICS = "PROMETHEUS_MULTIPROC_DIR"
"""Names an empty directory through which the engine's process, where the drafter counts, reaches `/metrics`."""


def serve(config: PipelineConfig, further: Sequence[str] = (), *, start: bool = False) -> int:
    """Print the server's command; with `start`, run it until it ends.

    Args:
        further: arguments for vLLM's server, such as `--port 8001`.

    Returns:
        the server's exit code; 0 if it was not started.

    Raises:
        CheckpointError: if the trained student or the teacher is missing.
        VocabularyError: if the teacher's tokenizer is not the one that the run's dataset was collected with.
        MissingExtraError: if it is to be started and vLLM is not installed.
    """
    dataset = Dataset.open(config.shards_dir) if (config.shards_dir / MANIFEST).exists() else None
    check_teacher(config, dataset)
    command = [*server_command(config, str(check_student(config))), *further]
    variables = environment(config.teacher)
    variables.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)  # the server's engine is a process of its own in any case
    shown = shlex.join(f"{name}={value}" for name, value in variables.items())
    print(f'env {METRICS}="$(mktemp -d)" {shown} {shlex.join(command)}')
    if not start:
        return 0
    engine_version()
    sys.stdout.flush()
    with tempfile.TemporaryDirectory(prefix="llada-drafter-metrics-") as metrics:
        process = subprocess.Popen(command, env=os.environ | variables | {METRICS: metrics})
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        signal.signal(signal.SIGINT, lambda *_: None)  # a terminal sends it to the server as well, which ends
        return process.wait()


def server_command(config: PipelineConfig, student: str) -> list[str]:
    """The server's program and arguments, from the teacher section and the drafter's options."""
    arguments = engine_arguments(config.teacher, dtype_of(config))
    return vllm_settings.server_command(arguments | drafter_arguments(config, student))
