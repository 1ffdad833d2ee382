"""What the documents tell a reader to type works: commands, options, settings, configs, blocks of code."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import shared.commands.cli
import student.cli
import teacher.cli
from shared.config import PipelineConfig, load_config
from shared.config.section import section_of
from tests.fixtures.toy_run import load_toy, write_toy_shards
from tests.test_house import DOCUMENTS, ROOT, code_spans

APPS = {"teacher": teacher.cli.app, "student": student.cli.app, "shards": shared.commands.cli.app}
COMMANDS: dict[str, Any] = {name: typer.main.get_command(app) for name, app in APPS.items()}
TARGETS = dict(re.findall(r"^([a-z-]+):.*?## (.+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
SETTINGS = re.compile(rf"(?<![\w./])({'|'.join(PipelineConfig.model_fields)})(\.\w+)+(?![\w.]*[/(])")
FILES = (".py", ".json", ".jsonl", ".cli", ".sbatch")
OTHERS = {"aws", "rsync", "sha256sum"}
# Placeholders that stand for a number or have a form of their own.
VALUES = {"N": "4", "W": "4", "STEP": "4", "I/N": "0/4"}


def blocks(document: Path) -> Iterator[tuple[str, str]]:
    """Language and text of each fenced block."""
    text = document.read_text(encoding="utf-8")
    for indent, language, body in re.findall(r"^( *)```(\w*)\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE):
        yield language, re.sub(rf"^{indent}", "", body, flags=re.MULTILINE)


def typed(document: Path) -> Iterator[str]:
    """Command lines: after `$` in a block, at the head of an explained line of a block, or between backticks.

    Of a launcher such as `torchrun … -m student.cli train …` it is the part that is ours.
    """
    for language, body in blocks(document):
        if language in ("console", "bash"):
            prompt = "" if language == "bash" else r"\$ "
            for line in re.findall(rf"^{prompt}(.+)$", body.replace("\\\n", " "), flags=re.MULTILINE):
                for part in re.sub(r"\s{2,}#.*", "", line).split("&&"):
                    yield re.sub(r".* (?:-m|--module) (student|teacher)\.cli", r"\1", part.strip())
        elif not language:
            for line in re.findall(r"^(?:teacher|student|shards) .+", body, flags=re.MULTILINE):
                yield " ".join(re.split(r" {3,}", line)[:-1])
    yield from (span for span in sorted(code_spans(document)) if re.match(r"(teacher|student|shards|make) [a-z]", span))


def config_at(word: str) -> Path:
    return ROOT / word if word.startswith("configs/") else ROOT / "configs" / "demo.yaml"


def check_make(words: list[str]) -> None:
    """Targets that exist, with settings that load."""
    given = dict(word.split("=", 1) for word in words if "=" in word)
    assert given.keys() <= {"CONFIG", "ARGS", "EXTRAS", "GPUS"}, given
    assert not [word for word in words if "=" not in word and word not in TARGETS]
    overrides = re.findall(r"--set (\S+)", given.get("ARGS", ""))
    if "…" not in given.get("CONFIG", ""):
        load_config(config_at(given.get("CONFIG", "")), overrides)


def check_command(app: str, words: list[str], *, whole: bool = False) -> None:
    """Parses as the command line would; arguments that a sentence leaves out may be missing, but for a `whole` one."""
    name, *rest = [VALUES.get(word, word) for word in words if word != "…"]
    assert name in COMMANDS[app].commands, f"{app} has no command {name}"
    try:
        context = COMMANDS[app].commands[name].make_context(name, rest)
    except typer.BadParameter as error:
        if type(error).__name__ == "MissingParameter" and not whole:
            return
        raise
    given = context.params.get("config")
    if given is not None and given.suffix == ".yaml" and "…" not in str(given):
        load_config(config_at(str(given)), context.params["overrides"])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_parses(document: Path) -> None:
    for line in typed(document):
        first, *words = shlex.split(re.sub(r"[\[\]]", "", line))  # brackets: what may be left out
        if first == "make":
            check_make(words)
        elif first in APPS:
            check_command(first, words)
        else:
            assert first in OTHERS or first.startswith(".venv/bin/"), f"{line!r} is no command of this project"


def test_the_commands_are_found() -> None:
    """The parsing above finds what there is to find."""
    assert sum(len(list(typed(document))) for document in DOCUMENTS) > 80
    with pytest.raises(Exception, match="No such option: --no-such-option"):
        check_command("student", ["train", "CONFIG", "--no-such-option"])
    with pytest.raises(AssertionError, match="has no command"):
        check_command("shards", ["no-such-command"])
    with pytest.raises(AssertionError):
        check_make(["no-such-target"])


def test_every_setting_that_a_document_names_exists() -> None:
    missing = []
    for document in DOCUMENTS:
        for span in code_spans(document):
            for match in SETTINGS.finditer(span):
                if match[0].endswith(FILES) or ROOT.joinpath(*match[0].split(".")[:2]).is_dir():
                    continue  # a file, a module
                node: Any = PipelineConfig
                for name in match[0].split("."):
                    if node is None or name not in node.model_fields:
                        missing.append((str(document.relative_to(ROOT)), span))
                        break
                    node = section_of(node.model_fields[name].annotation)
    assert not missing


def test_every_config_that_a_document_names_loads() -> None:
    text = "".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    named = set(re.findall(r"configs/[\w.-]+\.yaml", text))
    assert len(named) > 3
    for name in named:
        load_config(ROOT / name, ["train.steps=1", "train.epochs=null"])


@pytest.mark.slow
def test_blocks_of_python_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a toy run is what they call runs/demo; `test_serve.py` runs the one that asks a server."""
    write_toy_shards(load_toy(tmp_path, ["name=demo"]), train=8, held_out=2)
    monkeypatch.chdir(tmp_path)
    found = [body for document in DOCUMENTS for language, body in blocks(document) if language == "python"]
    found = [body for body in found if "OpenAI" not in body]
    assert found
    for body in found:
        exec(compile(body, "README.md", "exec"), {})


@pytest.mark.parametrize("app", APPS)
def test_help_of_every_command(app: str) -> None:
    for name in ("", *COMMANDS[app].commands):
        result = CliRunner().invoke(APPS[app], [*filter(None, [name]), "--help"])
        assert result.exit_code == 0, result.output
        assert "Usage:" in result.output


def test_cheap_commands_run(tmp_path: Path) -> None:
    """Those of the recipe that start nothing, on a toy run where they need data."""
    config = load_toy(tmp_path)
    write_toy_shards(config, train=8, held_out=2)
    (tmp_path / "teacher" / "config.json").write_text('{"model_type": "llama", "vocab_size": 400}')
    prompts = f"collect.prompts={ROOT / 'configs' / 'prompts' / 'demo.jsonl'}"
    shards = str(config.shards_dir)
    for app, *words in (
        ("shards", "validate", shards),
        ("shards", "stats", shards),
        ("shards", "show", shards),
        ("student", "plan", str(ROOT / "configs" / "llama-3.3-70b.yaml"), "--gpus", "16"),
        ("teacher", "plan", str(tmp_path / "toy.yaml"), "--set", prompts),
    ):
        result = CliRunner().invoke(APPS[app], words)
        assert result.exit_code == 0, (words, result.output, result.exception)
        assert result.output.strip() or app != "shards"
