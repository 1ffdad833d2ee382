from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from shared.errors import ConfigError
from student.data.batch_sampler import BatchSampler, PackedRow
from student.data.packing import pack

LENGTHS = np.random.default_rng(1).integers(5, 90, 97)


def order(world_size: int = 1, micro_batch: int = 3, seed: int = 0, global_batch: int = 12) -> BatchSampler:
    return BatchSampler(LENGTHS, 128, seed, global_batch, micro_batch, world_size)


def numbers(rows: list[PackedRow]) -> list[list[int]]:
    return [row.samples.tolist() for row in rows]


@given(step=st.integers(0, 50), world_size=st.sampled_from([1, 2, 3, 4, 6, 12]), micro_batch=st.integers(1, 12))
def test_ranks_share_a_step_without_loss_or_overlap(step: int, world_size: int, micro_batch: int) -> None:
    expected = order().step_rows(step)
    dealt = order(world_size, micro_batch)
    parts = [dealt.micro_batches(step, rank) for rank in range(world_size)]
    assert {len(of_rank) for of_rank in parts} == {dealt.accumulation}, "ranks with unequal step counts hang"
    assert all(0 < len(part) <= micro_batch for of_rank in parts for part in of_rank)
    rows = [row for of_rank in parts for part in of_rank for row in part]
    assert sorted(numbers(rows)) == sorted(numbers(expected))


def test_every_epoch_visits_every_sample_once_across_its_border_with_the_next() -> None:
    sampler = order()
    rows = [row for step in range(3 * len(sampler.epoch_rows(0)) // 12 + 1) for row in sampler.step_rows(step)]
    for epoch in (0, 1, 2):
        visited = np.concatenate([row.samples for row in rows if row.epoch == epoch])
        assert sorted(visited) == list(range(97))
    assert len(sampler.epoch_rows(0)) % 12, "a step should reach over the border for this test to say anything"
    assert numbers([r for r in rows if r.epoch == 0]) != numbers([r for r in rows if r.epoch == 1])


def test_steps_and_epochs_are_counted_in_rows() -> None:
    sampler = order()
    rows = [len(sampler.epoch_rows(epoch)) for epoch in range(3)]
    assert sampler.steps_of(1) == -(-rows[0] // 12)
    assert sampler.steps_of(2.5) == int(np.ceil((rows[0] + rows[1] + rows[2] / 2) / 12))
    assert sampler.epochs_after(1) == 12 / rows[0]
    assert sampler.epochs_after(sampler.steps_of(2)) == pytest.approx(2, abs=12 / rows[0])


def test_a_run_that_goes_on_at_a_late_step_finds_the_same_rows() -> None:
    early = order()
    for step in range(20):
        early.step_rows(step)
    assert numbers(early.step_rows(20)) == numbers(order().step_rows(20))


def test_an_epoch_is_packed_once_on_the_way_whatever_was_asked_before(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = []

    def counted(lengths: NDArray[np.int64], capacity: int) -> list[NDArray[np.int64]]:
        packed.append(capacity)
        return pack(lengths, capacity)

    monkeypatch.setattr("student.data.batch_sampler.pack", counted)
    sampler = order()
    steps = sampler.steps_of(4)
    packed.clear()
    for step in range(steps):
        for part in range(sampler.accumulation):
            assert sampler.micro_batches(step, 0)[part]
    assert len(packed) <= 5, "four epochs, and the next one's first rows"


def test_the_seed_decides_the_order() -> None:
    assert numbers(order(seed=1).step_rows(5)) == numbers(order(seed=1).step_rows(5))
    assert numbers(order(seed=1).step_rows(5)) != numbers(order(seed=2).step_rows(5))


def test_a_batch_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"global_batch is 12.*5 ranks.*multiple of 5"):
        order(world_size=5)


def test_a_batch_larger_than_the_dataset_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"global_batch is 96 rows of 128 tokens, but 97 training samples fill only"):
        order(global_batch=96)
