"""Token id ↔ bytes of any tokenizer, what its special tokens are for, and its fingerprint.

A `Vocabulary` is what the student's cluster needs of the teacher's tokenizer, and it travels with the
dataset as one Parquet table. An `Encoder` turns bytes into ids, exactly: special tokens in the text are text,
and a normalizer that would change the bytes is left out (`changed_by_normalizer` says where it would).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from shared.errors import VocabularyError
from shared.tokenizer.files import (
    SPACE_SYMBOL,
    TokenizerFile,
    byte_alphabet,
    component_types,
    components,
    read_tokenizer_file,
    with_merges,
)
from shared.tokenizer.roles import PRECEDENCE, find_roles

_SCHEMA = pa.schema([("bytes", pa.binary()), ("text", pa.string()), ("is_special", pa.bool_())])


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens of one tokenizer; V ids, those that no token has counting as special.

    Attributes:
        tokens: bytes of every id, b"" for specials.
        is_special: bool [V].
        texts: the string of every id in the tokenizer's own file.
        roles: role → id; `shared.tokenizer.roles.ROLES` are the roles that there are.
    """

    tokens: list[bytes]
    is_special: NDArray[np.bool_]
    texts: list[str]
    roles: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def from_tokenizer(cls, path: str | Path, roles: Mapping[str, int | str] | None = None) -> Vocabulary:
        """Read the tokenizer at `path`: a directory or file of Hugging Face or tekken.

        Args:
            roles: role → id or string; wins over what the settings and the chat template say.

        Raises:
            VocabularyError: if it cannot be read, or a token's bytes cannot be recovered.
        """
        return cls.of_file(read_tokenizer_file(Path(path)), roles)

    @classmethod
    def of_file(cls, file: TokenizerFile, roles: Mapping[str, int | str] | None = None) -> Vocabulary:
        """The vocabulary of a tokenizer that is read already; `roles` as for `from_tokenizer`."""
        return cls(file.tokens, np.array(file.is_special, dtype=np.bool_), file.texts, find_roles(file, roles))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over every token's length, bytes and special flag, in order of id."""
        digest = hashlib.sha256()
        digest.update(self.byte_lengths.astype("<i8").tobytes())
        digest.update(self.is_special.astype("u1").tobytes())
        digest.update(b"".join(self.tokens))
        return digest.hexdigest()

    def require_equal(self, other: Vocabulary, model: object, collected: object, fix: str) -> None:
        """Refuse a teacher whose vocabulary this is, where `collected` has the tokens of `other`.

        Args:
            model, collected: places of the two, for the message. fix: what it advises.

        Raises:
            VocabularyError: if the two differ.
        """
        if self.fingerprint != other.fingerprint:
            raise VocabularyError(
                f"the tokenizer of teacher.model {model} has the fingerprint {self.fingerprint[:12]} ({len(self)} "
                f"tokens), but {collected} was collected with {other.fingerprint[:12]} ({len(other)} tokens): {fix}"
            )

    @cached_property
    def byte_lengths(self) -> NDArray[np.int64]:
        """int64 [V], 0 for specials."""
        return np.fromiter(map(len, self.tokens), dtype=np.int64, count=len(self.tokens))

    @cached_property
    def ids(self) -> dict[bytes, int]:
        """Bytes → id; the lowest id where several tokens have the same bytes."""
        return {token: index for index, token in reversed(list(enumerate(self.tokens))) if token}

    @cached_property
    def role_of(self) -> dict[int, str]:
        """Id → what it means inside a conversation."""
        return {self.roles[role]: role for role in reversed(PRECEDENCE) if role in self.roles}

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Of the special tokens that end a turn or a text."""
        return frozenset(self.roles[role] for role in ("end_of_turn", "end_of_text") if role in self.roles)

    def decode(self, ids: ArrayLike) -> bytes:
        """The bytes of `ids`; specials have none.

        Raises:
            VocabularyError: if an id is outside the vocabulary.
        """
        return b"".join(self.tokens[index] for index in self._checked(ids))

    def byte_ends(self, ids: ArrayLike) -> NDArray[np.int64]:
        """int64 [len(ids)], where each token ends in `decode(ids)`."""
        return np.cumsum(self.byte_lengths[self._checked(ids)])

    def _checked(self, ids: ArrayLike) -> NDArray[np.int64]:
        array = np.asarray(ids, dtype=np.int64)
        if array.size and (array.min() < 0 or array.max() >= len(self)):
            bad = array[(array < 0) | (array >= len(self))][0]
            raise VocabularyError(
                f"token id {bad} is outside the vocabulary of {len(self)}; this is another tokenizer's text"
            )
        return array

    def to_table(self) -> pa.Table:
        """One row per id; roles and fingerprint in the schema's metadata."""
        metadata = {"roles": json.dumps(self.roles), "fingerprint": self.fingerprint}
        arrays = [pa.array(self.tokens, pa.binary()), pa.array(self.texts, pa.string()), pa.array(self.is_special)]
        return pa.Table.from_arrays(arrays, schema=_SCHEMA.with_metadata(metadata))

    @classmethod
    def from_table(cls, table: pa.Table) -> Vocabulary:
        """The inverse of `to_table`.

        Raises:
            VocabularyError: if columns are missing or the content does not have its own fingerprint.
        """
        if not set(_SCHEMA.names) <= set(table.schema.names):
            raise VocabularyError(
                f"the vocabulary table has the columns {table.schema.names}, expected {_SCHEMA.names}"
            )
        metadata = table.schema.metadata or {}
        vocabulary = cls(
            table["bytes"].to_pylist(),
            table["is_special"].to_numpy(zero_copy_only=False).astype(np.bool_),
            table["text"].to_pylist(),
            json.loads(metadata.get(b"roles", b"{}")),
        )
        expected = metadata.get(b"fingerprint", b"").decode()
        if expected and expected != vocabulary.fingerprint:
            raise VocabularyError(
                f"the vocabulary table has the fingerprint {vocabulary.fingerprint[:12]} but was written with "
                f"{expected[:12]}: it is damaged; copy it again from where the dataset was collected"
            )
        return vocabulary


class Encoder:
    """Bytes → ids of one tokenizer: no special tokens added, none recognized in the text, no byte changed.

    Text that is not UTF-8 (a response cut inside a character) is encoded up to the cut, and the rest byte by
    byte through the same merges.
    """

    def __init__(self, file: TokenizerFile, vocabulary: Vocabulary) -> None:
        from tokenizers import Tokenizer

        tree = with_merges(file.tree)
        self.vocabulary = vocabulary
        normalizer = list(components(tree.get("normalizer")))
        structural = [part for part in normalizer if _writes_space(part)]
        lossy = [part for part in normalizer if not _writes_space(part) and part["type"] != "Prepend"]
        tree = {
            **tree,
            "truncation": None,
            "padding": None,
            "post_processor": None,
            "normalizer": {"type": "Sequence", "normalizers": structural} if structural else None,
            "pre_tokenizer": _without_prefix_space(tree.get("pre_tokenizer")),
        }
        serialized = json.dumps(tree, ensure_ascii=False)
        self.fingerprint = hashlib.sha256(serialized.encode()).hexdigest()
        self._backend = Tokenizer.from_str(serialized)
        self._backend.encode_special_tokens = True
        # A second tokenizer lends its normalizer: the library has no constructor from a tree.
        empty = {"type": "BPE", "vocab": {}, "merges": []}
        lender = {**tree, "normalizer": {"type": "Sequence", "normalizers": lossy}, "model": empty, "added_tokens": []}
        self._normalizer = Tokenizer.from_str(json.dumps(lender)).normalizer if lossy else None
        self._byte_level = "ByteLevel" in component_types(tree)
        self._byte_ids = self._single_bytes()

    @classmethod
    def from_tokenizer(cls, path: str | Path, vocabulary: Vocabulary | None = None) -> Encoder:
        """The encoder of the tokenizer at `path`, which must have that `vocabulary`; errors as `load_tokenizer`."""
        file = read_tokenizer_file(Path(path))
        own = Vocabulary.of_file(file)
        if vocabulary is not None and vocabulary.fingerprint != own.fingerprint:
            raise VocabularyError(
                f"{path} has the fingerprint {own.fingerprint[:12]} ({len(own)} tokens), expected "
                f"{vocabulary.fingerprint[:12]} ({len(vocabulary)} tokens): it is another tokenizer"
            )
        return cls(file, vocabulary or own)

    def encode(self, text: str | bytes) -> NDArray[np.int32]:
        """Ids whose bytes are exactly `text`.

        Raises:
            VocabularyError: if the vocabulary has no tokens for some of the bytes.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[NDArray[np.int32]]:
        """`encode` of each, the whole characters of all in one call of the tokenizer."""
        data = [text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text for text in texts]
        runs = [list(_runs(text)) for text in data]
        tokenized = iter(self._tokenize([run for parts in runs for run in parts]))
        ids = [[index for _ in parts for index in next(tokenized)] for parts in runs]
        return [np.array(row, dtype=np.int32) for row in self._verified(ids, data, partial=False)]

    def encode_fragments(self, texts: Sequence[bytes], *, partial: bool = False) -> list[list[int]]:
        """`encode` of pieces of words: those that are not whole characters go through the merges undivided.

        A token may start or end inside a character. In its text it stands in one word with its neighbors, so it
        must not be cut where the characters are.

        Args:
            partial: a text with bytes that the vocabulary has no tokens for gives no ids, instead of an error.
                Vocabularies without the bytes that no UTF-8 text has (0xC0, 0xFF, …) are common.

        Raises:
            VocabularyError: if the vocabulary has no tokens for some of the bytes.
        """
        return self._verified(self._tokenize(list(map(_whole, texts))), texts, partial)

    def _tokenize(self, pieces: Sequence[str | bytes]) -> list[list[int]]:
        """Ids of every piece: of text by the tokenizer, all in one call, of other bytes by its merges alone."""
        texts = [piece for piece in pieces if isinstance(piece, str)]
        encodings = iter(self._backend.encode_batch_fast(texts, add_special_tokens=False) if texts else ())
        return [next(encodings).ids if isinstance(piece, str) else self._encode_raw(piece) for piece in pieces]

    def _verified(self, tokenized: list[list[int]], texts: Sequence[bytes], partial: bool) -> list[list[int]]:
        """`tokenized`, which must have exactly the bytes of `texts`; where one has not, no ids or an error."""
        for at, (ids, text) in enumerate(zip(tokenized, texts, strict=True)):
            if self._bytes_of(ids) != text:
                if not partial:
                    raise VocabularyError(self._missing(ids, text))
                tokenized[at] = []
        return tokenized

    def changed_by_normalizer(self, text: str | bytes) -> bool:
        """Whether the tokenizer's own normalizer (NFC, lower-casing, …) would change the text."""
        if self._normalizer is None:
            return False
        characters = text.decode("utf-8", "ignore") if isinstance(text, bytes) else text
        return bool(self._normalizer.normalize_str(characters) != characters)

    def _bytes_of(self, ids: list[int]) -> bytes:
        try:
            return b"".join(map(self.vocabulary.tokens.__getitem__, ids))
        except IndexError:  # an id that the vocabulary does not have
            return b""

    def _missing(self, ids: list[int], expected: bytes) -> str:
        at = first_difference(self._bytes_of(ids), expected)
        return (
            f"the tokenizer gives tokens of other bytes for {expected[max(0, at - 20) : at + 20]!r}: it has no "
            f"tokens for {expected[at : at + 8]!r}; expected a vocabulary with all 256 bytes, or byte fallback"
        )

    def _encode_raw(self, data: bytes) -> list[int]:
        if self._byte_level:
            alphabet = byte_alphabet()
            return [token.id for token in self._backend.model.tokenize("".join(alphabet[byte] for byte in data))]
        missing = next((byte for byte in data if byte not in self._byte_ids), None)
        if missing is not None:
            raise VocabularyError(
                f"the tokenizer has no token for the single byte 0x{missing:02X}; "
                "expected all 256 bytes, or byte fallback"
            )
        return [self._byte_ids[byte] for byte in data]

    def _single_bytes(self) -> dict[int, int]:
        single: dict[int, int] = {}
        for index, token in enumerate(self.vocabulary.tokens):
            # `<0x41>` and `A` have the same byte: the fallback's token is for stray bytes.
            if len(token) == 1 and (token[0] not in single or self.vocabulary.texts[index].startswith("<0x")):
                single[token[0]] = index
        return single


def load_tokenizer(path: str | Path, roles: Mapping[str, int | str] | None = None) -> tuple[Vocabulary, Encoder]:
    """The vocabulary and the encoder of the tokenizer at `path`, read once; errors as `Vocabulary.from_tokenizer`."""
    file = read_tokenizer_file(Path(path))
    vocabulary = Vocabulary.of_file(file, roles)
    return vocabulary, Encoder(file, vocabulary)


def first_difference(left: Collection[Any], right: Collection[Any]) -> int:
    """The first place at which two texts, of bytes or tokens, differ; the end of one that begins the other."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _writes_space(part: dict[str, Any]) -> bool:
    return part["type"] == "Replace" and part["pattern"].get("String") == " " and part["content"] == SPACE_SYMBOL


def _without_prefix_space(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """A pre-tokenizer that adds no space in front of the text: a response goes on where the prompt ended."""
    if part is None:
        return None
    if "pretokenizers" in part:
        return {**part, "pretokenizers": [_without_prefix_space(child) for child in part["pretokenizers"]]}
    if part["type"] == "ByteLevel":
        return {**part, "add_prefix_space": False}
    if part["type"] == "Metaspace":
        return {**{key: value for key, value in part.items() if key != "add_prefix_space"}, "prepend_scheme": "never"}
    return part


def _whole(text: bytes) -> str | bytes:
    """`text` as characters, if that is what all of it is."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return text


def _runs(data: bytes) -> Iterable[str | bytes]:
    """`data` cut into runs of whole characters and runs of bytes that belong to none."""
    while data:
        try:
            yield data.decode()
            return
        except UnicodeDecodeError as error:
            if error.start:
                yield data[: error.start].decode()
            yield data[error.start : error.end]
            data = data[error.end :]
