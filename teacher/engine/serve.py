"""`teacher serve`: the command of a vLLM server whose rows are those that the engine in this process captures."""

from __future__ import annotations

import os
import shlex

from shared import vllm_settings
from shared.config import TeacherConfig
from teacher.checkpoints import ensure_checkpoint
from teacher.engine.in_process import capturing_arguments


def serve(teacher: TeacherConfig, host: str, port: int, start: bool = False) -> str:
    """The command of this teacher's server with its variables, as a shell takes it.

    Args:
        start: become the server, and do not return.

    Raises:
        CheckpointError: as `ensure_checkpoint`. MissingExtraError: if it is to start and vLLM is not installed.
    """
    arguments = capturing_arguments(teacher, str(ensure_checkpoint(teacher))) | {
        "data_parallel_size": teacher.data_parallel if teacher.data_parallel > 1 else None,
        "served_model_name": teacher.model,
        "host": host,
        "port": port,
    }
    command, variables = vllm_settings.server_command(arguments), vllm_settings.environment(teacher)
    if start:
        vllm_settings.engine_version()
        os.execvpe(command[0], command, os.environ | variables)
    return shlex.join(["env", *(f"{name}={value}" for name, value in variables.items()), *command])
