"""In how many forwards a masked block is filled, and what is fixed between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shared.config.speculate import Order


@dataclass(frozen=True)
class Denoising:
    """How a block is filled.

    Attributes:
        steps: forwards, of which each but the last fixes an equal part of the block; at most as many as it has tokens.
        order: what is fixed first: the tokens that the model is surest of, as LLaDA does, or those on the left, which
            decide about the ones behind them.
    """

    steps: int = 1
    order: Order = "confidence"

    def fixed(self, block_length: int) -> list[int]:
        """Tokens that are fixed before each step but the first."""
        steps = min(self.steps, block_length)
        return [block_length * step // steps for step in range(1, steps)]

    def choose(self, count: int, chances_BG: Tensor, fixed_BG: Tensor) -> Tensor:
        """bool [B, G]: `count` tokens of each block, those of `fixed_BG` among them."""
        if self.order == "left_to_right":
            return torch.arange(chances_BG.shape[1], device=chances_BG.device).expand_as(chances_BG) < count
        first = chances_BG.masked_fill(fixed_BG, 2.0).topk(count).indices
        return torch.zeros_like(fixed_BG).scatter(1, first, True)
