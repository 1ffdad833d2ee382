from __future__ import annotations

from pathlib import Path

import pytest

from student.drafting import engines
from student.drafting.decode import Job, Pass
from student.drafting.engines import run


def jobs_of(directory: Path) -> dict[Path, Job]:
    """An engine of three turns and one of one turn, and one that compares itself with them."""
    engine, passes = {"diary": str(directory / "diary")}, {"latency": Pass(one_by_one=True)}
    return {
        directory / "a": Job(engine, [[1], [2], [3]], 4, [], passes),
        directory / "b": Job(engine, [[1]], 4, [], passes),
        directory / "c": Job(engine, [[1]], 4, [], passes, compare_with=["of the others"]),
    }


@pytest.mark.parametrize("room", [True, False])
def test_engines_decode_in_turns_where_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: bool) -> None:
    monkeypatch.setattr(engines, "MODULE", "tests.fixtures.scripted_engine")
    monkeypatch.setattr(engines, "is_cpu_build", lambda: room)
    results = run(jobs_of(tmp_path), {})
    assert [base.name for base in results] == ["a", "b", "c"]
    assert [len(result.passes["latency"].outputs) for result in results.values()] == [3, 1, 1]
    loaded = "a loads, b loads, c loads"
    together = f"{loaded}, a, b, b ends, c, a, a, a ends, c compares, c ends"
    apart = "a loads, a, a, a, a ends, b loads, b, b ends, c loads, c, c compares, c ends"
    assert (tmp_path / "diary").read_text().splitlines() == (together if room else apart).split(", ")


def test_engines_that_do_not_fit_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "MODULE", "tests.fixtures.scripted_engine")
    monkeypatch.setattr(engines, "is_cpu_build", lambda: True)
    run(jobs_of(tmp_path), {}, kv_cache_gib=1e6)
    assert (tmp_path / "diary").read_text().startswith("a loads\na\na\na\na ends\nb loads")


def test_an_engine_that_fails_says_why_and_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "MODULE", "tests.fixtures.scripted_engine")
    monkeypatch.setattr(engines, "is_cpu_build", lambda: True)
    jobs = jobs_of(tmp_path)
    jobs[tmp_path / "b"] = Job({"fails": True}, [[1]], 4, [], {})
    with pytest.raises(RuntimeError, match=r"(?s)vLLM b ended with exit code 1; .*b\.log ends with\n.*as it was told"):
        run(jobs, {})
    assert not (tmp_path / "a.json").exists()


def test_an_engine_that_is_killed_while_it_waits_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system does where memory runs out."""
    monkeypatch.setattr(engines, "MODULE", "tests.fixtures.scripted_engine")
    monkeypatch.setattr(engines, "is_cpu_build", lambda: True)
    jobs = jobs_of(tmp_path)
    jobs[tmp_path / "b"] = Job({"diary": str(tmp_path / "diary"), "is_killed": True}, [[1]], 4, [], {})
    with pytest.raises(RuntimeError, match=r"vLLM b ended with exit code -9; .*b\.log ends with"):
        run(jobs, {})


def test_a_job_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    job = Job({}, [[1, 2]], "four", [], {})  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"(?s)ended with exit code 1; .*failing\.log ends with\n.*max_tokens"):
        run({tmp_path / "failing": job}, {})
