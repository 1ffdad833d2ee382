"""Finding, checking and converting checkpoints."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from shared.config import TeacherConfig, load_config
from shared.errors import CheckpointError
from teacher import checkpoints
from teacher.checkpoints import convert_gguf, ensure_checkpoint, locate_gguf, vocabulary_size

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; point it at a checkpoint directory"):
        ensure_checkpoint(TeacherConfig(model=str(tmp_path / "none")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        ensure_checkpoint(TeacherConfig(model=str(tmp_path / "empty")))


def test_a_folder_makes_a_path_of_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone").mkdir()
    with pytest.raises(CheckpointError, match="does not exist"):
        ensure_checkpoint(TeacherConfig(model="someone/some-model"))


def test_a_gguf_file_is_found_by_path_or_in_a_package(tmp_path: Path) -> None:
    (tmp_path / "w.gguf").write_bytes(b"x")
    assert locate_gguf(str(tmp_path / "w.gguf")) == tmp_path / "w.gguf"
    assert locate_gguf("numpy/__init__.py").name == "__init__.py"
    for name in ("numpy/none.gguf", "no_such_package/none.gguf", "none.gguf"):
        with pytest.raises(CheckpointError, match=f"teacher.gguf {name} is no file here, nor FILE of an installed"):
            locate_gguf(name)


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


def _convert_once(source: Path, directory: Path) -> None:
    with (directory.parent / "log").open("a") as log:
        log.write("converting\n")
    (directory / "weights").write_text(source.name)


def test_a_killed_conversion_is_cleared_and_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "_convert", _convert_once)
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "half.safetensors").write_bytes(b"half")
    convert_gguf(Path("w.gguf"), tmp_path / "model")
    convert_gguf(Path("other.gguf"), tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "model"]
    assert [(path.name, path.read_text()) for path in (tmp_path / "model").iterdir()] == [("weights", "w.gguf")]


def test_processes_that_start_together_convert_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "_convert", _convert_once)
    context = multiprocessing.get_context("fork")
    arguments = (Path("w.gguf"), tmp_path / "models" / "model")
    workers = [context.Process(target=convert_gguf, args=arguments) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert (tmp_path / "models" / "log").read_text() == "converting\n"
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["log", "model"]


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
