"""What one answered prompt is in memory. `shared.dataset.schema` says how it lies in Parquet.

Arrays of a response are indexed by response token: T tokens, their candidates flattened row after row
(CSR): row j is `ids[offsets[j]:offsets[j + 1]]`. Logprobs are natural logs at temperature 1, before any
sampling filter.

Records are not to be changed: readers hand out views of shared arrays. `Record` and `Distributions` are not frozen all
the same, because making a frozen instance takes five times as long, and readers make tens of thousands a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

FinishReason = Literal["stop", "length", "unknown"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


def decoding_rule(temperature: float, top_p: float, top_k: int) -> str:
    """`greedy`, `sample` (temperature 1, unfiltered) or `filtered`."""
    if temperature == 0:
        return "greedy"
    return "sample" if (temperature, top_p, top_k) == (1, 1, 0) else "filtered"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the response was decoded. `top_k` 0 and `top_p` 1 filter nothing; `temperature` 0 is greedy."""

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    seed: int | None

    @property
    def rule(self) -> str:
        """The rule's name."""
        return decoding_rule(self.temperature, self.top_p, self.top_k)


UNKNOWN_SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=-1, max_tokens=0, seed=None)
"""How a text of unknown origin was decoded. No engine has a top_k of -1; the rule is `filtered`, which claims least."""


def offsets_of(counts: ArrayLike) -> NDArray[np.int64]:
    """int64 [n + 1], where each of n rows of these lengths starts, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


@dataclass(slots=True)
class Distributions:
    """The teacher's truncated distribution at each of T response tokens.

    Attributes:
        offsets: int64 [T + 1], row boundaries into `ids` and `logprobs`.
        ids: int32 [N], candidates of each row in order of falling probability.
        logprobs: float32 [N].
        tail: float32 [T], probability outside the row, 1 - sum(exp(logprobs)); NaN where it is unknown.
        sampled: float32 [T], the response token's own logprob, which may lie outside the row; NaN where unknown.
    """

    offsets: NDArray[np.int64]
    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    tail: NDArray[np.float32]
    sampled: NDArray[np.float32]

    def row(self, position: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Candidate ids and logprobs at response token `position`."""
        start, stop = self.offsets[position], self.offsets[position + 1]
        return self.ids[start:stop], self.logprobs[start:stop]

    def __len__(self) -> int:
        return len(self.tail)


@dataclass(slots=True)
class Record:
    """One response of the teacher to one prompt.

    Attributes:
        sample_id: stable and unique in the dataset: the prompt, the decoding rule and the sample's number.
        prompt_id: stable id of the prompt; one prompt may have several samples.
        split: `train` or `held_out`, a property of the prompt.
        skill: the prompt's kind, for reading results by kind.
        prompt_text: the conversation as the teacher's chat template rendered it.
        prompt_ids: int32 [P], the teacher's tokens of the rendered prompt.
        response_ids: int32 [T], the teacher's tokens, the end-of-turn token included where it was generated.
        response_bytes: the bytes of the response's non-special tokens; may end inside a character.
        distributions: None for plain conversations, which train with cross-entropy only.
    """

    sample_id: str
    prompt_id: str
    split: str
    skill: str
    messages: tuple[Message, ...]
    prompt_text: str
    prompt_ids: NDArray[np.int32]
    response_ids: NDArray[np.int32]
    response_bytes: bytes
    finish_reason: FinishReason
    sampling: Sampling
    distributions: Distributions | None
