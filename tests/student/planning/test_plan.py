"""`student plan` as its user runs it: tables, refusals, JSON, with no network and no weights."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import psutil
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from shared.config import PipelineConfig, load_config
from shared.errors import ConfigError
from student.alignment.prepare import prepare
from student.alignment.prepared import INDEX
from student.cli import app
from student.model.initialize import initialize_student
from student.planning import fit
from student.planning.cost import data_of
from student.planning.fit import require_memory
from student.planning.memory import GIB
from student.planning.plan import Assumptions, Plan, plan
from tests.fixtures.toy_run import toy_config, write_toy_shards

FULL = Path("configs/llama-3.3-70b.yaml")
SEQUENTIAL_HEAD = 3 * 256 * 4096
LLADA_8B = 8_015_581_184 + SEQUENTIAL_HEAD


def planned(path: Path, *overrides: str, **assumed: Any) -> Plan:
    return plan(load_config(path, list(overrides)), Assumptions(**{"gpu_gib": 80, "gpus": 8} | assumed))


@pytest.mark.parametrize(
    ("name", "gpus", "parameters"),
    [
        ("llama-3.3-70b", 8, LLADA_8B),
        ("llama-3.3-70b-lora", 1, LLADA_8B),
        ("llama-3.3-70b-pruned", 8, 2_780_893_184 + SEQUENTIAL_HEAD),
    ],
)
def test_the_production_configs_fit(name: str, gpus: int, parameters: int) -> None:
    found = planned(Path("configs") / f"{name}.yaml", gpus=gpus)
    assert found.setup.parameters.saved == parameters
    found.require_fit()
    assert found.memory.needed < 0.9 * 80 * GIB


def test_deepspeed_settings_may_repeat_what_follows_from_the_train_section() -> None:
    zero = "zero_optimization: {stage: 2}"
    stated = planned(FULL, f"train.deepspeed={{gradient_accumulation_steps: 32, train_batch_size: 256, {zero}}}")
    assert stated.memory == planned(FULL, f"train.deepspeed={{{zero}}}").memory


def test_time_and_traffic_by_hand() -> None:
    """Of the full config: ZeRO-2 all-reduces after each of 32 micro-batches and gathers the weights once."""
    found = planned(FULL)
    weights = 2 * LLADA_8B
    assert found.setup.accumulation == 32
    assert found.wire == pytest.approx((32 * 2 * 7 / 8 * weights, 7 / 8 * weights))
    tokens, supervised, matrices = 4352, 256, 32 * (4 * 4096**2 + 3 * 4096 * 12288)
    forward = tokens * (2 * matrices + 32 * 4 * 4096 * 2048)
    forward -= 2 * (tokens - supervised) * (4096**2 + 3 * 4096 * 12288)  # of the last block
    head = supervised * 2 * 126464 * 4096
    assert found.compute_s == pytest.approx(32 * 3 * (forward + head) / (989e12 * 0.4))
    assert found.step_s == pytest.approx(found.compute_s + 7 / 8 * weights / 450e9)
    zero3 = planned(FULL, "train.deepspeed=configs/deepspeed/zero3.json")
    assert zero3.wire == pytest.approx((32 * 3 * 7 / 8 * weights, 0))
    assert found.checkpoint_bytes == 14 * LLADA_8B


def test_checkpointing_costs_a_forward_and_gives_memory() -> None:
    kept, again = planned(FULL), planned(FULL, "train.activation_checkpointing=true")
    assert again.compute_s / kept.compute_s == pytest.approx(4 / 3, rel=0.01)
    assert again.memory.needed < 0.7 * kept.memory.needed


def test_what_does_not_fit_is_refused_with_what_does() -> None:
    with pytest.raises(ConfigError) as refused:
        planned(FULL, "train.micro_batch=2").require_fit()
    message = str(refused.value)
    assert message.startswith("does not fit: a rank needs 90.6 GiB of 80.0 GiB, most of it in the backward")
    assert "(activations 50.1 GiB); any of these fits: train.activation_checkpointing: true (39.8 GiB)" in message
    planned(FULL, "train.micro_batch=2", "train.activation_checkpointing=true").require_fit()
    assert "train.micro_batch: 1 (64.0 GiB)" in message
    with pytest.raises(ConfigError, match=r"optimizer 89.6 GiB.*student\.lora: {} \(.*4 GPUs"):
        planned(FULL, gpus=1).require_fit()
    # Settings that stand in the config are named, not repeated.
    in_place = "train.deepspeed={zero_optimization: {stage: 1}}"
    with pytest.raises(ConfigError, match=r"ZeRO stage 2 in train\.deepspeed \("):
        planned(FULL, in_place).require_fit()
    # A sum of changes where no single one is enough, and nothing where nothing is.
    with pytest.raises(ConfigError, match=r"fits: train\.activation_checkpointing: true with ZeRO stage 3"):
        planned(FULL, gpu_gib=30).require_fit()
    with pytest.raises(ConfigError, match="nothing tried here fits: take more or larger GPUs"):
        planned(FULL, gpu_gib=2).require_fit()


def test_steps_and_hours_follow_from_the_data(tmp_path: Path) -> None:
    """Of the dataset before it is prepared, of the prepared samples afterwards."""
    path = toy_config(tmp_path)
    config = load_config(path, ["train.steps=null", "train.epochs=2"])
    empty = plan(config, Assumptions(gpus=1))
    assert (empty.data, empty.steps, empty.hours) == (None, None, None)
    write_toy_shards(config, train=40)
    of_shards = data_of(config)
    assert of_shards is not None
    assert of_shards.samples == 40
    assert "prompts not counted" in of_shards.source
    initialize_student(config)
    prepare(config)
    found = plan(config, Assumptions(gpus=1))
    assert found.data is not None
    assert found.data.samples == 40
    assert found.shape_source == str(config.student_init_dir)
    rows = 40 * (found.data.clean_tokens + found.data.masked_tokens) / 256
    assert found.steps == -(-int(2 * rows) // config.train.global_batch)
    assert found.hours == pytest.approx(found.steps * found.step_s / 3600)


def test_prepared_data_without_training_samples_say_nothing_of_steps(tmp_path: Path) -> None:
    config = load_config(toy_config(tmp_path))
    write_toy_shards(config, train=4)
    initialize_student(config)
    prepare(config)
    manifest, index = config.prepared_dir / "manifest.json", config.prepared_dir / INDEX
    table = pq.read_table(index)
    pq.write_table(table.filter(pc.equal(table["split"], "held_out")), index)
    tree = json.loads(manifest.read_text()) | {"index_sha256": hashlib.sha256(index.read_bytes()).hexdigest()}
    manifest.write_text(json.dumps(tree))
    found = plan(load_config(tmp_path / "toy.yaml", ["train.steps=null", "train.epochs=1"]), Assumptions(gpus=1))
    assert (found.data, found.steps, found.hours) == (None, None, None)


def test_ranks_that_cannot_share_a_step_are_refused_and_not_offered() -> None:
    with pytest.raises(ConfigError, match=r"train\.global_batch is 256, which 3 ranks cannot share evenly"):
        planned(FULL, gpus=3)
    with pytest.raises(ConfigError) as refused:
        planned(FULL, "train.global_batch=7", gpus=1).require_fit()
    assert " GPUs" not in str(refused.value)


def test_an_unknown_checkpoint_needs_a_shape() -> None:
    with pytest.raises(ConfigError, match="give --shape FILE"):
        planned(FULL, "student.checkpoint=nobody/no-such-model")
    shape = Path("configs/shapes/llada-8b-gqa-tied.yaml")
    found = planned(FULL, "student.checkpoint=nobody/no-such-model", shape=shape)
    assert found.setup.parameters.saved < 7e9
    assert found.shape_source == str(shape)


def test_the_command_prints_tables_or_json_and_refuses_with_code_2() -> None:
    arguments = ["plan", str(FULL), "--gpus", "8", "--gpu-gib", "80"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0
    for word in ("activations", "margin", "ZeRO-2", "sent by a rank", "checkpoint", "40% of 989 TFLOP/s"):
        assert word in shown.output
    printed = CliRunner().invoke(app, [*arguments, "--json"])
    tree = json.loads(printed.output[printed.output.index("{") :])
    assert tree["fits"]
    assert tree["parameters"]["saved"] == LLADA_8B
    assert tree["memory"]["needed"] < tree["memory"]["available"] == 80 * GIB
    refused = CliRunner().invoke(app, [*arguments, "--set", "train.micro_batch=4"])
    assert isinstance(refused.exception, ConfigError)  # exit code 2, by shared.console.run


@pytest.fixture
def toy(tmp_path: Path) -> PipelineConfig:
    config = load_config(toy_config(tmp_path))
    write_toy_shards(config, train=40)
    initialize_student(config)
    prepare(config)
    return config


def test_the_accumulation_that_follows_may_stand_in_the_deepspeed_file(toy: PipelineConfig) -> None:
    """4 rows of a step in forwards of 2, on one rank."""

    def with_accumulation(count: int) -> PipelineConfig:
        deepspeed = {"gradient_accumulation_steps": count, "zero_optimization": {"stage": 2}}
        return toy.model_copy(update={"train": toy.train.model_copy(update={"deepspeed": deepspeed})})

    assert plan(with_accumulation(2), Assumptions(gpus=1)).setup.accumulation == 2
    require_memory(with_accumulation(2), 1, 1)
    with pytest.raises(ConfigError, match="gradient_accumulation_steps is 2 there, 1 by"):
        plan(with_accumulation(2), Assumptions(gpus=2))
    with pytest.raises(ConfigError, match="gradient_accumulation_steps is 1 there, 2 by"):
        require_memory(with_accumulation(1), 1, 1)


def test_training_refuses_what_the_host_has_no_memory_for(toy: PipelineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded; all ranks of the node share what is free."""
    require_memory(toy, 2, 2)
    monkeypatch.setattr(fit, "host_bytes_free", lambda: GIB // 2)
    require_memory(toy, 1, 1)
    with pytest.raises(ConfigError) as refused:
        require_memory(toy, 2, 2)
    assert re.match(
        r"does not fit: each of 2 ranks on this machine needs 0\.3 GiB of 0\.2 GiB, most of it in the \w+ \(",
        str(refused.value),
    )
    assert "take a larger machine, or fewer ranks on it" in str(refused.value)


def test_free_memory_of_the_host_is_read() -> None:
    assert 0 < fit.host_bytes_free() <= psutil.virtual_memory().total
