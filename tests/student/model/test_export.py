import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.errors import CheckpointError
from student.model.export import export_student, load_student, save_student, weights_fingerprint
from student.model.modeling_llada import LladaForMaskedDiffusion
from student.model.tokenizer import train_tokenizer
from tests.fixtures.conversations import conversations
from tests.fixtures.served_run import special_ids
from tests.fixtures.tiny_model import random_ids, tiny_config, tiny_model

TEXTS = [text for pair in conversations(100) for text in pair]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, 400)


def model_for(tokenizer: Any, **changes: Any) -> LladaForMaskedDiffusion:
    return tiny_model(vocab_size=len(tokenizer), **special_ids(tokenizer), **changes)


@pytest.fixture
def saved(tmp_path: Path, tokenizer: Any) -> Path:
    save_student(model_for(tokenizer), tokenizer, tmp_path / "student")
    return tmp_path / "student"


@pytest.mark.slow
def test_an_export_loads_in_a_process_that_has_never_heard_of_this_project(tmp_path: Path, tokenizer: Any) -> None:
    ids = random_ids(2, 30)
    for kind in ("tied", "untied"):
        model = model_for(tokenizer, weight_tying=kind == "tied")
        save_student(model, tokenizer, tmp_path / kind)
        with torch.no_grad():
            torch.save((ids, model(ids).logits), tmp_path / f"{kind}.pt")
    program = f"""
import importlib.util, sys, torch
sys.path = [p for p in sys.path if p not in ("", {str(Path.cwd())!r})]
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f)]
for name in ("student", "shared", "teacher"):
    assert importlib.util.find_spec(name) is None, name
from transformers import AutoModel, AutoTokenizer
for kind in ("tied", "untied"):
    ids, expected = torch.load(kind + ".pt")
    model = AutoModel.from_pretrained(kind, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(kind, trust_remote_code=True)
    assert torch.equal(model(ids).logits, expected)
    assert tokenizer.convert_ids_to_tokens(model.config.mask_token_id) == "<|mdm_mask|>"
    cache = sys.modules[type(model).__module__].PrefixCache.allocate(model.config, 1, 64, model.dtype, "cpu")
    assert model.draft_hidden_states(cache, [0], ids[:1], [30], 4).shape == (1, 4, 64)
assert not [name for name in sys.modules if name.split(".")[0] in ("student", "shared", "teacher")]
print("identical")
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    result = subprocess.run(
        [sys.executable, "-P", "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.strip() == "identical", result.stderr


def test_upstream_s_layout_goes_in_and_comes_out_strictly(saved: Path) -> None:
    """A checkpoint as upstream writes it: its keys, its config, none of our fields, our code or our auto_map."""
    for name in ("configuration_llada.py", "modeling_llada.py", "attention.py", "prefix_cache.py"):
        (saved / name).unlink()
    tree = json.loads((saved / "config.json").read_text())
    for ours in ("rope_frequency_scaling", "draft_block_length", "dtype"):
        del tree[ours]
    tree["architectures"] = ["LLaDAModelLM"]
    tree["torch_dtype"] = "float32"
    tree["auto_map"] = {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"}
    (saved / "config.json").write_text(json.dumps(tree))
    before = load_file(saved / "model.safetensors")
    model, tokenizer = load_student(saved)
    again = saved.parent / "again"
    save_student(model, tokenizer, again)
    after = load_file(again / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    fresh = LladaForMaskedDiffusion(model.config)
    fresh.load_state_dict(after, strict=True)
    assert json.loads((again / "config.json").read_text())["auto_map"]["AutoModel"].startswith("modeling_llada.Llada")


def test_weights_may_come_from_elsewhere_and_in_many_files(tmp_path: Path, tokenizer: Any) -> None:
    """As after ZeRO-3: the module has none, another dtype was gathered, and the files are small."""
    whole = model_for(tokenizer)
    with torch.device("meta"):
        empty = LladaForMaskedDiffusion(whole.config)
    weights = {name: tensor.bfloat16() for name, tensor in whole.state_dict().items()}
    save_student(empty, tokenizer, tmp_path, state_dict=weights, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert len(weights) == len(whole.state_dict())
    loaded, _ = load_student(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())
    assert load_student(tmp_path, dtype=torch.float32)[0].dtype == torch.float32


def test_export_casts_and_reads_back(saved: Path) -> None:
    run = saved.parent / "run"
    (run / "student").mkdir(parents=True)
    saved.rename(run / "student" / "final")
    target = export_student(run, dtype="bfloat16")
    assert target == run / "export"
    assert load_student(target)[0].dtype == torch.bfloat16
    assert export_student(target, run / "other") == run / "other"


def test_export_replaces_nothing_but_an_earlier_export(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "toy"
    shutil.copytree(saved, run / "student" / "init")
    shutil.copytree(saved, run / "student" / "final")
    (run / "shards").mkdir()
    (run / "shards" / "unit.parquet").write_text("weeks of work")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(run)
    holds = r"cannot export to \S+: that is or contains \S+, which would be deleted; give a new directory"
    other = r"cannot export to \S+: what is there would be deleted, and only an earlier export .* or empty it"
    cases = [(run, holds), (Path(), holds), (tmp_path, holds), (Path("student/init"), holds)]
    cases += [(Path("student/final"), holds), (run / "shards", other), (run / "shards" / "unit.parquet", other)]
    for to, message in cases:
        for checkpoint in (None, 3):
            with pytest.raises(CheckpointError, match=message):
                export_student(run, to, checkpoint=checkpoint)
    with pytest.raises(CheckpointError, match=holds):
        export_student(saved, saved)
    assert sorted(tmp_path.rglob("*")) == before
    (run / "empty").mkdir()
    assert export_student(run, Path("empty")) == run / "empty"
    assert export_student(run, Path("empty"), dtype="bfloat16") == run / "empty"
    assert load_student(run / "empty")[0].dtype == torch.bfloat16


def rewritten(directory: Path, change: Any) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def test_missing_extra_and_misshapen_keys_are_all_listed(saved: Path) -> None:
    def damage(weights: dict) -> None:
        del weights["model.transformer.blocks.1.q_proj.weight"]
        weights["model.transformer.blocks.7.q_proj.weight"] = torch.zeros(3)
        weights["model.transformer.ln_f.weight"] = torch.zeros(63)

    rewritten(saved, damage)
    with pytest.raises(CheckpointError) as caught:
        load_student(saved)
    message = str(caught.value)
    assert "missing: model.transformer.blocks.1.q_proj.weight" in message
    assert "extra: model.transformer.blocks.7.q_proj.weight" in message
    assert "shape of model.transformer.ln_f.weight: [63], expected [64]" in message
    assert str(saved) in message


def test_a_wrong_tokenizer_is_refused(saved: Path, tokenizer: Any) -> None:
    train_tokenizer(TEXTS * 2, 420).save_pretrained(saved)
    with pytest.raises(CheckpointError, match="the tokenizer has 420 tokens but the config's vocab_size is 400"):
        load_student(saved)
    train_tokenizer(TEXTS, 380).save_pretrained(saved)
    with pytest.raises(CheckpointError, match="mask_token_id is 399 but the tokenizer has 380 tokens"):
        load_student(saved)
    model = model_for(tokenizer)
    model.config.mask_token_id = 5
    with pytest.raises(
        CheckpointError, match=r"the tokenizer's mask is '<\|mdm_mask\|>' \(399\), the config's .* is 5"
    ):
        save_student(model, tokenizer, saved)
    (saved / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        load_student(saved)


def test_what_is_not_a_checkpoint_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no model"):
        load_student(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no trained student"):
        export_student(tmp_path / "nowhere")
    good = (saved / "config.json").read_text()
    for text, message in (
        ("{", r"config.json cannot be read \(Expecting"),
        ("[]", "holds list"),
        (good.replace('"llada"', '"bert"'), "is of a 'bert' model"),
        (
            good.replace('"mask_token_id": 399', '"mask_token_id": 400'),
            "mask_token_id is 400, expected an id in 0..399",
        ),
    ):
        (saved / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load_student(saved)
    (saved / "config.json").write_text(good)
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_student(saved)
    file.unlink()
    with pytest.raises(CheckpointError, match="convert it to safetensors"):
        load_student(saved)


def test_a_header_longer_than_its_file_is_damage_and_not_read(saved: Path) -> None:
    file = saved / "model.safetensors"
    file.write_bytes((2**46).to_bytes(8, "little") + file.read_bytes()[8:])
    with pytest.raises(CheckpointError, match=f"is damaged .*header says that it has {2**46} bytes"):
        weights_fingerprint(saved)


def test_the_wrong_weights_are_not_saved(tmp_path: Path, tokenizer: Any) -> None:
    model = model_for(tokenizer)
    other = LladaForMaskedDiffusion(tiny_config(n_layers=4)).state_dict()
    with pytest.raises(CheckpointError, match=r"extra: model.transformer.blocks.3"):
        save_student(model, tokenizer, tmp_path / "student", state_dict=other)
    assert not (tmp_path / "student").exists()
