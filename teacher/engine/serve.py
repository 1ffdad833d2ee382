"""`teacher serve`: the command of a vLLM server whose rows are those that the engine in this process captures."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass

from shared import vllm_settings
from shared.config import TeacherConfig
from teacher.checkpoints import ensure_checkpoint
from teacher.engine.in_process import capturing_arguments


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """A command with the variables that it needs."""

    arguments: list[str]
    environment: dict[str, str]

    def __str__(self) -> str:
        """As a shell takes it."""
        assignments = [f"{name}={value}" for name, value in self.environment.items()]
        return shlex.join([*(["env", *assignments] if assignments else []), *self.arguments])

    def run(self) -> None:
        """Become the server; does not return.

        Raises:
            MissingExtraError: if vLLM is not installed.
        """
        vllm_settings.engine_version()
        os.execvpe(self.arguments[0], self.arguments, {**os.environ, **self.environment})


def server_command(teacher: TeacherConfig, host: str, port: int) -> ServerCommand:
    """The server of this teacher.

    Raises:
        CheckpointError: as `ensure_checkpoint`.
    """
    arguments = capturing_arguments(teacher, str(ensure_checkpoint(teacher))) | {
        "data_parallel_size": teacher.data_parallel if teacher.data_parallel > 1 else None,
        "served_model_name": teacher.model,
        "host": host,
        "port": port,
    }
    return ServerCommand(vllm_settings.server_command(arguments), vllm_settings.environment(teacher))
