"""The real engine, on the demo's real teacher: what is captured is what the model says. A kill costs nothing.

Each engine lives in a process of its own, as it does for users: vLLM leaves global state behind.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.config import load_config
from shared.dataset.reader import Dataset
from shared.dataset.records import Record, Sampling
from shared.dataset.split import stable_hash
from tests.fixtures.random_teacher import save_random_teacher, write_run
from tests.teacher.conftest import finish, teacher, write_config

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.usefixtures("warm_serving")]

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs" / "demo.yaml"
K = 16
PROMPTS = 40
TOLERANCE = 2e-3
"""Nats between decoding and scoring in float32; a shift by one position is off by whole nats."""


def _probe() -> dict[str, Any]:
    """Answers of one engine, captured in every way that there is."""
    from teacher.checkpoints import ensure_checkpoint, load_tokenizer
    from teacher.engine import Engine, Request
    from teacher.prompts import Renderer, load_prompts

    # Not all prompts fit into one forward; vLLM's CPU build cannot read a seeded request's in parts.
    small = ["teacher.max_sequence_tokens=128", "teacher.prefill_tokens=64"]
    config = load_config(DEMO, ["teacher.kv_cache_gib=1", "teacher.max_num_seqs=8", *small])
    renderer = Renderer(load_tokenizer(config.teacher))
    prompts = load_prompts(ROOT / config.collect.prompts)[::90][:6]
    rendered = {prompt.id: renderer.render(prompt).ids for prompt in prompts}
    engine = Engine(config.teacher, str(ensure_checkpoint(config.teacher)), top_k=K)

    def answer(temperature: float, seed: int, only: str | None = None) -> dict[str, Any]:
        requests = [
            Request(key, ids, Sampling(temperature, 1, 0, 16, stable_hash(seed, key) if temperature else None))
            for key, ids in rendered.items()
            if only in (None, key)
        ]
        return {answer.key: answer for answer in engine.stream(requests)}

    greedy = answer(0, 0)
    sampled = answer(1, 0)
    alone = {key: answer(1, 0, only=key)[key] for key in list(rendered)[:3]}
    other_seed = answer(1, 1)
    given = [
        Request(key, rendered[key], Sampling(0, 1, 0, 1, None), response_ids=found.response_ids)
        for key, found in greedy.items()
    ]
    scored = {answer.key: answer for answer in engine.stream(given)}
    capture = engine.capture
    engine.use_flat_logprobs()
    flat = answer(0, 0)
    engine.close()
    return {
        "prompts": rendered, "greedy": greedy, "sampled": sampled, "alone": alone, "other_seed": other_seed,
        "scored": scored, "flat": flat, "capture": capture,
    }  # fmt: skip


@pytest.fixture(scope="module")
def probe() -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_probe).result()


def test_the_numpy_rows_are_verified_and_equal_vllms_own_container(probe: dict[str, Any]) -> None:
    assert probe["capture"] == "numpy"
    for key, answer in probe["greedy"].items():
        flat = probe["flat"][key]
        np.testing.assert_array_equal(answer.response_ids, flat.response_ids)
        np.testing.assert_allclose(answer.columns.logprobs, flat.columns.logprobs, atol=TOLERANCE)
        assert (answer.columns.ids == flat.columns.ids).mean() > 0.99  # neighbours closer than rounding may swap


def test_rows_belong_to_their_tokens(probe: dict[str, Any]) -> None:
    for kind in ("greedy", "sampled"):
        for answer in probe[kind].values():
            assert answer.columns.ids.shape == (len(answer.response_ids), K + 1)
            np.testing.assert_array_equal(answer.columns.ids[:, 0], answer.response_ids)
            assert (np.diff(answer.columns.logprobs[:, 1:], axis=1) <= 0).all()
            assert (np.exp(answer.columns.logprobs[:, 1:].astype(np.float64)).sum(axis=1) <= 1 + 1e-5).all()
    for answer in probe["greedy"].values():  # the sampled token of a greedy answer is its first candidate
        np.testing.assert_allclose(answer.columns.logprobs[:, 0], answer.columns.logprobs[:, 1], atol=1e-5)


def test_scoring_a_text_agrees_with_generating_it(probe: dict[str, Any]) -> None:
    """The same rows, from a prefill and from decoding; the rows one position off must not pass for them."""
    from teacher.capture import response_columns, to_distributions

    compared = 0
    for key, answer in probe["greedy"].items():
        length, prompt = len(answer.response_ids), len(probe["prompts"][key])
        rows = response_columns(probe["scored"][key].columns, prompt, length)
        generated = to_distributions(answer.columns, answer.response_ids, 49_152)
        scored = to_distributions(rows, answer.response_ids, 49_152)
        np.testing.assert_allclose(scored.sampled, generated.sampled, atol=TOLERANCE)
        np.testing.assert_allclose(scored.logprobs, generated.logprobs, atol=TOLERANCE)
        np.testing.assert_allclose(scored.tail, generated.tail, atol=TOLERANCE)
        assert not np.allclose(scored.logprobs[K:], generated.logprobs[:-K], atol=100 * TOLERANCE)
        compared += length
    assert compared > 30


def test_a_sample_depends_on_its_seed_and_not_on_its_neighbours(probe: dict[str, Any]) -> None:
    for key, answer in probe["alone"].items():
        np.testing.assert_array_equal(answer.response_ids, probe["sampled"][key].response_ids)
    different = [
        probe["sampled"][key].response_ids.tolist() != found.response_ids.tolist()
        for key, found in probe["other_seed"].items()
    ]
    assert sum(different) >= len(different) // 2


# --- the command line, killed and resumed -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole` collected in one go; `cut` killed twice, by SIGKILL and by ctrl-C, and resumed; `scored` from `whole`."""
    folder = tmp_path_factory.mktemp("collect")
    base = write_config(folder, save_random_teacher(tiny_checkpoint, folder / "teacher"), prompts=PROMPTS)
    decoding = [
        {"split": "train", "temperature": 0, "max_response_tokens": 24},
        {"split": "train", "temperature": 1, "max_response_tokens": 24},
        {"split": "held_out", "temperature": 0, "max_response_tokens": 24},
    ]
    whole, cut, scored = (
        write_run(base, name, top_k=K, unit_prompts=2, decoding=decoding) for name in ("whole", "cut", "scored")
    )
    finish(teacher("collect", whole))
    commits = folder / "runs" / "cut" / "shards" / "commits"
    for number, how in ((2, signal.SIGKILL), (6, signal.SIGINT)):
        process = teacher("collect", cut)
        while len(list(commits.glob("*.json"))) < number:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        os.kill(process.pid, how)
        output, _ = process.communicate(timeout=60)
        assert process.returncode != 0, f"it was done before it could be killed:\n{output}"
        assert "Traceback" not in output
    (folder / "resumed.txt").write_text(finish(teacher("collect", cut)))
    finish(teacher("score", scored, "--set", f"collect.responses={folder / 'runs/whole/shards'}"))
    return folder


def _records(folder: Path, name: str) -> dict[str, Record]:
    return {record.sample_id: record for record in Dataset.open(folder / "runs" / name / "shards").records()}


def test_killed_and_resumed_is_uninterrupted(runs: Path) -> None:
    whole, cut = _records(runs, "whole"), _records(runs, "cut")
    assert list(whole) == list(cut)
    for key, record in whole.items():
        again = cut[key]
        assert record.prompt_text == again.prompt_text
        np.testing.assert_array_equal(record.response_ids, again.response_ids)
        assert record.distributions is not None
        assert again.distributions is not None
        np.testing.assert_allclose(record.distributions.sampled, again.distributions.sampled, atol=TOLERANCE)
    names = [
        sorted(str(p.relative_to(runs / "runs" / name)) for p in (runs / "runs" / name).rglob("*"))
        for name in ("whole", "cut")
    ]
    assert names[0] == names[1]  # no stray file


def test_resuming_repeated_nothing(runs: Path) -> None:
    words = " ".join((runs / "resumed.txt").read_text().split())
    total = len(Dataset.open(runs / "runs" / "cut" / "shards").manifest.units)
    done = int(words.partition(f" of {total} units are there")[0].split()[-1])
    assert 6 <= done < total


def test_a_finished_run_is_not_started_again(runs: Path) -> None:
    before = (runs / "runs/whole/shards/manifest.json").read_bytes()
    started = time.monotonic()
    output = finish(teacher("collect", runs / "whole.yaml"))
    assert "0 to collect" in " ".join(output.split())
    assert "vLLM" not in output
    assert time.monotonic() - started < 60
    assert (runs / "runs/whole/shards/manifest.json").read_bytes() == before


def test_the_summary_is_measured(runs: Path) -> None:
    summary = json.loads((runs / "runs/whole/collect.json").read_text())
    records = _records(runs, "whole")
    assert summary["responses"] == len(records)
    assert 1.5 * PROMPTS < len(records) < 2 * PROMPTS  # those in training two times
    assert summary["tokens"] == sum(len(record.response_ids) for record in records.values())
    assert summary["tokens_per_s"] > 0
    kept = [record.distributions.tail for record in records.values() if record.distributions is not None]
    assert summary["mean_topk_mass"] == pytest.approx(1 - np.concatenate(kept).mean(), abs=1e-3)
    assert summary["capture_ratio"] is None  # it was not asked for


def test_a_scored_dataset_has_the_collected_rows(runs: Path) -> None:
    whole, scored = _records(runs, "whole"), _records(runs, "scored")
    assert whole.keys() == scored.keys()
    for key, record in whole.items():
        again = scored[key]
        np.testing.assert_array_equal(record.response_ids, again.response_ids)
        assert (record.sampling, record.finish_reason) == (again.sampling, again.finish_reason)
        assert record.distributions is not None
        assert again.distributions is not None
        # Both were rounded to 1/1024 nat on disk.
        np.testing.assert_allclose(record.distributions.sampled, again.distributions.sampled, atol=TOLERANCE + 1 / 512)
