"""The teacher behind one interface: `stream` takes requests and gives answers with their logprob columns."""

from teacher.engine.in_process import Engine, engine_version, prepare_environment
from teacher.engine.requests import Answer, Request

__all__ = ["Answer", "Engine", "Request", "engine_version", "prepare_environment"]
