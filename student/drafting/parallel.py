"""The drafter's weights shared out over a tensor-parallel group, by torch's own tensor parallelism.

Query, key and value heads, the MLP's width and the vocabulary are split; what a rank computes of attention and MLP is
summed over the group (`DraftForward`). Where the heads do not divide among the ranks, attention stays whole on each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

if TYPE_CHECKING:
    from student.model.modeling_llada import LladaForMaskedDiffusion


def shard(model: LladaForMaskedDiffusion, group: ProcessGroup) -> None:
    """Leave this rank its part of the weights, in place. Each rank has loaded the same weights; none are sent."""
    mesh = DeviceMesh.from_group(group, model.device.type)
    config, size = model.config, group.size()
    of_block: dict[str, ParallelStyle] = {
        "ff_proj": ColwiseParallel(),
        "up_proj": ColwiseParallel(),
        "ff_out": RowwiseParallel(),
    }
    if config.n_heads % size == 0 and config.n_kv_heads % size == 0:
        of_block |= {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
        of_block["attn_out"] = RowwiseParallel()
    for block in model.model.transformer["blocks"]:
        parallelize_module(block, mesh, of_block, src_data_rank=None)
    of_vocabulary: dict[str, ParallelStyle] = {"wte": RowwiseParallel(input_layouts=Replicate())}
    if not config.weight_tying:
        of_vocabulary["ff_out"] = ColwiseParallel()
    parallelize_module(model.model.transformer, mesh, of_vocabulary, src_data_rank=None)
