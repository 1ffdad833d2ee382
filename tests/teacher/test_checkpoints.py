"""Finding, checking and converting checkpoints."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from shared.config import TeacherConfig, load_config
from shared.errors import CheckpointError
from teacher.checkpoints import _exclusive_sibling, check_checkpoint, ensure_checkpoint, locate_gguf, vocabulary_size

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; point it at a checkpoint directory"):
        check_checkpoint(TeacherConfig(model=str(tmp_path / "none")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        check_checkpoint(TeacherConfig(model=str(tmp_path / "empty")))


def test_a_folder_makes_a_path_of_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone").mkdir()
    with pytest.raises(CheckpointError, match="does not exist"):
        ensure_checkpoint(TeacherConfig(model="someone/some-model"))


def test_a_gguf_file_is_found_by_path_or_in_a_package(tmp_path: Path) -> None:
    (tmp_path / "w.gguf").write_bytes(b"x")
    assert locate_gguf(str(tmp_path / "w.gguf")) == tmp_path / "w.gguf"
    assert locate_gguf("numpy/__init__.py").name == "__init__.py"
    with pytest.raises(CheckpointError, match=r"package numpy is installed without none\.gguf"):
        locate_gguf("numpy/none.gguf")
    with pytest.raises(CheckpointError, match="no installed package"):
        locate_gguf("no_such_package/none.gguf")


def test_the_vocabulary_is_read_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 77}}))
    assert vocabulary_size(TeacherConfig(model=str(tmp_path))) == 77
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="vocab_size None"):
        vocabulary_size(TeacherConfig(model=str(tmp_path)))


def test_the_demo_teachers_header_tells_its_vocabulary(tmp_path: Path) -> None:
    demo = load_config(DEMO).teacher
    assert vocabulary_size(demo.model_copy(update={"model": str(tmp_path / "unconverted")})) == 49_152


@pytest.mark.slow
def test_what_a_failed_conversion_wrote_does_not_stay(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"this is no GGUF file")
    teacher = TeacherConfig(model=str(tmp_path / "model"), gguf=str(tmp_path / "bad.gguf"))
    with pytest.raises(CheckpointError, match="cannot be converted"):
        ensure_checkpoint(teacher)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.gguf"]


def test_a_killed_conversion_is_cleared_and_repeated(tmp_path: Path) -> None:
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "half.safetensors").write_bytes(b"half")
    with _exclusive_sibling(tmp_path / "model") as partial:
        assert partial is not None
        assert list(partial.iterdir()) == []
        (partial / "whole").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with _exclusive_sibling(tmp_path / "model") as partial:
        assert partial is None


def _convert(destination: Path, log: Path) -> None:
    with _exclusive_sibling(destination) as partial:
        if partial is not None:
            (partial / "weights").write_text("w")
            with log.open("a") as file:
                file.write("converted\n")


def test_processes_that_start_together_convert_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_convert, args=(tmp_path / "model", tmp_path / "log")) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert (tmp_path / "log").read_text() == "converted\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "model"]


def test_a_conversion_that_ends_between_a_look_and_a_lock_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, mkdir = [], Path.mkdir

    def mkdir_late(path: Path, *arguments: Any, **options: Any) -> None:
        if path.name == ".model.partial" and not made:
            made.append(path)
            _convert(tmp_path / "model", tmp_path / "log")  # of another process
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir_late)
    _convert(tmp_path / "model", tmp_path / "log")
    assert made
    assert (tmp_path / "log").read_text() == "converted\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "model"]


@pytest.mark.slow
def test_the_demo_teacher_answers_and_keeps_its_tokens() -> None:
    """The converted checkpoint is the model that it should be: it knows a capital, and splits digits off."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = ensure_checkpoint(load_config(DEMO).teacher)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.convert_ids_to_tokens(tokenizer("  5 a12").input_ids) == ["ĠĠ", "5", "Ġa", "1", "2"]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")
