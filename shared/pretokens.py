"""How byte-level tokenizers cut short texts before merging, through the `regex` library.

The tables of a vocabulary pair ask the teacher's tokenizer about tens of thousands of pieces of words. In the
`tokenizers` library's own pipeline such a text costs four times what its merges cost, and most of that is the cut.
`Cuts` makes the same cut by the same patterns, and says of which texts it is known to be the same; the rest are for the
library's pipeline (`shared.vocabulary.Encoder`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import regex

from shared.tokenizer_files import byte_alphabet, components

if TYPE_CHECKING:  # the library is loaded where text is encoded, not by every command
    from tokenizers.pre_tokenizers import PreTokenizer

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What `ByteLevel` cuts by where it uses a pattern of its own: GPT-2's."""
_ALPHABET = byte_alphabet()
BYTES = frozenset({*b"\t\n\r", *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1), 0xF3})
"""Those of the texts that are covered: in UTF-8, of tabs, line ends and the characters that Python calls printable."""
_ENDS = dict.fromkeys(map(ord, "\t\n\r"))


class Cuts:
    """The cuts of one tokenizer; pieces are in the byte-level alphabet, which its merges are made of.

    Args:
        patterns: applied one after the other, each to the pieces of the one before; matches and what lies between
            them are pieces. None covers no text.
        added: texts that the tokenizer takes out before it cuts.
    """

    def __init__(self, patterns: Sequence[str] | None, added: Sequence[str] = ()) -> None:
        self._patterns = None if patterns is None else [regex.compile(pattern) for pattern in patterns]
        self._added = regex.compile("|".join(map(regex.escape, added))) if added else None

    @classmethod
    def of(cls, tree: dict[str, Any]) -> Cuts:
        """The cuts of the tokenizer with this `tokenizer.json` tree; of no text if it cuts by more than patterns."""
        *cutting, last = list(components(tree.get("pre_tokenizer"))) or [{"type": "none"}]
        is_byte_level = tree["model"]["type"] == "BPE" and last["type"] == "ByteLevel"
        if tree.get("normalizer") or not is_byte_level or last.get("add_prefix_space", True):
            return cls(None)
        patterns = [_pattern(part) for part in cutting] + ([_GPT2] if last.get("use_regex", True) else [])
        known = [pattern for pattern in patterns if pattern is not None]
        added = [entry["content"] for entry in tree["added_tokens"] if not entry["special"]]
        try:
            return cls(known if len(known) == len(patterns) else None, added)
        except regex.error:
            return cls(None)

    def agrees(self, own: PreTokenizer, probes: Sequence[bytes]) -> bool:
        """Whether those of `probes` that are covered are cut as the tokenizer's `own` pre-tokenizer cuts them."""
        return all(
            pieces is None or pieces == [piece for piece, _ in own.pre_tokenize_str(probe.decode())]
            for probe, pieces in zip(probes, map(self.pieces, probes), strict=True)
        )

    def first(self, data: bytes) -> str | None:
        """The first piece of `data`; None if it is not covered."""
        text = self._covered(data)
        if text is None:
            return None
        for pattern in self._patterns or ():
            match = pattern.match(text)
            text = match.group() if match and match.end() else next(_cut(pattern, text))
        return _byte_level(text)

    def pieces(self, data: bytes) -> list[str] | None:
        """All pieces of `data`, in order; None if it is not covered."""
        text = self._covered(data)
        if text is None:
            return None
        pieces = [text]
        for pattern in self._patterns or ():
            whole, pieces = pieces, []
            for piece in whole:
                match = pattern.search(piece)
                if match is None or match.end() - match.start() == len(piece):
                    pieces.append(piece)
                else:
                    pieces.extend(_cut(pattern, piece))
        return list(map(_byte_level, pieces))

    def _covered(self, data: bytes) -> str | None:
        """`data` as text, if the tokenizer is known to cut it like this.

        The two libraries know the characters of different editions of Unicode, and agree on those that Python knows
        too; control characters other than tabs and line ends are left to the tokenizer as well.
        """
        if self._patterns is None:
            return None
        try:
            text = data.decode()
        except UnicodeDecodeError:
            return None
        if not text or not (text.isprintable() or text.translate(_ENDS).isprintable()):
            return None
        if self._added and self._added.search(text):
            return None
        return text


def _pattern(part: dict[str, Any]) -> str | None:
    if part["type"] == "Digits":
        return r"\p{N}" if part["individual_digits"] else r"\p{N}+"
    if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        kind, pattern = next(iter(part["pattern"].items()))
        if kind != "Regex":
            return regex.escape(pattern)
        return None if "&&" in pattern else str(pattern)  # an intersection, which `regex` reads as two characters
    return None


def _cut(pattern: regex.Pattern[str], text: str) -> Iterator[str]:
    at = 0
    for match in pattern.finditer(text):
        first, stop = match.span()
        if first > at:
            yield text[at:first]
        if stop > first:  # an empty match cuts too
            yield text[first:stop]
        at = stop
    if at < len(text):
        yield text[at:]


def _byte_level(piece: str) -> str:
    if piece.isascii() and piece.isprintable():  # only the space is spelt otherwise
        return piece.replace(" ", _ALPHABET[0x20])
    return piece.encode().decode("latin-1").translate(_ALPHABET)
