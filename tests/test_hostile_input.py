"""What comes from elsewhere is data: it may be refused, it is never run, and it reaches no file outside its folder.

Not trusted: configs, prompts, datasets (a directory or a store), checkpoints and tokenizers (a directory or the hub),
what servers answer. Trusted: this machine's environment, installed packages, and what a user states on purpose: a path
outside a run's folder, `teacher.engine_args`, a DeepSpeed file, the modeling files that `student export` writes
and a user then loads elsewhere with `trust_remote_code=True`. Symbolic links inside a folder are the user's own.

The checkpoints of a training are PyTorch's pickles, and DeepSpeed's readers run whatever those call. One's own run is
trusted, and yet its checkpoints go through PyTorch's restricted reader first, because a run's folder may have been sent
by somebody else: it is resumed or exported only where it holds nothing but tensors and settings. vLLM reads a teacher's
weights from safetensors or by the same restricted reader.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from shared.commands.merge import merge
from shared.config import TeacherConfig, load_config
from shared.dataset.manifest import COMMITS, MANIFEST, FileEntry, check_file_name, dump
from shared.dataset.reader import Dataset
from shared.dataset.records import Message
from shared.dataset.storage import open_storage
from shared.dataset.validate import validate_dataset
from shared.errors import CheckpointError, ConfigError, DatasetError, PromptError
from shared.tokenizer.chat import ChatEncoder
from shared.tokenizer.files import read_tokenizer_file
from student.model.export import load_student, save_student
from student.model.initialize import random_shape
from student.model.source import Source, resolve
from student.model.tokenizer import train_tokenizer
from student.training.checkpoint import Checkpoint, damage, whole_weights
from teacher.checkpoints import ensure_checkpoint, load_tokenizer
from tests.fixtures.conversations import conversations
from tests.fixtures.hub import refusing_hub
from tests.fixtures.records import small_units, start, write_dataset
from tests.fixtures.s3 import BUCKET
from tests.fixtures.tiny_model import tiny_model
from tests.fixtures.toy_run import make_tokenizer, toy_config
from tests.student.training.test_checkpoint import write_checkpoint

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "configs" / "demo.yaml"


@pytest.fixture
def marker(tmp_path: Path) -> Any:
    """A file that hostile input tries to make; it must not be there afterwards."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "the input was executed"


class Call:
    """Makes the file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_the_calls_of_these_tests_are_real(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Call(tmp_path / "executed")))
    torch.save(Call(tmp_path / "executed too"), tmp_path / "file.pt")
    torch.load(tmp_path / "file.pt", weights_only=False)
    yaml.unsafe_load(f"!!python/object/apply:os.mkdir ['{tmp_path / 'by yaml'}']")
    assert all((tmp_path / name).is_dir() for name in ("executed", "executed too", "by yaml"))


# --- configs --------------------------------------------------------------------------------------------


def test_a_config_is_plain_yaml(tmp_path: Path, marker: Path) -> None:
    for tag in ("object/apply:os.mkdir", "object/new:os.mkdir", "object/apply:os.system"):
        call = f"!!python/{tag} ['{marker}']"
        (tmp_path / "config.yaml").write_text(DEMO.read_text().replace("name: demo", f"name: {call}"))
        with pytest.raises(ConfigError, match=rf"not valid YAML: could not determine a constructor .*{tag}"):
            load_config(tmp_path / "config.yaml")
        with pytest.raises(ConfigError, match=r"--set .*: the value is not valid YAML"):
            load_config(DEMO, [f"name={call}"])
        (tmp_path / "shape.yaml").write_text(f"d_model: {call}")
        with pytest.raises(ConfigError, match=r"student\.shape: cannot read .*could not determine a constructor"):
            random_shape(tmp_path / "shape.yaml")


def test_a_run_cannot_be_named_out_of_its_folder() -> None:
    for name in ("../x", "/x", "..", "a/b"):
        with pytest.raises(ConfigError, match=rf"name: .*pattern.*\(got '{name}'\)"):
            load_config(DEMO, [f"name={name}"])


# --- datasets -------------------------------------------------------------------------------------------


OUTSIDE = [
    "../outside.parquet", "data/../../outside.parquet", "/etc/passwd", "", ".", "data//x.parquet", "data/./x", "data/",
    "C:/x.parquet", "C:x", "c:\\x", "data\\..\\..\\x", "\\\\host\\share", "data/x\0.parquet", "s3://bucket/x", "file:///x",
]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("what", ["shard", "file", "tokenizer", "commit", "merge"])
def test_a_file_outside_the_dataset_is_not_followed(tmp_path: Path, what: str, name: str) -> None:
    """Files with right checksums, as somebody who wants them followed would write them."""
    write_dataset(tmp_path / "d", small_units())
    shutil.copy(tmp_path / "d/data/unit-000.parquet", tmp_path / "outside.parquet")
    manifest = Dataset.open(tmp_path / "d").manifest
    unit = manifest.units[0].model_copy(update={"file": name})
    entry = FileEntry(name="x", bytes=1, sha256="0" * 64).model_copy(update={"name": name})
    if what == "tokenizer":
        entry = entry.model_copy(update={"name": f"tokenizer/{name}"})
    changes: dict[str, Any] = {"units": [unit, *manifest.units[1:]]}
    if what in ("file", "tokenizer"):
        changes = {"files": [*manifest.files, entry]}
    message = r"json: the file name '.*' leads out of its directory .*, expected a relative one, .*: copy it again"
    if what == "commit":
        (tmp_path / "d" / COMMITS / "unit-000.json").write_bytes(dump(unit))
        with pytest.raises(DatasetError, match=message):
            start(tmp_path / "d")
        return
    if what == "tokenizer" and ":" in name:
        return  # a colon further on is a file's name
    (tmp_path / "d" / MANIFEST).write_bytes(dump(manifest.model_copy(update=changes)))
    if what == "merge":
        write_dataset(tmp_path / "e", {})
        with pytest.raises(DatasetError, match=message):
            merge([tmp_path / "e", tmp_path / "d"], tmp_path / "m")
        assert not (tmp_path / "m").exists()
        return
    with pytest.raises(DatasetError, match=message):
        Dataset.open(tmp_path / "d")
    assert any("leads out of its directory" in problem for problem in validate_dataset(tmp_path / "d").problems)


@pytest.mark.parametrize("name", ["../u", "a/b", "", ".hidden", "a" * 201, "u\n"])
def test_a_unit_that_cannot_be_a_file_is_refused(tmp_path: Path, name: str) -> None:
    write_dataset(tmp_path, small_units())
    manifest = Dataset.open(tmp_path).manifest
    units = [manifest.units[0].model_copy(update={"unit": name}), *manifest.units[1:]]
    (tmp_path / MANIFEST).write_bytes(dump(manifest.model_copy(update={"units": units})))
    with pytest.raises(DatasetError, match=r"manifest.json: unit name .* cannot be a file's name"):
        Dataset.open(tmp_path)


def test_names_inside_are_kept_and_the_users_links_followed(tmp_path: Path) -> None:
    for name in ("manifest.json", "data/a.b-c_d.parquet", "tokenizer/additional_chat_templates/x y.jinja", "a/..b"):
        assert check_file_name(name) == name
    write_dataset(tmp_path / "d", small_units())
    (tmp_path / "d/data").rename(tmp_path / "disk")
    (tmp_path / "d/data").symlink_to(tmp_path / "disk")
    assert validate_dataset(tmp_path / "d").problems == []


# --- checkpoints and tokenizers -------------------------------------------------------------------------


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """A saved student of 30 thousand parameters."""
    tokenizer = train_tokenizer([text for pair in conversations(50) for text in pair], 300)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("mask", "bos", "eos", "pad")}
    save_student(tiny_model(vocab_size=len(tokenizer), **ids), tokenizer, tmp_path / "student")
    return tmp_path / "student"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_pickled_weights_are_not_opened(student: Path, marker: Path) -> None:
    for name in ("pytorch_model.bin", "model.pt", "adapter_model.bin"):
        torch.save({"weight": Call(marker)}, student / name)
    (student / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "someone/else"}')
    with pytest.raises(CheckpointError, match=r"has an adapter_config.json .* merge"):
        load_student(student)
    (student / "adapter_config.json").unlink()
    load_student(student)  # the safetensors beside them
    (student / "model.safetensors").unlink()
    index = student / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"model.transformer.wte.weight": "pytorch_model.bin"}}))
    for read in (load_student, Source.open):
        with pytest.raises(CheckpointError, match=r"has neither model.safetensors nor .*; convert it to safetensors"):
            read(str(student))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "a/../../x.safetensors", "w.bin"])
def test_an_index_names_safetensors_beside_it(student: Path, marker: Path, name: str) -> None:
    weights = load_file(student / "model.safetensors")
    save_file(weights, student.parent / "outside.safetensors", metadata={"format": "pt"})
    torch.save({key: Call(marker) for key in weights}, student / "w.bin")
    (student / "model.safetensors").unlink()
    index = student / "model.safetensors.index.json"
    for text in (json.dumps({"weight_map": dict.fromkeys(weights, name)}), "{}", "[]", '{"weight_map": [[]]}'):
        index.write_text(text)
        for read in (load_student, Source.open):
            with pytest.raises(CheckpointError, match=r"index.json (names '.*', expected .* beside it|is damaged)"):
                read(str(student))


def test_a_config_cannot_choose_another_file_of_weights(student: Path) -> None:
    save_file({"x": torch.zeros(1)}, student / "other.safetensors", metadata={"format": "pt"})
    weights = load_file(student / "model.safetensors")
    edit(student / "config.json", transformers_weights="other.safetensors")
    model, _ = load_student(student)
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)


@pytest.mark.parametrize("tokenizer_class", ["Unknown", "PreTrainedTokenizerFast"])
def test_code_beside_a_checkpoint_is_not_run(
    student: Path, marker: Path, tokenizer_class: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is asked either: where there is a terminal, transformers asks and a hurried user answers yes."""
    monkeypatch.setattr("builtins.input", lambda _question: "y")
    (student / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Evil: ...\n")
    (student / "modeling_llada.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    auto_map = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    edit(student / "tokenizer_config.json", auto_map=auto_map, tokenizer_class=tokenizer_class)
    edit(student / "config.json", auto_map=dict.fromkeys(("AutoConfig", "AutoModel"), "evil.Evil"))
    teacher = TeacherConfig(model=str(student))
    if tokenizer_class == "PreTrainedTokenizerFast":  # one of transformers' own, which is taken
        load_student(student)
        return
    with pytest.raises(CheckpointError, match=r"contains custom code .* Code that comes with a checkpoint is not run"):
        load_student(student)
    edit(student / "config.json", model_type="unknown")
    with pytest.raises(CheckpointError, match=r"its tokenizer cannot be loaded: .* custom code"):
        load_tokenizer(teacher)


def test_a_chat_template_reaches_nothing(tmp_path: Path, marker: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer")
    call = f"{{{{ cycler.__init__.__globals__.os.mkdir('{marker}') }}}}"
    edit(tmp_path / "tokenizer" / "tokenizer_config.json", chat_template=call)
    encoder = ChatEncoder(read_tokenizer_file(tmp_path / "tokenizer"))
    with pytest.raises(PromptError, match=r"access to attribute '__init__' .* is unsafe"):
        encoder.prompt([Message("user", "hello")])


@pytest.mark.parametrize("name", ["someone/..", "someone/../../x", "some--one/x", "someone/x\0"])
def test_a_hub_name_is_no_path(name: str) -> None:
    """They are refused before the hub is asked."""
    for read in (resolve, lambda name: ensure_checkpoint(TeacherConfig(model=name))):
        with pytest.raises(CheckpointError, match=r"no checkpoint directory|does not exist|Repo id must|Cannot have"):
            read(name)


def test_a_training_checkpoint_that_calls_something_is_not_loaded(tmp_path: Path, marker: Path) -> None:
    folder = write_checkpoint(tmp_path, 5, zero_stage=0)
    for write in (
        lambda path: torch.save({"module": Call(marker)}, path),
        lambda path: torch.save({"module": Call(marker)}, path, _use_new_zipfile_serialization=False),
        lambda path: path.write_bytes(pickle.dumps(Call(marker))),
    ):
        write(folder / "mp_rank_00_model_states.pt")
        sizes = {path.name: path.stat().st_size for path in folder.glob("*.pt")}
        edit(folder / "complete.json", sizes=sizes)
        found = Checkpoint.read(folder)
        assert found is not None
        (problem,) = damage(found, 0, 1)  # what a resume asks first
        assert "would call" in problem or "does not read back" in problem
        with pytest.raises(CheckpointError, match=r"would call \w+.mkdir when it is read|is no file of PyTorch 2"):
            whole_weights(found)  # what `student export --checkpoint` reads


# --- secrets --------------------------------------------------------------------------------------------

SECRET = "s3cr3t-that-nobody-may-read"


def test_a_secret_in_a_config_is_refused_and_not_repeated() -> None:
    for override in (
        f"teacher.service={{urls: ['http://user:{SECRET}@host:8000']}}",
        f"teacher.service={{urls: ['http://host:8000/v1?api_key={SECRET}']}}",
        f"teacher.engine_args={{hf_token: {SECRET}}}",
        f"teacher.engine_args={{api-key: {SECRET}, model: x}}",
    ):
        with pytest.raises(ConfigError, match=r"HF_TOKEN|VLLM_API_KEY") as caught:
            load_config(DEMO, [override])
        assert SECRET not in str(caught.value)
    with pytest.raises(DatasetError, match=r"s3:// URL .* carries credentials, .*AWS_ACCESS_KEY_ID") as caught:
        Dataset.open(f"s3://key:{SECRET}@bucket/dataset")
    assert SECRET not in str(caught.value)


def run(module: str, *arguments: str | Path, **environment: str) -> str:
    """What the command prints at its most talkative, and every file that it leaves."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments), "--log-level", "debug"],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | environment,
    )  # fmt: skip
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("s3")
def test_keys_of_a_store_stay_in_the_environment(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "in.jsonl").write_text('{"prompt": "what", "response": " the cat"}')
    url = f"s3://{BUCKET}/secret"
    keys = {"AWS_SECRET_ACCESS_KEY": SECRET, "AWS_SESSION_TOKEN": f"token-{SECRET}"}
    printed = run(
        "shared.commands.cli", "import-json", tmp_path / "in.jsonl", url, "--tokenizer", tmp_path / "tokenizer", **keys
    )
    storage = open_storage(url)
    contents = {name: storage.read(name) for name in storage.list()}
    assert contents.keys() >= {"manifest.json", "provenance.json"}
    assert SECRET not in printed
    assert not [name for name, data in contents.items() if SECRET.encode() in data]


def test_a_token_of_the_hub_stays_in_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    tree = yaml.safe_load(toy_config(tmp_path).read_text())
    tree["teacher"]["model"] = "someone/gated"
    tree["collect"]["prompts"] = str(ROOT / "configs" / "prompts" / "demo.jsonl")
    path.write_text(yaml.safe_dump(tree))
    with refusing_hub("GatedRepo", 403) as (url, seen):
        hub = {"HF_ENDPOINT": url, "HF_TOKEN": SECRET, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hub")}
        printed = run("teacher.cli", "plan", path, **hub)
    assert "is gated and this machine has no access" in printed
    assert f"Bearer {SECRET}" in seen
    assert SECRET not in printed
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and SECRET.encode() in file.read_bytes()]
