"""`student migrate`: the older pipeline's `run_fine_tuning.sh` as a config of ours, and the commands that run it.

The script is read, never executed: what `$(…)` or a branch says, only a shell knows, so a setting has to be a plain
`NAME=value` on a line of its own. What became of each setting is in `shared/commands/README.md`.
"""

from __future__ import annotations

import json
import logging
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from shared.commands.legacy_json.files import read_entries
from shared.commands.legacy_json.models import ENTRY_EXAMPLE, Entry
from shared.config import PipelineConfig, apply_override, load_config
from shared.errors import ConfigError, DatasetError
from shared.files import write_text
from shared.json_models import checked
from shared.stopping import SIGNALS
from student.losses.settings import resolve_loss

logger = logging.getLogger(__name__)

CONFIG = "config.yaml"
KEYS = {"LOSS_TYPE": "train.loss", "ALPHA": "train.alpha", "BETA": "train.beta", "TEMPERATURE": "train.temperature"}
"""The settings of a training on logits, and their keys here."""
SOURCES = {"true": ("LOGITS_FILE", "configs/llama-3.3-70b.yaml"), "false": ("INPUT_FILE", "configs/sft.yaml")}
"""By USE_LOGITS: the setting that names the JSON file, and the config that is changed."""
NAMES = ("USE_LOGITS", "INPUT_FILE", "LOGITS_FILE", "PROCESSED_FILE", "PROCESSED_LOGITS_FILE", *KEYS)

_ASSIGNMENT = re.compile(r"(?<![\w${-])([A-Z][A-Z0-9_]*)=(?!=)")
_FOR_A_SHELL = re.compile(r"[$`\\\"']")
_LOG_LEVEL = re.compile(r"--log_level[ =]+[\"']?([^\s\\\"']+)")
_MODULES = {"shards": "shared.commands.cli", "student": "student.cli"}


class Setting(NamedTuple):
    """A value, and the script's line that has it, for messages."""

    value: str
    place: str


def migrate(
    script: Path,
    base: Path | None = None,
    overrides: Sequence[str] = (),
    further: Sequence[str] = (),
    *,
    start: bool = False,
) -> int:
    """Write the script's config into the run's directory and print its commands; with `start`, run them.

    Args:
        base: the config that is changed; None is that of `SOURCES`.
        overrides: of keys of the config, over what the script says. further: arguments for `shards import-json`.

    Returns:
        the exit code of the first command that failed, else 0.

    Raises:
        ConfigError: if the script cannot be read or says what is refused here; nothing is written then.
        DatasetError: if the JSON file is missing or malformed at its start.
    """
    settings = read_script(script)
    use_logits, place = _required(settings, "USE_LOGITS", script)
    if use_logits.lower() not in SOURCES:
        raise ConfigError(f"{place}: USE_LOGITS is {use_logits!r}, expected true or false")
    file_setting, default = SOURCES[use_logits.lower()]
    value, place = _required(settings, file_setting, script)
    file = next((path for path in (script.parent / value, Path(value)) if path.exists()), None)
    if file is None:
        raise ConfigError(f"{place}: {file_setting} is {value}, which is neither in {script.parent} nor here")
    base = base or Path(default)
    said = {name: f"{key}={settings[name].value}" for name, key in KEYS.items() if name in settings}
    if use_logits.lower() == "true":
        for name, change in said.items():
            try:
                load_config(base, [change])
            except ConfigError as error:
                raise ConfigError(f"{settings[name].place}: {name} is {KEYS[name]} here: {error}") from error
    elif said:
        logger.info("USE_LOGITS is false, so what is for logits is left out: %s", ", ".join(said.values()))
        said = {"LOSS_TYPE": "train.loss=ce"}
    changes = [f"name={script.stem}-{Path(file.name).stem}", *said.values(), *overrides]
    config = load_config(base, changes)
    path = config.run_dir / CONFIG
    _check_first_entry(config, file, further)
    level = [f"--log-level={settings['--log_level'].value.lower()}"] if "--log_level" in settings else []
    commands = [["shards", "import-json", str(file), str(config.shards_dir), *import_options(config, further), *level]]
    commands += [["student", stage, str(path), *level] for stage in ("init", "prepare", "train", "evaluate")]
    tree = yaml.safe_load(base.read_text(encoding="utf-8"))
    for change in changes:
        apply_override(tree, change)
    path.parent.mkdir(parents=True, exist_ok=True)
    head = f"# {script} over {base}, by `student migrate`, which writes it anew: copy it before you edit it.\n"
    write_text(path, head + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
    logger.info("%s is %s with %s", path, base, ", ".join(changes))
    for command in commands:
        print(shlex.join(command), flush=True)
        if start and (code := _run(command)):
            return code
    return 0


def read_script(script: Path) -> dict[str, Setting]:
    """The settings of `NAMES` that the script assigns, and `--log_level`.

    Raises:
        ConfigError: if it cannot be read, or sets one of them as only a shell understands, or to two values.
    """
    try:
        lines = script.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the script {script}: {error}; pass the older run_fine_tuning.sh") from error
    found: dict[str, Setting] = {}
    unknown: list[str] = []
    for number, line in enumerate(lines, 1):
        place, words = f"{script}, line {number}", _words(line)
        if not words or words[0] in ("echo", "printf"):
            continue
        if level := _LOG_LEVEL.search(line):
            words.append(f"--log_level={level[1]}")
        names = _ASSIGNMENT.findall(line)
        pairs = [word.partition("=") for word in (words[1:] if words[0] == "export" else words)]
        if not set(names) & set(NAMES):
            unknown += [name for name, _, _ in pairs if name in names]
            pairs = [pair for pair in pairs if level and pair[0] == "--log_level"][-1:]
        elif line[0].isspace() or any(name not in names for name, _, _ in pairs):
            pairs = [(next(name for name in names if name in NAMES), "=", "$")]
        for name, _, value in pairs:
            if _FOR_A_SHELL.search(value):
                raise ConfigError(
                    f"{place}: cannot tell {name} from {line!r}, because the script is not run; write its value as a "
                    f"plain {name}=value on a line of its own, not indented"
                )
            if found.setdefault(name, Setting(value, place)).value != value:
                raise ConfigError(
                    f"{place}: {name} is {value!r}, in {found[name].place} {found[name].value!r}; keep one of the two"
                )
    if unknown:
        logger.warning("%s: left out, see to it in the config: %s", script, ", ".join(dict.fromkeys(unknown)))
    return found


def _words(line: str) -> list[str]:
    """The line's words without quotes and comments; all of it as one word where it goes on in the next."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        return list(lexer)
    except ValueError:
        return [line]


def _required(settings: dict[str, Setting], name: str, script: Path) -> Setting:
    if name not in settings or not settings[name].value:
        raise ConfigError(f"{script} sets no {name}; add the line {name}=value")
    return settings[name]


def _check_first_entry(config: PipelineConfig, file: Path, further: Sequence[str]) -> None:
    """Refuse now what would end the training's start, or its test, as far as one entry of the file shows it."""
    where, value = next(read_entries(file))
    entry = checked(Entry, value, where, DatasetError, ENTRY_EXAMPLE)
    loss = resolve_loss(config.train, entry.logits is not None).name
    options = {option.partition("=")[0] for option in further}
    if config.train.objectives.blocks and entry.sampling is None and "--temperature" not in options:
        raise ConfigError(
            f"{where} does not say how its response was decoded, which `student evaluate` needs: add `-- --temperature "
            "0` if greedily, or `--set evaluate.rule=sample -- --temperature 1` if by sampling"
        )
    if loss != "ce" and (entry.tokenID or entry.token) and entry.tail is None and "--values" not in options:
        raise ConfigError(
            f"{where} has logits of its candidates alone, so the probability of all others is unknown, and train.loss "
            f"{loss!r} cannot use it: add `-- --values logprobs` if they are log probabilities, else set LOSS_TYPE=ce"
        )


def import_options(config: PipelineConfig, further: Sequence[str]) -> list[str]:
    """What the config says of the import, and then `further`, of which the last word counts.

    Raises:
        ConfigError: if the teacher's tokenizer is not on this machine.
    """
    options = [f"--held-out={config.collect.held_out}"]
    for key, value in config.collect.template_arguments.items():
        options.append(f"--template-argument={key}={json.dumps(value)}")
    if not any(option.startswith("--tokenizer") for option in further):
        if not Path(config.teacher.model).is_dir():
            raise ConfigError(
                f"teacher.model {config.teacher.model} is no directory here, and the import needs the tokenizer that "
                f"the file was made with: add `-- --tokenizer DIR` (`hf download {config.teacher.model} --include "
                "'tokenizer*' --local-dir DIR` brings one)"
            )
        options.append(f"--tokenizer={config.teacher.model}")
    return [*options, *further]


def _run(command: Sequence[str]) -> int:
    """Run a command of ours, passing a scheduler's signals on. Returns its exit code."""
    process = subprocess.Popen([sys.executable, "-m", _MODULES[command[0]], *command[1:]])
    for number in SIGNALS:
        signal.signal(number, lambda received, _: process.send_signal(received))
    signal.signal(signal.SIGINT, lambda *_: None)  # a terminal sends it to the command as well
    return process.wait()
