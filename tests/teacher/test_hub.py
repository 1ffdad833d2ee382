"""Teachers by hub name: one commit, fetched or in the cache, and named wherever it matters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest

from shared.config import PipelineConfig, TeacherConfig
from shared.dataset.writer import DatasetWriter
from shared.errors import CheckpointError, DatasetError, PromptError
from shared.tokenizer.vocabulary import Vocabulary
from teacher import checkpoints
from teacher.checkpoints import ensure_checkpoint, fingerprint, hub_commit, load_tokenizer, vocabulary_size
from teacher.collect import prepare, provenance_of
from teacher.engine.in_process import capturing_arguments
from teacher.prompts import load_prompts, load_renderer
from tests.fixtures.hub import refusing_hub

Maker = Callable[..., PipelineConfig]
NAME = "someone/tiny"
FIRST, SECOND = "1" * 40, "2" * 40
STOPS = [0, 2]
"""<|endoftext|> and <|im_end|>: only generation_config.json names the first as an end."""


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, which cannot be reached."""
    cache = tmp_path / "hub"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    checkpoints._fetch_snapshot.cache_clear()
    return cache


def publish(cache: Path, checkpoint: Path, commit: str, branch: str = "main") -> None:
    """Put `checkpoint` into the cache as `commit`, to which `branch` points from now on."""
    repository = cache / ("models--" + NAME.replace("/", "--"))
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in checkpoint.iterdir():
        blob = repository / "blobs" / f"{commit[:4]}-{file.name}"
        blob.parent.mkdir(exist_ok=True)
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(blob)
    (snapshot / "generation_config.json").write_text(json.dumps({"eos_token_id": STOPS}))
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / branch).write_text(commit)
    checkpoints._fetch_snapshot.cache_clear()  # as in a new process


def of_hub(config: PipelineConfig, **changes: str) -> PipelineConfig:
    return config.model_copy(update={"teacher": config.teacher.model_copy(update={"model": NAME, **changes})})


def test_a_snapshot_keeps_what_a_directory_keeps(hub: Path, tiny_checkpoint: Path) -> None:
    publish(hub, tiny_checkpoint, FIRST)
    teacher = TeacherConfig(model=NAME)
    directory = ensure_checkpoint(teacher)
    assert directory.name == FIRST == hub_commit(teacher)
    assert vocabulary_size(teacher) == len(load_tokenizer(teacher))
    assert Vocabulary.from_tokenizer(directory).roles["end_of_text"] == STOPS[0]
    of_vllm, where = capturing_arguments(teacher, str(directory)), ("model", "revision", "tokenizer_revision")
    assert {name: of_vllm[name] for name in where} == dict(zip(where, (NAME, FIRST, FIRST), strict=True))
    assert hub_commit(TeacherConfig(model=str(directory))) is None


def test_both_ends_of_a_response_are_known_to_the_renderer(
    hub: Path, tiny_checkpoint: Path, make_config: Maker
) -> None:
    publish(hub, tiny_checkpoint, FIRST)
    renderer = load_renderer(of_hub(make_config()))
    assert renderer._chat.ends == set(STOPS)


def test_a_branch_that_moved_is_refused_with_both_commits(hub: Path, tiny_checkpoint: Path, make_config: Maker) -> None:
    publish(hub, tiny_checkpoint, FIRST)
    config = of_hub(make_config())

    def write(config: PipelineConfig) -> None:
        renderer, directory = prepare(config).renderer, ensure_checkpoint(config.teacher)
        vocabulary = Vocabulary.from_tokenizer(directory)
        provenance = provenance_of(config, vocabulary, renderer, "prompts", "collect")
        DatasetWriter(config.shards_dir, provenance, vocabulary, directory)

    write(config)
    before = fingerprint(config.teacher)
    publish(hub, tiny_checkpoint, SECOND)
    assert fingerprint(config.teacher) != before
    with pytest.raises(DatasetError, match=f"revision: '{FIRST}' there, '{SECOND}' here"):
        write(config)
    write(of_hub(make_config(), revision=FIRST))


def test_what_is_not_in_the_cache_is_refused_offline(hub: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"someone/tiny is not in the hub's cache .*`hf download someone/tiny`"):
        ensure_checkpoint(TeacherConfig(model=NAME))
    publish(hub, tiny_checkpoint, FIRST)
    with pytest.raises(CheckpointError, match=r"at teacher.revision v2 is not in the hub's cache"):
        ensure_checkpoint(TeacherConfig(model=NAME, revision="v2"))
    (hub / "models--someone--tiny" / "snapshots" / FIRST / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        ensure_checkpoint(TeacherConfig(model=NAME))


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        (
            "GatedRepo", 403,
            r"is gated .* accept its terms at https://huggingface.co/someone/tiny, .*`hf auth login`.*HF_TOKEN",
        ),
        ("RepoNotFound", 404, r"nor a repository that can be seen on the hub.*`hf auth login`"),
        ("RevisionNotFound", 404, r"no such branch, tag or commit; correct teacher\.revision"),
    ],
)  # fmt: skip
def test_what_the_hub_refuses_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, code: str, status: int, message: str
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with refusing_hub(code, status) as (url, _):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)
        with pytest.raises(CheckpointError, match=message):
            ensure_checkpoint(TeacherConfig(model=NAME, revision="main"))


@pytest.mark.parametrize(
    "name", ["someone/..", "some..one/x", "someone/a..b", "../tiny", "a/../tiny", "~/tiny", "tiny"]
)
def test_what_is_neither_a_path_here_nor_a_name_asks_nobody(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(CheckpointError) as caught:
        ensure_checkpoint(TeacherConfig(model=name))
    assert f"teacher.model {name} does not exist; point it at a checkpoint directory" in str(caught.value)
    with pytest.raises(PromptError) as refused:
        load_prompts(Path(name))
    assert str(refused.value).startswith(f"cannot read {name}: ")


def test_a_file_of_prompts_in_a_folder_that_is_not_there_is_no_dataset_s_name() -> None:
    with pytest.raises(PromptError, match=r"cannot read data/prompts\.jsonl: No such file or directory"):
        load_prompts(Path("data/prompts.jsonl"))
