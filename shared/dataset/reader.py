"""Reading a dataset: verified once, in bounded memory, in the stored order or by number.

Nothing is trusted but the manifest and what its checksums vouch for. A shard's sha256 is computed before its first
byte is decoded, once per process and version of the file; a shard in an object store is fetched whole, checked and
read from memory. One row group (16k tokens at k = 64: 8 MB) is decoded at a time, whatever the dataset's size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from shared.dataset.columns import open_parquet, table_to_records
from shared.dataset.manifest import (
    MANIFEST,
    PROVENANCE,
    TOKENIZER,
    VOCABULARY,
    Manifest,
    Provenance,
    UnitEntry,
    load,
)
from shared.dataset.records import Record
from shared.dataset.schema import DISTRIBUTION_COLUMNS, SCHEMA
from shared.dataset.storage import Storage, open_storage
from shared.errors import DatasetError
from shared.tokenizer.vocabulary import Vocabulary


class Dataset:
    """A finished dataset; make one with `Dataset.open`. Its records are numbered in the manifest's order of units."""

    def __init__(self, storage: Storage, manifest: Manifest) -> None:
        self.storage = storage
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path) -> Dataset:
        """The dataset at a directory or URL.

        Raises:
            DatasetError: if there is none, it is unfinished, its manifest is damaged or of a later version.
        """
        storage = open_storage(path)
        return cls(storage, read_manifest(storage))

    def __len__(self) -> int:
        return self.manifest.rows

    def __getitem__(self, index: int) -> Record:
        """Record `index`, negative counting from the end. Decodes its whole row group: `records` is for many."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        row = index % len(self)
        for unit in self.manifest.units:
            if row < unit.rows:
                break
            row -= unit.rows
        file, group = open_shard(self.storage, unit), 0
        while row >= (rows := file.metadata.row_group(group).num_rows):
            row, group = row - rows, group + 1
        return next(table_to_records(self._read_group(unit, file, group, None).slice(row, 1)))

    @cached_property
    def provenance(self) -> Provenance:
        """Raises `DatasetError` where it is damaged."""
        return load(Provenance, self._read_file(PROVENANCE), self.storage.join(PROVENANCE))

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The teacher's vocabulary; raises `DatasetError` where it is damaged."""
        return Vocabulary.from_table(pq.read_table(pa.BufferReader(self._read_file(VOCABULARY))))

    @cached_property
    def tokenizer_dir(self) -> Path:
        """A local directory with the teacher's tokenizer files, checked.

        Raises:
            DatasetError: if the dataset has none, or one is damaged.
        """
        names = {e.name: e.sha256 for e in self.manifest.files if e.name.startswith(f"{TOKENIZER}/")}
        if not names:
            raise DatasetError(
                f"{self.storage.url} holds no tokenizer files: it was made without; import it again with --tokenizer"
            )
        return self.storage.local_folder(TOKENIZER, names)

    def records(
        self,
        split: str | None = None,
        rule: str | None = None,
        distributions: bool = True,
        unit: str | None = None,
    ) -> Iterator[Record]:
        """Records in order, one row group in memory.

        Args:
            split: `train` or `held_out` only. rule: that decoding rule only.
            distributions: False leaves the distribution columns unread; `Record.distributions` is None then.
            unit: that unit only.

        Raises:
            DatasetError: if a shard is missing or damaged.
        """
        units = [u for u in self.manifest.units if unit in (None, u.unit) and _has(u, split, rule)]
        columns = None if distributions else [name for name in SCHEMA.names if name not in DISTRIBUTION_COLUMNS]
        for table in self.tables(columns, units):
            for record in table_to_records(table):
                if split in (None, record.split) and rule in (None, record.sampling.rule):
                    yield record

    def tables(
        self, columns: Sequence[str] | None = None, units: Sequence[UnitEntry] | None = None
    ) -> Iterator[pa.Table]:
        """Row groups (of these units only) as Arrow tables of the columns named, checked like everything else."""
        for unit in self.manifest.units if units is None else units:
            file = open_shard(self.storage, unit)
            for group in range(file.metadata.num_row_groups):
                yield self._read_group(unit, file, group, columns)

    def _read_group(self, unit: UnitEntry, file: pq.ParquetFile, group: int, columns: Sequence[str] | None) -> pa.Table:
        try:
            return file.read_row_group(group, columns=list(SCHEMA.names if columns is None else columns))
        except (pa.ArrowException, OSError) as error:
            raise DatasetError(f"{self.storage.join(unit.file)} cannot be read: {error}") from error

    def _read_file(self, name: str) -> bytes:
        entry = next((entry for entry in self.manifest.files if entry.name == name), None)
        if entry is None:
            raise DatasetError(f"the manifest of {self.storage.url} does not name {name}; the dataset is not complete")
        return self.storage.read_verified(name, entry.sha256)


def read_manifest(storage: Storage) -> Manifest:
    """The manifest; errors as `Dataset.open`."""
    try:
        data = storage.read(MANIFEST)
    except FileNotFoundError as error:
        if storage.size(PROVENANCE) is not None:
            raise DatasetError(
                f"{storage.url} is unfinished: it has no {MANIFEST}; run the collection again, "
                "it does only what is missing"
            ) from error
        raise DatasetError(
            f"{storage.url} holds no dataset (no {MANIFEST}); collect one with `teacher collect CONFIG`, "
            "or import one with `shards import-json FILE DIR`"
        ) from error
    return load(Manifest, data, storage.join(MANIFEST))


def open_shard(storage: Storage, unit: UnitEntry) -> pq.ParquetFile:
    """The unit's shard, its checksum verified before anything of it is decoded.

    Raises:
        DatasetError: if it is missing, damaged or not of this schema.
    """
    return open_parquet(storage.open_verified(unit.file, unit.sha256), storage.join(unit.file))


def _has(unit: UnitEntry, split: str | None, rule: str | None) -> bool:
    return any(split in (None, key.partition("/")[0]) and rule in (None, key.partition("/")[2]) for key in unit.counts)
