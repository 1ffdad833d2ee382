"""What an acceptance length is worth: as many tokens are right as asked, and the fit finds where drafting pays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from student.drafting import break_even
from student.drafting.decode import read_result
from tests.fixtures.served_run import pipeline


def test_the_needed_length_is_where_the_speedup_is_one() -> None:
    measured = [{"acceptance_length": tau, "speedup": 0.55 * tau} for tau in (1.0, 2.5, 4.0)]
    assert break_even.needed(measured) == pytest.approx(1 / 0.55)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.usefixtures("warm_serving")
def test_drafted_tokens_are_accepted_as_asked(
    served_run: Path, served_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(break_even, "LENGTHS", 2)
    config = pipeline(served_run, served_teacher)
    result = break_even.break_even(config)
    assert result == json.loads((served_run / "break_even.json").read_text())
    nothing, everything = result["measured"]
    for name in ("latency", "throughput"):
        assert nothing[name]["acceptance_length"] == 1
        assert everything[name]["acceptance_length"] > 3  # a response's last draft may be shorter than three tokens
        assert everything[name]["speedup"] > nothing[name]["speedup"]
        assert result["needed"][name] > 0
        never, always = (entry[name]["acceptance_length"] for entry in result["with_policy"])
        assert never in (None, 1)
        assert always > 2
    plain, drafted = (read_result(served_run / "speculate" / f"break_even{n}.json").passes for n in ("_baseline", ""))
    assert all(made.outputs == plain[name].outputs for name, made in drafted.items())
    console = Console(width=150, record=True)
    console.print(break_even.table(result))
    assert f"{result['needed']['latency']:.2f}" in console.export_text()
