"""Decode a list of prompts with vLLM, with a drafter or without, in a process of its own.

    python -m student.drafting.decode JOB.json RESULT.json

Its own process, because vLLM frees a model's memory only by ending. One load of the teacher serves several *passes*
over the prompts: many in flight or one at a time, each with other options of the proposer. The time of a pass is that
of `LLM.generate` after a warm-up: no loading, no detokenization, no prefix cache.

The parent (`engines.py`) reads lines on stdout: `progress DONE TOTAL NOTE`; `turn` before each part of a pass, which
is one response or, with many in flight, half as many as are in flight; and `others` before the results of
`Job.compare_with` are read. Both wait for a line on stdin, and waiting is not counted. All other output goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from shared.files import write_json
from shared.tokenizer.vocabulary import first_difference
from student.drafting.goodness_of_fit import CANDIDATES, Tally

THROUGHPUT, LATENCY, SAMPLED = "throughput", "latency", "sampled"
"""How the name of a pass starts: greedy with many requests in flight, greedy with one, sampled."""
PROGRESS, TURN, OTHERS = "progress", "turn", "others"
_WARM_UP_TOKENS = 12  # the proposer's first steps are measurements
_SCORED = 20  # candidates asked for where two runs differ
_READ_TOGETHER = 64  # responses whose rows are held at a time, as Python objects
_COUNTERS = {
    "vllm:spec_decode_num_drafts": "drafts",
    "vllm:spec_decode_num_draft_tokens": "draft_tokens",
    "vllm:spec_decode_num_accepted_tokens": "accepted_tokens",
    "vllm:num_preemptions": "preemptions",
}
_PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos"


@dataclass(frozen=True)
class Pass:
    """One decoding of the prompts.

    Attributes:
        one_by_one: one request in flight; else as many as `max_num_seqs`.
        prompts: the first so many; null is all.
        samples: for each prompt, at temperature 1 and of full length; 0 decodes greedily, once.
        options: of our proposer (`LladaProposer.reset`), for this pass; null where there is none.
    """

    one_by_one: bool = False
    prompts: int | None = None
    samples: int = 0
    options: dict[str, Any] | None = None

    def of(self, prompts: list[list[int]]) -> list[list[int]]:
        """The prompts in the order in which they are asked."""
        return prompts[: self.prompts] * max(self.samples, 1)


@dataclass(frozen=True)
class Job:
    """What to decode.

    Attributes:
        engine: arguments of `vllm.LLM`.
        prompts: the teacher's token ids.
        max_tokens: of each response. stop_token_ids: end a response; the token is kept.
        passes: by name.
        compare_with: result files of other engines over the same prompts. Where the outputs of one of their greedy
            passes differ from those of a pass of this job with as many in flight, both candidates are scored here.
            Their sampled passes, and this job's own, are held to this engine's rows. A job that compares with none
            reads no rows: beside a draft, vLLM takes [prompt tokens, vocabulary] of memory for them, in float32.
    """

    engine: dict[str, Any]
    prompts: list[list[int]]
    max_tokens: int
    stop_token_ids: list[int]
    passes: dict[str, Pass]
    compare_with: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Difference:
    """The first position at which two outputs of one prompt differ.

    Attributes:
        prompt: index. position: in the output.
        here, there: the token of this run and of the other; null where an output has ended.
        gap: logprob of `here` minus logprob of `there`, both after the common prefix, by this engine in one
            forward; null where one of them has ended or is outside the best 20.
        file, run: whose the other output is: result file and pass.
    """

    prompt: int
    position: int
    here: int | None
    there: int | None
    gap: float | None = None
    file: str = ""
    run: str = ""


@dataclass(frozen=True)
class Decoded:
    """What came out of a pass.

    Attributes:
        outputs: token ids per prompt. seconds: wall clock of decoding all. tokens: in all outputs.
        counters: vLLM's own metrics over the timed part: preemptions and, with a drafter, speculation.
        accepted_per_position: drafts whose first d tokens were accepted, d = 1 …
        proposer: what our proposer counted (`Counters.tree`).
    """

    outputs: list[list[int]]
    seconds: float
    tokens: int
    counters: dict[str, int] = field(default_factory=dict)
    accepted_per_position: list[int] = field(default_factory=list)
    proposer: dict[str, dict[str, int | float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What came out of a job.

    Attributes:
        passes: by name.
        async_scheduling: whether vLLM schedules a step while the one before it runs, which a custom proposer rules out.
        tallies: of the sampled passes, own and others, by file and pass; the own file is "". Empty where the job
            compares with no other.
    """

    passes: dict[str, Decoded]
    differences: list[Difference] = field(default_factory=list)
    async_scheduling: bool | None = None
    tallies: dict[str, dict[str, Tally]] = field(default_factory=dict)


def read_result(path: Path) -> Result:
    """A result that this module has written."""
    return TypeAdapter(Result).validate_python(json.loads(path.read_text(encoding="utf-8")))


def decode(job: Job) -> Result:
    """Run the job in this process."""
    from vllm import LLM

    total = sum(len(each.of(job.prompts)) for each in job.passes.values())
    _report(0, total, "loading")
    llm = LLM(**job.engine)
    passes: dict[str, Decoded] = {}
    for name, each in job.passes.items():
        passes[name] = _decode_pass(llm, job, each, sum(len(made.outputs) for made in passes.values()), total)
    differences, tallies = [], {}
    if job.compare_with:
        tallies[""] = _tallies(llm, job, passes)
        _wait_for(OTHERS)
    for file in job.compare_with:
        others = read_result(Path(file)).passes
        tallies[Path(file).stem] = _tallies(llm, job, others)
        for run, other in others.items():
            if run.startswith(SAMPLED):
                continue
            mine = passes[LATENCY if run.startswith(LATENCY) else THROUGHPUT]
            found = first_differences(mine.outputs, other.outputs)
            found = [replace(entry, file=Path(file).stem, run=run) for entry in found]
            differences += _score(llm, job.prompts, mine.outputs, found)
    asynchronous = bool(llm.llm_engine.vllm_config.scheduler_config.async_scheduling)
    return Result(passes, differences, asynchronous, tallies)


def _decode_pass(llm: Any, job: Job, each: Pass, done: int, total: int) -> Decoded:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    _wait_for(TURN)
    if each.options is not None:
        llm.collective_rpc(_reset_proposer, kwargs=each.options)
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in each.of(job.prompts)]
    rule: dict[str, Any] = {"temperature": 0, "stop_token_ids": job.stop_token_ids, "detokenize": False}
    if each.samples:
        rule |= {"temperature": 1, "stop_token_ids": [], "ignore_eos": True}
    sampling = SamplingParams(max_tokens=job.max_tokens, **rule)
    warm_up = SamplingParams(max_tokens=_WARM_UP_TOKENS, **rule)
    in_flight = 1 if each.one_by_one else job.engine["max_num_seqs"]
    llm.generate(prompts[:in_flight], warm_up, use_tqdm=False)
    before, proposed_before = _metrics(llm), _proposed(llm)
    responses: list[Any] = []
    started, waited = time.perf_counter(), 0.0

    def take_turns() -> None:
        nonlocal waited
        asked = time.perf_counter()
        _wait_for(TURN)
        pause = time.perf_counter() - asked
        waited += pause
        if each.options is not None:
            llm.collective_rpc(_pause_proposer, args=(pause,))

    if each.one_by_one:
        for prompt in prompts:
            if responses:
                take_turns()
            responses += llm.generate([prompt], sampling, use_tqdm=False)
            _report(done + len(responses), total, "one at a time")
    else:
        bar = _progress_bar(done, total, max(in_flight // 2, 1), take_turns)
        responses = llm.generate(prompts, sampling, use_tqdm=bar)
    seconds = time.perf_counter() - started - waited
    after, proposed = _metrics(llm), _proposed(llm)
    outputs = [[int(index) for index in response.outputs[0].token_ids] for response in responses]
    return Decoded(
        outputs,
        seconds,
        sum(map(len, outputs)),
        {name: after[0][name] - before[0].get(name, 0) for name in after[0]},
        [now - then for now, then in zip(after[1], before[1] or [0] * len(after[1]), strict=True)],
        {
            name: {label: count - proposed_before[name].get(label, 0) for label, count in counts.items()}
            for name, counts in proposed.items()
        },
    )


def _reset_proposer(worker: Any, **options: Any) -> None:
    worker.model_runner.drafter.reset(**options)


def _pause_proposer(worker: Any, seconds: float) -> None:
    worker.model_runner.drafter.leave_out(seconds)


def _proposed(llm: Any) -> dict[str, dict[str, float]]:
    """What our proposer has counted; on the rank that drafts, the others count nothing."""
    trees: list[dict[str, dict[str, float]]] = llm.collective_rpc(_proposer_counts)
    return max(trees, key=lambda tree: sum(map(len, tree.values())))


def _proposer_counts(worker: Any) -> dict[str, dict[str, float]]:
    counters = getattr(getattr(worker.model_runner, "drafter", None), "counters", None)
    return {} if counters is None else counters.tree()


def first_differences(outputs: list[list[int]], others: list[list[int]]) -> list[Difference]:
    """Where each pair of outputs first differs, for the pairs that do; not scored yet."""
    differences = []
    for prompt, (ours, theirs) in enumerate(zip(outputs, others, strict=True)):
        if ours != theirs:
            position = first_difference(ours, theirs)
            here, there = (ids[position] if position < len(ids) else None for ids in (ours, theirs))
            differences.append(Difference(prompt, position, here, there))
    return differences


def _score(llm: Any, prompts: list[list[int]], outputs: list[list[int]], found: list[Difference]) -> list[Difference]:
    """Measure how far apart the two candidates of each difference are."""
    if not found:
        return []
    contexts = [prompts[entry.prompt] + outputs[entry.prompt][: entry.position] for entry in found]
    scored = []
    for entry, response in zip(found, _read(llm, contexts, logprobs=_SCORED), strict=True):
        candidates = response.outputs[0].logprobs[0]
        gap = None
        if entry.here in candidates and entry.there in candidates:
            gap = candidates[entry.here].logprob - candidates[entry.there].logprob
        scored.append(replace(entry, gap=gap))
    return scored


def _tallies(llm: Any, job: Job, passes: dict[str, Decoded]) -> dict[str, Tally]:
    """The sampled passes' tokens against this engine's rows for the same contexts, read in forwards of their own."""
    # vLLM reads no text that fills the context: such a response is read but for its last token.
    longest = llm.llm_engine.vllm_config.model_config.max_model_len - 1
    tallies: dict[str, Tally] = {}
    for name, made in passes.items():
        if not name.startswith(SAMPLED):
            continue
        tallies[name] = tally = Tally()
        contexts = job.passes[name].of(job.prompts)
        for start in range(0, len(contexts), _READ_TOGETHER):
            part = slice(start, start + _READ_TOGETHER)
            both = zip(contexts[part], made.outputs[part], strict=True)
            pairs = [(context, output[: longest - len(context)]) for context, output in both if len(context) < longest]
            reads = _read(llm, [context + output for context, output in pairs], prompt_logprobs=CANDIDATES)
            for (context, output), read in zip(pairs, reads, strict=True):
                found = read.prompt_logprobs[len(context) :]
                own = [row[token] for row, token in zip(found, output, strict=True)]
                # A token outside the likeliest is an entry more, and the last of them.
                best = [sorted((entry.logprob for entry in row.values()), reverse=True)[:CANDIDATES] for row in found]
                tally.add([entry.rank for entry in own], [entry.logprob for entry in own], best)
            _report(start + len(pairs), len(contexts), f"reading rows of {name}")
    return tallies


def _read(llm: Any, texts: list[list[int]], **rows: Any) -> list[Any]:
    """vLLM's answers to `texts`, of one token each; `rows` say of what it gives the logprobs, and of how many."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    one = SamplingParams(temperature=0, max_tokens=1, detokenize=False, **rows)
    answers: list[Any] = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in texts], one, use_tqdm=False)
    return answers


def _metrics(llm: Any) -> tuple[dict[str, int], list[int]]:
    counters: dict[str, int] = {}
    per_position: list[int] = []
    for metric in llm.get_metrics():
        if metric.name in _COUNTERS:
            counters[_COUNTERS[metric.name]] = int(metric.value)
        elif metric.name == _PER_POSITION:
            per_position = [int(value) for value in metric.values]
    return counters, per_position


def _report(done: int, total: int, note: str) -> None:
    print(PROGRESS, done, total, note, file=sys.__stdout__, flush=True)


def _wait_for(what: str) -> None:
    """Ask for it, until a line says that it is there."""
    print(what, file=sys.__stdout__, flush=True)
    if not sys.stdin.readline():
        sys.exit(f"the process that started this one ended before it gave {what!r}")


def _progress_bar(done: int, total: int, part: int, take_turns: Callable[[], None]) -> Any:
    """vLLM draws with tqdm; this one draws nowhere, tells the parent, and calls `take_turns` after each `part`."""
    from tqdm import tqdm

    class Reporting(tqdm):  # type: ignore[type-arg,unused-ignore]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            nowhere = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
            # vLLM reads the bar's clock, so the bar runs even where the user's environment turns bars off.
            super().__init__(*args, **{**kwargs, "disable": False, "file": nowhere})

        def update(self, n: float | None = 1) -> bool | None:
            before = int(self.n) // part
            moved = super().update(n)
            _report(done + int(self.n), total, str(self.postfix or "decoding"))
            if int(self.n) // part > before and self.n < self.total:
                take_turns()
            return moved

    return Reporting


def main() -> None:
    job_file, result_file = map(Path, sys.argv[1:])
    job = TypeAdapter(Job).validate_python(json.loads(job_file.read_text(encoding="utf-8")))
    write_json(result_file, asdict(decode(job)))


if __name__ == "__main__":
    main()
