"""The objective, from dense logits, against independent ones: dense rows, enumeration, other libraries."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from student.losses.objective import loss_scale, named_sums, summarize
from student.losses.settings import LossSettings
from student.losses.targets import TargetBatch
from tests.fixtures.loss_cases import (
    dense_terms,
    event_probabilities,
    random_targets,
    target_probabilities,
    targets_from_events,
)

VOCABULARY = 11
KL = LossSettings("kl", 1)


def complete_targets(p_NxV: torch.Tensor, observed: list[int]) -> TargetBatch:
    """Every token its own event: what an equal vocabulary with a complete row gives."""
    batch = targets_from_events([[(float(m), [v]) for v, m in enumerate(row)] for row in p_NxV], observed)
    batch.tail = torch.zeros_like(batch.tail)
    batch.event_mass = p_NxV.reshape(-1)
    return batch


@pytest.fixture
def dense() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(6, VOCABULARY, generator=generator, dtype=torch.float64) * 3
    teacher = torch.randn(6, VOCABULARY, generator=generator, dtype=torch.float64) * 3
    return student.requires_grad_(), teacher


def test_cross_entropy_is_torchs(dense):
    student, _ = dense
    observed = torch.arange(6)
    targets = targets_from_events([None] * 6, observed.tolist())
    ours = dense_terms(student, targets, LossSettings("ce", 1))
    theirs = F.cross_entropy(student, observed, reduction="sum")
    assert ours.total.item() == pytest.approx(theirs.item(), rel=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (ours.total, theirs)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_kl_of_complete_rows_is_torchs_with_softened_logits(dense, temperature):
    student, teacher = dense
    targets = complete_targets(teacher.softmax(1), [0] * 6)
    ours = dense_terms(student, targets, LossSettings("kl", 1, temperature=temperature))
    theirs = temperature**2 * F.kl_div(
        (student / temperature).log_softmax(1), (teacher / temperature).log_softmax(1), log_target=True, reduction="sum"
    )
    assert ours.total.item() == pytest.approx(theirs.item(), rel=1e-9)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (ours.total, theirs)))


def test_kl_of_complete_rows_is_ligers_and_hybrid_too(dense):
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    student, teacher = dense
    identity = torch.eye(VOCABULARY, dtype=torch.float64)
    observed = torch.arange(6)
    targets = complete_targets(teacher.softmax(1), observed.tolist())
    ours = dense_terms(student, targets, LossSettings("hybrid", 1, alpha=0.3, beta=0.7))
    # Liger's generalised JSD at beta = 0 is KL(teacher ‖ student), summed in float32; the head is the identity.
    theirs = LigerFusedLinearJSDFunction.apply(
        student, identity, teacher, identity, observed, None, None, 0.3, 0.7, 0.0, -100, 1.0, False
    )
    assert ours.total.item() / 6 == pytest.approx(theirs.item(), rel=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (ours.total / 6, theirs)))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_events_and_tail_equal_enumeration(temperature):
    targets = random_targets(3, 40, VOCABULARY, block_length=4, most_events=3)
    logits = torch.randn(40, VOCABULARY, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected_kl = expected_tv = expected_entropy_gap = 0.0
    for i, q in enumerate(event_probabilities(logits.softmax(1), targets)):
        if not targets.has_soft[i]:
            continue
        p = target_probabilities(targets, i)
        if targets.depth[i] == 1:
            expected_tv += (p - q).abs().sum().item() / 2
        expected_entropy_gap += (torch.special.entr(q).sum() - torch.special.entr(p).sum()).item()
        p, q = (x ** (1 / temperature) / (x ** (1 / temperature)).sum() for x in (p, q))
        expected_kl += (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum().item()
    terms = dense_terms(logits, targets, LossSettings("kl", 4, temperature=temperature))
    assert terms.kl.item() == pytest.approx(expected_kl, rel=1e-6)
    assert terms.tv.item() == pytest.approx(expected_tv, rel=1e-6)
    assert (terms.student_entropy - terms.target_entropy).item() == pytest.approx(expected_entropy_gap, rel=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_kl_is_zero_exactly_where_event_probabilities_agree(temperature):
    # The student spreads the first event's 0.5 unevenly over two tokens: the target says nothing of that.
    q = torch.tensor([[0.4, 0.1, 0.3, 0.15, 0.05]], dtype=torch.float64)
    targets = targets_from_events([[(0.5, [0, 1]), (0.3, [2])]], [0])
    logits = q.log().requires_grad_()
    terms = dense_terms(logits, targets, LossSettings("kl", 1, temperature=temperature))
    assert terms.total.item() == pytest.approx(0, abs=1e-7)
    assert torch.autograd.grad(terms.total, logits)[0].abs().max() < 1e-6
    shifted = targets_from_events([[(0.45, [0, 1]), (0.3, [2])]], [0])
    assert dense_terms(logits, shifted, KL).total > 1e-3


def test_a_truncated_row_is_not_renormalized():
    """Sparse KL keeps the tail's mass: renormalizing the two events would call this student perfect."""
    q = torch.tensor([[0.5, 0.5, 1e-9, 1e-9]], dtype=torch.float64)
    targets = targets_from_events([[(0.25, [0]), (0.25, [1])]], [0])
    terms = dense_terms(q.log(), targets, KL)
    expected = 2 * 0.25 * math.log(0.25 / 0.5) + 0.5 * math.log(0.5 / 2e-9)
    assert terms.total.item() == pytest.approx(expected, rel=1e-6)


def test_weights_multiply_positions():
    logits = torch.randn(3, VOCABULARY, dtype=torch.float64)
    targets = targets_from_events([None] * 3, [1, 2, 3], block_length=3, weight=[1.0, 0.5, 0.25])
    terms = dense_terms(logits, targets, LossSettings("ce", 3))
    each = F.cross_entropy(logits, targets.observed_ids, reduction="none")
    assert terms.total.item() == pytest.approx((each * targets.weight).sum().item())
    assert terms.ce.item() == pytest.approx(each.sum().item())


def test_a_position_without_soft_target_takes_cross_entropy():
    logits = torch.randn(2, VOCABULARY, dtype=torch.float64)
    targets = targets_from_events([None, [(1.0, [4])]], [2, 4])
    each = F.cross_entropy(logits, targets.observed_ids, reduction="none")
    assert dense_terms(logits, targets, KL).total.item() == pytest.approx(each.sum().item())
    hybrid = dense_terms(logits, targets, LossSettings("hybrid", 1, alpha=0.2, beta=0.5)).total
    assert hybrid.item() == pytest.approx(0.7 * each.sum().item())


@pytest.mark.parametrize("loss", ["ce", "kl", "hybrid"])
def test_gradcheck(loss):
    targets = random_targets(5, 12, 9, block_length=4, most_events=3)
    loss_settings = LossSettings(loss, 4, alpha=0.4, beta=0.6, temperature=1.3, tv_weight=0.5, path_weight=0.7)
    logits = torch.randn(12, 9, generator=torch.Generator().manual_seed(5), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: dense_terms(z, targets, loss_settings).total, logits)


def brute_force_path(log_q: list[float], log_p: list[float]) -> tuple[float, list[float]]:
    products = list(
        itertools.accumulate((min(1.0, math.exp(q - p)) for q, p in zip(log_q, log_p, strict=True)), lambda a, b: a * b)
    )
    return sum(products), products


@given(seed=st.integers(0, 10_000), length=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_path_term_is_the_sum_of_prefix_products(seed, length):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(length, VOCABULARY, generator=generator, dtype=torch.float64) * 4
    log_p = (-torch.rand(length, generator=generator) * 6).tolist()
    targets = targets_from_events([None] * length, [0] * length, block_length=5, observed_logprob=log_p)
    j, products = brute_force_path(logits.log_softmax(1)[:, 0].tolist(), targets.observed_logprob.tolist())
    terms = dense_terms(logits, targets, LossSettings("ce", 5, path_weight=1.0))
    assert terms.accepted.item() == pytest.approx(j, rel=1e-9)
    assert terms.path.item() == pytest.approx(-length * math.log(j / length), rel=1e-9, abs=1e-9)
    assert terms.total.item() == pytest.approx((terms.ce + terms.path).item())
    assert terms.accepted_by_depth.tolist() == pytest.approx(products + [0.0] * (5 - length), rel=1e-9)
    assert terms.accepted_count_by_depth.tolist() == [1.0] * length + [0.0] * (5 - length)


def test_path_counts_up_to_the_first_unknown_logprob():
    logits = torch.zeros(4, VOCABULARY, dtype=torch.float64)
    known = [-5.0, -5.0, math.nan, -5.0]
    targets = targets_from_events([None] * 4, [0] * 4, block_length=4, observed_logprob=known)
    terms = dense_terms(logits, targets, LossSettings("ce", 4, path_weight=1.0))
    assert terms.accepted.item() == pytest.approx(2)
    assert terms.path.item() == pytest.approx(0)
    assert terms.accepted_count_by_depth.tolist() == [1, 1, 0, 0]
    assert terms.count_by_depth.tolist() == [1, 1, 1, 1]
    unknown = targets_from_events([None] * 4, [0] * 4, block_length=4)
    terms = dense_terms(logits, unknown, LossSettings("ce", 4, path_weight=1.0))
    assert (terms.path.item(), terms.blocks.item()) == (0, 0)
    assert math.isfinite(terms.total.item())


def test_path_gradient_survives_a_hopeless_draft():
    """In log space the slope on log q of the first token is about one where J itself is e^-40."""
    logits = torch.tensor([[40.0, 0.0]], dtype=torch.float64, requires_grad=True)
    targets = targets_from_events([None], [1], observed_logprob=[-0.1])
    loss = dense_terms(logits, targets, LossSettings("ce", 1, path_weight=1.0))
    gradient = torch.autograd.grad(loss.total - F.cross_entropy(logits, torch.tensor([1])), logits)[0]
    torch.testing.assert_close(gradient, torch.tensor([[1.0, -1.0]], dtype=torch.float64))


def test_leading_matches_stop_at_the_first_miss():
    most_probable = [3, 4, 5, 6]
    logits = 5 * F.one_hot(torch.tensor(most_probable * 2), VOCABULARY).double()
    targets = targets_from_events([None] * 8, [3, 4, 0, 6, 0, 4, 5, 6], block_length=4)
    terms = dense_terms(logits, targets, LossSettings("ce", 4))
    assert terms.matched_by_depth.tolist() == [1, 1, 0, 0]
    assert terms.count_by_depth.tolist() == [2, 2, 2, 2]
    assert terms.hits.item() == 6


def test_sums_add_up_over_micro_batches_and_come_back():
    logits = torch.randn(12, VOCABULARY, dtype=torch.float64)
    loss_settings = LossSettings("hybrid", 4, tv_weight=0.1, path_weight=0.2)
    whole = random_targets(7, 12, VOCABULARY, 4, 3)
    whole.depth[-2:], whole.block[-2:] = torch.tensor([3, 4]), 2
    events = [int(whole.event_offsets[8]), len(whole.event_mass)]
    members = [int(whole.member_offsets[events[0]]), len(whole.members)]
    parts = [
        (logits[:8], whole.slice(0, 8, slice(0, events[0]), slice(0, members[0]))),
        (logits[8:], whole.slice(8, 12, slice(*events), slice(*members))),
    ]
    total = dense_terms(logits, whole, loss_settings).sums
    by_parts = sum(dense_terms(z, t, loss_settings).sums for z, t in parts)
    torch.testing.assert_close(total, by_parts)
    assert len(named_sums(total)["accepted_by_depth"]) == 4
    log = summarize(total)
    assert log["positions"] == 12
    assert log["ce"] == pytest.approx(F.cross_entropy(logits, whole.observed_ids).item())
    assert len(log["match_by_depth"]) == 4


def test_summary_says_none_where_nothing_was_summed():
    terms = dense_terms(torch.zeros(0, VOCABULARY), targets_from_events([], []), LossSettings("ce", 2))
    log = summarize(terms.sums)
    assert log["loss"] is None
    assert log["kl"] is None
    assert log["alpha_by_depth"] == [None, None]


def test_scale_undoes_both_divisions():
    assert loss_scale(100, world_size=1, accumulation_steps=1) == 1 / 100
    # DeepSpeed divides by 4 accumulation steps and averages over 8 ranks.
    assert loss_scale(100, world_size=8, accumulation_steps=4) / 4 / 8 == pytest.approx(1 / 100)


def test_a_step_without_targets_has_scale_zero():
    assert loss_scale(0, world_size=2, accumulation_steps=1) == 0
