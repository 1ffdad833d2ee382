"""Draft with LLaDA: one forward per call proposes a block of teacher tokens for every request.

The student sees the request's context in its own vocabulary (`bridge.py`), then `block_length` masked positions, and
fills all of them in one denoising step. The argmax of each position makes the draft: a one-hot draft, which one-hot
verification keeps lossless at every temperature (README.md of this folder).

Contexts keep their keys and values between calls (`PrefixCache`, one slot a request), so that a call costs the new
tokens and the block, not the context. Where new text changes how earlier text is tokenized, those tokens are cut off
the cache and fed again. Proposals are the same with and without the cache.

Related: string-level exact match and universal assisted generation (`bridge.py`) draft across vocabularies too, with an
autoregressive model that takes one forward a token; here one forward fills the block.

A request is known by its context, which starts with what it was in the call before. Its id is a hint that makes it
quick to find; a wrong one costs time and nothing else. A request that was not seen for longest gives up its slot when
slots run out, and starts over if it comes back. Nothing here depends on the engine that verifies: offline evaluation
drafts along stored responses with this class.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    """A slot of the cache. Keys and values of the first `cached` student tokens of `context` lie there."""

    slot: int
    name: Hashable = None
    context: BridgedContext = field(default_factory=BridgedContext)
    cached: int = 0

    def continues_to(self, context: NDArray[np.integer[Any]]) -> bool:
        known = self.context.teacher_ids
        start = context[: len(known)]
        # The last token first: it tells most other requests apart without reading their contexts.
        return np.array_equal(known[-1:], start[-1:]) and np.array_equal(known, start)

    @property
    def new(self) -> NDArray[np.int32]:
        """Student tokens that are not cached."""
        return self.context.student_ids[self.cached :]


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
        self._requests: dict[int, _Request] = {}
        """By slot, in order of use."""

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
            request_ids: different from one another. Best if a request keeps its id from call to call; where ids move
                between requests (rows of a batch), requests are found by their contexts.
            contexts: all teacher tokens of each request so far, prompt included.

        Raises:
            VocabularyError: if a token is outside the teacher's vocabulary.
        """
        assert len(set(request_ids)) == len(request_ids) == len(contexts), "one context for each of different requests"
        if not self.cached:
            self._requests.clear()
        drafts: list[list[int]] = []
        for start in range(0, len(contexts), self.slots):
            stop = start + self.slots
            drafts += self._propose(request_ids[start:stop], [np.asarray(ids) for ids in contexts[start:stop]])
        return drafts

    def release(self, request_ids: Sequence[Hashable]) -> None:
        """Forget these requests and free their slots; unknown ones are ignored."""
        released = set(request_ids)
        self._requests = {slot: request for slot, request in self._requests.items() if request.name not in released}

    def _propose(self, names: Sequence[Hashable], contexts: list[NDArray[np.integer[Any]]]) -> list[list[int]]:
        """`propose` for at most as many requests as there are slots."""
        requests = self._find(names, contexts)
        for request, context in zip(requests, contexts, strict=True):
            self.bridge.extend(request.context, context[len(request.context.teacher) :])
            request.cached = min(request.cached, request.context.unchanged)
        drafts: dict[int, list[int]] = {}
        longest = self.max_context_tokens - self.block_length
        for group in self._groups([request for request in requests if len(request.context.student) <= longest]):
            for request, drafted in zip(group, self._forward(group), strict=True):
                proposed = self.bridge.to_teacher(request.context, drafted, self.keep_extendable)
                drafts[request.slot] = proposed[: self.draft_tokens]
        return [drafts.get(request.slot, []) for request in requests]

    def _find(self, names: Sequence[Hashable], contexts: list[NDArray[np.integer[Any]]]) -> list[_Request]:
        """The request that each context continues: the one of that name, else the longest other, else a new one."""
        free = dict(self._requests)
        named = {request.name: request for request in free.values()}
        found: list[_Request | None] = []
        for name, context in zip(names, contexts, strict=True):
            request = named.get(name)
            found.append(free.pop(request.slot) if request and request.continues_to(context) else None)
        for row, context in enumerate(contexts):
            if found[row] is None:
                candidates = [request for request in free.values() if request.continues_to(context)]
                if candidates:
                    found[row] = free.pop(max(candidates, key=lambda request: len(request.context.teacher)).slot)
        slots = iter([*(slot for slot in range(self.slots) if slot not in self._requests), *free])
        requests = [request or _Request(next(slots)) for request in found]
        for name, request in zip(names, requests, strict=True):
            request.name = name
            self._requests.pop(request.slot, None)
            self._requests[request.slot] = request
        return requests

    def _groups(self, requests: list[_Request]) -> Iterator[list[_Request]]:
        """Rows of one forward: all in the steady state; long new contexts go apart, and pad no short ones."""
        group: list[_Request] = []
        for request in sorted(requests, key=lambda request: len(request.new)):
            new = len(request.new)
            too_many = (len(group) + 1) * (new + self.block_length) > _FORWARD_TOKENS
            if group and (too_many or new > 2 * len(group[0].new) + 64):
                yield group
                group = []
            group.append(request)
        if group:
            yield group

    def _forward(self, group: list[_Request]) -> list[list[int]]:
        """The argmax of every masked position, `block_length` student ids for each row of `group`."""
        import torch

        group.sort(key=lambda request: request.slot)  # neighboring slots are read without a copy
        slots = [request.slot for request in group]
        new = [len(request.new) for request in group]
        self._reserve(slots[-1] + 1, max(len(request.context.student) for request in group) + self.block_length)
        self._cache.truncate(slots, [request.cached for request in group])
        clean_BxC = np.zeros((len(group), max(new)), np.int64)
        for row, request in enumerate(group):
            clean_BxC[row, : new[row]] = request.new
        device = self.model.head_weight.device
        with torch.inference_mode():
            hidden_BxGxD = self.model.draft_hidden_states(
                self._cache, slots, torch.from_numpy(clean_BxC).to(device), new, self.block_length
            )
            logits_BxGxV = hidden_BxGxD @ self.model.head_weight.T
            drafted: list[list[int]] = logits_BxGxV.masked_fill_(self._undraftable_V, -torch.inf).argmax(-1).tolist()
        for request in group:
            request.cached = len(request.context.student)
        return drafted

    def _reserve(self, slots: int, capacity: int) -> None:
        """Let the cache hold `slots` requests of `capacity` tokens; it doubles, so that growing is rare."""
        cache = self._cache
        if slots > cache.slots:
            slots = min(self.slots, max(slots, 2 * cache.slots))
        if capacity > cache.capacity:
            capacity = min(self.max_context_tokens, max(capacity, 2 * cache.capacity))
        cache.grow(slots, capacity)
