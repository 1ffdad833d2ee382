"""Units become shards, whatever order answers come in; checks come before anything is written.

The engine here is scripted: it answers at once and out of order, with rows computed from the token ids. The real one
is in test_vllm.py.
"""

from __future__ import annotations

import gc
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from shared.config import PipelineConfig
from shared.dataset.claims import Claims
from shared.dataset.reader import Dataset
from shared.dataset.records import Record
from shared.dataset.split import stable_hash
from shared.dataset.writer import DatasetWriter
from shared.errors import AlignmentError, ConfigError, DatasetError, EngineError, PromptError
from shared.tokenizer.vocabulary import Vocabulary
from teacher import collect as collecting
from teacher.capture import Columns
from teacher.collect import Launch, check_top_k, prepare, provenance_of
from teacher.collector import WRITERS, Collector, Counts
from teacher.engine import Answer, Request
from teacher.engine.numpy_rows import ColumnBuffer
from teacher.plan import Assumptions, estimate
from teacher.prompts import prompts_fingerprint
from teacher.runners import progress, worker
from teacher.runners.local import parse_shard
from teacher.runners.worker import Worker
from teacher.summary import Summary, summarize, write_failures
from teacher.units import Unit, open_failures, retry_units
from tests.teacher.conftest import TEMPLATE

Maker = Callable[..., PipelineConfig]


class ScriptedEngine:
    """Answers in the reverse order of each window of `window` requests; `shift` moves rows against the text.

    Args:
        fails: how often the request of a sample id fails.
    """

    def __init__(self, top_k: int, window: int = 7, shift: int = 0, fails: dict[str, int] | None = None) -> None:
        self.top_k, self.window, self.shift = top_k, window, shift
        self.fails = dict(fails or {})
        self.asked: list[str] = []

    def stream(self, requests: Iterable[Request], capture: bool = True) -> Iterator[Answer]:
        del capture
        batch: list[Request] = []
        for request in requests:
            self.asked.append(request.key)
            batch.append(request)
            if len(batch) == self.window:
                yield from map(self._answer, reversed(batch))
                batch = []
        yield from map(self._answer, reversed(batch))

    def _answer(self, request: Request) -> Answer:
        if self.fails.get(request.key, 0) > 0:
            self.fails[request.key] -= 1
            return Answer(request.key, np.zeros(0, np.int32), "unknown", None, error="the engine stumbled")
        random = np.random.default_rng(stable_hash(request.key))
        ids = random.integers(3, 200, size=6).astype(np.int32)
        rows = np.arange(200, 200 + self.top_k, dtype=np.int32)[None].repeat(6, 0)
        sampled = np.roll(ids, self.shift)
        logprobs = np.log(np.full((6, self.top_k), 0.9 / self.top_k, dtype=np.float32))
        columns = Columns(
            np.concatenate([sampled[:, None], rows], axis=1),
            np.concatenate([np.full((6, 1), -7, dtype=np.float32), logprobs], axis=1),
        )
        return Answer(request.key, ids, "length", columns)


def collector_of(config: PipelineConfig, engine: ScriptedEngine) -> tuple[Collector, DatasetWriter, list[Unit]]:
    plan = prepare(config)
    directory = Path(config.teacher.model)
    vocabulary = Vocabulary.from_tokenizer(directory)
    provenance = provenance_of(config, vocabulary, plan.renderer, prompts_fingerprint(plan.fitting.prompts), "collect")
    writer = DatasetWriter(config.shards_dir, provenance, vocabulary, directory)
    return Collector(config, plan.renderer, vocabulary, writer, engine), writer, plan.units


def test_answers_out_of_order_become_whole_units_in_order(make_config: Maker) -> None:
    config = make_config(prompts=20)
    collector, writer, units = collector_of(config, ScriptedEngine(top_k=8))
    entries = list(collector.collect_units(units))
    assert {entry.unit for entry in entries} == {unit.name for unit in units}
    writer.finish([unit.name for unit in units])
    records = {record.sample_id: record for record in Dataset.open(config.shards_dir).records()}
    assert records.keys() == {task.sample_id for unit in units for task in unit.tasks}
    for unit in units:
        for task in unit.tasks:
            record = records[task.sample_id]
            assert (record.split, record.prompt_id, record.sampling) == (task.split, task.prompt.id, task.sampling)
            assert record.prompt_text.endswith("<|im_start|>assistant\n")
            assert record.distributions is not None
            np.testing.assert_allclose(record.distributions.tail, 0.1, atol=1e-3)
            np.testing.assert_allclose(record.distributions.sampled, -7, atol=1e-3)
    assert collector.counts.tokens == 6 * len(records)


def test_shifted_rows_never_reach_a_shard(make_config: Maker) -> None:
    config = make_config()
    collector, writer, units = collector_of(config, ScriptedEngine(top_k=8, shift=1))
    with pytest.raises(AlignmentError, match="shifted against the text"):
        list(collector.collect_units(units))
    assert not writer.committed


def test_a_request_that_fails_is_asked_again_and_then_recorded(make_config: Maker) -> None:
    config = make_config(prompts=20)
    units = prepare(config).units
    once, always = units[1].tasks[0].sample_id, units[2].tasks[1].sample_id
    collector, writer, units = collector_of(config, ScriptedEngine(8, fails={once: 2, always: 99}))
    list(collector.collect_units(units))
    assert writer.failures == {units[2].name: {always: f"{always}: the engine stumbled"}}
    assert (collector.counts.failures, collector.counts.units) == (1, len(units))
    names = [unit.name for unit in units]
    writer.finish(names)
    assert len(Dataset.open(config.shards_dir)) == sum(len(unit.tasks) for unit in units) - 1
    assert open_failures(names, writer.failures).keys() == {always}


def test_failed_responses_are_asked_again_as_a_unit_of_their_own(make_config: Maker) -> None:
    config = make_config(prompts=20)
    units = prepare(config).units
    first, second = units[0].tasks[0].sample_id, units[2].tasks[1].sample_id
    collector, writer, units = collector_of(config, ScriptedEngine(8, fails={first: 99, second: 99}))
    list(collector.collect_units(units))
    assert not retry_units(units, writer.failures, writer.begun(), again=False)
    # One passes now, the other does not, and is asked again by the next session that is told to.
    collector, writer, _ = collector_of(config, ScriptedEngine(8, fails={second: 99}))
    retries = retry_units(units, writer.failures, writer.begun(), again=True)
    assert [(unit.name, [task.sample_id for task in unit.tasks]) for unit in retries] == [
        (f"{units[0].name}.retry-1", [first]), (f"{units[2].name}.retry-1", [second]),
    ]  # fmt: skip
    list(collector.collect_units(retries))
    collector, writer, _ = collector_of(config, ScriptedEngine(8))
    assert [u.name for u in retry_units(units, writer.failures, writer.begun(), again=False)] == [
        unit.name for unit in retries
    ]
    retries = retry_units(units, writer.failures, writer.begun(), again=True)
    assert [unit.name for unit in retries if unit.name not in writer.committed] == [f"{units[2].name}.retry-2"]
    names = [unit.name for unit in [*units, *retries]]
    assert open_failures(names[:-1], writer.failures).keys() == {second}
    list(collector.collect_units(retries[-1:]))
    writer.finish(names)
    assert open_failures(names, writer.failures) == {}
    records = {record.sample_id for record in Dataset.open(config.shards_dir).records()}
    assert records == {task.sample_id for unit in units for task in unit.tasks}


def test_failures_end_up_in_a_file_and_leave_it(make_config: Maker) -> None:
    config = make_config()
    write_failures(config.run_dir, {"a": "no \u96ea"})
    assert json.loads((config.run_dir / "failures.jsonl").read_text()) == {"id": "a", "reason": "no \u96ea"}
    write_failures(config.run_dir, {})
    assert not (config.run_dir / "failures.jsonl").exists()


def test_failing_as_a_rule_stops_the_collection_and_names_the_reason(make_config: Maker) -> None:
    config = make_config(prompts=20)
    tasks = [task for unit in prepare(config).units for task in unit.tasks]
    collector, _, units = collector_of(config, ScriptedEngine(8, fails={task.sample_id: 99 for task in tasks}))
    with pytest.raises(EngineError, match=r"4 of 4 responses failed, each 3 times; the last: .*the engine stumbled"):
        list(collector.collect_units(units))


class Halves:
    """Two workers of this process on one dataset, each with an engine and claims of its own."""

    def __init__(self, make_config: Maker) -> None:
        self.config = make_config(prompts=20)
        self.engines = ScriptedEngine(8), ScriptedEngine(8)

    def work(self, number: int, is_stopped: Callable[[], bool] = lambda: False) -> list[str]:
        collector, writer, units = collector_of(self.config, self.engines[number])
        with Claims(writer.store.storage) as claims:
            Worker(collector, writer, claims, is_stopped).work(units)
        return self.engines[number].asked


def test_two_workers_at_once_share_the_units_and_both_see_them_done(make_config: Maker) -> None:
    halves = Halves(make_config)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(halves.work, range(2))
    assert not set(first) & set(second)
    _, writer, units = collector_of(halves.config, ScriptedEngine(8))
    assert set(first) | set(second) == {task.sample_id for unit in units for task in unit.tasks}
    writer.finish([unit.name for unit in units])


def test_a_worker_that_is_stopped_ends_what_it_began_and_the_next_goes_on(make_config: Maker) -> None:
    halves = Halves(make_config)
    asked = halves.work(0, is_stopped=lambda: len(halves.engines[0].asked) > 5)
    _, writer, units = collector_of(halves.config, ScriptedEngine(8))
    assert 0 < len(writer.committed) < len(units)
    assert len(asked) == sum(len(unit.tasks) for unit in units if unit.name in writer.committed)
    assert not set(halves.work(1)) & set(asked)
    assert collector_of(halves.config, ScriptedEngine(8))[1].committed == {unit.name for unit in units}


def test_what_is_not_done_when_the_grace_ends_is_abandoned(make_config: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "GRACE_S", -1.0)
    halves = Halves(make_config)
    halves.work(0, is_stopped=lambda: len(halves.engines[0].asked) > 5)
    _, writer, units = collector_of(halves.config, ScriptedEngine(8))
    assert len(writer.committed) * 4 < len(halves.engines[0].asked)
    halves.work(1)
    assert collector_of(halves.config, ScriptedEngine(8))[1].committed == {unit.name for unit in units}


def test_memory_holds_few_units_whatever_the_number_of_prompts(make_config: Maker) -> None:
    config = make_config(prompts=600, collect__unit_prompts=8)
    collector, _, units = collector_of(config, ScriptedEngine(8))
    held: list[int] = []

    def count() -> None:
        if collector.counts.responses % 50 == 0:
            held.append(sum(type(thing) is Record for thing in gc.get_objects()))

    collector.on_answer = count
    list(collector.collect_units(units))
    most = max(len(unit.tasks) for unit in units)
    assert len(held) > 10
    assert max(held) <= (WRITERS + 1 + 3) * most  # waiting for the disk, in a writer's hands, and in flight


def test_shards_divide_the_units_without_a_coordinator(make_config: Maker) -> None:
    units = prepare(make_config(prompts=20)).units
    shares = [units[parse_shard(f"{i}/3")] for i in range(3)]
    assert sorted(unit.name for share in shares for unit in share) == sorted(unit.name for unit in units)
    for text in ("3/3", "1", "a/2", "-1/2", "0/0"):
        with pytest.raises(ConfigError, match=f"--shard '{text}' is not I/N .* for example --shard 0/4"):
            parse_shard(text)


def test_the_progress_of_a_log_counts_units_and_what_is_left(
    make_config: Maker, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = prepare(make_config(prompts=20)).units
    monkeypatch.setattr(progress, "_LINE_S", 0.0)
    with caplog.at_level(logging.INFO, logger=progress.log.name), progress.Display("answering", units, []) as display:
        display.units_done([units[0].name])
        display.show(Counts(responses=8, tokens=48, failures=1, units=2, kept_mass=43.2))
    assert re.search(
        r"answering: 9 of 26 responses, 2/6 units, [\d,]+ tokens/s, 0.9000 of the mass kept, 1 failed, left: ",
        caplog.text,
    )


def test_an_interrupted_dataset_goes_on_with_what_is_missing(make_config: Maker) -> None:
    config = make_config(prompts=20)
    collector, writer, units = collector_of(config, ScriptedEngine(top_k=8))
    list(collector.collect_units(units[:2]))
    with pytest.raises(DatasetError, match="not complete"):
        writer.finish([unit.name for unit in units])
    engine = ScriptedEngine(top_k=8)
    again, writer, units = collector_of(config, engine)
    assert writer.committed == {unit.name for unit in units[:2]}
    list(again.collect_units(unit for unit in units if unit.name not in writer.committed))
    assert set(engine.asked) == {task.sample_id for unit in units[2:] for task in unit.tasks}
    writer.finish([unit.name for unit in units])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"collect__top_k": 9}, "top_k: 8 there, 9 here"),
        ({"seed": 5}, "seed: 0 there, 5 here"),
        ({"collect__rendered": False}, "rendered: None there, False here"),
        ({"collect__held_out": 0.5}, "held_out: 0.25 there, 0.5 here"),
    ],
)
def test_another_configuration_in_the_same_directory_is_refused(
    make_config: Maker, change: dict[str, object], named: str
) -> None:
    collector_of(make_config(), ScriptedEngine(top_k=8))
    with pytest.raises(DatasetError, match=named):
        collector_of(make_config(**change), ScriptedEngine(top_k=9))


def with_template(config: PipelineConfig, folder: Path, template: str) -> PipelineConfig:
    """`config` with a teacher of its own, the same but for its chat template."""
    model = Path(shutil.copytree(config.teacher.model, folder / "teacher", dirs_exist_ok=True))
    (model / "chat_template.jinja").write_text(template)
    return config.model_copy(update={"teacher": config.teacher.model_copy(update={"model": str(model)})})


DATED = "{% if not date is defined %}{% set date = strftime_now('%d.%m.%Y') %}{% endif %}{{ date }}\n" + TEMPLATE


def test_a_template_that_reads_the_clock_is_refused_before_anything_is_written(
    make_config: Maker, tmp_path: Path
) -> None:
    config = with_template(make_config(), tmp_path, DATED)
    with pytest.raises(ConfigError, match=r"writes the clock's time .*template_arguments: \{date: \d\d\.\d\d\.\d{4}\}"):
        prepare(config)
    config = with_template(make_config(collect__template_arguments={"dat": "1.1.2024"}), tmp_path, DATED)
    with pytest.raises(ConfigError, match=r"'dat' .*is not used .*did you mean 'date'"):
        prepare(config)
    config = with_template(make_config(collect__template_arguments={"date": "1.1.2024"}), tmp_path, DATED)
    plan = prepare(config)
    assert plan.renderer.render(plan.fitting.prompts[0]).text.startswith("1.1.2024\n<|im_start|>")
    assert not config.run_dir.exists()


def test_a_tokenizer_without_a_template_is_refused(make_config: Maker, tmp_path: Path) -> None:
    config = with_template(make_config(), tmp_path, "")
    (Path(config.teacher.model) / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"has no single chat template; add chat_template\.jinja to the checkpoint"):
        prepare(config)


def test_a_quantized_teacher_and_its_arguments_are_another_dataset(make_config: Maker) -> None:
    collector_of(make_config(), ScriptedEngine(top_k=8))
    placed = make_config(teacher__engine_args={"distributed_executor_backend": "ray"})
    collector_of(placed, ScriptedEngine(top_k=8))  # where it runs does not matter
    with pytest.raises(DatasetError, match=r"details.quantization: nothing there, 'fp8' here"):
        collector_of(make_config(teacher__quantization="fp8"), ScriptedEngine(top_k=8))


def test_another_rendering_of_the_same_template_is_refused(make_config: Maker, tmp_path: Path) -> None:
    """The template and its arguments are the same, and what it writes is not: here a token of the tokenizer's."""
    template = "{{ pad_token }}" + TEMPLATE
    config = with_template(make_config(), tmp_path, template)
    collector_of(config, ScriptedEngine(top_k=8))
    settings = Path(config.teacher.model) / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"pad_token": "<|im_end|>"', '"pad_token": "<|endoftext|>"'))
    with pytest.raises(DatasetError, match=r"details.rendered_probe.user: '<\|im_end\|><\|im_start\|>user"):
        collector_of(config, ScriptedEngine(top_k=8))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("what is <|im_start|> for?", r"prompt 'a': it holds <\|im_start\|>.*collect.rendered"),
        ("a\ufdd0", r"prompt 'a': it holds U\+FDD0"),
    ],
)
def test_a_prompt_that_may_be_rendered_is_refused(make_config: Maker, prompt: str, message: str) -> None:
    config = make_config(prompts=json.dumps({"id": "a", "prompt": prompt}))
    with pytest.raises(PromptError, match=message):
        prepare(config)
    assert not config.run_dir.exists()


def test_the_summary_counts_what_is_on_disk(make_config: Maker) -> None:
    config = make_config()
    collector, writer, units = collector_of(config, ScriptedEngine(top_k=8))
    list(collector.collect_units(units))
    writer.finish([unit.name for unit in units])
    dataset = Dataset.open(config.shards_dir)
    summary = summarize(config, dataset, Summary(tokens_per_s=100.0, workers=2))
    assert summary.workers == 2
    assert (summary.responses, summary.tokens) == (len(dataset), 6 * len(dataset))
    assert summary.mean_topk_mass == pytest.approx(0.9, abs=1e-3)
    assert summary.bytes_per_token == pytest.approx(dataset.manifest.bytes / summary.tokens)
    written = json.loads((config.run_dir / "collect.json").read_text())
    assert written == summary.model_dump()
    assert written["capture_ratio"] is None  # it was not measured


def test_too_large_a_k_is_refused_by_the_vocabularys_size(make_config: Maker) -> None:
    with pytest.raises(ConfigError, match=r"collect\.top_k is 301, but the teacher's vocabulary has \d+ tokens"):
        check_top_k(make_config(collect__top_k=301))


def test_all_prompts_that_fill_the_context_are_named_with_their_lengths(make_config: Maker) -> None:
    texts = [json.dumps({"id": f"p-{i}", "skill": "sums", "prompt": "word " * i}) for i in (200, 1, 300, 250)]
    with pytest.raises(PromptError) as error:
        prepare(make_config(prompts="\n".join(texts), collect__overlong="refuse"))
    message = str(error.value)
    assert message.startswith("3 of 4 prompts have 128 tokens or more")
    named = re.findall(r"'p-(\d+)' \((\d+)\)", message)
    assert [name for name, _ in named] == ["300", "250", "200"]
    assert f"raise teacher.max_sequence_tokens to {int(named[0][1]) + 8}" in message  # max_response_tokens is 8
    many = [json.dumps({"id": f"p-{i}", "skill": "sums", "prompt": "word " * 200}) for i in range(25)]
    with pytest.raises(PromptError, match=r"25 of 25 prompts .* and 5 others; shorten them"):
        prepare(make_config(prompts="\n".join(many)))


def test_another_configuration_says_that_another_name_collects_again(make_config: Maker) -> None:
    collector_of(make_config(), ScriptedEngine(top_k=8))
    with pytest.raises(
        DatasetError, match=r"top_k: 8 there, 7 here\n.*another `name` .* every response is generated again"
    ):
        collecting.collect(make_config(collect__top_k=7), Launch())


def test_answers_that_may_be_cut_are_announced(make_config: Maker, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger=collecting.log.name):
        prepare(make_config(collect__decoding=[{"split": "train", "max_response_tokens": 127}]))
    assert "less room than max_response_tokens (127)" in caplog.text


def test_a_plan_adds_up_and_guesses_nothing(make_config: Maker) -> None:
    config = make_config(prompts=12)  # 9 train greedy, 3 held out twice, 8 tokens each
    plain = estimate(config, Assumptions())
    assert (plain.prompts, plain.responses, plain.response_tokens) == (12, 15, 15 * 8)
    assert plain.hours is None
    assert plain.bytes is None
    stated = estimate(config, Assumptions(tokens_per_s=10, tokens_per_response=4, bytes_per_token=100, workers=2))
    assert stated.response_tokens == 60
    assert stated.bytes == 6000
    assert stated.hours == pytest.approx(60 / 10 / 2 / 3600)
    many = estimate(config, Assumptions(tokens_per_s=10, tokens_per_response=4, workers=99))
    assert many.hours == pytest.approx(60 / 10 / many.units / 3600)
    assert f"{many.units} workers of 99: the others find no unit" in many.sources["hours"]
    unknown = estimate(config, Assumptions(workers=99)).sources["hours"]
    assert unknown.startswith(f"nothing measured yet: state --tokens-per-s, {many.units} workers of 99: the others")
    assert not config.run_dir.exists()


def test_a_plan_takes_the_rates_of_an_earlier_session(make_config: Maker) -> None:
    config = make_config(prompts=12)
    config.run_dir.mkdir(parents=True)
    measured = Summary(responses=10, tokens=30, tokens_per_s=6, bytes_per_token=150)
    (config.run_dir / "collect.json").write_text(measured.model_dump_json())
    found = estimate(config, Assumptions())
    assert found.response_tokens == pytest.approx(45)
    assert found.hours == pytest.approx(45 / 6 / 3600)
    assert found.bytes == pytest.approx(45 * 150)
    assert "measured" in found.sources["hours"]
    # The rate of a session on Ray is that of all its workers.
    (config.run_dir / "collect.json").write_text(measured.model_copy(update={"workers": 3}).model_dump_json())
    assert estimate(config, Assumptions(workers=2)).hours == pytest.approx(45 / (6 / 3) / 2 / 3600)


def test_a_buffer_of_rows_grows_and_keeps_them() -> None:
    buffer = ColumnBuffer(3)
    expected = np.arange(300, dtype=np.int32).reshape(100, 3)
    for row in expected:
        wide = np.append(row, 99)[None]  # a neighbour in the batch asked for more candidates
        buffer.append(wide, wide.astype(np.float32))
    columns = buffer.columns()
    np.testing.assert_array_equal(columns.ids, expected)
    np.testing.assert_array_equal(columns.logprobs, expected.astype(np.float32))
