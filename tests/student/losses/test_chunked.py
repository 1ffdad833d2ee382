"""The chunked loss against the plain one: values, all gradients, and what training does to its inputs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from student.losses import chunked
from student.losses.objective import LossTerms
from student.losses.settings import LossSettings
from student.losses.targets import TargetBatch
from tests.fixtures import dense_loss
from tests.fixtures.loss_cases import random_targets, targets_from_events

EVERYTHING = LossSettings("hybrid", 4, alpha=0.4, beta=0.6, tv_weight=0.5, path_weight=0.3)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor, scale: torch.Tensor | None = None) -> float:
    """Largest difference over the largest entry of `theirs`, or of `scale`."""
    if not theirs.numel():
        return 0.0
    scale = theirs if scale is None else scale
    return float((ours.double() - theirs.double()).abs().max() / scale.double().abs().max().clamp(min=1e-12))


@dataclass
class Outcome:
    terms: LossTerms
    hidden_grad: torch.Tensor
    head_grad: torch.Tensor

    def is_finite(self) -> bool:
        return all(t.isfinite().all() for t in (self.terms.sums, self.hidden_grad, self.head_grad))


def chunked_outcome(hidden, head, targets, loss, chunk_rows) -> Outcome:
    h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    terms = chunked.distillation_loss(h, w, targets, loss, chunk_bytes=chunk_rows * len(head) * 4)
    return Outcome(terms, *torch.autograd.grad(terms.total, (h, w)))


def plain_outcome(hidden, head, targets, loss) -> tuple[Outcome, Outcome]:
    """The plain loss's, and one whose gradients add up the addends' sizes, the scale of rounding where they cancel."""
    h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    logits = h @ w.T
    terms = dense_loss.distillation_loss(logits, targets, loss)
    hidden_grad, head_grad, slope = torch.autograd.grad(terms.total, (h, w, logits))
    sizes = Outcome(terms, slope.abs() @ head.abs(), slope.abs().T @ hidden.abs())
    return Outcome(terms, hidden_grad, head_grad), sizes


@given(
    seed=st.integers(0, 10_000),
    positions=st.integers(1, 40),
    vocabulary=st.integers(5, 60),
    width=st.integers(1, 12),
    block_length=st.integers(1, 6),
    chunk_rows=st.integers(1, 50),
    loss=st.sampled_from(["ce", "kl", "hybrid"]),
    temperature=st.sampled_from([1.0, 0.7, 2.0]),
    tv_weight=st.sampled_from([0.0, 0.5]),
    path_weight=st.sampled_from([0.0, 0.3]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=120, deadline=None)
def test_equals_the_plain_loss(
    seed, positions, vocabulary, width, block_length, chunk_rows, loss, temperature, tv_weight, path_weight, dtype
):
    targets = random_targets(seed, positions, vocabulary, block_length, most_events=4)
    loss_settings = LossSettings(
        loss, block_length, alpha=0.4, beta=0.6, temperature=temperature, tv_weight=tv_weight, path_weight=path_weight
    )
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(positions, width, generator=generator, dtype=dtype)
    head = torch.randn(vocabulary, width, generator=generator, dtype=dtype)
    ours = chunked_outcome(hidden, head, targets, loss_settings, chunk_rows)
    theirs, sizes = plain_outcome(hidden, head, targets, loss_settings)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    # A KL of nearly zero is a difference of numbers around one.
    assert ours.terms.total.item() == pytest.approx(theirs.terms.total.item(), rel=tolerance, abs=tolerance / 10)
    assert relative_error(ours.hidden_grad, theirs.hidden_grad, sizes.hidden_grad) <= tolerance
    assert relative_error(ours.head_grad, theirs.head_grad, sizes.head_grad) <= tolerance
    torch.testing.assert_close(ours.terms.sums, theirs.terms.sums, rtol=tolerance, atol=1e-5)


@given(
    seed=st.integers(0, 10_000),
    positions=st.integers(1, 40),
    vocabulary=st.integers(5, 300),
    width=st.integers(1, 64),
    chunk_rows=st.integers(1, 50),
    loss=st.sampled_from(["ce", "kl", "hybrid"]),
)
@example(seed=2228, positions=1, vocabulary=95, width=1, chunk_rows=1, loss="kl")  # logits of up to 6
@settings(max_examples=60, deadline=None)
def test_bfloat16_parameters_stay_near_float64(seed, positions, vocabulary, width, chunk_rows, loss):
    """The stated tolerance in bfloat16, against exact arithmetic on the same numbers: 1e-5 in value, 1 % in gradients.

    Slopes and gradients are rounded to bfloat16, which is 0.2 % each time; logits are not rounded at all.
    """
    targets = random_targets(seed, positions, vocabulary, 4, most_events=8)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(positions, width, generator=generator).bfloat16()
    head = (torch.randn(vocabulary, width, generator=generator) / width**0.5).bfloat16()
    ours = chunked_outcome(hidden, head, targets, LossSettings(loss, 4), chunk_rows)
    exact, sizes = plain_outcome(hidden.double(), head.double(), targets, LossSettings(loss, 4))
    assert ours.terms.total.dtype == torch.float32
    assert ours.head_grad.dtype == ours.hidden_grad.dtype == torch.bfloat16
    assert ours.terms.total.item() == pytest.approx(exact.terms.total.item(), rel=1e-5, abs=1e-5)
    assert relative_error(ours.hidden_grad, exact.hidden_grad, sizes.hidden_grad) <= 1e-2
    assert relative_error(ours.head_grad, exact.head_grad, sizes.head_grad) <= 1e-2


@pytest.mark.parametrize("loss", ["ce", "kl", "hybrid"])
def test_bfloat16_of_all_terms_and_an_odd_scale(loss):
    """All terms at a real width: 1e-5 in value, 1 % of the largest entry of each gradient."""
    targets = random_targets(11, 64, 500, block_length=4, most_events=8)
    generator = torch.Generator().manual_seed(11)
    hidden = torch.randn(64, 32, generator=generator).bfloat16()
    head = (torch.randn(500, 32, generator=generator) / 6).bfloat16()
    loss_settings = LossSettings(loss, 4, tv_weight=0.2, path_weight=0.2)
    h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    terms = chunked.distillation_loss(h, w, targets, loss_settings, chunk_bytes=13 * 500 * 4)
    # A scale that bfloat16 cannot hold must not be rounded to it.
    gradients = torch.autograd.grad(terms.total * 1.0039, (h, w))
    exact_h, exact_w = hidden.double().requires_grad_(), head.double().requires_grad_()
    exact = dense_loss.distillation_loss(exact_h @ exact_w.T, targets, loss_settings)
    exact_gradients = torch.autograd.grad(exact.total * 1.0039, (exact_h, exact_w))
    assert terms.total.item() == pytest.approx(exact.total.item(), rel=1e-5)
    for ours, theirs in zip(gradients, exact_gradients, strict=True):
        assert relative_error(ours, theirs) <= 1e-2


def test_bfloat16_head_gradient_does_not_lose_small_chunks():
    """512 equal contributions, one a chunk: a bfloat16 sum would stall at 256 of them."""
    targets = targets_from_events([None] * 512, [0] * 512)
    hidden, head = torch.ones(512, 1).bfloat16(), torch.zeros(2, 1).bfloat16().requires_grad_()
    chunked.distillation_loss(hidden, head, targets, LossSettings("ce", 1), chunk_bytes=1).total.backward()
    assert head.grad is not None
    assert head.grad.flatten().tolist() == [-256, 256]


@pytest.mark.parametrize("scale", [10_000, -10_000])
@pytest.mark.parametrize("loss", ["ce", "kl", "hybrid"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_huge_logits_are_finite(scale, loss, temperature):
    targets = random_targets(2, 24, 30, block_length=4, most_events=3)
    full = targets.has_soft & (targets.tail == 0)
    assert full.any()  # masses that sum to one, tails of exactly zero
    hidden = torch.randn(24, 6, generator=torch.Generator().manual_seed(2)).sign()
    head = torch.randn(30, 6, generator=torch.Generator().manual_seed(3)).sign() * (scale // 6)
    loss_settings = LossSettings(loss, 4, temperature=temperature, tv_weight=0.5, path_weight=0.3)
    ours = chunked_outcome(hidden, head, targets, loss_settings, chunk_rows=7)
    theirs, _ = plain_outcome(hidden, head, targets, loss_settings)
    assert ours.is_finite()
    assert theirs.is_finite()
    assert ours.terms.total.item() == pytest.approx(theirs.terms.total.item(), rel=1e-5)
    assert relative_error(ours.hidden_grad, theirs.hidden_grad) <= 1e-5
    assert relative_error(ours.head_grad, theirs.head_grad) <= 1e-5


def test_masses_of_one_and_zero_and_impossible_teacher_tokens():
    events = [[(1.0, [3])], [(0.0, [1]), (1.0, [2, 4])], [(1.0, list(range(6)))]]
    targets = targets_from_events(events, [3, 2, 5], block_length=3, observed_logprob=[0.0, float("-inf"), -1.0])
    hidden, head = torch.randn(3, 4), torch.randn(6, 4)
    loss = LossSettings("kl", 3, temperature=1.5, tv_weight=1.0, path_weight=1.0)
    ours, (theirs, _) = chunked_outcome(hidden, head, targets, loss, 1), plain_outcome(hidden, head, targets, loss)
    assert ours.is_finite()
    assert theirs.is_finite()
    assert relative_error(ours.hidden_grad, theirs.hidden_grad) <= 1e-5
    # The whole vocabulary as one event of mass 1 says nothing: no gradient.
    lonely = targets_from_events([events[2]], [5])
    quiet = chunked_outcome(hidden[2:], head, lonely, LossSettings("kl", 1), chunk_rows=1)
    assert quiet.terms.total.item() == pytest.approx(0, abs=1e-6)
    assert quiet.hidden_grad.abs().max() < 1e-6


def test_no_supervised_position_gives_zero_loss_and_zero_gradients():
    hidden, head = torch.randn(5, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    terms = chunked.distillation_loss(hidden[:0], head, targets_from_events([], []), EVERYTHING)
    terms.total.backward()
    assert terms.total.item() == 0
    assert hidden.grad is not None
    assert head.grad is not None
    assert not hidden.grad.any()
    assert not head.grad.any()
    logits = torch.zeros(0, 6, requires_grad=True)
    dense_loss.distillation_loss(logits, targets_from_events([], []), EVERYTHING).total.backward()
    assert logits.grad is not None


@pytest.fixture
def case() -> tuple[torch.Tensor, torch.Tensor, TargetBatch]:
    generator = torch.Generator().manual_seed(9)
    hidden, head = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (20, 17))
    return hidden, head, random_targets(9, 20, 17, block_length=4, most_events=3)


@pytest.mark.parametrize("frozen", ["head", "hidden", "both"])
def test_frozen_inputs_get_no_gradient_and_change_nothing_else(case, frozen):
    hidden, head, targets = case
    theirs, _ = plain_outcome(hidden, head, targets, EVERYTHING)
    h, w = hidden.clone().requires_grad_(frozen == "head"), head.clone().requires_grad_(frozen == "hidden")
    terms = chunked.distillation_loss(h, w, targets, EVERYTHING, chunk_bytes=6 * 17 * 4)
    assert terms.total.item() == pytest.approx(theirs.terms.total.item())
    assert terms.total.requires_grad == (frozen != "both")
    if frozen == "both":
        return
    terms.total.backward()
    for tensor, expected in ((h, theirs.hidden_grad), (w, theirs.head_grad)):
        assert (tensor.grad is None) == (not tensor.requires_grad)
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, expected)


def test_no_grad_evaluates_only(case):
    hidden, head, targets = case
    theirs, _ = plain_outcome(hidden, head, targets, EVERYTHING)
    with torch.no_grad():
        terms = chunked.distillation_loss(hidden.requires_grad_(), head.requires_grad_(), targets, EVERYTHING)
    assert not terms.total.requires_grad
    torch.testing.assert_close(terms.sums, theirs.terms.sums)


def test_tied_head_sums_both_gradients(case):
    _, head, targets = case
    ids = torch.arange(20) % 17
    gradients = []
    for is_chunked in (True, False):
        embedding = head.clone().requires_grad_()
        hidden = torch.tanh(embedding[ids])
        if is_chunked:
            total = chunked.distillation_loss(hidden, embedding, targets, EVERYTHING, chunk_bytes=300).total
        else:
            total = dense_loss.distillation_loss(hidden @ embedding.T, targets, EVERYTHING).total
        gradients.append(torch.autograd.grad(total, embedding)[0])
    torch.testing.assert_close(*gradients)


def test_lora_on_the_head_trains_its_factors(case):
    hidden, head, targets = case
    generator = torch.Generator().manual_seed(4)
    factors = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in ((17, 2), (2, 5))]
    gradients = []
    for is_chunked in (True, False):
        adapted = head + factors[0] @ factors[1]
        if is_chunked:
            total = chunked.distillation_loss(hidden, adapted, targets, EVERYTHING, chunk_bytes=300).total
        else:
            total = dense_loss.distillation_loss(hidden @ adapted.T, targets, EVERYTHING).total
        gradients.append(torch.autograd.grad(total, factors))
    torch.testing.assert_close(*gradients)


def test_gradients_add_up_over_backwards_and_scale(case):
    hidden, head, targets = case
    theirs, _ = plain_outcome(hidden, head, targets, EVERYTHING)
    w = head.clone().requires_grad_()
    for factor in (0.25, 0.5):
        (factor * chunked.distillation_loss(hidden, w, targets, EVERYTHING).total).backward()
    torch.testing.assert_close(w.grad, 0.75 * theirs.head_grad)


def test_differentiating_twice_is_refused(case):
    hidden, head, targets = case
    total = chunked.distillation_loss(hidden.clone().requires_grad_(), head, targets, EVERYTHING).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        total.backward()


def test_autocast_takes_the_products_in_bfloat16_and_returns_float32_gradients():
    targets = random_targets(11, 32, 100, block_length=4, most_events=4)
    hidden, head = torch.randn(32, 16, requires_grad=True), torch.randn(100, 16, requires_grad=True)
    exact = dense_loss.distillation_loss(hidden @ head.T, targets, EVERYTHING)
    expected = torch.autograd.grad(exact.total, head)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = chunked.distillation_loss(hidden, head, targets, EVERYTHING)
    terms.total.backward()
    assert head.grad is not None
    assert head.grad.dtype == torch.float32
    assert terms.total.item() == pytest.approx(exact.total.item(), rel=1e-2)
    assert relative_error(head.grad, expected) < 3e-2


def test_no_tensor_of_the_logits_size_is_made():
    """The largest allocation of a forward and backward is a slice, the head's gradient aside."""
    positions, vocabulary, width, rows = 512, 3000, 4, 16
    targets = random_targets(1, positions, vocabulary, 4, most_events=4)
    hidden, head = torch.randn(positions, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        chunked.distillation_loss(hidden, head, targets, EVERYTHING, chunk_bytes=rows * vocabulary * 4).total.backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert rows * vocabulary * 4 <= largest <= 2 * rows * vocabulary * 4
    assert largest < positions * vocabulary * 4 / 8
