"""Event targets against enumeration of every text that a toy teacher can write."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.config import PrepareConfig
from shared.dataset.records import Distributions
from shared.tokenizer.vocabulary import Encoder, Vocabulary
from student.alignment.align import Aligner
from student.alignment.kernels.compute import TargetKernels
from student.alignment.spans import lay_spans
from student.alignment.tables import PairTables
from tests.fixtures.toy_teacher import ToyTeacher
from tests.fixtures.toy_tokenizers import (
    assert_same_targets,
    random_merges,
    random_teacher,
    toy_tokenizer,
)
from tests.student.alignment.reference import ReferenceAlignment

EXACT = 1e-9


@dataclass(frozen=True)
class Outcome:
    """One text that has the observed teacher tokens before y_j, and goes on over u inside token j if y_j does.

    `student_token` is the one at u; None if the student's tokens before u are not the observed ones.
    """

    sequence: tuple[int, ...]
    student_token: int | None
    probability: float


class Enumeration:
    """Every text of a toy teacher, and what it says about one observed response."""

    def __init__(self, teacher: ToyTeacher, encoder: Encoder, student: tuple[Vocabulary, Encoder]) -> None:
        self.teacher, self.student = teacher, student
        self.aligner = Aligner(PairTables(teacher.vocabulary, *student, encoder), PrepareConfig(min_known_mass=0.0))

    def alignment(self, sequence: tuple[int, ...]) -> ReferenceAlignment:
        record = self.teacher.record(sequence)
        assert record.distributions is not None
        spans = lay_spans(self.aligner.tables, record.response_ids)
        return ReferenceAlignment(self.aligner.tables, spans, record.distributions, min_known_mass=0.0)

    def outcomes(self, alignment: ReferenceAlignment, i: int) -> list[Outcome]:
        """All texts that agree with what is known of the teacher's tokens at student position i."""
        spans, vocabulary = alignment.spans, self.student[0]
        j, u = int(spans.teacher_index[i]), int(spans.starts[i])
        before = tuple(spans.teacher_ids[:j].tolist())
        inside = fixed_bytes(alignment, i) > 0
        base = alignment.base[j] if inside else i
        found = []
        for sequence, probability in self.teacher.texts.items():
            text = self.teacher.vocabulary.decode(sequence)
            if sequence[:j] != before or text[:u] != alignment.text[:u]:
                continue
            if inside and len(self.teacher.vocabulary.decode(sequence[: j + 1])) <= u:
                continue
            tokens = [*self.student[1].encode(text[spans.starts[base] :]).tolist(), vocabulary.roles["end_of_turn"]]
            agrees = tokens[: i - base] == spans.ids[base:i].tolist()
            found.append(Outcome(sequence, tokens[i - base] if agrees else None, probability))
        return found


def fixed_bytes(alignment: ReferenceAlignment, i: int) -> int:
    spans = alignment.spans
    return int(spans.starts[i] - spans.teacher_starts[spans.teacher_index[i]])


def check_position(world: Enumeration, alignment: ReferenceAlignment, i: int, tally: Counter[str]) -> None:
    """Disjoint events, total mass 1, and masses that are probabilities.

    Events are made from teacher tokens and claimed for student tokens. The two sides are the same set of texts,
    and every mass is exact, unless some text has its teacher token in one event and its student token in another,
    or is on one side only. Those texts' probability bounds the error.
    """
    spans = alignment.spans
    observed, anchor = alignment.observed_logprobs(i)
    events, tail, known = alignment.events(i, anchor)
    assert known == pytest.approx(1, abs=EXACT)
    assert sum(mass for mass, _ in events) + tail == pytest.approx(1, abs=EXACT)
    members = [s for _, event in events for s in event]
    assert len(members) == len(set(members)), "events overlap"
    assert int(spans.ids[i]) in members
    assert observed <= EXACT
    assert anchor <= EXACT

    j, fixed = int(spans.teacher_index[i]), fixed_bytes(alignment, i)
    place = {s: n for n, (_, event) in enumerate(events) for s in event}
    teacher_side, student_side, different = 0.0, 0.0, 0.0
    by_event = Counter[int]()
    for outcome in world.outcomes(alignment, i):
        survives = not fixed or alignment.reaches_over(j, outcome.sequence[j], i)
        teacher_side += outcome.probability * survives
        seen = None
        if outcome.student_token is not None:
            student_side += outcome.probability
            seen = place.get(outcome.student_token, -1)
            by_event[seen] += outcome.probability
        claimed = event_of_text(alignment, i, outcome.sequence, place) if survives else None
        different += outcome.probability * (seen != claimed)
    bound = 2 * different / min(teacher_side, student_side)
    for n, (mass, _) in enumerate(events):
        assert abs(mass - by_event[n] / student_side) <= bound + EXACT
    tally["positions"] += 1
    tally["exact"] += different == 0
    tally["inside exact"] += fixed > 0 and different == 0
    tally["longer exact"] += is_longer(alignment, i) and different == 0


def is_longer(alignment: ReferenceAlignment, i: int) -> bool:
    """x_i reaches past y_j."""
    spans = alignment.spans
    return bool(not spans.is_special[i] and spans.ends[i] > spans.teacher_ends[spans.teacher_index[i]])


def event_of_text(alignment: ReferenceAlignment, i: int, sequence: tuple[int, ...], place: dict[int, int]) -> int:
    """The event that a text's teacher tokens put it in."""
    spans = alignment.spans
    x, j = int(spans.ids[i]), int(spans.teacher_index[i])
    related = alignment.related(j, sequence[j], i, fixed_bytes(alignment, i))
    at = {place[s] for s in related}
    if not is_longer(alignment, i):
        joined = {place[x]} if sequence[j] == spans.teacher_ids[j] else set()
        assert len(at | joined) == 1, "a candidate's student tokens lie in several events"
        return (at | joined).pop()
    # x_i may have an event of its own, apart from the component that it was taken out of.
    component = {place[s] for s in alignment.related(j, int(spans.teacher_ids[j]), i, fixed_bytes(alignment, i))}
    component.add(place[x])
    if not at & component:
        assert len(at) == 1
        return at.pop()
    rest = component - {place[x]}
    return place[x] if not rest or follows_path(alignment, i, sequence) else rest.pop()


def follows_path(alignment: ReferenceAlignment, i: int, sequence: tuple[int, ...]) -> bool:
    """The text has x_i's bytes next, through the observed teacher tokens, or a last one that reaches over its end."""
    spans = alignment.spans
    for row in range(int(spans.teacher_index[i]), len(sequence)):
        if spans.teacher_starts[row] == spans.ends[i]:
            return True
        if alignment.tables.teacher.is_special[sequence[row]]:
            return False
        if sequence[row] != spans.teacher_ids[row] or spans.teacher_ends[row] > spans.ends[i]:
            return alignment.reaches(row, sequence[row], i + 1)
    return False


def world_of(seed: int, teacher_merges: int, student_merges: int) -> Enumeration:
    generator = random.Random(seed)
    vocabulary, encoder = toy_tokenizer(random_merges(generator, teacher_merges))
    student = toy_tokenizer(random_merges(generator, student_merges))
    return Enumeration(random_teacher(vocabulary, encoder, seed, longest=3), encoder, student)


def some_texts(world: Enumeration, seed: int, count: int) -> list[tuple[int, ...]]:
    """A few different responses, drawn from the teacher."""
    sequences, weights = list(world.teacher.texts), list(world.teacher.texts.values())
    return list(dict.fromkeys(random.Random(seed).choices(sequences, weights, k=count)))


def check_world(world: Enumeration, seed: int, tally: Counter[str]) -> None:
    for sequence in some_texts(world, seed, 3):
        alignment = world.alignment(sequence)
        for i in range(len(alignment.spans.ids)):
            check_position(world, alignment, i, tally)


def test_the_teacher_of_these_tests_is_a_distribution() -> None:
    assert sum(world_of(5, 4, 3).teacher.texts.values()) == pytest.approx(1, abs=1e-12)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), teacher_merges=st.integers(0, 6), student_merges=st.integers(0, 7))
def test_masses_are_the_enumerated_probabilities(seed: int, teacher_merges: int, student_merges: int) -> None:
    check_world(world_of(seed, teacher_merges, student_merges), seed, Counter())


@pytest.mark.slow
def test_hundreds_of_random_pairs_are_nearly_always_exact() -> None:
    tally = Counter[str]()
    for seed in range(200):
        check_world(world_of(seed, seed % 6, seed % 7), seed, tally)
    # Merges without any order between the vocabularies are the hardest case that there is.
    assert tally["exact"] > 0.9 * tally["positions"] > 1500
    assert tally["inside exact"] > 250
    assert tally["longer exact"] > 25


@pytest.mark.parametrize(("teacher_merges", "student_merges"), [(6, 0), (0, 0)])
def test_a_student_of_single_bytes_is_always_exact(teacher_merges: int, student_merges: int) -> None:
    tally = Counter[str]()
    for seed in range(15):
        check_world(world_of(seed, teacher_merges, student_merges), seed, tally)
    assert tally["exact"] == tally["positions"] > 50


def test_masses_of_a_teacher_of_single_bytes_are_exact_where_nothing_is_longer() -> None:
    tally = Counter[str]()
    for seed in range(15):
        world = world_of(seed, 0, 6)
        for sequence in some_texts(world, seed, 3):
            alignment = world.alignment(sequence)
            for i in range(len(alignment.spans.ids)):
                before = tally["exact"]
                check_position(world, alignment, i, tally)
                assert is_longer(alignment, i) or tally["exact"] == before + 1
    assert tally["exact"] > 50


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), teacher_merges=st.integers(0, 6), student_merges=st.integers(0, 7))
def test_observed_probabilities_are_a_chain(seed: int, teacher_merges: int, student_merges: int) -> None:
    """Summed over the response they are the teacher's log probability of it, whatever the tokenizations do."""
    world = world_of(seed, teacher_merges, student_merges)
    for sequence in some_texts(world, seed, 4):
        alignment = world.alignment(sequence)
        chain = sum(alignment.observed_logprobs(i)[0] for i in range(len(alignment.spans.ids)))
        assert chain == pytest.approx(math.log(world.teacher.texts[sequence]), abs=EXACT)


def test_observed_probability_of_a_prefix_is_the_enumerated_one() -> None:
    """With single bytes, exp of the chain up to a boundary is the probability that a text starts with those bytes,
    in teacher tokens that leave the observed ones only with the token that reaches the boundary."""
    for seed in range(10):
        world = world_of(seed, 5, 0)
        for sequence in some_texts(world, seed, 3):
            alignment = world.alignment(sequence)
            chain = 0.0
            for i in range(len(alignment.spans.ids) - 1):
                chain += alignment.observed_logprobs(i)[0]
                c = int(alignment.spans.ends[i])
                expected = sum(p for t, p in world.teacher.texts.items() if starts_alike(world, t, sequence, c))
                assert math.exp(chain) == pytest.approx(expected, abs=EXACT)


def starts_alike(world: Enumeration, text: tuple[int, ...], observed: tuple[int, ...], c: int) -> bool:
    """`text` has the first c bytes of `observed`, and its tokens up to the one that reaches c, but for that one."""
    decode = world.teacher.vocabulary.decode
    if decode(text)[:c] != decode(observed)[:c]:
        return False
    reaching = next(n for n in range(len(text)) if len(decode(text[: n + 1])) >= c)
    return text[:reaching] == observed[:reaching]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    teacher_merges=st.integers(0, 6),
    student_merges=st.integers(0, 7),
    k=st.integers(1, 12),
    min_known=st.sampled_from([0.0, 0.5, 0.9]),
)
def test_the_kernels_give_the_same_numbers(
    seed: int, teacher_merges: int, student_merges: int, k: int, min_known: float
) -> None:
    world = world_of(seed, teacher_merges, student_merges)
    kernels = TargetKernels(world.aligner.tables, min_known)
    for sequence in some_texts(world, seed, 4):
        distributions = truncated(world.teacher.record(sequence).distributions, k)
        spans = lay_spans(world.aligner.tables, np.array(sequence, np.int32))
        expected = ReferenceAlignment(world.aligner.tables, spans, distributions, min_known).compute()
        assert_same_targets(kernels.compute(spans, distributions), expected)


def test_forgotten_answers_are_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tables remember is bounded, and the bound changes no number."""
    roomy = world_of(1, 6, 6)
    monkeypatch.setattr("student.alignment.tables._REMEMBERED", 1)
    narrow = world_of(1, 6, 6)
    for sequence in some_texts(roomy, 1, 20):
        left, right = (world.aligner.align(world.teacher.record(sequence))[0] for world in (roomy, narrow))
        assert left is not None
        assert right is not None
        for name in ("event_mass", "members", "tail"):
            np.testing.assert_array_equal(getattr(left.targets, name), getattr(right.targets, name))
        np.testing.assert_array_equal(left.observed_logprob, right.observed_logprob)
    assert roomy.aligner.tables.tokenization_after.cache_info().currsize > 1
    assert narrow.aligner.tables.tokenization_after.cache_info().currsize == 1


def truncated(distributions: Distributions, k: int) -> Distributions:
    """The k most probable candidates of every row; the observed token may fall outside."""
    kept = [np.arange(a, min(b, a + k)) for a, b in pairwise(distributions.offsets)]
    places = np.concatenate(kept)
    logprobs = distributions.logprobs[places]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in kept])]).astype(np.int64)
    tail = np.array([1 - np.exp(distributions.logprobs[row]).sum() for row in kept])
    return Distributions(offsets, distributions.ids[places], logprobs, np.maximum(tail, 0), distributions.sampled)
