"""A small correction that lets a block's tokens depend on one another: each on the token drafted before it.

The positions of a masked block are predicted independently, so an argmax draft may join two continuations that do not
go together. Given the state h of position k and the token x drafted at k - 1, the state becomes

    h + U silu(P e(x) + G h),      e(x) = the embedding of x over its root mean square, U [D, r], P and G [r, D]

and the model's own head makes logits of it. U starts at zero, so an untrained head changes nothing. The first position
of a block has the context before it and is left as it is. DSpark (arXiv:2607.05147) corrects logits by a rank-r table
of token pairs; here the pairs go through the embedding, so that rare pairs share what frequent ones teach, and the
size does not grow with the vocabulary: 3 r D numbers.

In training x is the observed token (all positions at once). In drafting it is the drafted one: a product of r x V a
position, after the block's one forward. The draft is one-hot, and its acceptance where all before was accepted is the
trained quantity.

Stored as sequential_head.safetensors beside the weights: the checkpoint stays a plain LLaDA.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shared.errors import CheckpointError
from student.lineage import SEQUENTIAL_HEAD

if TYPE_CHECKING:
    from student.model.modeling_llada import LladaForMaskedDiffusion

_PREFIX = "sequential_head."


class SequentialHead(nn.Module):
    """The correction for a model of width D, of rank r."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.previous = nn.Linear(width, rank, bias=False)
        self.state = nn.Linear(width, rank, bias=False)
        self.out = nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.out.weight)

    def of_previous(self, embedded_NxD: Tensor) -> Tensor:
        """P e(x), N x r, of tokens' embeddings."""
        projected: Tensor = self.previous(F.rms_norm(embedded_NxD, embedded_NxD.shape[-1:]))
        return projected

    def forward(self, hidden_NxD: Tensor, embedded_NxD: Tensor) -> Tensor:
        """The corrected states, N x D, after tokens with these embeddings."""
        corrected: Tensor = hidden_NxD + self.out(F.silu(self.of_previous(embedded_NxD) + self.state(hidden_NxD)))
        return corrected


def add_sequential_head(model: LladaForMaskedDiffusion, rank: int) -> SequentialHead:
    """Give `model` a new head of this rank, in the model's dtype and on its device."""
    weight = model.head_weight
    head = SequentialHead(model.config.d_model, rank).to(weight.device, weight.dtype)
    model.sequential_head = head
    return head


def settle_sequential_head(model: LladaForMaskedDiffusion, rank: int | None) -> None:
    """Leave `model` a head of this rank that trains: the one that it starts with, else a new one; none for null."""
    own = model.sequential_head
    if rank is None:
        model.sequential_head = None
    elif own is None or own.state.out_features != rank:
        add_sequential_head(model, rank)
    else:
        own.requires_grad_(True)  # which adapters have frozen


def load_sequential_head(model: LladaForMaskedDiffusion, directory: Path) -> None:
    """Give `model` the head that lies in `directory`, if one does.

    Raises:
        CheckpointError: if it cannot be read, or is another model's.
    """
    file = directory / SEQUENTIAL_HEAD
    if not file.exists():
        return
    try:
        weights = load_file(file)
        add_sequential_head(model, len(weights["state.weight"])).load_state_dict(weights)
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{file} is damaged or of another model ({error}); copy the student's directory again, whole"
        ) from error


def take_sequential_head(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the head's weights out of a state dict of the model; empty where it has none."""
    names = [name for name in weights if name.startswith(_PREFIX)]
    return {name.removeprefix(_PREFIX): weights.pop(name) for name in names}


def save_sequential_head(weights: dict[str, Tensor], directory: Path) -> None:
    """Write what `take_sequential_head` gave."""
    if weights:
        save_file({name: weight.contiguous() for name, weight in weights.items()}, directory / SEQUENTIAL_HEAD)
