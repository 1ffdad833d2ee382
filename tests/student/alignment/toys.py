"""Small byte-pair tokenizers over three letters, and a teacher whose every text can be enumerated."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from shared.config import PrepareConfig
from shared.records import Distributions, Record, Sampling
from shared.tokenizer_files import TokenizerFile
from shared.vocabulary import Encoder, Vocabulary
from student.alignment.align import Aligner
from student.alignment.targets import Targets

LETTERS = "abc"


def toy_tokenizer(merges: list[tuple[str, str]]) -> tuple[Vocabulary, Encoder]:
    """Letters, then one token per merge in order of rank, then the end of turn."""
    texts = [*LETTERS]
    for left, right in merges:
        if left + right not in texts:
            texts.append(left + right)
    end = len(texts)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tree = {
        "version": "1.0",
        "added_tokens": [{"id": end, "content": "<end>", **special}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "ignore_merges": False,
            "vocab": {text: index for index, text in enumerate(texts)},
            "merges": [list(pair) for pair in merges],
        },
    }
    file = TokenizerFile("toy", [t.encode() for t in texts] + [b""], [*texts, "<end>"], [False] * end + [True], tree)  # type: ignore[arg-type]
    vocabulary = Vocabulary(file.tokens, np.array(file.is_special), file.texts, {"end_of_turn": end})
    return vocabulary, Encoder(file, vocabulary)


def random_merges(generator: random.Random, count: int) -> list[tuple[str, str]]:
    """`count` merges, each of two tokens that exist by then; no text has two merges."""
    tokens, merges = [*LETTERS], []
    while len(merges) < count:
        pair = (generator.choice(tokens), generator.choice(tokens))
        if len(pair[0] + pair[1]) <= 4 and pair[0] + pair[1] not in tokens:
            merges.append(pair)
            tokens.append(pair[0] + pair[1])
    return merges


@dataclass(frozen=True, eq=False)
class ToyTeacher:
    """A random language model over canonical token sequences of at most `longest` tokens, then the end of turn."""

    vocabulary: Vocabulary
    encoder: Encoder
    seed: int
    longest: int

    @property
    def end(self) -> int:
        return self.vocabulary.roles["end_of_turn"]

    def row(self, prefix: tuple[int, ...]) -> dict[int, float]:
        """p(v | prefix) over the tokens that leave the sequence canonical, complete."""
        if len(prefix) >= self.longest:
            return {self.end: 1.0}
        allowed = [self.end]
        for v in range(self.end):
            sequence = (*prefix, v)
            if tuple(self.encoder.encode(self.vocabulary.decode(sequence)).tolist()) == sequence:
                allowed.append(v)
        generator = np.random.default_rng([self.seed, *prefix])
        weights = generator.gamma(0.7, size=len(allowed)) + 1e-3
        return dict(zip(allowed, (weights / weights.sum()).tolist(), strict=True))

    @cached_property
    def rows(self) -> dict[tuple[int, ...], dict[int, float]]:
        found: dict[tuple[int, ...], dict[int, float]] = {}

        def visit(prefix: tuple[int, ...]) -> None:
            found[prefix] = self.row(prefix)
            for v in found[prefix]:
                if v != self.end:
                    visit((*prefix, v))

        visit(())
        return found

    @cached_property
    def texts(self) -> dict[tuple[int, ...], float]:
        """Every complete response with its probability; they sum to 1."""
        found: dict[tuple[int, ...], float] = {}

        def visit(prefix: tuple[int, ...], probability: float) -> None:
            for v, p in self.rows[prefix].items():
                if v == self.end:
                    found[(*prefix, v)] = probability * p
                else:
                    visit((*prefix, v), probability * p)

        visit((), 1.0)
        return found

    def record(self, sequence: tuple[int, ...], float_type: type = np.float64) -> Record:
        """The response `sequence` with its complete rows, in double precision so that 1e-9 means something."""
        rows = [self.rows[sequence[:j]] for j in range(len(sequence))]
        ordered = [sorted(row.items(), key=lambda item: -item[1]) for row in rows]
        return toy_record(
            self.vocabulary,
            sequence,
            [[v for v, _ in row] for row in ordered],
            [[p for _, p in row] for row in ordered],
            [row[v] for row, v in zip(rows, sequence, strict=True)],
            float_type,
        )


def toy_record(
    vocabulary: Vocabulary,
    sequence: tuple[int, ...],
    ids: list[list[int]],
    probabilities: list[list[float]],
    observed: list[float],
    float_type: type = np.float32,
    prompt: tuple[int, ...] = (),
) -> Record:
    """A record from rows of candidates, with tails that make each row complete."""
    distributions = Distributions(
        offsets=np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64),
        ids=np.array([v for row in ids for v in row], dtype=np.int32),
        logprobs=np.array([math.log(p) for row in probabilities for p in row], dtype=float_type),
        tail=np.array([max(0.0, 1 - sum(row)) for row in probabilities], dtype=float_type),
        sampled=np.array([math.log(p) for p in observed], dtype=float_type),
    )
    return Record(
        sample_id="sample",
        prompt_id="prompt",
        split="train",
        skill="toy",
        messages=(),
        prompt_text="",
        prompt_ids=np.array(prompt, dtype=np.int32),
        response_ids=np.array(sequence, dtype=np.int32),
        response_bytes=vocabulary.decode(sequence),
        finish_reason="stop",
        sampling=Sampling(temperature=1, top_p=1, top_k=0, max_tokens=100, seed=0),
        distributions=distributions,
    )


def toy_aligner(
    teacher: tuple[Vocabulary, Encoder], student: tuple[Vocabulary, Encoder], cache: object, **options: object
) -> Aligner:
    """An aligner of two toys."""
    settings = PrepareConfig(min_known_mass=0.0)
    return Aligner(teacher[0], student[0], student[1], settings, teacher_encoder=teacher[1], cache=cache, **options)  # type: ignore[arg-type]


def assert_same_targets(left: Targets, right: Targets) -> None:
    """Both paths agree: the same events with the same members, masses to single precision, the same counts."""
    for name in ("event_offsets", "member_offsets", "members"):
        np.testing.assert_array_equal(getattr(left.sparse, name), getattr(right.sparse, name), name)
    for name in ("event_mass", "tail", "known"):
        np.testing.assert_allclose(getattr(left.sparse, name), getattr(right.sparse, name), atol=2e-6, err_msg=name)
    np.testing.assert_allclose(left.observed_logprob, right.observed_logprob, atol=2e-6, rtol=1e-5)
    np.testing.assert_allclose(left.anchor_logprob, right.anchor_logprob, atol=2e-6, rtol=1e-5)
    assert +left.counts == +right.counts
