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

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from student.model.sequential_head import SequentialHead

V = 3
LENGTH = 3  # tokens of output that are compared; drafts may be shorter, so a second round is enumerated too

Draft = tuple[tuple[int, ...], np.ndarray, float]
"""G tokens, the q [G, V] that they are verified with, and the draft's probability."""
Target = Callable[[tuple[int, ...]], np.ndarray]
"""Tokens so far → p(next token), [V]."""
Distribution = dict[tuple[int, ...], float]
Drafter = Callable[[tuple[int, ...]], list[Draft]]
"""Context → every draft that it may make there."""


def one_hot(tokens: tuple[int, ...], chance: float = 1.0) -> Draft:
    return tokens, np.eye(V)[list(tokens)], chance


def random_target(seed: int) -> Target:
    """With zeros too; every fourth one is greedy."""

    def target(context: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng([seed, *[token + 1 for token in context]])
        weights = rng.random(V) ** 3
        weights[rng.integers(V)] *= rng.integers(2)
        return np.eye(V)[weights.argmax()] if seed % 4 == 0 else weights / weights.sum()

    return target


def outcomes(draft: Draft, target: Target, context: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], float]]:
    """All results of one round: the accepted tokens and one more of the target's own, each with its probability."""
    drafted, q_GxV, reached = draft
    tokens: tuple[int, ...] = ()
    for token, q_V in zip(drafted, q_GxV, strict=True):
        p_V = target((*context, *tokens))
        accept = min(1.0, p_V[token] / q_V[token])
        if accept < 1:
            rest_V = np.maximum(p_V - q_V, 0)
            yield from (((*tokens, t), reached * (1 - accept) * rest_V[t] / rest_V.sum()) for t in range(V))
        reached, tokens = reached * accept, (*tokens, token)
    yield from (((*tokens, t), reached * target((*context, *tokens))[t]) for t in range(V))


def output_distribution(drafter: Drafter, target: Target) -> Distribution:
    done: Distribution = defaultdict(float)
    open_: Distribution = {(): 1.0}
    while open_:
        following: Distribution = defaultdict(float)
        for context, mass in open_.items():
            for draft in drafter(context):
                for tokens, probability in outcomes(draft, target, context):
                    sequence = (*context, *tokens)
                    (done if len(sequence) >= LENGTH else following)[sequence[:LENGTH]] += mass * probability
        open_ = {s: m for s, m in following.items() if m > 0}
    return done


def changed(drafter: Drafter, target: Target) -> float:
    """Total variation between the output with the draft and the target's own, which an empty draft leaves."""
    with_draft, own = (output_distribution(each, target) for each in (drafter, lambda _: [one_hot(())]))
    return 0.5 * sum(abs(with_draft.get(s, 0.0) - own.get(s, 0.0)) for s in with_draft.keys() | own.keys())


def any_order_joint(seed: int) -> list[Draft]:
    """Low-confidence remasking of two positions: the surer position is drawn first, the other is drawn given it; with
    the rows that each token was drawn from when it was drawn."""
    rng = np.random.default_rng([77, seed])
    joint = rng.random((V, V)) ** 4
    joint /= joint.sum()
    first, second = joint.sum(1), joint.sum(0)
    left_first = first.max() >= second.max()
    return [
        (
            (a, b),
            np.stack([first, joint[a] / first[a]] if left_first else [joint[:, b] / second[b], second]),
            joint[a, b],
        )
        for a, b in itertools.product(range(V), repeat=2)
    ]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_one_hot_verification_is_lossless_for_any_order_unmasking(seed: int) -> None:
    drafts = [one_hot(tokens, chance) for tokens, _, chance in any_order_joint(seed)]
    assert changed(lambda _: drafts, random_target(seed)) < 1e-12


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3))
def test_one_hot_verification_is_lossless_for_the_sequential_head(seed: int, length: int) -> None:
    """Logits of a block, and a correction of each position by the token drafted before it: the argmax from left to
    right, made by the head's own module."""
    torch.manual_seed(seed % 2**31)
    head = SequentialHead(4, 2)
    torch.nn.init.normal_(head.out.weight)
    vocabulary_VxD = torch.randn(V, 4)

    def drafter(context: tuple[int, ...]) -> list[Draft]:
        states_GxD = torch.randn(length, 4, generator=torch.Generator().manual_seed(seed + len(context)))
        tokens: list[int] = []
        with torch.no_grad():
            for state_D in states_GxD:
                if tokens:
                    state_D = head(state_D[None], vocabulary_VxD[tokens[-1:]])[0]
                tokens.append(int((vocabulary_VxD @ state_D).argmax()))
        return [one_hot(tuple(tokens))]

    assert changed(drafter, random_target(seed)) < 1e-12


def test_rejection_sampling_on_any_order_unmasking_would_change_the_output() -> None:
    """Tokens that were not drawn from rows fixed before: far from lossless."""
    drafts = [any_order_joint(seed) for seed in range(10)]
    assert max(changed(lambda _: drafts[seed], random_target(seed)) for seed in range(10)) > 0.02  # noqa: B023
