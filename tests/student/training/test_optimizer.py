from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo

from shared.config import TrainConfig
from student.losses.settings import LossSettings
from student.training.module import DistillationModule
from student.training.optimizer import build_optimizer, build_schedule, follow_schedule, schedule_factor
from tests.fixtures.tiny_model import tiny_model


def config(**changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({"steps": 100, "learning_rate": 0.01, "warmup": 0.1, **changes})


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [  # after 0, 5, 10, 55 and 100 steps
        ("cosine", [0, 0.5, 1, 0.2 + 0.8 * 0.5, 0.2]),
        ("constant", [0, 0.5, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.5, 0]),
    ],
)
def test_a_schedule_warms_up_and_ends_where_it_says(schedule: str, rates: list[float]) -> None:
    train = config(schedule=schedule, min_learning_rate=0.2)
    optimizer = build_optimizer(torch.nn.Linear(2, 2), train)
    scheduler = build_schedule(optimizer, train, steps=100)
    found = []
    for step in range(101):
        if step in (0, 5, 10, 55, 100):
            found.append(scheduler.get_last_lr()[0] / 0.01)
        optimizer.step()
        scheduler.step()
    assert found == pytest.approx(rates)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("optimizer_name", ["adamw", "muon"])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_run_that_is_made_longer_steps_at_once_by_the_longer_schedule(schedule: str, optimizer_name: str) -> None:
    train = config(schedule=schedule, optimizer=optimizer_name)
    module = DistillationModule(tiny_model(weight_tying=False), LossSettings("ce", 4))
    states, optimizers, schedulers = [], [], []
    for steps in (5, 10):
        optimizers.append(build_optimizer(module, train))
        schedulers.append(build_schedule(optimizers[-1], train, steps))
        for _ in range(5):
            assert optimizers[-1].param_groups[-1]["lr"] == pytest.approx(0.01 * schedule_factor(schedulers[-1]))
            schedulers[-1].step()
        states.append((optimizers[-1].state_dict(), schedulers[-1].state_dict()))
    optimizer = build_optimizer(module, train)
    scheduler = build_schedule(optimizer, train, steps=10)
    optimizer.load_state_dict(states[0][0])
    scheduler.load_state_dict(states[0][1])
    follow_schedule(scheduler)
    rates, ended, wanted = ([group["lr"] for group in o.param_groups] for o in (optimizer, *optimizers))
    assert rates == pytest.approx(wanted)
    assert rates != pytest.approx(ended)


def test_muon_takes_the_matrices_of_the_blocks_at_the_size_of_adamws_updates() -> None:
    module = DistillationModule(tiny_model(weight_tying=False), LossSettings("ce", 4))
    optimizer = build_optimizer(module, config(optimizer="muon"))
    names = {parameter: name for name, parameter in module.named_parameters()}
    before = {name: parameter.detach().clone() for parameter, name in names.items()}
    for parameter in names:
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    with torch._dynamo.config.patch(disable=True):  # compiling takes minutes
        optimizer.step()
    groups = {names[p]: group for group in optimizer.param_groups for p in group["params"]}
    assert groups.keys() == set(names.values())
    for parameter, name in names.items():
        is_matrix = ".blocks." in name and parameter.dim() == 2
        assert groups[name]["use_muon"] is is_matrix, name
        rms = float((parameter.detach() - before[name]).square().mean().sqrt()) / 0.01
        # AdamW's first update is the gradient's sign; later ones are near 0.2. Newton-Schulz in five steps is rough.
        assert rms == pytest.approx(0.2 if is_matrix else 1.0, rel=0.2), name
