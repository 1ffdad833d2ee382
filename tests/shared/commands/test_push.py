"""`shards push` to a stand-in of the Hub, by the real client: what arrives is the dataset, whole and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml

from shared.dataset.manifest import MANIFEST
from shared.dataset.records import Record
from shared.dataset.validate import validate_dataset
from shared.hub import CARD
from tests.fixtures.hub import Hub, HubRepository
from tests.fixtures.records import make_records, write_dataset
from tests.shared.commands.test_cli import shards

REPOSITORY = "someone/rows"
UNITS: Mapping[str, Sequence[Record]] = {
    "held_out-greedy-00000": make_records(3, seed=1, split="held_out"),
    "train-greedy-00000": make_records(4, seed=2),
    "train-sample-00000": make_records(3, seed=4, rule="sample"),
}
DOWNLOAD = f"""
import json, sys
from datasets import load_dataset
from huggingface_hub import snapshot_download
print(json.dumps({{split: [*rows["sample_id"]] for split, rows in load_dataset("{REPOSITORY}").items()}}))
snapshot_download("{REPOSITORY}", repo_type="dataset", local_dir=sys.argv[1])
"""


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "d", UNITS)
    return tmp_path / "d"


@pytest.fixture
def by_git_lfs(hub_server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards go to an address of their own, by the older of the client's two protocols: the other is hf-xet's alone."""
    hub_server.large_files = True
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)


def pushed(hub: Hub) -> HubRepository:
    return hub.repositories[f"datasets/{REPOSITORY}"]


def contents(directory: Path) -> dict[str, bytes]:
    """The dataset's files but the card, which has the repository's name on the Hub."""
    files = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != CARD}


@pytest.mark.slow
@pytest.mark.usefixtures("by_git_lfs")
def test_what_was_pushed_loads_in_one_line_and_is_valid_after_download(
    dataset: Path, tmp_path: Path, hub_server: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = contents(dataset)
    (dataset / ".env").write_text("HF_TOKEN=secret")
    (dataset / "notes.txt").write_text("mine")
    assert shards(monkeypatch, "push", dataset, REPOSITORY) == 0
    assert f"pushed to {hub_server.url}/datasets/{REPOSITORY}" in capsys.readouterr().out
    assert pushed(hub_server).private
    assert {name: data for name, data in pushed(hub_server).files.items() if name != CARD} == expected
    variables = {"HF_ENDPOINT": hub_server.url, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", DOWNLOAD, str(tmp_path / "back")]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected_samples: dict[str, list[str]] = {}
    for records in UNITS.values():
        expected_samples.setdefault(records[0].split, []).extend(record.sample_id for record in records)
    assert json.loads(done.stdout) == expected_samples
    assert validate_dataset(tmp_path / "back").problems == []


@pytest.mark.usefixtures("by_git_lfs")
def test_an_upload_that_broke_off_sends_the_rest_when_it_is_run_again(
    dataset: Path, hub_server: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = json.loads((dataset / MANIFEST).read_text())["units"][0]["sha256"]
    hub_server.refused = f"PUT /lfs/{shard}"
    assert shards(monkeypatch, "push", dataset, REPOSITORY) == 2
    assert "the push to someone/rows failed: Error while uploading 'data/held_out-" in capsys.readouterr().err
    assert pushed(hub_server).files == {}
    assert shards(monkeypatch, "push", dataset, REPOSITORY) == 0
    large = [name for name in contents(dataset) if name.endswith(".parquet")]
    assert (hub_server.count("^PUT "), hub_server.count(f"^PUT /lfs/{shard}")) == (len(large) + 1, 2)
    assert {name: data for name, data in pushed(hub_server).files.items() if name != CARD} == contents(dataset)


def test_a_push_is_complete_or_has_no_manifest_and_again_changes_nothing(
    dataset: Path, hub_server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_server.refused = "POST .*/commit/"
    assert shards(monkeypatch, "push", dataset, REPOSITORY) == 2
    assert pushed(hub_server).files == {}
    # Once more, up to the second commit.
    assert shards(monkeypatch, "push", dataset, REPOSITORY) == 0
    first, second = pushed(hub_server).branches["main"][-2:]
    assert second.keys() - first.keys() == {MANIFEST, CARD}
    commits = len(pushed(hub_server).branches["main"])
    assert shards(monkeypatch, "push", dataset, REPOSITORY) == 0
    assert len(pushed(hub_server).branches["main"]) == commits


def test_another_dataset_takes_the_place_of_the_one_that_was_there(
    dataset: Path, tmp_path: Path, hub_server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shards(monkeypatch, "push", dataset, REPOSITORY) == 0
    pushed(hub_server).files["LICENSE"] = b"theirs"
    write_dataset(tmp_path / "other", {"train-greedy-00007": make_records(2, seed=9)})
    assert shards(monkeypatch, "push", tmp_path / "other", REPOSITORY) == 0
    files = pushed(hub_server).files
    assert files.pop("LICENSE") == b"theirs"
    assert {name: data for name, data in files.items() if name != CARD} == contents(tmp_path / "other")


def test_a_branch_of_its_own_and_the_words_of_the_commit(
    dataset: Path, hub_server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shards(monkeypatch, "push", dataset, REPOSITORY, "--public", "--revision", "k64") == 0
    assert not pushed(hub_server).private
    assert pushed(hub_server).files == {}
    assert MANIFEST in pushed(hub_server).branches["k64"][-1]


def test_the_card_names_no_place_on_this_machine(
    tmp_path: Path, hub_server: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = str(tmp_path / "models" / "big-teacher")
    write_dataset(tmp_path / "d", UNITS, teacher=teacher)
    card = tmp_path / "d" / CARD
    assert shards(monkeypatch, "push", tmp_path / "d", REPOSITORY, "--license", "mit") == 0
    # Lines of a log are broken anywhere.
    assert f"provenance.jsonispushedasitwascollected,andnamespathsofamachine,suchas{teacher};" in "".join(
        capsys.readouterr().err.split()
    ).replace("INFO", "")
    made = pushed(hub_server).files[CARD].decode()
    assert "# Top-k distributions of big-teacher" in made
    assert '("someone/rows")' in made
    assert "| license | mit |" in made
    # One that somebody wrote keeps their words, and gets what `datasets` finds the splits by.
    card.write_text(f"---\nlanguage: en\n---\nRows of {teacher}, for my thesis.\n")
    assert shards(monkeypatch, "push", tmp_path / "d", REPOSITORY, "--license", "mit") == 0
    edited = pushed(hub_server).files[CARD].decode()
    assert edited.endswith("Rows of big-teacher, for my thesis.\n")
    front, made_front = (yaml.safe_load(text.split("---\n")[1]) for text in (edited, made))
    assert front == {"language": "en", "configs": made_front["configs"], "license": "mit"}
    for text in (made, edited):
        assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["../rows"], "'../rows' is no name of a repository"),
        (["someone/../rows"], "'someone/../rows' is no name of a repository"),
        (["someone/ro..ws"], "Cannot have -- or .. in repo_id"),
        (["datasets/someone/rows"], "expected OWNER/NAME"),
        (["rows"], "'rows' is no name of a repository; expected OWNER/NAME"),
        (["another/rows"], "rights to create a repository under this namespace; use `hf auth login`"),
        ([REPOSITORY, "--license", "none of your business"], "must be one of [mit, apache-2.0, unknown]"),
    ],
)
def test_what_the_hub_would_not_take_is_refused_before_anything_is_sent(
    dataset: Path,
    hub_server: Hub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert shards(monkeypatch, "push", dataset, *arguments) == 2
    captured = " ".join(capsys.readouterr().err.split())
    assert message in captured
    assert "Traceback" not in captured
    assert hub_server.repositories == {}
    assert hub_server.count("preupload|/lfs/") == 0


def test_who_is_not_logged_in_is_told_how(
    dataset: Path, tmp_path: Path, hub_server: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    assert shards(monkeypatch, "push", dataset, REPOSITORY) == 2
    told = capsys.readouterr().err
    assert "`hf auth login`, or set HF_TOKEN" in told
    assert "hf_of_somebody_else" not in told
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    hub_server.requests.clear()
    assert shards(monkeypatch, "push", dataset, REPOSITORY) == 2
    assert "nobody is logged in on this machine; use `hf auth login`, or set HF_TOKEN" in capsys.readouterr().err
    assert hub_server.requests == []


def test_a_public_repository_gets_nothing_that_was_to_be_private(
    dataset: Path, hub_server: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for private, option, seen in ((False, "--private", "public"), (True, "--public", "private")):
        hub_server.repositories[f"datasets/{REPOSITORY}"] = HubRepository(private)
        assert shards(monkeypatch, "push", dataset, REPOSITORY, option) == 2
        assert f"someone/rows is there already and {seen}, but {option}" in capsys.readouterr().err
        assert pushed(hub_server).files == {}


def test_only_a_finished_and_valid_dataset_of_this_machine_is_pushed(
    dataset: Path, hub_server: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shards(monkeypatch, "push", "s3://bucket/rows", REPOSITORY) == 2
    assert "s3://bucket/rows is in an object store" in capsys.readouterr().err
    shard = dataset / "data/train-greedy-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert shards(monkeypatch, "push", dataset, REPOSITORY) == 2
    assert "train-greedy-00000.parquet is damaged" in capsys.readouterr().err
    (dataset / MANIFEST).unlink()
    assert shards(monkeypatch, "push", dataset, REPOSITORY) == 2
    assert "is unfinished: it has no manifest.json" in capsys.readouterr().err
    assert hub_server.repositories == {}


def test_a_hub_that_cannot_be_reached(
    dataset: Path, hub_server: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    assert shards(monkeypatch, "push", dataset, REPOSITORY) == 2
    assert "run the same command again: what has arrived is not sent again" in capsys.readouterr().err
    assert hub_server.requests == []
