from __future__ import annotations

import os

import pytest
import torch

from tests.fixtures.hub import hub_server
from tests.fixtures.s3 import s3
from tests.fixtures.warm import serving_python, training_python, warm_serving, warm_training

__all__ = ["hub_server", "s3", "serving_python", "training_python", "warm_serving", "warm_training"]

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores; threads of small tensors wait for one another


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests first, so that all workers end together: `--dist loadfile` gives a worker whole files."""
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)
