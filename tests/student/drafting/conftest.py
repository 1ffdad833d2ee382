"""Real teacher tokenizers, and a small student tokenizer of LLaDA's construction."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from shared.tokenizer.vocabulary import Encoder, Vocabulary, load_tokenizer
from student.drafting.bridge import ByteBridge
from student.model.tokenizer import train_tokenizer
from tests.fixtures import texts
from tests.fixtures.served_run import PROMPTS, served_run, served_teacher

__all__ = ["served_run", "served_teacher"]

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and then it doesn't stop: it's running still.",
    "An unbelievable number of unbelievably large numbers, 12345 and 67890, were written down in 2024.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))\n",
    "Zürich, Genève and São Paulo are cities; 東京は大きい都市です。今日はいい天気です。",
    "1. First, wash the apples.\n2. Then cut them into small pieces.\n3. Finally, bake the cake.\n",
]


@dataclass(frozen=True)
class Side:
    directory: Path | None
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


def train_byte_level(directory: Path, vocab_size: int) -> Path:
    """How LLaDA's tokenizer is made."""
    train_tokenizer([*CORPUS * 3, PROMPTS.read_text(encoding="utf-8")], vocab_size).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def student_side(tmp_path_factory: pytest.TempPathFactory) -> Side:
    directory = train_byte_level(tmp_path_factory.mktemp("student_tokenizer"), 600)
    return Side(directory, *load_tokenizer(directory))


@pytest.fixture(scope="session")
def small_teacher(tmp_path_factory: pytest.TempPathFactory) -> Side:
    """A teacher whose vocabulary is quick to load and larger than the student's."""
    directory = train_byte_level(tmp_path_factory.mktemp("teacher_tokenizer"), 1500)
    return Side(directory, *load_tokenizer(directory))


@pytest.fixture(scope="session")
def llama3() -> Side:
    return Side(None, *texts.llama3())


@pytest.fixture(scope="session")
def tekken() -> Side:
    return Side(None, *texts.tekken())


@pytest.fixture(scope="session", params=["small_teacher", "llama3", "tekken"])
def teacher_side(request: pytest.FixtureRequest) -> Side:
    side: Side = request.getfixturevalue(request.param)
    return side


@pytest.fixture(scope="session")
def bridge(teacher_side: Side, student_side: Side) -> ByteBridge:
    return ByteBridge(teacher_side.vocabulary, teacher_side.encoder, student_side.vocabulary, student_side.encoder)
