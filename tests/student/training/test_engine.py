from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder

from shared.config import PipelineConfig, StudentConfig, TrainConfig
from shared.errors import ConfigError
from student.training import engine
from student.training.checkpoint import run_identity
from student.training.engine import deepspeed_config, require_gpu_build, require_nvme, training_dtype


def config(path: Path) -> TrainConfig:
    return TrainConfig(steps=1, global_batch=30, micro_batch=3, grad_clip=0.7, dtype="bfloat16", deepspeed=path)


def test_the_train_section_fills_in_what_follows_from_it(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    assert deepspeed_config(config(path), accumulation=5) == {
        "zero_optimization": {"stage": 1},
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 5,
        "gradient_clipping": 0.7,
        "bf16": {"enabled": True, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    }


def test_gradients_add_up_in_float32_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "bf16"}}))
    assert deepspeed_config(config(path), 1)["data_types"] == {"grad_accum_dtype": "bf16"}
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "checkpoint": {"tag_validation": "Fail"}}))
    assert deepspeed_config(config(path), 1, is_universal=True)["checkpoint"] == {
        "tag_validation": "Fail",
        "load_universal": True,
    }
    path.write_text("{}")  # without ZeRO DeepSpeed has no such mix
    assert "data_types" not in deepspeed_config(config(path), 1)


@pytest.mark.parametrize("name", ["zero1.json", "zero2.json", "zero3.json"])
def test_the_files_that_ship_are_accepted(name: str) -> None:
    assert "zero_optimization" in deepspeed_config(config(Path("configs/deepspeed") / name), 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"bf16": {"enabled": false}, "gradient_clipping": 1}',
            "gradient_clipping is 1 there, 0.7 by train.grad_clip; bf16.enabled is False there, True by train.dtype",
        ),
        (
            '{"optimizer": {"type": "Adam"}}',
            "optimizer is {'type': 'Adam'} there, None by train.optimizer, which makes",
        ),
        ('{"zero_optimization": {"stage": "two"}}', "zero.json: zero_optimization.stage is 'two': Input should be"),
        ('{"zero_optimization": {"stage": 4}}', "zero.json: zero_optimization.stage is 4: Input should be"),
        ('{"bf16": true}', "zero.json: bf16 is True, expected a mapping"),
        ("{", "is not JSON"),
        ("[]", "holds list, expected an object"),
        (None, "cannot read"),
    ],
)
def test_a_bad_file_gets_one_message(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "zero.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        deepspeed_config(config(path), 1)


def test_settings_in_place_may_repeat_the_train_section_and_stay_as_they_are(tmp_path: Path) -> None:
    settings = {
        "zero_optimization": {"stage": 1},
        "train_batch_size": 30,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 5,
        "gradient_clipping": 0.7,
        "bf16": {"enabled": True},
    }
    in_place = TrainConfig.model_validate(config(tmp_path).model_dump() | {"deepspeed": settings})
    made = deepspeed_config(in_place, accumulation=5)
    assert made["train_micro_batch_size_per_gpu"] == 3
    assert "train_batch_size" not in made  # DeepSpeed's own, of full micro-batches; "auto" is none of its numbers
    assert settings["bf16"] == {"enabled": True}
    with pytest.raises(
        ConfigError, match=r"^train.deepspeed contradicts .* gradient_accumulation_steps is 5 there, 10 by"
    ):
        deepspeed_config(in_place, accumulation=10)


def test_offload_and_muon_bring_settings_of_their_own() -> None:
    def made(optimizer: str, **zero: Any) -> dict[str, Any]:
        settings = {"zero_optimization": zero}
        return deepspeed_config(TrainConfig(steps=1, optimizer=optimizer, dtype="bfloat16", deepspeed=settings), 1)

    assert made("adamw", stage=2, offload_optimizer={"device": "cpu"})["zero_force_ds_cpu_optimizer"] is False
    assert made("adamw", stage=3)["gradient_clipping"] == 1.0
    assert made("muon", stage=3)["gradient_clipping"] == 0.0
    assert made("muon", stage=3)["zero_optimization"] == {"stage": 3, "reduce_scatter": False}
    with pytest.raises(ConfigError, match="reduce_scatter is True there, False by"):
        made("muon", stage=3, reduce_scatter=True)


@pytest.mark.parametrize(("capability", "dtype"), [("AVX512", "bfloat16"), ("AVX2", "float32"), ("DEFAULT", "float32")])
def test_auto_is_the_dtype_that_the_machine_is_fast_in(
    monkeypatch: pytest.MonkeyPatch, capability: str, dtype: str
) -> None:
    """And a checkpoint is of the dtype that was computed in, wherever it is resumed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert training_dtype(TrainConfig(steps=1)) == dtype
    assert training_dtype(TrainConfig(steps=1, dtype="bfloat16")) == "bfloat16"
    config = PipelineConfig.model_construct(train=TrainConfig(steps=1), student=StudentConfig(checkpoint="c"), seed=0)
    assert run_identity(config, {})["train.dtype"] == dtype


def test_what_cannot_be_offloaded_to_nvme_is_refused_with_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether libaio is here or not; DeepSpeed's own answer is taken in the end."""

    def settings(stage: int, device: str = "nvme", path: Path = tmp_path) -> dict[str, Any]:
        return {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": device, "nvme_path": str(path)}}}

    require_nvme(settings(2, device="cpu"))
    with pytest.raises(
        ConfigError, match=r"offload_optimizer\.device is nvme under ZeRO-2.*set stage 3, or device cpu"
    ):
        require_nvme(settings(2))
    with pytest.raises(ConfigError, match=r"nvme_path is .*none, expected a directory to write into"):
        require_nvme(settings(3, path=tmp_path / "none"))
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, **__: False)
    with pytest.raises(ConfigError, match=r"libaio is not here.*install libaio-dev .* or set device cpu"):
        require_nvme(settings(3))
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, **__: True)
    require_nvme(settings(3))
    assert "no test of this program has trained so" in caplog.text


def test_a_cpu_build_beside_gpus_is_refused_unless_they_are_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(engine, "DRIVERS_GPUS", tmp_path)
    require_gpu_build()
    (tmp_path / "0000:01:00.0").mkdir()
    with pytest.raises(ConfigError, match="is a CPU build: run `make setup` here"):
        require_gpu_build()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    require_gpu_build()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    require_gpu_build()


def test_a_world_of_one_listens_where_it_can() -> None:
    """Many runs that start at once would race for free ones."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        world["MASTER_PORT"] = str(taken.getsockname()[1])
        call = "from student.training.engine import initialize_process_group as join; print(join(with_deepspeed=False))"
        done = subprocess.run([sys.executable, "-c", call], env=os.environ | world, capture_output=True, text=True)
    assert done.stdout == "(0, 1)\n", done.stderr
