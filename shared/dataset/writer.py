"""Writing a dataset: records checked, encoded and published in units of work (`shared.dataset.units`)."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shared.dataset.card import dataset_card
from shared.dataset.checks import check_records
from shared.dataset.claims import clear_claims
from shared.dataset.columns import open_parquet, records_to_table, same_content, table_to_records
from shared.dataset.manifest import (
    DATA,
    MANIFEST,
    PROVENANCE,
    TOKENIZER,
    VOCABULARY,
    FileEntry,
    Manifest,
    Provenance,
    UnitEntry,
    check_unit_name,
    dump,
    load,
    split_of,
)
from shared.dataset.records import Record
from shared.dataset.schema import FAILURES_KEY, SCHEMA_VERSION, parquet_options
from shared.dataset.storage import open_storage
from shared.dataset.units import UnitStore, commit_file
from shared.errors import DatasetError
from shared.hub import CARD
from shared.tokenizer.vocabulary import Vocabulary

log = logging.getLogger(__name__)

ROW_GROUP_CANDIDATES = 1 << 20
"""A row group ends at the first record past this many candidates: readers decode one at a time."""


class DatasetWriter:
    """Adds units to the dataset at `path`, a directory or URL, new or begun.

    Args:
        provenance: what is collected, by what; a directory begun under another one is refused.
        vocabulary: the teacher's; stored beside the shards, and every id is checked against it.
        tokenizer_dir: the teacher's tokenizer files, copied beside the shards; None where another writer has done so.
        advice: what to do where `path` was begun with another provenance.

    Attributes:
        store: the units of all workers, and where they lie.

    Raises:
        DatasetError: if `path` holds something else, or a dataset of another provenance (naming what differs).
    """

    def __init__(
        self,
        path: str | Path,
        provenance: Provenance,
        vocabulary: Vocabulary,
        tokenizer_dir: Path | None,
        advice: str = "choose another directory, or go back to what it was begun with",
    ) -> None:
        if provenance.tokenizer_fingerprint != vocabulary.fingerprint:
            raise DatasetError(
                f"the provenance names the tokenizer {provenance.tokenizer_fingerprint[:12]}, the vocabulary given is "
                f"{vocabulary.fingerprint[:12]}; pass the vocabulary of the teacher that is collected from"
            )
        self.store = UnitStore(open_storage(path), UnitEntry)
        self._provenance = provenance
        self._vocabulary = vocabulary
        self._claim(advice)
        self.store.storage.clear_partial()
        self._write_sidecars(tokenizer_dir)
        self._units = self.store.committed()
        strangers = [unit for unit, entry in self._units.items() if entry.provenance != provenance.fingerprint]
        if strangers:
            raise DatasetError(
                f"unit {strangers[0]} in {self.store.storage.url} was collected under another provenance than "
                f"{PROVENANCE} states; the directory mixes two datasets: collect into a new one"
            )

    @property
    def committed(self) -> set[str]:
        """Units that are done, as far as this writer has seen: those found at its start and its own."""
        return set(self._units)

    @property
    def failures(self) -> dict[str, dict[str, str]]:
        """Samples without a response, with the reason, by unit: of the units in `committed`."""
        return {unit: entry.failures for unit, entry in self._units.items() if entry.failures}

    def refresh(self) -> None:
        """Take in what others have committed meanwhile."""
        self._units = self.store.committed()

    def begun(self) -> set[str]:
        """Units that have a shard or a commit, by anyone."""
        shards = {Path(name).stem for name in self.store.storage.list(DATA) if name.endswith(".parquet")}
        return shards | self.store.committed_names()

    def write_unit(self, name: str, records: Iterable[Record], failures: Mapping[str, str] | None = None) -> UnitEntry:
        """Publish the records of unit `name`, then its commit. A unit that is committed already stays as it is.

        Args:
            failures: samples of the unit that have no response, with the reason, by id.

        Raises:
            DatasetError: if a record cannot be stored faithfully, a sample id comes twice, the records are of two
                splits, or the disk says no.
        """
        check_unit_name(name)
        if name in self._units:
            return self._units[name]
        batch = list(records)
        for sample, count in Counter(record.sample_id for record in batch).most_common(1):
            if count > 1:
                raise DatasetError(f"unit {name}: sample id {sample!r} comes {count} times")
        table = records_to_table(batch, len(self._vocabulary))
        if failures:
            reasons = json.dumps(dict(sorted(failures.items())), ensure_ascii=False)
            table = table.replace_schema_metadata({**table.schema.metadata, FAILURES_KEY: reasons})
        data = shard_bytes(table)
        if not same_content(open_parquet(data, f"unit {name}").read(use_threads=False), table):
            raise DatasetError(
                f"unit {name}: the shard does not read back as it was written; check this machine's memory"
            )
        entry = unit_entry(name, table, data, self._provenance.fingerprint)
        split_of(entry)  # one, or none
        return self.publish(entry, data)

    def publish(self, entry: UnitEntry, data: bytes) -> UnitEntry:
        """Publish a shard's bytes and its commit; another worker's shard of the same unit wins over ours."""
        entry = self.store.publish(entry, data, lambda there: self._adopt(entry, there, data))
        self._units[entry.unit] = entry
        return entry

    def finish(self, expected_units: Collection[str]) -> Manifest:
        """Write the card and the manifest over exactly `expected_units`, and clear what killed workers left.

        Raises:
            DatasetError: if a unit is missing, is not expected, or its shard is not the one that was committed.
        """
        storage, self._units = self.store.storage, self.store.committed()
        missing = sorted(set(expected_units) - self._units.keys())
        if missing:
            raise DatasetError(
                f"{storage.url} is not complete: {len(missing)} of {len(set(expected_units))} units are missing, "
                f"such as {missing[0]}; run the same collection again, it does only what is missing"
            )
        extra = sorted(self.begun() - set(expected_units))
        if extra:
            raise DatasetError(
                f"{storage.url} holds {len(extra)} units that this collection does not have, such as {extra[0]}; "
                "the prompts or the units changed: collect into a new directory"
            )
        units = [self._units[name] for name in sorted(self._units)]
        names = (PROVENANCE, VOCABULARY, *storage.list(TOKENIZER), *map(commit_file, sorted(self._units)))
        files = [
            FileEntry(name=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            for name, data in storage.read_all(names).items()
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
        storage.create(CARD, dataset_card(manifest, self._provenance).encode())
        storage.write(MANIFEST, dump(manifest))
        clear_claims(storage)
        storage.clear_partial()
        return manifest

    def _claim(self, advice: str) -> None:
        """Compare our provenance with the directory's, or write it where the directory is new."""
        storage = self.store.storage
        there = storage.read_or_none(PROVENANCE)
        if there is None:
            others = [name for name in storage.list() if not name.startswith(".")]
            # Another worker's files lie beside its provenance, which it wrote first.
            if others and storage.size(PROVENANCE) is None:
                raise DatasetError(
                    f"{storage.url} holds {others[0]} and other files but no {PROVENANCE}: it is not a dataset; "
                    "choose a new or empty directory"
                )
            storage.create(PROVENANCE, dump(self._provenance))
            there = storage.read(PROVENANCE)
        found = load(Provenance, there, storage.join(PROVENANCE))
        differences = self._provenance.differences(found)
        if differences:
            raise DatasetError(
                f"{storage.url} was begun with another configuration:\n  " + "\n  ".join(differences) + f"\n{advice}"
            )
        if found.git_commit != self._provenance.git_commit:
            ours = self._provenance.git_commit
            log.warning("%s was begun at commit %s, this is %s", storage.url, found.git_commit, ours)

    def _write_sidecars(self, tokenizer_dir: Path | None) -> None:
        files = {VOCABULARY: vocabulary_bytes(self._vocabulary)}
        if tokenizer_dir is not None:
            for file in tokenizer_files(tokenizer_dir):
                files[f"{TOKENIZER}/{file.relative_to(tokenizer_dir).as_posix()}"] = file.read_bytes()
        for name, data in files.items():
            if self.store.storage.read_or_none(name) != data:
                self.store.storage.write(name, data)

    def _adopt(self, ours: UnitEntry, there: bytes, data: bytes) -> UnitEntry | None:
        """The entry of the shard that has our unit's name already; None for a file that is no shard of it.

        No worker leaves such a file: something else put or damaged it.
        """
        name = self.store.storage.join(ours.file)
        try:
            table = read_shard(there, name)
            check_records([*table_to_records(table)], len(self._vocabulary))
            theirs = unit_entry(ours.unit, table, there, ours.provenance)
            # Requests that failed for one worker may have passed for the other: together they are the unit's samples.
            if _samples(table, theirs) == _samples(read_shard(data, "ours"), ours):
                log.warning("unit %s was published by another worker meanwhile; its shard is kept", ours.unit)
                return theirs
            why = f"it holds other records than unit {ours.unit}"
        except DatasetError as error:
            why = str(error)
        log.warning("%s, which has no commit, is replaced: %s", name, why)
        return None


def unit_entry(name: str, table: pa.Table, data: bytes, provenance: str) -> UnitEntry:
    """What the commit of unit `name` says of its shard: `table`, stored as `data`."""
    kinds = zip(table["split"].to_pylist(), table["rule"].to_pylist(), strict=True)
    return UnitEntry(
        unit=name,
        file=f"{DATA}/{name}.parquet",
        sha256=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
        rows=table.num_rows,
        tokens=pc.sum(pc.list_value_length(table["response_ids"])).as_py() or 0,
        candidates=pc.sum(pc.list_value_length(table["candidate_ids"])).as_py() or 0,
        counts=dict(sorted(Counter(f"{split}/{rule}" for split, rule in kinds).items())),
        provenance=provenance,
        failures=json.loads((table.schema.metadata or {}).get(FAILURES_KEY.encode(), b"{}")),
    )


def _samples(table: pa.Table, entry: UnitEntry) -> list[str]:
    return sorted([*table["sample_id"].to_pylist(), *entry.failures])


def read_shard(data: bytes, source: str) -> pa.Table:
    """The table of a shard's bytes, whose checksum nothing has vouched for yet.

    Raises:
        DatasetError: if they are no shard of this schema, or damaged.
    """
    try:
        return open_parquet(data, source).read()
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{source} cannot be read: {error}") from error


def shard_bytes(table: pa.Table) -> bytes:
    """`table` as a Parquet file whose row groups have about `ROW_GROUP_CANDIDATES` candidates."""
    buffer = pa.BufferOutputStream()
    widths = pc.list_value_length(table["candidate_ids"]).fill_null(0).to_pylist()
    with pq.ParquetWriter(buffer, table.schema, **parquet_options()) as writer:
        writer.add_key_value_metadata(table.schema.metadata)
        start, size = 0, 0
        for i, width in enumerate(widths):
            size += width
            if size >= ROW_GROUP_CANDIDATES or i + 1 == len(widths):
                writer.write_table(table.slice(start, i + 1 - start), row_group_size=i + 1 - start)
                start, size = i + 1, 0
    return buffer.getvalue().to_pybytes()


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
