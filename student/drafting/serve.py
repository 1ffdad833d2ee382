"""Decode a list of prompts with vLLM, with a drafter or without, in a process of its own.

    python -m student.drafting.serve JOB.json RESULT.json

Its own process, because vLLM frees a model's memory only by ending. Lines `progress DONE TOTAL NOTE` on stdout
tell the parent how far it is; all other output goes to stderr. The time is that of `LLM.generate` over all prompts,
after a warm-up: no loading, no detokenization, no prefix cache. Of the student's files only this one and
`vllm_sampling.py` import vLLM.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from student.drafting.tokens import leading_matches

_WARM_UP_TOKENS = 8
_SCORED = 20  # candidates asked for where two runs differ
_COUNTERS = {
    "vllm:spec_decode_num_drafts": "drafts",
    "vllm:spec_decode_num_draft_tokens": "draft_tokens",
    "vllm:spec_decode_num_accepted_tokens": "accepted_tokens",
    "vllm:num_preemptions": "preemptions",
}
_PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos"


@dataclass(frozen=True)
class Job:
    """What to decode.

    Attributes:
        engine: arguments of `vllm.LLM`.
        prompts: the teacher's token ids.
        max_tokens: of each response. stop_token_ids: end a response; the token is kept.
        compare_with: result file of another run of the same prompts; where the outputs differ, both candidates
            are scored here.
    """

    engine: dict[str, Any]
    prompts: list[list[int]]
    max_tokens: int
    stop_token_ids: list[int]
    compare_with: str | None = None


@dataclass(frozen=True)
class Difference:
    """The first position at which two outputs of one prompt differ.

    Attributes:
        prompt: index. position: in the output.
        here, there: the token of this run and of the other; null where an output has ended.
        gap: logprob of `here` minus logprob of `there`, both after the common prefix, by this engine in one
            forward; null where one of them has ended or is outside the best 20.
    """

    prompt: int
    position: int
    here: int | None
    there: int | None
    gap: float | None = None


@dataclass(frozen=True)
class Result:
    """What came out.

    Attributes:
        outputs: token ids per prompt. seconds: wall clock of decoding all. tokens: in all outputs.
        counters: vLLM's own metrics over the timed part: preemptions and, with a drafter, speculation.
        accepted_per_position: drafts whose first d tokens were accepted, d = 1 …
    """

    outputs: list[list[int]]
    seconds: float
    tokens: int
    counters: dict[str, int] = field(default_factory=dict)
    accepted_per_position: list[int] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)


def read_result(path: Path) -> Result:
    """A result that this module has written."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    return Result(**{**tree, "differences": [Difference(**entry) for entry in tree["differences"]]})


def decode(job: Job) -> Result:
    """Run the job in this process."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    _report(0, len(job.prompts), "loading")
    llm = LLM(**job.engine)
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in job.prompts]
    greedy: dict[str, Any] = {"temperature": 0, "stop_token_ids": job.stop_token_ids, "detokenize": False}
    sampling = SamplingParams(max_tokens=job.max_tokens, **greedy)
    warm_up = SamplingParams(max_tokens=_WARM_UP_TOKENS, **greedy)
    llm.generate(prompts[: job.engine["max_num_seqs"]], warm_up, use_tqdm=False)
    before = _metrics(llm)
    _report(0, len(prompts), "decoding")
    started = time.perf_counter()
    responses = llm.generate(prompts, sampling, use_tqdm=_progress_bar())
    seconds = time.perf_counter() - started
    after = _metrics(llm)
    outputs = [[int(index) for index in response.outputs[0].token_ids] for response in responses]
    counters = {name: after[0][name] - before[0].get(name, 0) for name in after[0]}
    per_position = [now - then for now, then in zip(after[1], before[1] or [0] * len(after[1]), strict=True)]
    differences = []
    if job.compare_with:
        others = read_result(Path(job.compare_with)).outputs
        differences = _score(llm, job.prompts, outputs, first_differences(outputs, others))
    return Result(outputs, seconds, sum(map(len, outputs)), counters, per_position, differences)


def first_differences(outputs: list[list[int]], others: list[list[int]]) -> list[Difference]:
    """Where each pair of outputs first differs, for the pairs that do; not scored yet."""
    differences = []
    for prompt, (ours, theirs) in enumerate(zip(outputs, others, strict=True)):
        if ours != theirs:
            position = leading_matches(ours, theirs)
            here, there = (ids[position] if position < len(ids) else None for ids in (ours, theirs))
            differences.append(Difference(prompt, position, here, there))
    return differences


def _score(llm: Any, prompts: list[list[int]], outputs: list[list[int]], found: list[Difference]) -> list[Difference]:
    """Measure how far apart the two candidates of each difference are."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    if not found:
        return []
    contexts = [
        TokensPrompt(prompt_token_ids=prompts[entry.prompt] + outputs[entry.prompt][: entry.position])
        for entry in found
    ]
    one = SamplingParams(temperature=0, max_tokens=1, logprobs=_SCORED, detokenize=False)
    scored = []
    for entry, response in zip(found, llm.generate(contexts, one, use_tqdm=False), strict=True):
        candidates = response.outputs[0].logprobs[0]
        gap = None
        if entry.here in candidates and entry.there in candidates:
            gap = candidates[entry.here].logprob - candidates[entry.there].logprob
        scored.append(replace(entry, gap=gap))
    return scored


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
    print("progress", done, total, note, file=sys.__stdout__, flush=True)


def _progress_bar() -> Any:
    """vLLM draws with tqdm; this one draws nowhere and tells the parent."""
    from tqdm import tqdm

    class Reporting(tqdm):  # type: ignore[type-arg,unused-ignore]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            nowhere = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
            # vLLM reads the bar's clock, so the bar runs even where the user's environment turns bars off.
            super().__init__(*args, **{**kwargs, "disable": False, "file": nowhere})

        def update(self, n: float | None = 1) -> bool | None:
            done = super().update(n)
            _report(int(self.n), int(self.total), str(self.postfix or "decoding"))
            return done

    return Reporting


def main() -> None:
    job_file, result_file = map(Path, sys.argv[1:])
    job = Job(**json.loads(job_file.read_text(encoding="utf-8")))
    from shared.files import write_json

    write_json(result_file, asdict(decode(job)))


if __name__ == "__main__":
    main()
