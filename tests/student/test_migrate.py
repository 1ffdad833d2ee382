"""The older pipeline's script, read and run: `student migrate` on the example files, as their user calls it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shared.config import PipelineConfig, TrainConfig, load_config
from shared.errors import ConfigError, UserError
from student.migrate import KEYS, NAMES, SOURCES, migrate, read_script
from student.model.export import load_student
from student.training.train import check
from tests.fixtures.conversations import conversations, teacher_tokenizer
from tests.fixtures.toy_run import toy_config

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "configs/examples"
SAMPLE = EXAMPLES / "run_fine_tuning.sh"
PAGE = ROOT / "shared/commands/README.md"


def edited(directory: Path, pattern: str, line: str) -> Path:
    """The sample with one line in place of another, beside its JSON files."""
    for name in ("conversations.json", "logits.json"):
        (directory / name).symlink_to(EXAMPLES / name)
    text, count = re.subn(f"(?m)^{pattern}.*$", lambda _: line, SAMPLE.read_text())
    assert count == 1
    (directory / SAMPLE.name).write_text(text)
    return directory / SAMPLE.name


def migrated(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "student.cli", "migrate", str(script), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def test_the_page_has_a_row_for_every_setting_with_its_key() -> None:
    section = PAGE.read_text(encoding="utf-8").partition("## Coming from `run_fine_tuning.sh`")[2]
    rows = [[set(re.findall("`([^`]+)`", cell)) for cell in row.split("|")[1:3]] for row in section.splitlines()
            if row.startswith("| `")]  # fmt: skip
    named = set().union(*(there for there, _ in rows))
    assert named == {*NAMES, "--log_level", "sft_output/final", "training_log.log"}
    for name, key in KEYS.items():
        assert next(here for there, here in rows if name in there) >= {key}
        assert key.removeprefix("train.") in TrainConfig.model_fields
    for _, base in SOURCES.values():
        assert f"`{base}`" in section
        load_config(ROOT / base)


def test_the_sample_has_every_setting() -> None:
    settings = read_script(SAMPLE)
    assert settings.keys() == {*NAMES, "--log_level"}
    assert settings["LOSS_TYPE"].value == "hybrid"
    assert settings["TEMPERATURE"].place.endswith("run_fine_tuning.sh, line 14")


def test_a_script_becomes_a_config_and_five_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = edited(tmp_path, "LOSS_TYPE=", "export LOSS_TYPE='kl'   # hybrid before")
    overrides = [f"runs={tmp_path}", "train.steps=7", "collect.template_arguments={date: '1 May'}"]
    assert migrate(script, ROOT / "configs/demo.yaml", overrides, ["--tokenizer", "here"]) == 0
    path = tmp_path / "run_fine_tuning-logits/config.yaml"
    config, base = load_config(path), load_config(ROOT / "configs/demo.yaml")
    assert (config.train.loss, config.train.alpha, config.train.beta, config.train.steps) == ("kl", 0.3, 0.7, 7)
    assert config.student == base.student
    imported, *stages = map(shlex.split, capsys.readouterr().out.splitlines())
    assert imported[:4] == ["shards", "import-json", str(tmp_path / "logits.json"), str(config.shards_dir)]
    assert imported[4:] == [
        "--held-out=0.1", '--template-argument=date="1 May"', "--tokenizer", "here", "--log-level=info",
    ]  # fmt: skip
    stage_names = ["init", "prepare", "train", "evaluate"]
    assert stages == [["student", stage, str(path), "--log-level=info"] for stage in stage_names]


@pytest.mark.parametrize(
    ("pattern", "line", "message"),
    [
        ("LOSS_TYPE=", "LOSS_TYPE=foo", r"line 13: LOSS_TYPE is train.loss here.*'hybrid' \(got 'foo'\)"),
        ("TEMPERATURE=", "TEMPERATURE=0", r"line 14: TEMPERATURE is train.temperature here.*greater than 0 \(got 0\)"),
        ("USE_LOGITS=", "USE_LOGITS=maybe", "line 5: USE_LOGITS is 'maybe', expected true or false"),
        ("USE_LOGITS=", "# USE_LOGITS=true", "sets no USE_LOGITS; add the line USE_LOGITS=value"),
        ("LOGITS_FILE=", "LOGITS_FILE=gone.json", "line 9: LOGITS_FILE is gone.json, which is neither in .* nor here"),
        ("LOGITS_FILE=", "LOGITS_FILE=conversations.json", "train.loss is 'hybrid', but .* no teacher distributions"),
        ("ALPHA=", "ALPHA=$(cat alpha)", r"line 15: cannot tell ALPHA from 'ALPHA=\$\(cat alpha\)', because the scr"),
        ("ALPHA=", 'ALPHA="$A"', "line 15: cannot tell ALPHA from"),
        ("ALPHA=", 'ALPHA="0.5', "line 15: cannot tell ALPHA from"),
        ("ALPHA=", "    ALPHA=0.5", "line 15: cannot tell ALPHA from"),
        ("ALPHA=", "[ -z x ] || ALPHA=0.5", "line 15: cannot tell ALPHA from"),
        ("ALPHA=", "ALPHA=0.5 python fine_tune.py", "line 15: cannot tell ALPHA from"),
        ("    --log_level", "    --log_level $LEVEL", r"cannot tell --log_level from '    --log_level \$LEVEL'"),
        ("BETA=", "ALPHA=0.5", "line 16: ALPHA is '0.5', in .*line 15 '0.3'; keep one of the two"),
    ],
)
def test_what_is_refused_is_refused_before_anything_is_written(
    tmp_path: Path, pattern: str, line: str, message: str
) -> None:
    script = edited(tmp_path, pattern, line)
    with pytest.raises(UserError, match=f"(?s){message}"):
        migrate(script, ROOT / "configs/demo.yaml", [f"runs={tmp_path / 'runs'}"], ["--tokenizer", "here"])
    assert not (tmp_path / "runs").exists()


def test_what_the_file_does_not_say_is_asked_for(tmp_path: Path) -> None:
    entry = {"prompt": "a", "response": "b", "logits": [[1.0, 0.5]], "tokenID": [[1, 2]]}
    script = edited(tmp_path, "LOGITS_FILE=", "LOGITS_FILE=bare.json")
    (tmp_path / "bare.json").write_text(json.dumps([entry]))
    overrides, further = [f"runs={tmp_path / 'runs'}"], ["--tokenizer", "here"]
    with pytest.raises(ConfigError, match=r"entry 0 does not say how its response was decoded.*-- --temperature 0"):
        migrate(script, None, overrides, further)
    with pytest.raises(ConfigError, match=r"entry 0 has logits of its candidates alone.*LOSS_TYPE=ce"):
        migrate(script, None, overrides, [*further, "--temperature=0"])
    with pytest.raises(ConfigError, match=r"teacher.model meta-llama/\S+ is no directory here.*-- --tokenizer DIR"):
        migrate(script, None, overrides, ["--temperature=0", "--values=logprobs"])
    assert not (tmp_path / "runs").exists()
    assert migrate(script, None, overrides, [*further, "--temperature=0", "--values=logprobs"]) == 0
    assert load_config(tmp_path / "runs/run_fine_tuning-bare/config.yaml").train.loss == "hybrid"


@pytest.mark.slow
@pytest.mark.usefixtures("warm_training")
def test_a_command_that_fails_ends_the_run_with_its_code(tmp_path: Path) -> None:
    run = migrated(SAMPLE, "--config", "configs/demo.yaml", "--set", f"runs={tmp_path}", "--run", "--", "--tokenizer",
                   tmp_path / "none")  # fmt: skip
    assert run.returncode == 2
    assert len(run.stdout.splitlines()) == 1
    assert "error:" in run.stderr
    assert "Traceback" not in run.stderr


def metrics(config: PipelineConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.usefixtures("warm_training")
def test_logits_become_a_trained_and_tested_student(tmp_path: Path, smollm2: Path) -> None:
    run = migrated(SAMPLE, "--config", toy_config(tmp_path), "--set", f"teacher.model={smollm2}", "--run")
    assert run.returncode == 0, run.stderr
    assert "WARNING" not in run.stderr
    config = load_config(tmp_path / "runs/run_fine_tuning-logits/config.yaml")
    first, *_, last = metrics(config)
    assert last["loss"] < 0.8 * first["loss"]
    load_student(config.student_final_dir)
    measured = json.loads((config.run_dir / "evaluate.json").read_text())
    assert measured["after"]["drafts"] == measured["before"]["drafts"] > 50
    # Eight candidates leave too much unknown for a flatter distribution.
    with pytest.raises(ConfigError, match=r"train\.temperature"):
        check(load_config(config.run_dir / "config.yaml", ["train.temperature=2"]), 1)


@pytest.mark.slow
@pytest.mark.usefixtures("warm_training")
def test_conversations_become_a_trained_and_tested_student(tmp_path: Path) -> None:
    """The example's and more, as `configs/sft.yaml` trains them, with a tiny start in place of the demo's model."""
    script = edited(tmp_path, "USE_LOGITS=", "USE_LOGITS=false")
    entries = json.loads((EXAMPLES / "conversations.json").read_text())
    entries += [
        {"id": str(number), "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for number, (q, a) in enumerate(conversations(120))
    ]
    (tmp_path / "conversations.json").unlink()
    (tmp_path / "conversations.json").write_text(json.dumps(entries))
    shape = "{d_model: 64, n_layers: 2, n_heads: 4, n_kv_heads: 2, mlp_hidden_size: 128}"
    toy = [
        f"runs={tmp_path / 'runs'}", f"teacher.model={teacher_tokenizer(tmp_path / 'tokenizer')}",
        "student.checkpoint=null", "student.layers=null", f"student.shape={shape}", "train.world_size=1",
        "student.tokenizer.vocab_size=400", "train.epochs=6", "train.max_sequence_tokens=128", "train.dtype=float32",
        "train.learning_rate=3e-3", "train.checkpoint_steps=80", "train.evaluate_checkpoints=true",
        "collect.held_out=0.2", "prepare.workers=1",
    ]  # fmt: skip
    run = migrated(script, "--run", *(word for override in toy for word in ("--set", override)))
    assert run.returncode == 0, run.stderr
    assert "WARNING" not in run.stderr
    config = load_config(tmp_path / "runs/run_fine_tuning-conversations/config.yaml")
    assert config.train.loss == "ce"
    load_student(config.student_final_dir)
    measured = json.loads((config.run_dir / "evaluate.json").read_text())
    assert measured["after"]["masked_ce"] < 0.6 * measured["before"]["masked_ce"]
    assert "tau" not in measured["after"]
    on_the_way = [entry["evaluation"]["masked_ce"] for entry in metrics(config) if "evaluation" in entry]
    assert len(on_the_way) >= 3
    assert on_the_way[-1] == pytest.approx(measured["after"]["masked_ce"], rel=1e-3)
    assert len(measured["answers"]) == 3
    assert any(said["student"] for said in measured["answers"])
