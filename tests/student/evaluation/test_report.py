from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from shared.commands.stats import measure
from shared.config import PipelineConfig
from shared.dataset.manifest import Manifest
from shared.dataset.reader import Dataset
from shared.errors import UserError
from shared.files import write_json
from student.evaluation import plots
from student.evaluation import report as report_module
from student.evaluation.plots import INK
from student.evaluation.report import _speeds, figure, write_report
from student.lineage import IDENTITY, evaluation_identity, prepared_identity, present, speculation_identity
from tests.fixtures.toy_run import load_toy, write_toy_shards

STEP = {
    "step": 1,
    "loss": 3.0,
    "ce": 3.5,
    "kl": 2.5,
    "grad_norm": 1.0,
    "learning_rate": 0.001,
    "data_wait": None,
    "match_by_depth": [0.2, None],
}
MEASURED = {"tau": 1.25, "accepted_one_hot": 0.25, "by_depth": [0.2, 0.05], "alpha_low": 0.1, "alpha_high": 0.3}


def finished(config: PipelineConfig, **speculate: Any) -> None:
    """What the stages leave behind, without having run them."""
    write_json(config.run_dir / "collect.json", {"responses": 12, "tokens": 3456, "capture_ratio": None})
    measured = MEASURED | {"by_skill": {"odd": 1.2, "even": 1.3}}
    said: dict[str, Any] = {"prompt": "1 < 2?", "teacher": "Yes, 1 < 2.", "student": "Yes."}
    said["drafted"] = [["own", "Yes"], ["accepted", ", 1 <"], ["rejected", " 3"], ["own", " 2."]]
    evaluate = {"rule": "greedy", "before": measured, "after": measured, "answers": [said]}
    evaluate["identity"] = evaluation_identity(config)
    write_json(config.run_dir / "evaluate.json", evaluate)
    figures = {"drafts": 7, "prompts": 9, "outputs_identical": True, "identity": speculation_identity(config)}
    write_json(config.run_dir / "speculate.json", figures | speculate)
    lines = [json.dumps(STEP | {"step": step}) for step in (1, 2, 3)]
    (config.run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def collected(config: PipelineConfig) -> Manifest:
    """A dataset, what its collection and the mapping of its rows left behind."""
    write_toy_shards(config)
    manifest = Dataset.open(config.shards_dir).manifest
    write_json(config.run_dir / "collect.json", {"responses": manifest.rows, "tokens": manifest.tokens})
    made_from = prepared_identity(config.prepare, present(config, "dataset", "teacher vocabulary", "tokenizer"))
    write_json(config.prepared_dir / "manifest.json", {IDENTITY: made_from})
    write_json(config.prepared_dir / "summary.json", {"counts": {"cut_character": 5, "changed_text": 0}})
    return manifest


def test_every_key_is_there_and_what_was_not_measured_is_null(tmp_path: Path) -> None:
    config = load_toy(tmp_path)
    finished(config)
    report = write_report(config)
    assert json.loads((config.report_dir / "report.json").read_text()) == report
    assert report["collect"]["tokens"] == 3456
    assert report["collect"]["capture_ratio"] is None
    assert report["evaluate"]["after"]["tau"] == 1.25
    assert report["train"] == dict.fromkeys(("steps", "tokens", "loss_first", "loss_last", "tokens_per_s"))
    assert set(report["speculate"]) == {
        "drafts",
        "acceptance_length",
        "accepted_per_position",
        "outputs_identical",
        "tokens_per_s",
        "baseline_tokens_per_s",
        "latency",
    }
    unmeasured = {"tokens_per_s": None, "baseline_tokens_per_s": None, "speedup": None}
    alone = {"tokens_per_s": None, "speedup": None}
    assert report["speculate"]["latency"] == unmeasured | {"llada_alone": alone}


def test_the_page_shows_its_pictures_and_says_what_was_not_measured(tmp_path: Path) -> None:
    config = load_toy(tmp_path)
    finished(config)
    write_report(config)
    page = (config.report_dir / "index.html").read_text()
    for picture in ("loss.svg", "acceptance.svg", "training.svg", "depth.svg", "skills.svg"):
        drawn = (config.report_dir / picture).read_text()
        assert ElementTree.fromstring(drawn).tag.endswith("svg")
        assert drawn in page
        assert "currentColor" in drawn
        assert INK not in drawn
    # The page needs nothing but itself.
    assert not re.search(r"<(img|script|link|iframe)\b|@import|url\((?!#)", page)
    assert "not measured" in page
    assert "3,456" in page
    pieces = (("own", "Yes"), ("accepted", ", 1 &lt;"), ("rejected", " 3"), ("own", " 2."))
    said = "".join(f'<span class="{kind}">{text}</span>' for kind, text in pieces)
    assert f"<td>1 &lt; 2?</td><td>{said}</td><td>Yes.</td>" in page


def test_what_was_collected_and_how_it_was_mapped_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_toy(tmp_path)
    finished(config)
    manifest = collected(config)
    report = write_report(config)
    assert json.loads((config.report_dir / "report.json").read_text()) == report
    whole = measure(config.shards_dir).to_json()
    assert report["dataset"] == whole
    page = (config.report_dir / "index.html").read_text()
    assert "responses cut inside a character</td><td>5</td>" in page
    assert (config.report_dir / "dataset.svg").read_text() in page
    assert f"from {manifest.tokens:,} of its response tokens" in page
    monkeypatch.setattr(report_module, "SAMPLE_TOKENS", manifest.tokens // 2)
    assert 0 < write_report(config)["dataset"]["tokens"] < manifest.tokens
    # A dataset that is another than collect.json speaks of is not mixed into the page.
    write_json(config.run_dir / "collect.json", {"responses": 1, "tokens": 2})
    assert write_report(config)["dataset"] is None


def test_a_long_training_is_drawn_in_some_of_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_toy(tmp_path)
    finished(config)
    monkeypatch.setattr(report_module, "MOST_STEPS", 50)
    journal, sizes = config.run_dir / "metrics.jsonl", []
    for steps in (50, 5000):
        noisy = (STEP | {"step": step, "kl": 1 + step * 7919 % 101} for step in range(steps))
        journal.write_text("".join(f"{json.dumps(line)}\n" for line in noisy))
        write_report(config)
        sizes.append((config.report_dir / "training.svg").stat().st_size)
    assert sizes[1] < 1.2 * sizes[0]


def test_speeds_are_shown_by_kind_of_draft(tmp_path: Path) -> None:
    config = load_toy(tmp_path)
    speed = {
        "tokens_per_s": 25.0,
        "baseline_tokens_per_s": 20.0,
        "speedup": 1.25,
        "acceptance_length": 1.5,
        "tokens_per_step": 1.2,
    }
    alone, ngram = (
        speed | {"speedup": 1.125, "tokens_per_s": 22.5},
        speed | {"acceptance_length": 1.0625, "tokens_per_step": 1.04},
    )
    latency = speed | {"llada_alone": alone, "ngram": ngram, "suffix": None}
    finished(config, **speed, latency=latency, ngram=ngram, suffix=None)
    report = write_report(config)
    assert report["speculate"]["latency"]["speedup"] == 1.25
    assert report["speculate"]["latency"]["llada_alone"] == {"tokens_per_s": 22.5, "speedup": 1.125}
    page = (config.report_dir / "index.html").read_text()
    assert (config.report_dir / "speed.svg").read_text() in page
    assert "1.250 ×</b>as fast as without a draft, one request in flight" in page
    by_draft = _speeds({"latency": latency, **speed, "ngram": ngram})["one request in flight"]
    assert by_draft["LLaDA alone"] == (1.125, 22.5)  # against its own turns, not 22.5 / 20
    for shown in ("1.250", "1.125", "1.062, 1.040", "20.0, 25.0", "the same of vLLM&#39;s ngram"):
        assert shown in page


def test_what_proves_and_prices_the_draft_is_shown_where_it_was_measured(tmp_path: Path) -> None:
    config = load_toy(tmp_path)
    finished(config)
    identity = {"identity": speculation_identity(config)}
    point = {"acceptance_length": 2.0, "speedup": 1.1}
    worth = {"draft_tokens": 3, "in_flight": 8, "measured": [{"latency": point, "throughput": point}]}
    worth["needed"] = {"latency": 1.82, "throughput": 2.5}
    write_json(config.run_dir / "break_even.json", worth | identity)
    write_json(config.run_dir / "certificate.json", {"passed": False} | identity)
    write_report(config)
    page = (config.report_dir / "index.html").read_text()
    assert (config.report_dir / "break_even.svg").read_text() in page
    assert "1.82, 2.50" in page
    assert "FAILED" in page
    # Of another model, both are left out, and how to make them again is said.
    write_json(config.run_dir / "break_even.json", worth | {"identity": {"speculate.draft_tokens": 99}})
    assert "student speculate --break-even" in write_report(config)["stale"]["break_even"]


def test_a_student_that_drafted_nothing_has_no_place_on_the_curve() -> None:
    point = {"acceptance_length": 2.0, "speedup": 1.1}
    worth = {"draft_tokens": 3, "in_flight": 8, "measured": [{"latency": point, "throughput": point}]}
    worth["needed"] = {"latency": 1.82, "throughput": 2.5}
    assert "this student" in plots.break_even(worth, point)
    assert "this student" not in plots.break_even(worth, point | {"acceptance_length": None})


def test_a_slower_run_says_so(tmp_path: Path) -> None:
    config = load_toy(tmp_path)
    speed = {"tokens_per_s": 18.0, "baseline_tokens_per_s": 20.0, "speedup": 0.9, "acceptance_length": 1.1}
    finished(config, **speed, latency=speed)
    write_report(config)
    page = (config.report_dir / "index.html").read_text()
    assert page.count('class="card bad"') == 2
    assert "0.900 ×</b>slower than without a draft, one request in flight" in page


@pytest.mark.parametrize(("ties", "words"), [(True, "all numerical ties"), (False, "NOT all numerical ties")])
def test_outputs_that_differ_are_said_to(tmp_path: Path, ties: bool, words: str) -> None:
    config = load_toy(tmp_path)
    finished(config, outputs_identical=False, differences=[{}, {}], differences_are_ties=ties)
    write_report(config)
    assert f"2 differ, {words}" in (config.report_dir / "index.html").read_text()


def test_nothing_to_report_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no result of any stage"):
        write_report(load_toy(tmp_path))


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "not measured"), (True, "yes"), (1234, "1,234"), (1234.5, "1,234"), (44.26, "44.3"), (0.0744, "0.074")],
)
def test_figures_read_well(value: Any, shown: str) -> None:
    assert figure(value) == shown
