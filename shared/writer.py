"""Writing a dataset in units of work that are there whole or not at all.

Any number of workers may hold a writer on one directory, each for its own units. A unit's shard is published first,
its commit file second; a worker that dies between the two leaves a shard that nobody trusts and the next one
replaces. `finish` writes the manifest when every expected unit is committed; readers trust nothing else.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shared.columns import records_to_table, same_content
from shared.errors import DatasetError
from shared.manifest import (
    COMMITS,
    DATA,
    MANIFEST,
    PROVENANCE,
    TOKENIZER,
    VOCABULARY,
    FileEntry,
    Manifest,
    Provenance,
    UnitEntry,
    dump,
    load,
)
from shared.records import Record
from shared.schema import SCHEMA_VERSION, parquet_options
from shared.storage import Storage, open_storage
from shared.vocabulary import Vocabulary

log = logging.getLogger(__name__)

ROW_GROUP_CANDIDATES = 1 << 20
"""A row group ends at the first record past this many candidates: readers decode one at a time."""
_UNIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


class DatasetWriter:
    """Adds units to the dataset at `path`, a directory or URL, new or begun.

    Args:
        provenance: what is collected, by what; a directory begun under another one is refused.
        vocabulary: the teacher's; stored beside the shards, and every id is checked against it.
        tokenizer_dir: the teacher's tokenizer files, copied beside the shards; None where there are none.
        check: False stores rows that contradict their own text, for tests that need a damaged dataset.
        advice: what to do where `path` was begun with another provenance.

    Raises:
        DatasetError: if `path` holds something else, or a dataset of another provenance (naming what differs).
    """

    def __init__(
        self,
        path: str | Path,
        provenance: Provenance,
        vocabulary: Vocabulary,
        tokenizer_dir: Path | None,
        check: bool = True,
        advice: str = "choose another directory, or go back to what it was begun with",
    ) -> None:
        if provenance.tokenizer_fingerprint != vocabulary.fingerprint:
            raise DatasetError(
                f"the provenance names the tokenizer {provenance.tokenizer_fingerprint[:12]}, the vocabulary given is "
                f"{vocabulary.fingerprint[:12]}; pass the vocabulary of the teacher that is collected from"
            )
        self._storage = open_storage(path)
        self._provenance = provenance
        self._vocabulary = vocabulary
        self._check = check
        self._claim(advice)
        self._storage.clear_partial()
        self._write_sidecars(tokenizer_dir)
        self._units = committed_units(self._storage)
        strangers = [unit for unit, entry in self._units.items() if entry.provenance != provenance.fingerprint]
        if strangers:
            raise DatasetError(
                f"unit {strangers[0]} in {self._storage.url} was collected under another provenance than "
                f"{PROVENANCE} states; the directory mixes two datasets: collect into a new one"
            )

    @property
    def committed(self) -> set[str]:
        """Units that are done, as far as this writer has seen: those found at its start and its own."""
        return set(self._units)

    def write_unit(self, name: str, records: Iterable[Record]) -> UnitEntry:
        """Publish the records of unit `name`, then its commit. A unit that is committed already stays as it is.

        Raises:
            DatasetError: if a record cannot be stored faithfully, a sample id comes twice, or the disk says no.
        """
        if not _UNIT_NAME.fullmatch(name):
            raise DatasetError(
                f"unit name {name!r} cannot be a file's name; use up to 200 letters, digits, dots, dashes, underscores"
            )
        if name in self._units:
            return self._units[name]
        batch = list(records)
        twice = [sample for sample, count in Counter(r.sample_id for r in batch).items() if count > 1]
        if twice:
            raise DatasetError(
                f"unit {name}: sample id {twice[0]!r} comes {Counter(twice)[twice[0]] + 1} times or more"
            )
        table = records_to_table(batch, len(self._vocabulary), check=self._check)
        data = shard_bytes(table)
        if not same_content(pq.read_table(pa.BufferReader(data)), table):
            raise DatasetError(
                f"unit {name}: the shard does not read back as it was written; check this machine's memory"
            )
        entry = UnitEntry(
            unit=name,
            file=f"{DATA}/{name}.parquet",
            sha256=hashlib.sha256(data).hexdigest(),
            bytes=len(data),
            rows=len(batch),
            tokens=sum(len(r.response_ids) for r in batch),
            candidates=sum(len(r.distributions.ids) for r in batch if r.distributions is not None),
            counts=dict(sorted(Counter(f"{r.split}/{r.sampling.rule}" for r in batch).items())),
            provenance=self._provenance.fingerprint,
        )
        return self.publish(entry, data)

    def publish(self, entry: UnitEntry, data: bytes) -> UnitEntry:
        """Publish a shard's bytes and its commit; another worker's commit of the same unit wins over ours."""
        with self._storage.lock():
            commit = f"{COMMITS}/{entry.unit}.json"
            if self._storage.size(commit) is not None:
                log.warning("unit %s was committed by another worker meanwhile; its shard is kept", entry.unit)
                entry = load(UnitEntry, self._storage.read(commit), self._storage.join(commit))
            else:
                self._storage.write(entry.file, data)
                self._storage.write(commit, dump(entry))
        self._units[entry.unit] = entry
        return entry

    def finish(self, expected_units: Collection[str]) -> Manifest:
        """Write the manifest over exactly `expected_units`, and clear what killed workers left.

        Raises:
            DatasetError: if a unit is missing, is not expected, or its shard is not the one that was committed.
        """
        self._units = committed_units(self._storage)
        missing = sorted(set(expected_units) - self._units.keys())
        if missing:
            raise DatasetError(
                f"{self._storage.url} is not complete: {len(missing)} of {len(set(expected_units))} units are missing, "
                f"such as {missing[0]}; run the same collection again, it does only what is missing"
            )
        extra = sorted(self._units.keys() - set(expected_units))
        if extra:
            raise DatasetError(
                f"{self._storage.url} holds {len(extra)} units that this collection does not have, such as {extra[0]}; "
                "the prompts or the units changed: collect into a new directory"
            )
        self._discard_uncommitted()
        units = [self._units[name] for name in sorted(self._units)]
        files = [
            self._file_entry(name)
            for name in (PROVENANCE, VOCABULARY, *self._storage.list(TOKENIZER), *self._storage.list(COMMITS))
        ]
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            provenance=self._provenance.fingerprint,
            vocabulary_fingerprint=self._vocabulary.fingerprint,
            rows=sum(u.rows for u in units),
            tokens=sum(u.tokens for u in units),
            bytes=sum(u.bytes for u in units),
            units=units,
            files=files,
        )
        self._storage.write(MANIFEST, dump(manifest))
        self._storage.clear_partial(everything=True)
        return manifest

    def _claim(self, advice: str) -> None:
        """Compare our provenance with the directory's, or write it where the directory is new."""
        there = _read_or_none(self._storage, PROVENANCE)
        if there is None:
            others = [name for name in self._storage.list() if not name.startswith(".")]
            if others:
                raise DatasetError(
                    f"{self._storage.url} holds {others[0]} and other files but no {PROVENANCE}: it is not a dataset; "
                    "choose a new or empty directory"
                )
            self._storage.write(PROVENANCE, dump(self._provenance))
            there = self._storage.read(PROVENANCE)
        found = load(Provenance, there, self._storage.join(PROVENANCE))
        differences = self._provenance.differences(found)
        if differences:
            raise DatasetError(
                f"{self._storage.url} was begun with another configuration:\n  "
                + "\n  ".join(differences)
                + f"\n{advice}"
            )
        if found.git_commit != self._provenance.git_commit:
            log.warning(
                "%s was begun at commit %s, this is %s",
                self._storage.url,
                found.git_commit,
                self._provenance.git_commit,
            )

    def _write_sidecars(self, tokenizer_dir: Path | None) -> None:
        if tokenizer_dir is not None:
            for file in tokenizer_files(tokenizer_dir):
                name = f"{TOKENIZER}/{file.relative_to(tokenizer_dir).as_posix()}"
                data = file.read_bytes()
                if _read_or_none(self._storage, name) != data:
                    self._storage.write(name, data)
        data = vocabulary_bytes(self._vocabulary)
        if _read_or_none(self._storage, VOCABULARY) != data:
            self._storage.write(VOCABULARY, data)

    def _discard_uncommitted(self) -> None:
        """Remove shards that were published by workers that died before their commit; every unit has one by now."""
        wanted = {entry.file for entry in self._units.values()}
        for name in self._storage.list(DATA):
            if name not in wanted:
                self._storage.delete(name)

    def _file_entry(self, name: str) -> FileEntry:
        data = self._storage.read(name)
        return FileEntry(name=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def committed_units(storage: Storage) -> dict[str, UnitEntry]:
    """Units with a commit whose shard is there in full; a commit without its shard is to be done again.

    Raises:
        DatasetError: if a commit file is damaged or its shard has another size.
    """
    sizes = storage.list(DATA)
    units: dict[str, UnitEntry] = {}
    for name in storage.list(COMMITS):
        entry = load(UnitEntry, storage.read(name), storage.join(name))
        if entry.file not in sizes:
            log.warning("%s is committed but gone; unit %s will be collected again", entry.file, entry.unit)
            storage.delete(name)
        elif sizes[entry.file] != entry.bytes:
            raise DatasetError(
                f"{storage.join(entry.file)} has {sizes[entry.file]} bytes, its commit says {entry.bytes}; it was "
                f"damaged or written twice at once: delete it and {name}, then run the same collection again"
            )
        else:
            units[entry.unit] = entry
    return units


def shard_bytes(table: pa.Table, options: Mapping[str, Any] | None = None) -> bytes:
    """`table` as a Parquet file whose row groups have about `ROW_GROUP_CANDIDATES` candidates.

    Args:
        options: of the Parquet writer, in place of `shared.schema.parquet_options()`; benchmarks compare others.
    """
    buffer = io.BytesIO()
    widths = [len(x) if x.is_valid else 0 for x in table["candidate_ids"]]
    with pq.ParquetWriter(buffer, table.schema, **(options or parquet_options())) as writer:
        writer.add_key_value_metadata(table.schema.metadata)
        start, size = 0, 0
        for i, width in enumerate(widths):
            size += width
            if size >= ROW_GROUP_CANDIDATES or i + 1 == len(widths):
                writer.write_table(table.slice(start, i + 1 - start), row_group_size=i + 1 - start)
                start, size = i + 1, 0
    return buffer.getvalue()


def vocabulary_bytes(vocabulary: Vocabulary) -> bytes:
    """The vocabulary's table as a Parquet file, with the id as its first column."""
    table = vocabulary.to_table()
    table = table.add_column(0, pa.field("id", pa.int32(), False), pa.array(range(len(vocabulary)), pa.int32()))
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def tokenizer_files(directory: Path) -> list[Path]:
    """What of a checkpoint's directory belongs to its tokenizer: everything but weights and model configuration.

    Raises:
        DatasetError: if there is nothing.
    """
    names = (
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
        "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json", "tekken.json",
    )  # fmt: skip
    found = [directory / name for name in names if (directory / name).is_file()]
    found += sorted((directory / "additional_chat_templates").glob("*.jinja"))
    if not found:
        raise DatasetError(f"{directory} holds no tokenizer files, expected one of {', '.join(names)}")
    return found


def _read_or_none(storage: Storage, name: str) -> bytes | None:
    try:
        return storage.read(name)
    except FileNotFoundError:
        return None
