from __future__ import annotations

import io

from rich.console import Console

from student.drafting.steps import Step, shown, spans
from tests.student.drafting.conftest import Side


def test_a_step_is_the_accepted_part_then_the_teachers_own() -> None:
    assert Step.of([1, 2, 3], [1, 2, 9]) == Step([1, 2], [3], [9])
    assert Step.of([1, 2], [1, 2, 9]) == Step([1, 2], [], [9])
    assert Step.of([], [9]) == Step([], [], [9])
    assert Step.of([1, 2, 3], [1], ended=True) == Step([1], [], []), "what lies behind the end was never verified"
    assert Step.of([1, 2, 3], [1, 9], ended=True) == Step([1], [2], [9])


def test_pieces_give_the_text_and_mark_who_said_it(teacher_side: Side) -> None:
    """Characters of several bytes go across tokens, and none is lost."""
    text = "Ça va 😀 well, thank you"
    ids = teacher_side.encoder.encode(text.encode()).tolist()
    wrong = teacher_side.encoder.encode(b" no").tolist()
    steps = [Step.of([], ids[:1])]
    steps += [Step.of([ids[at], *wrong], ids[at : at + 2], ended=at + 2 >= len(ids)) for at in range(1, len(ids), 2)]
    pieces = spans(steps, teacher_side.vocabulary)
    assert "".join(piece for kind, piece in pieces if kind != "rejected") == text
    assert {kind for kind, _ in pieces} == {"accepted", "rejected", "own"}
    terminal = io.StringIO()
    Console(file=terminal, force_terminal=True, color_system="standard", width=200).print(shown(pieces, colors=True))
    assert "\x1b[32m" in terminal.getvalue(), "accepted tokens are green"
    assert "\x1b[9;31m" in terminal.getvalue(), "rejected ones are red and struck through"
    assert shown([("accepted", "a b"), ("rejected", "c"), ("own", "d")], colors=False).plain == "{+a b+}[-c-]d"
