"""JSON files are read an entry at a time, however they are wrapped; what is not JSON is named with its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import json_input
from shared.errors import PromptError
from shared.json_input import read_values


def read(path: Path, content: str | bytes) -> list[Any]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [value for _, value in read_values(path, PromptError, "EXAMPLE")]


ENTRIES = [{"text": "é" * 300_000, "i": i, "list": [[1], [2]], "nothing": None} for i in range(5)]  # beyond a block


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("packed", [False, True])
def test_lists_and_lines_plain_or_packed_with_a_byte_order_mark_or_without(
    tmp_path: Path, mark: str, packed: bool
) -> None:
    lines = "\r\n".join(json.dumps(entry) for entry in ENTRIES)
    for text in (json.dumps(ENTRIES, ensure_ascii=False, indent=1), "\n \n" + lines + "\n\n"):
        data = (mark + text).encode()
        assert read(tmp_path / "x", gzip.compress(data, mtime=0) if packed else data) == ENTRIES


def test_places_are_lines_of_lines_and_entries_of_lists(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text('\n{"a": 1}\n\n{"a": 2}')
    assert [where for where, _ in read_values(path, PromptError, "")] == [f"{path} line 2", f"{path} line 4"]
    path.write_text('[{"a": 1}, {"a": 2}]')
    assert [where for where, _ in read_values(path, PromptError, "")] == [f"{path}, entry 0", f"{path}, entry 1"]
    path.write_text('{\n"a": 1\n}\n')
    assert list(read_values(path, PromptError, "")) == [(str(path), {"a": 1})]


FILES: dict[str | bytes, str] = {
    "": r"is empty: it holds no entries; expected EXAMPLE",
    "[]": r"is an empty list: it holds no entries; expected EXAMPLE",
    "[{}": r"ends inside its list after 1 entries; the file is cut off",
    "[{},": r"ends inside its list after 1 entries; the file is cut off",
    "[{},]": r"entry 1 is not JSON: .* after '{},' at '\]': take out the comma before it",
    "[,{}]": r"entry 0 is not JSON: .* at ',{}\]'",
    "[{} {}]": r"entry 0 is followed by '{'; expected a comma and the next entry, or the list's end",
    "[{}] {}": r"there is more after the list's end",
    "[{}]]": r"there is more after the list's end",
    '[{"a": 1': r"entry 0 is not JSON: .* after '{\"a\": 1', where it ends",
    '[{"a": [1,]}]': r"entry 0 is not JSON: .*take out the comma before it",
    '[{"a" 1}' + " " * 5_000_000 + "]": r"entry 0 is not JSON: Expecting ':' delimiter",
    '{"a": 1}\n{"b": ': r"line 2 is not JSON: .*, where it ends",
    '{"a": 1} {"b": 2}': r"line 1 is not JSON: Extra data .* at '{\"b\": 2}'",
    '{\n"a": 1\n}\n{\n"a": 2\n}': r"line 1 is not JSON: .* does not end on its line: put the entries into a JSON list",
    '{"prompt": "...", "logits": [[0.1, ...], ...]}': r"line 1 .* this is a schematic example, whose .*; expected EX",
    '[{"prompt": <text>}]': r"entry 0 .* this is a schematic example, whose dots",
    "{'prompt': 'x'}": r"line 1 .* this is Python's notation: write the file with json.dump",
    '{"id": 1, "id": 2}': r"line 1: key 'id' stands twice in one object",
    "[" * 100_000: r"is not JSON that can be read: maximum recursion depth",
    "1" * 5000: r"is not JSON that can be read: Exceeds the limit",
    b"\xff\xfe{": r"is not UTF-8 text at byte 0: .*; save it as UTF-8",
    gzip.compress(b"{}" * 99, mtime=0)[:-9]: r"is a damaged gzip file: .* copy or compress it again",
    b"\x1f\x8b and no more": r"is a damaged gzip file",
}


@pytest.mark.parametrize("text", FILES)
def test_what_is_not_json_is_refused_with_its_place(tmp_path: Path, text: str | bytes) -> None:
    with pytest.raises(PromptError, match=FILES[text]):
        read(tmp_path / "x", text)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"cannot read .*missing: No such file or directory; expected EXAMPLE"):
        list(read_values(tmp_path / "missing", PromptError, "EXAMPLE"))
    with pytest.raises(PromptError, match=r"Is a directory"):
        list(read_values(tmp_path, PromptError, "EXAMPLE"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(entries=st.lists(st.dictionaries(st.text(), json_values, max_size=4), min_size=1), block=st.integers(1, 40))
def test_any_list_is_read_as_it_was_written_wherever_the_blocks_end(
    tmp_path_factory: pytest.TempPathFactory, entries: list[Any], block: int
) -> None:
    path = tmp_path_factory.mktemp("j") / "x"
    whole = json_input._BLOCK
    json_input._BLOCK = block
    try:
        assert read(path, json.dumps(entries)) == entries
        broken = json.dumps(entries, indent=1)[:-1]
        with pytest.raises(PromptError):
            read(path, broken)
        with pytest.raises(PromptError):
            read(path, broken + ",]")
    finally:
        json_input._BLOCK = whole
