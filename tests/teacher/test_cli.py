"""A user's mistake costs one message and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from teacher.cli import main
from tests.teacher.conftest import write_config

Answer = tuple[int, str]


@pytest.fixture
def teacher(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Run `teacher ARGS…` in this process: its exit code, and all that it printed."""

    def run(*arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["teacher", *arguments])
        code = 0
        try:
            main()
        except SystemExit as exit:
            code = int(exit.code or 0)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


@pytest.mark.parametrize("command", ["collect", "plan"])
@pytest.mark.parametrize(
    ("prompts", "override", "message"),
    [
        (12, "collect.top_k=100000", "collect.top_k is 100000"),
        (12, "collect.prompts=none.jsonl", "cannot read none.jsonl: No such file or directory"),
        ("", "seed=1", "is empty"),
        ('{"id": "a"', "seed=1", "prompts.jsonl line 1 is not JSON"),
        (12, "teacher.model=no/such/dir", "teacher.model no/such/dir does not exist"),
        (12, "collect.topk=8", "collect.topk: unknown key; did you mean 'top_k'"),
        (12, "teacher.max_sequence_tokens=4", "teacher.max_sequence_tokens is 4"),
    ],
)
def test_mistakes(
    tmp_path: Path, tiny_checkpoint: Path, teacher: Callable[..., Answer],
    command: str, prompts: int | str, override: str, message: str,
) -> None:  # fmt: skip
    config = write_config(tmp_path, tiny_checkpoint, prompts)
    before = sorted(path.name for path in tmp_path.iterdir())
    code, output = teacher(command, str(config), "--set", override)
    assert code == 2, output
    assert message in output
    assert "Traceback" not in output
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_scoring_without_responses_is_refused(
    tmp_path: Path, tiny_checkpoint: Path, teacher: Callable[..., Answer]
) -> None:
    config = write_config(tmp_path, tiny_checkpoint)
    code, output = teacher("score", str(config))
    assert code == 2
    assert "collect.responses is not set" in output
    code, output = teacher("score", str(config), "--set", f"collect.responses={tmp_path / 'prompts.jsonl'}")
    assert code == 2
    assert "line 1: response is missing; expected the text to score" in output
    assert not (tmp_path / "runs").exists()


def test_the_plan_is_printed(tmp_path: Path, tiny_checkpoint: Path, teacher: Callable[..., Answer]) -> None:
    code, output = teacher("plan", str(write_config(tmp_path, tiny_checkpoint)), "--tokens-per-s", "100")
    assert code == 0
    assert "100 tokens/s, as stated" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--workers", "2"), "--workers 2 is for --runner ray; without Ray start one process for each engine"),
        (("--shard", "4/4"), "--shard '4/4' is not I/N with I from 0 to N - 1"),
    ],
)
def test_mistakes_of_launching(
    tmp_path: Path, tiny_checkpoint: Path, teacher: Callable[..., Answer], options: tuple[str, ...], message: str
) -> None:
    code, printed = teacher("collect", str(write_config(tmp_path, tiny_checkpoint)), *options)
    assert code == 2
    assert message in " ".join(printed.split())
    assert not (tmp_path / "runs").exists()
