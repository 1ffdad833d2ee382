"""The path term and the one-hot count, read off stored samples, against playing the verification out.

A toy teacher with memory over the drafted tokens, a student independent across positions, float64. Three numbers must
agree: the sum over all texts, what `distillation_loss` says of 200,000 stored samples, and what a verifier accepts of
200,000 drafts that it draws, tests and rejects itself.
"""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from student.losses.settings import LossSettings
from tests.fixtures.loss_cases import dense_terms, targets_from_events

VOCABULARY, DEPTHS, DRAWS = 4, 3, 200_000


class Toy:
    """p(x_j | x_<j) for every prefix, q_j(x_j) for every depth."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.p = [self._rows(VOCABULARY**depth, 1.5) for depth in range(DEPTHS)]
        marginals = self._rows(DEPTHS, 1.0)
        # A student near the teacher at depth 1 and off it further on, as a real one is.
        marginals[0] = 0.7 * self.p[0][0] + 0.3 * marginals[0]
        self.q = marginals

    def _rows(self, count: int, spread: float) -> torch.Tensor:
        return (torch.randn(count, VOCABULARY, generator=self.generator, dtype=torch.float64) * spread).softmax(1)

    def sample_teacher(self) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [DRAWS, DEPTHS] texts and their float64 logprobs."""
        prefix = torch.zeros(DRAWS, dtype=torch.int64)
        tokens, logprobs = [], []
        for depth in range(DEPTHS):
            rows = self.p[depth][prefix]
            token = torch.multinomial(rows, 1, generator=self.generator).squeeze(1)
            tokens.append(token)
            logprobs.append(rows.gather(1, token[:, None]).squeeze(1).log())
            prefix = prefix * VOCABULARY + token
        return torch.stack(tokens, 1), torch.stack(logprobs, 1)

    def enumerate(self, accept) -> float:
        """Sum over all texts of the expected accepted tokens, `accept(depth, row of p, token)` being E over x ~ p."""
        expected = 0.0
        for length in range(1, DEPTHS + 1):
            for text in itertools.product(range(VOCABULARY), repeat=length):
                chance, prefix = 1.0, 0
                for depth, token in enumerate(text):
                    chance *= accept(depth, self.p[depth][prefix], token)
                    prefix = prefix * VOCABULARY + token
                expected += chance
        return expected

    def verify(self, drafts: torch.Tensor, chance) -> torch.Tensor:
        """[DRAWS], tokens of each draft that a verifier accepts before its first rejection."""
        prefix = torch.zeros(DRAWS, dtype=torch.int64)
        alive = torch.ones(DRAWS, dtype=torch.bool)
        accepted = torch.zeros(DRAWS, dtype=torch.float64)
        for depth in range(DEPTHS):
            token = drafts[:, depth]
            p = self.p[depth][prefix].gather(1, token[:, None]).squeeze(1)
            alive &= torch.rand(DRAWS, generator=self.generator, dtype=torch.float64) < chance(depth, p, token)
            accepted += alive
            prefix = prefix * VOCABULARY + token
        return accepted


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy()


@pytest.fixture(scope="module")
def stored(toy) -> SimpleNamespace:
    """What the loss says of stored samples; the student's logits are the same for every draw."""
    tokens, logprobs = toy.sample_teacher()
    count = DRAWS * DEPTHS
    targets = targets_from_events([], [], block_length=DEPTHS)
    targets.observed_ids, targets.observed_logprob = tokens.flatten(), logprobs.flatten()
    targets.depth, targets.block = torch.arange(count) % DEPTHS + 1, torch.arange(count) // DEPTHS
    targets.weight, targets.known, targets.tail = torch.ones(count), torch.ones(count), torch.full((count,), math.nan)
    targets.has_soft = torch.zeros(count, dtype=torch.bool)
    targets.event_offsets = torch.zeros(count + 1, dtype=torch.int64)
    return dense_terms(toy.q.log().repeat(DRAWS, 1), targets, LossSettings("ce", DEPTHS))


def standard_error(accepted: torch.Tensor) -> float:
    return float(accepted.std() / math.sqrt(DRAWS))


def test_path_term_equals_simulated_rejection_sampling(toy, stored):
    exact = toy.enumerate(lambda depth, p, token: min(float(p[token]), float(toy.q[depth, token])))
    drafts = torch.stack([torch.multinomial(q, DRAWS, True, generator=toy.generator) for q in toy.q], 1)
    simulated = toy.verify(drafts, lambda depth, p, token: p / toy.q[depth][token])
    from_shards = float(stored.accepted / stored.blocks)
    error = standard_error(simulated)
    assert simulated.mean().item() == pytest.approx(exact, abs=3 * error)
    # Between 0 and DEPTHS, the estimate's spread is no larger than the simulation's (Rao-Blackwell).
    assert from_shards == pytest.approx(exact, abs=3 * error)
    assert from_shards == pytest.approx(simulated.mean().item(), abs=3 * math.sqrt(2) * error)
    assert float(stored.accepted_by_depth.sum() / stored.blocks) == pytest.approx(from_shards)
    assert 0.5 < exact < DEPTHS - 0.5


def test_one_hot_matches_equal_simulated_one_hot_verification(toy, stored):
    draft = toy.q.argmax(1)
    exact = toy.enumerate(lambda depth, p, token: float(p[token]) * float(token == draft[depth]))
    simulated = toy.verify(draft.expand(DRAWS, DEPTHS), lambda _depth, p, _token: p)
    from_shards = float(stored.matched_by_depth.sum() / stored.blocks)
    error = standard_error(simulated)
    assert simulated.mean().item() == pytest.approx(exact, abs=3 * error)
    assert from_shards == pytest.approx(exact, abs=3 * error)
    assert from_shards == pytest.approx(simulated.mean().item(), abs=3 * math.sqrt(2) * error)
