"""Where a dataset lies: a local directory, or an object store through fsspec. Files appear whole or not at all.

Locally a file is written under a temporary name in `.partial/`, synced, read back, given its name by a link or a
rename, and the directory is synced. On an object store it is one PUT, and what the store says it received is compared.

`create` is what lets any number of workers share a dataset without a lock: one of them makes the file, the others are
told that it is there. It is link(2) on a disk, which network file systems keep too, and a conditional PUT
(`If-None-Match: *`) on a store. Datasets never need more: no append, no rename on stores; only claims are deleted.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import secrets
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from shared.errors import DatasetError, MissingExtraError

log = logging.getLogger(__name__)

PARTIAL = ".partial"
_ATTEMPTS = 100
"""Tries at a temporary file; each ends early only where another worker cleared `.partial` in a gap of microseconds."""
_STORE_ATTEMPTS = 5
_EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hf"}
_VERIFIED: set[tuple[str, int, int, int, int]] = set()
"""Local files of this process that had their checksum: sha256, device, inode, size, time of change."""
_FETCHED: list[tempfile.TemporaryDirectory[str]] = []
"""Local copies of a store's folders: a tokenizer may read its files long after the dataset is gone."""


class Storage(ABC):
    """Named files under one root. Names are relative, with `/`. Errors of the system become `DatasetError`."""

    url: str
    repair = (
        "copy it again from where the dataset was collected, or delete it and its commit and collect that unit again"
    )
    """What to do about a file that is damaged or missing, for messages."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The whole file.

        Raises:
            FileNotFoundError: if there is none.
            DatasetError: if it cannot be read.
        """

    def read_all(self, names: Iterable[str]) -> dict[str, bytes]:
        """Whole files, by name, in the order of `names`; a store is asked for many at once.

        Raises:
            FileNotFoundError, DatasetError: as `read`.
        """
        return {name: self.read(name) for name in names}

    def read_or_none(self, name: str) -> bytes | None:
        """`read`, and None where there is no such file."""
        try:
            return self.read(name)
        except FileNotFoundError:
            return None

    def read_verified(self, name: str, sha256: str) -> bytes:
        """The whole file.

        Raises:
            DatasetError: if it is missing or does not have that checksum.
        """
        data = self.read_or_none(name)
        if data is None:
            raise self._missing(name)
        self._compare(name, hashlib.sha256(data).hexdigest(), sha256)
        return data

    @abstractmethod
    def open_verified(self, name: str, sha256: str) -> Path | bytes:
        """The file after its checksum was compared, once in this process: its path where it is local, else its bytes.

        Raises:
            DatasetError: as `read_verified`.
        """

    @abstractmethod
    def local_folder(self, folder: str, checksums: Mapping[str, str]) -> Path:
        """A local directory that has the files of `folder`, given as name → sha256.

        Raises:
            DatasetError: as `read_verified`.
        """

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Publish `data` as `name`, replacing what is there; readers see the old file or the new one.

        Raises:
            DatasetError: if it cannot be written; what `name` was before is untouched.
        """

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Publish `data` as `name` where nothing has that name; False, and nothing changes, where something has.

        Of several that create one name at once, one is told True.

        Raises:
            DatasetError: if it cannot be written.
        """

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove the file if it is there, and a directory's folders that it leaves empty.

        Raises:
            DatasetError: if it cannot be removed.
        """

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of the file, None if there is none."""

    @abstractmethod
    def list(self, folder: str = "") -> dict[str, int]:
        """Every file under `folder`, by name, with its size; temporary files are left out."""

    def clear_partial(self) -> None:  # noqa: B027 - stores leave nothing behind
        """Remove temporary files whose writers are gone."""

    def join(self, name: str) -> str:
        """The file's full name, for messages."""
        return f"{self.url}/{name}"

    def _missing(self, name: str) -> DatasetError:
        return DatasetError(f"{self.join(name)} is missing, but the manifest names it; {self.repair}")

    def _compare(self, name: str, seen: str, expected: str) -> None:
        if seen != expected:
            raise DatasetError(
                f"{self.join(name)} is damaged: its sha256 is {seen[:12]}…, the manifest says {expected[:12]}…; "
                f"{self.repair}"
            )


class LocalStorage(Storage):
    """A directory.

    Args:
        repair: in place of `Storage.repair`.
    """

    def __init__(self, root: Path, repair: str = Storage.repair) -> None:
        self.root, self.repair = root, repair
        self.url = str(root)

    def read(self, name: str) -> bytes:
        with self._explained(name, "read"):
            return (self.root / name).read_bytes()

    def open_verified(self, name: str, sha256: str) -> Path:
        path = self.root / name
        try:
            with self._explained(name, "read"):
                status = path.stat()
                key = (sha256, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
                if key not in _VERIFIED:
                    self._compare(name, file_sha256(path), sha256)
                    _VERIFIED.add(key)
        except FileNotFoundError as error:
            raise self._missing(name) from error
        return path

    def local_folder(self, folder: str, checksums: Mapping[str, str]) -> Path:
        for name, sha256 in checksums.items():
            self.open_verified(name, sha256)
        return self.root / folder

    def write(self, name: str, data: bytes) -> None:
        self._publish(name, data, _replace)

    def create(self, name: str, data: bytes) -> bool:
        return self._publish(name, data, _link)

    def _publish(self, name: str, data: bytes, give_name: Callable[[Path, Path], bool]) -> bool:
        """Write a temporary file and give it its name; what `give_name` says."""
        path = self.root / name
        with self._explained(name, "write"):
            for attempt in range(_ATTEMPTS):
                temporary = self.root / PARTIAL / f"{path.name}.{secrets.token_hex(6)}"
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    temporary.parent.mkdir(exist_ok=True)
                    done = _fill(temporary, data, lambda temporary: give_name(temporary, path))
                    _sync_directory(path.parent)
                    return done
                except (FileNotFoundError, FileExistsError):
                    # Another worker removed the folder when it was empty, or the file before it had its lock. A folder
                    # that goes in the middle of `mkdir` was there to the system, and is no folder to Python.
                    if attempt + 1 == _ATTEMPTS:
                        raise
        raise AssertionError("the last attempt returns or raises")

    def delete(self, name: str) -> None:
        with self._explained(name, "delete"):
            (self.root / name).unlink(missing_ok=True)
            with suppress(OSError):  # the folder holds other files
                for folder in PurePosixPath(name).parents[:-1]:
                    (self.root / folder).rmdir()

    def size(self, name: str) -> int | None:
        with self._explained(name, "read"):
            try:
                return (self.root / name).stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                return None

    def list(self, folder: str = "") -> dict[str, int]:
        with self._explained(folder or ".", "list"):
            found: dict[str, int] = {}
            for place, folders, files in os.walk(self.root / folder, onerror=_unless_gone):
                folders[:] = [name for name in folders if name != PARTIAL]
                for path in (Path(place, name) for name in files):
                    with suppress(FileNotFoundError):
                        found[path.relative_to(self.root).as_posix()] = path.stat().st_size
            return dict(sorted(found.items()))

    def clear_partial(self) -> None:
        folder = self.root / PARTIAL
        with suppress(FileNotFoundError):
            for path in folder.iterdir():
                with suppress(FileNotFoundError):
                    _remove_abandoned(path)
        with suppress(OSError):  # another writer's file may be in it
            folder.rmdir()

    @contextmanager
    def _explained(self, name: str, action: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, FileNotFoundError) and action == "read":
                raise
            raise DatasetError(
                f"cannot {action} {self.join(name)}: {error.strerror or error}; {_fix(error)}"
            ) from error


class ObjectStorage(Storage):
    """A prefix in an object store, or in any other file system of fsspec that replaces a file in one step."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        self._last: tuple[str, bytes] | None = None
        protocol = url.partition("://")[0]
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except ImportError as error:
            extra = _EXTRAS.get(protocol)
            how = f"pip install 'llada-drafter[{extra}]'" if extra else f"install fsspec's package for {protocol}://"
            raise MissingExtraError(f"{url} needs a file system that is not installed ({error}); {how}") from error
        except ValueError as error:
            raise DatasetError(
                f"{url}: {error}; expected a local path, or a URL such as s3://bucket/dataset, gs://… or hf://…"
            ) from error

    def read(self, name: str) -> bytes:
        with self._explained(name, "read"):
            return bytes(self._fs.cat_file(self._path(name)))

    def open_verified(self, name: str, sha256: str) -> bytes:
        # The last file stays in memory, where it cannot change: a store would send all of it for every row group.
        last = self._last
        if last is None or last[0] != sha256:
            self._last = last = sha256, self.read_verified(name, sha256)
        return last[1]

    def local_folder(self, folder: str, checksums: Mapping[str, str]) -> Path:
        contents = {name: self.read_verified(name, sha256) for name, sha256 in checksums.items()}
        fetched = tempfile.TemporaryDirectory(prefix="llada-drafter-")
        _FETCHED.append(fetched)
        for name, data in contents.items():
            target = Path(fetched.name) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        return Path(fetched.name) / folder

    def read_all(self, names: Iterable[str]) -> dict[str, bytes]:
        paths = {name: self._path(name) for name in names}
        if not paths:
            return {}
        with self._explained(next(iter(paths)), "read"):
            found = self._fs.cat([*paths.values()])  # in an order of its own
            return {name: bytes(found[path]) for name, path in paths.items()}

    def write(self, name: str, data: bytes) -> None:
        with self._explained(name, "write"):
            self._put(name, data)

    def create(self, name: str, data: bytes) -> bool:
        with self._explained(name, "write"):
            for attempt in range(_STORE_ATTEMPTS):
                try:
                    self._put(name, data, mode="create")
                    return True
                except FileExistsError:
                    return False
                except Exception as error:  # each store has its own way to say that the name is taken
                    if self.size(name) is not None:
                        return False
                    if _is_unconditional(error):
                        break
                    if attempt + 1 == _STORE_ATTEMPTS:
                        raise
                    time.sleep(0.1 * 2**attempt)  # such as a conflict with a PUT that is not yet there
            log.warning(
                "%s has no conditional PUT: let one worker at a time write there, two could mix their shards of a unit",
                self.url,
            )
            self._put(name, data)
            return True

    def _put(self, name: str, data: bytes, **options: Any) -> None:
        if "s3" in self._fs.protocol:
            options["chunksize"] = max(len(data) + 1, 50 << 20)  # one PUT, never parts
        self._fs.pipe_file(self._path(name), data, **options)
        self._fs.invalidate_cache()
        info = self._fs.info(self._path(name))
        etag = str(info.get("ETag", "")).strip('"')
        received = int(info["size"])
        # A store's ETag is the MD5 of a plain PUT, unless the bucket encrypts; then the bytes are read back.
        if etag == hashlib.md5(data, usedforsecurity=False).hexdigest() and received == len(data):
            return
        if received != len(data) or bytes(self._fs.cat_file(self._path(name))) != data:
            raise OSError(errno.EIO, f"the store holds {received} bytes that differ from the {len(data)} sent")

    def delete(self, name: str) -> None:
        with self._explained(name, "delete"), suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def size(self, name: str) -> int | None:
        with self._explained(name, "read"):
            try:
                return int(self._fs.info(self._path(name))["size"])
            except FileNotFoundError:
                return None

    def list(self, folder: str = "") -> dict[str, int]:
        with self._explained(folder or ".", "list"):
            try:
                found = self._fs.find(self._path(folder) if folder else self._root, detail=True)
            except FileNotFoundError:
                return {}
            prefix = len(self._root.rstrip("/")) + 1
            # Asked for a folder that is empty, and has a file a moment later, s3fs answers with the folder itself.
            files = ((path, info) for path, info in sorted(found.items()) if info["type"] != "directory")
            return {path[prefix:]: int(info["size"]) for path, info in files}

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    @contextmanager
    def _explained(self, name: str, action: str) -> Iterator[None]:
        # A listing that the file system remembers does not know what other workers have written since.
        self._fs.invalidate_cache()
        try:
            yield
        except DatasetError:
            raise
        except Exception as error:  # each store has its own exceptions, not all of them OSError
            if isinstance(error, FileNotFoundError) and action == "read":
                raise
            raise DatasetError(
                f"cannot {action} {self.join(name)}: {error}; check the bucket, the credentials and the network, "
                "and run the same command again: what was committed stays"
            ) from error


def open_storage(path: str | Path) -> Storage:
    """The storage at a local path or a URL.

    Raises:
        DatasetError: if the URL's protocol is unknown, or credentials are in it.
        MissingExtraError: if the protocol's package is not installed.
    """
    text = str(path)
    if "://" not in text:
        return LocalStorage(Path(path))
    if text.startswith("file://"):
        return LocalStorage(Path(text.removeprefix("file://")))
    if "@" in urlsplit(text).netloc:
        raise DatasetError(
            f"the {text.partition(':')[0]}:// URL of a dataset carries credentials, which would end in logs; leave "
            "them out: the store's own variables are read, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    return ObjectStorage(text)


def file_sha256(path: Path) -> str:
    """sha256 of a local file, in bounded memory."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_unconditional(error: Exception) -> bool:
    """Whether the store, or its file system in Python, says that it has no conditional PUT."""
    response = getattr(error.__cause__, "response", None) or {}
    return isinstance(error, NotImplementedError | TypeError) or response.get("Error", {}).get("Code") in (
        "NotImplemented",
        "501",
    )


def _fill(temporary: Path, data: bytes, give_name: Callable[[Path], bool]) -> bool:
    """Write `temporary`, check it, and hold its lock until it has its name."""
    try:
        with temporary.open("xb") as file:
            # A lock that can be had marks what a killed writer left; between the two lines ours can be had, too.
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if temporary.read_bytes() != data:
                raise OSError(errno.EIO, "the file reads back other than it was written")
            return give_name(temporary)
    finally:
        temporary.unlink(missing_ok=True)


def _replace(temporary: Path, path: Path) -> bool:
    temporary.replace(path)
    return True


def _link(temporary: Path, path: Path) -> bool:
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        # A file system without hard links. Two workers could both find the name free; it has no better way.
        if path.exists():
            return False
        temporary.replace(path)
    return True


def _remove_abandoned(path: Path) -> None:
    """Remove a temporary file if nobody holds its lock."""
    with path.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:  # a file system without locks: age alone decides
            if time.time() - path.stat().st_mtime < 86_400:
                return
        path.unlink(missing_ok=True)


def _unless_gone(error: OSError) -> None:
    """A folder that is not there has no files; one that cannot be read is an error."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fix(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free some space, then run the same command again: what was committed stays"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "give yourself permission there, or choose another directory"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return "a file stands where a directory is needed; choose another directory"
    return "check the disk, then run the same command again: what was committed stays"
