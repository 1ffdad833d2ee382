"""Tiny models and independent references for the model's tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from student.model.configuration_llada import LladaConfig
from student.model.modeling_llada import AnchoredLayout, LladaForMaskedDiffusion

VOCABULARY = 120
MASK = VOCABULARY - 1


def tiny_config(**changes: Any) -> LladaConfig:
    fields: dict[str, Any] = {
        "d_model": 64,
        "n_layers": 3,
        "n_heads": 4,
        "n_kv_heads": 2,
        "mlp_hidden_size": 96,
        "vocab_size": VOCABULARY,
        "max_sequence_length": 256,
        "mask_token_id": MASK,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "init_std": 0.2,
    }
    return LladaConfig(**(fields | changes))


def tiny_model(seed: int = 0, **changes: Any) -> LladaForMaskedDiffusion:
    torch.manual_seed(seed)
    return LladaForMaskedDiffusion(tiny_config(**changes)).eval()


def random_ids(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(2, MASK, (batch, length), generator=torch.Generator().manual_seed(seed))


def anchored_row(clean: Tensor, anchors: list[int], block_length: int) -> tuple[Tensor, AnchoredLayout]:
    """One document BxC and a masked block at each anchor, as one row each."""
    batch, length = clean.shape
    blocks = [torch.full((batch, block_length), MASK) for _ in anchors]
    numbers = [torch.zeros(length, dtype=torch.int64)]
    numbers += [torch.full((block_length,), number + 1) for number in range(len(anchors))]
    positions = [torch.arange(length), *(torch.arange(anchor, anchor + block_length) for anchor in anchors)]
    ids = torch.cat((clean, *blocks), dim=1)
    block_ids, position_ids = torch.cat(numbers).expand(batch, -1), torch.cat(positions).expand(batch, -1)
    return ids, AnchoredLayout(torch.zeros_like(ids), block_ids, position_ids)


def reference_logits(model: LladaForMaskedDiffusion, ids: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
    """The model written out anew: complex rotations, one head at a time, an explicit mask matrix BxLxL."""
    config, state = model.config, dict(model.named_parameters())
    width, groups = config.head_dim, config.n_heads // config.n_kv_heads

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * state[name]

    frequencies = config.rope_theta ** (-torch.arange(0, width, 2, dtype=x_dtype(model)) / width)
    turn = torch.polar(torch.ones((), dtype=x_dtype(model)), positions[..., None].to(x_dtype(model)) * frequencies)

    def rotated(x: Tensor) -> Tensor:
        pairs = torch.complex(x[..., : width // 2].contiguous(), x[..., width // 2 :].contiguous()) * turn
        return torch.cat((pairs.real, pairs.imag), dim=-1)

    x = state["model.transformer.wte.weight"][ids]
    for layer in range(config.n_layers):
        prefix = f"model.transformer.blocks.{layer}."
        h = norm(x, prefix + "attn_norm.weight")
        q, k, v = (h @ state[f"{prefix}{name}.weight"].T for name in ("q_proj", "k_proj", "v_proj"))
        heads = []
        for head in range(config.n_heads):
            mine, theirs = slice(head * width, (head + 1) * width), head // groups
            shared = slice(theirs * width, (theirs + 1) * width)
            scores = rotated(q[..., mine]) @ rotated(k[..., shared]).transpose(1, 2) / width**0.5
            heads.append(scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v[..., shared])
        x = x + torch.cat(heads, dim=-1) @ state[prefix + "attn_out.weight"].T
        h = norm(x, prefix + "ff_norm.weight")
        gate, up = h @ state[prefix + "ff_proj.weight"].T, h @ state[prefix + "up_proj.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ state[prefix + "ff_out.weight"].T
    return norm(x, "model.transformer.ln_f.weight") @ model.head_weight.T


def x_dtype(model: LladaForMaskedDiffusion) -> torch.dtype:
    return next(model.parameters()).dtype
