"""Sampling through vLLM with drafts: what comes out follows the target, as it does without a drafter.

One process holds two engines on a teacher whose every probability is known (`markov_teacher`): without a drafter and
with our proposer. Requests of all kinds share each batch. Seeds are fixed and the engines run in one thread, so a run
repeats itself; the level of each test is still ALPHA, which leaves the 24 tests together a false alarm in 1 of 400
choices of the seed.

A G-test (log-likelihood ratio) compares counts with the exact probabilities. Its power is that of the noncentral
chi-squared distribution with λ = 2 N KL(alternative ‖ target), and is asserted.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from student.drafting.vllm_proposer import OPTIONS_KEY
from tests.fixtures.markov_teacher import STATES, save_teacher, target_VxV

ALPHA = 1e-4
REQUESTS = 1000  # of each kind
FEW = 300  # of each kind, where the fault is shown
LENGTH = 5
KINDS: dict[str, dict[str, float]] = {
    "T=1": {"temperature": 1},
    "T=0.3": {"temperature": 0.3},
    "top_k=5": {"temperature": 1, "top_k": 5},
    "top_p=0.8": {"temperature": 0.7, "top_p": 0.8},
    "greedy": {"temperature": 0},
}
SAMPLED = [kind for kind in KINDS if kind != "greedy"]
ARMS = ("without", "drafter")
FIRST = 1  # the prompt is followed by token 1; the first token that a draft was verified for is after it


def _engine(teacher: str, **speculation: Any) -> Any:
    from vllm import LLM

    return LLM(
        teacher,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=64,
        max_num_seqs=128,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=False,
        gpu_memory_utilization=0.3,  # two engines in one process
        seed=0,
        additional_config={OPTIONS_KEY: {"student": "none", "policy": False, "lookup": False}},
        **speculation,
    )


def _samples(llm: Any, kinds: list[str], requests: int = REQUESTS) -> dict[str, NDArray[np.int64]]:
    """kind → [requests, LENGTH], all kinds in one batch; every other request has a seed of its own."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    words = np.random.default_rng(0).integers(1, STATES, 30).tolist()
    prompt = TokensPrompt(prompt_token_ids=[*words, 0])  # the teacher sees the last token only
    parameters = [
        SamplingParams(
            max_tokens=LENGTH, ignore_eos=True, detokenize=False, seed=number if number % 2 else None, **KINDS[kind]
        )
        for number in range(requests)
        for kind in kinds
    ]
    outputs = llm.generate([prompt] * len(parameters), parameters, use_tqdm=False)
    tokens = np.array([output.outputs[0].token_ids for output in outputs])
    return {kind: tokens[index :: len(kinds)] for index, kind in enumerate(kinds)}


def _ended(llm: Any) -> list[list[int]]:
    """Greedy responses that each end at another token, and not before so many."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    parameters = [
        SamplingParams(temperature=0, max_tokens=12, min_tokens=least, stop_token_ids=[end], detokenize=False)
        for end in range(1, STATES)
        for least in range(1, 9)
    ]
    prompt = TokensPrompt(prompt_token_ids=[0])
    return [
        list(output.outputs[0].token_ids)
        for output in llm.generate([prompt] * len(parameters), parameters, use_tqdm=False)
    ]


def _accepted(llm: Any) -> list[int]:
    """Drafts with at least d accepted tokens, d = 0 …"""
    values = {metric.name: metric for metric in llm.get_metrics()}
    return [
        values["vllm:spec_decode_num_drafts"].value,
        *values["vllm:spec_decode_num_accepted_tokens_per_pos"].values,
    ]


def _error(llm: Any, **parameters: Any) -> str:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    try:
        llm.generate(TokensPrompt(prompt_token_ids=[0]), SamplingParams(**parameters), use_tqdm=False)
    except Exception as error:
        return str(error)
    return ""


def _run(directory: str) -> dict[str, Any]:
    # In this process and thread, so that the batches are the same at every run.
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    import torch
    from vllm.platforms import current_platform

    from student.drafting import vllm_sampling

    device = torch.device(current_platform.device_type)

    def undo() -> None:
        for name, function in own.items():
            setattr(*vllm_sampling.place_of(name), function)

    def functions() -> dict[str, Any]:
        return {name: getattr(*vllm_sampling.place_of(name)) for name in vllm_sampling._FUNCTIONS}

    teacher = str(save_teacher(Path(directory)))
    every, survivable = list(KINDS), [kind for kind in KINDS if kind != "top_k=5"]
    llm = _engine(teacher)
    found: dict[str, Any] = {"device": device.type, "without": _samples(llm, every), "ended without": _ended(llm)}
    del llm
    own = functions()
    proposer = "tests.fixtures.markov_teacher.ChainProposer"
    speculation = {"method": "custom_class", "model": proposer, "num_speculative_tokens": 3}
    llm = _engine(teacher, speculative_config=speculation)
    found["replaced"] = [name for name, function in functions().items() if own[name] is not function]
    found["drafter"] = _samples(llm, every)
    found["accepted by drafter"] = _accepted(llm)
    found["min_p"] = _error(llm, min_p=0.1)
    found["logit_bias"] = _error(llm, logit_bias={2: 1.0})
    found["ended with drafter"] = _ended(llm)
    undo()
    found["ended unmended"] = _ended(llm)
    found["drafter unmended"] = _samples(llm, survivable, FEW)

    found["top_k unmended"] = _error(llm, top_k=5)
    state = torch.get_rng_state()
    found["refusal"] = vllm_sampling.refusal(device)
    found["random numbers as before"] = bool((torch.get_rng_state() == state).all())

    undo()
    # A replacement that is as wrong as what it replaces.
    vllm_sampling._FUNCTIONS["expand_batch_to_tokens"] = (vllm_sampling._expands, lambda original: original)
    found["refusal without a replacement"] = vllm_sampling.refusal(device)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_run, str(tmp_path_factory.mktemp("markov"))).result()


# --- statistics -------------------------------------------------------------------------------------------------


def pooled(counts_V: NDArray[Any], expected_V: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Tokens expected fewer than five times share a cell, and the smallest cell if that is not enough."""
    order = np.argsort(expected_V)
    counts, expected = counts_V[order], expected_V[order]
    few = max(int((expected < 5).sum()), 1)
    while few < len(expected) and expected[:few].sum() < 5:
        few += 1
    return tuple(np.concatenate([[values[:few].sum()], values[few:]]) for values in (counts, expected))  # type: ignore[return-value]


def first_counts(samples: NDArray[Any]) -> NDArray[Any]:
    """Tokens after the prompt and token 1: a fixed prefix, and the first place where drafts are verified."""
    assert (samples[:, 0] == FIRST).all()
    return np.bincount(samples[:, 1], minlength=len(target_VxV()))


def g_first(samples: NDArray[Any], kind: str) -> float:
    """p value of the first tokens; zero where one was sampled that has no probability."""
    target_V = target_VxV(**KINDS[kind])[FIRST]
    counts = first_counts(samples)
    if counts[target_V < 1e-12].any():
        return 0.0
    seen, expected = pooled(counts[target_V > 1e-12], len(samples) * target_V[target_V > 1e-12])
    return float(stats.power_divergence(seen, expected * seen.sum() / expected.sum(), lambda_="log-likelihood").pvalue)


def g_all(samples: NDArray[Any], kind: str) -> float:
    """p value of every token given the one before it; the statistics of the states add up."""
    target_VxV_ = target_VxV(**KINDS[kind])
    statistic, freedom = 0.0, 0
    for state in range(1, STATES):
        next_ = samples[:, 1:][samples[:, :-1] == state]
        target_V = target_VxV_[state]
        counts = np.bincount(next_, minlength=len(target_V))
        if counts[target_V < 1e-12].any():
            return 0.0
        if len(next_) < 20:
            continue
        possible = target_V > 1e-12
        seen, expected = pooled(counts[possible], len(next_) * target_V[possible])
        if len(seen) > 1:
            scaled = expected * seen.sum() / expected.sum()
            statistic += float(stats.power_divergence(seen, scaled, lambda_="log-likelihood").statistic)
            freedom += len(seen) - 1
    return float(stats.chi2.sf(statistic, freedom))


def power(target_V: NDArray[Any], alternative_V: NDArray[Any], number: int) -> float:
    """Chance that the G-test of `number` tokens rejects at ALPHA where they follow the alternative."""
    possible = target_V > 1e-12
    if alternative_V[~possible].sum() > 0.01:
        return 1.0  # one such token is enough
    expected, other = number * target_V[possible], number * alternative_V[possible]
    seen, wanted = pooled(other, expected)
    noncentrality = 2 * float(stats.entropy(seen, wanted)) * number
    freedom = len(seen) - 1
    return float(stats.ncx2.sf(stats.chi2.isf(ALPHA, freedom), freedom, noncentrality))


def logprob_scores(samples: NDArray[Any], kind: str) -> NDArray[Any]:
    """By position: the mean logprob of the sampled tokens, as a standard score against its exact expectation."""
    target = target_VxV(**KINDS[kind])
    log = np.log(np.maximum(target, 1e-30))
    marginal_V, scores = np.eye(len(target))[FIRST], []
    for mean in log[samples[:, :-1], samples[:, 1:]].mean(axis=0):
        expectation = marginal_V @ (target * log).sum(axis=1)
        variance = marginal_V @ (target * log**2).sum(axis=1) - expectation**2
        scores.append((mean - expectation) / np.sqrt(variance / len(samples)))
        marginal_V = marginal_V @ target
    return np.array(scores)


# --- tests ------------------------------------------------------------------------------------------------------

engine = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.usefixtures("warm_serving")]
each_arm = pytest.mark.parametrize("arm", ARMS)
each_kind = pytest.mark.parametrize("kind", SAMPLED)


class TestEngines:
    pytestmark = engine

    def test_the_drafts_were_partly_right(self, found: dict[str, Any]) -> None:
        drafts, *accepted = found["accepted by drafter"]
        assert drafts > accepted[0] > accepted[1] > accepted[2] > 10

    @each_arm
    @each_kind
    def test_first_tokens_after_a_fixed_prefix(self, found: dict[str, Any], arm: str, kind: str) -> None:
        assert g_first(found[arm][kind], kind) > ALPHA

    @each_arm
    @each_kind
    def test_every_token_given_the_one_before(self, found: dict[str, Any], arm: str, kind: str) -> None:
        assert g_all(found[arm][kind], kind) > ALPHA

    @each_arm
    @each_kind
    def test_mean_logprob_by_position(self, found: dict[str, Any], arm: str, kind: str) -> None:
        scores = logprob_scores(found[arm][kind], kind)
        assert np.abs(scores).max() < stats.norm.isf(ALPHA / 2 / len(scores))

    @each_arm
    def test_greedy_requests_between_sampled_ones(self, found: dict[str, Any], arm: str) -> None:
        token, expected = FIRST, []
        for _ in range(LENGTH):
            expected.append(token)
            token = int(target_VxV(temperature=0)[token].argmax())
        assert (found[arm]["greedy"] == expected).all()

    def test_a_response_ends_where_it_would_without_a_draft(self, found: dict[str, Any]) -> None:
        """With `min_tokens` that are reached before, inside and behind a draft."""
        assert found["ended with drafter"] == found["ended without"]
        assert len({len(response) for response in found["ended without"]}) > 4
        if "RejectionSampler.forward" in found["replaced"]:
            assert found["ended unmended"] != found["ended without"]

    def test_vllms_own_functions_fail_these_tests(self, found: dict[str, Any]) -> None:
        if not found["replaced"]:
            pytest.skip("this vLLM needs no replacement")
        if found["device"] != "cpu":
            assert found["replaced"] == ["RejectionSampler.forward"]  # which is no kernel
            return
        assert found["replaced"] == ["expand_batch_to_tokens", "apply_top_k_top_p", "RejectionSampler.forward"]
        assert "max(): Expected reduction dim" in found["top_k unmended"]
        for kind in ("T=1", "T=0.3", "top_p=0.8"):
            assert g_all(found["drafter unmended"][kind], kind) < ALPHA

    def test_the_check_says_what_it_found(self, found: dict[str, Any]) -> None:
        assert found["refusal"] is None
        assert found["random numbers as before"]
        if found["replaced"] and found["device"] == "cpu":
            assert found["refusal without a replacement"] == (
                "vLLM's expand_batch_to_tokens is wrong on this cpu build, and so is its replacement"
            )

    @pytest.mark.parametrize("parameter", ["min_p", "logit_bias"])
    def test_vllm_refuses_what_no_draft_is_verified_under(self, found: dict[str, Any], parameter: str) -> None:
        assert found[parameter] == (
            "The min_p and logit_bias sampling parameters are not yet supported with speculative decoding."
        )


@each_kind
def test_the_power_of_the_test_of_first_tokens(kind: str) -> None:
    """It finds a lost temperature, and a likeliest token that comes 0.125 too often at the cost of all others."""
    target_V = target_VxV(**KINDS[kind])[FIRST]
    likeliest = target_V.argmax()
    too_often_V = target_V * (1 - target_V[likeliest] - 0.125) / (1 - target_V[likeliest])
    too_often_V[likeliest] = target_V[likeliest] + 0.125
    assert power(target_V, too_often_V, REQUESTS) > 0.99
    if KINDS[kind]["temperature"] != 1:
        lost_V = target_VxV(**KINDS[kind] | {"temperature": 1})[FIRST]
        assert power(target_V, lost_V, REQUESTS) > 0.9999


def _run_on_triton() -> tuple[bool, str | None, list[str]]:
    """(Triton's kernels are in use, what the check says, functions that it replaced)."""
    os.environ["TRITON_INTERPRET"] = "1"
    import torch
    import triton.backends
    from triton.runtime import driver

    # What vLLM asks before it uses Triton, and what the interpreter asks of a device.
    triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))  # type: ignore[assignment]
    driver.set_active(SimpleNamespace(get_current_device=lambda: 0, get_device_interface=lambda: torch.cpu))  # type: ignore[arg-type]
    from vllm.triton_utils import HAS_TRITON

    from student.drafting import vllm_sampling

    vllm_sampling._REQUESTS = 32  # Triton's interpreter is slow
    own = {name: getattr(*vllm_sampling.place_of(name)) for name in vllm_sampling._FUNCTIONS}
    refusal = vllm_sampling.refusal(torch.device("cpu"))
    replaced = [name for name in own if getattr(*vllm_sampling.place_of(name)) is not own[name]]
    return HAS_TRITON, refusal, replaced


@pytest.mark.slow
@pytest.mark.vllm
def test_tritons_kernels_pass_untouched() -> None:
    """The kernels that run on a GPU, here in Triton's interpreter."""
    pytest.importorskip("triton")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        # What is wrong on every build is not a kernel.
        assert pool.submit(_run_on_triton).result() == (True, None, ["RejectionSampler.forward"])
