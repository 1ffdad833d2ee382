"""`student speculate --break-even`: what an acceptance length is worth on this machine, before anyone trains for it.

What the teacher will say is known from a run without a draft; another one is the measure, in turns with the drafting
one (`engines.py`). The student drafts in every step at its real cost, and its tokens are exchanged for so many right
ones and wrong ones after them; vLLM verifies them as ever, so the output stays the teacher's. Since a step's cost does
not depend on what is accepted, the speed-up is c · τ; c is fitted over the lengths measured, and 1 / c is the
acceptance length at which drafting pays. Last, the policy may decide: with a student that is never right it should cost
next to nothing, with one that always is it should draft in every step.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shared.config import PipelineConfig
from shared.console import titled_table
from shared.files import write_json
from student.drafting.decode import LATENCY, THROUGHPUT, Pass
from student.drafting.speculate import BASELINE, decode_all, figures_of, inputs
from student.drafting.vllm_proposer import LladaProposer
from student.lineage import IDENTITY, speculation_identity

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

RESULT = "break_even.json"
SEQUENCES = "break_even_sequences"
"""Key of `additional_config`: a JSON file of what the target says, prompt and response."""
LENGTHS = 5
"""Acceptance lengths measured, from 1 to all drafted tokens and one."""
_KEPT = ("acceptance_length", "tokens_per_s", "baseline_tokens_per_s", "speedup", "drafting_share")


def break_even(config: PipelineConfig) -> dict[str, Any]:
    """Measure the lengths at one request in flight and at many; writes `break_even.json` into the run's directory.

    Raises:
        DatasetError, CheckpointError, StaleError, VocabularyError, MissingExtraError: as `speculate`.
    """
    job, _, drafting = inputs(config)
    job = replace(job, prompts=job.prompts[: config.speculate.latency_prompts])
    directory, identity = config.run_dir / "speculate", speculation_identity(config)
    plain = {THROUGHPUT: Pass(), LATENCY: Pass(one_by_one=True)}
    base = directory / f"break_even_{BASELINE}"
    outputs = [made.outputs for made in decode_all(config, {base: replace(job, passes=plain)})[base].passes.values()]
    said = [ids + output for these in outputs for ids, output in zip(job.prompts, these, strict=True)]
    sequences = directory / "break_even_sequences.json"
    write_json(sequences, said)

    drafting["speculative_config"]["model"] = f"{__name__}.{RehearsedProposer.__name__}"
    drafting["additional_config"][SEQUENCES] = str(sequences.resolve())
    most = config.speculate.draft_tokens
    always = [(accepted, False) for accepted in np.linspace(0, most, LENGTHS).round(2).tolist()]
    policy = [(0.0, True), (float(most), True)]
    passes = {
        f"{name}_{accepted}_{chosen}": replace(each, options={"accepted": accepted, "policy": chosen, "lookup": False})
        for name, each in plain.items()
        for accepted, chosen in always + policy
    }
    jobs = {
        directory / "break_even": replace(job, engine=job.engine | drafting, passes=passes),
        base: replace(job, passes={name: replace(each, options=None) for name, each in passes.items()}),
    }
    made, baseline = (each.passes for each in decode_all(config, jobs).values())

    def figures(accepted: float, chosen: bool) -> dict[str, Any]:
        found = {name: figures_of(*(of[f"{name}_{accepted}_{chosen}"] for of in (made, baseline))) for name in plain}
        return {"asked": 1 + accepted} | {name: {key: found[name][key] for key in _KEPT} for name in plain}

    measured = [figures(*each) for each in always]
    result = {
        "draft_tokens": config.speculate.draft_tokens,
        "in_flight": config.speculate.max_num_seqs,
        "measured": measured,
        "with_policy": [figures(*each) for each in policy],
        "needed": {name: needed([entry[name] for entry in measured]) for name in plain},
        IDENTITY: identity,
    }
    write_json(config.run_dir / RESULT, result)
    return result


class RehearsedProposer(LladaProposer):
    """Drafts at the student's cost, of which the target accepts as many tokens as asked, on average."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        assert isinstance(vllm_config.additional_config, dict)
        file = Path(vllm_config.additional_config[SEQUENCES])
        self.sequences = [np.array(ids) for ids in json.loads(file.read_text(encoding="utf-8"))]
        self.accepted = 0.0
        super().__init__(vllm_config)

    def reset(self, accepted: float = 0.0, **changes: Any) -> None:
        """`LladaProposer.reset`, and draft so many right tokens from now on."""
        self.accepted = accepted
        self.random = np.random.default_rng(0)
        super().reset(**changes)

    def load_drafter(self, device: torch.device) -> None:
        """Load the student; what it drafts is exchanged."""
        super().load_drafter(device)
        assert self.drafter is not None
        propose = self.drafter.propose

        def exchanged(ids: Sequence[Hashable], contexts: Sequence[Any]) -> list[list[int]]:
            return [self._exchanged(*pair) for pair in zip(contexts, propose(ids, contexts), strict=True)]

        self.drafter.propose = exchanged  # type: ignore[method-assign,assignment]

    def _exchanged(self, context: NDArray[Any], draft: list[int]) -> list[int]:
        said = next((ids for ids in self.sequences if np.array_equal(ids[: len(context)], context)), None)
        if said is None:  # past a numerical tie
            return draft
        right = int(self.accepted + self.random.random())
        following = said[len(context) :][: self.draft_tokens].tolist()
        assert self.drafter is not None
        vocabulary = len(self.drafter.bridge.teacher)
        return following[:right] + [(token + 1) % vocabulary for token in following[right:]]


def needed(measured: list[dict[str, Any]]) -> float:
    """The acceptance length at which the speed-up is 1, by least squares of speed-up = c · length."""
    lengths, speedups = (np.array([entry[key] for entry in measured]) for key in ("acceptance_length", "speedup"))
    return float(lengths @ lengths / (lengths @ speedups))


def table(result: dict[str, Any]) -> Any:
    """The result on the screen."""
    made = titled_table(
        f"what an acceptance length is worth here, {result['draft_tokens']} tokens a draft in every step",
        "acceptance length",
        "one request in flight",
        f"{result['in_flight']} in flight",
    )
    for entry in result["measured"]:
        made.add_row(f"{entry['asked']:.2f}", *(_cell(entry[name]) for name in (LATENCY, THROUGHPUT)))
    for entry, right in zip(result["with_policy"], ("never", "always"), strict=True):
        made.add_row(f"policy, {right} right", *(_cell(entry[name]) for name in (LATENCY, THROUGHPUT)))
    made.add_row("needed to pay", *(f"{result['needed'][name]:.2f}" for name in (LATENCY, THROUGHPUT)))
    return made


def _cell(figures: dict[str, Any]) -> str:
    length = figures["acceptance_length"]
    return (
        f"{figures['speedup']:.2f} ×, {figures['tokens_per_s']:.1f} tokens/s"
        f"{'' if length is None else f' at {length:.2f}'}, {figures['drafting_share']:.0%} of the time drafting"
    )
