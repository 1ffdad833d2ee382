"""Read the tokenizer formats in use and recover the exact bytes of every token.

One reader per format, one result: a `tokenizer.json` tree (the format of the `tokenizers` library) with the
bytes, the string and the special flag of every id. Formats: a directory or file with `tokenizer.json`
(byte-level BPE, SentencePiece-like with byte fallback) or `tekken.json`.

Bytes come from the vocabulary alone, never from decoding a single id: decoding is lossy for a token that
holds part of a character. A 128k vocabulary takes about half a second; the merges of a `tekken.json` another three.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from shared.errors import VocabularyError
from shared.files import read_json

SPACE_SYMBOL = "▁"  # how SentencePiece writes a space
_SAVE = (
    "AutoTokenizer.from_pretrained(...).save_pretrained(...) writes tokenizer.json, from a SentencePiece .model or a "
    "tiktoken file too"
)


@dataclass(slots=True)
class TokenizerFile:
    """One tokenizer as read from disk.

    Attributes:
        source: the path that it was read from, for messages.
        tokens: bytes of every id, b"" for specials and for ids that no token has.
        texts: the string of every id in its own file, "" for ids that no token has.
        is_special: True for special tokens and for ids that no token has.
        tree: the `tokenizer.json` tree.
        settings: `tokenizer_config.json`, empty where there is none.
        chat_template: Jinja source, or None.
    """

    source: Path
    tokens: list[bytes]
    texts: list[str]
    is_special: list[bool]
    tree: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None


def read_tokenizer_file(path: Path) -> TokenizerFile:
    """Read the tokenizer at `path`, a file or a directory that holds one.

    Raises:
        VocabularyError: if there is no tokenizer, the format is unknown, or a token's bytes cannot be recovered.
    """
    file = _find(path)
    tree = read_json(file, VocabularyError, "pass a tokenizer.json or tekken.json") or {}
    if isinstance(tree.get("model"), dict) and isinstance(tree.get("added_tokens"), list):
        settings = _read_settings(file.parent)
        return of_tree(file, tree, settings, _read_chat_template(file.parent, settings))
    if "vocab" in tree and "config" in tree:
        return _read_tekken(file, tree)
    raise VocabularyError(
        f"{file} has the keys {sorted(tree)[:8]}, which is neither a tokenizer.json nor a tekken.json"
    )


def _find(path: Path) -> Path:
    if path.is_dir():
        for name in ("tokenizer.json", "tekken.json"):
            if (path / name).is_file():
                return path / name
        raise VocabularyError(f"{path} holds no tokenizer.json or tekken.json; save the tokenizer there first: {_SAVE}")
    if not path.exists():
        raise VocabularyError(f"{path} does not exist; pass a tokenizer directory, a tokenizer.json or a tekken.json")
    if path.suffix != ".json":
        raise VocabularyError(f"{path} is no tokenizer.json or tekken.json; convert it first: {_SAVE}")
    return path


# --- tokenizer.json -------------------------------------------------------------------------------------


def of_tree(file: Path, tree: dict[str, Any], settings: dict[str, Any], chat_template: str | None) -> TokenizerFile:
    """A `tokenizer.json` tree, read already, with its settings; `file` is for messages.

    Raises:
        VocabularyError: if a token's bytes cannot be recovered.
    """
    vocab = _model_vocabulary(tree["model"])
    added = tree["added_tokens"]
    size = max([*vocab.values(), *(entry["id"] for entry in added)], default=-1) + 1
    texts, tokens, is_special = [""] * size, [b""] * size, [True] * size
    added_ids = {entry["id"] for entry in added}
    to_bytes = _byte_recovery(file, tree)
    for text, index in vocab.items():
        texts[index] = text
        if index not in added_ids:
            tokens[index] = to_bytes(text, index)
            is_special[index] = False
    for entry in added:
        texts[entry["id"]] = entry["content"]
        if not entry["special"]:
            tokens[entry["id"]] = entry["content"].encode()
            is_special[entry["id"]] = False
    return TokenizerFile(file, tokens, texts, is_special, tree, settings, chat_template)


def _model_vocabulary(model: dict[str, Any]) -> dict[str, int]:
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        return vocab
    return {entry[0]: index for index, entry in enumerate(vocab)}  # Unigram: [piece, score] in order of id


def _of_byte_level(file: Path, byte_of: Mapping[str, int], text: str, index: int) -> bytes:
    """Bytes of a token that GPT-2's byte-level alphabet writes."""
    try:
        return bytes([byte_of[character] for character in text])
    except KeyError as error:
        raise VocabularyError(
            f"{file}: token {index} {text!r} has the character {error.args[0]!r}, which is outside the "
            "byte-level alphabet, so its bytes cannot be recovered; declare it as an added token"
        ) from None


def _of_sentence_piece(byte_fallback: bool, text: str, _index: int) -> bytes:
    """Bytes of a token written as text with ▁ for the space, and `<0xNN>` for a byte if the model has byte fallback."""
    if byte_fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return bytes([int(text[3:5], 16)])
    return text.replace(SPACE_SYMBOL, " ").encode()


def component_types(tree: dict[str, Any]) -> set[str]:
    """What kinds of pre-tokenizer and decoder a tokenizer has."""
    return {part["type"] for key in ("pre_tokenizer", "decoder") for part in components(tree.get(key))}


def _byte_recovery(file: Path, tree: dict[str, Any]) -> Callable[[str, int], bytes]:
    """What gives the bytes of a token's string and id."""
    kinds = component_types(tree)
    if "ByteLevel" in kinds:
        return partial(_of_byte_level, file, {character: byte for byte, character in byte_alphabet().items()})
    model = tree["model"]
    replaces_space = any(
        part["type"] == "Metaspace"
        or (part["type"] == "Replace" and SPACE_SYMBOL in (part.get("content"), part["pattern"].get("String")))
        for key in ("normalizer", "pre_tokenizer", "decoder")
        for part in components(tree.get(key))
    )
    if replaces_space:
        return partial(_of_sentence_piece, bool(model.get("byte_fallback")))
    prefix = model.get("continuing_subword_prefix")
    odd = next((text for text in _model_vocabulary(model) if prefix and text.startswith(prefix)), None)
    example = f"; token {odd!r} may or may not follow a space" if odd else ""
    raise VocabularyError(
        f"{file}: a {model.get('type')} model whose pre-tokenizer and decoder are {sorted(kinds) or 'absent'} drops "
        f"the spaces between tokens, so the bytes of its tokens cannot be recovered{example}; "
        "expected a byte-level BPE, or SentencePiece with ▁ for the space"
    )


def components(part: dict[str, Any] | None) -> Iterable[dict[str, Any]]:
    """The leaves of a normalizer, pre-tokenizer or decoder tree, in order."""
    if part is None:
        return
    nested = next((part[key] for key in ("normalizers", "pretokenizers", "decoders") if key in part), None)
    if nested is None:
        yield part
    else:
        for child in nested:
            yield from components(child)


def _read_settings(directory: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json", "generation_config.json"):
        if (directory / name).is_file():
            content = read_json(directory / name, VocabularyError, "copy the tokenizer again") or {}
            if name == "generation_config.json":
                content = {"generation_eos_token_id": content.get("eos_token_id")}
            settings.update({key: value for key, value in content.items() if value is not None})
    return settings


def _read_chat_template(directory: Path, settings: dict[str, Any]) -> str | None:
    template = settings.get("chat_template")
    if (directory / "chat_template.jinja").is_file():
        return (directory / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(template, list):  # several named templates
        template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template


# --- tekken.json ----------------------------------------------------------------------------------------


def _read_tekken(file: Path, tree: dict[str, Any]) -> TokenizerFile:
    settings = tree["config"]
    special_count = settings["default_num_special_tokens"]
    ranks = [
        base64.b64decode(entry["token_bytes"])
        for entry in tree["vocab"][: settings["default_vocab_size"] - special_count]
    ]
    named = {entry["rank"]: entry["token_str"] for entry in tree.get("special_tokens") or []}
    specials = {named.get(index, f"<SPECIAL_{index}>"): index for index in range(special_count)}
    # Ids of the ranks come after the specials.
    ids = dict(zip(ranks, range(special_count, special_count + len(ranks)), strict=True))
    return of_ranks(file, ids, specials, settings["pattern"])


def of_ranks(file: Path, ids: dict[bytes, int], specials: dict[str, int], pattern: str) -> TokenizerFile:
    """A byte-level BPE whose merges follow from the order of its ids.

    Args:
        file: for messages.
        ids: of the tokens, by their bytes.
        specials: ids of the special tokens, by their strings.
        pattern: the regular expression that splits text before merging.
    """
    alphabet = byte_alphabet()
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tree: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for text, index in sorted(specials.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {"".join(map(alphabet.__getitem__, token)): index for token, index in ids.items()},
            "merges": [],  # made by `with_merges` when somebody encodes
        },
    }
    return of_tree(file, tree, {}, None)


def with_merges(tree: dict[str, Any]) -> dict[str, Any]:
    """Fill in the merges of a tree that came from ranks, and has none: every split of a token into two tokens, in order
    of rank. Another tree stays as it is.

    tiktoken joins the adjacent pair whose concatenation has the lowest rank, whichever the parts are, which is
    a BPE whose merges are all such pairs.
    """
    if tree["model"]["type"] != "BPE" or tree["model"]["merges"]:
        return tree
    vocab: dict[str, int] = tree["model"]["vocab"]
    merges: list[list[str]] = []
    for text in sorted(vocab, key=vocab.__getitem__):
        splits = (
            [text[:cut], text[cut:]] for cut in range(1, len(text)) if text[:cut] in vocab and text[cut:] in vocab
        )
        merges.extend(sorted(splits, key=lambda pair: (vocab[pair[0]], vocab[pair[1]])))
    return {**tree, "model": {**tree["model"], "merges": merges}}


@lru_cache(maxsize=1)
def byte_alphabet() -> dict[int, str]:
    """GPT-2's alphabet of the 256 bytes: printable Latin-1 stands for itself, the rest follow from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}
