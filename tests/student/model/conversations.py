"""A small real dataset of plain conversations, with a teacher's tokenizer that is not the student's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shared.manifest import Provenance
from shared.records import Message, Record, Sampling
from shared.vocabulary import Encoder, Vocabulary
from shared.writer import DatasetWriter
from student.model.tokenizer import train_tokenizer

_THINGS = ["river", "stone", "garden", "window", "letter", "kitchen", "mountain", "paper", "bridge", "lantern"]


def conversations(count: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    random = np.random.default_rng(seed)
    for _ in range(count):
        a, b = random.choice(_THINGS, 2)
        x, y = (int(n) for n in random.integers(10, 990, 2))
        yield (
            f"What is {x} + {y}, and is the {a} near the {b}?",
            f"{x} + {y} = {x + y}. The {a} is near the {b}, naïvely.",
        )


def teacher_tokenizer(directory: Path) -> Path:
    """A tokenizer of other text and another size than the student's."""
    texts = [answer.upper() + answer for _, answer in conversations(300, seed=9)]
    train_tokenizer(texts, 420).save_pretrained(directory)
    return directory


def write_conversations(directory: Path, tokenizer: Path, held_out_word: str = "zeppelin") -> None:
    """40 training conversations and 4 held-out ones, which alone have `held_out_word`."""
    vocabulary, encoder = Vocabulary.from_tokenizer(tokenizer), Encoder.from_tokenizer(tokenizer)
    provenance = Provenance(
        teacher="plain", tokenizer_fingerprint=vocabulary.fingerprint, engine="tests", dtype="float32", top_k=1
    )
    records = []
    for number, (question, answer) in enumerate(conversations(44)):
        held_out = number >= 40
        text = f"{answer} {held_out_word} " * 5 if held_out else answer
        response = np.append(encoder.encode(text), vocabulary.roles["end_of_turn"]).astype(np.int32)
        records.append(
            Record(
                sample_id=f"{number}/greedy/0",
                prompt_id=str(number),
                split="held_out" if held_out else "train",
                skill="plain",
                messages=(Message("user", question),),
                prompt_text=question,
                prompt_ids=encoder.encode(question),
                response_ids=response,
                response_bytes=text.encode(),
                finish_reason="stop",
                sampling=Sampling(0.0, 1.0, 0, 64, None),
                distributions=None,
            )
        )
    writer = DatasetWriter(directory, provenance, vocabulary, tokenizer)
    writer.write_unit("unit-000", records)
    writer.finish(["unit-000"])
