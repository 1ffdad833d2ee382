"""A store of units of work: each is there whole or not at all, whoever works on it and whoever dies.

    DIR/data/…               one file per unit, whatever it holds
    DIR/commits/UNIT.json    written after the file: the unit is done

The logit dataset (`shared.dataset.writer`) and the student's prepared targets are kept in it. Any number of workers may
hold one on one directory, on one machine or many, and need no lock. What makes it so:

1. A unit's file is created once (`Storage.create`); the first worker's stays, unless it is not fit to be adopted.
2. A commit is written after its file, and says what the file that is there holds: a worker that finds a file without a
   commit, of a worker that died or is not yet so far, commits that one in place of its own. So whoever writes the
   commit, and however often, it is the same.
3. Commits are listed before files: a commit that is listed has its file in the later listing.
4. Whoever finishes writes a manifest over what it listed; readers trust nothing else.

Workers that share a store without a coordinator divide its units by `shared.dataset.claims`, which saves them the work
that another one does; the store is right without it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Generic, NoReturn, TypeVar

from shared.dataset.manifest import COMMITS, DATA, Commit, dump, load
from shared.dataset.storage import Storage
from shared.errors import DatasetError

log = logging.getLogger(__name__)

Entry = TypeVar("Entry", bound=Commit)


def commit_file(unit: str) -> str:
    """The name of a unit's commit."""
    return f"{COMMITS}/{unit}.json"


def _refuse(error: DatasetError) -> NoReturn:
    raise error


class UnitStore(Generic[Entry]):
    """The units at `storage`; `kind` is what their commits say."""

    def __init__(self, storage: Storage, kind: type[Entry]) -> None:
        self.storage = storage
        self._kind = kind

    def committed(self, damaged: Callable[[DatasetError], object] = _refuse) -> dict[str, Entry]:
        """Units with a commit whose file is there in full; a commit without its file is to be done again.

        Args:
            damaged: told of a commit that is damaged or whose file has another size. Raises by default; where it
                returns, the unit is left out.
        """
        commits = list(self.storage.list(COMMITS))
        sizes = self.storage.list(DATA)  # after the commits: each of those had its file before it was there itself
        units: dict[str, Entry] = {}
        for name, data in self.storage.read_all(commits).items():
            try:
                entry = load(self._kind, data, self.storage.join(name))
                if entry.file not in sizes:
                    log.warning("%s is committed but gone; unit %s will be done again", entry.file, entry.unit)
                elif sizes[entry.file] != entry.bytes:
                    raise DatasetError(
                        f"{self.storage.join(entry.file)} has {sizes[entry.file]} bytes, its commit says "
                        f"{entry.bytes}; it was damaged, or deleted and not yet made again: delete it and {name}, "
                        "then run the same command again"
                    )
                else:
                    units[entry.unit] = entry
            except DatasetError as error:
                damaged(error)
        return units

    def committed_names(self) -> set[str]:
        """Units with a commit, by one listing: what others have done meanwhile."""
        return {PurePosixPath(name).stem for name in self.storage.list(COMMITS)}

    def is_committed(self, unit: str) -> bool:
        """Whether the unit has a commit now."""
        return self.storage.size(commit_file(unit)) is not None

    def publish(self, entry: Entry, data: bytes, adopt: Callable[[bytes], Entry | None]) -> Entry:
        """Publish a unit's file, then its commit.

        Args:
            adopt: given the bytes of another file that has the unit's name already: the entry of that file, which
                stays; or None, and ours replaces it.

        Returns:
            The entry that is committed.
        """
        if not self.storage.create(entry.file, data):
            there = self.storage.read(entry.file)
            if there != data:
                adopted = adopt(there)
                if adopted is None:
                    self.storage.write(entry.file, data)
                entry = adopted or entry
        self.storage.write(commit_file(entry.unit), dump(entry))
        return entry
