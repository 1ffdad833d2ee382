"""`teacher …` whose Ray actors have the scripted engine of `test_ray_pool.py` in place of vLLM."""

from __future__ import annotations

from teacher.cli import main
from teacher.runners import ray_pool
from tests.teacher.test_ray_pool import ScriptedReplica

if __name__ == "__main__":
    ray_pool.Replica = ScriptedReplica  # type: ignore[misc]
    main()
