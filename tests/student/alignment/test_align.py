"""What alignment makes of real records: equal vocabularies, digits, specials, real tokenizers, and bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pytest

from shared.config import PrepareConfig
from shared.dataset.records import Distributions, Record
from shared.tokenizer.vocabulary import Encoder, Vocabulary
from student.alignment.align import Aligner
from student.alignment.kernels.compute import TargetKernels
from student.alignment.sanity import observed_masses
from student.alignment.spans import lay_spans, retokenize
from student.alignment.tables import PairTables
from student.alignment.targets import AlignedSample
from tests.fixtures.records import record_from_rows
from tests.fixtures.texts import TEXTS, RowMaker, llada_like, llama3, qwen, tekken
from tests.fixtures.toy_tokenizers import assert_same_targets
from tests.student.alignment.reference import ReferenceAlignment

Tokenizer = tuple[Vocabulary, Encoder]


@lru_cache(maxsize=2)
def tables(teacher: Tokenizer, student: Tokenizer) -> PairTables:
    return PairTables(teacher[0], *student, teacher[1])


def aligner(teacher: Tokenizer, student: Tokenizer, settings: PrepareConfig | None = None) -> Aligner:
    return Aligner(tables(teacher, student), settings or PrepareConfig())


def events_at(sample: AlignedSample, i: int) -> list[tuple[float, list[int]]]:
    targets = sample.targets
    return [
        (
            float(targets.event_mass[e]),
            targets.members[targets.member_offsets[e] : targets.member_offsets[e + 1]].tolist(),
        )
        for e in range(targets.event_offsets[i], targets.event_offsets[i + 1])
    ]


def check_accounting(sample: AlignedSample, record: Record) -> None:
    """What must hold at every position of every aligned record."""
    targets, count = sample.targets, len(sample.input_ids) - sample.prompt_length
    assert len(sample.byte_ends) == len(targets.tail) == count
    assert sample.byte_ends[-1] == len(record.response_bytes)
    sums = np.add.reduceat(
        np.r_[targets.event_mass, 0], np.minimum(targets.event_offsets[:-1], len(targets.event_mass))
    )
    soft = ~np.isnan(targets.tail)
    np.testing.assert_allclose((sums + targets.tail)[soft], 1, atol=1e-5)
    assert (np.diff(targets.event_offsets)[~soft] == 0).all()
    assert (np.diff(targets.member_offsets) > 0).all()
    for i in np.flatnonzero(soft):
        members = targets.members[
            targets.member_offsets[targets.event_offsets[i]] : targets.member_offsets[targets.event_offsets[i + 1]]
        ]
        assert len(np.unique(members)) == len(members), "events overlap"
    assert (observed_masses(sample)[soft] > 0).all(), "an observed token is in no event"
    assert record.distributions is not None
    assert sample.observed_logprob.sum() == pytest.approx(record.distributions.sampled.sum(), rel=1e-4)


# --- equal vocabularies ---------------------------------------------------------------------------------


def test_equal_vocabularies_give_the_stored_rows() -> None:
    teacher = llama3()
    record = RowMaker(*teacher).record(TEXTS["mixed"] + TEXTS["numbers"] + TEXTS["Japanese"], prompt=(128000, 882))
    sample, _ = aligner(teacher, teacher).align(record)
    assert sample is not None
    assert record.distributions is not None
    np.testing.assert_array_equal(sample.input_ids, [128000, 882, *record.response_ids])
    assert sample.is_anchor.all()
    np.testing.assert_allclose(sample.observed_logprob, record.distributions.sampled, atol=1e-6)
    for j in range(len(record.response_ids)):
        ids, logprobs = record.distributions.row(j)
        events = events_at(sample, j)
        assert [members for _, members in events[: len(ids)]] == [[v] for v in ids]
        np.testing.assert_allclose([mass for mass, _ in events[: len(ids)]], np.exp(logprobs), rtol=2e-6)
        # The observed token is always an event, by its own logprob where it is outside the row.
        extra = [members for _, members in events[len(ids) :]]
        assert extra == ([] if record.response_ids[j] in ids else [[record.response_ids[j]]])
        outside = 0.0 if not extra else math.exp(record.distributions.sampled[j])
        assert sample.targets.tail[j] == pytest.approx(record.distributions.tail[j] - outside, abs=2e-6)


# --- digits ---------------------------------------------------------------------------------------------


def test_grouped_numerals_give_exact_digit_marginals() -> None:
    """All 1,110 numerals of up to three digits, against a student that has single digits only."""
    teacher, student = llama3(), llada_like(True)
    numerals = [str(n).zfill(width) for width in (1, 2, 3) for n in range(10**width)]
    ids = [teacher[0].ids[numeral.encode()] for numeral in numerals]
    probabilities = np.random.default_rng(3).dirichlet(np.full(len(ids), 0.3)) + 1e-12
    probabilities /= probabilities.sum()
    observed = numerals.index("274")
    order = np.argsort(-probabilities)
    row = ([ids[n] for n in order], [float(probabilities[n]) for n in order])
    end = teacher[0].roles["end_of_turn"]
    record = record_from_rows(
        teacher[0],
        (ids[observed], end),
        [row[0], [end]],
        [row[1], [1.0]],
        [float(probabilities[observed]), 1.0],
        np.float64,
    )
    sample, _ = aligner(teacher, student, PrepareConfig(min_known_mass=0.0)).align(record)
    assert sample is not None
    assert [student[0].tokens[s] for s in sample.input_ids[:3]] == [b"2", b"7", b"4"]

    def starting(prefix: str, longer_than: int) -> float:
        chosen = [n for n, numeral in enumerate(numerals) if numeral.startswith(prefix) and len(numeral) > longer_than]
        return float(probabilities[chosen].sum())

    for i, known in enumerate(("", "2", "27")):
        by_token = {students[0]: mass for mass, students in events_at(sample, i)}
        whole = starting(known, i)
        for digit in "0123456789":
            token = student[0].ids[digit.encode()]
            assert by_token[token] == pytest.approx(starting(known + digit, i) / whole, abs=1e-7)
    # The chain knows that a teacher's token may also end where the student's digit does.
    chain = [math.exp(p) for p in sample.observed_logprob[:3]]
    assert chain[0] == pytest.approx(starting("2", 0), abs=1e-7)
    assert chain[0] * chain[1] == pytest.approx(starting("27", 1), abs=1e-7)
    assert math.prod(chain) == pytest.approx(probabilities[observed], abs=1e-7)


# --- specials -------------------------------------------------------------------------------------------


def test_specials_go_over_by_role() -> None:
    teacher, student = llama3(), llada_like(True)
    roles = teacher[0].roles
    reserved = 128010  # LLaMA 3's <|python_tag|>: the student has no such role
    header = (roles["start_header"], *teacher[1].encode("user"), roles["end_header"])
    prompt = (roles["bos"], *header, reserved, *teacher[1].encode("\n\nHi"), roles["end_of_turn"])
    record = RowMaker(*teacher).record("Yes.", prompt=prompt)
    sample, counts = aligner(teacher, student).align(record)
    assert sample is not None
    own = student[0].roles
    header = (own["start_header"], *student[1].encode("user"), own["end_header"])
    expected = [own["bos"], *header, *student[1].encode("\n\nHi"), own["end_of_turn"]]
    assert sample.input_ids[: sample.prompt_length].tolist() == expected
    assert counts["dropped_specials"] == 1
    assert sample.input_ids[-1] == own["end_of_turn"]
    last = events_at(sample, len(sample.byte_ends) - 1)
    assert [own["end_of_turn"]] in [members for _, members in last], "the end of the turn is an event of its own"
    np.testing.assert_array_equal(retokenize(tables(teacher, student), np.array(prompt)), expected)


def test_a_special_token_inside_the_text_is_counted() -> None:
    teacher, student = llama3(), llada_like(True)
    maker = RowMaker(*teacher)
    first, second = maker.record("One."), maker.record(" Two <|eot_id|> three.")
    assert first.distributions is not None
    assert second.distributions is not None
    ids = (*first.response_ids.tolist(), *second.response_ids.tolist())
    rows = [record.distributions.row(j) for record in (first, second) for j in range(len(record.response_ids))]  # type: ignore[union-attr]
    observed = np.exp(np.r_[first.distributions.sampled, second.distributions.sampled]).tolist()
    record = record_from_rows(
        teacher[0], ids, [r[0].tolist() for r in rows], [np.exp(r[1]).tolist() for r in rows], observed
    )
    sample, counts = aligner(teacher, student).align(record)
    assert sample is not None
    assert counts["inner_specials"] == 1
    assert (sample.input_ids == student[0].roles["end_of_turn"]).sum() == 2
    assert student[0].decode(sample.input_ids) == b"One. Two <|eot_id|> three.", (
        "text that looks like a special is text"
    )
    check_accounting(sample, record)


# --- real vocabularies ----------------------------------------------------------------------------------

PAIRS: dict[str, tuple[Callable[[], Tokenizer], Callable[[], Tokenizer]]] = {
    "llama3-llada": (llama3, llada_like),
    "llada-llama3": (llada_like, llama3),
    "llama3-tekken": (llama3, tekken),
    "qwen-llama3": (qwen, llama3),
    "llama3-llada without digits split": (llama3, lambda: llada_like(False)),
}


@pytest.mark.parametrize(
    "pair", [pytest.param(name, marks=[] if n == 0 else pytest.mark.slow) for n, name in enumerate(PAIRS)]
)
def test_every_script_is_accounted_for(pair: str) -> None:
    """The kernels and the plain version agree on nineteen kinds of text, and nothing is lost in any."""
    teacher, student = PAIRS[pair][0](), PAIRS[pair][1]()
    made = aligner(teacher, student)
    kernels = TargetKernels(made.tables, made.prepare.min_known_mass)
    maker = RowMaker(*teacher)
    disagreements, positions = 0, 0
    for text in TEXTS.values():
        record = maker.record(text)
        sample, counts = made.align(record)
        assert sample is not None
        assert record.distributions is not None
        check_accounting(sample, record)
        spans = lay_spans(made.tables, record.response_ids)
        plain = ReferenceAlignment(made.tables, spans, record.distributions, made.prepare.min_known_mass)
        assert_same_targets(kernels.compute(spans, record.distributions), plain.compute())
        disagreements += counts["disagreements"]
        positions += counts["positions"]
    assert disagreements < 0.03 * positions


# --- bad input ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good() -> Record:
    return RowMaker(*llama3()).record("A good café, e\u0301 and 12 more.")


def test_text_that_the_normalizer_would_change_is_encoded_or_dropped_by_choice(good: Record) -> None:
    sample, counts = aligner(llama3(), llada_like(True)).align(good)
    assert sample is not None
    assert counts["changed_text"] == 1
    assert llada_like(True)[0].decode(sample.input_ids) == good.response_bytes
    check_accounting(sample, good)
    drop = aligner(llama3(), llada_like(True), PrepareConfig(changed_text="drop"))
    assert drop.align(good)[0] is None
    assert drop.align(good)[1]["dropped_changed_text"] == 1
    assert drop.align(RowMaker(*llama3()).record("Plain."))[0] is not None


def test_a_response_cut_inside_a_character_is_aligned_to_the_cut() -> None:
    text = "Thumbs up 👍🏽".encode()
    record = RowMaker(*llama3()).record(text[:-2], end=False)
    sample, counts = aligner(llama3(), llada_like(True)).align(record)
    assert sample is not None
    assert counts["cut_character"] == 1
    assert llada_like(True)[0].decode(sample.input_ids) == text[:-2]
    assert sample.byte_ends[-1] == len(text) - 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"response_ids": np.empty(0, np.int32), "response_bytes": b""}, "empty"),
        ({"response_bytes": b"other text"}, "bytes_mismatch"),
        ({"response_ids": np.array([5, 999_999], np.int32)}, "outside_vocabulary"),
        ({"prompt_ids": np.array([-1], np.int32)}, "outside_vocabulary"),
    ],
)
def test_a_record_that_cannot_be_right_is_refused_and_counted(
    change: dict[str, object], reason: str, good: Record
) -> None:
    sample, counts = aligner(llama3(), llada_like(True)).align(replace(good, **change))  # type: ignore[arg-type]
    assert sample is None
    assert counts[reason] == 1


def test_a_response_of_which_the_student_has_no_token_is_left_out_and_counted() -> None:
    """Nothing but the end of the turn, for a student without that role."""
    vocabulary, encoder = llada_like(True)
    roles = {role: token for role, token in vocabulary.roles.items() if role != "end_of_turn"}
    student = replace(vocabulary, roles=roles), encoder
    made = Aligner(PairTables(llama3()[0], *student, llama3()[1]), PrepareConfig())
    end = llama3()[0].roles["end_of_turn"]
    sample, counts = made.align(record_from_rows(llama3()[0], (end,), [[end]], [[1.0]], [1.0]))
    assert sample is None
    assert counts["no_student_tokens"] == 1
    sample, counts = made.align(RowMaker(*llama3()).record("Yes."))
    assert sample is not None
    assert not counts["no_student_tokens"]


def test_rows_with_an_unknown_tail_give_no_target_but_keep_the_known_probability(good: Record) -> None:
    assert good.distributions is not None
    unknown = replace(good.distributions, tail=np.full(len(good.response_ids), np.nan, np.float32))
    sample, counts = aligner(llama3(), llada_like(True)).align(replace(good, distributions=unknown))
    assert sample is not None
    assert counts["soft"] == 0
    assert counts["unusable_rows"] == counts["positions"] == len(sample.byte_ends)
    assert sample.observed_logprob.sum() == pytest.approx(good.distributions.sampled.sum(), rel=1e-4)


def test_an_unknown_sampled_logprob_makes_its_own_positions_unknown_only() -> None:
    record = RowMaker(*llama3()).record("The teacher never said how likely this was.")
    assert record.distributions is not None
    sampled = record.distributions.sampled.copy()
    j = 3
    ids, logprobs = record.distributions.row(j)
    inside = record.response_ids[j] in ids
    keep = np.ones(len(record.distributions.ids), bool)
    if inside:  # take the observed token out of its row, so that nothing says how likely it was
        place = int(record.distributions.offsets[j]) + ids.tolist().index(record.response_ids[j])
        keep[place] = False
    offsets = record.distributions.offsets - np.r_[np.zeros(j + 1), np.full(len(sampled) - j, inside)].astype(np.int64)
    sampled[j] = np.nan
    tail = record.distributions.tail.copy()
    tail[j] += math.exp(logprobs[ids.tolist().index(record.response_ids[j])]) if inside else 0
    kept_ids, kept_logprobs = record.distributions.ids[keep], record.distributions.logprobs[keep]
    changed = Distributions(offsets=offsets, ids=kept_ids, logprobs=kept_logprobs, tail=tail, sampled=sampled)
    sample, counts = aligner(llama3(), llada_like(True)).align(replace(record, distributions=changed))
    assert sample is not None
    unknown = np.flatnonzero(np.isnan(sample.observed_logprob))
    assert counts["unknown_observed"] == len(unknown) > 0
    spans = [(int(a), int(b)) for a, b in pairwise([0, *sample.byte_ends])]
    start, stop = llama3()[0].byte_ends(record.response_ids)[j - 1 : j + 1].tolist()
    assert all(spans[i][1] > start and spans[i][0] < stop for i in unknown)


def test_a_conversation_without_distributions_is_aligned_without_targets(good: Record) -> None:
    sample, counts = aligner(llama3(), llada_like(True)).align(replace(good, distributions=None))
    assert sample is not None
    assert counts["soft"] == 0
    assert np.isnan(sample.observed_logprob).all()
    assert llada_like(True)[0].decode(sample.input_ids) == good.response_bytes
