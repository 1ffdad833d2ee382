"""The same step at one rank, two ranks, with accumulation, under every ZeRO stage: real DeepSpeed on gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from student.losses.objective import loss_scale, sum_over_ranks
from tests.fixtures import dense_loss
from tests.fixtures.loss_cases import concatenate
from tests.fixtures.ranks import run_ranks
from tests.student.losses import zero_worker


def test_scale_undoes_both_divisions():
    assert loss_scale(100, world_size=1, accumulation_steps=1) == 1 / 100
    # DeepSpeed divides by 4 accumulation steps and averages over 8 ranks.
    assert loss_scale(100, world_size=8, accumulation_steps=4) / 4 / 8 == pytest.approx(1 / 100)


def test_a_step_without_targets_has_scale_zero():
    assert loss_scale(0, world_size=2, accumulation_steps=1) == 0


def test_one_process_sums_itself():
    assert sum_over_ranks(torch.tensor([3])).item() == 3


def steps_of_ranks(world: int, output: Path) -> dict:
    run_ranks("tests.student.losses.zero_worker", [str(output)], world, output, timeout_s=600)
    return torch.load(output)


@pytest.fixture(scope="module")
def plain() -> dict:
    """Loss and gradients of the whole step with no DeepSpeed, no slices: by tying."""
    results = {}
    data = zero_worker.sequences()
    ids, targets = torch.cat([i for i, _ in data]), concatenate([t for _, t in data])
    for tied in (False, True):
        model = zero_worker.make_model(tied)
        logits = model.states(ids) @ model.head.weight.T
        loss = dense_loss.distillation_loss(logits, targets, zero_worker.SETTINGS).total / len(targets)
        loss.backward()
        results[tied] = (loss.item(), {name: p.grad for name, p in model.named_parameters()})
    return results


@pytest.mark.slow
@pytest.mark.usefixtures("warm_training")
@pytest.mark.parametrize("world", [1, 2])
def test_every_zero_stage_sees_the_same_loss_and_gradients(world, plain, tmp_path):
    results = steps_of_ranks(world, tmp_path / "results.pt")
    assert len(results) == 16
    for (stage, accumulation, tied), result in results.items():
        case = f"ZeRO-{stage}, {world} ranks, accumulation {accumulation}, tied {tied}"
        loss, gradients = plain[tied]
        assert result["count"] == sum(zero_worker.COUNTS), case
        assert result["loss"] == pytest.approx(loss, rel=1e-4), case
        assert result["change"].keys() == gradients.keys()
        for name, gradient in gradients.items():
            error = (result["change"][name] + gradient).abs().max() / gradient.abs().max()
            assert error <= 1e-4, f"{case}: {name} is off by {error:.1e}"
