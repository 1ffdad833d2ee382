"""Real servers: the records of an engine in process, whatever happens to the server; and prompts by a teacher."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from shared.config import load_config
from shared.dataset.reader import Dataset
from shared.dataset.records import Record
from shared.errors import ServiceError
from teacher.engine.service import ServiceEngine
from teacher.prompts import load_prompts
from tests.fixtures.teacher_server import Server
from tests.teacher.conftest import finish, teacher, write_config

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.usefixtures("warm_serving")]

ROOT = Path(__file__).parents[2]
TOLERANCE = 2e-3
"""Nats between two runs of vLLM in float32 with other batches."""


def config_of(folder: Path, model: Path, name: str, urls: list[str] | None = None) -> Path:
    path = write_config(folder, model, prompts=24)
    tree = yaml.safe_load(path.read_text())
    tree["name"] = name
    tree["teacher"] |= {"kv_cache_gib": 1, "enforce_eager": True}
    tree["collect"]["unit_prompts"] = 2
    for rule in tree["collect"]["decoding"]:
        rule["max_response_tokens"] = 60
    if urls is not None:
        tree["teacher"]["service"] = {"urls": urls, "patience_minutes": 5}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def in_process(folder: Path, tiny_model: Path) -> dict[str, Record]:
    finish(teacher("collect", config_of(folder, tiny_model, "local")))
    return records(folder, "local")


@pytest.fixture(scope="module")
def server(folder: Path, tiny_model: Path) -> Iterator[Server]:
    server = Server(config_of(folder, tiny_model, "server"), folder / "server.log")
    server.start()
    server.wait()
    yield server
    server.kill()


def records(folder: Path, name: str) -> dict[str, Record]:
    return {record.sample_id: record for record in Dataset.open(folder / "runs" / name / "shards").records()}


def assert_same(ours: dict[str, Record], theirs: dict[str, Record]) -> None:
    assert list(ours) == list(theirs)
    for key, record in ours.items():
        other = theirs[key]
        np.testing.assert_array_equal(record.response_ids, other.response_ids)
        assert record.finish_reason == other.finish_reason
        assert record.prompt_text == other.prompt_text
        assert record.distributions is not None
        assert other.distributions is not None
        np.testing.assert_allclose(record.distributions.sampled, other.distributions.sampled, atol=TOLERANCE + 1 / 16)
        np.testing.assert_allclose(record.distributions.tail, other.distributions.tail, atol=TOLERANCE)
        np.testing.assert_allclose(
            record.distributions.logprobs, other.distributions.logprobs, atol=0.05
        )  # of 1/16 nat
        assert (record.distributions.ids == other.distributions.ids).mean() > 0.98  # near ties may swap


def test_a_server_killed_in_the_middle_loses_nothing(
    folder: Path, tiny_model: Path, server: Server, in_process: dict[str, Record]
) -> None:
    process = teacher("collect", config_of(folder, tiny_model, "remote", [server.url]))
    commits = folder / "runs" / "remote" / "shards" / "commits"
    while len(list(commits.glob("*.json"))) < 2:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    server.kill()
    there = len(list(commits.glob("*.json")))
    assert there < len({record.sample_id for record in in_process.values()}) // 2  # units of two prompts or more
    time.sleep(2)
    assert process.poll() is None, process.communicate()[0]
    server.start()
    finish(process)
    assert_same(records(folder, "remote"), in_process)


def test_scoring_through_a_server_gives_the_same_rows(
    folder: Path, tiny_model: Path, server: Server, in_process: dict[str, Record]
) -> None:
    server.wait()
    config = config_of(folder, tiny_model, "scored", [server.url])
    finish(teacher("score", config, "--set", f"collect.responses={folder / 'runs/local/shards'}"))
    scored = records(folder, "scored")
    assert_same({key: scored[key] for key in in_process}, in_process)


def test_another_model_behind_the_url_is_refused(folder: Path, tiny_model: Path, server: Server) -> None:
    server.wait()
    teacher = load_config(config_of(folder, tiny_model, "wrong", [server.url])).teacher
    copy = folder / "another"
    copy.mkdir()
    for file in tiny_model.iterdir():
        (copy / file.name).symlink_to(file)
    with pytest.raises(ServiceError, match=r"serves .*tiny-model, teacher.model is .*another; correct one"):
        ServiceEngine(teacher.model_copy(update={"model": str(copy)}), top_k=8)


def test_a_teacher_writes_prompts(folder: Path, tiny_model: Path, server: Server) -> None:
    server.wait()
    written = folder / "written.jsonl"
    section = f"{{path: {written}, count: 20, max_prompt_tokens: 100, min_characters: 2}}"
    config = config_of(folder, tiny_model, "write", [server.url])
    assert "drafts" in finish(teacher("write-prompts", config, "--set", f"collect.write_prompts={section}"))
    prompts = load_prompts(written)
    assert len({prompt.content for prompt in prompts}) == 20
    assert {prompt.skill for prompt in prompts} == {"self-generated"}


def test_a_speculating_server_and_one_of_few_logprobs_are_refused(folder: Path, tiny_model: Path) -> None:
    speculation = """--speculative-config '{"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}'"""
    flags = (speculation, "--max-logprobs", "4")
    bad = Server(config_of(folder, tiny_model, "bad"), folder / "bad.log", *flags)
    bad.start()
    try:
        bad.wait()
        teacher = load_config(config_of(folder, tiny_model, "refused", [bad.url])).teacher
        with pytest.raises(ServiceError, match="decodes speculatively"):
            ServiceEngine(teacher, top_k=8)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ServiceEngine, "_check_metrics", _unchecked)
            with pytest.raises(ServiceError, match=r"fewer logprobs than collect.top_k 8 .*--max-logprobs -1"):
                ServiceEngine(teacher, top_k=8)
    finally:
        bad.kill()


async def _unchecked(_engine: ServiceEngine, _server: object) -> None:
    """In place of a check that comes first."""
