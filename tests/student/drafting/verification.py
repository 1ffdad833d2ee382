"""Which verification keeps speculative decoding lossless, picked by how the draft was made.

Two kinds of draft, two verifications:

- `OneHotDraft`, one-hot verification: tokens from anywhere (an argmax, any-order unmasking, the best of several,
  another vocabulary). The draft has no probability of its own: x is accepted with p(x), else p without x is sampled.
- `FactorizedDraft`, rejection sampling: token i was drawn from row q_i, which was fixed before any token of the draft
  was drawn. Accepted with min(1, p/q), else the residual max(0, p - q) is sampled (README.md of `student/drafting`).

Rejection sampling of tokens that were not drawn from their rows changes the output distribution. So rows and tokens
cannot be put together by hand: `FactorizedDraft.draw` draws, and `verify` goes by the type.

An oracle in numpy, a row at a time; the serving engine has its own kernels for both, and verifies every draft of a
`custom_class` proposer as one-hot. Legend: G drafted tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Probabilities = NDArray[np.float64]
Target = Callable[[tuple[int, ...]], Probabilities]
"""Tokens accepted so far → p(next token), float64 [V]."""


@dataclass(frozen=True, slots=True)
class OneHotDraft:
    """Tokens of unknown or irrelevant origin. `tokens`: G ids."""

    tokens: tuple[int, ...]

    def acceptance(self, depth: int, target_V: Probabilities) -> float:
        """Probability that the token at `depth` (0-based) is accepted: p(x)."""
        return float(target_V[self.tokens[depth]])

    def residual(self, depth: int, target_V: Probabilities) -> Probabilities:
        """Distribution [V] of the token put in a rejected one's place: p without x, renormalized."""
        rest_V = target_V.copy()
        rest_V[self.tokens[depth]] = 0.0
        return _normalized(rest_V)


class FactorizedDraft:
    """Tokens drawn independently of one another, each from its own row; made by `draw` only.

    Attributes:
        tokens: G ids. rows_GxV: float64, what each token was drawn from.
    """

    __slots__ = ("rows_GxV", "tokens")
    rows_GxV: Probabilities
    tokens: tuple[int, ...]

    def __init__(self) -> None:
        raise TypeError(
            "a FactorizedDraft is made by FactorizedDraft.draw; wrap tokens you already have in OneHotDraft"
        )

    @classmethod
    def draw(cls, rows_GxV: Probabilities, generator: np.random.Generator) -> FactorizedDraft:
        """Draw token i from row i.

        Raises:
            ValueError: if the rows are not distributions.
        """
        rows_GxV = np.array(rows_GxV, dtype=np.float64)
        if rows_GxV.ndim != 2 or (rows_GxV < 0).any() or not np.allclose(rows_GxV.sum(axis=1), 1.0):
            raise ValueError(f"the draft's rows have the sums {rows_GxV.sum(axis=-1)}, expected G distributions over V")
        rows_GxV.flags.writeable = False
        draft = object.__new__(cls)
        draft.rows_GxV = rows_GxV
        draft.tokens = tuple(int(generator.choice(len(row), p=row / row.sum())) for row in rows_GxV)
        return draft

    def acceptance(self, depth: int, target_V: Probabilities) -> float:
        """Probability that the token at `depth` (0-based) is accepted: min(1, p(x) / q(x))."""
        token = self.tokens[depth]
        return float(min(1.0, target_V[token] / self.rows_GxV[depth, token]))

    def residual(self, depth: int, target_V: Probabilities) -> Probabilities:
        """Distribution [V] of the token put in a rejected one's place: max(0, p - q), renormalized."""
        return _normalized(np.maximum(target_V - self.rows_GxV[depth], 0.0))


Draft = OneHotDraft | FactorizedDraft


@dataclass(frozen=True, slots=True)
class Verified:
    """What one target forward emits: the accepted tokens and one more of the target's own."""

    accepted: int
    tokens: tuple[int, ...]


def verify(draft: Draft, target: Target, generator: np.random.Generator, context: Sequence[int] = ()) -> Verified:
    """Accept a prefix of `draft`, then sample one token, so that all follow the target's distribution exactly.

    Args:
        target: p of the next token after `context` and the tokens accepted so far.
    """
    tokens: list[int] = []
    for depth, token in enumerate(draft.tokens):
        target_V = target((*context, *tokens))
        if generator.random() >= draft.acceptance(depth, target_V):
            rest_V = draft.residual(depth, target_V)
            return Verified(depth, (*tokens, int(generator.choice(len(rest_V), p=rest_V))))
        tokens.append(token)
    target_V = target((*context, *tokens))
    return Verified(len(tokens), (*tokens, int(generator.choice(len(target_V), p=target_V))))


def _normalized(weights_V: Probabilities) -> Probabilities:
    # No mass left means that rejection had probability zero; any distribution is right then, NaN is not.
    total = weights_V.sum()
    return weights_V / total if total > 0 else np.full_like(weights_V, 1.0 / len(weights_V))
