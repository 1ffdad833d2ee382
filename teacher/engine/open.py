"""Which engine a config asks for."""

from __future__ import annotations

from types import ModuleType

from shared.config import PipelineConfig, TeacherConfig
from shared.errors import MissingExtraError
from shared.vllm_settings import engine_version
from teacher.checkpoints import ensure_checkpoint
from teacher.engine.in_process import Engine
from teacher.engine.requests import TeacherEngine


def open_engine(config: PipelineConfig, score: bool = False) -> TeacherEngine:
    """The servers of `teacher.service`, checked, or the teacher loaded into this process.

    Args:
        score: for scoring given responses.

    Raises:
        ServiceError, CheckpointError, ConfigError, MissingExtraError: as the engines.
    """
    teacher, collect = config.teacher, config.collect
    if teacher.service is not None:
        engine: TeacherEngine = _service().ServiceEngine(teacher, collect.top_k, score)
        return engine
    directory = ensure_checkpoint(teacher)
    return Engine(teacher, str(directory), collect.top_k, collect.score_tokens if score else None)


def version_of(teacher: TeacherConfig) -> str:
    """The version of the vLLM that answers: a server's, or the one that is installed.

    Raises:
        ServiceError, MissingExtraError: if there is none.
    """
    return engine_version() if teacher.service is None else str(_service().server_version(teacher.service))


def _service() -> ModuleType:
    """The client of servers, whose libraries an engine in this process does without."""
    try:
        from teacher.engine import service
    except ImportError as error:
        raise MissingExtraError(
            f"teacher.service needs {error.name}; pip install 'llada-drafter[teacher-service]'"
        ) from error
    return service
