"""Losslessness by exact enumeration: every random outcome is followed with its probability, none is sampled.

Both verifications are one formula (README.md of `student/drafting`): the drafted token x is accepted with
min(1, p(x) / q(x)), else the residual max(0, p - q) is sampled. Rejection sampling takes for q the row that x was drawn
from; one-hot verification takes the one-hot row of x, wherever x came from.

Legend: G drafted tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from student.model.sequential_head import SequentialHead

V = 3
LENGTH = 3  # tokens of output that are compared; drafts are shorter, so a second round is enumerated too


@dataclass(frozen=True)
class Draft:
    """G tokens, and the q [G, V] that they are verified with."""

    tokens: tuple[int, ...]
    rows_GxV: np.ndarray


Target = Callable[[tuple[int, ...]], np.ndarray]
"""Tokens so far → p(next token), [V]."""
Distribution = dict[tuple[int, ...], float]
Drafter = Callable[[tuple[int, ...]], list[tuple[Draft, float]]]
"""Context → every draft that it may make there, with its probability."""


def one_hot(tokens: tuple[int, ...]) -> Draft:
    return Draft(tokens, np.eye(V)[list(tokens)])


def random_target(seed: int) -> Target:
    """With zeros too; every fourth one is greedy."""

    def target(context: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng([seed, *[token + 1 for token in context]])
        weights = rng.random(V) ** 3
        weights[rng.integers(V)] *= rng.integers(2)
        return np.eye(V)[weights.argmax()] if seed % 4 == 0 else weights / weights.sum()

    return target


def sequence_distribution(target: Target, length: int) -> Distribution:
    result: Distribution = {(): 1.0}
    for _ in range(length):
        result = {(*s, t): m * target(s)[t] for s, m in result.items() for t in range(V) if m * target(s)[t] > 0}
    return result


def outcomes(draft: Draft, target: Target, context: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], float]]:
    """All results of one round: the accepted tokens and one more of the target's own, each with its probability."""
    reached = 1.0
    tokens: tuple[int, ...] = ()
    for token, q_V in zip(draft.tokens, draft.rows_GxV, strict=True):
        p_V = target((*context, *tokens))
        accept = min(1.0, p_V[token] / q_V[token])
        if accept < 1:
            rest_V = np.maximum(p_V - q_V, 0)
            yield from (((*tokens, t), reached * (1 - accept) * rest_V[t] / rest_V.sum()) for t in range(V))
        reached, tokens = reached * accept, (*tokens, token)
    yield from (((*tokens, t), reached * target((*context, *tokens))[t]) for t in range(V))


def output_distribution(drafter: Drafter, target: Target, length: int) -> Distribution:
    done: Distribution = defaultdict(float)
    open_: Distribution = {(): 1.0}
    while open_:
        following: Distribution = defaultdict(float)
        for context, mass in open_.items():
            for draft, chance in drafter(context):
                for tokens, probability in outcomes(draft, target, context):
                    sequence = (*context, *tokens)
                    (done if len(sequence) >= length else following)[sequence[:length]] += mass * chance * probability
        open_ = {s: m for s, m in following.items() if m > 0}
    return done


def distance(a: Distribution, b: Distribution) -> float:
    return 0.5 * sum(abs(a.get(s, 0.0) - b.get(s, 0.0)) for s in a.keys() | b.keys())


def all_drawn(rows_GxV: np.ndarray) -> list[tuple[Draft, float]]:
    """Every draft whose tokens are drawn independently from these rows."""
    chances = {
        tokens: float(np.prod([row[t] for row, t in zip(rows_GxV, tokens, strict=True)]))
        for tokens in itertools.product(range(V), repeat=len(rows_GxV))
    }
    return [(Draft(tokens, rows_GxV), chance) for tokens, chance in chances.items() if chance > 0]


def any_order_joint(seed: int) -> list[tuple[tuple[int, int], np.ndarray, float]]:
    """Low-confidence remasking of two positions: the surer position is drawn first, the other is drawn given it.

    Returns (tokens, the row that each token was drawn from when it was drawn, probability).
    """
    rng = np.random.default_rng([77, seed])
    joint = rng.random((V, V)) ** 4
    joint /= joint.sum()
    first, second = joint.sum(1), joint.sum(0)
    result = []
    for a, b in itertools.product(range(V), repeat=2):
        rows = (
            np.stack([first, joint[a] / first[a]])
            if first.max() >= second.max()
            else np.stack([joint[:, b] / second[b], second])
        )
        result.append(((a, b), rows, float(joint[a, b])))
    return result


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_rejection_sampling_is_lossless_for_independent_draws(seed: int) -> None:
    target = random_target(seed)

    def drafter(context: tuple[int, ...]) -> list[tuple[Draft, float]]:
        rows = np.random.default_rng([1, seed, len(context)]).random((2, V)) ** 3
        return all_drawn(rows / rows.sum(1, keepdims=True))

    assert distance(output_distribution(drafter, target, LENGTH), sequence_distribution(target, LENGTH)) < 1e-12


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_one_hot_verification_is_lossless_for_any_order_unmasking(seed: int) -> None:
    target = random_target(seed)

    def drafter(_context: tuple[int, ...]) -> list[tuple[Draft, float]]:
        return [(one_hot(tokens), chance) for tokens, _, chance in any_order_joint(seed)]

    assert distance(output_distribution(drafter, target, LENGTH), sequence_distribution(target, LENGTH)) < 1e-12


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 3))
def test_one_hot_verification_is_lossless_for_the_best_of_several(seed: int, length: int) -> None:
    """The draft may even look at the target: of several draws, the one that the target likes best is proposed."""
    target = random_target(seed)

    def drafter(context: tuple[int, ...]) -> list[tuple[Draft, float]]:
        candidates = list(itertools.product(range(V), repeat=length))
        best = max(candidates, key=lambda c: np.prod([target((*context, *c[:i]))[t] for i, t in enumerate(c)]))
        return [(one_hot(best), 1.0)]

    assert distance(output_distribution(drafter, target, LENGTH), sequence_distribution(target, LENGTH)) < 1e-12


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3))
def test_one_hot_verification_is_lossless_for_the_sequential_head(seed: int, length: int) -> None:
    """Logits of a block, and a correction of each position by the token drafted before it: the argmax from left to
    right, made by the head's own module."""
    target = random_target(seed)
    torch.manual_seed(seed % 2**31)
    head = SequentialHead(4, 2)
    torch.nn.init.normal_(head.out.weight)
    vocabulary_VxD = torch.randn(V, 4)

    def drafter(context: tuple[int, ...]) -> list[tuple[Draft, float]]:
        states_GxD = torch.randn(length, 4, generator=torch.Generator().manual_seed(seed + len(context)))
        tokens: list[int] = []
        with torch.no_grad():
            for state_D in states_GxD:
                if tokens:
                    state_D = head(state_D[None], vocabulary_VxD[tokens[-1:]])[0]
                tokens.append(int((vocabulary_VxD @ state_D).argmax()))
        return [(one_hot(tuple(tokens)), 1.0)]

    assert distance(output_distribution(drafter, target, LENGTH), sequence_distribution(target, LENGTH)) < 1e-12


def test_rejection_sampling_on_any_order_unmasking_would_change_the_output() -> None:
    """Tokens that were not drawn from rows fixed before: far from lossless."""
    worst = 0.0
    for seed in range(10):
        target = random_target(seed)

        def drafter(_context: tuple[int, ...], seed: int = seed) -> list[tuple[Draft, float]]:
            return [(Draft(tokens, rows), chance) for tokens, rows, chance in any_order_joint(seed)]

        worst = max(worst, distance(output_distribution(drafter, target, 2), sequence_distribution(target, 2)))
    assert worst > 0.02
