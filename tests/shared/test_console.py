"""The one boundary: a user's mistake is a message and exit code 2, anything else keeps its traceback."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging

import pytest
import typer
from typer.testing import CliRunner

from shared.console import LogLevelOption, application, bytes_text, configure_logging, progress, run
from shared.errors import DatasetError


def app_that_raises(error: Exception) -> typer.Typer:
    app = application("Test.")

    @app.command()
    def fail() -> None:
        raise error

    return app


def test_a_users_mistake_is_one_message_and_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["x", "fail"])
    with pytest.raises(SystemExit) as end:
        run(app_that_raises(DatasetError("seen [3], expected [4]; do this")))
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.err == "error: seen [3], expected [4]; do this\n"
    assert captured.out == ""


def test_our_own_mistake_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["x", "fail"])
    with pytest.raises(ZeroDivisionError):
        run(app_that_raises(ZeroDivisionError("ours")))


def test_bytes_are_told_in_the_unit_that_suits_them() -> None:
    assert [bytes_text(n) for n in (0, 999, 999.7, 3.21e9, 999.7e6, 2e15)] == [
        "0 B", "999 B", "1 kB", "3.21 GB", "1 GB", "2,000.00 TB",
    ]  # fmt: skip


def test_log_levels_are_checked() -> None:
    app = typer.Typer()

    @app.command()
    def log(log_level: LogLevelOption = "info") -> None:
        configure_logging(log_level)

    root = logging.getLogger()
    before, handlers = root.level, list(root.handlers)
    try:
        assert CliRunner().invoke(app, ["--log-level", "Warning"]).exit_code == 0
        assert root.level == logging.WARNING
        refused = CliRunner().invoke(app, ["--log-level", "loud"])
        assert refused.exit_code == 2
        assert "'loud' is not one of" in refused.output
    finally:
        root.handlers[:] = handlers
        root.setLevel(before)


def test_the_progress_bar_counts_and_notes(capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as bar:
        task = bar.add_task("working", total=3, note="")
        bar.update(task, advance=2, note="[x] fine")
    err = capsys.readouterr().err
    assert "working" in err
    assert "2/3" in err
    assert "[x] fine" in err


@pytest.mark.parametrize("module", ["teacher.cli", "student.cli", "shared.commands.cli"])
def test_every_program_says_its_version_and_completes(module: str) -> None:
    app = importlib.import_module(module).app
    said = CliRunner().invoke(app, ["--version"])
    assert (said.exit_code, said.stdout.strip()) == (0, importlib.metadata.version("llada-drafter"))
    assert "--install-completion" in CliRunner().invoke(app, ["--help"]).stdout
