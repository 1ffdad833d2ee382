"""One rank of a tensor-parallel group: its part of the weights, and what it drafts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from student.drafting.forward import DraftForward
from student.drafting.parallel import shard
from tests.fixtures.tiny_model import tiny_model, with_sequential_head

CASES = {
    "shared": {"n_heads": 4, "n_kv_heads": 2},
    "whole": {"n_heads": 4, "n_kv_heads": 1},
    "tied": {"weight_tying": True},
    "sequential": {},
}


def drafts(case: str, group: torch.distributed.ProcessGroup | None) -> tuple[list[Any], int]:
    """What three requests of unequal progress are drafted in three calls, and the numbers that the layers hold."""
    model = tiny_model(init_std=0.3, mlp_hidden_size=90, **CASES[case])
    if case == "sequential":
        with_sequential_head(model)
    if group is not None:
        shard(model, group)
    forward = DraftForward(model, np.arange(1, 117), "float32", 256, group)
    cache, rng = forward.cache(30), np.random.default_rng(0)
    made = [
        forward(cache, [5, 2, 3], [rng.integers(2, 110, rng.integers(0, 30)) for _ in range(3)], 4) for _ in range(3)
    ]
    held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in model.parameters())
    return made, held


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    result = {case: drafts(case, torch.distributed.group.WORLD) for case in CASES}
    Path(sys.argv[1], f"{torch.distributed.get_rank()}.json").write_text(json.dumps(result))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
