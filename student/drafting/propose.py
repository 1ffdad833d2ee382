"""Draft with LLaDA: one forward per call proposes a block of teacher tokens for every request.

The student sees the request's context in its own vocabulary (`bridge.py`), then `block_length` masked positions, and
fills all of them in one denoising step, or in more (`Denoising`). The argmax of each position makes the draft: a
one-hot draft, which one-hot verification keeps lossless at every temperature (README.md of this folder).

Contexts keep their keys and values between calls (`PrefixCache`), so that a call costs the new tokens and the block,
not the context. Where new text changes how earlier text is tokenized, those tokens are cut off the cache and fed again.
Proposals are the same with and without the cache.

The cache's memory is a budget, allocated when the drafter is made. Requests that are not being served lose their pages
first, the one unseen for longest before the others. Where those of one call do not all fit, the oldest are drafted for;
the others get no draft and are counted.

Related: string-level exact match and universal assisted generation (`bridge.py`) draft across vocabularies too, with an
autoregressive model that takes one forward a token; here one forward fills the block.

A request is known by its context, which starts with what it was in the call before. Its id is a hint that makes it
quick to find; a wrong one costs time and nothing else. Nothing here depends on the engine that verifies: offline
evaluation drafts along stored responses with this class.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import psutil
import torch
from numpy.typing import ArrayLike, NDArray
from torch.distributed import ProcessGroup

from shared.config.speculate import DrafterConfig, Way
from shared.errors import CheckpointError, ConfigError
from shared.tokenizer.vocabulary import Encoder, Vocabulary, load_tokenizer
from student.drafting.bridge import BridgedContext, ByteBridge
from student.drafting.denoising import Denoising
from student.drafting.frequencies import frequent_tokens
from student.drafting.products import fastest_way
from student.model.prefix_cache import pages_for

if TYPE_CHECKING:
    from student.drafting.forward import DraftForward
    from student.model.modeling_llada import LladaForMaskedDiffusion

_FORWARD_TOKENS = 8192  # of one forward, padding included: bounds the memory that long prompts take
_READ_BYTES = 256 << 20  # of the keys and values that a layer copies together, padding included
_STEADY_TOKENS = 64  # more than a step adds to a request: above, new tokens are a prompt
_MOST_IDLE = 256  # requests that are not being served, remembered at most
_DEFAULT_CONTEXTS, _DEFAULT_SHARE = 16, 0.1


@dataclass(slots=True)
class _Request:
    """A request and its number in the cache; the older one has the lower number."""

    slot: int
    name: Hashable = None
    context: BridgedContext = field(default_factory=BridgedContext)

    def continues_to(self, context: NDArray[np.integer[Any]]) -> bool:
        known = self.context.teacher_ids
        start = context[: len(known)]
        # The last token first: it tells most other requests apart without reading their contexts.
        return np.array_equal(known[-1:], start[-1:]) and np.array_equal(known, start)


class Drafter:
    """Proposes up to `draft_tokens` teacher tokens after each context.

    Args:
        block_length: student tokens filled per forward; as many as the model was trained on.
        memory_bytes: of the cache, allocated here, whole; null is room for 16 contexts of the longest length, or a
            tenth of the memory that is free where that is less, but for one such context at least.
        in_turns: what finds no room is drafted for in a further forward, in which the others lose theirs: every
            request gets its draft, which takes longer. For evaluation.
        keep_extendable: also propose a last token that further bytes could still merge.

    Attributes:
        passed_over: requests of the last call that were not drafted for, and why: `too long` for the model, or `no
            room` in the cache.
        confidence: of each draft of the last call, the student's own probability of each token after those before it.

    Raises:
        ConfigError: if `memory_bytes` is less than a page of the cache.
    """

    def __init__(
        self,
        forward: DraftForward,
        bridge: ByteBridge,
        draft_tokens: int,
        block_length: int,
        *,
        memory_bytes: int | None = None,
        in_turns: bool = False,
        keep_extendable: bool = False,
    ) -> None:
        self.forward, self.bridge = forward, bridge
        self.draft_tokens, self.block_length = draft_tokens, block_length
        self.in_turns, self.keep_extendable = in_turns, keep_extendable
        self.passed_over: dict[Hashable, str] = {}
        self.confidence: dict[Hashable, list[float]] = {}
        self.cache = forward.cache(_pages(forward, memory_bytes))
        self._numbers = count()
        self._requests: dict[int, _Request] = {}
        """By number, in order of use."""

    @classmethod
    def from_student(
        cls,
        model: LladaForMaskedDiffusion,
        directory: str | Path,
        teacher: Vocabulary,
        teacher_tokenizer: str | Path,
        draft_tokens: int,
        options: DrafterConfig,
        *,
        max_context_tokens: int | None = None,
        way: Way | Literal["fastest"] | None = "fastest",
        group: ProcessGroup | None = None,
        in_turns: bool = False,
    ) -> Drafter:
        """A drafter for `teacher` of a loaded student and the tokenizer in its `directory`.

        Args:
            model: in evaluation mode, on its device.
            teacher_tokenizer: the teacher's tokenizer; its vocabulary must be `teacher`.
            options: the block's length, where there is none, is the model's `draft_block_length`.
            max_context_tokens: longest context, in student tokens, block included; null is the model's own limit. A
                longer context gets no draft.
            way: how products are computed; "fastest" is `options.dtype`, or else measured; null reads the weights of a
                model that is in training (`DraftForward`).
            group: ranks that share the weights out; all must make the same calls. Each has loaded the whole model,
                which is left in parts.

        Raises:
            CheckpointError: if no block length is given or recorded, or model and tokenizer do not belong together.
            VocabularyError: if a tokenizer cannot be read, or the teacher's is not `teacher`.
            ConfigError: if `options.memory_gib` is less than a page of the cache.
        """
        from student.drafting.forward import DraftForward
        from student.drafting.parallel import shard

        length = options.block_length or model.config.draft_block_length
        if length is None:
            raise CheckpointError(
                f"{directory}/config.json has no draft_block_length, so this student was not trained to draft; "
                "train it, or pass a block length"
            )
        bridge = ByteBridge(teacher, Encoder.from_tokenizer(teacher_tokenizer, teacher), *load_tokenizer(directory))
        draftable = bridge.draftable_ids
        if options.draft_vocabulary is not None:
            kept = frequent_tokens(Path(directory), options.draft_vocabulary)
            draftable = draftable[np.isin(draftable, kept) | bridge.student.is_special[draftable]]
        if way == "fastest":
            way = options.dtype or fastest_way(model.device)
        if group is not None:
            assert way is not None, "a model in training is not shared out"
            chosen = [way]  # one for all: each rank has measured for itself
            torch.distributed.broadcast_object_list(chosen, group=group, group_src=0)
            way = chosen[0]
            shard(model, group)
        limit = model.config.max_sequence_length
        denoising = Denoising(options.denoising_steps, options.denoising_order)
        forward = DraftForward(model, draftable, way, min(limit, max_context_tokens or limit), group, denoising)
        return cls(
            forward,
            bridge,
            draft_tokens,
            length,
            memory_bytes=None if options.memory_gib is None else int(options.memory_gib * 2**30),
            in_turns=in_turns,
            keep_extendable=options.keep_extendable,
        )

    def propose(self, request_ids: Sequence[Hashable], contexts: Sequence[ArrayLike]) -> list[list[int]]:
        """Up to `draft_tokens` teacher tokens for each request; none where its context is too long or finds no room.

        Args:
            request_ids: different from one another. Best if a request keeps its id from call to call; where ids move
                between requests (rows of a batch), requests are found by their contexts.
            contexts: all teacher tokens of each request so far, prompt included.

        Raises:
            VocabularyError: if a token is outside the teacher's vocabulary.
        """
        assert len(set(request_ids)) == len(request_ids) == len(contexts), "one context for each of different requests"
        rows = [np.asarray(ids) for ids in contexts]
        requests = self._find(request_ids, rows)
        for request, row in zip(requests, rows, strict=True):
            self.bridge.extend(request.context, row[len(request.context.teacher_ids) :])
            self.cache.truncate(request.slot, min(self.cache.length(request.slot), request.context.unchanged))
        longest = self.forward.max_tokens - self.block_length
        waiting = [request for request in requests if len(request.context.student_ids) <= longest]
        self.passed_over = {
            request.name: "too long" for request in requests if len(request.context.student_ids) > longest
        }
        self.confidence = {}
        drafts: dict[int, list[int]] = {}
        while waiting:
            admitted, waiting = self._admit(waiting)
            for group in self._groups(admitted):
                for request, ids, chances in zip(group, *self._forward(group), strict=True):
                    proposed = self.bridge.to_teacher(request.context, ids, self.keep_extendable)[: self.draft_tokens]
                    drafts[request.slot] = proposed
                    self.confidence[request.name] = self._confidence(ids, chances, proposed)
            if not (self.in_turns and admitted):
                break
        self.passed_over |= {request.name: "no room" for request in waiting}
        return [drafts.get(request.slot, []) for request in requests]

    def release(self, request_ids: Sequence[Hashable]) -> None:
        """Forget these requests and free their memory; unknown ones are ignored."""
        released = set(request_ids)
        self._forget([request for request in self._requests.values() if request.name in released])

    def _forget(self, requests: Iterable[_Request]) -> None:
        for request in list(requests):
            self.cache.release(request.slot)
            del self._requests[request.slot]

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
                    found[row] = free.pop(max(candidates, key=lambda request: len(request.context.teacher_ids)).slot)
        requests = [request or _Request(next(self._numbers)) for request in found]
        for name, request in zip(names, requests, strict=True):
            request.name = name
            self._requests.pop(request.slot, None)
            self._requests[request.slot] = request
        surplus = len(free) - _MOST_IDLE
        self._forget(
            request
            for number, request in enumerate(free.values())
            if number < surplus or not self.cache.held_pages(request.slot)
        )
        return requests

    def _admit(self, requests: list[_Request]) -> tuple[list[_Request], list[_Request]]:
        """Make room for as many of `requests` as fit together, the oldest first: (those, the others)."""
        room, admitted, others = self.cache.pages, [], []
        for request in sorted(requests, key=lambda request: request.slot):
            needed = self._pages_of(request)
            if needed <= room:
                room -= needed
                admitted.append(request)
                self.cache.trim(request.slot, needed)
            else:
                others.append(request)
        missing = sum(self._pages_of(request) - self.cache.held_pages(request.slot) for request in admitted)
        kept = {request.slot for request in admitted}
        for slot in self._requests:
            if self.cache.free_pages >= missing:
                break
            if slot not in kept:
                self.cache.release(slot)
        return admitted, others

    def _pages_of(self, request: _Request) -> int:
        return pages_for(len(request.context.student_ids) + self.block_length)

    def _new(self, request: _Request) -> NDArray[np.int32]:
        """Student tokens of a request that are not cached."""
        return request.context.student_ids[self.cache.length(request.slot) :]

    def _groups(self, requests: list[_Request]) -> Iterator[list[_Request]]:
        """Rows of one forward: all in the steady state; long new contexts go apart, and pad no short ones, and so do
        long contexts where a layer's keys and values, padded to the longest, would take too much memory."""
        page_bytes = self.forward.page_bytes // self.forward.config.n_layers
        sized = [(len(self._new(request)), self._pages_of(request), request) for request in requests]
        sized.sort(key=lambda row: (max(row[0] - _STEADY_TOKENS, 0).bit_length(), row[1], row[0], row[2].slot))
        group: list[_Request] = []
        least = most = longest = 0
        for new, pages, request in sized:
            rows, least, most, longest = len(group) + 1, min(least, new), max(most, new), max(longest, pages)
            full = rows * (most + self.block_length) > _FORWARD_TOKENS or rows * longest * page_bytes > _READ_BYTES
            if group and (full or most > 2 * least + _STEADY_TOKENS):
                yield group
                group = []
            if not group:
                least, most, longest = new, new, pages
            group.append(request)
        if group:
            yield group

    def _confidence(self, ids: list[int], chances: list[float], proposed: list[int]) -> list[float]:
        """A teacher token is as likely as the student tokens that it ends in, and that the one before it did not."""
        needed = self.bridge.rests_on(ids, proposed)
        together = np.cumprod([1.0, *chances])[needed]
        return (together / np.maximum([1.0, *together[:-1]], 1e-30)).tolist() if len(needed) else []

    def _forward(self, group: list[_Request]) -> tuple[list[list[int]], list[list[float]]]:
        """`block_length` student ids for each row of `group`, and their probabilities."""
        new = [self._new(request) for request in group]
        return self.forward(self.cache, [request.slot for request in group], new, self.block_length)


def _pages(forward: DraftForward, memory_bytes: int | None) -> int:
    """Pages of the cache within the budget, as many on every rank of the group."""
    if memory_bytes is None:
        if forward.device.type == "cuda":
            free = torch.cuda.mem_get_info(forward.device)[0]
        else:
            free = psutil.virtual_memory().available  # with the cache of files, which the system gives back
        longest = pages_for(forward.max_tokens) * forward.page_bytes
        memory_bytes = max(min(_DEFAULT_CONTEXTS * longest, int(_DEFAULT_SHARE * free)), longest)
    pages = memory_bytes // forward.page_bytes
    if forward.group is not None:
        fewest = torch.tensor(pages, device=forward.device)
        torch.distributed.all_reduce(fewest, torch.distributed.ReduceOp.MIN, group=forward.group)
        pages = int(fewest)
    if pages < 1:
        raise ConfigError(
            f"{memory_bytes / 2**20:.2f} MiB of memory for the drafter's cache hold no page, which takes "
            f"{forward.page_bytes / 2**20:.2f} MiB: give more"
        )
    return pages
