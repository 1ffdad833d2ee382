"""Records and vocabularies for tests: small, random from a seed, and consistent as a teacher's are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from shared.manifest import Provenance
from shared.records import Distributions, Message, Record, Sampling
from shared.vocabulary import Vocabulary
from shared.writer import DatasetWriter

VOCABULARY_SIZE = 300


def byte_vocabulary(size: int = VOCABULARY_SIZE) -> Vocabulary:
    """All 256 bytes, then pairs of letters, then two specials at the end."""
    pairs = [bytes([97 + i // 26 % 26, 97 + i % 26]) for i in range(size - 258)]
    tokens = [bytes([i]) for i in range(256)] + pairs + [b"", b""]
    special = np.array([False] * (size - 2) + [True, True])
    texts = [repr(token) for token in tokens[:-2]] + ["<|end|>", "<|start|>"]
    return Vocabulary(tokens, special, texts, {"end_of_turn": size - 2})


def distributions(
    random: np.random.Generator, response_ids: np.ndarray[Any, Any], k: int, size: int, greedy: bool
) -> Distributions:
    """Rows of a peaked random softmax over the whole vocabulary, cut to k, that fit `response_ids`."""
    length = len(response_ids)
    logits = random.normal(0, 3, (length, size))
    # The token that stands there is likely, and leads where decoding was greedy.
    logits[np.arange(length), response_ids] = logits.max(axis=1, initial=0) + (
        1 if greedy else random.normal(-2, 2, length)
    )
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    ids = np.argsort(-logprobs, axis=1, kind="stable")[:, :k]
    kept = np.take_along_axis(logprobs, ids, axis=1)
    return Distributions(
        np.arange(length + 1) * k,
        ids.astype(np.int32).reshape(-1),
        kept.astype(np.float32).reshape(-1),
        (1 - np.exp(kept).sum(axis=1)).astype(np.float32),
        logprobs[np.arange(length), response_ids].astype(np.float32),
    )


def make_record(
    name: str,
    seed: int,
    length: int = 7,
    k: int = 8,
    rule: str = "greedy",
    split: str = "train",
    size: int = VOCABULARY_SIZE,
    soft: bool = True,
) -> Record:
    random = np.random.default_rng(seed)
    vocabulary = byte_vocabulary(size)
    response = np.append(random.integers(32, size - 2, max(length - 1, 0)), [size - 2] * (length > 0)).astype(np.int32)
    prompt = random.integers(32, 127, 5).astype(np.int32)
    text = bytes(prompt.astype(np.uint8)).decode()
    return Record(
        sample_id=f"{name}/{rule}/0",
        prompt_id=name,
        split=split,
        skill=f"skill-{seed % 3}",
        messages=(Message("user", text),),
        prompt_text=f"<|start|>{text}",
        prompt_ids=np.append(np.int32(size - 1), prompt).astype(np.int32),
        response_ids=response,
        response_bytes=vocabulary.decode(response),
        finish_reason="stop",
        sampling=Sampling(0.0 if rule == "greedy" else 1.0, 1.0, 0, 64, None if rule == "greedy" else seed),
        distributions=distributions(random, response, k, size, rule == "greedy") if soft else None,
    )


def make_records(count: int, seed: int = 0, **options: Any) -> list[Record]:
    return [make_record(f"prompt-{seed}-{i}", seed * 10_000 + i, length=3 + i % 9, **options) for i in range(count)]


def provenance(vocabulary: Vocabulary, **changes: Any) -> Provenance:
    return Provenance(
        **{
            "teacher": "toy",
            "tokenizer_fingerprint": vocabulary.fingerprint,
            "engine": "tests",
            "engine_version": "1",
            "dtype": "float32",
            "top_k": 8,
            "sampling": [{"split": "train", "temperature": 0.0}, {"split": "train", "temperature": 1.0}],
            **changes,
        }
    )


def write_dataset(path: Path | str, units: Mapping[str, Sequence[Record]], check: bool = True, **changes: Any) -> None:
    vocabulary = byte_vocabulary()
    writer = DatasetWriter(path, provenance(vocabulary, **changes), vocabulary, None, check=check)
    for name, records in units.items():
        writer.write_unit(name, records)
    writer.finish(units)


def small_units(units: int = 3, rows: int = 4) -> dict[str, list[Record]]:
    return {
        f"unit-{u:03d}": [
            make_record(
                f"p{u}-{r}",
                seed=100 * u + r,
                length=(3 * u + 5 * r) % 11,
                rule="sample" if r % 2 else "greedy",
                split="held_out" if r == 3 else "train",
                soft=(u, r) != (0, 2),
            )
            for r in range(rows)
        ]
        for u in range(units)
    }


def shifted(record: Record) -> Record:
    """`record` with every row moved one position on, as an off-by-one in a collector would store it."""
    d = record.distributions
    assert d is not None
    width = len(d.ids) // len(d.tail)
    return replace(
        record,
        distributions=Distributions(
            d.offsets, np.roll(d.ids, width), np.roll(d.logprobs, width), np.roll(d.tail, 1), d.sampled
        ),
    )
