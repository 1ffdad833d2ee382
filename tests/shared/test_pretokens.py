"""The cuts of short texts against the tokenizers' own, over characters of every script and over random texts."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from shared.pretokens import BYTES, Cuts
from shared.tokenizer_files import TokenizerFile
from shared.vocabulary import Encoder
from tests.student.alignment.synthetic import TEXTS, llada_like, llama3, qwen, tekken

REAL = {"llama3": llama3, "tekken": tekken, "qwen": qwen, "digits and GPT-2": llada_like}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def tree_of(encoder: Encoder) -> dict[str, Any]:
    return json.loads(encoder._backend.to_str())


def own_pieces(tree: dict[str, Any], text: str) -> list[str]:
    """What the library's own pre-tokenizer makes of `text`."""
    return [piece for piece, _ in Tokenizer.from_str(json.dumps(tree)).pre_tokenizer.pre_tokenize_str(text)]


def small_tree(pre_tokenizer: dict[str, Any] | None, **others: Any) -> dict[str, Any]:
    model = {"type": "BPE", "vocab": {}, "merges": []}
    return {"model": model, "normalizer": None, "added_tokens": [], "pre_tokenizer": pre_tokenizer, **others}


@pytest.mark.parametrize("name", REAL)
def test_characters_are_cut_as_the_tokenizer_cuts_them(name: str) -> None:
    tree = tree_of(REAL[name]()[1])
    cuts, own = Cuts.of(tree), Tokenizer.from_str(json.dumps(tree)).pre_tokenizer
    # All of the first alphabets, and every thirteenth character beyond.
    covered = 0
    for character in map(chr, [*range(0x600), *range(0x600, sys.maxunicode + 1, 13)]):
        if not character.isprintable():
            continue
        text = "a?b ?B'?1 A?.\n?\r\n ?\t?  ?".replace("?", character)
        pieces = cuts.pieces(text.encode())
        assert pieces == [piece for piece, _ in own.pre_tokenize_str(text)], text
        covered += 1
    assert covered > 8_000


@pytest.mark.parametrize("name", REAL)
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_fragments_are_spelt_as_the_tokenizer_spells_them(name: str, data: st.DataObject) -> None:
    _, encoder = REAL[name]()
    source = "".join(TEXTS.values()).encode()
    texts = []
    for _ in range(data.draw(st.integers(1, 8))):
        first = data.draw(st.integers(0, len(source) - 1))
        texts.append(source[first : first + data.draw(st.integers(1, 24))])
    texts += [text.encode() for text in data.draw(st.lists(st.text(max_size=12), max_size=4))]
    spelled = encoder.encode_fragments(texts, partial=True)
    for text, ids in zip(texts, spelled, strict=True):
        try:
            own = encoder._backend.encode(text.decode(), add_special_tokens=False).ids
        except UnicodeDecodeError:
            own = encoder._encode_raw(text)
        assert ids.tolist() == own
    first_ids = [ids[0] if len(ids) else -1 for ids in spelled]
    np.testing.assert_array_equal(encoder.first_of_fragments(texts), first_ids)


def sequence(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(parts)}


def refused() -> Iterator[tuple[str, dict[str, Any]]]:
    split = {"type": "Split", "pattern": {"Regex": r"\p{L}+"}, "behavior": "Isolated", "invert": False}
    yield "a normalizer", small_tree(BYTE_LEVEL, normalizer={"type": "NFC"})
    yield "a space in front", small_tree({**BYTE_LEVEL, "add_prefix_space": True})
    yield "no pre-tokenizer", small_tree(None)
    yield "Metaspace", small_tree({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True})
    yield "punctuation", small_tree(sequence({"type": "Punctuation", "behavior": "Isolated"}, BYTE_LEVEL))
    yield "matches merged", small_tree(sequence({**split, "behavior": "MergedWithNext"}, BYTE_LEVEL))
    yield "inverted", small_tree(sequence({**split, "invert": True}, BYTE_LEVEL))
    yield "not a pattern here", small_tree(sequence({**split, "pattern": {"Regex": r"(?<name"}}, BYTE_LEVEL))
    sets = {"Regex": r"[\p{L}&&[^\p{Han}]]+"}
    yield "an intersection", small_tree(sequence({**split, "pattern": sets}, BYTE_LEVEL))
    yield "Unigram", small_tree(BYTE_LEVEL, model={"type": "Unigram", "vocab": []})


@pytest.mark.parametrize(("why", "tree"), list(refused()))
def test_other_cuts_are_left_to_the_tokenizer(why: str, tree: dict[str, Any]) -> None:
    cuts = Cuts.of(tree)
    assert cuts.pieces(b"some text") is None, why
    assert cuts.first(b"some text") is None, why


@pytest.mark.parametrize(
    "data",
    [b"", b"\xe3\x81", b"a bell\x07", b"a line\xe2\x80\xa8separator", "\u0378 is not assigned".encode(), b"<added>"],
)
def test_texts_that_it_cannot_vouch_for_are_left_to_the_tokenizer(data: bytes) -> None:
    added = {"id": 0, "content": "<added>", "special": False}
    cuts = Cuts.of(small_tree(BYTE_LEVEL, added_tokens=[added]))
    assert cuts.pieces(data) is None
    assert cuts.first(data) is None
    assert cuts.pieces(b"<added >") == ["<addedĠ>"]


def test_the_bytes_of_covered_texts() -> None:
    cuts = Cuts([])
    covered = (
        text for text in map(chr, range(sys.maxunicode + 1)) if cuts.pieces(text.encode("utf-8", "surrogatepass"))
    )
    assert set("".join(covered).encode()) <= BYTES


def test_a_pattern_that_means_something_else_here_is_found_out() -> None:
    # `\\h` is a hexadecimal digit to the tokenizer, and horizontal space to `regex`.
    vocabulary, encoder = REAL["llama3"]()
    tree = tree_of(encoder)
    tree["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\h+"
    other = Encoder(TokenizerFile(Path(), vocabulary.tokens, vocabulary.texts, [], tree), vocabulary)
    assert Cuts.of(tree).pieces(b"1f and so on") != own_pieces(tree, "1f and so on")
    assert other._cuts.pieces(b"1f and so on") is None
    assert encoder._cuts.pieces(b"1f and so on") == own_pieces(tree_of(encoder), "1f and so on")


def test_patterns_cut_one_after_the_other_and_keep_what_lies_between() -> None:
    parts = [
        {"type": "Split", "pattern": {"Regex": "[ab]+|x*"}, "behavior": "Isolated", "invert": False},
        {"type": "Split", "pattern": {"String": "."}, "behavior": "Isolated", "invert": False},
        {"type": "Digits", "individual_digits": False},
        BYTE_LEVEL,
    ]
    tree = small_tree(sequence(*parts))
    for text in ("abc12.3b", "..12", "c", "xxab4", "3.c.c"):
        assert Cuts.of(tree).pieces(text.encode()) == own_pieces(tree, text)
        assert Cuts.of(tree).first(text.encode()) == own_pieces(tree, text)[0]
