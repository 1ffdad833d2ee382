from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from shared.config import ObjectivesConfig, PipelineConfig, RandomMaskingConfig, TrainConfig, load_config
from student.alignment.prepare import prepare
from student.data.batch import MicroBatch
from student.data.blocks import choose_anchors, fitting_anchors, lay_out
from student.data.data_loader import TrainingDataLoader, most_tokens
from student.data.random_masking import randomly_masked
from student.model.initialize import initialize_student
from tests.fixtures.aligned_samples import make_sample
from tests.fixtures.toy_run import toy_config, write_toy_shards


@given(
    prompt=st.integers(1, 9),
    response=st.integers(1, 40),
    anchors=st.integers(1, 8),
    longest=st.integers(13, 30),
    copies=st.booleans(),
    end_tokens=st.integers(0, 5),
)
def test_a_visit_is_never_longer_than_the_index_says(
    prompt: int, response: int, anchors: int, longest: int, copies: bool, end_tokens: int
) -> None:
    sample = make_sample("a", prompt, response)
    masking = RandomMaskingConfig(complementary=copies, end_tokens=end_tokens)
    sizes = {"steps": 1, "anchors": anchors, "block_length": 4, "max_sequence_tokens": longest}
    train = TrainConfig(**sizes, objectives=ObjectivesConfig(random_masking=1), random_masking=masking)
    bound = most_tokens(np.array([prompt + response]), np.array([response]), train)[0]
    chosen = choose_anchors(fitting_anchors(sample, 4, longest), anchors, np.random.default_rng(0))
    assert len(lay_out(sample, chosen, 4, 99)) <= bound
    masked = randomly_masked(sample, masking, 0, 0, mask_id=99, end_id=98, max_sequence_tokens=longest)
    assert sum(len(row) for row in masked) <= bound
    assert bound <= train.packed_row_tokens


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    directory = tmp_path_factory.mktemp("toy")
    config = load_config(toy_config(directory), ["train.global_batch=4", "train.micro_batch=2", "train.steps=20"])
    write_toy_shards(config)
    initialize_student(config)
    prepare(config)
    return config


def batches(config: PipelineConfig, world_size: int = 1, **options: Any) -> list[Iterator[MicroBatch]]:
    loader = TrainingDataLoader.open(config, world_size)
    tokenizer = AutoTokenizer.from_pretrained(config.student_init_dir)
    return [loader.micro_batches(rank, tokenizer, **options) for rank in range(world_size)]


def same(a: MicroBatch, b: MicroBatch) -> bool:
    return a.sample_ids == b.sample_ids and torch.equal(a.input_ids, b.input_ids)


def test_batches_made_ahead_are_those_made_when_they_are_needed(toy: PipelineConfig) -> None:
    at_once, ahead = (
        toy.model_copy(update={"train": toy.train.model_copy(update={"data_workers": workers})}) for workers in (0, 1)
    )
    for a, b in zip(*batches(at_once), *batches(ahead), strict=True):
        assert same(a, b)


def test_a_run_that_goes_on_gets_the_batches_that_are_left(toy: PipelineConfig) -> None:
    whole, rest = list(*batches(toy)), list(*batches(toy, first_step=7))
    assert len(whole) == 20 * 2
    assert all(same(a, b) for a, b in zip(whole[14:], rest, strict=True))


def test_all_rows_have_one_length_and_every_sample_comes_once_in_an_epoch(toy: PipelineConfig) -> None:
    loader = TrainingDataLoader.open(toy, 2)
    rows = len(loader.sampler.epoch_rows(0))
    seen: Counter[str] = Counter()
    for of_rank in batches(toy, 2):
        for batch in of_rank:
            assert batch.input_ids.shape == (2, toy.train.packed_row_tokens)
            seen.update(batch.sample_ids)
    assert sum(seen.values()) >= 96
    assert set(seen.values()) <= {80 // rows, 80 // rows + 1}


def test_objectives_are_drawn_by_weight_and_kept_apart(toy: PipelineConfig) -> None:
    both = toy.train.model_copy(update={"objectives": ObjectivesConfig(blocks=3, random_masking=1)})
    mixed = list(*batches(toy.model_copy(update={"train": both})))
    depth = torch.cat([batch.targets.depth for batch in mixed])
    soft = torch.cat([batch.targets.has_soft for batch in mixed])
    documents = sum(len(batch.sample_ids) for batch in mixed)
    random = sum(
        int((batch.block_ids[batch.document_ids == number] > 0).all())
        for batch in mixed
        for number in range(int(batch.document_ids.max()) + 1)
    )
    assert 0 < random < documents / 2
    assert not soft[depth == 0].any(), "a token that sees to its right has no teacher's row"
    assert soft[depth > 0].any()


def test_damage_is_found_before_training_and_what_was_right_is_not_read_again(
    toy: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shared.dataset import storage
    from shared.errors import DatasetError
    from student.alignment import prepared

    assert (toy.prepared_dir / prepared.VERIFIED).exists()
    monkeypatch.setattr(storage, "_VERIFIED", set())  # as in another process
    monkeypatch.setattr(storage, "file_sha256", lambda path: pytest.fail(f"{path} was read again"))
    TrainingDataLoader.open(toy, 1)
    monkeypatch.undo()
    unit = next((toy.prepared_dir / "data").iterdir())
    whole = unit.read_bytes()
    unit.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DatasetError, match=rf"{unit.name}.*run `student prepare` again"):
        TrainingDataLoader.open(toy, 1)
    unit.write_bytes(whole)
