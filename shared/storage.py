"""Where a dataset lies: a local directory, or an object store through fsspec. Files appear whole or not at all.

Locally a file is written under a temporary name in `.partial/`, synced, read back, renamed, and the directory is
synced. On an object store it is one PUT, and what the store says it received is compared. Datasets never need more:
no append, no rename on stores, no listing for correctness beyond what the writer itself published.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shared.errors import DatasetError, MissingExtraError

PARTIAL = ".partial"
_FRESH_SECONDS = 60.0
_EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hf"}


class Storage(ABC):
    """Named files under one root. Names are relative, with `/`. Errors of the system become `DatasetError`."""

    url: str

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The whole file.

        Raises:
            FileNotFoundError: if there is none.
            DatasetError: if it cannot be read.
        """

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Publish `data` as `name`, replacing what is there; readers see the old file or the new one.

        Raises:
            DatasetError: if it cannot be written; what `name` was before is untouched.
        """

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of the file, None if there is none."""

    @abstractmethod
    def list(self, folder: str = "") -> dict[str, int]:
        """Every file under `folder`, by name, with its size; temporary files are left out."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove the file if it exists."""

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held around a short sequence of writes that other writers must not interleave with."""
        yield

    def clear_partial(self, everything: bool = False) -> None:  # noqa: B027 - stores leave nothing behind
        """Remove temporary files that killed writers left: those older than a minute, or all."""

    def join(self, name: str) -> str:
        """The file's full name, for messages."""
        return f"{self.url}/{name}"


class LocalStorage(Storage):
    """A directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def read(self, name: str) -> bytes:
        with self._explained(name, "read"):
            return (self.root / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        path = self.root / name
        with self._explained(name, "write"):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.root / PARTIAL / f"{path.name}.{secrets.token_hex(6)}"
            temporary.parent.mkdir(exist_ok=True)
            try:
                with temporary.open("xb") as file:
                    # Held until the file has its name: a lock that can be had marks what a killed writer left.
                    with suppress(OSError):
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                    if temporary.read_bytes() != data:
                        raise OSError(errno.EIO, "the file reads back other than it was written")
                    temporary.replace(path)
                _sync_directory(path.parent)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise

    def size(self, name: str) -> int | None:
        with self._explained(name, "read"):
            try:
                return (self.root / name).stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                return None

    def list(self, folder: str = "") -> dict[str, int]:
        with self._explained(folder or ".", "list"):
            base = self.root / folder
            found: dict[str, int] = {}
            if not base.is_dir():
                return found
            for path in sorted(base.rglob("*")):
                name = path.relative_to(self.root)
                if name.parts[0] != PARTIAL and path.is_file():
                    found[name.as_posix()] = path.stat().st_size
            return found

    def delete(self, name: str) -> None:
        with self._explained(name, "delete"):
            (self.root / name).unlink(missing_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        descriptor = os.open(self.root, os.O_RDONLY)
        try:
            # Network file systems may not lock; a unit written twice at once is then found by `finish`.
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def clear_partial(self, everything: bool = False) -> None:
        folder = self.root / PARTIAL
        if not folder.is_dir():
            return
        for path in folder.iterdir():
            with suppress(FileNotFoundError):
                if (everything or time.time() - path.stat().st_mtime > _FRESH_SECONDS) and _is_abandoned(path):
                    path.unlink(missing_ok=True)
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
        protocol = url.partition("://")[0]
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            extra = _EXTRAS.get(protocol)
            how = f"pip install 'llada-drafter[{extra}]'" if extra else f"install fsspec's package for {protocol}://"
            raise MissingExtraError(f"{url} needs a file system that is not installed ({error}); {how}") from error
        except ValueError as error:
            raise DatasetError(
                f"{url}: {error}; expected a local path, or a URL such as s3://bucket/dataset, gs://… or hf://…"
            ) from error
        # A listing or a size must be the store's, not what this process remembers of it.
        self._fs.use_listings_cache = False

    def read(self, name: str) -> bytes:
        with self._explained(name, "read"):
            return bytes(self._fs.cat_file(self._path(name)))

    def write(self, name: str, data: bytes) -> None:
        with self._explained(name, "write"):
            options: dict[str, Any] = {}
            if "s3" in _protocols(self._fs):
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

    def size(self, name: str) -> int | None:
        with self._explained(name, "read"):
            try:
                return int(self._fs.info(self._path(name))["size"])
            except FileNotFoundError:
                return None

    def list(self, folder: str = "") -> dict[str, int]:
        with self._explained(folder or ".", "list"):
            self._fs.invalidate_cache()
            try:
                found = self._fs.find(self._path(folder) if folder else self._root, detail=True)
            except FileNotFoundError:
                return {}
            prefix = len(self._root.rstrip("/")) + 1
            return {path[prefix:]: int(info["size"]) for path, info in sorted(found.items())}

    def delete(self, name: str) -> None:
        with self._explained(name, "delete"), suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    @contextmanager
    def _explained(self, name: str, action: str) -> Iterator[None]:
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
        DatasetError: if the URL's protocol is unknown.
        MissingExtraError: if the protocol's package is not installed.
    """
    text = str(path)
    if "://" not in text:
        return LocalStorage(Path(path))
    if text.startswith("file://"):
        return LocalStorage(Path(text.removeprefix("file://")))
    return ObjectStorage(text)


def file_sha256(path: Path) -> str:
    """sha256 of a local file, in bounded memory."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _protocols(filesystem: Any) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _is_abandoned(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks: age alone decides
            return time.time() - path.stat().st_mtime > 86_400
        return True


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
