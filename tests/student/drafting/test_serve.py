"""`student serve`: the command it prints is the one it runs, and an HTTP client gets the teacher's own words."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shared.config import dump_config
from shared.dataset.reader import Dataset
from shared.errors import CheckpointError
from student.cli import app
from student.drafting.serve import serve, server_command
from student.drafting.speculate import held_out_prompts
from tests.fixtures.served_run import BLOCK, pipeline
from tests.test_house import ROOT
from tests.test_readme import blocks


def test_the_command_is_printed(served_run: Path, served_teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = pipeline(served_run, served_teacher)
    assert serve(config, ["--port", "8001"]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[:2] == ["env", "PROMETHEUS_MULTIPROC_DIR=$(mktemp -d)"]
    assert words[-2:] == ["--port", "8001"]
    assert str(served_teacher) in words
    student = str(config.student_final_dir)
    assert json.loads(words[words.index("--additional-config") + 1])["llada_drafter"]["student"] == student
    speculation = json.loads(words[words.index("--speculative-config") + 1])
    assert speculation["num_speculative_tokens"] == 3
    # A config that was edited since does not change what the student was trained on.
    edited = pipeline(served_run, served_teacher, train={"block_length": BLOCK + 3})
    for made in (config, edited):
        words = server_command(made, student)
        assert json.loads(words[words.index("--additional-config") + 1])["llada_drafter"]["block_length"] == BLOCK
    assert "--enforce-eager" in server_command(config, student)
    assert "--enable-prefix-caching" in server_command(config, student)
    without = config.model_copy(update={"teacher": config.teacher.model_copy(update={"prefix_caching": False})})
    assert "--no-enable-prefix-caching" in server_command(without, student)


@pytest.mark.parametrize("separator", [[], ["--"]])
def test_further_options_are_for_vllm(
    served_run: Path, served_teacher: Path, tmp_path: Path, separator: list[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(pipeline(served_run, served_teacher)))
    done = CliRunner().invoke(
        app, ["serve", str(path), "--set", "speculate.policy=false", *separator, "--port", "8001"]
    )
    assert shlex.split(done.stdout)[-2:] == ["--port", "8001"]
    assert '"policy": false' in done.stdout


def test_a_missing_student_is_said(served_run: Path, served_teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="run `make train`"):
        serve(pipeline(tmp_path / "none", served_teacher))
    with pytest.raises(CheckpointError, match="run `make collect-logits`"):
        serve(pipeline(served_run, tmp_path / "no" / "teacher"))


def ask(url: str, body: Any = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return str(response.read().decode())


@pytest.mark.slow
@pytest.mark.vllm
def test_an_http_client_gets_the_teachers_own_words(
    served_run: Path, served_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    config = pipeline(served_run, served_teacher, speculate={"policy": False})
    (tmp_path / "config.yaml").write_text(dump_config(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "student.cli", "serve", str(tmp_path / "config.yaml"), "--run"]
    command += ["--port", str(port), "--host", "127.0.0.1"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"})
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert server.poll() is None, (tmp_path / "log").read_text()[-4000:]
            try:
                ask(f"{url}/health")
                break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        model = AutoModelForCausalLM.from_pretrained(served_teacher, dtype=torch.float32)
        for prompt in list(held_out_prompts(Dataset.open(config.shards_dir), 3, 256).values()):
            body = {"model": str(served_teacher), "prompt": prompt, "max_tokens": 16, "temperature": 0}
            answer = json.loads(ask(f"{url}/v1/completions", body | {"return_token_ids": True}))["choices"][0]
            expected = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :]
            assert answer["token_ids"] == expected.tolist()
        (client,) = [body for _, body in blocks(ROOT / "README.md") if "OpenAI" in body]
        exec(client.replace("http://localhost:8123", url), {})
        assert capsys.readouterr().out.strip()
        metrics = ask(f"{url}/metrics")
        drafted = [line for line in metrics.splitlines() if line.startswith("llada_drafter_drafts_total{")]
        assert sum(float(line.split()[-1]) for line in drafted) > 0
        assert "vllm:spec_decode_num_drafts_total" in metrics
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
