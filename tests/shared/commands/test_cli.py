"""`shards …` as a person types it: answers, exit codes, and one message where something is wrong."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shared.commands.cli import main
from shared.commands.stats import measure
from shared.dataset.reader import Dataset
from tests.fixtures.records import make_record, make_records, save_byte_tokenizer, small_units, write_dataset
from tests.shared.dataset.test_writer import contents


def shards(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of `shards ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["shards", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "d", small_units())
    return tmp_path / "d"


def test_validate_answers_and_fails_with_code_2(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shards(monkeypatch, "validate", dataset) == 0
    assert "valid: 3 shards, 12 responses" in capsys.readouterr().out
    (dataset / "data/unit-001.parquet").unlink()
    assert shards(monkeypatch, "validate", dataset) == 2
    captured = capsys.readouterr()
    assert "unit-001.parquet is missing, but the manifest names it" in captured.err
    assert "Traceback" not in captured.err
    assert shards(monkeypatch, "validate", dataset / "nothing") == 2
    assert "holds no dataset (no manifest.json)" in capsys.readouterr().err


def test_stats_count_what_is_there_and_draw_it(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert shards(monkeypatch, "stats", dataset, "--json", "--picture", tmp_path / "p.png") == 0
    found = json.loads(capsys.readouterr().out)
    records = list(Dataset.open(dataset).records())
    rows = [r.distributions for r in records if r.distributions is not None]
    assert found["rows"] == 12
    assert found["tokens"] == sum(len(r.response_ids) for r in records)
    assert found["soft_tokens"] == sum(map(len, rows))
    tails = np.concatenate([d.tail for d in rows]).astype(np.float64)
    assert found["retained"]["8"] == pytest.approx(1 - tails.mean(), abs=1e-6)
    tops = np.concatenate([np.exp(d.logprobs[d.offsets[:-1]].astype(np.float64)) for d in rows])
    assert found["retained"]["1"] == pytest.approx(tops.mean(), abs=1e-6)
    assert sum(found["lengths"].values()) == 12
    assert found["bytes_per_token"] == pytest.approx(found["bytes"] / found["tokens"])
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert shards(monkeypatch, "stats", dataset) == 0
    assert "retained mass by k" in capsys.readouterr().out
    assert shards(monkeypatch, "stats", tmp_path / "not read", "--picture", tmp_path / "p.foo") == 2
    assert "p.foo: .foo is no kind of picture, expected one of" in " ".join(capsys.readouterr().err.split())


def test_stats_of_plain_conversations(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", {"u": make_records(3, soft=False)})
    statistics = measure(tmp_path / "d")
    assert (statistics.rows, statistics.soft_tokens, statistics.retained) == (3, 0, {})
    assert statistics.mean_logprob is None


def test_stats_count_the_longest_responses_too(tmp_path: Path) -> None:
    lengths = (0, 3, 20_000, 40_000, 50_000)
    records = [make_record(f"p{n}", n, length=n, soft=False) for n in lengths]
    write_dataset(tmp_path / "d", {"u": records})
    assert measure(tmp_path / "d").lengths == {1: 1, 4: 1, 32_768: 1, 65_536: 2}


def test_show_spells_tokens_and_candidates(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = Dataset.open(dataset)[1]
    assert shards(monkeypatch, "show", dataset, record.sample_id, "--candidates", 2, "--tokens", 3) == 0
    by_id = capsys.readouterr().out
    assert record.sample_id in by_id
    assert f"… {len(record.response_ids) - 3} more tokens" in by_id
    assert shards(monkeypatch, "show", dataset, 1, "--candidates", 2, "--tokens", 3) == 0
    assert capsys.readouterr().out == by_id
    assert shards(monkeypatch, "show", dataset, 99) == 2
    assert "record 99 does not exist: the dataset has records 0 to 11" in capsys.readouterr().err
    assert shards(monkeypatch, "show", dataset, "nobody") == 2
    assert "no record has the sample id 'nobody'" in capsys.readouterr().err


def test_show_finds_ids_that_are_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A number that a record has wins."""
    records = [replace(record, sample_id=name) for record, name in zip(make_records(2), ("1", "4711"), strict=True)]
    write_dataset(tmp_path / "d", {"u": records})
    for which, prompt in (("4711", "prompt-0-1"), ("1", "prompt-0-1"), ("0", "prompt-0-0")):
        assert shards(monkeypatch, "show", tmp_path / "d", which) == 0
        assert prompt in capsys.readouterr().out


def test_merge_joins_parts_of_one_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, tokenizer = tmp_path / "a", tmp_path / "b", save_byte_tokenizer(tmp_path / "tokenizer")
    write_dataset(a, {"u": make_records(3)}, tokenizer=tokenizer)
    write_dataset(b, {"u": make_records(2, seed=1), "v": make_records(2, seed=2)}, tokenizer=tokenizer, seed=5)
    assert shards(monkeypatch, "merge", a, b, tmp_path / "m") == 0
    assert "merged 2 datasets: 7 responses" in capsys.readouterr().out
    merged = Dataset.open(tmp_path / "m")
    expected = [r.sample_id for path in (a, b) for r in Dataset.open(path).records()]
    assert sorted(r.sample_id for r in merged.records()) == sorted(expected)
    assert [unit.unit for unit in merged.manifest.units] == ["u.00", "u.01", "v.01"]
    assert contents(merged.tokenizer_dir) == contents(tokenizer)
    assert shards(monkeypatch, "validate", tmp_path / "m") == 0
    before = contents(tmp_path / "m")
    assert shards(monkeypatch, "merge", a, b, tmp_path / "m") == 0
    assert contents(tmp_path / "m") == before
    capsys.readouterr()
    assert shards(monkeypatch, "merge", a, a, tmp_path / "n") == 2
    assert "3 samples are in more than one" in capsys.readouterr().err
    write_dataset(tmp_path / "c", {"w": make_records(1, seed=9)}, top_k=9)
    assert shards(monkeypatch, "merge", a, tmp_path / "c", tmp_path / "n") == 2
    assert "top_k: 8 there, 9 here" in capsys.readouterr().err
    assert not (tmp_path / "n").exists()


def test_merge_keeps_each_prompt_on_its_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of more prompts the same share holds out other ones."""
    tokenizer = save_byte_tokenizer(tmp_path / "tokenizer")
    for name, rule, side in (
        ("greedy", "greedy", "held_out"),
        ("sampled", "sample", "held_out"),
        ("moved", "sample", "train"),
    ):
        units = {"a": make_records(3, rule=rule), "b": make_records(2, seed=1, rule=rule, split=side)}
        write_dataset(tmp_path / name, units, tokenizer=tokenizer)
    assert shards(monkeypatch, "merge", tmp_path / "greedy", tmp_path / "sampled", tmp_path / "m") == 0
    assert shards(monkeypatch, "validate", tmp_path / "m") == 0
    capsys.readouterr()
    assert shards(monkeypatch, "merge", tmp_path / "greedy", tmp_path / "moved", tmp_path / "n") == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "2 prompts are on both sides of the split, such as 'prompt-1-0'" in message
    assert f"held_out in {tmp_path / 'greedy'} and train in {tmp_path / 'moved'}" in message
    assert not (tmp_path / "n").exists()


def test_merge_refuses_a_dataset_without_its_tokenizer(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "other", {"u": make_records(2, seed=1)})
    assert shards(monkeypatch, "merge", dataset, tmp_path / "other", tmp_path / "m") == 2
    assert f"{dataset} holds no tokenizer files: it was made without" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
