"""One rank of `test_zero_stages`: trains one SGD step of a small model under DeepSpeed and writes what came of it.

    RANK=… WORLD_SIZE=… … python -m tests.student.losses.zero_worker OUTPUT

For every ZeRO stage, accumulation and tying it runs a step with learning rate 1, so that the parameters' change is
minus the gradient that reached the optimizer, whatever the stage does with gradients in between.
"""

from __future__ import annotations

import os
import sys

import torch
from torch import Tensor, nn

from student.losses import chunked
from student.losses.objective import loss_scale, sum_over_ranks
from student.losses.settings import LossSettings
from student.losses.targets import TargetBatch
from tests.fixtures.loss_cases import concatenate, random_targets

VOCABULARY, WIDTH, BLOCK = 40, 6, 4
SETTINGS = LossSettings("hybrid", BLOCK, alpha=0.4, beta=0.6, tv_weight=0.3, path_weight=0.2)
# Supervised tokens of the step's four sequences: unequal over ranks and micro-batches, one of them without any.
COUNTS = (13, 4, 0, 9)


class Model(nn.Module):
    """Embedding, one layer, head; the loss is part of the forward, as ZeRO-3 needs it."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def states(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.embedding(ids)))

    def forward(self, ids: Tensor, targets: TargetBatch) -> Tensor:
        # Two blocks in the smallest slices, so that the chunked path is really in several.
        slices = 2 * BLOCK * VOCABULARY * 4
        return chunked.distillation_loss(
            self.states(ids), self.head.weight, targets, SETTINGS, chunk_bytes=slices
        ).total


def make_model(tied: bool) -> Model:
    torch.manual_seed(1)
    return Model(tied)


def sequences() -> list[tuple[Tensor, TargetBatch]]:
    """The step's data: input ids of the supervised positions, and their targets."""
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randint(VOCABULARY, (count,), generator=generator), random_targets(i, count, VOCABULARY, BLOCK, 3))
        for i, count in enumerate(COUNTS)
    ]


def micro_batches(rank: int, world: int, accumulation: int) -> list[tuple[Tensor, TargetBatch]]:
    """This rank's share of the step, cut into `accumulation` micro-batches."""
    data = sequences()
    size = len(data) // (world * accumulation)
    starts = range(rank * accumulation * size, (rank + 1) * accumulation * size, size)
    parts = [data[start : start + size] for start in starts]
    return [(torch.cat([ids for ids, _ in part]), concatenate([t for _, t in part])) for part in parts]


def run(stage: int, accumulation: int, tied: bool) -> dict:
    """One step; returns the normalized global loss and the change of every parameter."""
    import deepspeed

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    model = make_model(tied)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": accumulation,
            # Parameters as small as these would otherwise stay whole on every rank at stage 3.
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
        },
    )
    batches = micro_batches(rank, world, accumulation)
    count = int(sum_over_ranks(torch.tensor([sum(len(t) for _, t in batches)])))
    scale = loss_scale(count, world_size=engine.dp_world_size, accumulation_steps=engine.gradient_accumulation_steps())
    total = torch.zeros(1, dtype=torch.float64)
    for ids, targets in batches:
        loss = engine(ids, targets)
        total += loss.detach().double()
        engine.backward(loss * scale)
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        change = {name: p.detach().clone() - before[name] for name, p in model.named_parameters()}
    loss_value = float(sum_over_ranks(total) / count)
    engine.destroy()
    return {"count": count, "loss": loss_value, "change": change}


def main() -> None:
    import deepspeed
    import deepspeed.ops

    # Its shared-memory collectives would be compiled first; gloo does as well here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    accumulations = (1, 2) if os.environ["WORLD_SIZE"] == "2" else (1, 4)
    cases = [(stage, a, tied) for stage in range(4) for a in accumulations for tied in (False, True)]
    results = {case: run(*case) for case in cases}
    if os.environ["RANK"] == "0":
        torch.save(results, sys.argv[1])
    torch.distributed.destroy_process_group()  # gloo's threads may end the process otherwise, by SIGABRT


if __name__ == "__main__":
    main()
