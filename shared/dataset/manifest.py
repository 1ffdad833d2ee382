"""The JSON files of a dataset, each with a checksum of itself: provenance, one commit per unit, the manifest.

The README of this folder has the layout of a dataset. A file's bytes must be exactly what its content serializes to, so
a flip of any byte is found, in white space too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from shared.dataset.schema import SCHEMA_VERSION, check_version
from shared.errors import DatasetError

MANIFEST = "manifest.json"
PROVENANCE = "provenance.json"
VOCABULARY = "vocabulary.parquet"
TOKENIZER = "tokenizer"
DATA = "data"
COMMITS = "commits"

_CHECKSUM = "checksum"
# What may change between two sessions of one collection: it says who ran it, not what was collected.
_INFORMATIVE = frozenset({"git_commit", "created", "config"})


_UNIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


def check_file_name(name: str) -> str:
    """`name` as it is, if it stays inside the directory that it is relative to, on every system.

    What a manifest names is read, and for a store's tokenizer written, under a directory of the user's. A symbolic
    link inside that directory is the user's own and is followed: caches and `data` on another disk are made of them.

    Raises:
        DatasetError: if it is absolute, goes up, or has a backslash, a drive or a control character.
    """
    parts = name.split("/")
    if not set(parts).isdisjoint(("", ".", "..")) or re.search(r"[\\\x00-\x1f\x7f]", name) or ":" in parts[0]:
        raise DatasetError(
            f"the file name {name!r} leads out of its directory or is no plain path, expected a relative one, "
            "such as data/UNIT.parquet; it was changed after it was written: copy it again from where it comes from"
        )
    return name


def check_unit_name(name: str) -> str:
    """`name` as it is, if it can be part of a file's name.

    Raises:
        DatasetError: if it cannot.
    """
    if not _UNIT_NAME.fullmatch(name):
        raise DatasetError(
            f"unit name {name!r} cannot be a file's name; use up to 200 letters, digits, dots, dashes, underscores"
        )
    return name


FileName = Annotated[str, AfterValidator(check_file_name)]
UnitName = Annotated[str, AfterValidator(check_unit_name)]


class Document(BaseModel):
    """What `dump` writes and `load` reads."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


Loaded = TypeVar("Loaded", bound=BaseModel)


class Provenance(Document):
    """Where a dataset's distributions come from. Two sessions that differ in anything but the last three are refused.

    Attributes:
        teacher: the checkpoint's name; revision: of it.
        teacher_fingerprint: of the checkpoint's weights or configuration, where the collector knows one.
        tokenizer_fingerprint: `Vocabulary.fingerprint` of the teacher's vocabulary.
        chat_template_fingerprint: sha256 of the chat template's text; None where prompts were given as text.
        engine: `vllm`, `import-json`, …; engine_version: of it.
        dtype: of the weights and the computation; head_dtype: of the output head.
        top_k: most candidates per token. retained_mass: a token's candidates stop where they hold this mass.
        sampling: the decoding rules, as the config has them.
        seed: of the collection. prompts_fingerprint: sha256 of the prompts file. unit_prompts: prompts per unit.
        details: whatever else decides what is collected.
        git_commit, created, config: informative.
    """

    teacher: str
    revision: str | None = None
    teacher_fingerprint: str | None = None
    tokenizer_fingerprint: str
    chat_template_fingerprint: str | None = None
    engine: str
    engine_version: str | None = None
    dtype: str
    head_dtype: str | None = None
    top_k: int
    retained_mass: float | None = None
    sampling: list[dict[str, Any]] = Field(default_factory=list)
    seed: int = 0
    prompts_fingerprint: str | None = None
    unit_prompts: int | None = None
    details: dict[str, Any] = Field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION
    git_commit: str | None = None
    created: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the content, as JSON values."""
        tree: dict[str, Any] = json.loads(self.model_dump_json(exclude=set(_INFORMATIVE)))
        return tree

    @property
    def fingerprint(self) -> str:
        """sha256 over `identity`."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def differences(self, other: Provenance) -> list[str]:
        """`key: OTHER's value there, this value here` for everything that differs in identity."""
        here, there = _leaves(self.identity), _leaves(other.identity)
        return [
            f"{key}: {_shown(there, key)} there, {_shown(here, key)} here"
            for key in sorted(here.keys() | there.keys())
            if here.get(key, _ABSENT) != there.get(key, _ABSENT)
        ]


class FileEntry(Document):
    """A file that the manifest vouches for."""

    name: FileName
    bytes: int
    sha256: str


class Commit(Document):
    """What every commit says of its unit: the file that it published."""

    unit: UnitName
    file: FileName
    sha256: str
    bytes: int


class UnitEntry(Commit):
    """A committed unit of responses.

    Attributes:
        counts: records by `split/rule`.
        failures: samples of the unit that have no response, with the reason, by id.
    """

    rows: int
    tokens: int
    candidates: int
    counts: dict[str, int]
    provenance: str = Field(description="Fingerprint of the provenance that it was collected under.")
    # Left out where there are none, so that such datasets stay readable by earlier releases.
    failures: dict[str, str] = Field(default_factory=dict, exclude_if=lambda failures: not failures)


class Manifest(Document):
    """The whole dataset, in order: record i of the dataset is found by the units' row counts."""

    schema_version: int
    provenance: str
    vocabulary_fingerprint: str
    rows: int
    tokens: int
    bytes: int
    units: list[UnitEntry]
    files: list[FileEntry]

    @property
    def counts(self) -> dict[str, int]:
        """Records by `split/rule`."""
        return counts_of(self.units)


def counts_of(units: Iterable[UnitEntry]) -> dict[str, int]:
    """Records of these units by `split/rule`."""
    total = Counter[str]()
    for unit in units:
        total.update(unit.counts)
    return dict(sorted(total.items()))


def split_of(unit: UnitEntry) -> str | None:
    """The split of the unit's records; None where it has none.

    Raises:
        DatasetError: if they are of two, as in imports of early releases, which stay readable.
    """
    splits = sorted({key.partition("/")[0] for key in unit.counts})
    if len(splits) > 1:
        raise DatasetError(
            f"unit {unit.unit} holds records of {' and '.join(splits)}, expected one split: import its file again into "
            "a new directory"
        )
    return splits[0] if splits else None


def dump(document: BaseModel) -> bytes:
    """`document` as JSON that carries its own checksum."""
    tree = document.model_dump(mode="json")
    tree[_CHECKSUM] = hashlib.sha256(_serialize(tree)).hexdigest()
    return _serialize(tree)


def load(kind: type[Loaded], data: bytes, source: str) -> Loaded:
    """The inverse of `dump`.

    Raises:
        DatasetError: if the bytes are not exactly what `dump` wrote, of a later schema version, or name a file outside
            the dataset's directory.
    """
    try:
        tree = json.loads(data)
    except ValueError as error:
        raise DatasetError(
            f"{source} is damaged: {error}; copy it again from where the dataset was collected"
        ) from error
    if isinstance(tree, dict) and isinstance(tree.get("schema_version"), int):
        check_version(tree["schema_version"], source)
    seen = tree.pop(_CHECKSUM, None) if isinstance(tree, dict) else None
    expected = hashlib.sha256(_serialize(tree)).hexdigest()
    if seen != expected or data != _serialize({**tree, _CHECKSUM: seen}):
        raise DatasetError(
            f"{source} is damaged: its content has the checksum {expected[:12]}, it says {str(seen)[:12]}; "
            "copy it again from where the dataset was collected"
        )
    try:
        return kind.model_validate(tree)
    except DatasetError as error:  # of a validator of ours
        raise DatasetError(f"{source}: {error}") from error
    except ValidationError as error:
        raise DatasetError(f"{source} is not a {kind.__name__.lower()} of this project: {error}") from error


def _serialize(tree: Any) -> bytes:
    return (json.dumps(tree, indent=1, ensure_ascii=False) + "\n").encode()


_ABSENT = object()


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree:
        return {k: v for key, child in tree.items() for k, v in _leaves(child, f"{prefix}.{key}".lstrip(".")).items()}
    if isinstance(tree, list) and tree:
        return {k: v for i, child in enumerate(tree) for k, v in _leaves(child, f"{prefix}[{i}]").items()}
    return {prefix: tree}


def _shown(leaves: dict[str, Any], key: str) -> str:
    return repr(leaves[key]) if key in leaves else "nothing"
