"""LLaDA's own sampler: fill a masked answer block after block, a few positions a step.

Each block of `block_length` masked tokens is denoised in `steps / blocks` steps. A step predicts every masked
position, keeps the predictions of the highest confidence (or random ones) and leaves the rest masked (Nie et al.,
LLaDA, appendix B.4). Two attentions:

- `bidirectional`, LLaDA's: every step is a forward over prompt and whole answer, later blocks masked;
- `draft`, this project's: clean tokens causal, only the current block visible, so a prefix cache makes a step cost
  one block. For models trained on anchored blocks.

Legend: B prompts, P prompt tokens, G block length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from shared.errors import ConfigError

if TYPE_CHECKING:
    from student.model.modeling_llada import LladaForMaskedDiffusion

BlockLogits = Callable[[int, Tensor], Tensor]
"""Where a block starts, and its ids BxG → its logits BxGxV."""


@dataclass(frozen=True)
class SamplerSettings:
    """How to decode.

    Args:
        length: answer tokens, a multiple of `block_length`.
        steps: denoising steps in all, a multiple of the number of blocks; `length` unmasks one token a step.
        temperature: of Gumbel noise on the logits; 0 takes the most probable token.
        guidance: classifier-free guidance scale; 0 is off. Costs a second forward with the prompt masked.
        remasking: which predictions are kept: those of the highest probability, or random ones.

    Raises:
        ConfigError: if the numbers do not divide, or a value is out of its range.
    """

    length: int = 128
    block_length: int = 32
    steps: int = 128
    temperature: float = 0.0
    guidance: float = 0.0
    remasking: Literal["low_confidence", "random"] = "low_confidence"
    attention: Literal["bidirectional", "draft"] = "bidirectional"

    def __post_init__(self) -> None:
        if self.block_length < 1 or self.length < 1 or self.length % self.block_length:
            raise ConfigError(f"length {self.length} is not a multiple of block length {self.block_length}")
        if self.steps < self.blocks or self.steps % self.blocks:
            raise ConfigError(
                f"steps {self.steps} is not a multiple of the {self.blocks} blocks "
                f"(length {self.length} / block length {self.block_length})"
            )
        if self.temperature < 0 or self.guidance < 0:
            raise ConfigError(f"temperature {self.temperature} and guidance {self.guidance} must not be negative")
        if self.guidance and self.attention == "draft":
            raise ConfigError(
                f"guidance {self.guidance} needs attention bidirectional, because it masks the prompt, which a prefix "
                "cache holds; set --attention bidirectional or --cfg 0"
            )

    @property
    def blocks(self) -> int:
        return self.length // self.block_length


@torch.no_grad()
def sample(
    model: LladaForMaskedDiffusion,
    prompt_ids_BxP: Tensor,
    settings: SamplerSettings,
    generator: torch.Generator | None = None,
    end_ids: frozenset[int] = frozenset(),
) -> Tensor:
    """The answers' ids, B x length. Blocks after one in which every answer has ended stay masked.

    Args:
        end_ids: tokens that end an answer; empty decodes every block.

    Raises:
        ConfigError: if prompt and answer are longer than the model allows.
    """
    batch, prompt_length = prompt_ids_BxP.shape
    longest = model.config.max_sequence_length
    if prompt_length + settings.length > longest:
        raise ConfigError(
            f"a prompt of {prompt_length} tokens and an answer of {settings.length} exceed the model's "
            f"max_sequence_length {longest}; ask for a shorter answer"
        )
    masked = torch.full(
        (batch, settings.length), model.config.mask_token_id, dtype=torch.int64, device=prompt_ids_BxP.device
    )
    sequence = torch.cat((prompt_ids_BxP.to(torch.int64), masked), dim=1)
    logits_of = (_bidirectional if settings.attention == "bidirectional" else _draft)(model, sequence, settings)
    for block in range(settings.blocks):
        start = prompt_length + block * settings.block_length
        stop = start + settings.block_length
        sequence[:, start:stop] = denoise(
            partial(logits_of, start), sequence[:, start:stop], model.config.mask_token_id, settings, generator
        )
        answer = sequence[:, prompt_length:stop]
        if end_ids and bool(torch.isin(answer, torch.tensor(sorted(end_ids), device=answer.device)).any(1).all()):
            break
    return sequence[:, prompt_length:]


def denoise(
    logits_of: Callable[[Tensor], Tensor],
    block_BxG: Tensor,
    mask_id: int,
    settings: SamplerSettings,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill the masked positions of a block in `steps / blocks` steps, an even share of them a step.

    Args:
        logits_of: block ids BxG → logits BxGxV.
    """
    block = block_BxG.clone()
    steps = settings.steps // settings.blocks
    for step in range(steps):
        masked = block == mask_id
        logits = logits_of(block).to(torch.float64)
        # A prediction of "masked" would leave the position open for ever.
        logits[..., mask_id] = float("-inf")
        predicted = _gumbel_argmax(logits, settings.temperature, generator)
        if settings.remasking == "low_confidence":
            confidence = logits.softmax(-1).gather(-1, predicted[..., None])[..., 0]
        else:
            confidence = torch.rand(predicted.shape, dtype=torch.float64, generator=generator).to(block.device)
        confidence = confidence.masked_fill(~masked, float("-inf"))
        left = masked.sum(dim=1)
        # Even shares, the larger ones first, as upstream deals them.
        keep = (left + (steps - step) - 1) // (steps - step)
        rank = confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        block = torch.where(masked & (rank < keep[:, None]), predicted, block)
    return block


def _gumbel_argmax(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """A sample of softmax(logits / temperature), by adding Gumbel noise in float64; at 0 the argmax."""
    if temperature == 0:
        return logits.argmax(-1)
    uniform = torch.rand(logits.shape, dtype=torch.float64, generator=generator).to(logits.device)
    gumbel = -torch.log(-torch.log(uniform.clamp_min(torch.finfo(torch.float64).tiny)))
    return (logits + temperature * gumbel).argmax(-1)


def _bidirectional(model: LladaForMaskedDiffusion, sequence: Tensor, settings: SamplerSettings) -> BlockLogits:
    prompt_length = sequence.shape[1] - settings.length

    def logits_of(start: int, block: Tensor) -> Tensor:
        stop = start + settings.block_length
        current = torch.cat((sequence[:, :start], block, sequence[:, stop:]), dim=1)
        if not settings.guidance:
            return model.logits(model.hidden_states(current)[:, start:stop])
        blind = current.clone()
        blind[:, :prompt_length] = model.config.mask_token_id
        both = model.logits(model.hidden_states(torch.cat((current, blind)))[:, start:stop])
        conditional, unconditional = both.chunk(2)
        return unconditional + (settings.guidance + 1) * (conditional - unconditional)

    return logits_of


def _draft(model: LladaForMaskedDiffusion, sequence: Tensor, settings: SamplerSettings) -> BlockLogits:
    from student.model.prefix_cache import PrefixCache

    batch, length = sequence.shape
    cache = PrefixCache.allocate(model.config, batch, length, model.dtype, sequence.device)

    def logits_of(start: int, block: Tensor) -> Tensor:
        # The first step of a block appends what was decoded since the last; the others append nothing.
        new = sequence[:, cache.length(0) : start]
        lengths = [new.shape[1]] * batch
        hidden = model.draft_hidden_states(
            cache, range(batch), new, lengths, settings.block_length, block_ids_BxG=block
        )
        return model.logits(hidden)

    return logits_of
