"""A teacher that vLLM serves and whose every probability is known, and a drafter that is sometimes right about it.

The teacher is a LLaMA without attention and MLP (both write zeros), so that its logits depend on the last token only:
token i is embedded as the unit vector i, and the head's column i holds the logits after it. Token 0 is the prompt; what
follows it is token 1, always; after that nothing is certain.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from student.drafting.vllm_proposer import LladaProposer

TOKENS = 64
STATES = 16
"""Tokens that are ever sampled."""
_NEVER = -200.0


def logits_VxV() -> NDArray[np.float64]:
    """Row i: logits of the token after token i."""
    logits = np.full((TOKENS, TOKENS), _NEVER)
    logits[:, 1:STATES] = np.random.default_rng(0).normal(scale=1.5, size=(TOKENS, STATES - 1))
    logits[0], logits[0, 1] = _NEVER, 0.0
    return logits


def target_VxV(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> NDArray[np.float64]:
    """Row i: probabilities of the token after token i, as vLLM defines these settings: temperature, top-k, top-p."""
    logits = logits_VxV()
    if temperature == 0:
        return np.eye(TOKENS)[logits.argmax(axis=1)]
    weights = np.exp((logits - logits.max(axis=1, keepdims=True)) / temperature)
    if top_k:
        weights[weights < np.sort(weights, axis=1)[:, [-top_k]]] = 0
    weights /= weights.sum(axis=1, keepdims=True)
    if top_p < 1:
        order = np.argsort(-weights, axis=1)
        before = np.cumsum(np.take_along_axis(weights, order, axis=1), axis=1)
        before = np.hstack([np.zeros((TOKENS, 1)), before[:, :-1]])  # mass of the likelier tokens
        dropped = np.zeros_like(weights, dtype=bool)
        np.put_along_axis(dropped, order, before >= top_p, axis=1)
        weights[dropped] = 0
        weights /= weights.sum(axis=1, keepdims=True)
    return weights


def save_teacher(directory: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=TOKENS,
            intermediate_size=TOKENS,
            num_hidden_layers=1,
            num_attention_heads=1,
            vocab_size=TOKENS,
            max_position_embeddings=128,
            tie_word_embeddings=False,
            bos_token_id=TOKENS - 1,
            eos_token_id=TOKENS - 1,
        )
    )
    with torch.no_grad():
        layer = model.model.layers[0]
        for written in (layer.self_attn.o_proj, layer.mlp.down_proj):
            written.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(TOKENS))
        # The last norm makes the unit vector's root mean square 1: its one entry becomes sqrt(TOKENS).
        model.lm_head.weight.copy_(torch.from_numpy(logits_VxV().T / TOKENS**0.5))
    model.save_pretrained(directory)
    return directory


class ChainDrafter:
    """Zero to `draft_tokens` tokens: at each, the likeliest, the second or any other, as the context decides."""

    def __init__(self, draft_tokens: int) -> None:
        self.draft_tokens = draft_tokens
        self.order_VxV = np.argsort(-logits_VxV(), axis=1)

    def propose(self, _ids: Sequence[Hashable], contexts: Sequence[NDArray[np.integer[Any]]]) -> list[list[int]]:
        drafts = []
        for context in contexts:
            choice = np.random.default_rng([int(token) for token in context])
            token, draft = int(context[-1]), []
            for _ in range(choice.integers(self.draft_tokens + 1)):
                rank = choice.choice([0, 1, choice.integers(2, STATES - 1)], p=[0.75, 0.15, 0.1])
                token = int(self.order_VxV[token, rank])
                draft.append(token)
            drafts.append(draft)
        return drafts

    def release(self, _ids: Sequence[Hashable]) -> None:
        pass


class ChainProposer(LladaProposer):
    """Our proposer as it starts in vLLM, the check of the sampler included, with a `ChainDrafter` for a student."""

    def load_drafter(self, _device: Any) -> None:
        self.drafter = ChainDrafter(self.draft_tokens)  # type: ignore[assignment]
