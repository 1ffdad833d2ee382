"""`student push` to a stand-in of the Hub, by the real client: the model loads from there, and its card claims no more
than the run's records prove."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from shared.config import PipelineConfig
from shared.errors import CheckpointError, ConfigError, HubError, StaleError
from shared.files import write_json
from shared.hub import Repository
from student.cli import main
from student.lineage import dataset_fingerprint, manifest_of
from student.model.export import export_student, load_student, save_student, weights_fingerprint
from student.model.push import push_student
from student.model.source import resolve
from student.model.tokenizer import train_tokenizer
from student.planning.shapes import shape_of
from tests.fixtures.hub import Hub
from tests.fixtures.served_run import special_ids
from tests.fixtures.tiny_model import tiny_model
from tests.fixtures.toy_run import TEXT, load_toy, write_toy_shards

NAME = "someone/drafter"
TO = Repository(NAME, "model", "Upload the student")
URL_TEMPLATE = "{repo_id}/resolve/{revision}/{filename}"
BASE = "GSAI-ML/LLaDA-8B-Instruct"


@pytest.fixture
def config(tmp_path: Path) -> PipelineConfig:
    """A run with a dataset, and a student that was, by its record, trained on it."""
    config = load_toy(tmp_path)
    write_toy_shards(config, train=6, held_out=2)
    tokenizer = train_tokenizer([TEXT] * 3, 300)
    model = tiny_model(vocab_size=len(tokenizer), draft_block_length=4, **special_ids(tokenizer))
    # As transformers leaves it of a start on this machine.
    model.config._name_or_path = str(config.student_init_dir)
    save_student(model, tokenizer, config.student_final_dir)
    (config.student_final_dir / "resolved_config.yaml").write_text(f"runs: {config.runs}\n")
    record(config, BASE)
    return config


def record(config: PipelineConfig, checkpoint: str | None) -> None:
    manifest = manifest_of(config.shards_dir)
    assert manifest is not None
    identity = {
        "student.checkpoint": checkpoint,
        "student.layers": [0, 1],
        "dataset": dataset_fingerprint(manifest),
        "train.block_length": 4,
    }
    write_json(config.student_final_dir / "training.json", {"steps": 2, "identity": identity})


def measure(config: PipelineConfig, model: str) -> None:
    measured = {"rule": "greedy", "draft_tokens": 3, "after": {"tau": 1.4909}, "identity": {"model": model}}
    write_json(config.run_dir / "evaluate.json", measured)


def card(hub: Hub) -> str:
    return hub.repositories[f"models/{NAME}"].files["README.md"].decode()


def test_what_was_pushed_loads_as_its_card_says(
    config: PipelineConfig, tmp_path: Path, hub_server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["student", "push", str(config.run_dir), NAME, "--license", "apache-2.0"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert hub_server.repositories[f"models/{NAME}"].private
    # Constants that are read when the libraries are imported.
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", f"{hub_server.url}/{URL_TEMPLATE}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, "llada", raising=False)  # what another test has registered
    found: dict[str, Any] = {}
    exec(card(hub_server).split("```python\n")[1].split("```")[0], found)
    model, tokenizer = load_student(config.student_final_dir)
    weights = found["model"].state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert found["tokenizer"].get_vocab() == tokenizer.get_vocab()
    assert hub_server.count("GET .*/resolve/.*/modeling_llada.py") == 1


def test_the_card_says_what_the_records_prove(config: PipelineConfig, hub_server: Hub) -> None:
    measure(config, weights_fingerprint(config.student_final_dir))
    push_student(config.run_dir, TO, "mit")
    assert yaml.safe_load(card(hub_server).split("---\n")[1]) == {
        "license": "mit",
        "library_name": "transformers",
        "base_model": BASE,
        "tags": ["llada", "masked-diffusion", "speculative-decoding", "draft-model"],
    }
    for line in (
        "# drafter",
        "| drafts for | toy |",
        f"| started from | {BASE}, layers 0, 1 |",
        "| block length | 4 tokens |",
        "| acceptance length τ | 1.491 tokens per step of the teacher (held-out prompts, decoding greedy, 3 drafted ",
        "| license | mit |",
        f"$ hf download {NAME} --local-dir runs/NAME/student/final",
    ):
        assert line in card(hub_server), card(hub_server)


def test_what_was_not_measured_of_these_weights_is_left_out(config: PipelineConfig, hub_server: Hub) -> None:
    measure(config, "of other weights")
    shutil.rmtree(config.shards_dir)
    push_student(config.run_dir, TO)
    for absent in ("τ", "| drafts for", "1.49"):
        assert absent not in card(hub_server)
    assert "license: unknown" in card(hub_server)


def test_no_path_of_this_machine_is_pushed(config: PipelineConfig, tmp_path: Path, hub_server: Hub) -> None:
    record(config, str(tmp_path / "checkpoints" / "a-start"))
    assert str(tmp_path) in (config.student_final_dir / "config.json").read_text()
    push_student(config.run_dir, TO)
    assert "| started from | a-start, layers 0, 1 |" in card(hub_server)
    assert "base_model" not in card(hub_server)
    files = hub_server.repositories[f"models/{NAME}"].files
    assert not [name for name, data in files.items() if str(tmp_path).encode() in data]
    assert "resolved_config.yaml" not in files
    assert json.loads(files["training.json"])["identity"]["train.block_length"] == 4


def test_an_export_is_pushed_as_it_is_and_again_changes_nothing(config: PipelineConfig, hub_server: Hub) -> None:
    exported = export_student(config.run_dir, dtype="bfloat16", max_shard_size="60KB")
    hub_server.refused = "POST .*/commit/"
    with pytest.raises(HubError, match="the push to someone/drafter failed"):
        push_student(exported, TO)
    push_student(exported, TO)
    repository = hub_server.repositories[f"models/{NAME}"]
    commits = len(repository.branches["main"])
    push_student(exported, TO)
    assert len(repository.branches["main"]) == commits
    assert not (exported / "export").exists()
    weights = {path.name: path.read_bytes() for path in exported.glob("*.safetensors")}
    assert len(weights) > 2
    assert weights.items() <= repository.files.items()
    # Files of weights that the next student does not have go.
    push_student(config.run_dir, TO)
    of_weights = [name for name in repository.files if name.endswith((".safetensors", ".index.json"))]
    assert of_weights == ["model.safetensors"]


def test_what_is_no_trained_student_of_its_run_is_refused(config: PipelineConfig, hub_server: Hub) -> None:
    with pytest.raises(HubError, match=r"'someone/\.\.' is no name of a repository"):
        push_student(config.run_dir, replace(TO, name="someone/.."))
    assert hub_server.requests == []
    (config.student_final_dir / "attention.py").unlink()
    with pytest.raises(CheckpointError, match=r"has no attention.py; push what `student export .*final` writes"):
        push_student(config.student_final_dir, TO)
    shutil.rmtree(config.shards_dir)
    write_toy_shards(config, train=5, held_out=2)
    with pytest.raises(StaleError, match="dataset: "):
        push_student(config.run_dir, TO)
    with pytest.raises(CheckpointError, match="holds no trained student"):
        push_student(config.runs / "none", TO)
    assert hub_server.repositories == {}


@pytest.mark.parametrize("name", ["someone/..", "some..one/x", "someone/a..b", "../x", "/none/x", "~/x", "someone/a b"])
def test_a_checkpoint_by_what_is_neither_a_directory_nor_a_name_asks_nobody(
    name: str, tmp_path: Path, hub_server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        resolve(name)
    assert f"there is no checkpoint directory {name}, and no repository of the hub is called so" in str(caught.value)
    config = load_toy(tmp_path, [f"student.checkpoint={json.dumps(name)}", "student.tokenizer.kind=checkpoint"])
    with pytest.raises(ConfigError, match=r"the shape of student\.checkpoint .* is unknown here"):
        shape_of(config)
    assert hub_server.requests == []
