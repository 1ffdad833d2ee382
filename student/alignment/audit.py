"""`student audit`: how well a dataset's distributions carry over to a tokenizer, in figures and pictures for a person.

Aligns a sample of the records and reads nothing but them. Shifted rows are refused here as in training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import cycle, islice
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from shared.config import PrepareConfig
from shared.dataset.records import Record
from shared.tokenizer.vocabulary import Vocabulary
from student.alignment.align import Aligner
from student.alignment.prepare import REASONS, open_source
from student.alignment.sanity import check_alignment, observed_masses
from student.alignment.targets import AlignedSample

_COLORS = ("on grey27", "on dark_blue", "on dark_green", "on dark_red", "on purple4")


@dataclass(frozen=True, slots=True)
class Audit:
    """Figures over the records looked at; shares are of 1, information in nats per byte of response."""

    records: int
    counts: Counter[str]  # as `Aligner.align`
    student_in_teacher: float  # share of the student's text tokens whose bytes are a token of the teacher
    teacher_in_student: float  # the other way round
    mass_in_student: float  # the same, weighted by stored probability
    chunk_bytes: float  # mean size of the stretch between common boundaries: bytes
    chunk_teacher: float  # … tokens of the teacher
    chunk_student: float  # … tokens of the student
    full: float  # share of positions whose target is a whole row
    partial: float  # … a row inside a teacher token
    without: float  # … none
    mapped_mass: float  # mean mass in events, at positions with a target
    events: float  # their mean number there
    teacher_information: float  # of the sampled tokens' own logprobs
    target_information: float  # of the observed student tokens; an event of several tokens tells less than they would
    unmatched: list[tuple[bytes, int, list[bytes]]]  # frequent tokens that the student lacks: bytes, count, its tokens
    digits: tuple[int, int]  # longest run of digits in one token, teacher and student

    def to_json(self) -> dict[str, Any]:
        """All figures under these names; bytes as the tables show them, null where there was nothing to measure."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tree = {name: None if isinstance(value, float) and isnan(value) else value for name, value in values.items()}
        tree["unmatched"] = [
            {"token": _visible(token), "times": times, "student": [_visible(piece) for piece in pieces]}
            for token, times, pieces in self.unmatched
        ]
        return tree


def audit(
    dataset: str | Path,
    tokenizer: Path,
    console: Console,
    limit: int = 200,
    split: str | None = None,
    rule: str | None = None,
) -> Audit:
    """Align `limit` records (of a split, of a decoding rule) for `tokenizer` and print what a person wants to know.

    Raises:
        DatasetError, VocabularyError: if one of them is missing, damaged, or not what the other expects.
        AlignmentError: if rows and text do not belong together; the figures are printed first.
    """
    source = open_source(dataset, tokenizer, PrepareConfig())
    records = list(islice(source.dataset.records(split, rule), limit))
    report, aligned = measure(source.aligner, records)
    teacher, student = source.aligner.tables.teacher, source.aligner.tables.student
    console.print(render(report, teacher, student))
    if aligned:
        record, sample = next((pair for pair in aligned if len(pair[0].response_ids) >= 20), aligned[0])
        console.print(side_by_side(record, sample, teacher, student))
    observed = check_alignment(sample for _, sample in aligned)
    console.print(f"rows and text belong together: the observed tokens have a mean probability of {observed:.3f}")
    return report


def measure(aligner: Aligner, records: list[Record]) -> tuple[Audit, list[tuple[Record, AlignedSample]]]:
    """The figures, and the records behind them with their aligned samples."""
    tables = aligner.tables
    teacher, student = tables.teacher, tables.student
    counts: Counter[str] = Counter()
    aligned: list[tuple[Record, AlignedSample]] = []
    unmatched: Counter[int] = Counter()
    mass, matched_mass, teacher_information = 0.0, 0.0, 0.0
    is_shared = np.array([token in student.ids for token in teacher.tokens]) | teacher.is_special & (
        np.diff(tables.tokenizations.offsets) > 0
    )
    for record in records:
        sample, met = aligner.align(record)
        counts.update(met)
        if sample is None:
            continue
        aligned.append((record, sample))
        unmatched.update(v for v in record.response_ids.tolist() if not is_shared[v])
        if record.distributions is not None:
            teacher_information -= float(np.nansum(record.distributions.sampled))
            probabilities = np.exp(record.distributions.logprobs.astype(np.float64))
            mass += float(probabilities.sum())
            matched_mass += float(probabilities[is_shared[record.distributions.ids]].sum())
    samples = [sample for _, sample in aligned]
    positions, soft = max(1, counts["positions"]), counts["soft"]
    inside_soft = sum(int((~s.is_anchor & ~np.isnan(s.targets.tail)).sum()) for s in samples)
    size = sum(len(record.response_bytes) for record, _ in aligned)
    chunks = max(1, sum(int(s.is_anchor.sum()) for s in samples))
    return Audit(
        records=len(records),
        counts=counts,
        student_in_teacher=_overlap(student, teacher),
        teacher_in_student=_overlap(teacher, student),
        mass_in_student=matched_mass / mass if mass else float("nan"),
        chunk_bytes=size / chunks,
        chunk_teacher=counts["teacher_tokens"] / chunks,
        chunk_student=positions / chunks,
        full=(soft - inside_soft) / positions,
        partial=inside_soft / positions,
        without=1 - soft / positions,
        mapped_mass=counts["mapped_mass"] / soft if soft else float("nan"),
        events=sum(len(s.targets.event_mass) for s in samples) / soft if soft else float("nan"),
        teacher_information=teacher_information / max(1, size),
        target_information=sum(_information(s) for s in samples) / max(1, size),
        unmatched=[
            (_tokens(teacher, [v])[0], count, [student.tokens[s] for s in tables.tokenizations.row(v)])
            for v, count in unmatched.most_common(20)
        ],
        digits=(_longest_digits(teacher), _longest_digits(student)),
    ), aligned


def _overlap(of: Vocabulary, other: Vocabulary) -> float:
    texts = [token for token, special in zip(of.tokens, of.is_special, strict=True) if not special]
    return sum(token in other.ids for token in texts) / max(1, len(texts))


def _longest_digits(vocabulary: Vocabulary) -> int:
    return max((len(token) for token in vocabulary.tokens if token.isdigit()), default=0)


def _information(sample: AlignedSample) -> float:
    """-log of the mass of the events that hold the observed tokens; their own logprob where there is no target."""
    mass = observed_masses(sample)
    with np.errstate(divide="ignore"):
        own = np.where(np.isnan(mass), sample.observed_logprob, np.log(np.maximum(mass, 1e-30)))
    return -float(np.nansum(own))


# --- for people -----------------------------------------------------------------------------------------


def render(report: Audit, teacher: Vocabulary, student: Vocabulary) -> RenderableType:
    """The figures as tables."""
    figures = Table("measure", "value", title=f"{report.records} records", title_justify="left")
    rows = [
        ("vocabulary, teacher / student", f"{len(teacher):,} / {len(student):,}"),
        ("… fingerprints", f"{teacher.fingerprint[:12]} / {student.fingerprint[:12]}"),
        ("student tokens that the teacher has", f"{report.student_in_teacher:.1%}"),
        ("teacher tokens that the student has", f"{report.teacher_in_student:.1%}"),
        ("… by the teacher's probability", f"{report.mass_in_student:.1%}"),
        ("bytes between common boundaries", f"{report.chunk_bytes:.2f}"),
        ("… teacher / student tokens", f"{report.chunk_teacher:.2f} / {report.chunk_student:.2f}"),
        ("positions with a full target", f"{report.full:.1%}"),
        ("positions with a partial target", f"{report.partial:.1%}"),
        ("positions without a target", f"{report.without:.1%}"),
        ("mass mapped to events", f"{report.mapped_mass:.4f}"),
        ("events at a position with a target", f"{report.events:.1f}"),
        ("digits in a token, teacher / student", f"up to {report.digits[0]} / {report.digits[1]}"),
        ("nats per byte, teacher / targets", f"{report.teacher_information:.4f} / {report.target_information:.4f}"),
    ]
    for row in rows:
        figures.add_row(*row)
    for name, text in REASONS.items():
        if report.counts.get(name):
            figures.add_row(text, f"{report.counts[name]:,}")
    parts: list[RenderableType] = [figures]
    if report.unmatched:
        frequent = Table("teacher's token", "times", "student's tokens", title="most frequent unmatched tokens")
        for token, count, tokens in report.unmatched:
            frequent.add_row(_visible(token), str(count), " · ".join(_visible(piece) for piece in tokens) or "–")
        parts.append(frequent)
    return Group(*parts)


def side_by_side(record: Record, sample: AlignedSample, teacher: Vocabulary, student: Vocabulary) -> RenderableType:
    """The first 120 tokens of one response in both tokenizations; one color per token."""
    student_ids = sample.input_ids[sample.prompt_length :]
    return Group(
        Panel(_colored(_tokens(teacher, record.response_ids[:120])), title="teacher"),
        Panel(_colored(_tokens(student, student_ids[:120])), title="student"),
    )


def _tokens(vocabulary: Vocabulary, ids: Iterable[int]) -> list[bytes]:
    """The bytes of every token; of a special its name."""
    return [vocabulary.tokens[v] or vocabulary.texts[v].encode() for v in ids]


def _colored(tokens: list[bytes]) -> Text:
    line = Text()
    for token, color in zip(tokens, cycle(_COLORS), strict=False):
        line.append(_visible(token).replace("␤", "␤\n"), style=color)
    return line


def _visible(token: bytes) -> str:
    """Bytes for reading: white space as symbols, incomplete characters as hexadecimal."""
    text = token.decode("utf-8", "backslashreplace")
    return text.replace("\n", "␤").replace("\t", "␉").replace("\r", "␍").replace(" ", "␣")
