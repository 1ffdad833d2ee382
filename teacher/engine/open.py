"""Which engine a config asks for."""

from __future__ import annotations

from shared.config import PipelineConfig, TeacherConfig
from shared.vllm_settings import engine_version
from teacher.checkpoints import ensure_checkpoint
from teacher.engine.in_process import Engine
from teacher.engine.service import ServiceEngine, server_version


def open_engine(config: PipelineConfig, score: bool = False, executor: str | None = None) -> Engine | ServiceEngine:
    """The servers of `teacher.service`, checked, or the teacher loaded into this process.

    Args:
        score: for scoring given responses.
        executor: vLLM's `distributed_executor_backend`, of an engine in this process.

    Raises:
        ServiceError, CheckpointError, ConfigError, MissingExtraError: as the engines.
    """
    teacher, collect = config.teacher, config.collect
    if teacher.service is not None:
        return ServiceEngine(teacher, collect.top_k, score)
    directory = ensure_checkpoint(teacher)
    return Engine(teacher, str(directory), collect.top_k, collect.score_tokens if score else None, executor)


def version_of(teacher: TeacherConfig) -> str:
    """The version of the vLLM that answers: a server's, or the one that is installed.

    Raises:
        ServiceError, MissingExtraError: if there is none.
    """
    return engine_version() if teacher.service is None else server_version(teacher.service)
