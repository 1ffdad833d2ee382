"""The forward for few rows against the plain one, in every way of computing it, and shared out over ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from shared.config.speculate import Way
from student.drafting import products
from student.drafting.denoising import Denoising
from student.drafting.forward import DraftForward
from student.model.attention import AnchoredLayout
from student.model.modeling_llada import LladaForMaskedDiffusion, PrefixCache
from student.model.sequential_head import add_sequential_head
from tests.fixtures.ranks import run_ranks
from tests.fixtures.tiny_model import MASK, tiny_config, tiny_model, with_sequential_head
from tests.student.drafting.parallel_worker import CASES, drafts

BLOCK = 4
DRAFTABLE = np.setdiff1d(np.arange(MASK), [3, 50])


def plain(model: LladaForMaskedDiffusion, cache: PrefixCache, slots: list[int], new: list[np.ndarray]) -> torch.Tensor:
    ids = torch.zeros(len(new), max(map(len, new)), dtype=torch.int64)
    for row, tokens in zip(ids, new, strict=True):
        row[: len(tokens)] = torch.from_numpy(tokens)
    with torch.no_grad():
        logits = model.logits(model.draft_hidden_states(cache, slots, ids, [len(t) for t in new], BLOCK))
    undraftable = torch.ones(logits.shape[-1], dtype=torch.bool)
    undraftable[torch.from_numpy(DRAFTABLE)] = False
    return logits.masked_fill(undraftable, -torch.inf)


@pytest.mark.parametrize("way", [*products.available_ways(torch.device("cpu")), None])
@pytest.mark.parametrize("tied", [False, True])
def test_drafts_are_those_of_the_plain_forward(way: Way | None, tied: bool) -> None:
    """Requests alone and together, of equal and unequal progress, cut back in between; in half precision a choice
    may differ where the plain logits are close."""
    model = tiny_model(init_std=0.3, weight_tying=tied)
    reference = tiny_model(init_std=0.3, weight_tying=tied)
    forward = DraftForward(model, DRAFTABLE, way, 256)
    cache, plain_cache = forward.cache(60), PrefixCache.allocate(reference.config, 4, 200, torch.float32, "cpu")
    rng = np.random.default_rng(0)
    tolerance = {"bfloat16": 0.5, "float16_weights": 0.02}.get(way or "", 1e-4)
    equal = total = 0
    for slots in ([7], [7], [2, 7, 9], [9, 2], [7], [2, 9, 7]):
        new = [rng.integers(4, 110, rng.integers(0, 20)).astype(np.int32) for _ in slots]
        drafted, chances = map(torch.tensor, forward(cache, slots, new, BLOCK))
        logits = plain(reference, plain_cache, slots, new)
        lost = logits.max(-1).values - logits.gather(-1, drafted[..., None])[..., 0]
        assert lost.max() <= tolerance
        own = logits.softmax(-1).gather(-1, drafted[..., None])[..., 0]
        assert (chances - own).abs().max() <= tolerance
        equal, total = equal + int((lost == 0).sum()), total + lost.numel()
        shorter = int(cache.length(slots[0]) * 0.7)
        cache.truncate(slots[0], shorter)
        plain_cache.truncate(slots[0], shorter)
    assert equal >= (total if tolerance < 1e-3 else 0.8 * total)


@pytest.mark.parametrize("way", [*products.available_ways(torch.device("cpu")), None])
def test_with_a_sequential_head_each_token_follows_the_one_before(way: Way | None) -> None:
    """Against the head's own module, fed with the tokens that were drafted."""
    model, reference = (with_sequential_head(tiny_model(init_std=0.3)) for _ in range(2))
    forward = DraftForward(model, DRAFTABLE, way, 256)
    cache, plain_cache = forward.cache(60), PrefixCache.allocate(reference.config, 4, 200, torch.float32, "cpu")
    rng = np.random.default_rng(0)
    tolerance = {"bfloat16": 1.0, "float16_weights": 0.05}.get(way or "", 1e-4)
    differs = 0
    for slots in ([7], [2, 7, 9], [9, 2]):
        new = [rng.integers(4, 110, rng.integers(3, 20)).astype(np.int32) for _ in slots]
        drafted, chances = map(torch.tensor, forward(cache, slots, new, BLOCK))
        ids = torch.zeros(len(new), max(map(len, new)), dtype=torch.int64)
        for row, tokens in zip(ids, new, strict=True):
            row[: len(tokens)] = torch.from_numpy(tokens)
        with torch.no_grad():
            hidden = reference.draft_hidden_states(plain_cache, slots, ids, [len(t) for t in new], BLOCK)
            embedded = reference.get_input_embeddings()(drafted[:, :-1])
            corrected = torch.cat((hidden[:, :1], reference.sequential_head(hidden[:, 1:], embedded)), dim=1)
            logits, uncorrected = (reference.logits(states)[..., DRAFTABLE] for states in (corrected, hidden))
        chosen = torch.from_numpy(np.searchsorted(DRAFTABLE, drafted.numpy()))
        assert (logits.max(-1).values - logits.gather(-1, chosen[..., None])[..., 0]).max() <= tolerance
        own = logits.softmax(-1).gather(-1, chosen[..., None])[..., 0]
        assert (chances - own).abs().max() <= tolerance
        differs += int((uncorrected.argmax(-1) != chosen).sum())
    assert differs > 3


@pytest.mark.parametrize("order", ["confidence", "left_to_right"])
@pytest.mark.parametrize("head", [False, True])
def test_more_denoising_steps_fix_tokens_and_choose_the_others_again(
    order: Literal["confidence", "left_to_right"], head: bool
) -> None:
    """Against the plain model over the whole context, block after block, with what was fixed in its place."""
    model = tiny_model(init_std=0.3)
    if head:
        with_sequential_head(model)
    forward = DraftForward(model, DRAFTABLE, "float32", 256, denoising=Denoising(3, order))
    cache, rng = forward.cache(60), np.random.default_rng(0)
    changed = 0
    for _ in range(4):
        cache.release(1)
        context = rng.integers(4, 110, 30)
        # A part is cached beforehand: further steps must not forget it.
        forward(cache, [1], [context[:11]], BLOCK)
        (drafted,), (chances,) = forward(cache, [1], [context[11:]], BLOCK)
        assert cache.length(1) == len(context)
        ids, sure = np.full(BLOCK, MASK), np.zeros(BLOCK)
        fixed = np.zeros(BLOCK, bool)
        for count in (1, 2, 4):
            again, probability = whole(model, context, np.where(fixed, ids, MASK), ids, fixed)
            changed += int(count > 1 and (again != ids)[~fixed].any())
            ids, sure = np.where(fixed, ids, again), np.where(fixed, sure, probability)
            places = np.arange(BLOCK) if order == "left_to_right" else np.argsort(-np.where(fixed, 2, sure))
            fixed[places[:count]] = True
        assert drafted == ids.tolist()
        np.testing.assert_allclose(chances, sure, atol=1e-4)
    assert changed, "a step that changes nothing tests nothing"


def whole(
    model: LladaForMaskedDiffusion, context: np.ndarray, block: np.ndarray, ids: np.ndarray, fixed: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The best token and its probability at every place of a partly masked block, without a cache."""
    positions = torch.arange(len(context) + BLOCK)[None]
    layout = AnchoredLayout(torch.zeros_like(positions), (positions >= len(context)).long(), positions)
    row = torch.from_numpy(np.append(context, block))[None]
    chosen, probabilities = [], []
    with torch.no_grad():
        hidden = model.hidden_states(row, layout=layout, position_ids=positions)[:, len(context) :]
        for depth in range(BLOCK):
            state = hidden[:, depth : depth + 1]
            if model.sequential_head is not None and depth:
                before = ids[depth - 1] if fixed[depth - 1] else chosen[-1]
                state = model.sequential_head(state, model.get_input_embeddings()(torch.tensor([[before]])))
            best = model.logits(state)[0, 0, DRAFTABLE].softmax(-1).max(-1)
            chosen.append(int(DRAFTABLE[int(best.indices)]))
            probabilities.append(float(best.values))
    return np.array(chosen), np.array(probabilities)


def test_fused_weights_are_the_models_own() -> None:
    """Nothing is held twice and the model computes as before; a model in training keeps its weights where they are."""
    model = tiny_model()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before, addresses = model(ids).logits, [p.data_ptr() for p in model.parameters()]
        DraftForward(model, DRAFTABLE, None, 256)
        assert [p.data_ptr() for p in model.parameters()] == addresses
        DraftForward(model, DRAFTABLE, "float32", 256)
        assert torch.equal(model(ids).logits, before)
    block = model.model.transformer["blocks"][0]
    assert block.k_proj.weight.untyped_storage().data_ptr() == block.q_proj.weight.untyped_storage().data_ptr()


def test_a_model_in_training_is_read_as_it_is_now() -> None:
    model = tiny_model(init_std=0.3)
    forward = DraftForward(model, DRAFTABLE, None, 256)
    new = [np.arange(5, 25)]
    first = forward(forward.cache(4), [0], new, BLOCK)
    with torch.no_grad():
        for block in model.model.transformer["blocks"]:
            block.ff_out.weight.mul_(-1)
    assert forward(forward.cache(4), [0], new, BLOCK) != first


def test_the_fastest_way_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    products.fastest_way.cache_clear()
    assert products.fastest_way(device) in products.available_ways(device)
    monkeypatch.setattr(products.time, "perf_counter", lambda: pytest.fail("measured again"))
    products.fastest_way(device)


def test_nothing_of_the_forward_is_left_off_the_device() -> None:
    """On the meta device every tensor of the forward must be there too: one from elsewhere raises."""
    with torch.device("meta"):
        model = LladaForMaskedDiffusion(tiny_config())
        add_sequential_head(model, 8)
    forward = DraftForward(model, DRAFTABLE, "bfloat16", 256)
    cache = forward.cache(20)
    with pytest.raises(NotImplementedError, match="meta"):  # only the result goes to the host, at the very end
        forward(cache, [0, 1], [np.arange(3), np.arange(9)], BLOCK)
    step = cache.begin([0, 1], [3, 9], BLOCK, 256)
    hidden = forward._run(torch.zeros(12 + 2 * BLOCK, dtype=torch.int64, device="meta"), step)
    assert forward._best(hidden[step.block_BG]).device.type == "meta"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_ranks_draft_what_one_does(tmp_path: Path) -> None:
    run_ranks("tests.student.drafting.parallel_worker", [str(tmp_path)], 2, tmp_path / "log", timeout_s=240)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for case in CASES:
        alone, held = drafts(case, None)
        for rank in ranks:
            for (ids, chances), (own_ids, own_chances) in zip(rank[case][0], alone, strict=True):
                assert ids == own_ids
                np.testing.assert_allclose(chances, own_chances, rtol=1e-4)
        # Norms are whole everywhere, attention where its heads do not divide.
        assert max(rank[case][1] for rank in ranks) < (0.53 if case != "whole" else 0.75) * held
