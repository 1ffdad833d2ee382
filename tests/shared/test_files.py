"""Small local files: whole, whoever else writes them at the same moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shared.files import write_json, write_text


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that end together all write the run's summary; the second one is at it when the first one renames."""
    target, replace, met = tmp_path / "runs/summary.json", Path.replace, []

    def replace_late(path: Path, to: Path) -> Path:
        if not met:
            met.append(path)
            write_json(target, {"worker": 2})
        return replace(path, to)

    monkeypatch.setattr(Path, "replace", replace_late)
    write_json(target, {"worker": 1})
    assert json.loads(target.read_text()) == {"worker": 1}
    assert [path.name for path in target.parent.iterdir()] == ["summary.json"]


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    text: Any = "\ud800"
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a", text)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]
