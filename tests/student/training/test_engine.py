from __future__ import annotations

import json
from pathlib import Path

import pytest

from shared.config import TrainConfig
from shared.errors import ConfigError
from student.training.engine import deepspeed_config


def config(path: Path) -> TrainConfig:
    return TrainConfig(steps=1, micro_batch=3, grad_clip=0.7, dtype="bfloat16", deepspeed=path)


def test_the_train_section_fills_in_what_follows_from_it(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    assert deepspeed_config(config(path), accumulation=5) == {
        "zero_optimization": {"stage": 1},
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 5,
        "gradient_clipping": 0.7,
        "bf16": {"enabled": True},
    }


@pytest.mark.parametrize("name", ["zero2.json", "zero3.json"])
def test_the_files_that_ship_are_accepted(name: str) -> None:
    assert "zero_optimization" in deepspeed_config(config(Path("configs/deepspeed") / name), 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"bf16": {"enabled": false}, "gradient_clipping": 1}', "sets gradient_clipping, bf16, which follow"),
        ("{", "is not JSON"),
        (None, "cannot read"),
    ],
)
def test_a_bad_file_gets_one_message(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "zero.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        deepspeed_config(config(path), 1)
