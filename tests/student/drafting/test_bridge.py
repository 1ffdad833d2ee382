"""The byte bridge: both directions keep the bytes, in steps as at once; what bytes could still change is withheld."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.errors import VocabularyError
from student.drafting.bridge import BridgedContext, ByteBridge
from tests.student.drafting.conftest import CORPUS, Side

fuzzed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# Where tokenizations are touchy: contractions, spaces and line ends, digits, marks, emoji, scripts without spaces.
FRAGMENTS = [
    *CORPUS, "I'll", "'", "'l", "l", "don't", " ", "  ", "\n", " \n", "\n\n", "\t", "5", "1234567", " 42", ".", "...",
    ", ", "e\u0301", "\u0301", "\u212b", "각", "\u1100\u1161", "日本", "。", "，", "🇨🇭", "\U0001f469\u200d\U0001f467",
    "हिन्दी", "русский", "<|eot_id|>", "foo(bar)", "a=b", "CamelCase", "ß", "\u200b", "\u00a0", "²", "x", " x", "http://a.b/c?d=e",
]  # fmt: skip
texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=6), max_size=14).map("".join)


def split_at(ids: list[int], cuts: list[int]) -> list[list[int]]:
    edges = sorted({0, len(ids), *[cut % (len(ids) + 1) for cut in cuts]})
    return [ids[a:b] for a, b in pairwise(edges)]


@fuzzed
@given(question=texts, answer=texts, cuts=st.lists(st.integers(0, 10**6), max_size=30))
def test_steps_equal_the_whole(
    bridge: ByteBridge, teacher_side: Side, question: str, answer: str, cuts: list[int]
) -> None:
    ids = teacher_side.conversation(question, answer)
    whole = bridge.extend(BridgedContext(), ids)
    stepped = BridgedContext()
    for part in split_at(ids, cuts):
        before, stable = stepped.student_ids.tolist(), stepped.stable
        bridge.extend(stepped, part)
        after = stepped.student_ids.tolist()
        assert stable <= stepped.unchanged
        assert after[: stepped.unchanged] == before[: stepped.unchanged]
        assert after[: stepped.unchanged + 1] != before[: stepped.unchanged + 1] or after == before
    assert stepped.student_ids.tolist() == whole.student_ids.tolist()
    assert stepped.open_bytes == whole.open_bytes
    np.testing.assert_array_equal(stepped.teacher_ids, ids)


@fuzzed
@given(question=texts, answer=st.lists(texts | st.binary(max_size=3), max_size=3))
def test_context_keeps_bytes_and_roles(
    bridge: ByteBridge, teacher_side: Side, student_side: Side, question: str, answer: list[str | bytes]
) -> None:
    raw = b"".join(part.encode() if isinstance(part, str) else part for part in answer)
    ids = teacher_side.conversation(question, raw)
    student_ids = bridge.extend(BridgedContext(), ids).student_ids.tolist()
    assert student_side.vocabulary.decode(student_ids) == teacher_side.vocabulary.decode(ids)
    # Each text between two special tokens is the student's own encoding of it, and the specials' roles are the same.
    expected: list[int] = []
    text = b""
    for index in ids:
        text += teacher_side.vocabulary.tokens[index]
        if teacher_side.vocabulary.is_special[index]:
            role = teacher_side.vocabulary.role_of[index]
            expected += [*student_side.encoder.encode(text).tolist(), student_side.vocabulary.roles[role]]
            text = b""
    assert student_ids == [*expected, *student_side.encoder.encode(text).tolist()]


@fuzzed
@given(before=texts, after=texts, cut=st.integers(0, 40))
def test_a_draft_of_the_truth_becomes_the_teachers_own_tokens(
    bridge: ByteBridge, teacher_side: Side, student_side: Side, before: str, after: str, cut: int
) -> None:
    """Whatever is drafted correctly is proposed as the tokens that the teacher's tokenization gives the whole text."""
    whole = teacher_side.encoder.encode(before + after).tolist()
    start = min(cut, len(whole))
    head = teacher_side.vocabulary.decode(whole[:start])
    rest = teacher_side.vocabulary.decode(whole[start:])
    context = bridge.extend(BridgedContext(), [*teacher_side.conversation("Hello", b""), *whole[:start]])
    assert head.endswith(context.open_bytes) or context.open_bytes.endswith(head)
    end = student_side.vocabulary.roles["end_of_turn"]
    draft = [*student_side.encoder.encode(rest).tolist(), end]
    # The draft says where the text ends, so nothing is withheld.
    assert bridge.to_teacher(context, draft) == [*whole[start:], teacher_side.vocabulary.roles["end_of_turn"]]


@fuzzed
@given(answer=texts, depth=st.integers(1, 12), cut=st.integers(0, 40))
def test_proposed_bytes_start_the_drafted_bytes(
    bridge: ByteBridge, teacher_side: Side, student_side: Side, answer: str, depth: int, cut: int
) -> None:
    draft = student_side.encoder.encode(answer).tolist()[:depth]
    context = bridge.extend(BridgedContext(), teacher_side.conversation("Hello", answer.encode()[:cut]))
    proposed = bridge.to_teacher(context, draft)
    drafted = student_side.vocabulary.decode(draft)
    assert drafted.startswith(teacher_side.vocabulary.decode(proposed))
    kept = bridge.to_teacher(context, draft, keep_extendable=True)
    assert kept[: len(proposed)] == proposed
    assert len(kept) - len(proposed) <= 1


@fuzzed
@given(answer=texts, depth=st.integers(1, 12), ended=st.booleans())
def test_a_proposed_token_rests_on_the_drafted_tokens_that_hold_its_bytes(
    bridge: ByteBridge, teacher_side: Side, student_side: Side, answer: str, depth: int, ended: bool
) -> None:
    draft = student_side.encoder.encode(answer).tolist()[:depth]
    draft += [student_side.vocabulary.roles["end_of_turn"]] * ended
    proposed = bridge.to_teacher(
        bridge.extend(BridgedContext(), teacher_side.conversation("Hello", "Well")), draft, True
    )
    needed = bridge.rests_on(draft, proposed)
    specials = teacher_side.vocabulary.is_special
    for number, count in enumerate(needed.tolist()):
        if specials[proposed[number]]:
            assert count == len(draft)
            continue
        text = teacher_side.vocabulary.decode(proposed[: number + 1])
        assert student_side.vocabulary.decode(draft[:count]).startswith(text)
        assert not student_side.vocabulary.decode(draft[: count - 1]).startswith(text)


def test_a_last_token_that_could_grow_is_withheld(llama3: Side, student_side: Side) -> None:
    bridge = ByteBridge(llama3.vocabulary, llama3.encoder, student_side.vocabulary, student_side.encoder)
    context = bridge.extend(BridgedContext(), llama3.conversation("Count.", "One, two"))
    draft = student_side.encoder.encode(", three fo").tolist()
    texts = [llama3.vocabulary.tokens[index] for index in bridge.to_teacher(context, draft)]
    assert texts == [b",", b" three"]  # " fo" may become " four"
    kept = bridge.to_teacher(context, draft, keep_extendable=True)
    assert [llama3.vocabulary.tokens[index] for index in kept] == [b",", b" three", b" fo"]


def test_digits_group_in_context(llama3: Side, student_side: Side) -> None:
    """The teacher groups digits by three; the context's own grouping decides where the draft's tokens fall."""
    bridge = ByteBridge(llama3.vocabulary, llama3.encoder, student_side.vocabulary, student_side.encoder)
    end = student_side.vocabulary.roles["end_of_turn"]
    context = bridge.extend(BridgedContext(), llama3.conversation("Count.", "It is 123"))
    draft = [*student_side.encoder.encode("45678").tolist(), end]
    proposed = bridge.to_teacher(context, draft)[:-1]
    assert [llama3.vocabulary.tokens[index] for index in proposed] == [b"456", b"78"]
    # The teacher stopped after one digit, against its own habit: what follows starts a token there all the same.
    odd = [*llama3.conversation("Count.", "It is "), *llama3.encoder.encode("1").tolist()]
    proposed = bridge.to_teacher(bridge.extend(BridgedContext(), odd), draft)[:-1]
    assert b"".join(llama3.vocabulary.tokens[index] for index in proposed) == b"45678"


def test_part_of_a_character_is_not_proposed(bridge: ByteBridge, teacher_side: Side, student_side: Side) -> None:
    face = "😀".encode()
    context = bridge.extend(BridgedContext(), teacher_side.conversation("Smile.", "Hi"))
    single = {token[0]: i for i, token in enumerate(student_side.vocabulary.tokens) if len(token) == 1}
    draft = [single[byte] for byte in b"! " + face[:3]]
    proposed = bridge.to_teacher(context, draft, keep_extendable=True)
    assert teacher_side.vocabulary.decode(proposed) == b"! "
    # A turn cannot end inside a character: the end is not proposed either.
    with_end = [*draft, student_side.vocabulary.roles["end_of_turn"]]
    assert bridge.to_teacher(context, with_end) == proposed
    # After a context that ends inside a character, the draft's first bytes finish it.
    inside = bridge.extend(BridgedContext(), teacher_side.conversation("Smile.", b"Hi! " + face[:2]))
    finished = bridge.to_teacher(
        inside, [*[single[byte] for byte in face[2:]], student_side.vocabulary.roles["end_of_turn"]]
    )
    assert teacher_side.vocabulary.decode(finished) == face[2:]


def test_ends_go_over_by_role_and_other_specials_stop_the_draft(
    bridge: ByteBridge, teacher_side: Side, student_side: Side
) -> None:
    roles = student_side.vocabulary.roles
    context = bridge.extend(BridgedContext(), teacher_side.conversation("Say yes.", "Yes"))
    dot = student_side.encoder.encode(".").tolist()
    for role in ("end_of_turn", "end_of_text"):
        assert bridge.to_teacher(context, [*dot, roles[role], *dot])[-1] == teacher_side.vocabulary.roles[role]
    for role in ("mask", "start_header"):
        assert teacher_side.vocabulary.decode(bridge.to_teacher(context, [*dot, roles[role], *dot])) in (b"", b".")
    special = {int(index) for index in bridge.draftable_ids if student_side.vocabulary.is_special[index]}
    assert special == {roles["end_of_turn"], roles["end_of_text"]}


def test_work_per_step_does_not_grow_with_the_context(bridge: ByteBridge, teacher_side: Side) -> None:
    """In ordinary prose the open text stays a few words, however long the context is."""
    ids = teacher_side.conversation("Tell me.", " ".join(CORPUS[0] for _ in range(50)))
    context = bridge.extend(BridgedContext(), [])
    longest = 0
    for index in ids:
        bridge.extend(context, [index])
        longest = max(longest, len(context.open_bytes))
    assert longest < 40
    assert len(context.student_ids) - context.stable < 20


def test_boundaries_are_found_in_the_vocabulary(small_teacher: Side, student_side: Side) -> None:
    """A vocabulary with a token across a letter and a comma makes the comma no boundary; the space stays one."""
    crossing = replace(small_teacher.vocabulary, tokens=[*small_teacher.vocabulary.tokens[:-1], b"d, "])
    bridge = ByteBridge(crossing, small_teacher.encoder, student_side.vocabulary, student_side.encoder)
    context = bridge.extend(BridgedContext(), small_teacher.encoder.encode("and,then, he went"))
    assert re.fullmatch(rb" went", context.open_bytes)
    context = bridge.extend(BridgedContext(), small_teacher.encoder.encode("and,then"))
    assert context.open_bytes == b"and,then"


def test_foreign_ids_are_refused(bridge: ByteBridge, teacher_side: Side) -> None:
    with pytest.raises(VocabularyError, match=str(len(teacher_side.vocabulary))):
        bridge.extend(BridgedContext(), [len(teacher_side.vocabulary)])


def test_vocabularies_must_share_an_end(small_teacher: Side, student_side: Side) -> None:
    endless = replace(small_teacher.vocabulary, roles={"bos": 0})
    with pytest.raises(VocabularyError, match="ends a turn"):
        ByteBridge(endless, small_teacher.encoder, student_side.vocabulary, student_side.encoder)


def test_equal_tokenizers_hand_ids_over(small_teacher: Side) -> None:
    """Nothing is re-encoded, not even what the tokenizer would have split otherwise, and nothing is withheld."""
    bridge = ByteBridge(
        small_teacher.vocabulary, small_teacher.encoder, small_teacher.vocabulary, small_teacher.encoder
    )
    odd = [
        *small_teacher.conversation("Count.", ""),
        *[small_teacher.vocabulary.ids[bytes([byte])] for byte in b"hello"],
    ]
    context = bridge.extend(bridge.extend(BridgedContext(), odd[:9]), odd[9:])
    assert context.student_ids.tolist() == odd
    assert context.stable == len(odd)
    end, header = (small_teacher.vocabulary.roles[role] for role in ("end_of_turn", "start_header"))
    text = small_teacher.encoder.encode(" the").tolist()
    assert bridge.to_teacher(context, text) == text
    assert bridge.to_teacher(context, [*text, end, *text]) == [*text, end]
    assert bridge.to_teacher(context, [*text, header, *text]) == text


def test_contexts_are_what_training_saw(small_teacher: Side, student_side: Side) -> None:
    """The same ids as the prepared data's prompts, specials included."""
    from student.alignment.spans import retokenize
    from student.alignment.tables import PairTables

    teacher, student = (
        (small_teacher.vocabulary, small_teacher.encoder),
        (student_side.vocabulary, student_side.encoder),
    )
    tables = PairTables(teacher[0], *student, teacher[1])
    bridge = ByteBridge(*teacher, *student)
    ids = small_teacher.conversation(CORPUS[3], CORPUS[1])
    assert bridge.extend(BridgedContext(), ids).student_ids.tolist() == retokenize(tables, np.array(ids)).tolist()
