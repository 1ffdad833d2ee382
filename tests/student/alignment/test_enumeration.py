"""Event targets against enumeration of every text that a toy teacher can write (METHOD 2d)."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from shared.vocabulary import Encoder, Vocabulary
from student.alignment.reference import ReferenceAlignment
from student.alignment.spans import lay_spans
from tests.student.alignment.toys import ToyTeacher, random_merges, toy_aligner, toy_tokenizer

EXACT = 1e-9


@dataclass(frozen=True)
class Outcome:
    """One text that has the realised teacher tokens before y_j, and goes on over u inside token j if y_j does.

    `student_token` is the one at u; None if the student's tokens before u are not the realised ones.
    """

    sequence: tuple[int, ...]
    student_token: int | None
    probability: float


class Enumeration:
    """Every text of a toy teacher, and what it says about one realised response."""

    def __init__(self, teacher: ToyTeacher, student: tuple[Vocabulary, Encoder], cache: Path) -> None:
        self.teacher, self.student = teacher, student
        self.aligner = toy_aligner((teacher.vocabulary, teacher.encoder), student, cache, reference=True)

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
    realized, anchor = alignment.realized_logprobs(i)
    events, tail, known = alignment.events(i, anchor)
    assert known == pytest.approx(1, abs=EXACT)
    assert sum(mass for mass, _ in events) + tail == pytest.approx(1, abs=EXACT)
    members = [s for _, event in events for s in event]
    assert len(members) == len(set(members)), "events overlap"
    assert int(spans.ids[i]) in members
    assert realized <= EXACT
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
    """The text has x_i's bytes next, through the realised teacher tokens, or a last one that reaches over its end."""
    spans = alignment.spans
    for row in range(int(spans.teacher_index[i]), len(sequence)):
        if spans.teacher_starts[row] == spans.ends[i]:
            return True
        if alignment.tables.teacher.is_special[sequence[row]]:
            return False
        if alignment.reaches_over(row, sequence[row], i + 1):
            return True
        if sequence[row] != spans.teacher_ids[row]:
            return False
    return False


def world_of(seed: int, teacher_merges: int, student_merges: int, cache: Path, longest: int = 3) -> Enumeration:
    generator = random.Random(seed)
    vocabulary, encoder = toy_tokenizer(random_merges(generator, teacher_merges))
    student = toy_tokenizer(random_merges(generator, student_merges))
    return Enumeration(ToyTeacher(vocabulary, encoder, seed, longest), student, cache)


def some_texts(world: Enumeration, seed: int, count: int) -> list[tuple[int, ...]]:
    """A few different responses, drawn from the teacher."""
    sequences, weights = list(world.teacher.texts), list(world.teacher.texts.values())
    return list(dict.fromkeys(random.Random(seed).choices(sequences, weights, k=count)))


def check_world(world: Enumeration, seed: int, tally: Counter[str]) -> None:
    for sequence in some_texts(world, seed, 3):
        alignment = world.alignment(sequence)
        for i in range(len(alignment.spans.ids)):
            check_position(world, alignment, i, tally)


def test_the_teacher_of_these_tests_is_a_distribution(tmp_path: Path) -> None:
    assert sum(world_of(5, 4, 3, tmp_path).teacher.texts.values()) == pytest.approx(1, abs=1e-12)


def test_try(tmp_path: Path) -> None:
    tally = Counter[str]()
    for seed in range(400):
        check_world(world_of(seed, seed % 6, seed % 7, tmp_path), seed, tally)
    print(tally)
