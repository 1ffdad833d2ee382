"""Check vLLM's rejection sampler when the drafter is loaded, and replace what is wrong in it.

vLLM verifies drafts in `vllm.v1.sample.rejection_sampler`. In version 0.32 one thing is wrong there on every build:

- `RejectionSampler.forward` samples the token behind a draft as if the draft were not there. With `min_tokens`, a
  response that reaches its least length within the draft may not end right behind it, as it may without a drafter.

Its kernels are Triton's; a build for CPUs puts functions of its own in their place (`vllm/utils/cpu_triton_utils.py`),
and two more things are wrong there:

- `expand_batch_to_tokens` repeats each request's temperature, top-k or top-p for its drafted tokens. The CPU's version
  writes into a copy of every buffer that is not int64. The buffer itself keeps what the memory held before, and tokens
  are sampled from another distribution than the target's.
- `apply_top_k_top_p` raises "max(): Expected reduction dim" for a batch with `top_k` and without a drafted token, which
  every batch of new prompts is. That ends the engine.

Each of the three is called with known inputs and, where its answer is wrong, replaced by a version in plain torch that
has to pass the same check. Then the sampler as a whole verifies 12,288 drafts whose outcomes have known probabilities.
This takes 0.1 s, draws no number of the engine's random generators, and changes nothing where vLLM is right, as its
Triton kernels are. vLLM calls the sampler outside of compiled code and CUDA graphs, so that a replacement always takes
effect.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def refusal(device: torch.device) -> str | None:
    """Check and repair the rejection sampler of this process.

    Args:
        device: where vLLM samples.

    Returns:
        null if sampled tokens follow the target, otherwise what is wrong: no draft may be proposed then.
    """
    from vllm.v1.sample import rejection_sampler

    found = None
    for name, (is_right, replacement) in _FUNCTIONS.items():
        owner, attribute = place_of(name)
        original = getattr(owner, attribute)
        if _holds(is_right, original, device):
            continue
        replaced = replacement(original)
        if _holds(is_right, replaced, device):
            setattr(owner, attribute, replaced)
            logger.warning("vLLM's %s is wrong on this %s build; replaced it in this process", name, device.type)
        else:
            found = found or f"vLLM's {name} is wrong on this {device.type} build, and so is its replacement"
    if found is None and not _holds(_follows_the_target, rejection_sampler, device):
        found = f"vLLM's rejection sampler does not follow the target's distribution on this {device.type} build"
    return found


def place_of(name: str) -> tuple[Any, str]:
    """The module or class that has one of `_FUNCTIONS`, and its name there."""
    from vllm.v1.sample import rejection_sampler

    owner, _, attribute = name.rpartition(".")
    return (getattr(rejection_sampler, owner) if owner else rejection_sampler), attribute


def _holds(is_right: Callable[[Any, torch.device], bool], subject: Any, device: torch.device) -> bool:
    """A check that raises, whatever it raises, is one that failed: what it calls is not ours."""
    try:
        return is_right(subject, device)
    except Exception:
        logger.debug("%s raised", is_right.__name__, exc_info=True)
        return False


# --- expand_batch_to_tokens -------------------------------------------------------------------------------------


def _expand(_original: Any) -> Callable[..., Tensor]:
    def expand_batch_to_tokens(
        x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> Tensor:
        """x: [requests] of any dtype; cu_num_tokens: [requests], cumulative. Returns [num_tokens] of x's dtype."""
        counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
        return x.masked_fill(x == replace_from, replace_to).repeat_interleave(counts, output_size=num_tokens)

    return expand_batch_to_tokens


def _expands(expand: Callable[..., Tensor], device: torch.device) -> bool:
    for dtype in (torch.float32, torch.int32, torch.int64):
        for counts in ([2, 2], [1], [0, 3, 0, 1], [0, 0], [3] * 40):
            values = [(0.5 if dtype.is_floating_point else 1) * (i % 3) for i in range(len(counts))]
            x = torch.tensor(values, dtype=dtype, device=device)
            cumulative = torch.tensor(counts, device=device).cumsum(0, dtype=torch.int32)
            for replace_to in (0, 1):
                found = expand(x, cumulative, sum(counts), replace_from=0, replace_to=replace_to)
                wanted = [
                    value or replace_to for value, count in zip(values, counts, strict=True) for _ in range(count)
                ]
                if found.dtype != dtype or found.tolist() != wanted:
                    return False
    return True


# --- apply_top_k_top_p ------------------------------------------------------------------------------------------


def _constrain(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def apply_top_k_top_p(logits: Tensor, k: Tensor | None, p: Tensor | None) -> Tensor:
        """logits: [drafted tokens, vocabulary]; k, p: [drafted tokens]."""
        return original(logits, k, p) if len(logits) else logits

    return apply_top_k_top_p


def _constrains(apply_top_k_top_p: Callable[..., Tensor], device: torch.device) -> bool:
    """Only without rows: with rows it is the function that vLLM also samples with where nothing is drafted."""
    logits = torch.empty(0, 8, device=device)
    k, p = torch.empty(0, dtype=torch.int32, device=device), torch.empty(0, device=device)
    return all(apply_top_k_top_p(logits, *given).shape == (0, 8) for given in ((k, None), (None, p), (k, p)))


# --- RejectionSampler.forward ------------------------------------------------------------------------------------


def _count_drafts(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, metadata: Any, draft_probs: Any, logits: Tensor, sampling_metadata: Any) -> Any:
        """Arguments of vLLM's. Within it, `min_tokens` counts a draft when the token behind it is sampled."""
        from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor

        processors: list[Any] = [
            processor
            for processor in sampling_metadata.logitsprocs.non_argmax_invariant
            if isinstance(processor, MinTokensLogitsProcessor)
        ]
        for processor in processors:
            processor.apply = _after_drafts(processor, metadata.num_draft_tokens)
        try:
            return original(self, metadata, draft_probs, logits, sampling_metadata)
        finally:
            for processor in processors:
                del processor.apply

    return forward


def _after_drafts(processor: Any, drafted: list[int]) -> Callable[[Tensor], Tensor]:
    def apply(logits: Tensor) -> Tensor:
        """logits: [requests, vocabulary], of the tokens behind the drafts."""
        entries = processor.min_toks.items()
        reached = [row for row, (least, said, *_) in entries if len(said) + drafted[row] >= least]
        kept = logits[reached]  # a copy
        logits = type(processor).apply(processor, logits)
        logits[reached] = kept
        return logits

    return apply


class _Sampled(Exception):
    """Ends the check where vLLM samples the tokens behind the drafts, which is all that it looks at."""


@dataclass
class _Metadata:
    logitsprocs: Any
    max_num_logprobs: int = -1


def _lets_end(forward: Callable[..., Any], device: torch.device) -> bool:
    """Two requests with drafts of two tokens and `min_tokens` of 5; token 0 ends both. One has said three tokens before
    and may end behind its draft, the other has said two and may not."""
    from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor

    processor: Any = MinTokensLogitsProcessor(None, device, False)  # type: ignore[arg-type,unused-ignore]
    processor.min_toks = {0: (5, [1, 1, 1], {0}, False), 1: (5, [1, 1], {0}, False)}
    zeros = torch.zeros(2, dtype=torch.int32, device=device)
    processor.logits_slice = (torch.arange(2, dtype=torch.int32, device=device), zeros)
    found: list[Tensor] = []

    def sample(logits: Tensor, **_: Any) -> Any:
        found.append(processor.apply(logits.clone()))
        raise _Sampled

    rows = torch.arange(6, device=device)
    drafts = SimpleNamespace(
        max_spec_len=2, num_draft_tokens=[2, 2], bonus_logits_indices=rows[2::3], target_logits_indices=rows[:2]
    )
    sampler = SimpleNamespace(sampler=sample, is_processed_logprobs_mode=False)
    metadata = _Metadata(SimpleNamespace(non_argmax_invariant=[processor]))
    with suppress(_Sampled):
        forward(sampler, drafts, None, torch.zeros(6, 4, device=device), metadata)
    return found[0][:, 0].isinf().tolist() == [False, True] and "apply" not in vars(processor)


_FUNCTIONS: dict[str, tuple[Callable[[Any, torch.device], bool], Callable[[Any], Any]]] = {
    "expand_batch_to_tokens": (_expands, _expand),
    "apply_top_k_top_p": (_constrains, _constrain),
    "RejectionSampler.forward": (_lets_end, _count_drafts),
}


# --- the whole sampler ------------------------------------------------------------------------------------------

_REQUESTS = 2048  # of each kind
_LOGITS_3xV = [[2.0, 1.0, 0.0, 1.5, -1.0, 0.5], [0.0, 0.5, 2.0, -1.0, 1.0, 0.0], [1.0, 2.0, 0.0, 0.5, 0.0, -1.0]]
_BONUS = 5
_KINDS: list[tuple[float, list[int]]] = [
    (0.0, [0, 2, 1]),
    (1.0, [0, 2]),
    (0.3, [3, 2, 0]),
    (0.0, [3]),
    (1.0, []),
    (0.7, [4]),
]
"""(temperature, drafted tokens) of the requests in the batch, in turn."""


def _follows_the_target(rejection_sampler: Any, device: torch.device) -> bool:
    """Each kind's outcomes against their exact probabilities.

    The number of an outcome may be six standard deviations off, which chance does in one of 10^8 cases; the seed is
    fixed, so that the answer is the same at every start.
    """
    requests = _KINDS * _REQUESTS
    drafts = [draft for _, draft in requests]
    counts = [len(draft) for draft in drafts]
    flat = torch.tensor([token for draft in drafts for token in draft], dtype=torch.int32, device=device)
    depths = torch.tensor([depth for draft in drafts for depth in range(len(draft))], device=device)
    cumulative = torch.tensor(counts, device=device).cumsum(0, dtype=torch.int32)
    bonus = torch.full((len(requests), 1), _BONUS, dtype=torch.int32, device=device)
    sampling = SimpleNamespace(
        all_greedy=False,
        all_random=False,
        temperature=torch.tensor([temperature for temperature, _ in requests], device=device),
        generators={},
        top_k=None,
        top_p=None,
    )
    logits = torch.tensor(_LOGITS_3xV, device=device)[depths]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        logits = rejection_sampler.apply_sampling_constraints(logits, cumulative, sampling)
        outputs = rejection_sampler.rejection_sample(
            flat, counts, max(counts), cumulative, None, logits, bonus, sampling
        )
    for kind, (temperature, draft) in enumerate(_KINDS):
        found = [tuple(token for token in row if token >= 0) for row in outputs[kind :: len(_KINDS)].tolist()]
        expected = _outcomes(temperature, draft)
        if not set(found) <= set(expected):
            return False
        for outcome, probability in expected.items():
            spread = 6 * (_REQUESTS * probability * (1 - probability)) ** 0.5
            if abs(found.count(outcome) - _REQUESTS * probability) > spread:
                return False
    return True


def _outcomes(temperature: float, draft: list[int]) -> dict[tuple[int, ...], float]:
    """Every output that verification may give, and its probability."""
    outcomes, reached = {}, 1.0
    for depth, token in enumerate(draft):
        logits = torch.tensor(_LOGITS_3xV[depth], dtype=torch.float64)
        target = (logits / temperature).softmax(0) if temperature else (logits == logits.max()).double()
        for other, probability in enumerate(target.tolist()):
            if other != token and probability:
                outcomes[(*draft[:depth], other)] = reached * probability
        reached *= float(target[token])
    return outcomes | ({(*draft, _BONUS): reached} if reached else {})
