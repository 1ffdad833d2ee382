import pytest
import torch
from torch import Tensor

from student.model.modeling_llada import LladaForMaskedDiffusion, PrefixCache
from student.model.prefix_cache import PAGE
from tests.fixtures.tiny_model import MASK, anchored_row, random_ids, tiny_model

BLOCK = 5


def uncached(model: LladaForMaskedDiffusion, prefix: Tensor, block_length: int = BLOCK) -> Tensor:
    """Logits of the masked block after `prefix`, by the forward without a cache."""
    ids, layout = anchored_row(prefix[None], [len(prefix)], block_length)
    with torch.no_grad():
        return model(ids, layout=layout).logits[0, len(prefix) :]


def drafted(model: LladaForMaskedDiffusion, cache: PrefixCache, slots: list[int], new: list[Tensor]) -> Tensor:
    """Logits BxGxV of one draft step that appends `new[b]` to `slots[b]`."""
    ids = torch.zeros(len(new), max(map(len, new)), dtype=torch.int64)
    for row, tokens in zip(ids, new, strict=True):
        row[: len(tokens)] = tokens
    with torch.no_grad():
        return model.logits(model.draft_hidden_states(cache, slots, ids, [len(t) for t in new], BLOCK))


def cache_of(model: LladaForMaskedDiffusion, slots: int = 4, capacity: int = 64) -> PrefixCache:
    return PrefixCache.allocate(model.config, slots, capacity, torch.float32, "cpu")


@pytest.mark.parametrize("tied", [False, True])
def test_drafting_with_the_cache_gives_the_logits_of_the_uncached_forward(tied: bool) -> None:
    """Four steps of three requests of unequal progress, in slots out of order, with rejected drafts in between."""
    model = tiny_model(weight_tying=tied, init_std=0.1)
    cache = cache_of(model)
    texts = [random_ids(1, 50, seed=seed)[0] for seed in range(3)]
    ends = [[7, 1, 3], [7, 9, 4], [8, 9, 20], [30, 25, 21]]
    slots, done = [3, 0, 2], [0, 0, 0]
    for step in ends:
        new = [text[start:end] for text, start, end in zip(texts, done, step, strict=True)]
        logits = drafted(model, cache, slots, new)
        done = step
        for row, text, end in zip(logits, texts, done, strict=True):
            assert (row - uncached(model, text[:end])).abs().max() <= 1e-5
    assert [cache.length(slot) for slot in range(4)] == [25, 0, 21, 30]


def test_truncated_tokens_are_forgotten() -> None:
    model = tiny_model(init_std=0.1)
    cache = cache_of(model)
    text, other = random_ids(1, 20)[0], random_ids(1, 20, seed=7)[0]
    drafted(model, cache, [1], [text])
    cache.truncate(1, 12)
    logits = drafted(model, cache, [1], [other[:3]])
    assert (logits[0] - uncached(model, torch.cat((text[:12], other[:3])))).abs().max() <= 1e-5
    cache.truncate(1, 0)
    assert cache.length(1) == 0


def test_a_freed_slot_serves_another_request_exactly() -> None:
    model = tiny_model(init_std=0.1)
    used, fresh = cache_of(model), cache_of(model)
    drafted(model, used, [0], [random_ids(1, 40)[0]])
    used.release(0)
    text = random_ids(1, 9, seed=4)[0]
    assert torch.equal(drafted(model, used, [0], [text]), drafted(model, fresh, [0], [text]))


def test_the_block_leaves_nothing_behind_and_can_be_denoised_in_steps() -> None:
    model = tiny_model(init_std=0.1)
    cache = cache_of(model)
    text = random_ids(1, 14)[0]
    first = drafted(model, cache, [0], [text])
    again = drafted(model, cache, [0], [text[:0]])
    assert (first - again).abs().max() <= 1e-5
    block = torch.full((1, BLOCK), MASK)
    block[0, 0] = 17
    with torch.no_grad():
        hidden = model.draft_hidden_states(cache, [0], text[None, :0], [0], BLOCK, block_ids_BxG=block)
    ids, layout = anchored_row(text[None], [14], BLOCK)
    ids[0, 14] = 17
    with torch.no_grad():
        expected = model(ids, layout=layout).logits[0, 14:]
    assert (model.logits(hidden)[0] - expected).abs().max() <= 1e-5


def test_a_block_of_zero_only_appends() -> None:
    model = tiny_model(init_std=0.1)
    cache = cache_of(model)
    text = random_ids(1, 14)
    assert model.draft_hidden_states(cache, [2], text, [14], 0).shape == (1, 0, 64)
    assert [cache.length(slot) for slot in range(4)] == [0, 0, 14, 0]
    assert (drafted(model, cache, [2], [text[0, :0]])[0] - uncached(model, text[0])).abs().max() <= 1e-5


def test_a_prefix_fits_up_to_the_last_place() -> None:
    model = tiny_model(init_std=0.1)
    text = random_ids(1, 60)[0]
    cache = cache_of(model, slots=1, capacity=2 * PAGE)
    last = 2 * PAGE - BLOCK
    assert (drafted(model, cache, [0], [text[:last]])[0] - uncached(model, text[:last])).abs().max() <= 1e-5
    with pytest.raises(ValueError, match="need 1 more pages of 16 tokens, and 0 of 2 are free"):
        drafted(model, cache, [0], [text[last : last + 1]])
    assert cache.length(0) == last
    cache.release(0)
    assert cache.free_pages == 2


def test_misuse_is_refused() -> None:
    model = tiny_model(max_sequence_length=30)
    cache = cache_of(model)
    text = random_ids(1, 26)[0]
    with pytest.raises(ValueError, match="max_sequence_length 30"):
        drafted(model, cache, [0], [text])
