"""How often each student token occurs in the training responses, and the tokens that are worth drafting.

The head is a large part of a small drafter: 23 % of the weights that 8 layers of LLaDA-8B read. Most of its rows are
for tokens that hardly ever come; a draft that leaves them out is another draft, and any draft is lossless (README.md of
this folder). FR-Spec (arXiv:2502.14856) does this for autoregressive drafters, with frequencies of a corpus; here they
are those of the teacher's own responses, counted when the student is trained and kept beside its weights.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.errors import CheckpointError
from student.alignment.prepared import PreparedDataset

FILE = "token_counts.npy"
_MOST_SAMPLES = 100_000


def count_tokens(prepared: PreparedDataset, vocabulary: int) -> NDArray[np.int64]:
    """int64 [vocabulary]: occurrences in the responses of the training split, of at most 100,000 of them."""
    numbers = prepared.indices(split="train")
    counts = np.zeros(vocabulary, np.int64)
    for number in numbers[:: max(-(-len(numbers) // _MOST_SAMPLES), 1)]:
        sample = prepared[int(number)]
        counts += np.bincount(sample.input_ids[sample.prompt_length :], minlength=vocabulary)
    return counts


def write_counts(directory: Path, counts: NDArray[np.int64]) -> None:
    """Keep `counts` beside a model's weights."""
    np.save(directory / FILE, counts, allow_pickle=False)


def frequent_tokens(directory: Path, most: int) -> NDArray[np.int64]:
    """The `most` tokens that occur most often, ascending; fewer if fewer occur at all.

    Raises:
        CheckpointError: if the student's directory has no counts, or they are damaged.
    """
    try:
        counts = np.load(directory / FILE, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{directory / FILE} cannot be read ({error}); `student train` writes it beside the weights: train again, "
            "or draft over the whole vocabulary (draft_vocabulary: null)"
        ) from error
    order = np.argsort(-counts, kind="stable")[:most]
    return np.sort(order[counts[order] > 0])
