"""Draft with LLaDA: one forward per call proposes a block of teacher tokens for every request.

The student sees the request's context over its own vocabulary (`bridge`), then `block_length` masked positions,
and fills all of them in one denoising step. Each position's argmax makes the draft, a one-hot draft: lossless
under the one-hot rule at any temperature (`verify`). Contexts keep their keys and values between calls
(`PrefixCache`, one slot a request), so that a call costs the new tokens and the block, not the context; what the
bridge re-encoded differently is cut off and fed again. Proposals are the same with and without the cache.

Requests come and go by id: a request that was not seen for longest gives up its slot when slots run out, and
starts over if it comes back. Independent of the engine that verifies: the offline evaluation walks stored
responses with this very class.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shared.errors import CheckpointError
from shared.tokenizer.vocabulary import Encoder, Vocabulary, load_tokenizer
from student.drafting.bridge import BridgedContext, ByteBridge

if TYPE_CHECKING:
    from student.model.modeling_llada import LladaForMaskedDiffusion

_FIRST_CAPACITY = 256
_FORWARD_TOKENS = 8192  # of one forward, padding included: bounds the memory that long prompts take


@dataclass(slots=True)
class _Request:
    """One request's slot: its context, the student tokens whose keys and values are cached, and how many are final."""

    slot: int
    context: BridgedContext = field(default_factory=BridgedContext)
    cached: list[int] = field(default_factory=list)
    final: int = 0


@dataclass(slots=True)
class _Job:
    """One row of a forward: the request's student tokens from index `kept` on are new to the cache."""

    row: int
    request: _Request
    kept: int

    @property
    def new(self) -> list[int]:
        return self.request.context.student_ids[self.kept :]


class Drafter:
    """Proposes up to `draft_tokens` teacher tokens after each context.

    Args:
        model: in evaluation mode, on its device.
        block_length: student tokens filled per forward; as many as the model was trained on.
        slots: requests whose keys and values are kept at most; more than that in one call are drafted in turns.
        max_context_tokens: longest context, in student tokens, block included; null is the model's own limit. A longer
            context gets no draft. Memory grows to slots x max_context_tokens at most, as requests need it.
        keep_extendable: also propose a last token that further bytes could still merge.
        cached: False recomputes every context, for comparison.
    """

    def __init__(
        self,
        model: LladaForMaskedDiffusion,
        bridge: ByteBridge,
        draft_tokens: int,
        block_length: int,
        *,
        slots: int = 64,
        max_context_tokens: int | None = None,
        keep_extendable: bool = False,
        cached: bool = True,
    ) -> None:
        import torch

        from student.model.prefix_cache import PrefixCache

        self.model, self.bridge = model, bridge
        self.draft_tokens, self.block_length = draft_tokens, block_length
        self.slots, self.cached, self.keep_extendable = slots, cached, keep_extendable
        limit = model.config.max_sequence_length
        self.max_context_tokens = min(limit, max_context_tokens or limit)
        rows, dtype, device = model.head_weight.shape[0], model.head_weight.dtype, model.head_weight.device
        draftable = bridge.draftable_ids
        if draftable.max() >= rows:
            raise CheckpointError(
                f"the student's tokenizer has the id {draftable.max()} but its model only {rows} rows; "
                "they are not of one checkpoint"
            )
        self._undraftable_V = torch.ones(rows, dtype=torch.bool, device=device)
        self._undraftable_V[torch.from_numpy(draftable).to(device)] = False
        self._cache = PrefixCache.allocate(
            model.config, 1, min(_FIRST_CAPACITY, self.max_context_tokens), dtype, device
        )
        self._requests: OrderedDict[Hashable, _Request] = OrderedDict()

    @classmethod
    def from_student(
        cls,
        model: LladaForMaskedDiffusion,
        directory: str | Path,
        teacher: Vocabulary,
        teacher_tokenizer: str | Path,
        draft_tokens: int,
        block_length: int | None = None,
        *,
        slots: int = 64,
        max_context_tokens: int | None = None,
        keep_extendable: bool = False,
    ) -> Drafter:
        """A drafter for `teacher` of a loaded student and the tokenizer in its `directory`.

        Args:
            teacher_tokenizer: the teacher's tokenizer; its vocabulary must be `teacher`.
            block_length: null is what the student was trained on (its config's `draft_block_length`).

        Raises:
            CheckpointError: if no block length is given or recorded.
            VocabularyError: if a tokenizer cannot be read, or the teacher's is not `teacher`.
        """
        length = block_length or model.config.draft_block_length
        if length is None:
            raise CheckpointError(
                f"{directory}/config.json has no draft_block_length, so this student was not trained to draft; "
                "train it, or pass a block length"
            )
        bridge = ByteBridge(teacher, Encoder.from_tokenizer(teacher_tokenizer, teacher), *load_tokenizer(directory))
        return cls(
            model,
            bridge,
            draft_tokens,
            length,
            slots=slots,
            max_context_tokens=max_context_tokens,
            keep_extendable=keep_extendable,
        )

    def propose(self, request_ids: Sequence[Hashable], contexts: Sequence[ArrayLike]) -> list[list[int]]:
        """Up to `draft_tokens` teacher tokens for each request.

        Args:
            request_ids: different from one another; the same request keeps its id from call to call.
            contexts: all teacher tokens of each request so far, prompt included.

        Raises:
            VocabularyError: if a token is outside the teacher's vocabulary.
        """
        assert len(set(request_ids)) == len(request_ids) == len(contexts), "one context for each of different requests"
        drafts: list[list[int]] = [[] for _ in contexts]
        for start in range(0, len(contexts), self.slots):
            stop = min(start + self.slots, len(contexts))
            jobs = self._admit(request_ids[start:stop], contexts[start:stop], start)
            for group in self._groups(jobs):
                for job, drafted in zip(group, self._forward(group), strict=True):
                    proposed = self.bridge.to_teacher(job.request.context, drafted, self.keep_extendable)
                    drafts[job.row] = proposed[: self.draft_tokens]
        return drafts

    def release(self, request_ids: Sequence[Hashable]) -> None:
        """Forget these requests and free their slots; unknown ones are ignored."""
        for request_id in request_ids:
            self._requests.pop(request_id, None)

    def _admit(self, request_ids: Sequence[Hashable], contexts: Sequence[ArrayLike], first_row: int) -> list[_Job]:
        """Bring each request's context up to date and find what of it is not cached."""
        for request_id in request_ids:
            if request_id in self._requests:
                self._requests.move_to_end(request_id)
        jobs = []
        for row, (request_id, context) in enumerate(zip(request_ids, contexts, strict=True), first_row):
            request = self._requests.get(request_id)
            if request is None:
                request = self._requests[request_id] = _Request(self._free_slot())
            kept = (
                self._update(request, np.asarray(context, dtype=np.int64))
                if self.cached
                else self._restart(request, context)
            )
            if len(request.context.student_ids) + self.block_length <= self.max_context_tokens:
                jobs.append(_Job(row, request, kept))
        return jobs

    def _update(self, request: _Request, teacher_ids: NDArray[np.int64]) -> int:
        """Bridge the new tokens; how many of the cached student tokens are still right."""
        known = request.context.teacher_ids
        same = 0
        if len(known) <= len(teacher_ids) and np.array_equal(known, teacher_ids[: len(known)]):
            same = request.final
            self.bridge.extend(request.context, teacher_ids[len(known) :])
        else:
            request.context = self.bridge.translate(teacher_ids)
        ids, cached = request.context.student_ids, request.cached
        while same < min(len(ids), len(cached)) and ids[same] == cached[same]:
            same += 1
        return same

    def _restart(self, request: _Request, teacher_ids: ArrayLike) -> int:
        request.context = self.bridge.translate(teacher_ids)
        return 0

    def _free_slot(self) -> int:
        """A slot that nobody has, of the request that was not seen for longest if need be."""
        if len(self._requests) >= self.slots:
            return self._requests.popitem(last=False)[1].slot
        taken = {request.slot for request in self._requests.values()}
        return next(slot for slot in range(self.slots) if slot not in taken)

    def _groups(self, jobs: list[_Job]) -> Iterator[list[_Job]]:
        """Rows of one forward: all in the steady state; long new contexts go apart, so that they pad nobody."""
        group: list[_Job] = []
        for job in sorted(jobs, key=lambda job: len(job.new)):
            width = len(job.new) + self.block_length
            too_many = (len(group) + 1) * width > _FORWARD_TOKENS
            if group and (too_many or len(job.new) > 2 * len(group[0].new) + 64):
                yield group
                group = []
            group.append(job)
        if group:
            yield group

    def _forward(self, group: list[_Job]) -> list[list[int]]:
        """The argmax of every masked position, `block_length` student ids for each row of `group`."""
        import torch

        group.sort(key=lambda job: job.request.slot)  # neighbouring slots are read without a copy
        new = [job.new for job in group]
        self._reserve(
            max(job.request.slot for job in group) + 1,
            max(len(job.request.context.student_ids) for job in group) + self.block_length,
        )
        slots = [job.request.slot for job in group]
        self._cache.truncate(slots, [job.kept for job in group])
        clean_BxC = np.zeros((len(group), max(map(len, new))), np.int64)
        for row, ids in enumerate(new):
            clean_BxC[row, : len(ids)] = ids
        device = self.model.head_weight.device
        with torch.inference_mode():
            hidden_BxGxD = self.model.draft_hidden_states(
                self._cache, slots, torch.from_numpy(clean_BxC).to(device), [len(ids) for ids in new], self.block_length
            )
            logits_BxGxV = hidden_BxGxD @ self.model.head_weight.T
            drafted: list[list[int]] = logits_BxGxV.masked_fill_(self._undraftable_V, -torch.inf).argmax(-1).tolist()
        for job in group:
            job.request.cached = list(job.request.context.student_ids)
            job.request.final = job.request.context.stable
        return drafted

    def _reserve(self, slots: int, capacity: int) -> None:
        """Let the cache hold `slots` requests of `capacity` tokens; it doubles, so that growing is rare."""
        from student.model.prefix_cache import PrefixCache

        old = self._cache
        if slots <= old.slots and capacity <= old.capacity:
            return
        keys = old.keys[0]
        self._cache = PrefixCache.allocate(
            self.model.config,
            old.slots if slots <= old.slots else min(self.slots, max(slots, 2 * old.slots)),
            old.capacity if capacity <= old.capacity else min(self.max_context_tokens, max(capacity, 2 * old.capacity)),
            keys.dtype,
            keys.device,
        )
        for layer in range(len(old.keys)):
            self._cache.keys[layer][: old.slots, :, : old.capacity] = old.keys[layer]
            self._cache.values[layer][: old.slots, :, : old.capacity] = old.values[layer]
        self._cache.lengths[: old.slots] = old.lengths
