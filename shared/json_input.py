"""JSON files that people hand in: a list, or one value a line; gzip or plain; with a byte-order mark or without.

Values come one at a time, so memory holds one, however large the file is. Stricter than Python's parser: commas stand
between the values of a list and nowhere else, and a key stands once in its object. NaN and Infinity, which are not JSON
but are often written, come as floats: whoever checks the value refuses them with their row and position.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from shared.errors import UserError

_BLOCK = 1 << 20
_SPACE = re.compile(r"[ \t\n\r]*")
_LONGEST_ATOM = 16
"""A literal, number or escape that fails this close to the end of what was read may only be cut there."""
_SCHEMATIC = "this is a schematic example, whose dots or brackets stand for values"
_HINTS = (
    (re.compile(r"\.\.|…|<"), _SCHEMATIC),
    (re.compile(r"None|True|False|'|nan|inf|array"), "this is Python's notation: write the file with json.dump"),
    (re.compile(r"[\]}]"), "take out the comma before it, or put back what is missing there"),
)


def read_values(path: Path, kind: type[UserError], example: str) -> Iterator[tuple[str, Any]]:
    """The file's values, each with `FILE line N` or, of a list, `FILE, entry N` for messages.

    Args:
        kind: of the errors. example: of what the file should be, for messages.

    Raises:
        kind: if the file cannot be read, is not JSON (naming the place), or holds nothing.
    """
    with _opened(path, kind, example) as file:
        space, start = "", file.read(1)
        while start and start.isspace():
            space, start = space + start, file.read(1)
        if start == "[":
            yield from _of_list(path, file, kind, example)
        elif start:
            yield from _of_lines(path, start + file.readline(), file, space.count("\n") + 1, kind, example)
        else:
            raise kind(f"{path} is empty: it holds no entries; expected {example}")


def read_lines(path: Path, kind: type[UserError], example: str) -> Iterator[tuple[str, str]]:
    """The lines of a text file that are not blank, without their ends, each with `FILE line N`.

    Raises:
        kind: if the file cannot be read, is not text, or is empty.
    """
    with _opened(path, kind, example) as file:
        number = None
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path} line {number}", line.rstrip("\n")
        if number is None:
            raise kind(f"{path} is empty: it holds no lines; expected {example}")


@contextmanager
def _opened(path: Path, kind: type[UserError], example: str) -> Iterator[TextIO]:
    """The file as text; what goes wrong with it inside the block is a `kind`."""
    try:
        with path.open("rb") as raw:
            unpacked: Any = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
            yield io.TextIOWrapper(unpacked, encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise kind(f"{path} is not UTF-8 text at byte {error.start}: {error.reason}; save it as UTF-8") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise kind(f"{path} is a damaged gzip file: {error}; copy or compress it again") from error
    except OSError as error:
        raise kind(f"cannot read {path}: {error.strerror}; expected {example}") from error


def is_schematic(value: object) -> bool:
    """Whether `value` is one of the dots that stand for values in an example."""
    return isinstance(value, str) and value.strip() in ("...", "…")


def _of_lines(
    path: Path, first: str, file: TextIO, number: int, kind: type[UserError], example: str
) -> Iterator[tuple[str, Any]]:
    for line_number, line in enumerate(itertools.chain([first], file), start=number):
        if not line.strip():
            continue
        where = f"{path} line {line_number}"
        try:
            value = _DECODER.decode(line)
        except (ValueError, RecursionError) as error:
            ends_early = isinstance(error, json.JSONDecodeError) and error.pos >= len(line.rstrip())
            if line_number == number and ends_early and (rest := file.read()):
                # One value over all the lines.
                try:
                    yield str(path), _DECODER.decode(line + rest)
                    return
                except (ValueError, RecursionError):
                    raise kind(
                        f"{_not_json(where, error)}; it does not end on its line: put the entries into a JSON list, or "
                        f"each on one line (jq -c . FILE); expected {example}"
                    ) from error
            raise kind(f"{_not_json(where, error)}; expected {example}") from error
        yield where, value


def _of_list(path: Path, file: TextIO, kind: type[UserError], example: str) -> Iterator[tuple[str, Any]]:
    text, at = "", 0

    def skip_space() -> str:
        """The next character that is no white space; "" at the end of the file."""
        nonlocal text, at
        while True:
            at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
            if at < len(text):
                return text[at]
            text, at = file.read(_BLOCK), 0
            if not text:
                return ""

    character = skip_space()
    if character == "]":
        raise kind(f"{path} is an empty list: it holds no entries; expected {example}")
    for number in itertools.count():
        where = f"{path}, entry {number}"
        while character:
            # The value must end in what was read; entries are objects, whose end is their brace.
            try:
                value, at = _DECODER.raw_decode(text, at)
                break
            except (ValueError, RecursionError) as error:
                is_cut = isinstance(error, json.JSONDecodeError) and (
                    error.pos >= len(text) - _LONGEST_ATOM or error.msg.startswith("Unterminated")
                )
                # Twice as much each time, so that an entry of any length is parsed a few times only.
                more = file.read(max(_BLOCK, len(text) - at)) if is_cut else ""
                if not more:
                    raise kind(f"{_not_json(where, error)}; expected {example}") from error
                text, at = text[at:] + more, 0
        else:
            raise kind(f"{path} ends inside its list after {number} entries; the file is cut off: copy it again")
        yield where, value
        character = skip_space()
        if character == "]":
            break
        if character == ",":
            at += 1
            character = skip_space()
        elif character:
            raise kind(f"{where} is followed by {character!r}; expected a comma and the next entry, or the list's end")
    at += 1
    if skip_space():
        raise kind(f"{path}: there is more after the list's end; expected one JSON list")


class _TwiceError(ValueError):
    """A key stands twice in one object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _TwiceError(f"key {twice!r} stands twice in one object; keep one of them")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _not_json(where: str, error: Exception) -> str:
    """Place and cause of what is not JSON."""
    if isinstance(error, _TwiceError):
        return f"{where}: {error}"
    if not isinstance(error, json.JSONDecodeError):  # nesting, or a number of thousands of digits
        return f"{where} is not JSON that can be read: {error}"
    before, after = error.doc[max(error.pos - 30, 0) : error.pos], error.doc[error.pos : error.pos + 30].rstrip()
    hint = next((f": {hint}" for pattern, hint in _HINTS if pattern.match(after)), "")
    return f"{where} is not JSON: {error.msg} after {before!r} at {after!r}{hint}" if after else (
        f"{where} is not JSON: {error.msg} after {before!r}, where it ends"
    )  # fmt: skip
