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
`vllm_sampling.py` checks vLLM's sampler before anything is drafted. This file imports nothing of vLLM.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from shared.errors import CheckpointError, ConfigError
from shared.tokenizer.vocabulary import Vocabulary
from student.drafting.products import Way
from student.drafting.propose import Drafter
from student.lineage import warn_of_another_teacher

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

OPTIONS_KEY = "llada_drafter"


@dataclass(frozen=True)
class DrafterOptions:
    """What `additional_config["llada_drafter"]` may hold.

    Attributes:
        student: directory of the trained student.
        teacher_tokenizer: directory of the teacher's tokenizer; null is the one that vLLM serves with.
        teacher_roles: role → id of its special tokens, where its settings and chat template do not say.
        block_length: null is the student's own.
        memory_gib: of the contexts' keys and values, allocated when vLLM loads its model; a request that finds no room
            is not drafted for. Null is room for 16 contexts of the longest length, or a tenth of what is free.
        max_context_tokens: longest context that is drafted for, in student tokens; null is the student's limit.
        keep_extendable: also propose a last token that further bytes could still merge.
        draft_vocabulary: draft only so many student tokens, the most frequent of the training responses; null is all.
        dtype: of the student's products, a way of `products.py`; null measures which is fastest on this device.
    """

    student: str
    teacher_tokenizer: str | None = None
    teacher_roles: dict[str, int] | None = None
    block_length: int | None = None
    memory_gib: float | None = None
    max_context_tokens: int | None = None
    keep_extendable: bool = False
    draft_vocabulary: int | None = None
    dtype: Way | None = None

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> DrafterOptions:
        """Read them from vLLM's config.

        Raises:
            ConfigError: if they are missing or have unknown keys.
        """
        options = vllm_config.additional_config
        given = options.get(OPTIONS_KEY) if isinstance(options, dict) else None
        known = [field.name for field in fields(cls)]
        if not isinstance(given, dict) or "student" not in given or not set(given) <= set(known):
            raise ConfigError(
                f"additional_config[{OPTIONS_KEY!r}] is {given!r}, expected a mapping with 'student', the trained "
                f"student's directory, and at most the keys {known}"
            )
        ways = get_args(Way)
        if given.get("dtype") not in (None, *ways):
            raise ConfigError(
                f"additional_config[{OPTIONS_KEY!r}]['dtype'] is {given['dtype']!r}, expected one of {ways}"
            )
        return cls(**given)


class LladaProposer:
    """vLLM's side of `Drafter`."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.options = DrafterOptions.of(vllm_config)
        assert vllm_config.speculative_config is not None
        self.draft_tokens = int(vllm_config.speculative_config.num_speculative_tokens)
        self.max_model_len = int(vllm_config.model_config.max_model_len)
        self.teacher_tokenizer = self.options.teacher_tokenizer or str(vllm_config.model_config.tokenizer)
        self.drafter: Drafter | None = None
        self.ends: frozenset[int] = frozenset()

    def load_model(self, target: Any = None, *_args: Any, **_kwargs: Any) -> None:
        """Check vLLM's sampler and load the student onto the target's device; vLLM calls this after loading the target.

        Where the sampler is wrong and cannot be repaired, nothing is loaded and nothing is ever drafted.

        Raises:
            CheckpointError: if the student or the teacher's tokenizer is missing or incomplete.
            VocabularyError: if a tokenizer cannot be read.
        """
        import torch

        from student.drafting import vllm_sampling

        device = next((p.device for p in target.parameters()), None) if target is not None else None
        device = device or torch.device("cpu")
        refusal = vllm_sampling.refusal(device)
        if refusal is None:
            self.load_drafter(device)
        else:
            logger.error("nothing is drafted: %s, so drafts would change what the target says", refusal)

    def load_drafter(self, device: torch.device) -> None:
        """Load the student. Raises as `load_model` does."""
        from student.model.export import load_student

        model, _ = load_student(self.options.student)
        model = model.to(device).eval()  # type: ignore[arg-type]
        tokenizer = _local_tokenizer(self.teacher_tokenizer)
        teacher = Vocabulary.from_tokenizer(tokenizer, self.options.teacher_roles)
        warn_of_another_teacher(Path(self.options.student), teacher)
        self.drafter = Drafter.from_student(
            model,
            self.options.student,
            teacher,
            tokenizer,
            self.draft_tokens,
            self.options.block_length,
            memory_bytes=None if self.options.memory_gib is None else int(self.options.memory_gib * 2**30),
            max_context_tokens=self.options.max_context_tokens,
            draft_vocabulary=self.options.draft_vocabulary,
            way=self.options.dtype or "fastest",
            keep_extendable=self.options.keep_extendable,
        )
        self.ends = frozenset(teacher.roles[role] for role in ("end_of_turn", "end_of_text") if role in teacher.roles)

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: NDArray[np.integer[Any]],
        token_ids_cpu: NDArray[np.integer[Any]],
        slot_mappings: Any = None,  # noqa: ARG002  (vLLM passes it by name)
    ) -> list[list[int]]:
        """Drafts for every row of vLLM's batch.

        Args:
            sampled_token_ids: this step's new tokens by row; empty where a prompt is not yet read to its end.
            num_tokens_no_spec: tokens of each row, the new ones included.
            token_ids_cpu: [rows, max_model_len].
        """
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        if self.drafter is None:  # load_model said why
            return drafts
        rows = [
            row
            for row, sampled in enumerate(sampled_token_ids)
            # A row that has just ended is still in the batch.
            if sampled and sampled[-1] not in self.ends and num_tokens_no_spec[row] < self.max_model_len
        ]
        contexts = [token_ids_cpu[row, : num_tokens_no_spec[row]] for row in rows]
        for row, draft in zip(rows, self.drafter.propose(rows, contexts), strict=True):
            drafts[row] = draft[: self.max_model_len - int(num_tokens_no_spec[row])]
        return drafts


def _local_tokenizer(name: str) -> Path:
    """The directory of a tokenizer given as a directory or as a hub name that vLLM has already fetched."""
    if Path(name).exists():
        return Path(name)
    from transformers.utils.hub import cached_file

    try:
        file = cached_file(name, "tokenizer.json")
    except OSError as error:
        raise CheckpointError(
            f"the teacher's tokenizer {name!r} is neither a directory nor in the local hub cache ({error}); "
            f"set additional_config['{OPTIONS_KEY}']['teacher_tokenizer'] to its directory"
        ) from error
    assert file is not None
    return Path(file).parent
