"""The student and its loss as one module.

The loss runs inside the engine's forward, because under ZeRO-3 the head's weight exists only there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from student.data.batch import MicroBatch
from student.losses import chunked
from student.losses.settings import LossSettings
from student.model.attention import AnchoredLayout
from student.model.modeling_llada import LladaForMaskedDiffusion


class DistillationModule(nn.Module):
    """Micro-batch in, summed loss and summed metrics out."""

    model: LladaForMaskedDiffusion

    def __init__(self, model: LladaForMaskedDiffusion, settings: LossSettings) -> None:
        super().__init__()
        self.model = model
        self.settings = settings

    def hidden_states(self, batch: MicroBatch) -> Tensor:
        """[N, D] final hidden states of the supervised positions, with what the sequential head adds to them."""
        layout = AnchoredLayout(batch.document_ids, batch.block_ids, batch.position_ids, documents=batch.documents)
        hidden_NxD = self.model.hidden_states(batch.input_ids, layout=layout, chosen_N=batch.supervised)
        if self.model.sequential_head is None:
            return hidden_NxD
        # Positions of a block are consecutive: from depth 2 on the token before is the one of the position before.
        targets = batch.targets
        embedded_NxD = self.model.get_input_embeddings()(targets.observed_ids.roll(1))
        corrected_NxD = self.model.sequential_head(hidden_NxD, embedded_NxD)
        return torch.where(targets.depth[:, None] > 1, corrected_NxD, hidden_NxD)

    def forward(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """The loss summed over the micro-batch's targets, and `LossTerms.sums` for the log."""
        hidden_NxD = self.hidden_states(batch)
        terms = chunked.distillation_loss(hidden_NxD, self.model.head_weight, batch.targets, self.settings)
        return terms.total, terms.sums
