"""Exact events against enumeration of every text that a toy teacher can write (METHOD 2d), and on real vocabularies."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.config import EventsName, PrepareConfig
from shared.errors import VocabularyError
from student.alignment.align import Aligner
from student.alignment.exact import ExactEvents
from student.alignment.joint import JointSearch
from student.alignment.reference import PositionEvents, ReferenceAlignment
from student.alignment.spans import lay_spans
from tests.student.alignment.synthetic import TEXTS, RowMaker, llada_like, llama3
from tests.student.alignment.test_align import aligner, check_accounting, events_at
from tests.student.alignment.test_enumeration import EXACT, Enumeration, some_texts, truncated, world_of
from tests.student.alignment.toys import toy_aligner, toy_record, toy_tokenizer

seeds = st.integers(0, 2**32 - 1)


def check_position(world: Enumeration, alignment: ReferenceAlignment, i: int, found: PositionEvents) -> None:
    """Every mass, the tail's too, is the probability that the next student token of a text is in the event."""
    events, tail, _ = found
    place = {s: n for n, (_, members) in enumerate(events) for s in members}
    assert len(place) == sum(len(members) for _, members in events), "events overlap"
    assert int(alignment.spans.ids[i]) in place
    enumerated = Counter[int]()
    for outcome in world.outcomes(alignment, i):
        if outcome.student_token is not None:
            enumerated[place.get(outcome.student_token, -1)] += outcome.probability
    whole = enumerated.total()
    for n, (mass, _) in enumerate(events):
        assert mass == pytest.approx(enumerated[n] / whole, abs=EXACT)
    assert tail == pytest.approx(enumerated[-1] / whole, abs=EXACT)
    assert sum(mass for mass, _ in events) + tail == pytest.approx(1, abs=EXACT)


def check_world(world: Enumeration, seed: int, tally: Counter[str]) -> None:
    search = JointSearch(world.aligner.tables, width=1000)
    for sequence in some_texts(world, seed, 3):
        alignment = world.alignment(sequence)
        exact = ExactEvents(alignment, search)
        for i in range(len(alignment.spans.ids)):
            found = exact.events(i)
            tally["positions"] += 1
            if found[2] < 1 - EXACT:
                tally["unsettled"] += 1
                continue
            check_position(world, alignment, i, found)
            tally["events"] += len(found[0])
            tally["events if nothing follows"] += len(alignment.events(i, alignment.realized_logprobs(i)[1])[0])
        tally["unsettled positions"] += exact.counts["unsettled"]
        assert not exact.counts["disagreements"]


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=seeds, teacher_merges=st.integers(0, 6), student_merges=st.integers(0, 7))
def test_masses_are_the_enumerated_probabilities(
    seed: int, teacher_merges: int, student_merges: int, tmp_path: Path
) -> None:
    check_world(world_of(seed, teacher_merges, student_merges, tmp_path), seed, Counter())


@pytest.mark.slow
@settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=seeds, teacher_merges=st.integers(0, 6), student_merges=st.integers(0, 7))
def test_masses_of_hundreds_of_random_pairs(
    seed: int, teacher_merges: int, student_merges: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = tmp_path_factory.getbasetemp() / "toys"
    check_world(world_of(seed, teacher_merges, student_merges, cache), seed, Counter())


@pytest.mark.slow
def test_few_positions_are_unsettled_and_events_are_as_many(tmp_path: Path) -> None:
    """Being certain costs little: hardly a target, and no coarser events."""
    tally = Counter[str]()
    for seed in range(300):
        check_world(world_of(seed, seed % 6, seed % 7, tmp_path), seed, tally)
    assert tally["positions"] > 3000
    assert tally["unsettled"] == tally["unsettled positions"] < 0.02 * tally["positions"]
    assert tally["events"] > tally["events if nothing follows"]


@pytest.fixture
def pulled(tmp_path: Path) -> Aligner:
    """The teacher has `ab`; the student has `ab` and, preferring it, `bc`: a `c` that follows pulls its boundary."""
    teacher, student = toy_tokenizer([("a", "b")]), toy_tokenizer([("b", "c"), ("a", "b")])
    return toy_aligner(teacher, student, tmp_path)


def masses_at_start(toys: Aligner, events: EventsName, text: str) -> dict[frozenset[bytes], float]:
    """Events of the first position; the teacher says ab 0.6, a 0.3, b 0.1 there, and c 0.25 after ab."""
    teacher, student = toys.tables.teacher, toys.tables.student
    a, b, c, ab, end = *(teacher.ids[t] for t in (b"a", b"b", b"c", b"ab")), teacher.roles["end_of_turn"]
    first, last = ([ab, a, b], [0.6, 0.3, 0.1]), ([end], [1.0])
    if text == "abc":
        sequence, rows, realized = (ab, c, end), [first, ([end, c], [0.75, 0.25]), last], [0.6, 0.25, 1.0]
    else:
        sequence, rows, realized = (a, end), [first, last], [0.3, 1.0]
    record = toy_record(teacher, sequence, [r[0] for r in rows], [r[1] for r in rows], realized)
    settings = PrepareConfig(events=events)
    tables = toys.tables
    sample = Aligner(teacher, student, tables.student_encoder, settings, teacher_encoder=tables.teacher_encoder).align(
        record
    )
    assert sample is not None
    return {frozenset(student.tokens[s] for s in members): mass for mass, members in events_at(sample, 0)}


def test_what_follows_the_realised_token_splits_its_event(pulled: Aligner) -> None:
    """ab is spelt `a`, `bc` with a c after it, and `ab` otherwise; the next row says how often."""
    expected = {frozenset({b"ab"}): 0.6 * 0.75, frozenset({b"a"}): 0.3 + 0.6 * 0.25, frozenset({b"b", b"bc"}): 0.1}
    assert masses_at_start(pulled, "exact", "abc") == pytest.approx(expected, abs=1e-6)


def test_what_may_follow_another_candidate_joins_events(pulled: Aligner) -> None:
    """Nobody asked the teacher what follows ab: `a` and `ab` are apart if nothing does, and together for certain."""
    assert masses_at_start(pulled, "spelled", "a")[frozenset({b"a"})] == pytest.approx(0.3, abs=1e-6)
    expected = {frozenset({b"a", b"ab"}): 0.9, frozenset({b"b", b"bc"}): 0.1}
    assert masses_at_start(pulled, "exact", "a") == pytest.approx(expected, abs=1e-6)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=seeds, teacher_merges=st.integers(0, 6), student_merges=st.integers(0, 7), k=st.integers(1, 12))
def test_truncated_rows_lose_no_mass(
    seed: int, teacher_merges: int, student_merges: int, k: int, tmp_path: Path
) -> None:
    world = world_of(seed, teacher_merges, student_merges, tmp_path)
    search = JointSearch(world.aligner.tables, width=1000)
    for sequence in some_texts(world, seed, 3):
        spans = lay_spans(world.aligner.tables, np.array(sequence, np.int32))
        rows = truncated(world.teacher.record(sequence).distributions, k)
        exact = ExactEvents(ReferenceAlignment(world.aligner.tables, spans, rows, 0.0), search)
        for i, x in enumerate(spans.ids):
            events, tail, known = exact.events(i)
            assert 0 <= known <= 1 + EXACT
            if events:
                members = [s for _, members in events for s in members]
                assert len(members) == len(set(members))
                assert int(x) in members
                assert min(mass for mass, _ in events) >= 0
                assert sum(mass for mass, _ in events) + tail == pytest.approx(1, abs=EXACT)


@pytest.mark.slow
def test_real_vocabularies_are_accounted_for(tmp_path: Path) -> None:
    """No position of nineteen kinds of text contradicts the search, and equal vocabularies need none."""
    teacher, student = llama3(), llada_like(True)
    settings = PrepareConfig(events="exact", search_width=30)
    exact = aligner(teacher, student, tmp_path, settings=settings)
    maker = RowMaker(*teacher)
    for text in TEXTS.values():
        record = maker.record(text[:60], k=16)
        sample, counts = exact.align_counted(record)
        assert sample is not None
        check_accounting(sample, record)
        assert not counts["disagreements"]
    same = aligner(teacher, teacher, tmp_path, settings=settings)
    spelled = aligner(teacher, teacher, tmp_path)
    record = maker.record(TEXTS["mixed"])
    left, right = same.align(record), spelled.align(record)
    assert left is not None
    assert right is not None
    np.testing.assert_array_equal(left.targets.event_mass, right.targets.event_mass)


def test_without_the_teachers_tokenizer_there_is_nothing_to_search(tmp_path: Path) -> None:
    teacher, student = llama3(), llada_like(True)
    with pytest.raises(VocabularyError, match=r"prepare.events is exact.*import it again with --tokenizer"):
        Aligner(teacher[0], student[0], student[1], PrepareConfig(events="exact"), cache=tmp_path)
