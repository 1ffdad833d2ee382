"""A mistake of the user gets one message with the value and the fix and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.fixtures.toy_run import make_tokenizer, toy_config

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "configs" / "demo.yaml"
TEACHER, STUDENT, SHARDS = "teacher.cli", "student.cli", "shared.commands.cli"


def demo_in(directory: Path, **changes: Any) -> Path:
    """The demo's config with its runs in `directory`; a change's key is a path such as `collect.prompts`."""
    tree = yaml.safe_load(DEMO.read_text())
    tree["runs"] = str(directory / "runs")
    for key, value in changes.items():
        node = tree
        *parents, last = key.split("__")
        for parent in parents:
            node = node[parent]
        if value is None:
            node.pop(last)
        else:
            node[last] = value
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


class Done(NamedTuple):
    returncode: int
    stderr: str


def command(module: str, *arguments: str | Path) -> Done:
    """What the program of `module` does, in this process: each of its own would import torch for seconds."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(sys, "argv", [module, *map(str, arguments)])
        patch.chdir(ROOT)
        with pytest.raises(SystemExit) as end:
            importlib.import_module(module).main()
    return Done(int(end.value.code or 0), said.getvalue())


def process(module: str, *arguments: str | Path) -> Done:
    program = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(program, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    return Done(done.returncode, done.stderr)


def assert_refused(done: Done, directory: Path, *parts: str) -> None:
    message = " ".join(done.stderr.split())
    assert done.returncode == 2, message
    assert "Traceback" not in message
    assert "error:" in message
    for part in parts:
        assert part in message
    assert not (directory / "runs").exists(), "nothing is left behind"


def test_an_unknown_key_is_named_with_the_one_that_was_meant(tmp_path: Path) -> None:
    done = command(STUDENT, "train", demo_in(tmp_path, train__learing_rate=0.1))
    assert_refused(done, tmp_path, "train.learing_rate: unknown key", "did you mean 'learning_rate'?")


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    done = command(TEACHER, "collect", demo_in(tmp_path, collect__decoding=None))
    assert_refused(done, tmp_path, "collect.decoding: missing")


def test_a_missing_config_file_is_named(tmp_path: Path) -> None:
    done = command(STUDENT, "train", tmp_path / "no.yaml")
    assert_refused(done, tmp_path, "cannot read the config", "no.yaml")


@pytest.mark.parametrize("name", ["init", "prepare", "train", "evaluate", "speculate"])
def test_a_directory_that_holds_no_dataset(tmp_path: Path, name: str) -> None:
    # The toy's student starts random: the demo's needs a checkpoint, which a fresh clone does not have yet.
    run = process if name == "train" else command  # which joins a process group before all else
    done = run(STUDENT, name, toy_config(tmp_path))
    assert_refused(done, tmp_path, str(tmp_path / "runs"))


def test_an_import_that_fails_leaves_nothing_so_that_the_corrected_file_is_imported(tmp_path: Path) -> None:
    """All of these once passed the checks, or nearly: they failed in the middle of writing, or imported something."""
    make_tokenizer(tmp_path / "tokenizer")
    target = tmp_path / "runs"
    file = tmp_path / "in.jsonl"
    arguments = ("import-json", file, target, "--tokenizer", tmp_path / "tokenizer")
    good = {"prompt": "what", "response": " the cat", "sampling": {"temperature": 1.0, "seed": 1}}
    for change, message in (
        ({"sampling": {"temperature": "hot"}}, "line 2: sampling.temperature is 'hot', expected a number"),
        (
            {"sampling": {"temperature": 1.0, "seed": 2**70}},
            "line 2: sampling.seed is 1180591620717411303424, expected",
        ),
        ({"prompt": "\ud800"}, "line 2: prompt.content is '\\ud800', expected whole text"),
    ):
        file.write_text(json.dumps(good) + "\n" + json.dumps({**good, **change}))
        assert_refused(command(SHARDS, *arguments), tmp_path, "in.jsonl", message)
    file.write_text(json.dumps(good))
    done = command(SHARDS, *arguments, "--temperature", "inf")
    assert_refused(done, tmp_path, "--temperature is inf, expected a finite number, 0 or more")
    done = command(SHARDS, *arguments)
    assert done.returncode == 0, done.stderr
    file.write_text(json.dumps({**good, "prompt": "why"}))
    done = command(SHARDS, *arguments)
    message = " ".join(done.stderr.split())
    assert done.returncode == 2, message
    assert "import into a new directory, or delete this one first" in message
    assert "`name`" not in message


def test_a_seed_that_no_generator_takes(tmp_path: Path) -> None:
    done = command(TEACHER, "collect", demo_in(tmp_path, seed=2**70))
    assert_refused(done, tmp_path, "seed: Input should be less than 9223372036854775808 (got 1180591620717411303424)")
