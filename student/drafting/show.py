"""`student generate --with-teacher`: the teacher answers in vLLM, and what the student drafted is shown as it comes.

    python -m student.drafting.show JOB.json

vLLM runs in a process of its own, which prints each step of the teacher as a line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shared.config import PipelineConfig
from shared.console import stdout
from shared.dataset.reader import Dataset
from shared.dataset.records import Message
from shared.files import write_json
from shared.tokenizer.chat import ChatEncoder
from shared.tokenizer.files import read_tokenizer_file
from student.drafting.speculate import check_teacher, decoding_environment, drafter_arguments, shared_arguments
from student.drafting.steps import COLORS, Step, shown, spans
from student.drafting.vllm_proposer import LladaProposer


def generate_with_teacher(
    config: PipelineConfig, student: Path, prompt: str, *, system: str | None = None, length: int = 128
) -> list[Step]:
    """Print the teacher's greedy answer to `prompt`, each token in the color of who found it.

    Args:
        student: directory of a trained student. length: most tokens of the answer.

    Raises:
        DatasetError, CheckpointError, VocabularyError, MissingExtraError: as `speculate`.
        RuntimeError: if vLLM fails; the end of its log is in the message.
    """
    dataset = Dataset.open(config.shards_dir)
    check_teacher(config, dataset)
    chat = ChatEncoder(read_tokenizer_file(dataset.tokenizer_dir), config.collect.template_arguments)
    turns = [*([Message("system", system)] if system else []), Message("user", prompt)]
    # In every step, by the student alone: here it is to be seen, not to be fast.
    seen = {"policy": False, "lookup": False}
    config = config.model_copy(update={"speculate": config.speculate.model_copy(update=seen)})
    drafting = drafter_arguments(config, str(student), dataset)
    drafting["speculative_config"]["model"] = f"{__name__}.{ShownProposer.__name__}"
    job = {
        "engine": shared_arguments(config) | {"max_num_seqs": 1} | drafting,
        "prompt": chat.prompt(turns).ids.tolist(),
        "max_tokens": length,
        "stop_token_ids": sorted(dataset.vocabulary.end_ids),
    }
    steps: list[Step] = []
    printed = 0
    stdout.print(shown([(kind, f" {kind} ") for kind in COLORS], colors=stdout.is_terminal))
    for step in _decoded(job, decoding_environment(config)):
        steps.append(step)
        pieces = spans(steps, dataset.vocabulary)  # of all, for a character that goes across steps
        stdout.print(shown(pieces[printed:], colors=stdout.is_terminal), end="")
        printed = len(pieces)
    said = sum(len(step.accepted) + len(step.own) for step in steps)
    drafted = sum(len(step.accepted) + len(step.rejected) for step in steps)
    accepted = sum(len(step.accepted) for step in steps)
    stdout.print(f"\n{said} tokens in {len(steps)} steps of the teacher; {drafted} were drafted, {accepted} accepted")
    return steps


def _decoded(job: dict[str, Any], environment: dict[str, str]) -> Iterator[Step]:
    with tempfile.TemporaryDirectory(prefix="llada-drafter-") as directory:
        file, log_file = Path(directory, "job.json"), Path(directory, "log")
        write_json(file, job)
        command = [sys.executable, "-m", "student.drafting.show", str(file)]
        with (
            log_file.open("w", encoding="utf-8") as log,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | environment) as p,
        ):
            assert p.stdout is not None
            yield from (Step(**json.loads(line)) for line in p.stdout if line.startswith("{"))
        if p.returncode:
            raise RuntimeError(f"vLLM ended with exit code {p.returncode}:\n{log_file.read_text()[-2000:]}")


class ShownProposer(LladaProposer):
    """Keeps its last drafts, for who asks."""

    last: list[list[int]]

    def propose(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        self.last = super().propose(*args, **kwargs)
        return self.last


def _last_draft(worker: Any) -> list[int]:
    drafts: list[list[int]] = getattr(worker.model_runner.drafter, "last", [])
    return drafts[0] if drafts else []


def main() -> None:
    """The process that decodes."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    llm: Any = LLM(**job["engine"])
    sampling = SamplingParams(
        temperature=0,
        max_tokens=job["max_tokens"],
        stop_token_ids=job["stop_token_ids"],
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    llm.llm_engine.add_request("0", TokensPrompt(prompt_token_ids=job["prompt"]), sampling)
    draft: list[int] = []
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            said = list(output.outputs[0].token_ids)
            print(json.dumps(asdict(Step.of(draft, said, ended=output.finished))), flush=True)
        # The first rank's drafts are those that vLLM takes.
        draft = llm.collective_rpc(_last_draft)[0]


if __name__ == "__main__":
    main()
