"""`student evaluate`: on ranks as on one, on its device, within memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shared.config import load_config
from shared.errors import DatasetError
from shared.files import write_json
from student.alignment.prepare import prepare
from student.data.batch import collate
from student.data.blocks import lay_out
from student.evaluation.evaluate import RESULT, answers, evaluate, outstanding
from student.evaluation.measure import HeldOut, _rejection_sampling, drafter_of
from student.lineage import evaluation_identity
from student.losses.settings import LossSettings
from student.model.export import load_student
from student.model.initialize import initialize_student
from student.model.modeling_llada import LladaForMaskedDiffusion
from student.training.module import DistillationModule
from tests.fixtures.aligned_samples import make_sample
from tests.fixtures.tiny_model import MASK, tiny_config, tiny_model
from tests.fixtures.toy_run import toy_config, write_toy_shards


@pytest.mark.slow
@pytest.mark.usefixtures("warm_training")
def test_two_ranks_measure_what_one_does(tmp_path: Path) -> None:
    path = toy_config(tmp_path)
    overrides = ["train.steps=6", "train.objectives.random_masking=0.5"]
    config = load_config(path, overrides)
    write_toy_shards(config, held_out=7)
    initialize_student(config)
    prepare(config)

    def student(command: str, *more: str) -> str:
        options = [word for override in [*overrides, *more] for word in ("--set", override)]
        arguments = [sys.executable, "-m", "student.cli", command, str(path), *options]
        done = subprocess.run(arguments, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
        return " ".join(done.stderr.split())

    student("train")
    alone = evaluate(config)
    result = config.run_dir / RESULT
    result.unlink()
    student("evaluate", "train.world_size=2")
    together = json.loads(result.read_text())
    assert len(together["answers"]) == 3
    assert together["answers"] == alone["answers"]
    for name in ("before", "after"):
        assert flat(together[name]) == pytest.approx(flat(alone[name]), rel=1e-5)
    assert "already evaluated" in student("evaluate", "train.world_size=2"), "no rank is started for nothing"


def test_prompts_that_are_too_long_for_the_student_do_not_end_the_evaluation(tmp_path: Path) -> None:
    """The teacher may take longer ones. A row of such a sample would not fit into any micro-batch."""
    config = load_config(toy_config(tmp_path), ["train.objectives.random_masking=0.5"])
    write_toy_shards(config, train=8, held_out=7)
    initialize_student(config)
    prepare(config)
    all_of_them = HeldOut.open(config)
    lengths = all_of_them.prepared.prompt_lengths[all_of_them.masked]
    longest = int(lengths.max())
    overrides = ["train.objectives.random_masking=0.5", f"train.max_sequence_tokens={longest}"]
    held_out = HeldOut.open(load_config(toy_config(tmp_path), overrides))
    assert held_out.masked.tolist() == all_of_them.masked[lengths < longest].tolist() != []
    shortest = int(lengths.min())
    overrides = ["train.objectives={blocks: 0, random_masking: 1}", f"train.max_sequence_tokens={shortest}"]
    with pytest.raises(DatasetError, match="leaves no room"):
        HeldOut.open(load_config(toy_config(tmp_path), overrides))

    model, tokenizer = load_student(config.student_init_dir)
    model.config.max_sequence_length = shortest
    drafting = {"keep_extendable": True, "denoising_steps": 2, "draft_vocabulary": 7, "memory_gib": 1e-6}
    overrides = [f"speculate.drafter={json.dumps(drafting)}", "speculate.max_context_tokens=9"]
    served = HeldOut.open(load_config(toy_config(tmp_path), overrides))
    drafter = drafter_of(served, model, config.student_init_dir)
    assert drafter is not None
    assert drafter.keep_extendable
    assert drafter.forward.denoising.steps == 2
    assert drafter.forward.max_tokens == 9
    (shown,) = answers(held_out, held_out.some(1), model.eval(), tokenizer, config.student_init_dir, None)
    assert "exceed the model's max_sequence_length" in shown["student"]


@pytest.mark.parametrize("identity", [{}, None, "without the drafter's options"])
def test_a_result_that_does_not_say_what_it_was_measured_on_is_measured_again(tmp_path: Path, identity: Any) -> None:
    config = load_config(toy_config(tmp_path))
    write_toy_shards(config, train=8, held_out=7)
    initialize_student(config)
    prepare(config)
    shutil.copytree(config.student_init_dir, config.student_final_dir)
    made = evaluation_identity(config)
    result = {"before": {}, "after": {}, "identity": made}
    write_json(config.run_dir / RESULT, result)
    assert outstanding(config).students == ()
    if identity:
        identity = {key: value for key, value in made.items() if key != "speculate.drafter"}
    write_json(config.run_dir / RESULT, result | {"identity": identity})
    assert outstanding(config).students == ("before", "after")


def flat(tree: Any, name: str = "") -> dict[str, float]:
    """Every number of nested figures by its path."""
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {key: value for k, entry in items for key, value in flat(entry, f"{name}.{k}").items()}
    return {} if tree is None else {name: tree}


def test_nothing_of_a_measured_forward_is_left_off_the_device() -> None:
    """A tensor that stayed on the CPU beside a model on the meta device raises."""
    with torch.device("meta"):
        model = LladaForMaskedDiffusion(tiny_config())
    module = DistillationModule(model, LossSettings(loss="kl", block_length=4))
    sample = make_sample("a", 5, 20, vocabulary=100)
    row = lay_out(sample, np.arange(0, 16, 4), 4, MASK)
    batch = collate([[(sample, row)]], pad_id=0).to(model.device)
    assert module.hidden_states(batch).device.type == "meta"
    assert all(tensor.device.type == "meta" for tensor in (batch.targets.members, batch.targets.event_mass))


def test_only_what_training_would_keep_is_measured(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Prompts of 22 to 24 tokens, where a block of one ends within 23."""
    overrides = ["train.objectives.random_masking=1", "train.block_length=1", "train.max_sequence_tokens=23"]
    config = load_config(toy_config(tmp_path), overrides)
    write_toy_shards(config, train=24, held_out=12)
    initialize_student(config)
    prepare(config)
    held_out = HeldOut.open(config)
    lengths = held_out.prepared.prompt_lengths
    kept = held_out.prepared.indices(split="held_out")
    kept = kept[lengths[kept] <= 22]
    assert 0 < len(kept) < 24
    assert held_out.masked.tolist() == kept.tolist()
    assert set(held_out.sampled.tolist()) < set(kept.tolist())
    assert f"{24 - len(kept)} of 24 held-out samples are left out: their prompts leave no room" in caplog.text
    with pytest.raises(DatasetError, match=r"prompt has 22 student tokens, .* block of 1 in .* 22; raise it"):
        HeldOut.open(load_config(toy_config(tmp_path), [*overrides, "train.max_sequence_tokens=22"]))


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        tensors = made if isinstance(made, tuple | list) else (made,)
        sizes = [t.untyped_storage().nbytes() for t in tensors if isinstance(t, torch.Tensor)]
        self.bytes = max([self.bytes, *sizes])
        return made


@pytest.mark.slow
def test_nine_thousand_positions_stay_within_memory(tmp_path: Path) -> None:
    """A response of 600 tokens with a block of 16 at each: a slice of the logits is the largest thing that is made."""
    vocabulary = 20_000
    overrides = ["train.block_length=16", "train.max_sequence_tokens=640", "train.micro_batch=1"]
    config = load_config(toy_config(tmp_path), overrides)
    sample = make_sample("a", 10, 600, vocabulary=vocabulary - 1)
    held_out = HeldOut(config, None, [sample], {}, np.array([0]), np.array([], np.int64))  # type: ignore[arg-type]
    model = tiny_model(
        vocab_size=vocabulary, embedding_size=vocabulary, mask_token_id=vocabulary - 1, max_sequence_length=700
    )

    class Tokenizer:
        mask_token_id, pad_token_id = vocabulary - 1, 1

    with Largest() as largest:
        sums, (low, high, positions) = _rejection_sampling(held_out, model, Tokenizer, lambda _: None)
    assert sums is not None
    assert positions > 500
    assert low <= high
    assert 9000 * vocabulary * 4 > 256 << 20 >= largest.bytes
