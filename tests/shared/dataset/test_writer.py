"""Units are there whole or not at all; a second configuration, a full disk and a locked directory are told apart."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

import shared.dataset.writer
from shared.dataset.columns import records_to_table
from shared.dataset.reader import Dataset
from shared.dataset.validate import validate_dataset
from shared.dataset.writer import DatasetWriter, shard_bytes
from shared.errors import DatasetError
from shared.tokenizer.vocabulary import Vocabulary
from tests.fixtures.records import (
    byte_vocabulary,
    make_record,
    make_records,
    provenance,
    small_units,
    start,
    write_dataset,
)
from tests.shared.dataset.test_reader import assert_same


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_writing_costs_little_of_the_processor_that_decodes() -> None:
    """About 10 us a token; at zstd level 16, as once, 50 to 70. Processor time, so that a busy machine passes."""
    records = [make_record(f"r{i}", i, length=40, k=64, size=2000) for i in range(64)]
    seconds = []
    for _ in range(3):
        began = time.thread_time()
        shard_bytes(records_to_table(records, 2000))
        seconds.append(time.thread_time() - began)
    assert 1e6 * min(seconds) / (64 * 40) < 30


def test_a_second_sitting_repeats_nothing(tmp_path: Path) -> None:
    units = small_units()
    write_dataset(tmp_path / "whole", units)
    first = start(tmp_path / "d")
    first.write_unit("unit-001", units["unit-001"])
    stamp = (tmp_path / "d/data/unit-001.parquet").stat().st_mtime_ns
    second = start(tmp_path / "d", git_commit="a later commit")
    assert second.committed == {"unit-001"}
    for name, records in units.items():
        second.write_unit(name, records)
    second.finish(units)
    assert (tmp_path / "d/data/unit-001.parquet").stat().st_mtime_ns == stamp
    assert contents(tmp_path / "d") == contents(tmp_path / "whole")
    # A third one has nothing to do, and says the same.
    assert start(tmp_path / "d").finish(units) == Dataset.open(tmp_path / "whole").manifest
    assert contents(tmp_path / "d") == contents(tmp_path / "whole")


def test_a_second_configuration_is_refused_naming_both_values(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", small_units())
    before = contents(tmp_path / "d")
    with pytest.raises(DatasetError, match=r"top_k: 8 there, 16 here\n(.|\n)*another directory") as error:
        start(tmp_path / "d", top_k=16)
    assert "teacher" not in str(error.value)
    with pytest.raises(DatasetError, match="teacher: 'toy' there, 'other' here"):
        start(tmp_path / "d", teacher="other")
    other = byte_vocabulary(310)
    with pytest.raises(DatasetError, match=r"tokenizer_fingerprint: '[0-9a-f]{64}' there, '[0-9a-f]{64}' here"):
        DatasetWriter(tmp_path / "d", provenance(other), other, None)
    assert contents(tmp_path / "d") == before


def test_a_directory_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DatasetError, match=r"holds notes.txt and other files but no provenance.json"):
        start(tmp_path)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_a_sample_comes_once_in_a_unit_and_once_in_a_dataset(tmp_path: Path) -> None:
    records = make_records(3)
    target = start(tmp_path / "d")
    with pytest.raises(DatasetError, match=r"unit u: sample id 'prompt-0-1/greedy/0' comes 2 times"):
        target.write_unit("u", [*records, records[1]])
    assert target.committed == set()
    write_dataset(tmp_path / "e", {"a": records, "b": records[1:2]})
    assert any("comes 2 times" in problem for problem in validate_dataset(tmp_path / "e").problems)


def test_a_prompt_on_both_sides_of_the_split_is_found(tmp_path: Path) -> None:
    record = make_record("p", 1)
    write_dataset(tmp_path, {"a": [record], "b": [replace(record, sample_id="p/greedy/1", split="held_out")]})
    assert any("prompt 'p' is on both sides of the split" in problem for problem in validate_dataset(tmp_path).problems)


def test_finish_names_what_is_missing_and_what_is_too_much(tmp_path: Path) -> None:
    units = small_units()
    target = start(tmp_path / "d")
    target.write_unit("unit-000", units["unit-000"])
    with pytest.raises(DatasetError, match=r"2 of 3 units are missing, such as unit-001; run the same collection"):
        target.finish(units)
    with pytest.raises(DatasetError, match=r"unfinished: it has no manifest.json; run the collection again"):
        Dataset.open(tmp_path / "d")
    target.write_unit("stranger", units["unit-001"])
    with pytest.raises(DatasetError, match=r"holds 1 units that this collection does not have, such as stranger"):
        target.finish(["unit-000"])


def test_a_bad_record_publishes_nothing(tmp_path: Path) -> None:
    units = small_units()
    target = start(tmp_path / "d")
    target.write_unit("unit-000", units["unit-000"])
    before = contents(tmp_path / "d")
    other = make_records(2, size=400)  # another tokenizer's ids
    with pytest.raises(DatasetError, match=r"id \d+, .*another tokenizer's token"):
        target.write_unit("unit-001", other)
    assert contents(tmp_path / "d") == before
    two = [make_record("p", 1), make_record("q", 2, split="held_out")]
    with pytest.raises(DatasetError, match="unit unit-001 holds records of held_out and train, expected one split"):
        target.write_unit("unit-001", two)
    assert contents(tmp_path / "d") == before
    with pytest.raises(DatasetError, match="cannot be a file's name"):
        target.write_unit("../escape", units["unit-001"])


def test_what_a_killed_worker_left_is_cleared(tmp_path: Path) -> None:
    units = small_units()
    first = start(tmp_path / "d")
    first.write_unit("unit-000", units["unit-000"])
    # A shard without its commit, and a temporary file.
    (tmp_path / "d/data/unit-001.parquet").write_bytes(b"PAR1 half")
    (tmp_path / "d/.partial").mkdir(exist_ok=True)
    (tmp_path / "d/.partial/unit-002.parquet.abc").write_bytes(b"half")
    second = start(tmp_path / "d")
    assert second.committed == {"unit-000"}
    for name, records in units.items():
        second.write_unit(name, records)
    second.finish(units)
    write_dataset(tmp_path / "whole", units)
    assert contents(tmp_path / "d") == contents(tmp_path / "whole")
    assert not (tmp_path / "d/.partial").exists()


def test_a_damaged_commit_and_a_cut_shard_stop_the_next_session(tmp_path: Path) -> None:
    units = small_units()
    start(tmp_path / "d").write_unit("unit-000", units["unit-000"])
    shard, commit = tmp_path / "d/data/unit-000.parquet", tmp_path / "d/commits/unit-000.json"
    whole, text = shard.read_bytes(), commit.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(DatasetError, match=rf"has {len(whole) - 10} bytes, its commit says {len(whole)}"):
        start(tmp_path / "d")
    shard.write_bytes(whole)
    commit.write_bytes(text.replace(b'"rows": 4', b'"rows": 5'))
    with pytest.raises(DatasetError, match=r"commits/unit-000.json is damaged"):
        start(tmp_path / "d")
    commit.write_bytes(text)
    shard.unlink()
    assert start(tmp_path / "d").committed == set()


def test_long_units_are_cut_into_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared.dataset.writer, "ROW_GROUP_CANDIDATES", 100)
    records = make_records(20)
    write_dataset(tmp_path / "d", {"u": records})
    dataset = Dataset.open(tmp_path / "d")
    tables = list(dataset.tables(["sample_id"]))
    assert len(tables) > 5
    for index in (0, 7, 19):
        assert_same(dataset[index], records[index], exact=False)
    assert validate_dataset(tmp_path / "d").problems == []


FULL_DISK = """
import resource, sys
from pathlib import Path
from shared.console import run
from tests.fixtures.records import make_records, start
target = start(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
run(lambda: target.write_unit("unit-001", make_records(40)))
"""

NO_PERMISSION = """
import os, sys
from pathlib import Path
from shared.console import run
from tests.fixtures.records import start
if os.geteuid() == 0:  # root is refused nothing by mode bits
    os.setgid(65534)
    os.setuid(65534)
run(lambda: start(Path(sys.argv[1])))
"""


def run_script(script: str, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, cwd=Path(__file__).parents[3]
    )


def test_a_full_disk_ends_in_one_message_and_leaves_what_was_committed(tmp_path: Path) -> None:
    """A limit on file sizes stands for the full disk: the system refuses the write halfway, in the same call."""
    start(tmp_path / "d").write_unit("unit-000", make_records(2))
    before = contents(tmp_path / "d")
    result = run_script(FULL_DISK, tmp_path / "d")
    assert result.returncode == 2, result.stderr
    message = " ".join(result.stderr.split())
    assert "cannot write" in message
    assert "free some space, then run the same command again: what was committed stays" in message
    assert "Traceback" not in message
    assert contents(tmp_path / "d") == before


def test_a_directory_without_permission_is_named() -> None:
    # Not in tmp_path, whose parents belong to the user alone.
    with tempfile.TemporaryDirectory() as folder:
        locked = Path(folder)
        locked.chmod(0o555)
        result = run_script(NO_PERMISSION, locked / "d")
        message = " ".join(result.stderr.split())
        assert result.returncode == 2, message
        assert f"cannot write {locked}/d/provenance.json: Permission denied; give yourself permission there" in message
        assert not (locked / "d").exists()


def test_a_path_below_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match=r"cannot .*file/d/provenance.json: Not a directory; a file stands"):
        start(tmp_path / "file/d")


def test_a_vocabulary_of_another_teacher_is_refused(tmp_path: Path) -> None:
    vocabulary: Vocabulary = byte_vocabulary()
    with pytest.raises(DatasetError, match=r"the provenance names the tokenizer .*, the vocabulary given is"):
        DatasetWriter(tmp_path / "d", provenance(vocabulary), byte_vocabulary(310), None)
    assert not (tmp_path / "d").exists()
