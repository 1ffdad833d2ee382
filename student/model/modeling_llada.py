"""LLaDA for masked diffusion: a LLaMA block without the causal mask; position i predicts token i, there is no shift.

The module names are upstream's (`model.transformer.blocks.N.ff_proj` …), so the checkpoints of GSAI-ML/LLaDA-8B
and LLaDA-1.5 load with strict=True, and ours load there. It differs from upstream's remote code in what training a
drafter needs: grouped key and value heads, attention layouts (`attention`), a prefix cache (`prefix_cache`),
ZeRO-3, activation checkpointing and torch.compile. Nothing in a forward waits for the device. There are no buffers:
the rotary tables are computed once a forward (L x E / 2 sines and cosines), so a model made on the meta device is
whole once its parameters are loaded.

These files are copied beside exported weights and import only torch and transformers.

Legend: B batch, L tokens, D width, H query heads, K key and value heads, E head width, V vocabulary, N chosen
tokens, C new clean tokens, G block length, T cached tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MaskedLMOutput

from .attention import AnchoredLayout, AttentionPlan, attend
from .configuration_llada import LladaConfig
from .prefix_cache import PrefixCache

__all__ = ["AnchoredLayout", "LladaForMaskedDiffusion", "LladaModel", "PrefixCache"]

Rope = tuple[Tensor, Tensor]


class LladaRMSNorm(nn.Module):
    """x / rms(x), in float32, times a weight in x's dtype."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def inverse_frequencies(config: LladaConfig, device: torch.device) -> Tensor:
    """float32 [E / 2]: rotary frequencies in radians a position, theta^(-2i/E), scaled as the config says.

    LLaMA 3.x divides wavelengths above `original / low_freq_factor` by `factor`, keeps those below
    `original / high_freq_factor`, and interpolates between.
    """
    width = config.head_dim
    exponent = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    frequency = 1.0 / config.rope_theta**exponent
    scaling = config.rope_frequency_scaling
    if scaling is None:
        return frequency
    factor = scaling["factor"]
    if scaling.get("rope_type", scaling.get("type")) == "linear":
        return frequency / factor
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequency / factor + kept * frequency


def rotary_tables(config: LladaConfig, position_ids_BxL: Tensor) -> Rope:
    """cos and sin, float32 [B, 1, L, E]; the two halves of E repeat (the rotate-half convention)."""
    angles = position_ids_BxL[..., None].float() * inverse_frequencies(config, position_ids_BxL.device)
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x_BxNxLxE: Tensor, rope: Rope) -> Tensor:
    """`x` turned by its position, computed in float32."""
    cos, sin = rope
    x = x_BxNxLxE.to(torch.promote_types(x_BxNxLxE.dtype, torch.float32))
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x_BxNxLxE.dtype)


class LladaBlock(GradientCheckpointingLayer):
    """Attention and gated MLP, each after an RMSNorm and added to the residual stream."""

    def __init__(self, config: LladaConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        kv_width = config.n_kv_heads * config.head_dim
        self.attn_norm = LladaRMSNorm(config.d_model, config.rms_norm_eps)
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k_proj = nn.Linear(config.d_model, kv_width, bias=False)
        self.v_proj = nn.Linear(config.d_model, kv_width, bias=False)
        self.attn_out = nn.Linear(config.d_model, config.d_model, bias=False)
        self.ff_norm = LladaRMSNorm(config.d_model, config.rms_norm_eps)
        self.ff_proj = nn.Linear(config.d_model, config.mlp_hidden_size, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.mlp_hidden_size, bias=False)
        self.ff_out = nn.Linear(config.mlp_hidden_size, config.d_model, bias=False)

    def forward(self, x_BxLxD: Tensor, rope: Rope, plan: AttentionPlan, chosen_N: Tensor | None = None) -> Tensor:
        """States BxLxD of all tokens, or NxD of those `chosen` of the flattened B x L."""
        normed = self.attn_norm(x_BxLxD)
        q = rotate(self._heads(self.q_proj(normed)), rope)
        k = rotate(self._heads(self.k_proj(normed)), rope)
        v = self._heads(self.v_proj(normed))
        if plan.extend is not None:
            k, v = plan.extend(self.layer, k, v)
        x, attended = x_BxLxD, attend(q, k, v, plan).transpose(1, 2).flatten(2)
        if chosen_N is not None:
            x, attended = (states.flatten(0, 1).index_select(0, chosen_N) for states in (x, attended))
        x = x + self.attn_out(attended)
        normed = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(normed)) * self.up_proj(normed))

    def _heads(self, x_BxLxD: Tensor) -> Tensor:
        return x_BxLxD.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class LladaModel(nn.Module):
    """Embedding, blocks, final norm and, unless it is tied, the head; named as upstream names them."""

    def __init__(self, config: LladaConfig) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.embedding_size, config.d_model),
                "blocks": nn.ModuleList(LladaBlock(config, layer) for layer in range(config.n_layers)),
                "ln_f": LladaRMSNorm(config.d_model, config.rms_norm_eps),
            }
        )
        if not config.weight_tying:
            self.transformer["ff_out"] = nn.Linear(config.d_model, config.embedding_size, bias=False)


class LladaForMaskedDiffusion(PreTrainedModel):
    """LLaDA with its head. Attention is bidirectional unless a layout says otherwise."""

    config: LladaConfig
    config_class = LladaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LladaBlock"]  # noqa: RUF012 (transformers declares it so)
    _supports_sdpa = True
    _supports_flex_attn = True

    def __init__(self, config: LladaConfig) -> None:
        super().__init__(config)
        self.model = LladaModel(config)
        self.sequential_head: Any = None
        """A draft head that lies beside the checkpoint, in a file of its own; `hidden_states` leave it out."""
        self.post_init()

    @property
    def head_weight(self) -> nn.Parameter:
        """VxD: the output projection, which is the embedding itself where the config ties them."""
        return self.model.transformer["wte" if self.config.weight_tying else "ff_out"].weight

    def get_input_embeddings(self) -> nn.Module:
        return self.model.transformer["wte"]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.transformer["wte"] = value

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.config.weight_tying else self.model.transformer["ff_out"]

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.transformer["ff_out"] = new_embeddings

    def hidden_states(
        self,
        input_ids_BxL: Tensor,
        *,
        attention_mask: Tensor | None = None,
        layout: AnchoredLayout | None = None,
        position_ids: Tensor | None = None,
        chosen_N: Tensor | None = None,
    ) -> Tensor:
        """States after the final norm, BxLxD: `head_weight` makes logits of them.

        Args:
            attention_mask: BxL, 1 for tokens and 0 for padding; a short name for `AnchoredLayout.padded`.
            layout: who attends to whom; None is every token to every token of its row.
            position_ids: BxL; by default the layout's, or the columns.
            chosen_N: int64, indices into the flattened B x L: the states NxD of these alone. The last block then
                computes the others' queries, keys and values and nothing more.

        Raises:
            ValueError: if the row is longer than the config allows, or two masks are given.
        """
        length = input_ids_BxL.shape[1]
        if attention_mask is not None:
            if layout is not None:
                raise ValueError("give attention_mask or layout, not both: a layout marks padding as document -1")
            layout = AnchoredLayout.padded(attention_mask)
        if position_ids is None:
            if layout is not None:
                position_ids = layout.position_ids_BxL
            else:
                if length > self.config.max_sequence_length:
                    raise ValueError(
                        f"the sequence has {length} tokens, this model takes at most "
                        f"{self.config.max_sequence_length} (max_sequence_length): shorten it"
                    )
                position_ids = torch.arange(length, device=input_ids_BxL.device)[None]
        plan = AttentionPlan.of(layout, self.config._attn_implementation)
        return self._run(input_ids_BxL, position_ids, plan, chosen_N)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        layout: AnchoredLayout | None = None,
        position_ids: Tensor | None = None,
    ) -> MaskedLMOutput:
        """Logits BxLxV of every position, unshifted; see `hidden_states` for the arguments."""
        hidden = self.hidden_states(input_ids, attention_mask=attention_mask, layout=layout, position_ids=position_ids)
        logits: Any = self.logits(hidden)
        return MaskedLMOutput(logits=logits)

    def logits(self, hidden: Tensor) -> Tensor:
        """The head, [..., V] of states [..., D]."""
        if self.config.weight_tying:
            return F.linear(hidden, self.head_weight)
        return self.model.transformer["ff_out"](hidden)

    def compile_blocks(self) -> None:
        """Compile every block, in place, for rows of one shape: their elementwise parts become few kernels.

        The last one's number of chosen tokens is another in every forward: it is compiled once more, for any.
        Not under ZeRO-3, which gathers each block's weights in Python.
        """
        *blocks, last = self.model.transformer["blocks"]
        for block in blocks:
            block.compile(dynamic=False)
        last.compile()

    @torch.no_grad()
    def draft_hidden_states(
        self,
        cache: PrefixCache,
        slots: Sequence[int],
        clean_ids_BxC: Tensor,
        clean_lengths: Sequence[int],
        block_length: int,
        block_ids_BxG: Tensor | None = None,
    ) -> Tensor:
        """States BxGxD of a masked block right after each request's clean tokens, in one forward.

        The new clean tokens (causal among themselves and after the cached prefix) are appended to their slot;
        the block sees the whole clean prefix and itself, and leaves nothing in the cache. Equals the forward of
        [prefix | block] under `AnchoredLayout`, at the cost of C + G tokens instead of T + C + G.

        Args:
            slots: B different requests of the cache.
            clean_ids_BxC: right-padded; C may be 0.
            clean_lengths: B, how many of each row are tokens.
            block_length: G; 0 only appends.
            block_ids_BxG: what the block holds, for several denoising steps; all masked by default.

        Raises:
            ValueError: if a prefix and its block do not fit into the cache or the config's maximum length.
        """
        step = cache.begin(slots, clean_lengths, block_length, self.config.max_sequence_length)
        if block_ids_BxG is None:
            block_ids_BxG = clean_ids_BxC.new_full((len(step.slots), block_length), self.config.mask_token_id)
        rows = zip(clean_ids_BxC.to(torch.int64), step.clean.tolist(), block_ids_BxG.to(torch.int64), strict=True)
        ids_N = torch.cat([part for clean, length, block in rows for part in (clean[:length], block)])
        plan = AttentionPlan(mask_Bx1xLxL=step.mask_BxLxT()[:, None], extend=step.extend)
        hidden = self._run(ids_N[step.padded_BL], step.positions_N[step.padded_BL], plan)
        cache.commit(step)
        return hidden.flatten(0, 1)[step.unpadded_N[step.block_BG]]

    def _run(
        self, input_ids_BxL: Tensor, position_ids_BxL: Tensor, plan: AttentionPlan, chosen_N: Tensor | None = None
    ) -> Tensor:
        transformer = self.model.transformer
        x_BxLxD = transformer["wte"](input_ids_BxL)
        rope = rotary_tables(self.config, position_ids_BxL)
        *blocks, last = transformer["blocks"]
        for block in blocks:
            x_BxLxD = block(x_BxLxD, rope, plan)
        return transformer["ln_f"](last(x_BxLxD, rope, plan, chosen_N))
