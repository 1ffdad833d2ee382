from __future__ import annotations

import logging
import time

import pytest
import torch
import torch.distributed

from student.training.monitor import GradientStatistics, StepMonitor
from tests.fixtures.tiny_model import anchored_row, random_ids, tiny_model


@pytest.mark.usefixtures("alone")
def test_gradient_statistics_are_those_of_the_gradients(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    statistics = GradientStatistics(model)
    ids, layout = anchored_row(random_ids(1, 30), [4, 11], 4)
    model(ids, layout=layout).logits.square().mean().backward()  # not watched
    model.zero_grad()
    statistics.watching = True
    model(ids, layout=layout).logits.square().mean().backward()
    with caplog.at_level(logging.DEBUG, logger="student.training.monitor"):
        found = statistics.finish()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert found["grad_largest"] == max(float(gradient.abs().max()) for gradient in gradients)
    zeros = sum(int((gradient == 0).sum()) for gradient in gradients)
    assert found["grad_zeros"] == pytest.approx(zeros / sum(map(torch.numel, gradients)))
    assert found["grad_zeros"] > 0, "tokens that do not occur have no gradient in the embedding"
    block = model.model.transformer["blocks"][1]
    norm = torch.cat([parameter.grad.flatten() for parameter in block.parameters()]).norm()
    assert f"gradient of blocks.1: norm {norm:.3g}, largest" in caplog.text
    assert not statistics.watching


@pytest.mark.usefixtures("alone")
def test_parts_of_a_step_are_summed_and_memory_is_read() -> None:
    monitor = StepMonitor(flops=1e9)
    began = time.perf_counter()
    for _ in range(2):
        with monitor.part("forward"):
            time.sleep(0.02)
    with monitor.part("data"):
        time.sleep(0.01)
    figures = monitor.finish(time.perf_counter() - began)
    seconds = figures["seconds"]
    assert 0.04 <= seconds["forward"] < seconds["step"]
    assert seconds["backward"] == seconds["optimizer"] == seconds["communication"] == 0
    assert figures["data_wait"] == pytest.approx(seconds["data"] / seconds["step"])
    assert 0.05 < figures["host_gib"] < 64
    assert figures["utilization"] is None, "nobody knows this processor's peak"
    assert monitor.finish(1.0)["seconds"]["forward"] == 0, "the next step starts from nothing"


@pytest.mark.usefixtures("alone")
@pytest.mark.slow
def test_what_collectives_hold_up_is_communication(monkeypatch: pytest.MonkeyPatch) -> None:
    """A blocking one by its call; of one that runs beside the computing, what is waited for."""
    import deepspeed
    import deepspeed.comm.comm as comm
    import deepspeed.ops

    now = 0.0

    def take(seconds: float) -> None:
        nonlocal now
        now += seconds

    class Handle:
        def wait(self) -> None:
            take(3.0)

    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)  # compiles for minutes
    deepspeed.init_distributed(dist_backend="gloo")
    monkeypatch.setattr(type(comm.cdb), "all_reduce", lambda *_, **__: take(2.0))
    monkeypatch.setattr(type(comm.cdb), "all_gather_into_tensor", lambda *_, **__: Handle())
    monkeypatch.setattr("student.training.monitor.time.perf_counter", lambda: now)
    monitor, values = StepMonitor(1e9), torch.zeros(2)
    with monitor.watching_collectives():
        deepspeed.comm.all_reduce(values)
        handle = deepspeed.comm.all_gather_into_tensor(values, values, async_op=True)
        take(10.0)  # computing
        handle.wait()
    deepspeed.comm.all_reduce(values)  # not watched
    assert monitor.finish(1.0)["seconds"]["communication"] == 5.0


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
def test_compiled_blocks_have_the_same_gradients_and_show_them() -> None:
    plain, compiled = tiny_model().train(), tiny_model().train()
    statistics = [GradientStatistics(model) for model in (plain, compiled)]
    compiled.compile_blocks()
    ids, layout = anchored_row(random_ids(1, 30), [4, 11], 4)
    for model, watcher in zip((plain, compiled), statistics, strict=True):
        watcher.watching = True
        for count in (3, 5, 8):  # the last block's number of tokens changes from forward to forward
            model.hidden_states(ids, layout=layout, chosen_N=torch.arange(count)).square().mean().backward()
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
    first, second = (watcher.finish() for watcher in statistics)
    assert first["grad_largest"] == pytest.approx(second["grad_largest"], rel=1e-4)
