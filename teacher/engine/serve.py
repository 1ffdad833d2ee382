"""`teacher serve`: the command of a vLLM server whose rows are those that the engine in this process captures."""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import dataclass

from shared.config import TeacherConfig
from shared.vllm_settings import engine_arguments, environment, is_cpu_build
from teacher.checkpoints import ensure_checkpoint, hub_commit
from teacher.engine.in_process import engine_version


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """A command with the variables that it needs."""

    arguments: list[str]
    environment: dict[str, str]

    def __str__(self) -> str:
        """As a shell takes it."""
        return shlex.join([*(["env"] if self.environment else []), *self._assignments, *self.arguments])

    @property
    def _assignments(self) -> list[str]:
        return [f"{name}={value}" for name, value in self.environment.items()]

    def run(self) -> None:
        """Become the server; does not return.

        Raises:
            MissingExtraError: if vLLM is not installed.
        """
        engine_version()
        os.execvpe(self.arguments[0], self.arguments, {**os.environ, **self.environment})


def server_command(teacher: TeacherConfig, host: str, port: int) -> ServerCommand:
    """The server of this teacher.

    Raises:
        CheckpointError: as `ensure_checkpoint`.
    """
    directory, commit = ensure_checkpoint(teacher), hub_commit(teacher)
    model = str(directory) if commit is None else teacher.model
    settings = engine_arguments(teacher) | {
        "model": model,
        "revision": commit,
        "tokenizer_revision": commit,
        "data_parallel_size": teacher.data_parallel if teacher.data_parallel > 1 else None,
        "served_model_name": teacher.model,
        "max_logprobs": -1,
        "logprobs_mode": "raw_logprobs",
        "host": host,
        "port": port,
    }
    # The `vllm` command of the CPU build looks for a package named vllm and ends.
    start = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"] if is_cpu_build() else ["vllm", "serve"]
    if not is_cpu_build():
        del settings["model"]
        start.append(model)
    return ServerCommand([*start, *(flag for item in settings.items() for flag in _flag(*item))], environment(teacher))


def _flag(name: str, value: object) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag.removeprefix("--")]
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
