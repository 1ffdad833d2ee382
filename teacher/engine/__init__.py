"""The teacher behind one interface: `stream` takes requests and gives answers with their logprob columns."""

from teacher.engine.in_process import Engine, prepare_environment
from teacher.engine.open import open_engine, version_of
from teacher.engine.requests import Answer, Request, TeacherEngine

__all__ = [
    "Answer",
    "Engine",
    "Request",
    "TeacherEngine",
    "open_engine",
    "prepare_environment",
    "version_of",
]
