"""The recipes of configs/launch and configs/containers.

Slurm's and Kubernetes' words are known ones with sensible values, our own commands parse and name what is there, and
the training script is run as Slurm runs it, with a stand-in for `student`: tasks that are signaled, and a requeue that
is asked for.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from shared.config import PipelineConfig, load_config
from shared.errors import USER_ERROR_EXIT_CODE
from shared.stopping import REQUEUE_EXIT_CODE
from tests.fixtures.ranks import wait_for_lines
from tests.test_house import PACKAGES, ROOT
from tests.test_readme import APPS, TARGETS, check_command, check_make

LAUNCH = ROOT / "configs" / "launch"
DOCKERFILE = ROOT / "configs" / "containers" / "Dockerfile"
SCRIPTS = sorted(LAUNCH.glob("*.sbatch"))
CONFIG = "configs/llama-3.3-70b.yaml"
LAUNCHERS = {"srun", "ranks", "torchrun", "deepspeed"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SBATCH_OPTIONS = {
    "array": r"\d+-\d+",
    "cpus-per-task": r"\d+",
    "gpus-per-node": r"\d+",
    "gpus-per-task": r"\d+",
    "job-name": r"[a-z-]+",
    "nodes": r"\d+",
    "ntasks": r"\d+",
    "ntasks-per-node": r"\d+",
    "open-mode": r"append",
    "output": r"slurm-%(j|A-%a)\.log",
    "requeue": r"",
    "signal": r"(B:)?USR1@\d+",
    "time": r"\d+:\d\d:\d\d",
}


def simple_commands(text: str) -> Iterator[list[str]]:
    """The commands of shell text as words, without comments; variables but "$config" are 0."""
    for line in text.replace("\\\n", " ").splitlines():
        line = line.replace('"$config"', CONFIG).replace('"$@"', "")
        words: list[str] = []
        lexer = shlex.shlex(re.sub(r"\$(\w+|\{[^}]*\})", "0", line), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        for word in [*lexer, ";"]:
            if set(word) <= set("();<>|&"):
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def our_commands(text: str) -> list[list[str]]:
    """Of those, the ones that start a program of ours or `make`, themselves or by a launcher."""
    found = []
    for words in simple_commands(text):
        names = [word.removesuffix(".cli") for word in words]
        starts = [i for i, name in enumerate(names) if name in {*APPS, "make"} and (i == 0 or names[0] in LAUNCHERS)]
        found += [[names[i], *words[i + 1 :]] for i in starts[:1]]
    return found


def check(words: list[str]) -> None:
    """Fails where the command would be refused, and where its config is not there or cannot be loaded."""
    program, *arguments = words
    if program == "make":
        check_make(arguments)
    else:
        check_command(program, arguments, whole=True)


def sbatch_options(text: str) -> dict[str, str]:
    options = re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE)
    assert len(options) == text.count("\n#SBATCH"), "an option that is not of the form --name=value"
    return dict(options)


def gpus_of_an_engine(config: PipelineConfig) -> int:
    return config.teacher.tensor_parallel * config.teacher.pipeline_parallel * config.teacher.data_parallel


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_batch_script_says_what_bash_and_slurm_understand(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    usage = re.findall(rf"^#   sbatch (--.*) configs/launch/{script.name} (\S+)$", text, re.MULTILINE)
    assert len(usage) == 1, "the head shows the line that submits it"
    load_config(ROOT / usage[0][1])
    options = sbatch_options(text)
    submitted = dict(word.removeprefix("--").split("=") for word in usage[0][0].split())
    for name, value in [*options.items(), *submitted.items()]:
        assert re.fullmatch(SBATCH_OPTIONS[name], value), (name, value)
    # Stopped before its time limit, it asks to be requeued, and the log of before is kept.
    assert {"signal", "requeue", "open-mode"} <= options.keys()
    assert f"-eq {REQUEUE_EXIT_CODE} ]" in text
    assert "scontrol requeue" in text
    # A signal reaches the tasks of steps, or the script alone, which then has to hand it on.
    assert ("trap " in text) == options["signal"].startswith("B:")
    assert "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK" in text
    gpus = int(options.get("gpus-per-task") or options["gpus-per-node"])
    if script.name.startswith("collect"):
        assert gpus >= gpus_of_an_engine(load_config(ROOT / CONFIG))
    else:
        assert options["ntasks-per-node"] == options["gpus-per-node"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_commands_of_a_batch_script_parse(script: Path) -> None:
    commands = our_commands(script.read_text())
    assert commands
    for words in commands:
        check(words)


def test_the_training_script_does_what_make_train_does() -> None:
    script = our_commands((LAUNCH / "train.sbatch").read_text())
    recipe = (ROOT / "Makefile").read_text().partition("\ntrain: setup")[2].partition("\n\n")[0]
    assert [words[1] for words in script] == re.findall(r"@student (\w+)", recipe)


def manifests(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((LAUNCH / f"{name}-kubernetes.yaml").read_text()))


def containers_of(job: dict[str, Any]) -> list[dict[str, Any]]:
    pod = job["spec"]["template"]["spec"]
    return [*pod.get("initContainers", []), *pod["containers"]]


@pytest.mark.parametrize("name", ["collect", "train"])
def test_a_manifest_is_one_that_kubernetes_accepts_and_its_commands_parse(name: str) -> None:
    for manifest in manifests(name):
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
        for container in containers_of(manifest) if manifest["kind"] == "Job" else ():
            image, _, stage = container["image"].partition(":")
            assert image == PROJECT["name"]
            check([*entry_point(stage), *container["args"]])
            volumes = {volume["name"] for volume in manifest["spec"]["template"]["spec"]["volumes"]}
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


def test_a_job_of_kubernetes_tells_a_stop_and_a_mistake_from_a_failure() -> None:
    config = load_config(ROOT / CONFIG)
    collect, train = manifests("collect")[0], manifests("train")[-1]
    for job in (collect, train):
        rules = job["spec"]["podFailurePolicy"]["rules"]
        actions = {code: rule["action"] for rule in rules for code in rule.get("onExitCodes", {}).get("values", [])}
        assert actions == {REQUEUE_EXIT_CODE: "Ignore", USER_ERROR_EXIT_CODE: "FailJob"}
    assert train["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > config.train.grace_seconds
    assert containers_of(collect)[0]["resources"]["limits"]["nvidia.com/gpu"] >= gpus_of_an_engine(config)


def test_the_pods_of_a_training_find_one_another() -> None:
    _, service, job = manifests("train")
    spec = job["spec"]
    for container in containers_of(job):
        variables = {variable["name"]: variable.get("value") for variable in container["env"]}
        assert int(variables["PET_NNODES"]) == spec["completions"] == spec["parallelism"]
        assert variables["PET_MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}


def stages() -> dict[str, list[tuple[str, str]]]:
    """Stage of the Dockerfile → its instructions, those of the stage that it is from included."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, list[tuple[str, str]]] = {}
    for instruction, value in re.findall(r"^([A-Z]+) (.*)$", text, re.MULTILINE):
        if instruction == "FROM":
            source, _, name = value.split()
            found[name] = list(found.get(source, []))
        found[name].append((instruction, value))
    return found


def entry_point(stage: str) -> list[str]:
    return next(
        yaml.safe_load(value) for instruction, value in reversed(stages()[stage]) if instruction == "ENTRYPOINT"
    )


def test_hadolint_finds_nothing() -> None:
    subprocess.run([Path(sys.executable).parent / "hadolint", DOCKERFILE], check=True)


@pytest.mark.parametrize("stage", ["teacher", "student", "demo"])
def test_an_image_is_set_up_by_make_and_runs_our_command_as_no_root(stage: str) -> None:
    instructions = stages()[stage]
    assert re.fullmatch(r"python:3\.\d+-slim-\w+ AS base", instructions[0][1])
    extras = next(value.removeprefix("EXTRAS=") for name, value in instructions if value.startswith("EXTRAS="))
    assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()
    setup = next(value for name, value in instructions if name == "RUN" and " make setup " in value).split(" make ")[1]
    dry = ["make", "--dry-run", "--always-make", *setup.split()]
    says = subprocess.check_output(dry, cwd=ROOT, env=os.environ | {"EXTRAS": extras}, text=True)
    assert f"constraints-{'cpu' if stage == 'demo' else 'cuda'}.txt" in says
    assert f"--editable '.[{extras}]'" in says
    # A number: Kubernetes cannot tell whether a name is root's.
    assert next(value for name, value in reversed(instructions) if name == "USER") == "1000"
    assert entry_point(stage)[0] in {*PROJECT["scripts"], "make"}
    assert stage != "demo" or set(yaml.safe_load(instructions[-1][1])) <= TARGETS.keys()


def test_what_make_setup_needs_is_copied_into_the_images() -> None:
    assert ("COPY", ". .") in stages()["base"]
    ignored = (ROOT / ".dockerignore").read_text().split()
    needed = ["Makefile", "README.md", "pyproject.toml", *PACKAGES, "configs"]
    needed += ["constraints-cpu.txt", "constraints-cuda.txt"]
    assert not [(name, pattern) for name in needed for pattern in ignored if fnmatch.fnmatch(name, pattern)]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_an_image_is_built_where_there_is_a_builder() -> None:
    """The demo's: it needs no GPU to be run."""
    there = [name for name in ("docker", "podman") if shutil.which(name)]
    works = [name for name in there if subprocess.run([name, "info"], capture_output=True).returncode == 0]
    if not works:
        pytest.skip("neither docker nor podman works here")
    tag = f"{PROJECT['name']}:test"
    build = [works[0], "build", "--file", str(DOCKERFILE), "--target", "demo", "--tag", tag, str(ROOT)]
    subprocess.run(build, check=True)
    printed = subprocess.run([works[0], "run", "--rm", tag, "help"], capture_output=True, text=True, check=True)
    assert "collect-logits" in printed.stdout


SRUN = """#!/bin/bash
# Starts the two tasks of a step, and ends with the highest of their codes, as srun does.
while [[ $1 == --* ]]; do shift; done
for rank in 0 1; do
    "$@" &
    tasks+=($!)
done
highest=0
for task in "${tasks[@]}"; do
    wait "$task"
    code=$?
    ((code > highest)) && highest=$code
done
exit $highest
"""
STUDENT = """#!/bin/bash
# Notes the stage. Training ends with $TRAINING, or when it is signaled, with 75.
echo "$1" >>"$STAGES"
[ "$1" = train ] || exit 0
trap 'exit 75' USR1
echo $$ >>"$TASKS"
[ -z "$TRAINING" ] || exit "$TRAINING"
while true; do sleep 0.05; done
"""


@pytest.mark.parametrize(("training", "after"), [("", "requeue"), ("0", "evaluate"), ("2", "")])
def test_the_training_script_requeues_what_was_stopped_and_nothing_else(
    tmp_path: Path, training: str, after: str
) -> None:
    """A signal as with `--signal=USR1@…`: every task of the step gets it, neither the script nor srun does."""
    programs = {"srun": SRUN, "student": STUDENT, "scontrol": '#!/bin/bash\necho "$@" >>"$REQUEUED"\n'}
    for name, program in programs.items():
        (tmp_path / name).write_text(program)
        (tmp_path / name).chmod(0o755)
    files = {name: tmp_path / name.lower() for name in ("TASKS", "STAGES", "REQUEUED")}
    environment = os.environ | {name: str(path) for name, path in files.items()}
    environment |= {"PATH": os.pathsep.join([str(tmp_path), os.environ["PATH"]]), "TRAINING": training}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "1"}
    with subprocess.Popen(["bash", LAUNCH / "train.sbatch", CONFIG], cwd=ROOT, env=environment) as job:
        if not training:
            wait_for_lines(files["TASKS"], 2, job)
            for task in files["TASKS"].read_text().split():
                os.kill(int(task), signal.SIGUSR1)
        code = job.wait(timeout=60)
    assert code == (int(training) if training else REQUEUE_EXIT_CODE)
    stages = ["init", "prepare", "train", "train", *["evaluate"] * 2 * (after == "evaluate")]
    assert files["STAGES"].read_text().split() == stages
    assert files["REQUEUED"].exists() == (after == "requeue")
    assert after != "requeue" or files["REQUEUED"].read_text() == "requeue 7\n"
