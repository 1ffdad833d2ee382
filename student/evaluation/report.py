"""`student report`: what every stage measured, as one JSON file, one page with pictures and one table on the screen.

The page is one file: it needs no other and no network.

Nothing is computed here but what some units of the dataset hold. A figure whose stage has not run is null, and so is
one that was measured on other inputs or with other settings than those of now; page and screen say which, and why.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from shared.commands.stats import Statistics, drawn, sample
from shared.config import PipelineConfig, dump_config
from shared.console import stdout
from shared.errors import UserError
from shared.files import read_json, write_json, write_text
from student.lineage import (
    IDENTITY,
    RECORD,
    TRAINED_FROM,
    differences,
    evaluation_identity,
    manifest_of,
    prepared_identity,
    present,
    speculation_identity,
)
from student.training.metrics_logger import read_metrics

_logger = logging.getLogger(__name__)

COLLECT = {
    "responses": "responses",
    "tokens": "tokens",
    "tokens_per_s": "tokens/s",
    "bytes_per_token": "bytes per token",
    "mean_topk_mass": "mean top-k mass",
    "capture_ratio": "speed with capture ÷ without",
}
"""Figure → what the page calls it."""
PREPARE = {
    "positions": "positions",
    "supervised_fraction": "share with a soft target",
    "mapped_mass": "mapped mass",
}
TRAIN = ("steps", "tokens", "loss_first", "loss_last", "tokens_per_s")
EVALUATE = ("tau", "alpha_low", "alpha_high", "accepted_one_hot", "by_depth")
SPECULATE = (
    "drafts",
    "acceptance_length",
    "accepted_per_position",
    "outputs_identical",
    "tokens_per_s",
    "baseline_tokens_per_s",
)
_COMMANDS = {"collect": "teacher collect", "break_even": "student speculate --break-even"}
SAMPLE_TOKENS = 1_000_000
"""Response tokens of the dataset that are read for its picture: some ten seconds."""
MOST_STEPS = 2_000
"""Of the journal that are drawn, evenly apart: the page would have megabytes of 30,000."""
LATENCY = ("tokens_per_s", "baseline_tokens_per_s", "speedup")
LLADA_ALONE = ("tokens_per_s", "speedup")


def gather(config: PipelineConfig) -> dict[str, Any]:
    """The report's keys, each from the file that its stage wrote; `stale` says for which stages that is out of date."""
    found = {name: read_json(path) or {} for name, path in _sources(config).items()}
    stale = _stale(config, found)
    stages = {name: {} if name in stale else stage for name, stage in found.items()}
    report: dict[str, Any] = {
        "stale": stale,
        "collect": _pick(stages["collect"], COLLECT),
        "prepare": _pick(stages["prepare"], PREPARE),
        "train": _pick(stages["train"], TRAIN),
        "evaluate": {when: _pick(stages["evaluate"].get(when, {}), EVALUATE) for when in ("before", "after")},
        "speculate": _pick(stages["speculate"], SPECULATE),
    }
    latency = stages["speculate"].get("latency") or {}
    report["speculate"]["latency"] = _pick(latency, LATENCY) | {
        "llada_alone": _pick(latency.get("llada_alone") or {}, LLADA_ALONE)
    }
    report["evaluate"]["rule"] = stages["evaluate"].get("rule")
    report["details"] = stages
    return report


def _sources(config: PipelineConfig) -> dict[str, Path]:
    return {
        "collect": config.run_dir / "collect.json",
        "init": config.student_init_dir / "initialization.json",
        "prepare": config.prepared_dir / "summary.json",
        "train": config.student_final_dir / RECORD,
        "evaluate": config.run_dir / "evaluate.json",
        "speculate": config.run_dir / "speculate.json",
        "break_even": config.run_dir / "break_even.json",
        "certify": config.run_dir / "certificate.json",
    }


def _stale(config: PipelineConfig, stages: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Stage → why what it left is not of the inputs and settings of now."""
    from student.training.checkpoint import run_identity

    found = present(config, "teacher vocabulary", *TRAINED_FROM)  # once: a tokenizer takes seconds to load
    inputs = {name: value for name, value in found.items() if name in ("dataset", "teacher vocabulary", "tokenizer")}
    prepared = read_json(config.prepared_dir / "manifest.json") or {}
    manifest = manifest_of(config.shards_dir)
    collected = {} if manifest is None else {"responses": manifest.rows, "tokens": manifest.tokens}
    trained = run_identity(config, {name: value for name, value in found.items() if name in TRAINED_FROM})
    if config.train.dtype == "auto":
        del trained["train.dtype"]  # whoever reports need not have the machine that trained
    speculated = speculation_identity(config)
    now: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
        "collect": (stages["collect"], collected),
        "prepare": (prepared.get(IDENTITY), prepared_identity(config.prepare, inputs)),
        "train": (stages["train"].get(IDENTITY), trained),
        "evaluate": (stages["evaluate"].get(IDENTITY), evaluation_identity(config)),
        **{name: (stages[name].get(IDENTITY), speculated) for name in ("speculate", "break_even", "certify")},
    }
    stale = {}
    for name, (made, wanted) in now.items():
        problems = ["it does not say what it was made from"] if not made else differences(made, wanted, config)
        if stages[name] and problems:
            command = _COMMANDS.get(name, f"student {name}")
            stale[name] = f"{'; '.join(problems)}; run `{command}` again"
    return stale


def _pick(stage: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: stage.get(key) for key in keys}


def write_report(config: PipelineConfig) -> dict[str, Any]:
    """Write `report.json`, the pictures and `index.html`, and print the summary.

    Raises:
        UserError: if no stage has left anything to report.
    """
    report = gather(config)
    for stage, reason in report["stale"].items():
        _logger.warning("the figures of %s are out of date and left out: %s", stage, reason)
    if not any(report["details"].values()) and not report["stale"]:
        raise UserError(f"{config.run_dir} holds no result of any stage; run `make collect-logits` first")
    entries = [] if "train" in report["stale"] else list(read_metrics(config.run_dir / "metrics.jsonl"))
    there = manifest_of(config.shards_dir) is not None and "collect" not in report["stale"]
    statistics = sample(config.shards_dir, SAMPLE_TOKENS) if there else None
    report["dataset"] = None if statistics is None else statistics.to_json()
    write_json(config.report_dir / "report.json", report)
    entries = entries[:: len(entries) // MOST_STEPS + 1]
    pictures = list(_pictures(report, entries, statistics))
    for name, _, svg in pictures:
        write_text(config.report_dir / name, svg)
    write_text(config.report_dir / "index.html", _page(config, report, pictures))
    stdout.print(summary(config, report))
    stdout.print(f"pictures and details: {config.report_dir / 'index.html'}", highlight=False)
    return report


def _pictures(
    report: dict[str, Any], entries: list[dict[str, Any]], statistics: Statistics | None
) -> Iterator[tuple[str, str, str]]:
    """(file name, caption, SVG) of every picture that there is data for."""
    from student.evaluation import plots

    evaluated, speculated, worth = (report["details"][stage] for stage in ("evaluate", "speculate", "break_even"))
    alone = (speculated.get("latency") or {}).get("llada_alone") or {}
    if entries:
        caption = "The trained loss; its KL part would be zero at the teacher's own distribution."
        yield "loss.svg", caption, plots.loss_curve(entries)
        caption = "Share of blocks whose first d student tokens are all the teacher's, on training text."
        yield "acceptance.svg", caption, plots.acceptance_curve(entries)
        caption = "Training, by step: the loss's parts, gradients, learning rate, speed, waiting and memory."
        yield "training.svg", caption, plots.training_curves(entries)
    if statistics is not None:
        caption = f"What was collected, from {statistics.tokens:,} of its response tokens."
        yield "dataset.svg", caption, plots.svg(drawn(statistics))
    before, after = evaluated.get("before"), evaluated.get("after")
    if before and after and "tau" in before:
        caption = f"Held-out prompts, {evaluated['rule']} decoding: drafts whose first d tokens are accepted."
        served = alone.get("accepted_per_position")
        yield "depth.svg", caption, plots.depth_bars(before["by_depth"], after["by_depth"], served)
        caption = "Mean tokens per forward of the teacher, by the prompt's skill."
        yield "skills.svg", caption, plots.skill_bars(before["by_skill"], after["by_skill"])
    if speeds := _speeds(speculated):
        caption = "Decoding speed in vLLM, measured, with each kind of draft, against none in the same minutes."
        yield "speed.svg", caption, plots.speed_bars(speeds)
    if worth:
        caption = "Speed-up by acceptance length: right tokens in place of the student's, at its cost."
        yield "break_even.svg", caption, plots.break_even(worth, alone)


def _speeds(speculate: dict[str, Any]) -> dict[str, dict[str, tuple[float, float]]]:
    """Requests in flight → kind of draft → (times as fast as without in its own turns, tokens a second)."""
    latency = speculate.get("latency")
    if not latency:
        return {}
    return {
        case: {"no draft": (1.0, measured["baseline_tokens_per_s"])}
        | {
            label: (figures["speedup"], figures["tokens_per_s"])
            for name, label in reversed(_DRAFTS.items())
            if (figures := measured.get(name))
        }
        | {"LLaDA, as configured": (measured["speedup"], measured["tokens_per_s"])}
        for case, measured in (("one request in flight", latency), ("many in flight", speculate))
    }


_DRAFTS = {"llada_alone": "LLaDA alone", "ngram": "vLLM's ngram", "suffix": "vLLM's suffix"}


def _page(config: PipelineConfig, report: dict[str, Any], pictures: list[tuple[str, str, str]]) -> str:
    import jinja2
    from markupsafe import Markup

    from student.alignment.prepare import REASONS

    counts = report["details"]["prepare"].get("counts", {})
    made = report["details"]["train"].get(IDENTITY) or {}  # fingerprints, and settings, which have a dot
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("student.evaluation", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["figure"] = figure
    return environment.get_template("report.html.j2").render(
        name=config.name,
        report=report,
        pictures=[(Markup(svg), caption) for _, caption, svg in pictures],
        config=dump_config(config),
        stages=_stages(config, report),
        identical=_identical(report["details"]["speculate"]),
        met=[(reason, counts[key]) for key, reason in REASONS.items() if counts.get(key)],
        speeds=_cards(config, report),
        provenance=[
            ("teacher", config.teacher.model),
            *((key, value) for key, value in made.items() if "." not in key),
        ],
        certificate=report["details"]["certify"].get("passed"),
        answers=report["details"]["evaluate"].get("answers", []),
    )


def _cards(config: PipelineConfig, report: dict[str, Any]) -> list[tuple[float | None, str]]:
    """(times the speed without a draft, in which case): what a person came for, whichever way it went."""
    many = report["details"]["speculate"].get("speedup")
    cases = [
        (report["speculate"]["latency"]["speedup"], "one request in flight"),
        (many, f"{config.speculate.max_num_seqs} requests in flight"),
    ]
    words = {True: "slower than without a draft", False: "as fast as without a draft", None: "speed with a draft"}
    return [(speedup, f"{words[None if speedup is None else speedup < 1]}, {case}") for speedup, case in cases]


def figure(value: Any) -> str:
    """A figure as people read it; null is what was not measured."""
    match value:
        case None:
            return "not measured"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
        case list():
            return "  ".join(figure(item) for item in value)
    return str(value)


Stage = tuple[str, str, list[tuple[str, Any]]]
"""Its name, what it did, its figures by name."""


def _stages(config: PipelineConfig, report: dict[str, Any]) -> list[Stage]:
    """For the page and the screen."""
    stages: list[Stage] = []

    def add(name: str, what: str, rows: list[tuple[str, Any]]) -> None:
        stale = report["stale"].get(name)
        stages.append((name, what if stale is None else f"out of date: {stale}", rows))

    train, speculate = report["train"], report["speculate"]
    before, after, rule = (report["evaluate"][key] for key in ("before", "after", "rule"))
    alpha = _known("{:.3f} … {:.3f}", after["alpha_low"], after["alpha_high"])
    what = f"{config.teacher.model} answered; its top {config.collect.top_k} were kept"
    add("collect", what, [(label, report["collect"][key]) for key, label in COLLECT.items()])
    what = "stored rows were mapped to the student's vocabulary"
    add("prepare", what, [(label, report["prepare"][key]) for key, label in PREPARE.items()])
    rows = [
        ("steps", train["steps"]),
        ("tokens", train["tokens"]),
        ("loss, first → last", _known("{:.3f} → {:.3f}", train["loss_first"], train["loss_last"])),
        ("tokens/s", train["tokens_per_s"]),
    ]
    add("train", f"blocks of {config.train.block_length}, loss {config.train.loss}", rows)
    what = f"held-out prompts, {rule} decoding, one-hot drafts of {config.evaluate.draft_tokens} teacher tokens"
    rows = [
        ("acceptance length τ, before → after", _known("{:.3f} → {:.3f}", before["tau"], after["tau"])),
        ("accepted to depth d", after["by_depth"]),
        ("α at depth 1, bounds (T = 1, rejection sampling)", alpha),
    ]
    add("evaluate", what, rows)
    rows = [
        *_one_in_flight(report),
        ("many in flight: tokens/s without draft, with", _speeds_of(speculate)),
        ("many in flight: acceptance length, tokens a step", _accepted(report["details"]["speculate"])),
        ("outputs identical", _identical(report["details"]["speculate"])),
        *_proven(report["details"]),
    ]
    add("speculate", "vLLM decoded the held-out prompts greedily, with the draft and without", rows)
    return stages


def _one_in_flight(report: dict[str, Any]) -> list[tuple[str, Any]]:
    latency, details = report["speculate"]["latency"], report["details"]["speculate"].get("latency") or {}
    rows = [
        ("one request in flight: times as fast", latency["speedup"]),
        ("  with LLaDA alone", latency["llada_alone"]["speedup"]),
        ("  tokens/s without draft, with", _speeds_of(latency)),
        ("  acceptance length (a draft), tokens a step", _accepted(details)),
    ]
    for name, label in _DRAFTS.items():
        if found := details.get(name):
            rows.append((f"  the same of {label}", _accepted(found)))
    return rows


def _accepted(figures: dict[str, Any]) -> str | None:
    return _known("{:.3f}, {:.3f}", figures.get("acceptance_length"), figures.get("tokens_per_step"))


def _proven(details: dict[str, Any]) -> list[tuple[str, Any]]:
    """What the two commands have found that are no part of `make demo`, where they were run."""
    rows: list[tuple[str, Any]] = []
    if needed := details["break_even"].get("needed"):
        pair = f"{needed['latency']:.2f}, {needed['throughput']:.2f}"
        rows.append(("acceptance length needed to pay: one in flight, many", pair))
    if details["certify"]:
        rows.append(("certificate", "passed" if details["certify"]["passed"] else "FAILED"))
    return rows


def _identical(speculate: dict[str, Any]) -> bool | str | None:
    """Whether the draft changed nothing; where outputs differ, whether each difference is a measured tie."""
    if speculate.get("outputs_identical") is not False:
        return speculate.get("outputs_identical")
    kind = "all numerical ties" if speculate["differences_are_ties"] else "NOT all numerical ties"
    return f"{len(speculate['differences'])} differ, {kind}"


def _speeds_of(figures: dict[str, Any]) -> str | None:
    return _known("{:.1f}, {:.1f}", figures["baseline_tokens_per_s"], figures["tokens_per_s"])


def _known(words: str, *figures: float | None) -> str | None:
    """The figures in these words; None where one of them was not measured."""
    return None if None in figures else words.format(*figures)


def summary(config: PipelineConfig, report: dict[str, Any]) -> Table:
    """The run on one screen."""
    table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_column(justify="right")
    for stage, what, figures in _stages(config, report):
        table.add_row(stage, f"[dim]{what}[/]", "")
        for label, value in figures:
            table.add_row("", label, figure(value))
        table.add_section()
    return table
