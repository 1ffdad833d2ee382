"""The bounds on α against a search over all the ways in which the events' mass could be split."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from scipy.optimize import linprog

from student.data.batch import collate
from student.data.blocks import lay_out
from student.evaluation.bounds import acceptance_bounds
from tests.fixtures.aligned_samples import make_sample


def test_bounds_enclose_every_split_and_are_attained() -> None:
    vocabulary = 6
    sample = make_sample("a", 2, 6, vocabulary=vocabulary)
    row = lay_out(sample, np.arange(6), block_length=1, mask_id=5)
    targets = collate([[(sample, row)]], pad_id=0).targets
    logits = torch.randn(6, vocabulary, generator=torch.Generator().manual_seed(0))
    low, high = acceptance_bounds(logits, torch.eye(vocabulary), targets, chunk_bytes=2 * 8 * vocabulary)
    q = torch.softmax(logits.double(), -1).numpy()
    for n in range(6):
        events = range(int(targets.event_offsets[n]), int(targets.event_offsets[n + 1]))
        groups = [targets.members[targets.member_offsets[e] : targets.member_offsets[e + 1]].tolist() for e in events]
        masses = [float(targets.event_mass[e]) for e in events]
        rest = sorted(set(range(vocabulary)) - {s for group in groups for s in group})
        if rest:
            groups.append(rest)
            masses.append(float(targets.tail[n]))
        # The overlap is concave in the split: its least value is at a vertex, all of each mass on one token.
        vertices = itertools.product(*groups)
        least = min(
            sum(min(mass, q[n, token]) for token, mass in zip(vertex, masses, strict=True)) for vertex in vertices
        )
        assert float(low[n]) <= least + 1e-9
        tail_share = min(masses[-1], min(q[n, token] for token in rest)) if rest else 0
        assert abs(float(low[n]) + tail_share - least) < 1e-6, "the lower bound counts nothing of the tail"
        assert abs(float(high[n]) - _most(groups, masses, q[n])) < 1e-6


def _most(groups: list[list[int]], masses: list[float], q: np.ndarray) -> float:
    """max Σ t over splits p of the masses with t ≤ p and t ≤ q, as a linear program in (p, t)."""
    tokens = [token for group in groups for token in group]
    count = len(tokens)
    same_mass = np.zeros((len(groups), 2 * count))
    for row, group in enumerate(groups):
        same_mass[row, [tokens.index(token) for token in group]] = 1
    t_at_most_p = np.hstack([-np.eye(count), np.eye(count)])
    bounds = [(0, None)] * count + [(0, q[token]) for token in tokens]
    solution = linprog(
        np.repeat([0, -1], count), t_at_most_p, np.zeros(count), same_mass, masses, bounds=bounds, method="highs"
    )
    return -float(solution.fun)


def test_a_perfect_drafter_has_alpha_one_at_the_top() -> None:
    """q equal to p, where each event is one token and nothing is in the tail."""
    sample = make_sample("a", 1, 1, vocabulary=4)
    row = lay_out(sample, np.array([0]), block_length=1, mask_id=3)
    targets = collate([[(sample, row)]], pad_id=0).targets
    targets.event_offsets = torch.tensor([0, 2])
    targets.event_mass = torch.tensor([0.75, 0.25])
    targets.member_offsets = torch.tensor([0, 1, 2])
    targets.members = torch.tensor([0, 1])
    targets.tail = torch.tensor([0.0])
    low, high = acceptance_bounds(torch.tensor([[0.75, 0.25, 1e-30, 1e-30]]).log(), torch.eye(4), targets)
    assert abs(float(low) - 1) < 1e-7
    assert abs(float(high) - 1) < 1e-7


def test_half_precision_does_not_round_the_logits() -> None:
    """The bounds are those of the weights as they are: a logit of 10 rounded to bfloat16 moves its token by 3 %."""
    generator = torch.Generator().manual_seed(0)
    sample = make_sample("a", 1, 40, vocabulary=50)
    targets = collate([[(sample, lay_out(sample, np.arange(40), block_length=1, mask_id=50))]], pad_id=0).targets
    hidden = torch.randn(40, 64, generator=generator).bfloat16()
    head = torch.randn(50, 64, generator=generator).bfloat16()
    exact = acceptance_bounds(hidden.double(), head.double(), targets)
    for found, expected in zip(acceptance_bounds(hidden, head, targets), exact, strict=True):
        assert torch.allclose(found, expected, rtol=0, atol=1e-5)
