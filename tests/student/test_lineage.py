"""Stale products are refused by every command that joins them, with both values and the way out."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from shared.config import PipelineConfig
from shared.dataset.reader import Dataset
from shared.errors import CheckpointError, DatasetError, StaleError
from shared.files import write_json
from shared.tokenizer.vocabulary import load_tokenizer
from student.alignment.prepare import prepare
from student.evaluation.evaluate import evaluate, outstanding
from student.evaluation.report import write_report
from student.lineage import (
    differences,
    evaluation_identity,
    require_current_start,
    speculation_identity,
    tokenizer_fingerprint,
    warn_of_another_teacher,
)
from student.model.export import export_student, load_student, save_student, weights_fingerprint
from student.model.initialize import initialize_student
from student.model.sequential_head import add_sequential_head
from student.training.checkpoint import run_identity
from student.training.train import check, decide, identity_of, is_finished
from tests.fixtures.toy_run import load_toy, write_toy_shards

STEPS = ["train.steps=2"]
HEXADECIMAL = r"[0-9a-f]{12}"


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("toy")
    config = load_toy(directory, STEPS)
    write_toy_shards(config, train=24, held_out=4)
    initialize_student(config)
    prepare(config)
    # What training leaves, without its minutes: the start's weights and the identity of this very run.
    model, tokenizer = load_student(config.student_init_dir)
    model.config.draft_block_length = config.train.block_length
    save_student(model, tokenizer, config.student_final_dir)
    record = {"steps": 2, "tokens": 99, "identity": identity_of(config, check(config, 1))}
    write_json(config.student_final_dir / "training.json", record)
    return directory


@pytest.fixture
def config(trained_run: Path, tmp_path: Path) -> PipelineConfig:
    """A toy run up to and with its trained model, to do as one likes with."""
    shutil.copytree(trained_run, tmp_path, dirs_exist_ok=True)
    return load_toy(tmp_path, STEPS)


def changed(config: PipelineConfig, *overrides: str) -> PipelineConfig:
    return load_toy(config.runs.parent, [*STEPS, *overrides])


def replace_shards(config: PipelineConfig) -> None:
    """Another collection at the same path: units of the same names, other records."""
    shutil.rmtree(config.shards_dir)
    write_toy_shards(config, train=23, held_out=4)


def train(config: PipelineConfig, *overrides: str, ranks: int) -> subprocess.CompletedProcess[str]:
    """Run `student train`; with `ranks`, as a launcher of the user's own would."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    options = [word for override in (*STEPS, *overrides) for word in ("--set", override)]
    program = [sys.executable, *launcher, "-m", "student.cli", "train", str(config.runs.parent / "toy.yaml"), *options]
    return subprocess.run(program, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


# --- prepared targets -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    ["student.tokenizer.individual_digits=true", "student.tokenizer.vocab_size=320"],
    ids=["of the same size", "of another size"],
)
def test_another_tokenizer_without_preparing_again(config: PipelineConfig, override: str) -> None:
    check(config, 1)
    other = changed(config, override)
    before = len(load_tokenizer(config.student_init_dir)[0])
    initialize_student(other)
    assert (len(load_tokenizer(config.student_init_dir)[0]) == before) == ("digits" in override)
    message = (
        rf"{config.prepared_dir} was made from other inputs or settings than those of now "
        rf"\(tokenizer: {HEXADECIMAL} there, {HEXADECIMAL} now in {config.student_init_dir}\); "
        "run `student prepare` again"
    )
    with pytest.raises(StaleError, match=message):
        check(other, 1)
    prepare(other)
    check(other, 1)


def test_another_dataset_at_the_same_path(config: PipelineConfig) -> None:
    replace_shards(config)
    message = rf"dataset: {HEXADECIMAL} there, {HEXADECIMAL} now in {config.shards_dir}\); run `student prepare` again"
    with pytest.raises(StaleError, match=message):
        check(config, 1)
    with pytest.raises(StaleError, match=message):
        evaluate(config)
    assert prepare(config).units_done == 1, "the held-out shards are what they were"
    check(config, 1)


def test_where_the_shards_are_not_training_goes_on(config: PipelineConfig) -> None:
    shutil.rmtree(config.shards_dir)
    check(config, 1)


def test_settings_of_prepare_that_were_not_prepared_with(config: PipelineConfig) -> None:
    with pytest.raises(StaleError, match=r"prepare\.min_known_mass: 0\.5 there, 0\.9 now\); run `student prepare`"):
        check(changed(config, "prepare.min_known_mass=0.9"), 1)
    check(changed(config, "prepare.workers=2"), 1)


def test_targets_of_an_earlier_version_are_asked_for_again_and_kept(config: PipelineConfig) -> None:
    manifest = config.prepared_dir / "manifest.json"
    tree = json.loads(manifest.read_text())
    del tree["identity"]
    manifest.write_text(json.dumps(tree))
    with pytest.raises(DatasetError, match=r"does not record the dataset and tokenizer .* run `student prepare` again"):
        check(config, 1)
    assert prepare(config).units_done == 0
    check(config, 1)


def test_preparing_again_settles_whatever_is_refused(config: PipelineConfig) -> None:
    """The tokenizer's files differ, its tokens and the shards do not: nothing is aligned again, the record is."""
    settings = Path(config.teacher.model) / "tokenizer_config.json"
    settings.write_text(settings.read_text() + "\n")
    from shared.dataset.writer import DatasetWriter

    dataset = Dataset.open(config.shards_dir)
    writer = DatasetWriter(config.shards_dir, dataset.provenance, dataset.vocabulary, Path(config.teacher.model))
    writer.finish([unit.unit for unit in dataset.manifest.units])
    with pytest.raises(StaleError, match="dataset"):
        check(config, 1)
    assert prepare(config).units_done == 0
    check(config, 1)


# --- the start ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [prepare, lambda config: check(config, 1)], ids=["prepare", "train"])
def test_a_start_that_other_settings_made(config: PipelineConfig, command: object) -> None:
    with pytest.raises(StaleError, match=r"student\.tokenizer: .* run `student init` again"):
        command(changed(config, "student.tokenizer.vocab_size=330"))  # type: ignore[operator]
    with pytest.raises(StaleError, match=r"seed: 0 there, 1 now\); run `student init` again"):
        command(changed(config, "seed=1"))  # type: ignore[operator]


def test_a_start_of_a_checkpoint_that_was_replaced(config: PipelineConfig, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(config.student_init_dir, checkpoint)
    other = changed(config, f"student.checkpoint={checkpoint}", "student.tokenizer.kind=checkpoint")
    initialize_student(other)
    require_current_start(other)
    model, tokenizer = load_student(checkpoint)
    next(model.parameters()).data += 1
    save_student(model, tokenizer, checkpoint)
    with pytest.raises(StaleError, match=rf"checkpoint: {HEXADECIMAL} there, {HEXADECIMAL} now\); run `student init`"):
        require_current_start(other)
    shutil.rmtree(checkpoint)
    require_current_start(other)


def test_a_start_whose_file_of_the_shape_was_edited(config: PipelineConfig, tmp_path: Path) -> None:
    file, shape = tmp_path / "shape.yaml", dict[str, Any](config.student.shape)  # type: ignore[arg-type]
    file.write_text(yaml.safe_dump(shape))
    other = changed(config, f"student.shape={file}")
    initialize_student(other)
    require_current_start(other)
    file.write_text(yaml.safe_dump(shape | {"n_layers": 3}))
    with pytest.raises(StaleError, match=r"shape: .*'n_layers': 2.* there, .*'n_layers': 3.* now\); run `student init"):
        require_current_start(other)
    assert run_identity(other, {})["shape"]["n_layers"] == 3
    file.unlink()
    require_current_start(other)


def test_a_vocabulary_of_an_older_dataset_is_named_and_used(
    config: PipelineConfig, caplog: pytest.LogCaptureFixture
) -> None:
    replace_shards(config)
    with caplog.at_level(logging.WARNING):
        prepare(config)
    assert "was trained on another dataset (dataset: " in caplog.text


def test_a_start_made_twice_is_the_same(config: PipelineConfig) -> None:
    before = weights_fingerprint(config.student_init_dir)
    tokenizer = tokenizer_fingerprint(*load_tokenizer(config.student_init_dir))
    shutil.rmtree(config.student_init_dir)
    initialize_student(config)
    assert weights_fingerprint(config.student_init_dir) == before
    assert tokenizer_fingerprint(*load_tokenizer(config.student_init_dir)) == tokenizer


def test_a_start_that_is_up_to_date_is_left_as_it_is(config: PipelineConfig, caplog: pytest.LogCaptureFixture) -> None:
    weights = config.student_init_dir / "model.safetensors"
    made = weights.stat().st_ino
    with caplog.at_level(logging.INFO):
        initialize_student(config)
    assert f"already initialized: {config.student_init_dir}" in caplog.text
    assert weights.stat().st_ino == made
    replace_shards(config)  # its vocabulary was trained on the others
    initialize_student(config)
    assert weights.stat().st_ino != made


def test_weights_have_one_fingerprint_however_they_are_stored(config: PipelineConfig, tmp_path: Path) -> None:
    model, tokenizer = load_student(config.student_init_dir)
    save_student(model, tokenizer, tmp_path / "parts", max_shard_size="60KB")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2
    assert weights_fingerprint(tmp_path / "parts") == weights_fingerprint(config.student_init_dir)
    name, parameter = next(iter(model.named_parameters()))
    parameter.data[-1, -1] += 1
    save_student(model, tokenizer, tmp_path / "other")
    assert weights_fingerprint(tmp_path / "other") != weights_fingerprint(config.student_init_dir), name
    head = add_sequential_head(model, rank=2)
    seen = {weights_fingerprint(tmp_path / "other")}
    for _ in range(2):
        save_student(model, tokenizer, tmp_path / "other")
        seen.add(weights_fingerprint(tmp_path / "other"))
        head.out.weight.data += 1
    assert len(seen) == 3, "a sequential head is part of a student"


# --- the trained model ----------------------------------------------------------------------------------


def another_start(config: PipelineConfig) -> PipelineConfig:
    """The same tokenizer, other weights."""
    other = changed(config, "seed=1")
    tokenizer = tokenizer_fingerprint(*load_tokenizer(config.student_init_dir))
    initialize_student(other)
    assert tokenizer_fingerprint(*load_tokenizer(config.student_init_dir)) == tokenizer
    return other


def test_a_model_of_another_start(config: PipelineConfig) -> None:
    assert is_finished(config, identity_of(config, check(config, 1)))
    other = another_start(config)
    start = rf"start: {HEXADECIMAL} there, {HEXADECIMAL} now"
    with pytest.raises(CheckpointError, match=rf"trained with other settings or inputs .*{start}.* pass --fresh"):
        is_finished(other, identity_of(other, check(other, 1)))
    message = rf"final was made from other inputs .*{start} in {config.student_init_dir}\); run `student train --fresh`"
    with pytest.raises(StaleError, match=message):
        evaluate(other)
    with pytest.raises(StaleError, match=rf"{start}.* or give {config.student_final_dir} itself"):
        export_student(config.run_dir)
    assert not (config.run_dir / "export").exists()


def test_a_model_of_other_targets(config: PipelineConfig) -> None:
    other = changed(config, "prepare.min_known_mass=0.9")
    prepare(other)
    with pytest.raises(StaleError, match=rf"prepared data: {HEXADECIMAL} there, .* in {config.prepared_dir}"):
        evaluate(other)


def test_a_model_of_another_block_length(config: PipelineConfig) -> None:
    with pytest.raises(StaleError, match=r"train\.block_length: 4 there, 8 now"):
        evaluate(changed(config, "train.block_length=8"))


def test_checkpoints_of_another_start_are_refused_before_they_are_loaded(config: PipelineConfig) -> None:
    shutil.rmtree(config.student_final_dir)
    identity = identity_of(config, check(config, 1))
    record = {"step": 1, "ranks": 1, "zero_stage": 2, "identity": identity, "sizes": {}}
    write_json(config.checkpoints_dir / "step-1/complete.json", record)
    assert [found.step for found in decide(config, check(config, 1)).checkpoints] == [1]
    other = another_start(config)
    with pytest.raises(CheckpointError, match=r"step-1 was trained with other .*start: .* there, .* now"):
        decide(other, check(other, 1))


def test_an_export_says_what_it_was_trained_from(config: PipelineConfig, caplog: pytest.LogCaptureFixture) -> None:
    target = export_student(config.run_dir)
    assert (target / "training.json").read_text() == (config.student_final_dir / "training.json").read_text()
    teacher, _ = load_tokenizer(config.teacher.model)
    caplog.clear()
    warn_of_another_teacher(target, teacher)
    assert not caplog.text
    warn_of_another_teacher(target, load_tokenizer(config.student_init_dir)[0])
    assert "was trained for another teacher (teacher vocabulary: " in caplog.text


def test_a_model_without_a_record_is_taken_with_a_warning(
    config: PipelineConfig, caplog: pytest.LogCaptureFixture
) -> None:
    (config.student_final_dir / "training.json").unlink()
    export_student(config.run_dir)
    assert "does not say what it was trained from" in caplog.text


def test_speculation_wants_the_dataset_that_the_student_learned_from(config: PipelineConfig) -> None:
    from student.drafting.speculate import speculate

    replace_shards(config)
    with pytest.raises(StaleError, match=rf"dataset: .* now in {config.shards_dir}"):
        speculate(config)
    assert not (config.run_dir / "speculate").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("warm_training")
def test_whoever_starts_the_ranks_the_checks_are_the_same(config: PipelineConfig) -> None:
    trained = weights_fingerprint(config.student_final_dir)
    digits = "student.tokenizer.individual_digits=true"
    initialize_student(changed(config, digits))
    for ranks in (0, 2):
        done = train(config, digits, ranks=ranks)
        text = " ".join(done.stderr.split())
        assert "(tokenizer: " in text
        assert "run `student prepare` again" in text
        assert "Traceback" not in text or ranks, "a launcher has one of its own"
        assert done.returncode == 2 if not ranks else done.returncode != 0
    prepare(changed(config, digits))
    done = train(config, digits, ranks=2)
    assert "pass --fresh to train anew" in " ".join(done.stderr.split())
    assert weights_fingerprint(config.student_final_dir) == trained


# --- the report -----------------------------------------------------------------------------------------


def measured(config: PipelineConfig) -> None:
    figures = {"tau": 1.25, "accepted_one_hot": 0.25, "by_depth": [0.2], "by_skill": {"odd": 1.2}}
    both = {"rule": "greedy", "before": figures, "after": figures, "identity": evaluation_identity(config)}
    write_json(config.run_dir / "evaluate.json", both)
    drafted = {"drafts": 7, "acceptance_length": 1.5, "identity": speculation_identity(config)}
    write_json(config.run_dir / "speculate.json", drafted)


def test_figures_of_a_model_that_is_gone_are_left_out_and_named(config: PipelineConfig) -> None:
    measured(config)
    tau = evaluate(config)["after"]["tau"]
    report = write_report(config)
    assert report["stale"] == {}
    assert report["evaluate"]["after"]["tau"] == tau
    assert report["train"]["steps"] == 2
    model, tokenizer = load_student(config.student_final_dir)
    next(model.parameters()).data += 1
    save_student(model, tokenizer, config.student_final_dir)
    report = write_report(config)
    assert set(report["stale"]) == {"evaluate", "speculate"}
    assert report["evaluate"]["after"]["tau"] is None
    assert report["speculate"]["drafts"] is None
    assert report["train"]["steps"] == 2
    page = (config.report_dir / "index.html").read_text()
    assert "out of date: model: " in page
    assert "run `student evaluate` again" in page


def test_figures_of_another_dataset_are_left_out(config: PipelineConfig) -> None:
    measured(config)
    write_json(config.run_dir / "collect.json", {"tokens": 5, "responses": 1})
    replace_shards(config)
    report = write_report(config)
    assert set(report["stale"]) == {"collect", "prepare", "train", "evaluate", "speculate"}
    assert "tokens: 5 there" in report["stale"]["collect"]
    assert "dataset: " in report["stale"]["evaluate"]


def test_figures_of_other_settings_are_left_out(config: PipelineConfig) -> None:
    measured(config)
    report = write_report(changed(config, "evaluate.draft_tokens=2", "train.loss=ce"))
    assert set(report["stale"]) == {"train", "evaluate"}
    assert report["stale"]["train"].startswith("train.loss: 'auto' there, 'ce' now")


@pytest.mark.parametrize("override", ["teacher.dtype=float16", "teacher.quantization=fp8"])
def test_figures_of_a_teacher_that_computed_otherwise_are_out_of_date(config: PipelineConfig, override: str) -> None:
    made, now = speculation_identity(config), speculation_identity(changed(config, override))
    assert [found.partition(":")[0] for found in differences(made, now)] == [override.partition("=")[0]]
    earlier = {key: value for key, value in made.items() if not key.startswith("teacher.")}
    assert differences(earlier, now) == [], "an earlier version did not record it"


@pytest.mark.parametrize(
    "override",
    [
        "train.block_length=8",
        "train.max_sequence_tokens=96",
        "train.objectives.random_masking=0",
        "train.random_masking.end_tokens=2",
    ],
)
def test_figures_of_text_that_was_laid_out_otherwise_are_measured_anew(config: PipelineConfig, override: str) -> None:
    """The start's too, which the training that follows does not change."""
    masking = "train.objectives.random_masking=1"
    before, now = changed(config, masking), changed(config, masking, override)
    measured(before)
    assert outstanding(before).students == ()
    record = json.loads((config.student_final_dir / "training.json").read_text())
    record["identity"]["train.block_length"] = now.train.block_length  # as after a training with it
    write_json(config.student_final_dir / "training.json", record)
    assert outstanding(now).students == ("before", "after")


def test_figures_that_do_not_say_what_they_are_of_are_left_out(config: PipelineConfig) -> None:
    write_json(config.run_dir / "evaluate.json", {"rule": "greedy", "before": {"tau": 1.0}, "after": {"tau": 2.0}})
    report = write_report(config)
    assert report["evaluate"]["after"]["tau"] is None
    assert "does not say what it was made from" in report["stale"]["evaluate"]
