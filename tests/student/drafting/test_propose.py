"""The drafter: one forward a call, the same proposals with the cache, without it and in any company."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from shared.config.speculate import DrafterConfig
from shared.errors import CheckpointError, ConfigError, VocabularyError
from shared.tokenizer.vocabulary import load_tokenizer
from student.drafting import propose
from student.drafting.bridge import BridgedContext, ByteBridge
from student.drafting.forward import DraftForward
from student.drafting.propose import Drafter
from student.model.configuration_llada import LladaConfig
from student.model.modeling_llada import LladaForMaskedDiffusion
from student.model.prefix_cache import PrefixCache, pages_for
from tests.student.drafting.conftest import CORPUS, Side, train_byte_level

BLOCK = 6


@pytest.fixture(scope="module")
def model(student_side: Side) -> LladaForMaskedDiffusion:
    """Random, but wide awake: large weights make every context matter for the argmax."""
    torch.manual_seed(3)
    roles = student_side.vocabulary.roles
    config = LladaConfig(
        d_model=64,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        mlp_hidden_size=128,
        vocab_size=len(student_side.vocabulary),
        embedding_size=len(student_side.vocabulary) + 24,
        max_sequence_length=512,
        bos_token_id=roles["bos"],
        eos_token_id=roles["end_of_text"],
        pad_token_id=roles["end_of_text"],
        mask_token_id=roles["mask"],
        init_std=0.3,
        draft_block_length=BLOCK,
    )
    return LladaForMaskedDiffusion(config).eval()


@pytest.fixture(scope="module")
def small_bridge(small_teacher: Side, student_side: Side) -> ByteBridge:
    return ByteBridge(small_teacher.vocabulary, small_teacher.encoder, student_side.vocabulary, student_side.encoder)


def forward_of(model: LladaForMaskedDiffusion, bridge: ByteBridge, max_tokens: int = 512) -> DraftForward:
    return DraftForward(model, bridge.draftable_ids, "float32", max_tokens)


@pytest.fixture(scope="module")
def forward(model: LladaForMaskedDiffusion, small_bridge: ByteBridge) -> DraftForward:
    return forward_of(model, small_bridge)


@pytest.fixture(scope="module")
def conversations(small_teacher: Side) -> dict[str, np.ndarray]:
    return {
        f"request-{number}": np.array(small_teacher.conversation(f"Tell me about {text[:12]}", text * 2))
        for number, text in enumerate(CORPUS)
    }


def prompt_length(ids: np.ndarray, side: Side) -> int:
    header = np.flatnonzero(ids == side.vocabulary.roles["end_header"])[-1]
    return int(header) + 2


def test_proposes_the_argmax_of_the_masked_block(
    model: LladaForMaskedDiffusion,
    forward: DraftForward,
    small_bridge: ByteBridge,
    conversations: dict[str, np.ndarray],
) -> None:
    """Against the plain forward of [context | masks] under the training layout."""
    from student.model.attention import AnchoredLayout

    drafter = Drafter(forward, small_bridge, 4, BLOCK, keep_extendable=True)
    for name, ids in conversations.items():
        context = small_bridge.extend(BridgedContext(), ids)
        clean = len(context.student_ids)
        row = torch.tensor([context.student_ids.tolist() + [model.config.mask_token_id] * BLOCK])
        positions = torch.arange(clean + BLOCK)[None]
        blocks = (positions >= clean).long()
        layout = AnchoredLayout(torch.zeros_like(positions), blocks, positions)
        with torch.inference_mode():
            logits = model(row, layout=layout, position_ids=positions).logits[0, clean:]
        allowed = torch.from_numpy(small_bridge.draftable_ids)
        drafted = allowed[logits[:, allowed].argmax(-1)].tolist()
        assert drafter.propose([name], [ids]) == [small_bridge.to_teacher(context, drafted, keep_extendable=True)[:4]]


@pytest.mark.parametrize("pages", [200, 20, 9])
def test_cached_and_uncached_proposals_are_the_same(
    forward: DraftForward,
    small_bridge: ByteBridge,
    small_teacher: Side,
    conversations: dict[str, np.ndarray],
    pages: int,
) -> None:
    """Requests that advance by one to five tokens, join late, leave, come back, step back and change places."""
    rng = np.random.default_rng(pages)
    cached = Drafter(forward, small_bridge, 4, BLOCK, memory_bytes=pages * forward.page_bytes, in_turns=True)
    uncached = Drafter(forward, small_bridge, 4, BLOCK)
    at = {name: prompt_length(ids, small_teacher) for name, ids in conversations.items()}
    proposed = 0
    for _ in range(16):
        names = [name for name in conversations if rng.random() < 0.7]
        rng.shuffle(names)
        for name in names:
            step = int(rng.integers(1, 6)) if rng.random() < 0.95 else -int(rng.integers(0, 20))
            at[name] = int(np.clip(at[name] + step, 1, len(conversations[name])))
        contexts = [conversations[name][: at[name]] for name in names]
        drafts = cached.propose(names, contexts)
        uncached.release(list(conversations))
        assert drafts == uncached.propose(names, contexts)
        proposed += sum(map(len, drafts))
        if rng.random() < 0.1:
            cached.release(names[:1])
    assert proposed > 40


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Clean tokens of each row of every forward."""
    forwards: list[list[int]] = []
    call = DraftForward.__call__

    def spy(self, cache, slots, new_ids, block):  # type: ignore[no-untyped-def]
        forwards.append([len(ids) for ids in new_ids])
        return call(self, cache, slots, new_ids, block)

    monkeypatch.setattr(DraftForward, "__call__", spy)
    return forwards


def test_steady_state_feeds_only_what_is_new(
    forward: DraftForward,
    small_bridge: ByteBridge,
    conversations: dict[str, np.ndarray],
    fed: list[list[int]],
) -> None:
    """One forward a call, of a few columns, however long the contexts are."""
    drafter = Drafter(forward, small_bridge, 4, BLOCK)
    names = list(conversations)[:2]
    drafter.propose(names, [conversations[name][:30] for name in names])
    first = len(fed)
    for position in range(31, 60):
        drafter.propose(names, [conversations[name][:position] for name in names])
    widths = [max(lengths) for lengths in fed]
    assert len(widths) - first == 29
    assert max(widths[first:]) < 20 - BLOCK < max(widths[:first])


def test_requests_whose_ids_move_are_found_by_their_contexts(
    forward: DraftForward,
    small_bridge: ByteBridge,
    small_teacher: Side,
    conversations: dict[str, np.ndarray],
    fed: list[list[int]],
) -> None:
    """Ids are rows of a batch that is shuffled at every call, requests pause: no more is fed than with lasting ids."""
    rng = np.random.default_rng(1)
    by_row, by_name = (Drafter(forward, small_bridge, 4, BLOCK) for _ in range(2))
    at = {name: prompt_length(ids, small_teacher) for name, ids in conversations.items()}
    tokens = {by_row: 0, by_name: 0}
    for _ in range(12):
        names = [name for name in conversations if rng.random() < 0.8]
        rng.shuffle(names)
        contexts = [conversations[name][: at[name]] for name in names]
        drafts = []
        for drafter, ids in ((by_row, range(len(names))), (by_name, names)):
            fed.clear()
            drafts.append(drafter.propose(ids, contexts))
            tokens[drafter] += sum(map(sum, fed))
        assert drafts[0] == drafts[1]
        for name in names:
            at[name] = min(at[name] + int(rng.integers(1, 6)), len(conversations[name]))
    assert tokens[by_row] == tokens[by_name] > 0


def test_equal_contexts_keep_their_ids(
    forward: DraftForward, small_bridge: ByteBridge, conversations: dict[str, np.ndarray], fed: list[list[int]]
) -> None:
    """Several samples of one prompt: each goes on from its own tokens, and where one leaves, the others are found."""
    drafter = Drafter(forward, small_bridge, 4, BLOCK)
    prompt, texts = conversations["request-0"][:20], list(conversations.values())
    first, second = (np.concatenate([prompt, text[-20:]]) for text in texts[1:3])
    drafter.propose([0, 1], [prompt, prompt])
    drafter.propose([0, 1], [first[:38], second[:38]])
    fed.clear()
    drafter.propose([0, 1], [first[:39], second[:39]])
    drafter.propose([0], [second])
    assert max(max(lengths) for lengths in fed) < 10


def test_the_company_changes_nothing(
    forward: DraftForward, small_bridge: ByteBridge, conversations: dict[str, np.ndarray]
) -> None:
    together = Drafter(forward, small_bridge, 4, BLOCK).propose(list(conversations), list(conversations.values()))
    alone = [Drafter(forward, small_bridge, 4, BLOCK).propose([n], [ids])[0] for n, ids in conversations.items()]
    assert together == alone
    assert all(len(draft) <= 4 for draft in together)


def test_long_contexts_go_apart_where_they_would_pad_many_short_ones(
    forward: DraftForward,
    small_bridge: ByteBridge,
    conversations: dict[str, np.ndarray],
    fed: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All are in the steady state; a layer may copy as many pages as four short contexts and one long one have."""
    texts = list(conversations.values())
    contexts = [texts[0][:60], *(text[:20] for text in texts[1:5])]
    drafter = Drafter(forward, small_bridge, 4, BLOCK)
    drafter.propose(range(5), [context[:-2] for context in contexts])
    fed.clear()
    together = drafter.propose(range(5), contexts)
    assert [len(rows) for rows in fed] == [5]
    pages = sorted(map(drafter._pages_of, drafter._requests.values()))
    assert pages[-1] > pages[-2]
    monkeypatch.setattr(propose, "_READ_BYTES", sum(pages) * forward.page_bytes // forward.config.n_layers)
    drafter = Drafter(forward, small_bridge, 4, BLOCK)
    drafter.propose(range(5), [context[:-2] for context in contexts])
    fed.clear()
    assert drafter.propose(range(5), contexts) == together
    assert [len(rows) for rows in fed] == [4, 1]


def test_a_context_longer_than_the_model_gets_no_draft(
    model: LladaForMaskedDiffusion, small_bridge: ByteBridge, conversations: dict[str, np.ndarray]
) -> None:
    def drafter_of(max_tokens: int) -> Drafter:
        return Drafter(forward_of(model, small_bridge, max_tokens), small_bridge, 4, BLOCK, keep_extendable=True)

    drafts = drafter_of(512).propose(list(conversations), list(conversations.values()))
    ids, draft = next((i, d) for i, d in zip(conversations.values(), drafts, strict=True) if d)
    room = len(small_bridge.extend(BridgedContext(), ids).student_ids) + BLOCK
    assert drafter_of(room - 1).propose([0], [ids]) == [[]]
    assert drafter_of(room).propose([0], [ids]) == [draft]
    # One such request does not keep the others from being drafted for, and it may shrink and go on.
    drafter = drafter_of(room - 1)
    shorter = ids[:-6]
    fresh = drafter_of(512).propose([0], [shorter])
    assert drafter.propose([1, 0], [shorter, ids]) == [fresh[0], []]
    assert drafter.passed_over == {0: "too long"}
    assert drafter.propose([0], [shorter]) == fresh


@pytest.mark.parametrize("pages", [1, 7, 12, 30])
def test_a_tight_budget_gives_the_same_drafts_or_none(
    forward: DraftForward,
    small_bridge: ByteBridge,
    small_teacher: Side,
    conversations: dict[str, np.ndarray],
    pages: int,
) -> None:
    """Requests come, advance, pause, step back and end; the pool stays as it was made and no page is lost."""
    rng = np.random.default_rng(pages)
    tight = Drafter(forward, small_bridge, 4, BLOCK, memory_bytes=pages * forward.page_bytes + 1)
    unbounded = Drafter(forward, small_bridge, 4, BLOCK)
    storage = [layer.data_ptr() for layer in tight.cache.layers]
    at = {name: prompt_length(ids, small_teacher) for name, ids in conversations.items()}
    asked, passed_over = 0, 0
    for _ in range(25):
        names = [name for name in conversations if rng.random() < 0.6]
        rng.shuffle(names)
        for name in names:
            step = int(rng.integers(1, 6)) if rng.random() < 0.9 else -int(rng.integers(0, 20))
            at[name] = int(np.clip(at[name] + step, 1, len(conversations[name])))
        contexts = [conversations[name][: at[name]] for name in names]
        drafts = tight.propose(names, contexts)
        unbounded.release(list(conversations))
        expected = unbounded.propose(names, contexts)
        assert all(draft in ([], full) for draft, full in zip(drafts, expected, strict=True))
        without = {name for name, draft, full in zip(names, drafts, expected, strict=True) if draft != full}
        assert without <= tight.passed_over.keys() <= set(names), "every request that was passed over is named"
        assert set(tight.passed_over.values()) <= {"no room"}
        asked, passed_over = asked + len(names), passed_over + len(tight.passed_over)
        if rng.random() < 0.2:
            tight.release(names[:1])
        held = sum(tight.cache.held_pages(slot) for slot in tight._requests)
        assert held + tight.cache.free_pages == tight.cache.pages == pages
    assert [layer.data_ptr() for layer in tight.cache.layers] == storage
    assert 0 < passed_over <= asked
    assert pages < 5 or passed_over < asked


def test_the_oldest_requests_keep_their_room(
    forward: DraftForward, small_bridge: ByteBridge, conversations: dict[str, np.ndarray], fed: list[list[int]]
) -> None:
    """Three at a time in a pool for two: the newcomer is passed over, call after call, and nobody starts anew."""
    ids = conversations["request-1"]
    pages = pages_for(len(small_bridge.extend(BridgedContext(), ids).student_ids) + BLOCK)
    drafter = Drafter(forward, small_bridge, 4, BLOCK, memory_bytes=2 * pages * forward.page_bytes)
    expected = Drafter(forward, small_bridge, 4, BLOCK).propose([0], [ids])[0]
    for length in range(len(ids) - 8, len(ids)):
        drafter.propose(["a", "b"], [ids[:length]] * 2)
    fed.clear()
    assert drafter.propose(["c", "b", "a"], [ids] * 3) == [[], expected, expected]
    assert max(map(max, fed)) < 10
    assert drafter.passed_over == {"c": "no room"}
    # Where one of them is not asked for, its room goes to the newcomer.
    assert drafter.propose(["c", "b"], [ids] * 2) == [expected] * 2


def test_a_budget_below_one_page_is_refused(forward: DraftForward, small_bridge: ByteBridge) -> None:
    with pytest.raises(ConfigError, match=r"hold no page, which takes 0\.01 MiB"):
        Drafter(forward, small_bridge, 4, BLOCK, memory_bytes=forward.page_bytes - 1)


def test_the_default_cache_takes_a_share_of_the_memory_that_the_system_would_give(
    forward: DraftForward, small_bridge: ByteBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is less than room for 16 of the longest contexts, and more than for one."""
    bytes_of_one = pages_for(forward.max_tokens) * forward.page_bytes
    monkeypatch.setattr(propose.psutil, "virtual_memory", lambda: SimpleNamespace(available=35 * bytes_of_one))
    drafter = Drafter(forward, small_bridge, 4, BLOCK)
    assert drafter.cache.pages == int(3.5 * bytes_of_one) // forward.page_bytes


def test_requests_that_are_no_longer_served_are_forgotten(
    forward: DraftForward,
    small_bridge: ByteBridge,
    conversations: dict[str, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(propose, "_MOST_IDLE", 16)
    drafter = Drafter(forward, small_bridge, 4, BLOCK)
    ids = conversations["request-1"]
    for wave in range(8):
        drafter.propose([f"{wave}-{number}" for number in range(5)], [ids[wave : wave + 20]] * 5)
    assert len(drafter._requests) == 5 + 16


def test_the_request_not_seen_for_longest_is_forgotten(
    forward: DraftForward, small_bridge: ByteBridge, conversations: dict[str, np.ndarray], fed: list[list[int]]
) -> None:
    a, b, c = (ids[:40] for ids in list(conversations.values())[:3])
    pages = max(pages_for(len(small_bridge.extend(BridgedContext(), ids).student_ids) + BLOCK) for ids in (a, b, c))
    drafter = Drafter(forward, small_bridge, 4, BLOCK, memory_bytes=2 * pages * forward.page_bytes)
    drafter.propose([0, 1], [a, b])
    drafter.propose([1, 0], [b, c])
    fed.clear()
    drafter.propose([0], [b])
    assert max(max(lengths) for lengths in fed) == 0, "b was seen after a"
    drafter.propose([1], [a])
    assert max(max(lengths) for lengths in fed) > 20, "a had to leave for c"
    drafter.release([0, 1])
    drafter.propose([0], [b])
    assert max(fed[-1]) > 20, "b was released"


def test_another_teachers_tokens_are_refused_and_change_nothing(
    forward: DraftForward, small_bridge: ByteBridge, conversations: dict[str, np.ndarray]
) -> None:
    drafter = Drafter(forward, small_bridge, 4, BLOCK)
    ids = conversations["request-2"]
    expected = drafter.propose(["a", "b"], [ids[:40], ids[:40]])
    with pytest.raises(VocabularyError, match="outside the teacher's vocabulary"):
        drafter.propose(["a", "b"], [ids[:45], np.append(ids[:40], 10**6)])
    assert drafter.propose(["a", "b"], [ids[:40], ids[:40]]) == expected


def test_from_student_checks_what_it_is_given(
    model: LladaForMaskedDiffusion, small_teacher: Side, tmp_path: Path
) -> None:
    from student.model.tokenizer import train_tokenizer

    train_tokenizer(CORPUS, 400).save_pretrained(tmp_path / "student")
    teacher, options = small_teacher.vocabulary, DrafterConfig(dtype="float32")
    drafter = Drafter.from_student(model, tmp_path / "student", teacher, small_teacher.directory, 4, options)
    assert drafter.block_length == BLOCK
    other = train_byte_level(tmp_path / "other", 600)
    with pytest.raises(VocabularyError, match=teacher.fingerprint[:12]):
        Drafter.from_student(model, tmp_path / "student", teacher, other, 4, options)
    untrained = LladaForMaskedDiffusion(LladaConfig(**{**model.config.to_dict(), "draft_block_length": None}))
    with pytest.raises(CheckpointError, match="draft_block_length"):
        Drafter.from_student(untrained, tmp_path / "student", teacher, small_teacher.directory, 4, options)
    large = train_byte_level(tmp_path / "large", 900)
    large_side = ByteBridge(teacher, small_teacher.encoder, *load_tokenizer(large))
    with pytest.raises(CheckpointError, match="rows"):
        forward_of(model, large_side)


class OracleForward:
    """A student that knows the answers, and sees only what it is fed: its slots hold the tokens instead of keys."""

    group, device, page_bytes, max_tokens = None, torch.device("cpu"), 1, 512

    def __init__(self, config: LladaConfig, side: Side, answers: dict[bytes, bytes]) -> None:
        self.config, self.side, self.answers = config, side, answers
        self.held: dict[int, list[int]] = {}

    def cache(self, pages: int) -> PrefixCache:
        return PrefixCache(self.config, pages, torch.float32, "cpu")

    def __call__(self, cache, slots, new_ids, block):  # type: ignore[no-untyped-def]
        drafts = []
        end = self.side.vocabulary.roles["end_of_turn"]
        for slot, new in zip(slots, new_ids, strict=True):
            kept = self.held.get(slot, [])[: cache.length(slot)]
            ids = self.held[slot] = kept + new.tolist()
            header = len(ids) - ids[::-1].index(self.side.vocabulary.roles["end_header"])
            said = self.side.vocabulary.decode(ids[header:])
            answer = self.answers[self.side.vocabulary.decode(ids[:header])]
            assert answer.startswith(said), "the slot holds another request's tokens"
            rest = [*self.side.encoder.encode(answer[len(said) :]).tolist(), end]
            drafts.append((rest + [end] * block)[:block])
        cache.commit(cache.begin(slots, [len(new) for new in new_ids], block, self.max_tokens))
        return drafts, [[1.0] * block for _ in drafts]


def test_a_student_that_is_right_is_accepted(
    model: LladaForMaskedDiffusion,
    small_bridge: ByteBridge,
    small_teacher: Side,
    student_side: Side,
    conversations: dict[str, np.ndarray],
) -> None:
    """Along stored answers, as the evaluation walks them: what it proposes is what the teacher said next."""
    end = small_teacher.vocabulary.roles["end_of_turn"]
    stored = {name: np.append(ids, end) for name, ids in conversations.items()}
    answers = {}
    for ids in conversations.values():
        header = prompt_length(ids, small_teacher) - 1
        answers[small_teacher.vocabulary.decode(ids[:header])] = small_teacher.vocabulary.decode(ids[header:])
    oracle = OracleForward(model.config, student_side, answers)
    drafter = Drafter(oracle, small_bridge, 4, 12, memory_bytes=30, in_turns=True)  # type: ignore[arg-type]
    at = {name: prompt_length(ids, small_teacher) for name, ids in conversations.items()}
    drafts = proposed = accepted = 0
    while active := [name for name in stored if at[name] < len(stored[name])]:
        made = drafter.propose(active, [stored[n][: at[n]] for n in active])
        assert drafter.confidence == {name: [1.0] * len(draft) for name, draft in zip(active, made, strict=True)}
        for name, draft in zip(active, made, strict=True):
            truth = stored[name][at[name] : at[name] + len(draft)].tolist()
            matches = next((i for i, (a, b) in enumerate(zip(draft, truth, strict=False)) if a != b), len(truth))
            drafts, proposed, accepted = drafts + 1, proposed + len(draft), accepted + matches
            at[name] += matches + 1
    # A word that the block cuts in two may be split otherwise once it is whole, in more than its last token.
    assert accepted >= 0.97 * proposed
    assert accepted / drafts > 3.5
