"""A teacher small enough to make in a test: a real tokenizer with a chat template, and a configuration around it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from shared.config import PipelineConfig, load_config
from shared.tokenizer.vocabulary import Vocabulary
from tests.fixtures.random_teacher import save_random_teacher

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = ["What is 7 plus 5? Twelve.", "Name three fruits: apple, pear, plum.", "The capital of France is Paris."] * 5


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with config.json and a byte-level BPE tokenizer of some 300 tokens; it has no weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    directory = tmp_path_factory.mktemp("teacher") / "tiny"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": len(fast)}))
    return directory


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint with weights: a random LLaMA of two layers, which vLLM serves within seconds."""
    import torch
    from transformers import LlamaForCausalLM

    directory = tmp_path_factory.mktemp("teacher") / "tiny-model"
    # Heads of 64: vLLM's attention on CPUs has no kernel for heads of 16.
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    save_random_teacher(tiny_checkpoint, directory, initializer_range=0.2, **shape)
    model = LlamaForCausalLM.from_pretrained(directory)
    # The first dimension is a bias: what this teacher says is mostly printable, and ends.
    vocabulary = Vocabulary.from_tokenizer(directory)
    ends = vocabulary.end_ids
    printable = [bool(token) and all(32 <= byte < 127 for byte in token) for token in vocabulary.tokens]
    bias = [1.1 if index in ends else 0.0 if printable[index] else -8.0 for index in range(len(printable))]
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 20
        model.lm_head.weight[:, 0] = -8
        model.lm_head.weight[: len(bias), 0] = torch.tensor(bias)
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def make_config(tmp_path: Path, tiny_checkpoint: Path) -> Callable[..., PipelineConfig]:
    """Write prompts and a config around the tiny teacher; keywords are overrides, `__` for dots."""

    def make(prompts: int | str = 12, **overrides: Any) -> PipelineConfig:
        return load_config(write_config(tmp_path, tiny_checkpoint, prompts), [
            f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in overrides.items()
        ])  # fmt: skip

    return make


def write_config(folder: Path, checkpoint: Path, prompts: int | str = 12) -> Path:
    """config.yaml in `folder`, and prompts.jsonl: so many prompts in three skills, or this very text."""
    if isinstance(prompts, int):
        lines = [
            json.dumps(
                {"id": f"p{i:02d}", "skill": ("sums", "lists", "facts")[i % 3], "prompt": f"What is {i} plus 5?"}
            )
            for i in range(prompts)
        ]
        prompts = "\n".join(lines)
    (folder / "prompts.jsonl").write_text(prompts)
    tree = {
        "name": "tiny",
        "runs": str(folder / "runs"),
        "teacher": {"model": str(checkpoint), "dtype": "float32", "max_sequence_tokens": 128, "max_num_seqs": 4},
        "collect": {
            "prompts": str(folder / "prompts.jsonl"),
            "held_out": 0.25,
            "top_k": 8,
            "unit_prompts": 4,
            "decoding": [
                {"split": "train", "temperature": 0, "max_response_tokens": 8},
                {"split": "held_out", "temperature": 1, "max_response_tokens": 8, "samples": 2},
            ],
        },
        "student": {"checkpoint": None},
        "train": {"steps": 1},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def teacher(*arguments: str | Path) -> subprocess.Popen[str]:
    """`teacher …` in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "teacher.cli", *map(str, arguments)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    """What it printed, once it has ended well."""
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output
