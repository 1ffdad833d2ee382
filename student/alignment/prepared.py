"""Prepared targets on disk: aligned once, read at random by every training process.

DIR/data/UNIT.arrow      Arrow IPC, one record batch per sample, zstd; a sample costs one small read
DIR/commits/UNIT.json    written after the data: the unit is done, with its checksum, counts and part of the index
DIR/index.parquet        one row per sample: ids, split, rule, skill, lengths, where it lies
DIR/manifest.json        written last; readers trust nothing else
DIR/verified.json        units whose checksum was compared, with the size and time of change that they had then

Units are kept in `shared.dataset.units.UnitStore`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from shared.config import PipelineConfig
from shared.console import progress
from shared.dataset.manifest import COMMITS, DATA, MANIFEST, Commit, check_unit_name
from shared.dataset.records import offsets_of
from shared.dataset.storage import LocalStorage
from shared.dataset.units import UnitStore
from shared.errors import CheckpointError, DatasetError
from shared.files import read_json, write_json
from student.alignment.targets import AlignedSample, SparseTargets
from student.lineage import IDENTITY, prepared_identity, present, require_current_start, require_same

VERSION = 3
INDEX = "index.parquet"
VERIFIED = "verified.json"
_AGAIN = "run `student prepare` again"

_TEXT = ("sample_id", "prompt_id", "split", "rule", "skill")
_ARRAYS: dict[str, pa.DataType] = {
    "input_ids": pa.int32(),
    "byte_ends": pa.int64(),
    "is_anchor": pa.uint8(),
    "observed_logprob": pa.float32(),
    "anchor_logprob": pa.float32(),
    "event_counts": pa.int32(),
    "event_mass": pa.float32(),
    "member_counts": pa.int32(),
    "members": pa.int32(),
    "tail": pa.float32(),
    "known": pa.float32(),
}
_OF_TARGETS = ("event_mass", "members", "tail", "known")
_OF_TEXT = dict.fromkeys(_TEXT, pa.string())
SCHEMA = pa.schema(_OF_TEXT | {"prompt_length": pa.int32()} | {name: pa.list_(kind) for name, kind in _ARRAYS.items()})
_COUNTS = ("batch", "prompt_length", "length", "soft", "anchors")
INDEX_SCHEMA = pa.schema(
    _OF_TEXT | {"unit": pa.string()} | dict.fromkeys(_COUNTS, pa.int32()) | {"with_distributions": pa.bool_()}
)


class PreparedUnit(Commit):
    """A unit that is aligned: what made it (`key`), what was met on the way, and its samples' rows of the index."""

    key: str
    counts: dict[str, int | float]
    index: list[dict[str, Any]]


def unit_store(directory: Path) -> UnitStore[PreparedUnit]:
    """The units of the prepared targets at `directory`."""
    return UnitStore(LocalStorage(directory, repair=f"{_AGAIN}, it mends this"), PreparedUnit)


class PreparedDataset:
    """Aligned samples by number; make one with `of_run`, or with `open` for the index alone.

    Attributes:
        lengths: int64 [n], student tokens of each sample, prompt and response.
        prompt_lengths: int64 [n], student tokens of each sample's prompt.
        soft: int64 [n], positions of each sample that have a soft target.
        anchors: int64 [n], positions of each sample's response where a block can start.
        with_distributions: bool [n], whether the sample's record holds distributions.
        fingerprint: sha256 over what the samples were made from.
        identity: the dataset, the tokenizer and the settings that they were made from (`student.lineage`).
    """

    def __init__(self, directory: Path, manifest: dict[str, Any], index: pa.Table) -> None:
        self.directory, self.manifest = directory, manifest
        self.lengths, self.prompt_lengths, self.soft, self.anchors = (
            index[name].to_numpy().astype(np.int64) for name in ("length", "prompt_length", "soft", "anchors")
        )
        self.with_distributions: NDArray[np.bool_] = np.asarray(index["with_distributions"].to_pylist(), dtype=bool)
        self.fingerprint: str = manifest["fingerprint"]
        self.identity: dict[str, Any] = manifest[IDENTITY]
        self._index = {name: index[name].to_pylist() for name in ("split", "rule", "unit", "batch")}

    @classmethod
    def open(cls, directory: str | Path) -> PreparedDataset:
        """The prepared targets at `directory`.

        Raises:
            DatasetError: if there are none, they are unfinished, damaged or of another version.
        """
        directory = Path(directory)
        try:
            manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
            index_bytes = (directory / INDEX).read_bytes()
        except FileNotFoundError as error:
            unfinished = (directory / COMMITS).is_dir()
            state = "is not finished" if unfinished else "holds no prepared targets"
            raise DatasetError(f"{directory} {state}; run `student prepare` with this config") from error
        except ValueError as error:
            raise DatasetError(f"{directory / MANIFEST} is damaged ({error}); {_AGAIN}") from error
        if not isinstance(manifest, dict):
            raise DatasetError(f"{directory / MANIFEST} is damaged (it is no JSON object); {_AGAIN}")
        if (version := manifest.get("version")) != VERSION:
            raise DatasetError(f"{directory} is of version {version}, this program reads {VERSION}; {_AGAIN}")
        if hashlib.sha256(index_bytes).hexdigest() != manifest["index_sha256"]:
            raise DatasetError(f"{directory / INDEX} is damaged: its checksum differs; {_AGAIN}")
        if IDENTITY not in manifest:
            raise DatasetError(
                f"{directory} does not record the dataset and tokenizer that it was made from: an earlier version of "
                f"this program wrote it; {_AGAIN}, which keeps what is aligned"
            )
        return cls(directory, manifest, pq.read_table(pa.BufferReader(index_bytes)))

    @classmethod
    def of_run(cls, config: PipelineConfig) -> PreparedDataset:
        """The run's prepared targets, if they are of the start, dataset and settings that are there now, and whole.

        Raises:
            DatasetError: as `open` and `verify`. StaleError: if they, or the start, are to be made again.
        """
        prepared = cls.open(config.prepared_dir)
        now = prepared_identity(config.prepare, present(config, "dataset", "teacher vocabulary", "tokenizer"))
        require_same(prepared.directory, prepared.identity, now, _AGAIN, config)
        require_current_start(config)
        prepared.verify()
        return prepared

    def verify(self) -> None:
        """Compare every unit with its checksum.

        Raises:
            DatasetError: naming the first unit that is missing or damaged.
        """
        checksums = {unit: entry["sha256"] for unit, entry in self.manifest["units"].items()}
        for error in damaged_units(self.directory, checksums).values():
            raise error

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> AlignedSample:
        """Sample `number`, 0 ≤ number < len. `verify` is what says that its unit is whole."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        file = self.directory / data_file(check_unit_name(self._index["unit"][number]))
        return batch_to_sample(_opened(file, file.stat().st_mtime_ns).get_batch(self._index["batch"][number]))

    def indices(self, split: str | None = None, rule: str | None = None) -> NDArray[np.int64]:
        """Numbers of the samples of a split and of a decoding rule, rising; None takes every one."""
        pairs = zip(self._index["split"], self._index["rule"], strict=True)
        chosen = [i for i, (a, b) in enumerate(pairs) if split in (None, a) and rule in (None, b)]
        return np.array(chosen, dtype=np.int64)


@lru_cache(16)
def _opened(file: Path, _changed: int) -> pa.ipc.RecordBatchFileReader:
    """A unit's file: opening one takes a fifth of reading a sample. It is opened again where it was written again."""
    return pa.ipc.open_file(pa.memory_map(str(file)))


def damaged_units(directory: Path, checksums: Mapping[str, str]) -> dict[str, DatasetError]:
    """What is wrong with each unit that is missing or differs from its checksum.

    Reads in parallel what it has not compared before: `verified.json` keeps the size and time of change of the files
    that were right, for later runs and for the other ranks of the node.
    """
    storage = unit_store(directory).storage
    try:
        stamps = read_json(directory / VERIFIED) or {}
    except CheckpointError:  # a damaged one says nothing
        stamps = {}
    right: dict[str, list[Any]] = {}
    damaged: dict[str, DatasetError] = {}

    def compare(unit: str) -> None:
        try:
            status = (directory / data_file(unit)).stat()
            stamp = [checksums[unit], status.st_size, status.st_mtime_ns]
            if stamps.get(unit) != stamp:
                storage.open_verified(data_file(unit), checksums[unit])
            right[unit] = stamp
        except FileNotFoundError:
            damaged[unit] = DatasetError(f"{directory / data_file(unit)} is missing; {_AGAIN}, it mends this")
        except DatasetError as error:
            damaged[unit] = error

    with ThreadPoolExecutor() as pool, progress() as bar:  # hashing leaves the interpreter to the other threads
        task = bar.add_task("Checking targets", total=len(checksums), note="", visible=len(stamps) < len(checksums))
        for _ in pool.map(compare, checksums):
            bar.update(task, advance=1)
    if right != stamps and directory.is_dir():
        write_json(directory / VERIFIED, right)
    return damaged


def data_file(unit: str) -> str:
    """The name of a unit's file."""
    return f"{DATA}/{unit}.arrow"


def unit_bytes(samples: Iterable[AlignedSample]) -> bytes:
    """One unit's samples as an Arrow file."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(sink, SCHEMA, options=options) as writer:
        for sample in samples:
            writer.write_batch(sample_to_batch(sample))
    data: bytes = sink.getvalue().to_pybytes()
    return data


def sample_to_batch(sample: AlignedSample) -> pa.RecordBatch:
    """One sample as a record batch of one row."""
    targets = sample.targets
    counts = {"event_counts": np.diff(targets.event_offsets), "member_counts": np.diff(targets.member_offsets)}
    arrays = [pa.array([getattr(sample, name)], pa.string()) for name in _TEXT]
    arrays.append(pa.array([sample.prompt_length], pa.int32()))
    for name, kind in _ARRAYS.items():
        values = counts[name] if name in counts else getattr(targets if name in _OF_TARGETS else sample, name)
        flat = pa.array(values.astype(kind.to_pandas_dtype(), copy=False))
        arrays.append(pa.ListArray.from_arrays(pa.array([0, len(flat)], pa.int32()), flat))
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def batch_to_sample(batch: pa.RecordBatch) -> AlignedSample:
    """The inverse of `sample_to_batch`; arrays are views of the batch where their type allows it."""
    arrays = {name: batch.column(name).values.to_numpy(zero_copy_only=False) for name in _ARRAYS}
    arrays["is_anchor"] = arrays["is_anchor"].astype(np.bool_)
    targets = SparseTargets(
        event_offsets=offsets_of(arrays.pop("event_counts")),
        member_offsets=offsets_of(arrays.pop("member_counts")),
        **{name: arrays.pop(name) for name in _OF_TARGETS},
    )
    text = {name: batch.column(name)[0].as_py() for name in (*_TEXT, "prompt_length")}
    return AlignedSample(**text, **arrays, targets=targets)
