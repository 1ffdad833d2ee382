"""`student certify`: is what is served with this student the teacher's own output, here and with these versions?

Three checks on the held-out prompts, with a draft in every step, many requests in flight:

1. *Greedy*: the outputs with and without the draft are equal, or differ first at a numerical tie.
2. *Sampled* at temperature 1: the tokens that come out with the draft follow the rows of the engine without one
   (`goodness_of_fit.py`). Plain sampling is put to the same test, as its control.
3. *Acceptance*: LLaDA alone accepts as much as `student evaluate` said, within 5 %, or what chance makes of few drafts.
"""

from __future__ import annotations

import logging
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from shared.config import PipelineConfig
from shared.files import read_json, write_json, write_text
from shared.vllm_settings import engine_version
from student.drafting.decode import SAMPLED, THROUGHPUT, Pass, Result
from student.drafting.goodness_of_fit import CLASSES, LEVEL, POSITIONS
from student.drafting.speculate import BASELINE, TIE, WITH_DRAFT, decode_all, described, dtype_of, inputs
from student.lineage import IDENTITY, differences, evaluation_identity, speculation_identity, unrecorded

logger = logging.getLogger(__name__)

RESULT, PAGE = "certificate.json", "certificate.md"
AGREEMENT = 0.05
"""Of served and offline acceptance length, where there are many drafts."""
DEVIATIONS = 2.576
"""Where there are few, a difference of so many standard deviations is chance, once in a hundred times."""


def certify(config: PipelineConfig, tokens: int = 100_000) -> dict[str, Any]:
    """Run the checks; writes `certificate.json` and `certificate.md` into the run's directory.

    Args:
        tokens: to sample, at least, with the draft and without; more find smaller faults.

    Raises:
        DatasetError, CheckpointError, StaleError, VocabularyError, MissingExtraError: as `speculate`.
    """
    job, prompt_ids, drafting = inputs(config)
    directory, identity = config.run_dir / "certify", speculation_identity(config)
    samples = math.ceil(tokens / (len(prompt_ids) * job.max_tokens))
    alone, chosen = ({"policy": False, "lookup": lookup} for lookup in (False, config.speculate.lookup))
    passes = {THROUGHPUT: Pass(options=alone), SAMPLED: Pass(samples=samples, options=chosen)}
    if config.speculate.lookup:
        passes[f"{THROUGHPUT}_lookup"] = Pass(options=chosen)
    plain = {THROUGHPUT: Pass(), SAMPLED: Pass(samples=samples)}
    jobs = {
        directory / WITH_DRAFT: replace(job, engine=job.engine | drafting, passes=passes),
        directory / BASELINE: replace(job, passes=plain, compare_with=[str(directory / f"{WITH_DRAFT}.json")]),
    }
    drafted, baseline = decode_all(config, jobs).values()

    checks = {
        "greedy": greedy_check(baseline, prompt_ids, TIE[dtype_of(config)]),
        "sampled": sampled_check(baseline),
        "acceptance": acceptance_check(config, drafted),
    }
    certificate = {
        "passed": all(check["passed"] is not False for check in checks.values()),
        "checks": checks,
        "prompts": len(prompt_ids),
        "in_flight": config.speculate.max_num_seqs,
        "draft_tokens": config.speculate.draft_tokens,
        "dtype": dtype_of(config),
        "date": time.strftime("%Y-%m-%d"),
        "vllm": engine_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
        "teacher": config.teacher.model,
        IDENTITY: identity,
    }
    write_json(config.run_dir / RESULT, certificate)
    write_text(config.run_dir / PAGE, page(config.name, certificate))
    logger.info("%s", config.run_dir / PAGE)
    return certificate


def greedy_check(baseline: Result, prompt_ids: list[str], tie: float) -> dict[str, Any]:
    """Whether every difference of greedy outputs is a tie."""
    found = [described(entry, prompt_ids, tie) for entry in baseline.differences]
    outputs = baseline.passes[THROUGHPUT].outputs
    return {
        "passed": all(entry["tie"] for entry in found),
        "tokens": sum(map(len, outputs)),
        "responses": len(outputs),
        "differences": found,
    }


def sampled_check(baseline: Result) -> dict[str, Any]:
    """Whether tokens sampled with the draft follow the teacher's rows, and tokens sampled without it."""
    drafted, plain = (baseline.tallies[file][SAMPLED].figures() for file in (WITH_DRAFT, ""))
    return {"passed": drafted["p"] >= LEVEL, "control_passed": plain["p"] >= LEVEL, "drafted": drafted, "plain": plain}


def acceptance_check(config: PipelineConfig, drafted: Result) -> dict[str, Any]:
    """Whether LLaDA alone accepts what evaluate.json says, within `tolerance`: `AGREEMENT`, or what chance makes of so
    few drafts. Where there is nothing to compare `passed` is null, and `reason` says why.

    The accepted number N of a draft has E N = sum_d P(N >= d) and E N^2 = sum_d (2 d - 1) P(N >= d).
    """
    counters = drafted.passes[THROUGHPUT].counters
    served = 1 + counters["accepted_tokens"] / counters["drafts"] if counters.get("drafts") else None
    offline = read_json(config.run_dir / "evaluate.json") or {}
    figures = offline.get("after", {}).get("rules", {}).get("greedy")
    reason = "nothing was drafted" if served is None else _why_not_compared(config, offline, figures)
    if served is None or reason is not None:
        return {"passed": None, "served": served, "offline": None, "tolerance": None, "reason": reason}
    expected = figures["acceptance_length"]  # not tau: vLLM counts no draft where the proposer has none
    squares = sum((2 * depth - 1) * share for depth, share in enumerate(figures["by_depth"], 1))
    deviation = math.sqrt(squares - sum(figures["by_depth"]) ** 2)
    chance = DEVIATIONS * deviation * math.sqrt(1 / counters["drafts"] + 1 / figures["drafts"])
    tolerance = max(AGREEMENT, chance / expected)
    passed = abs(served / expected - 1) <= tolerance
    return {"passed": passed, "served": served, "offline": expected, "tolerance": tolerance, "reason": None}


def _why_not_compared(config: PipelineConfig, offline: dict[str, Any], figures: dict[str, Any] | None) -> str | None:
    """Why evaluate.json says nothing of the drafts that were served; null where it does."""
    if not figures:
        return "`student evaluate` has measured no greedy text"
    made, now = offline.get(IDENTITY) or {}, evaluation_identity(config)
    if changed := [*differences(made, now), *unrecorded(made, now)]:
        return f"evaluate.json is out of date ({'; '.join(changed)})"
    if (tokens := offline["draft_tokens"]) != config.speculate.draft_tokens:
        return f"evaluate.draft_tokens is {tokens}, speculate.draft_tokens {config.speculate.draft_tokens}"
    return None


def page(name: str, certificate: dict[str, Any]) -> str:
    """The certificate for a reader, as Markdown."""
    greedy, sampled, acceptance = (certificate["checks"][name] for name in ("greedy", "sampled", "acceptance"))
    drafted, plain = sampled["drafted"], sampled["plain"]
    other = f"{len(greedy['differences'])} differ, all at ties" if greedy["differences"] else "all equal"
    if not greedy["passed"]:
        other = f"{sum(not entry['tie'] for entry in greedy['differences'])} differ, and not at a tie"
    lengths = f"not compared: {acceptance['reason']}"
    if acceptance["passed"] is not None:
        lengths = f"{acceptance['served']:.3f} served, {acceptance['offline']:.3f} offline"
    verdicts = {True: "passed", False: "FAILED", None: "-"}
    lines = [
        f"# {'Passed' if certificate['passed'] else 'FAILED'}: {name} drafts for {certificate['teacher']}",
        "",
        f"{certificate['date']}, vLLM {certificate['vllm']}, torch {certificate['torch']}, {certificate['device']}, "
        f"{certificate['dtype']}; {certificate['prompts']} held-out prompts, {certificate['in_flight']} in flight, "
        f"{certificate['draft_tokens']} tokens a draft.",
        "",
        "| check | verdict | found |",
        "|---|---|---|",
        f"| greedy output with the draft equals that without | {verdicts[greedy['passed']]} | {greedy['responses']} "
        f"responses, {greedy['tokens']} tokens: {other} |",
        f"| output sampled with the draft follows the teacher's probabilities | {verdicts[sampled['passed']]} | "
        f"{drafted['tokens']} tokens, p = {drafted['p']:.3g} (fails below {LEVEL:g}) |",
        f"| the same of output sampled without it: the control | {verdicts[sampled['control_passed']]} | "
        f"{plain['tokens']} tokens, p = {plain['p']:.3g} |",
        f"| acceptance length of LLaDA alone within {acceptance['tolerance'] or AGREEMENT:.0%} of `student evaluate` | "
        f"{verdicts[acceptance['passed']]} | {lengths} |",
        "",
        f"A change of {drafted['detectable']:.2%} in the probability of the teacher's likeliest token, over all rows, "
        "would have failed in 99 of 100 such tests. Where the control fails, the test says nothing of the draft: the "
        "engine's own rounding differs between its forwards.",
        "",
        "Sampled tokens by their rank in the teacher's row:",
        "",
        *_head(CLASSES),
    ]
    both = (("with the draft", drafted), ("without", plain))
    lines += [
        _row(f"{label}, {kind}", [f"{figures[kind][name]:.1f}" for name in CLASSES])
        for label, figures in both
        for kind in ("observed", "expected")
    ]
    places = [place for place in POSITIONS if place in drafted["by_position"]]
    lines += ["", "By position in the response:", "", *_head(places)]
    for label, figures in both:
        at = [figures["by_position"][place] for place in places]
        lines.append(_row(f"{label}: mean logprob", [f"{entry['mean_logprob']:.3f}" for entry in at]))
        lines.append(_row(f"{label}: outside the top 5", [f"{entry['outside_top_5']:.1%}" for entry in at]))
    lines += ["", "Made from:", ""]
    lines += [f"- {key}: {value}" for key, value in certificate[IDENTITY].items()]
    return "\n".join(lines) + "\n"


def _head(columns: Sequence[str]) -> list[str]:
    return [_row("", columns), "|---|" + "---:|" * len(columns)]


def _row(label: str, cells: Sequence[str]) -> str:
    return f"| {label} | {' | '.join(cells)} |"
