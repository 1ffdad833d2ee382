"""LLaDA's own objective: each token of the answer is masked with one probability, and all masks are predicted at once.

For a sample with answer tokens x_1 … x_S (Nie et al., "Large Language Diffusion Models", 2025, algorithm 2):

    t ~ U(0, 1), p = (1 - ε) t + ε, each token masked with probability p; loss = Σ_masked CE / p, over S

which bounds -log p(answer | prompt) / S from above in expectation. The prompt is never masked. After its end the answer
goes on with end-of-text tokens that count like any other, so that the model learns where to stop.

Targets see text to their right, where the teacher's row is not their distribution: they are trained on the text alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shared.config import RandomMaskingConfig
from student.alignment.targets import AlignedSample
from student.data.blocks import BlockRow, sample_generator

SMALLEST = 1e-3
"""ε: no token is masked more rarely, which bounds the weights 1 / p."""


def mask_probability(seed: int, epoch: int, sample_id: str, *, antithetic: bool) -> float:
    """p of a visit. With `antithetic`, t of every odd epoch is 1 - t of the epoch before."""
    t = sample_generator(seed, epoch // 2 if antithetic else epoch, f"{sample_id}/ratio").random()
    if antithetic and epoch % 2:
        t = 1 - t
    return float((1 - SMALLEST) * t + SMALLEST)


def randomly_masked(
    sample: AlignedSample,
    settings: RandomMaskingConfig,
    seed: int,
    epoch: int,
    *,
    mask_id: int,
    end_id: int,
    max_sequence_tokens: int,
) -> list[BlockRow]:
    """The sample with a random part of its answer masked; and, if they are asked for, with the other part masked.

    Args:
        end_id: of the end-of-text tokens after an answer that ends; one that was cut off has none.
    """
    prompt, answer = np.split(sample.input_ids.astype(np.int64), [sample.prompt_length])
    ended = len(answer) > 0 and sample.byte_ends[-1] == (sample.byte_ends[-2] if len(answer) > 1 else 0)
    answer = np.append(answer, np.full(settings.end_tokens * ended, end_id))[: max_sequence_tokens - len(prompt)]
    p = mask_probability(seed, epoch, sample.sample_id, antithetic=settings.antithetic)
    masked = sample_generator(seed, epoch, f"{sample.sample_id}/mask").random(len(answer)) < p
    rows = [mask_answer(prompt, answer, masked, p, mask_id)]
    if settings.complementary:
        rows.append(mask_answer(prompt, answer, ~masked, 1 - p, mask_id))
    return rows


def mask_answer(
    prompt: NDArray[np.int64], answer: NDArray[np.int64], masked: NDArray[np.bool_], p: float, mask_id: int
) -> BlockRow:
    """Prompt and answer in one bidirectional document, the `masked` tokens hidden, each of them weighing 1 / p."""
    tokens = len(prompt) + len(answer)
    chosen = np.flatnonzero(masked)
    return BlockRow(
        input_ids=np.concatenate([prompt, np.where(masked, mask_id, answer)]),
        position_ids=np.arange(tokens),
        block_ids=np.ones(tokens, np.int64),  # all in one block, which sees all of itself
        supervised=len(prompt) + chosen,
        response_positions=chosen,
        observed_ids=answer[chosen],
        depth=np.zeros(len(chosen), np.int64),
        block=np.full(len(chosen), -1),
        weight=1 / max(p, SMALLEST),
        count=len(answer),
        sees_left_only=False,
    )
