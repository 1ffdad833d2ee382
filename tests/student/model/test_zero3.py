"""ZeRO-3 on two ranks, with activation checkpointing, learns what one process without DeepSpeed learns."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from student.model.modeling_llada import AnchoredLayout, LladaForMaskedDiffusion
from tests.fixtures.ranks import run_ranks
from tests.fixtures.tiny_model import anchored_row, random_ids, tiny_config, tiny_model

STEPS, BATCH, CLEAN, ANCHORS, BLOCK = 8, 4, 20, [3, 9, 16], 4


class Objective(nn.Module):
    """The trainer's shape: states and head weight inside an outer module's forward."""

    def __init__(self, model: LladaForMaskedDiffusion) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, layout: AnchoredLayout, labels: Tensor) -> Tensor:
        hidden = self.model.hidden_states(ids, layout=layout)[:, CLEAN:]
        logits = nn.functional.linear(hidden, self.model.head_weight)
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def batch(step: int, rows: slice) -> tuple[Tensor, AnchoredLayout, Tensor]:
    clean = random_ids(BATCH, CLEAN, seed=100 + step % 2)[rows]
    ids, layout = anchored_row(clean, ANCHORS, BLOCK)
    return ids, layout, torch.cat([clean[:, a : a + BLOCK] for a in ANCHORS], dim=1)


def optimizer(module: nn.Module) -> torch.optim.Optimizer:
    # Adam divides by the gradient's own size: a larger eps keeps rounding noise from becoming a step.
    return torch.optim.AdamW(module.parameters(), lr=2e-3, eps=1e-5)


def train_alone(tied: bool) -> list[float]:
    objective = Objective(tiny_model(weight_tying=tied, init_std=0.1).train())
    adam, losses = optimizer(objective), []
    for step in range(STEPS):
        loss = objective(*batch(step, slice(None)))
        loss.backward()
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    return losses


def train_a_rank(mode: str, output: Path) -> None:
    """What each rank runs; `mode` is tied or untied, then reentrant, not or none, then how the model is made."""
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    tying, checkpointing, construction = mode.split(",")
    settings = {
        "train_micro_batch_size_per_gpu": BATCH // ranks,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # DeepSpeed clips to 1 unless told not to
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    shape = {"weight_tying": tying == "tied", "init_std": 0.1}
    whole = tiny_model(**shape)
    if construction == "zero.Init":
        with deepspeed.zero.Init(config_dict_or_path=settings):
            model = LladaForMaskedDiffusion(tiny_config(**shape))
        assert all(parameter.numel() == 0 for parameter in model.parameters())
        for name, parameter in model.named_parameters():
            with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
                parameter.data.copy_(whole.get_parameter(name))
    else:
        from transformers.integrations import HfDeepSpeedConfig

        checkpoint = output.with_name("checkpoint")
        if rank == 0:
            whole.save_pretrained(checkpoint)
        torch.distributed.barrier()
        # As long as this object lives, from_pretrained reads straight into the ranks' shares.
        partitioned = HfDeepSpeedConfig(settings)
        model = LladaForMaskedDiffusion.from_pretrained(checkpoint)
        assert all(parameter.numel() == 0 for parameter in model.parameters())
        del partitioned
    if checkpointing != "plain":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    objective = Objective(model.train())
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer(objective), config=settings)
    share, losses = BATCH // ranks, []
    for step in range(STEPS):
        loss = engine(*batch(step, slice(rank * share, (rank + 1) * share)))
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        losses.append(mean.item() / ranks)
    if rank == 0:
        output.write_text(json.dumps(losses))
    torch.distributed.destroy_process_group()  # gloo's threads may end the process otherwise, by SIGABRT


@pytest.mark.slow
@pytest.mark.usefixtures("warm_training")
@pytest.mark.parametrize("mode", ["untied,reentrant,from_pretrained", "tied,not,zero.Init"])
def test_two_ranks_learn_what_one_learns(mode: str, tmp_path: Path) -> None:
    output = tmp_path / "losses.json"
    run_ranks(__name__, [mode, str(output)], 2, output, timeout_s=600)
    losses, expected = torch.tensor(json.loads(output.read_text())), torch.tensor(train_alone(mode.startswith("tied")))
    difference = ((losses - expected).abs() / expected).max()
    print(f"{mode}: largest relative difference of {STEPS} losses {difference:.1e}")
    assert difference <= 1e-4
    assert expected[-1] < expected[0] - 0.2  # it does learn


if __name__ == "__main__":
    train_a_rank(sys.argv[1], Path(sys.argv[2]))
