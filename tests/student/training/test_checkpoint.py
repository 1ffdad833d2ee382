from __future__ import annotations

from pathlib import Path

import pytest

from shared.config import load_config
from shared.errors import CheckpointError
from student.training.checkpoint import require_same_run, resume, run_identity

DEMO = Path("configs/demo.yaml")


def test_what_does_not_change_the_result_does_not_change_the_identity() -> None:
    plain = run_identity(load_config(DEMO), {"prepared data": "abc"}, 2)
    assert (
        run_identity(
            load_config(DEMO, ["train.checkpoint_steps=7", "train.keep_checkpoints=9"]), {"prepared data": "abc"}, 2
        )
        == plain
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [("train.learning_rate=1.0", r"train.learning_rate: .* there, 1.0 now"), ("seed=5", "seed: 0 there, 5 now")],
)
def test_another_run_is_refused_with_both_values(override: str, message: str) -> None:
    found = run_identity(load_config(DEMO), {"prepared data": "abc"}, 2)
    with pytest.raises(CheckpointError, match=message):
        require_same_run(found, run_identity(load_config(DEMO, [override]), {"prepared data": "abc"}, 2), Path("x"))


def test_other_data_and_another_number_of_ranks_are_other_runs() -> None:
    found = run_identity(load_config(DEMO), {"prepared data": "abc"}, 2)
    with pytest.raises(CheckpointError, match=r"prepared data: 'abc' there, 'xyz' now; ranks: 2 there, 4 now"):
        require_same_run(found, run_identity(load_config(DEMO), {"prepared data": "xyz"}, 4), Path("x"))


@pytest.mark.parametrize("tag", ["../step-1", "/tmp/step-1", "step-1/../..", "", "global_step1"])
def test_a_marker_that_leads_elsewhere_is_refused(tmp_path: Path, tag: str) -> None:
    (tmp_path / "latest").write_text(tag)
    with pytest.raises(
        CheckpointError, match=r"latest names '.*', expected step-NUMBER, a checkpoint in this directory"
    ):
        resume(None, tmp_path, {})
