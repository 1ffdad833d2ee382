"""`student prepare` and `student audit` on a small dataset: resume, damage, both ways of reading, shifted rows."""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from shared.config import PipelineConfig, PrepareConfig
from shared.dataset.manifest import Provenance
from shared.dataset.records import Record
from shared.dataset.writer import DatasetWriter
from shared.errors import AlignmentError, CheckpointError, DatasetError, VocabularyError
from shared.tokenizer.vocabulary import load_tokenizer
from student.alignment.audit import audit
from student.alignment.prepare import prepare
from student.alignment.prepared import PreparedDataset
from student.alignment.sanity import check_alignment
from student.alignment.targets import AlignedSample, SparseTargets
from tests.fixtures.records import shifted, write_dataset
from tests.fixtures.texts import RowMaker, corpus

RECORDS, PER_UNIT = 8, 3


def train(directory: Path, size: int, **options: bool) -> Path:
    from student.model.tokenizer import train_tokenizer

    train_tokenizer([text[:20000] for text in corpus(6)], size, **options).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The teacher's and the student's, of different sizes and digit rules."""
    root = tmp_path_factory.mktemp("tokenizers")
    return train(root / "teacher", 1200), train(root / "student", 700, individual_digits=True)


@pytest.fixture(scope="module")
def records(tokenizers: tuple[Path, Path]) -> list[Record]:
    vocabulary, encoder = load_tokenizer(tokenizers[0])
    maker = RowMaker(vocabulary, encoder, seed=1)
    made = [maker.record(corpus(6)[0][start : start + 300], k=24) for start in range(0, 300 * RECORDS, 300)]
    return [
        replace(
            record,
            sample_id=f"sample-{n}",
            prompt_id=f"prompt-{n}",
            split="held_out" if n // PER_UNIT == 1 else "train",
        )
        for n, record in enumerate(made)
    ]


def write_records(path: Path, records: list[Record], tokenizer: Path, check: bool = True) -> Path:
    units = {f"unit-{n}": records[n * PER_UNIT : (n + 1) * PER_UNIT] for n in range(-(-len(records) // PER_UNIT))}
    write_dataset(path, units, check, tokenizer, top_k=24)
    return path


def pipeline(root: Path, **settings: object) -> PipelineConfig:
    return PipelineConfig.model_validate(
        {
            "name": "run",
            "runs": str(root),
            "teacher": {"model": "toy"},
            "collect": {"prompts": "prompts.jsonl", "decoding": [{"split": "train"}]},
            "student": {"checkpoint": None},
            "train": {"steps": 1},
            "prepare": {"workers": 1, **settings},
        }
    )


@pytest.fixture
def config(tmp_path: Path, records: list[Record], tokenizers: tuple[Path, Path]) -> PipelineConfig:
    made = pipeline(tmp_path)
    write_records(made.shards_dir, records, tokenizers[0])
    shutil.copytree(tokenizers[1], made.student_init_dir)
    return made


def assert_same_samples(left: PreparedDataset, right: PreparedDataset) -> None:
    assert len(left) == len(right) > 0
    np.testing.assert_array_equal(left.lengths, right.lengths)
    for i in range(len(left)):
        a, b = left[i], right[i]
        for holder_a, holder_b, kind in ((a, b, AlignedSample), (a.targets, b.targets, SparseTargets)):
            for field in fields(kind):
                x, y = getattr(holder_a, field.name), getattr(holder_b, field.name)
                if not isinstance(x, SparseTargets):
                    np.testing.assert_array_equal(x, y, field.name)
                    assert not isinstance(x, np.ndarray) or x.dtype == y.dtype, field.name


def test_prepared_samples_are_the_aligned_records(config: PipelineConfig, records: list[Record]) -> None:
    summary = prepare(config)
    prepared = PreparedDataset.open(config.prepared_dir)
    assert len(prepared) == summary.samples == RECORDS
    assert [prepared[i].sample_id for i in range(RECORDS)] == [record.sample_id for record in records]
    assert prepared.indices().tolist() == list(range(RECORDS))
    assert prepared.indices(split="held_out").tolist() == [3, 4, 5]
    assert prepared.indices(split="train", rule="greedy").tolist() == []
    assert prepared.lengths.tolist() == [len(prepared[i].input_ids) for i in range(RECORDS)]
    report = json.loads((config.prepared_dir / "summary.json").read_text())
    assert isinstance(report["counts"]["positions"], int)
    assert report["positions"] == sum(len(prepared[i].byte_ends) for i in range(RECORDS))
    assert 0.8 < report["supervised_fraction"] <= 1
    assert 0.5 < report["mapped_mass"] <= 1
    with pytest.raises(IndexError):
        prepared[RECORDS]


def test_a_second_call_does_nothing_and_a_changed_setting_does_all(config: PipelineConfig) -> None:
    first = prepare(config)
    assert first.units_done == 3
    before = {path: path.stat().st_mtime_ns for path in config.prepared_dir.rglob("*") if path.is_file()}
    assert prepare(config).units_done == 0
    assert {path: path.stat().st_mtime_ns for path in config.prepared_dir.rglob("*") if path.is_file()} == before
    changed = config.model_copy(update={"prepare": PrepareConfig(workers=1, min_known_mass=0.99)})
    old = PreparedDataset.open(config.prepared_dir).fingerprint
    second = prepare(changed)
    assert second.units_done == 3
    assert second.supervised_fraction < first.supervised_fraction
    assert PreparedDataset.open(config.prepared_dir).fingerprint != old


def test_an_interrupted_call_is_taken_up_where_it_stopped(
    config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    import student.alignment.prepare as module

    align = module._align_unit

    def stop_at_the_last(*arguments: object) -> dict[str, object]:
        if arguments[1] == "unit-2":
            raise KeyboardInterrupt
        return align(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_align_unit", stop_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    with pytest.raises(DatasetError, match="not finished"):
        PreparedDataset.open(config.prepared_dir)
    monkeypatch.undo()
    assert prepare(config).units_done == 1
    fresh = config.model_copy(update={"name": "fresh"})
    shutil.copytree(config.shards_dir, fresh.shards_dir)
    shutil.copytree(config.student_init_dir, fresh.student_init_dir)
    prepare(fresh)
    left, right = PreparedDataset.open(config.prepared_dir), PreparedDataset.open(fresh.prepared_dir)
    assert left.fingerprint == right.fingerprint
    assert_same_samples(left, right)


def test_damage_is_found_by_readers_and_mended_by_prepare(config: PipelineConfig) -> None:
    prepare(config)
    file = config.prepared_dir / "data" / "unit-1.arrow"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DatasetError, match=r"unit-1\.arrow is damaged"):
        PreparedDataset.of_run(config)
    assert prepare(config).units_done == 1
    assert PreparedDataset.open(config.prepared_dir)[PER_UNIT].sample_id == "sample-3"
    for name, content in (("index.parquet", b""), ("manifest.json", b"[]")):
        (config.prepared_dir / name).write_bytes(content)
        with pytest.raises(DatasetError, match=rf"{name} is damaged"):
            PreparedDataset.open(config.prepared_dir)
        assert prepare(config).units_done == 0
        PreparedDataset.open(config.prepared_dir)


def test_what_an_earlier_release_prepared_is_made_again(config: PipelineConfig) -> None:
    """Version 2 had its commits in `units`, and an index that does not say how long a row will be."""
    prepare(config)
    (config.prepared_dir / "commits").rename(config.prepared_dir / "units")
    manifest = config.prepared_dir / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 3', '"version": 2'))
    with pytest.raises(DatasetError, match="is of version 2, this program reads 3; run `student prepare` again"):
        PreparedDataset.open(config.prepared_dir)
    assert prepare(config).units_done == 3
    assert PreparedDataset.open(config.prepared_dir)[PER_UNIT].sample_id == "sample-3"
    assert {path.name for path in config.prepared_dir.iterdir()} == {
        "commits", "data", "index.parquet", "manifest.json", "summary.json", "verified.json",
    }  # fmt: skip


@pytest.mark.slow
def test_two_workers_prepare_what_one_does(config: PipelineConfig) -> None:
    settings = config.prepare.model_copy(update={"workers": 2})
    shared = config.model_copy(update={"name": "shared", "prepare": settings})
    shutil.copytree(config.shards_dir, shared.shards_dir)
    shutil.copytree(config.student_init_dir, shared.student_init_dir)
    prepare(config)
    prepare(shared)
    assert_same_samples(PreparedDataset.open(config.prepared_dir), PreparedDataset.open(shared.prepared_dir))


def fail_first(unit: str, directory: str, _store: object) -> None:
    """A worker's unit that takes its time and leaves a file; the first one fails at once."""
    if unit == "unit-0":
        raise AlignmentError("the first unit")
    (Path(directory) / unit).touch()
    time.sleep(0.2)


@pytest.mark.slow
def test_an_error_in_a_worker_does_not_wait_for_the_other_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import student.alignment.prepare as module

    monkeypatch.setattr(module, "_work", fail_first)
    monkeypatch.setattr(module, "_start_worker", print)
    begun = tmp_path / "begun"
    begun.mkdir()
    units = dict.fromkeys((f"unit-{n}" for n in range(60)), str(begun))
    with pytest.raises(AlignmentError, match="the first unit"):
        list(module._align_units(pipeline(tmp_path, workers=2), None, list(units), units))  # type: ignore[arg-type]
    assert len(list(begun.iterdir())) < 30


def test_what_is_missing_is_named(tmp_path: Path, config: PipelineConfig, tokenizers: tuple[Path, Path]) -> None:
    with pytest.raises(DatasetError, match="holds no prepared targets"):
        PreparedDataset.open(tmp_path / "nowhere")
    shutil.rmtree(config.student_init_dir)
    with pytest.raises(CheckpointError, match="student init"):
        prepare(config)
    shutil.copytree(tokenizers[1], config.student_init_dir)
    shutil.rmtree(config.shards_dir)
    with pytest.raises(DatasetError, match="holds no dataset"):
        prepare(config)
    assert not config.prepared_dir.exists()


def test_a_dataset_with_another_tokenizer_in_it_is_refused(
    tmp_path: Path, records: list[Record], tokenizers: tuple[Path, Path]
) -> None:
    """The files beside the shards are another tokenizer's, with a manifest that agrees."""
    other = pipeline(tmp_path / "other")
    vocabulary, _ = load_tokenizer(tokenizers[0])
    provenance = Provenance(
        teacher="toy", tokenizer_fingerprint=vocabulary.fingerprint, engine="test", dtype="float32", top_k=24
    )
    writer = DatasetWriter(other.shards_dir, provenance, vocabulary, tokenizers[1])
    writer.write_unit("unit-0", records[:2])
    writer.finish(["unit-0"])
    shutil.copytree(tokenizers[1], other.student_init_dir)
    with pytest.raises(VocabularyError, match="another tokenizer"):
        prepare(other)


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_a_damaged_tokenizer_of_the_dataset_is_an_error(
    config: PipelineConfig, tokenizers: tuple[Path, Path], damage: str
) -> None:
    file = config.shards_dir / "tokenizer" / "tokenizer.json"
    if damage == "changed":
        file.write_bytes(file.read_bytes().replace(b"merges", b"Merges"))
    else:
        file.unlink()
    message = r"tokenizer\.json is damaged: its sha256" if damage == "changed" else r"tokenizer\.json is missing, but"
    with pytest.raises(DatasetError, match=message):
        prepare(config)
    assert not config.prepared_dir.exists()
    with pytest.raises(DatasetError, match=message):
        audit(config.shards_dir, tokenizers[1], Console(quiet=True))


def test_a_dataset_without_the_teachers_tokenizer_is_refused(
    config: PipelineConfig, records: list[Record], tokenizers: tuple[Path, Path]
) -> None:
    vocabulary, _ = load_tokenizer(tokenizers[0])
    provenance = Provenance(
        teacher="toy", tokenizer_fingerprint=vocabulary.fingerprint, engine="test", dtype="float32", top_k=24
    )
    shutil.rmtree(config.shards_dir)
    writer = DatasetWriter(config.shards_dir, provenance, vocabulary, None)
    writer.write_unit("unit-0", records[:2])
    writer.finish(["unit-0"])
    message = rf"{config.shards_dir} holds no tokenizer files: it was made without; import it again with --tokenizer"
    with pytest.raises(DatasetError, match=message):
        prepare(config)
    assert not config.prepared_dir.exists()


# --- shifted rows ---------------------------------------------------------------------------------------


def test_rows_that_belong_to_their_text_pass(config: PipelineConfig) -> None:
    prepare(config)
    prepared = PreparedDataset.open(config.prepared_dir)
    assert check_alignment(prepared[i] for i in range(len(prepared))) > 0.2


def test_shifted_rows_are_refused_by_training_and_by_the_audit(
    tmp_path: Path, records: list[Record], tokenizers: tuple[Path, Path]
) -> None:
    wrong = pipeline(tmp_path)
    write_records(wrong.shards_dir, [shifted(record, -1) for record in records], tokenizers[0], check=False)
    shutil.copytree(tokenizers[1], wrong.student_init_dir)
    assert prepare(wrong).counts["contradictions"] > 0
    prepared = PreparedDataset.open(wrong.prepared_dir)
    with pytest.raises(AlignmentError, match=r"mean probability of 0\.\d+.*shift by one"):
        check_alignment(prepared[i] for i in range(len(prepared)))
    console = Console(record=True, width=140, file=(tmp_path / "out").open("w"))
    with pytest.raises(AlignmentError, match="do not belong together"):
        audit(wrong.shards_dir, tokenizers[1], console)
    assert "rows and tokens may be shifted" in console.export_text(), "the figures come before the verdict"


# --- the audit ------------------------------------------------------------------------------------------


def test_the_audit_tells_what_a_person_wants_to_know(
    config: PipelineConfig, tokenizers: tuple[Path, Path], tmp_path: Path
) -> None:
    console = Console(record=True, width=160, file=(tmp_path / "out").open("w"))
    report = audit(config.shards_dir, tokenizers[1], console)
    text = console.export_text()
    for part in (
        "student tokens that the teacher has",
        "digits in a token",
        "most frequent unmatched",
        "nats per byte",
        "teacher ─",
        "student ─",
    ):
        assert part in text
    assert report.full + report.partial + report.without == pytest.approx(1)
    assert report.digits[1] == 1
    assert 1 <= len(report.unmatched) <= 20
    assert all(b"".join(pieces) == token for token, _, pieces in report.unmatched)
    # Events may tell less than tokens, never more than a rounding.
    assert report.target_information == pytest.approx(report.teacher_information, abs=0.05)
    said = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert said["full"] == report.full
    assert said["digits"][1] == 1
    assert [entry["times"] for entry in said["unmatched"]] == [times for _, times, _ in report.unmatched]
    same = audit(config.shards_dir, tokenizers[0], console)
    assert (same.student_in_teacher, same.full, same.partial, same.unmatched) == (1, 1, 0, [])
    assert same.target_information == pytest.approx(same.teacher_information, rel=1e-4)


def test_the_commands_answer_a_mistake_with_one_message(
    tmp_path: Path, config: PipelineConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from student.cli import main

    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    monkeypatch.setattr("sys.argv", ["student", "prepare", str(path)])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0
    monkeypatch.setattr("sys.argv", ["student", "audit", str(tmp_path / "absent"), str(tmp_path)])
    with pytest.raises(SystemExit) as failed:
        main()
    assert failed.value.code == 2
    message = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert "error:" in message
    assert "holds no dataset" in message
    assert "Traceback" not in message
