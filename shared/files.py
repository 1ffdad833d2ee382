"""Local files: written so that what has its name is whole (a temporary name first, then a rename), and read as JSON."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shared.errors import CheckpointError, UserError


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A name to write a file under, which becomes `path` when the block ends well; else it is removed.

    A reader of `path` sees the old file or the new one, and of several writers the last one's.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.{secrets.token_hex(6)}.partial{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `path` in one step."""
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON in one step."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(
    path: Path,
    kind: type[UserError] = CheckpointError,
    fix: str = "copy it again, or run the command that wrote it again",
) -> dict[str, Any] | None:
    """The JSON object at `path`; None where there is no such file.

    Raises:
        UserError: of this `kind`, with the `fix`, if it cannot be read or is not a JSON object.
    """
    try:
        tree = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise kind(f"{path} cannot be read ({error}); {fix}") from error
    if not isinstance(tree, dict):
        raise kind(f"{path} holds {type(tree).__name__}, expected a JSON object; {fix}")
    return tree


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `path` when the block ends well; else it is removed. An older `path` is
    replaced then.

    For one process at a time: it clears what a killed one left, and cannot tell that from another's work.
    """
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
