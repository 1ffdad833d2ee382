"""Check vLLM's rejection sampler when the drafter is loaded, and replace what is wrong in it.

vLLM verifies drafts in `vllm.v1.sample.rejection_sampler`. Its kernels are Triton's; a build for CPUs puts functions of
its own in their place (`vllm/utils/cpu_triton_utils.py`), and in version 0.32 two things are wrong there:

- `expand_batch_to_tokens` repeats each request's temperature, top-k or top-p for its drafted tokens. The CPU's version
  writes into a copy of every buffer that is not int64. The buffer itself keeps what the memory held before, and tokens
  are sampled from another distribution than the target's.
- `apply_top_k_top_p` raises "max(): Expected reduction dim" for a batch with `top_k` and without a drafted token, which
  every batch of new prompts is. That ends the engine.

Each of the two is called with known inputs and, where its answer is wrong, replaced by a version in plain torch that
has to pass the same check. Then the sampler as a whole verifies 12,288 drafts whose outcomes have known probabilities.
This takes 0.1 s, draws no number of the engine's random generators, and changes nothing where vLLM is right, as its
Triton kernels are. vLLM calls the sampler outside of compiled code and CUDA graphs, so that a replacement always takes
effect.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
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
        original = getattr(rejection_sampler, name)
        if _holds(is_right, original, device):
            continue
        replaced = replacement(original)
        if _holds(is_right, replaced, device):
            setattr(rejection_sampler, name, replaced)
            logger.warning("vLLM's %s is wrong on this %s build; replaced it in this process", name, device.type)
        else:
            found = found or f"vLLM's {name} is wrong on this {device.type} build, and so is its replacement"
    if found is None and not _holds(_follows_the_target, rejection_sampler, device):
        found = f"vLLM's rejection sampler does not follow the target's distribution on this {device.type} build"
    return found


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


_FUNCTIONS: dict[str, tuple[Callable[[Any, torch.device], bool], Callable[[Any], Any]]] = {
    "expand_batch_to_tokens": (_expands, _expand),
    "apply_top_k_top_p": (_constrains, _constrain),
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
