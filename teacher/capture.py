"""vLLM's logprob columns, as numpy arrays, become a record's distributions.

Legend: T response tokens, P prompt tokens, K candidates asked for, V tokens of the vocabulary.

vLLM answers `logprobs=K` with K + 1 columns a token: column 0 is the token that was sampled, columns 1…K are the
top K in falling order, where the sampled token appears again if it is among them. At `raw_logprobs` they are
log-softmax values before temperature, penalties and filters, so 1 - sum(exp) is the tail. Costs 3 µs a token at
K = 64, and 13 where a row has ties: these are sorted by id, so that their order is a fact instead of an accident.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.dataset.records import Distributions, offsets_of
from shared.errors import AlignmentError, CheckpointError


@dataclass(frozen=True, slots=True)
class Columns:
    """What vLLM returned for T tokens, still with the sampled token in column 0.

    Attributes:
        ids: int32 [T, K + 1].
        logprobs: float32 [T, K + 1].
    """

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.ids)


def reshape_flat(ids: list[int], logprobs: list[float], rows: int) -> Columns:
    """The lists of a `FlatLogprobs` over `rows` tokens as columns; every row has the same width.

    Raises:
        AlignmentError: if the lists do not divide into that many rows.
    """
    if len(ids) != len(logprobs) or (len(ids) % rows if rows else len(ids)):
        raise AlignmentError(
            f"vLLM returned {len(ids)} ids and {len(logprobs)} logprobs for {rows} tokens, expected equal rows; "
            "this build of vLLM is not the one that the project pins"
        )
    width = len(ids) // rows if rows else 1
    return Columns(
        np.asarray(ids, dtype=np.int32).reshape(rows, width),
        np.asarray(logprobs, dtype=np.float32).reshape(rows, width),
    )


def response_columns(prompt_columns: Columns, prompt_length: int, response_length: int) -> Columns:
    """The response's rows among the rows that scored prompt + response as one prompt.

    vLLM has nothing for position 0, so row i scores token i + 1 and response token j is row P - 1 + j.

    Raises:
        AlignmentError: if the rows do not cover exactly those tokens.
    """
    if len(prompt_columns) != prompt_length + response_length - 1:
        raise AlignmentError(
            f"vLLM scored {len(prompt_columns)} positions of {prompt_length} + {response_length} tokens, "
            f"expected {prompt_length + response_length - 1}: all but the first"
        )
    rows = slice(prompt_length - 1, prompt_length - 1 + response_length)
    return Columns(prompt_columns.ids[rows], prompt_columns.logprobs[rows])


def to_distributions(
    columns: Columns, response_ids: NDArray[np.int32], vocabulary_size: int, retained_mass: float | None = None
) -> Distributions:
    """Split the sampled token off, order the candidates, and compute the tail.

    Candidates of probability zero, and ids beyond the tokenizer (a padded output head has them), go to the tail.

    Args:
        retained_mass: stop a row at the candidate that brings it to this mass; None keeps all K.

    Raises:
        AlignmentError: if column 0 is not `response_ids`: the rows belong to other tokens.
        CheckpointError: if a logprob is NaN or above zero, which a sound teacher never computes.
    """
    if len(columns) != len(response_ids) or not np.array_equal(columns.ids[:, 0], response_ids):
        first = next(
            (i for i, row in enumerate(columns.ids[:, 0]) if i >= len(response_ids) or row != response_ids[i]), 0
        )
        raise AlignmentError(
            f"{len(columns)} rows were captured for {len(response_ids)} response tokens and row {first} belongs to "
            "another token; the rows are shifted against the text"
        )
    if np.isnan(columns.logprobs).any() or (columns.logprobs > 1e-4).any():
        row = int(np.argwhere(np.isnan(columns.logprobs) | (columns.logprobs > 1e-4))[0][0])
        raise CheckpointError(
            f"the teacher gave the logprob {columns.logprobs[row].max()} at response token {row}, expected at most 0; "
            "its activations overflow: set teacher.dtype to bfloat16 or float32"
        )
    sampled = np.minimum(columns.logprobs[:, 0], np.float32(0))
    ids_TxK, logprobs_TxK = columns.ids[:, 1:], np.minimum(columns.logprobs[:, 1:], np.float32(0))
    # vLLM's rows fall already; only those with equal neighbors need the sort that makes their order a fact.
    tied_T = ~(logprobs_TxK[:, 1:] < logprobs_TxK[:, :-1]).all(axis=1)
    if tied_T.any():
        order = np.lexsort((ids_TxK[tied_T], -logprobs_TxK[tied_T]), axis=-1)
        ids_TxK, logprobs_TxK = ids_TxK.copy(), logprobs_TxK.copy()
        ids_TxK[tied_T] = np.take_along_axis(ids_TxK[tied_T], order, axis=1)
        logprobs_TxK[tied_T] = np.take_along_axis(logprobs_TxK[tied_T], order, axis=1)

    keep_TxK = np.isfinite(logprobs_TxK) & (ids_TxK < vocabulary_size)
    mass_TxK = np.where(keep_TxK, np.exp(logprobs_TxK, dtype=np.float64), 0.0)
    if retained_mass is not None:
        before_TxK = np.cumsum(mass_TxK, axis=1) - mass_TxK
        keep_TxK &= before_TxK < retained_mass
        mass_TxK = np.where(keep_TxK, mass_TxK, 0.0)
    return Distributions(
        offsets=offsets_of(keep_TxK.sum(axis=1)),
        ids=ids_TxK[keep_TxK].astype(np.int32),
        logprobs=logprobs_TxK[keep_TxK].astype(np.float32),
        tail=np.clip(1.0 - mass_TxK.sum(axis=1), 0.0, 1.0).astype(np.float32),
        sampled=sampled.astype(np.float32),
    )
