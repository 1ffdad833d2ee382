"""What each step of the teacher made of its draft: for `student generate --with-teacher` and the report."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

from shared.tokenizer.vocabulary import Vocabulary, first_difference

Ids = Sequence[int] | NDArray[np.integer[Any]]
COLORS = {"accepted": "green", "rejected": "red strike", "own": ""}
_MARKS = {"accepted": "{+%s+}", "rejected": "[-%s-]", "own": "%s"}  # as wdiff has them


@dataclass(frozen=True, slots=True)
class Step:
    """The teacher's tokens in one step: it says the accepted part of the draft, and then what is its own."""

    accepted: list[int]
    rejected: list[int]
    own: list[int]

    @classmethod
    def of(cls, draft: Ids, said: Ids, *, ended: bool = False) -> Step:
        """Of a draft, and what the teacher said in its place.

        Args:
            ended: the response ends with `said`, so that the draft beyond was not verified.
        """
        matches = first_difference(draft, said)
        rejected = draft[matches : len(said) if ended else None]
        return cls(*([int(index) for index in ids] for ids in (draft[:matches], rejected, said[matches:])))


def spans(steps: Sequence[Step], vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """The text of steps in pieces: (`accepted`, `rejected` or `own`, text). A character that goes across tokens is in
    the piece that ends it."""
    said = codecs.getincrementaldecoder("utf-8")("replace")
    pieces: list[tuple[str, str]] = []
    for step in steps:
        for kind in COLORS:
            text = vocabulary.decode(getattr(step, kind))
            pieces.append((kind, text.decode("utf-8", "replace") if kind == "rejected" else said.decode(text)))
    return [(kind, text) for kind, text in pieces if text]


def shown(pieces: Sequence[tuple[str, str]], *, colors: bool) -> Text:
    """In colors, or with marks where there are none: `{+accepted+}`, `[-rejected-]`."""
    return Text.assemble(*((text, COLORS[kind]) if colors else _MARKS[kind] % text for kind, text in pieces))
