"""The drafter as vLLM loads it: a `custom_class` proposer for vLLM 0.32.

    LLM(
        model=TEACHER,
        speculative_config={
            "method": "custom_class",
            "model": "student.drafting.vllm_proposer.LladaProposer",
            "num_speculative_tokens": 4,
        },
        additional_config={"llada_drafter": {"student": "runs/demo/student/final"}},
    )

vLLM hands over its batch, not its request ids: rows of token ids and their lengths, after each step's tokens are
appended. Rows move as requests come, go, are preempted and return; the row is the id that `Drafter` gets, which finds
a request by its context where its row has changed. The draft is one-hot, and vLLM accepts a drafted token with the
target's probability of it (one-hot verification), so the output follows the target at every temperature.
`vllm_sampling.py` checks vLLM's sampler before anything is drafted.

Each step, `policy.py` decides for which requests a draft pays, and whether LLaDA or the lookup makes it. Nothing that
goes wrong in here reaches vLLM: a request that fails is drafted for no more, the others go on. Every outcome is counted
(`counters.py`). Tensor-parallel ranks share the student's weights out (`parallel.py`). The rank whose drafts vLLM takes
plans, and tells the others for which rows; they see the same batch, so what fails on one for its tokens fails on all.
What one rank alone fails at, such as memory, leaves the others in a collective until vLLM's timeout ends the server:
the cache is allocated at the start, and what a forward takes beside it is bounded (`propose.py`).
"""

from __future__ import annotations

import logging
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import PositiveInt, ValidationError

from shared.config.speculate import DrafterConfig
from shared.errors import CheckpointError, ConfigError
from shared.tokenizer.vocabulary import Vocabulary
from student.drafting import vllm_sampling
from student.drafting.acceptance import LLADA, MAKERS, Ints
from student.drafting.counters import Counters
from student.drafting.lookup import Lookup
from student.drafting.policy import Plan, Policy
from student.drafting.propose import Drafter
from student.lineage import warn_of_another_teacher
from student.model.export import load_student

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.parallel_state import GroupCoordinator

logger = logging.getLogger(__name__)

OPTIONS_KEY = "llada_drafter"


class DrafterOptions(DrafterConfig):
    """What `additional_config["llada_drafter"]` may hold: the keys of `speculate.drafter`, and these.

    Attributes:
        student: directory of the trained student.
        max_context_tokens, policy, lookup: as in the config's section `speculate`.
    """

    student: str
    max_context_tokens: PositiveInt | None = None
    policy: bool = True
    lookup: bool = True

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> DrafterOptions:
        """Read them from vLLM's config.

        Raises:
            ConfigError: if they are missing, or have unknown keys or values.
        """
        options = vllm_config.additional_config
        given = options.get(OPTIONS_KEY) if isinstance(options, dict) else None
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            problem = error.errors()[0]
            at = "".join(f"[{key!r}]" for key in problem["loc"])
            raise ConfigError(
                f"additional_config[{OPTIONS_KEY!r}]{at} is {problem['input']!r}: {problem['msg']}; expected is a "
                "mapping with 'student', the trained student's directory, and at most the keys "
                f"{', '.join(cls.model_fields)}"
            ) from error


class LladaProposer:
    """vLLM's side of `Drafter`."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.options = DrafterOptions.of(vllm_config)
        assert vllm_config.speculative_config is not None
        self.draft_tokens = int(vllm_config.speculative_config.num_speculative_tokens)
        self.max_model_len = int(vllm_config.model_config.max_model_len)
        self.rows = int(vllm_config.scheduler_config.max_num_seqs)
        self.teacher_tokenizer = self.options.teacher_tokenizer or str(vllm_config.model_config.tokenizer)
        self.tokenizer_revision = vllm_config.model_config.tokenizer_revision
        self.drafter: Drafter | None = None
        self.ranks: GroupCoordinator | None = None
        """Tensor-parallel ranks that share the student's weights out; None where there is one rank."""
        self.leads = True
        self._told = False
        self._passed_over: dict[int, str] = {}
        """Rows of this step that the drafter had no room for, or that are too long for it."""
        self._confidence: dict[int, list[float]] = {}
        """In each token of this step's drafts, by row."""
        self.lookup: Lookup | None = None
        self.ends: frozenset[int] = frozenset()
        self.counters = Counters()
        self._logged: set[tuple[str, int | None]] = set()
        self._ended = time.perf_counter()
        self.reset()

    def reset(self, **changes: Any) -> None:
        """Forget what was measured, and go on with other `policy` or `lookup` options."""
        self.options = self.options.model_copy(update=changes)
        self.policy = self._new_policy()
        if self.drafter is not None:
            self._load_lookup()

    def leave_out(self, seconds: float) -> None:
        """So long the engine has waited since the last draft: it is no part of a step's time."""
        self._ended += seconds

    def _new_policy(self) -> Policy:
        return Policy(
            self.rows,
            self.draft_tokens,
            enabled=self.options.policy,
            chances=self.options.acceptance_by_confidence,
        )

    def _load_lookup(self) -> None:
        # Only where it is asked for: it brings numba, beside which vLLM 0.32 starts no further engine in this process.
        if self.options.lookup and self.lookup is None:
            self.lookup = Lookup(self.draft_tokens, self.max_model_len)

    def load_model(self, target: Any = None, *_args: Any, **_kwargs: Any) -> None:
        """Check vLLM's sampler and load the student onto the target's device; vLLM calls this after loading the target.

        Where the sampler is wrong and cannot be repaired, nothing is loaded and nothing is ever drafted.

        Raises:
            CheckpointError: if the student or the teacher's tokenizer is missing or incomplete.
            VocabularyError: if a tokenizer cannot be read.
        """
        from vllm.distributed import get_tp_group

        device = next((p.device for p in target.parameters()), None) if target is not None else None
        device = device or torch.device("cpu")
        refusal = vllm_sampling.refusal(device)
        if refusal is not None:
            logger.error("nothing is drafted: %s, so drafts would change what the target says", refusal)
        else:
            group = get_tp_group()
            self.ranks = group if group.world_size > 1 else None
            self.leads = group.rank_in_group == 0  # vLLM takes the drafts of this rank (`take_draft_token_ids`)
            self.load_drafter(device)
            self._load_lookup()

    def load_drafter(self, device: torch.device) -> None:
        """Load the student. Raises as `load_model` does."""
        model, _ = load_student(self.options.student)
        model = model.to(device).eval()  # type: ignore[arg-type]
        tokenizer = _local_tokenizer(self.teacher_tokenizer, self.tokenizer_revision)
        teacher = Vocabulary.from_tokenizer(tokenizer, self.options.teacher_roles)
        warn_of_another_teacher(Path(self.options.student), teacher)
        self.drafter = Drafter.from_student(
            model,
            self.options.student,
            teacher,
            tokenizer,
            self.draft_tokens,
            self.options,
            max_context_tokens=self.options.max_context_tokens,
            group=None if self.ranks is None else self.ranks.device_group,
        )
        self.ends = teacher.end_ids

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: NDArray[np.integer[Any]],
        token_ids_cpu: NDArray[np.integer[Any]],
        slot_mappings: Any = None,  # noqa: ARG002  (vLLM passes it by name)
    ) -> list[list[int]]:
        """Drafts for every row of vLLM's batch. Never raises.

        Args:
            sampled_token_ids: this step's new tokens by row; empty where a prompt is not yet read to its end.
            num_tokens_no_spec: tokens of each row, the new ones included.
            token_ids_cpu: [rows, max_model_len].
        """
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        if self.drafter is None or not drafts:  # load_model said why
            return drafts
        if not self.leads:
            self._draft(self._agreed(None), num_tokens_no_spec, token_ids_cpu)
            return drafts
        started = time.perf_counter()
        self._told = False
        try:
            drafts = self._propose(started - self._ended, sampled_token_ids, num_tokens_no_spec, token_ids_cpu)
        except Exception as error:
            if not self._told:
                self._agreed([])
            self._failed(error)
            self.counters.add("undrafted", "failed", len(drafts))
            self.policy = self._new_policy().after(self.policy)
        self._ended = time.perf_counter()
        self.counters.add("seconds", "all", self._ended - started)
        return drafts

    def _propose(
        self, seconds: float, sampled: list[list[int]], lengths: NDArray[Any], tokens_RxL: NDArray[Any]
    ) -> list[list[int]]:
        """`propose`, `seconds` after the last call returned."""
        policy, rows = self.policy, len(sampled)
        lengths = lengths[:rows]
        for maker, accepted in policy.observe(seconds, [len(ids) for ids in sampled], lengths, tokens_RxL):
            if accepted:
                self.counters.add("accepted_tokens", MAKERS[maker], int(accepted))
        # A row that has just ended is still in the batch.
        going_R = np.array([bool(ids) and ids[-1] not in self.ends for ids in sampled]) & (lengths < self.max_model_len)
        found_RxK = np.full((rows, self.draft_tokens), -1)
        if self.lookup is not None and self.options.lookup:
            found_RxK = self.lookup.find(np.flatnonzero(going_R), lengths, tokens_RxL)
        plan = policy.plan(int(going_R.sum()), going_R & ~policy.refused_R[:rows], found_RxK)

        self._passed_over.clear()
        self._confidence.clear()
        started = time.perf_counter()
        drafted = self._draft(self._agreed(plan.llada_rows.tolist()), lengths, tokens_RxL)
        spent = time.perf_counter() - started
        confidence_RxK = np.zeros((rows, self.draft_tokens))
        for row, confidence in self._confidence.items():
            confidence_RxK[row, : len(confidence)] = confidence
        handed_on_R = np.minimum(policy.worth_verifying(plan, confidence_RxK), self.max_model_len - lengths)
        made = {row: found_RxK[row].tolist() for row in np.flatnonzero(plan.maker_R != LLADA)} | drafted
        drafts = [made.get(row, [])[: handed_on_R[row]] for row in range(rows)]
        given_R = np.array([len(draft) for draft in drafts])
        policy.drafted(plan, given_R, plan.llada_rows, spent, confidence_RxK)
        if len(plan.llada_rows):
            self.counters.add("seconds", MAKERS[LLADA], spent)
        self._count(plan, given_R, going_R & (given_R == 0), [row for row, draft in drafted.items() if draft])
        return drafts

    def _count(self, plan: Plan, given_R: Ints, undrafted_R: NDArray[np.bool_], llada_rows: list[int]) -> None:
        """Count the drafts of a step by maker, and why each of the `undrafted` rows has none.

        Args:
            llada_rows: for which LLaDA has drafted something, worth verifying or not.
        """
        rows = len(given_R)
        for maker, name in enumerate(MAKERS):
            made_R = given_R[(given_R > 0) & (plan.maker_R == maker)]
            self.counters.add("drafts", name, len(made_R))
            self.counters.add("draft_tokens", name, int(made_R.sum()))
        for row, reason in self._passed_over.items():
            self.counters.add("undrafted", reason)
            undrafted_R[row] = False
        for reason, these_R in (
            ("refused", self.policy.refused_R[:rows]),
            ("unsure", np.isin(np.arange(rows), llada_rows)),
            ("nothing to propose", plan.tokens_R > 0),
            (plan.reason, np.ones(rows, bool)),
        ):
            self.counters.add("undrafted", reason, int((undrafted_R & these_R).sum()))
            undrafted_R &= ~these_R

    def _agreed(self, rows: list[int] | None) -> list[int]:
        """The rows that the leading rank drafts for, on every rank: clocks differ, so that only one of them plans."""
        self._told = True
        agreed: list[int] = rows if self.ranks is None else self.ranks.broadcast_object(rows)  # type: ignore[assignment]
        return agreed

    def _draft(self, rows: list[int], lengths: NDArray[Any], tokens_RxL: NDArray[Any]) -> dict[int, list[int]]:
        """LLaDA's draft by row. Where the batch fails, each row is drafted alone, and one that fails is refused."""
        assert self.drafter is not None
        if not rows:
            return {}
        try:
            contexts = [tokens_RxL[row, : lengths[row]] for row in rows]
            drafts = dict(zip(rows, self.drafter.propose(rows, contexts), strict=True))
            self._passed_over |= self.drafter.passed_over  # type: ignore[arg-type]  # requests are rows here
            self._confidence |= self.drafter.confidence  # type: ignore[arg-type]
            return drafts
        except Exception as error:
            self._failed(error)
            self.drafter.release(range(self.rows))  # what the failure left half done
            if len(rows) == 1:
                self.policy.refused_R[rows[0]] = True
                return {}
        drafts = {}
        for row in rows:
            drafts |= self._draft([row], lengths, tokens_RxL)
        return drafts

    def _failed(self, error: Exception) -> None:
        """Count an error, and log the first of each place."""
        self.counters.add("failures", type(error).__name__)
        (frame,) = traceback.extract_tb(error.__traceback__, limit=-1)
        place = (frame.filename, frame.lineno)
        if place not in self._logged:
            self._logged.add(place)
            logger.error("drafting failed; serving goes on, and this is logged once", exc_info=error)


def _local_tokenizer(name: str, revision: str | None) -> Path:
    """The directory of a tokenizer given as a directory or as a hub name that vLLM has already fetched, at `revision`,
    null for the hub's newest."""
    if Path(name).exists():
        return Path(name)
    from transformers.utils.hub import cached_file

    try:
        file = cached_file(name, "tokenizer.json", revision=revision)
    except OSError as error:
        raise CheckpointError(
            f"the teacher's tokenizer {name!r} is neither a directory nor in the local hub cache ({error}); "
            f"set additional_config['{OPTIONS_KEY}']['teacher_tokenizer'] to its directory"
        ) from error
    assert file is not None
    return Path(file).parent
