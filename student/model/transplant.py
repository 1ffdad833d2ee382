"""Give a model another vocabulary: copy the rows of byte-equal tokens, compose the others from their pieces.

A token of the new vocabulary whose bytes the old one has as a token takes that token's row. Any other becomes the
mean of the rows of the old tokenizer's tokens of its bytes (a token cut inside a character is encoded byte by byte
through the same merges). Special tokens take the row of the old special token of the same role, else of the same
name, else the mean row; the mask, which an autoregressive model does not have, thus starts as the mean of all
text tokens. Works in both directions and for any two tokenizers that `shared.tokenizer` reads. One embedding_bag over
the new vocabulary: seconds at 128k tokens.

Legend: V old vocabulary, W new vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shared.dataset.records import offsets_of
from shared.tokenizer.vocabulary import Encoder, Vocabulary

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Transplant:
    """Old ids whose mean row each of W new tokens takes: row w is `ids[offsets[w]:offsets[w + 1]]`.

    Attributes:
        offsets: int64 [W + 1].
        ids: int64.
        text_ids: int64, old ids of all text tokens; their mean is the row of new tokens without a source.
        counts: how many rows of the new vocabulary came from where.
    """

    offsets: NDArray[np.int64]
    ids: NDArray[np.int64]
    text_ids: NDArray[np.int64]
    counts: dict[str, float]

    def apply(self, rows_VxD: Tensor) -> Tensor:
        """The new vocabulary's rows, WxD in the dtype of `rows_VxD`; means are taken in float32."""
        import torch
        import torch.nn.functional as F

        rows = rows_VxD.float()
        ids, offsets = torch.from_numpy(self.ids), torch.from_numpy(self.offsets)
        new_WxD = F.embedding_bag(ids, rows, offsets, mode="mean", include_last_offset=True)
        mean_D = rows[torch.from_numpy(self.text_ids)].mean(dim=0)
        new_WxD[offsets[1:] == offsets[:-1]] = mean_D
        return new_WxD.to(rows_VxD.dtype)


def plan_transplant(old: Vocabulary, encoder: Encoder, new: Vocabulary) -> Transplant:
    """Find the sources of every token of `new` in `old`; `encoder` is old's."""
    sources: list[Iterable[int]] = []
    # Some vocabularies have no token for bytes that valid UTF-8 never has (0xC0, 0xF5 …).
    known_bytes = {token[0] for token in old.ids if len(token) == 1}
    unknown = [i for i, token in enumerate(new.tokens) if token and token not in old.ids and known_bytes >= set(token)]
    pieces = dict(zip(unknown, encoder.encode_batch([new.tokens[index] for index in unknown]), strict=True))
    old_specials = {old.texts[index]: index for index in np.flatnonzero(old.is_special) if old.texts[index]}
    role_of_new = {index: [role for role, i in new.roles.items() if i == index] for index in new.roles.values()}
    copied = special = 0
    for index, token in enumerate(new.tokens):
        if not token:
            roles = role_of_new.get(index, [])
            by_role = [old.roles[role] for role in roles if role in old.roles]
            by_text = [old_specials[new.texts[index]]] if new.texts[index] in old_specials else []
            # A reserved token that becomes the mask has no row worth keeping.
            source = by_role[:1] or ([] if "mask" in roles else by_text)
            special += len(source)
            sources.append(source)
        elif token in old.ids:
            copied += 1
            sources.append([old.ids[token]])
        else:
            sources.append(pieces.get(index, ()))
    lengths = [len(list(source)) for source in sources]
    composed = len(unknown)
    return Transplant(
        offsets=offsets_of(lengths),
        ids=np.array([index for source in sources for index in source], dtype=np.int64),
        text_ids=np.flatnonzero(~old.is_special).astype(np.int64),
        counts={
            "tokens": len(new),
            "copied": copied,
            "composed": composed,
            "special": special,
            "mean": len(new) - copied - composed - special,
            "copied_share": copied / len(new),
            "composed_share": composed / len(new),
        },
    )
