"""Who attends to whom: the attention layout of draft training and of padding, and one way to run it.

The layout is a function of per-token features ("same document and key position before the query's limit"). The one
function makes the dense mask of scaled_dot_product_attention (B x L x L booleans, right for CPUs and for short
sequences) and the sparse block mask of flex attention (GPUs: empty 128 x 128 tiles cost nothing). Where the host knows
how long the documents are, SDPA takes one after another: scores between two of them are never made. This file is copied
beside exported weights and imports nothing of this project.

Legend: B batch, L tokens, H query heads, K key and value heads, E head width; D tokens of a document, of which C are
clean and M masked. Positions are 0-based and count tokens of the document; document -1 is padding, which only sees
padding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Features = tuple[Tensor, ...]


def _run_starts(*ids_BxL: Tensor) -> Tensor:
    """int64 [B, L]: for each token the index of the first token of its run of equal ids."""
    boundary = torch.ones_like(ids_BxL[0], dtype=torch.bool)
    boundary[:, 1:] = False
    for ids in ids_BxL:
        boundary[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    index = torch.arange(boundary.shape[1], device=boundary.device)
    return torch.where(boundary, index, 0).cummax(dim=1).values


class AnchoredLayout:
    """A clean copy of each document and many masked blocks anchored in it, in one row.

    Within a document: a clean token sees the clean tokens up to itself; a token of block b sees the clean tokens
    before the block's first position, and all of block b; clean tokens never see blocks, blocks never see one
    another. So each block's outputs are those of a forward on [clean prefix | block] alone, and the clean tokens'
    keys and values are the prefix's, whatever follows: a prefix cache is exact.

    Args:
        document_ids_BxL: -1 is padding.
        block_ids_BxL: 0 for the clean copy, b >= 1 for masked block b. The tokens of a block are consecutive
            and in order of position.
        position_ids_BxL: a block's tokens have the positions of the clean tokens that they hide.
        documents: (C, M) of each document, row after row, if the host knows them: the clean copy stands first. Padding
            is C, M = 0.
    """

    def __init__(
        self,
        document_ids_BxL: Tensor,
        block_ids_BxL: Tensor,
        position_ids_BxL: Tensor,
        documents: Sequence[Sequence[tuple[int, int]]] | None = None,
    ) -> None:
        assert document_ids_BxL.shape == block_ids_BxL.shape == position_ids_BxL.shape
        self.document_ids_BxL = document_ids_BxL
        self.block_ids_BxL = block_ids_BxL
        self.position_ids_BxL = position_ids_BxL
        self.documents = documents

    @classmethod
    def padded(cls, attention_mask_BxL: Tensor) -> AnchoredLayout:
        """Of a padding mask, 1 for tokens and 0 for padding on either side: a row's tokens are one block with no clean
        copy, so they all see each other; positions count columns."""
        tokens = attention_mask_BxL.long()
        columns = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        return cls(tokens - 1, torch.ones_like(tokens), columns)

    def features(self) -> Features:
        """BxL tensors: document, block, position, and the position below which clean keys are visible."""
        positions = self.position_ids_BxL
        block_start = positions.gather(1, _run_starts(self.document_ids_BxL, self.block_ids_BxL))
        limit = torch.where(self.block_ids_BxL == 0, positions + 1, block_start)
        return self.document_ids_BxL, self.block_ids_BxL, positions, limit

    @staticmethod
    def sees(query: Features, key: Features) -> Tensor:
        """Whether a query sees a key, by their features."""
        q_document, q_block, _, q_limit = query
        k_document, k_block, k_position, _ = key
        visible = torch.where(k_block == 0, k_position < q_limit, k_block == q_block)
        return (q_document == k_document) & visible

    def mask(self) -> Tensor:
        """bool [B, L, L], True where the query (dim 1) sees the key (dim 2). Every token sees itself."""
        features = self.features()
        return self.sees(tuple(f[:, :, None] for f in features), tuple(f[:, None, :] for f in features))

    def by_document(self) -> list[list[Document]]:
        """The mask in parts, row after row."""
        assert self.documents is not None
        features, rows = self.features(), []
        for row, sizes in enumerate(self.documents):
            of_row, start = [], 0
            for clean, masked in sizes:
                end = start + clean + masked
                query = tuple(f[row, start + clean : end, None] for f in features)
                mask = self.sees(query, tuple(f[row, None, start:end] for f in features)) if masked else None
                of_row.append(Document(clean, masked, mask))
                start = end
            rows.append(of_row)
        return rows


@dataclass(frozen=True, slots=True)
class Document:
    """C clean tokens, each of which sees those up to itself, M masked ones, and whom these see."""

    clean: int
    masked: int
    mask_MxD: Tensor | None


@dataclass
class AttentionPlan:
    """What all layers of one forward share: the mask, made once, and flex attention where that computes it, else SDPA.

    `extend` is called by every layer with its new keys and values and returns those to attend to; a cache hooks
    in there.
    """

    mask_Bx1xLxL: Tensor | None = None
    documents: list[list[Document]] | None = None
    block_mask: Any = None
    flex_attention: Callable[..., Tensor] | None = None
    extend: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

    @classmethod
    def of(cls, layout: AnchoredLayout | None, implementation: str) -> AttentionPlan:
        """The plan of a forward under `layout`; None is bidirectional attention over the whole row."""
        if layout is None:
            return cls()  # without a mask SDPA has its fastest kernels; flex has nothing to skip
        if implementation == "flex_attention":
            make_mask, kernel = _flex(layout.position_ids_BxL.device.type)
            return cls(block_mask=_block_mask(layout, make_mask), flex_attention=kernel)
        if layout.documents is not None:
            return cls(documents=layout.by_document())
        return cls(mask_Bx1xLxL=layout.mask()[:, None])


def attend(q_BxHxLxE: Tensor, k_BxKxTxE: Tensor, v_BxKxTxE: Tensor, plan: AttentionPlan) -> Tensor:
    """softmax(q k' / sqrt(E)) v under the plan's mask, BxHxLxE; each key head serves H / K query heads."""
    grouped = q_BxHxLxE.shape[1] != k_BxKxTxE.shape[1]
    if plan.documents is not None:
        rows = zip(q_BxHxLxE.unbind(), k_BxKxTxE.unbind(), v_BxKxTxE.unbind(), plan.documents, strict=True)
        return torch.stack([_attend_by_document(*row) for row in rows])
    if plan.flex_attention is not None:
        return plan.flex_attention(q_BxHxLxE, k_BxKxTxE, v_BxKxTxE, block_mask=plan.block_mask, enable_gqa=grouped)
    return F.scaled_dot_product_attention(
        q_BxHxLxE, k_BxKxTxE, v_BxKxTxE, attn_mask=plan.mask_Bx1xLxL, enable_gqa=grouped
    )


def _attend_by_document(q_HxLxE: Tensor, k_KxLxE: Tensor, v_KxLxE: Tensor, documents: list[Document]) -> Tensor:
    """One row, HxLxE: sums of C x C / 2 + M x D scores instead of L x L."""
    queries = iter(q_HxLxE.split([size for d in documents for size in (d.clean, d.masked)], dim=1))
    lengths = [d.clean + d.masked for d in documents]
    parts = []
    for document, k, v in zip(documents, k_KxLxE.split(lengths, dim=1), v_KxLxE.split(lengths, dim=1), strict=True):
        clean, masked = next(queries), next(queries)
        if document.clean:
            keys, values = k[:, : document.clean], v[:, : document.clean]
            parts.append(_sdpa(clean, keys, values, is_causal=True))
        if document.masked:
            parts.append(_sdpa(masked, k, v, attn_mask=document.mask_MxD))
    return torch.cat(parts, dim=1)


def _sdpa(q_HxNxE: Tensor, k_KxTxE: Tensor, v_KxTxE: Tensor, **who: Any) -> Tensor:
    # CPUs have their fast kernel for four dimensions only.
    q, k, v = q_HxNxE[None], k_KxTxE[None], v_KxTxE[None]
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **who)[0]


def _block_mask(layout: AnchoredLayout, make_mask: Callable[..., Any]) -> Any:
    features, sees = layout.features(), layout.sees

    def visible(batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(tuple(f[batch, query] for f in features), tuple(f[batch, key] for f in features))

    batch, length = features[0].shape
    return make_mask(visible, batch, None, length, length, device=features[0].device)


@functools.cache
def _flex(device_type: str) -> tuple[Callable[..., Any], Callable[..., Tensor]]:
    """What makes a block mask, and flex attention: compiled on a GPU, as plain PyTorch on a CPU.

    One kernel per shape: rows have one length. Where too many shapes come nevertheless, `fullgraph` makes PyTorch raise
    instead of falling back to dense scores, which for long rows fill the memory. The mask compiled takes 0.4 ms for a
    row of 4,352 tokens on an H100, plain 16 ms; plain it would also hold the dense mask, 2.9 GiB at 17,408 tokens.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if device_type == "cpu":
        return create_block_mask, flex_attention
    make_mask: Any = torch.compile(create_block_mask, fullgraph=True, dynamic=False)
    kernel: Any = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    return make_mask, kernel
