"""A teacher whose every probability is known: a Markov chain over the tokens of a small tokenizer.

It stands where a test needs a dataset in a second and the exact answer beside it. Its records are complete (the row
holds the whole vocabulary) unless `top_k` truncates them, its text is real text, and its tokenizer is a real one with
a chat template, so everything downstream runs unchanged.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from shared.config import PipelineConfig, load_config
from shared.manifest import Provenance
from shared.records import Distributions, Message, Record, Sampling
from shared.vocabulary import Vocabulary
from shared.writer import DatasetWriter

TEXT = (
    "the a cat dog bird fish red blue small old runs eats sees likes sleeps under over near house tree river and "
    "then but often never 1 12 123 7 . , ! 雪 été"
)
WORDS = tuple(TEXT.split())
SPECIALS = ("<|begin|>", "<|turn|>", "<|end|>")
TEMPLATE = (
    "<|begin|>{% for message in messages %}<|turn|>{{ message.role }}\n{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def make_tokenizer(directory: Path) -> Tokenizer:
    """Words with their leading space as whole tokens, merged left to right; every byte is a token below them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary, merges = {symbol: number for number, symbol in enumerate(alphabet)}, []
    for word in WORDS:
        symbols = list(byte_level.pre_tokenize_str(f" {word}")[0][0])
        while len(symbols) > 1:
            merged = symbols[0] + symbols[1]
            if merged not in vocabulary:
                vocabulary[merged] = len(vocabulary)
                merges.append((symbols[0], symbols[1]))
            symbols[:2] = [merged]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    words = pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "pad_token": "<|end|>",
        "chat_template": TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer


@dataclass(frozen=True)
class ToyTeacher:
    """P(next token | previous token) over the word tokens and the end of the turn.

    Attributes:
        states: int32 [n], token ids; the last is the end of the turn.
        transition_nxn: float64, rows sum to 1.
    """

    tokenizer: Tokenizer
    states: NDArray[np.int32]
    transition_nxn: NDArray[np.float64]

    @classmethod
    def make(cls, directory: Path, seed: int = 0, sharpness: float = 3.0) -> ToyTeacher:
        tokenizer = make_tokenizer(directory)
        ids = [tokenizer.encode(f" {word}", add_special_tokens=False).ids for word in WORDS]
        assert all(len(of_word) == 1 for of_word in ids)
        end = tokenizer.token_to_id("<|end|>")
        states = np.array([of_word[0] for of_word in ids] + [end], np.int32)
        generator = np.random.default_rng(seed)
        weights = np.exp(sharpness * generator.standard_normal((len(states), len(states))))
        weights[:, -1] = 0
        transition = 0.95 * weights / weights.sum(axis=1, keepdims=True)
        transition[:, -1] = 0.05
        return cls(tokenizer, states, transition)

    def record(self, number: int, *, greedy: bool, split: str, length: int = 16, top_k: int | None = None) -> Record:
        """Sample `number`: a prompt of one word, which is the chain's first state, and the chain's answer to it."""
        generator = np.random.default_rng([number, greedy])
        state = number % (len(self.states) - 1)
        messages = (Message("user", f"go on: {WORDS[state]}"),)
        prompt = f"<|begin|><|turn|>user\n{messages[0].content}<|end|><|turn|>assistant\n"
        k = top_k or len(self.states)
        tokens, ids, logprobs, tails, sampled = [], [], [], [], []
        for _ in range(length):
            row = self.transition_nxn[state]
            state = int(row.argmax()) if greedy else int(generator.choice(len(row), p=row))
            order = np.argsort(-row, kind="stable")[:k]
            tokens.append(self.states[state])
            ids.append(self.states[order])
            logprobs.append(np.log(row[order]))
            tails.append(max(1 - row[order].sum(), 0))
            sampled.append(np.log(row[state]))
            if state == len(self.states) - 1:
                break
        text = self.tokenizer.decode([int(t) for t in tokens], skip_special_tokens=True)
        return Record(
            sample_id=f"{'greedy' if greedy else 'sample'}-{number:05d}",
            prompt_id=f"{split}-{number:05d}",
            split=split,
            skill="even" if number % 2 == 0 else "odd",
            messages=messages,
            prompt_text=prompt,
            prompt_ids=np.array(self.tokenizer.encode(prompt, add_special_tokens=False).ids, np.int32),
            response_ids=np.array(tokens, np.int32),
            response_bytes=text.encode(),
            finish_reason="stop" if state == len(self.states) - 1 else "length",
            sampling=Sampling(0.0 if greedy else 1.0, 1.0, 0, length, None),
            distributions=Distributions(
                offsets=np.cumsum([0, *(len(row) for row in ids)]).astype(np.int64),
                ids=np.concatenate(ids).astype(np.int32),
                logprobs=np.concatenate(logprobs).astype(np.float32),
                tail=np.array(tails, np.float32),
                sampled=np.array(sampled, np.float32),
            ),
        )


def toy_config(directory: Path) -> Path:
    """The config file of a toy run under `directory`: a student of two tiny layers, a vocabulary of its own."""
    tree = {
        "name": "toy",
        "runs": str(directory / "runs"),
        "teacher": {"model": str(directory / "teacher")},
        "collect": {"prompts": "none.jsonl", "top_k": 64, "decoding": [{"split": "train"}]},
        "student": {
            "checkpoint": None,
            "shape": {"d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 128},
            "tokenizer": {"kind": "trained", "vocab_size": 340},
            "max_sequence_length": 128,
        },
        "prepare": {"workers": 1},
        "train": {
            "steps": 60,
            "block_length": 4,
            "anchors": 6,
            "global_batch": 16,
            "micro_batch": 4,
            "max_length": 128,
            "learning_rate": 3e-3,
            "dtype": "float32",
            "world_size": 1,
        },
        "evaluate": {"draft_tokens": 3, "batch": 8},
    }
    path = directory / "toy.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def write_toy_shards(config: PipelineConfig, *, train: int = 96, held_out: int = 16, shift: int = 0) -> ToyTeacher:
    """The toy teacher's dataset at `config.shards_dir`; `shift` moves every row that many tokens to the right."""
    tokenizer_dir = Path(config.teacher.model)
    teacher = ToyTeacher.make(tokenizer_dir)
    vocabulary = Vocabulary.from_tokenizer(tokenizer_dir)
    provenance = Provenance(
        teacher="toy", tokenizer_fingerprint=vocabulary.fingerprint, engine="toy", dtype="float64", top_k=64
    )
    writer = DatasetWriter(config.shards_dir, provenance, vocabulary, tokenizer_dir, check=not shift)
    units = {
        "train-sample": [teacher.record(i, greedy=False, split="train") for i in range(train)],
        "held_out-sample": [teacher.record(i, greedy=False, split="held_out") for i in range(1000, 1000 + held_out)],
        "held_out-greedy": [teacher.record(i, greedy=True, split="held_out") for i in range(1000, 1000 + held_out)],
    }
    for name, records in units.items():
        writer.write_unit(name, [shifted(record, shift) if shift else record for record in records])
    writer.finish(list(units))
    return teacher


def shifted(record: Record, by: int) -> Record:
    """`record` with its rows moved `by` tokens to the right: the classic misreading of the teacher's logits."""
    rows = record.distributions
    assert rows is not None
    order = np.roll(np.arange(len(rows)), by)
    lengths = np.diff(rows.offsets)[order]
    items = np.concatenate([np.arange(rows.offsets[j], rows.offsets[j + 1]) for j in order])
    moved = Distributions(
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        ids=rows.ids[items],
        logprobs=rows.logprobs[items],
        tail=rows.tail[order],
        sampled=rows.sampled[order],
    )
    return replace(record, distributions=moved)


def load_toy(directory: Path, overrides: list[str] | None = None) -> PipelineConfig:
    return load_config(toy_config(directory), overrides)
