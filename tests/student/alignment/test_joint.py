"""The search through both tokenizations at once: chains of pairs, and what they allow to come next."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.vocabulary import Encoder, Vocabulary
from student.alignment.joint import START, Chain, JointSearch
from student.alignment.tables import PairTables, pair_tables
from tests.student.alignment.synthetic import TEXTS, corpus, llada_like, llama3, qwen, tekken
from tests.student.alignment.toys import LETTERS, random_merges, toy_tokenizer

Tokenizer = tuple[Vocabulary, Encoder]
merges = st.integers(0, 7)
seeds = st.integers(0, 2**32 - 1)
worlds = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def toys(seed: int, teacher_merges: int, student_merges: int, cache: Path) -> PairTables:
    generator = random.Random(seed)
    teacher, student = (toy_tokenizer(random_merges(generator, n)) for n in (teacher_merges, student_merges))
    return pair_tables(teacher[0], student[0], student[1], teacher[1], cache)


def chain(tokenizer: Tokenizer) -> Chain:
    order = sorted((token, index) for index, token in enumerate(tokenizer[0].tokens) if token)
    return Chain(*tokenizer, ([token for token, _ in order], [index for _, index in order]))


@worlds
@given(seed=seeds, count=merges)
def test_a_sequence_is_canonical_exactly_if_all_neighbours_are(seed: int, count: int) -> None:
    """What the search stands on, for byte-pair encodings with merges in any order."""
    vocabulary, encoder = tokenizer = toy_tokenizer(random_merges(random.Random(seed), count))
    pairs = chain(tokenizer)
    text_ids = range(len(vocabulary) - 1)
    follows = {(a, b) for a in text_ids for b in pairs.pairs(a, list(text_ids))}
    generator = random.Random(seed)
    for _ in range(300):
        sequence = generator.choices(text_ids, k=generator.randint(2, 6))
        is_canonical = encoder.encode(vocabulary.decode(sequence)).tolist() == sequence
        assert is_canonical == all(pair in follows for pair in pairwise(sequence))


@worlds
@given(seed=seeds, teacher_merges=merges, student_merges=merges)
def test_what_can_come_next_is_what_some_text_has(
    seed: int, teacher_merges: int, student_merges: int, tmp_path: Path
) -> None:
    """Every first pair that a text of up to eight letters has is found, and every one found is some text's."""
    tables = toys(seed, teacher_merges, student_merges, tmp_path)
    search = JointSearch(tables, width=1000)
    seen = defaultdict(set)
    assert tables.teacher_encoder is not None
    texts = ["".join(letters) for length in range(1, 9) for letters in product(LETTERS, repeat=length)]
    firsts = zip(
        tables.teacher_encoder.first_of_fragments([text.encode() for text in texts]).tolist(),
        tables.student_encoder.first_of_fragments([text.encode() for text in texts]).tolist(),
        strict=True,
    )
    for v, s in firsts:
        seen[v].add(s)
    for v in seen:
        assert set(search.next_tokens(tables.teacher.tokens[v], v, START)) == seen[v]


@worlds
@given(seed=seeds, teacher_merges=merges, student_merges=merges, width=st.integers(0, 6))
def test_a_narrow_search_relates_more_and_never_less(
    seed: int, teacher_merges: int, student_merges: int, width: int, tmp_path: Path
) -> None:
    """And its answers do not depend on what was asked before."""
    tables = toys(seed, teacher_merges, student_merges, tmp_path)
    wide, narrow = JointSearch(tables, width=1000), JointSearch(tables, width)
    order = list(range(len(tables.teacher) - 1))
    random.Random(seed).shuffle(order)
    for v in order:
        known = tables.teacher.tokens[v]
        answer = narrow.next_tokens(known, v, START)
        assert set(wide.next_tokens(known, v, START)) <= set(answer)
        assert JointSearch(tables, width).next_tokens(known, v, START) == answer


@worlds
@given(seed=seeds, count=merges)
def test_between_equal_tokenizers_every_token_has_itself_alone(seed: int, count: int, tmp_path: Path) -> None:
    tokenizer = toy_tokenizer(random_merges(random.Random(seed), count))
    tables = pair_tables(tokenizer[0], tokenizer[0], tokenizer[1], tokenizer[1], tmp_path)
    search = JointSearch(tables, width=1000)
    for v in range(len(tables.teacher) - 1):
        assert search.next_tokens(tables.teacher.tokens[v], v, START) == (v,)


@pytest.mark.parametrize(
    "make",
    [llada_like, *(pytest.param(make, marks=pytest.mark.slow, id=make.__name__) for make in (llama3, qwen, tekken))],
)
def test_neighbours_in_real_text_are_pairs(make: Callable[[], Tokenizer]) -> None:
    """Patterns that split text before merging look beyond a pair. In prose, code, and nineteen scripts the contexts
    that a chain tries are enough for all of them."""
    vocabulary, encoder = tokenizer = make()
    pairs = chain(tokenizer)
    following = defaultdict(set)
    for text in [*TEXTS.values(), *(text[:20_000] for text in corpus(20)[10:])]:
        ids = encoder.encode(text).tolist()
        for a, b in pairwise(ids):
            following[a].add(b)
    missed = [
        (vocabulary.tokens[a], vocabulary.tokens[b])
        for a, found in following.items()
        for b in found - set(pairs.pairs(a, sorted(found)))
    ]
    assert sum(map(len, following.values())) > 5000
    assert not missed
