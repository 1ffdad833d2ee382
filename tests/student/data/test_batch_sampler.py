from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ConfigError
from student.data.batch_sampler import BatchSampler


def order(samples: int = 37, world_size: int = 1, micro_batch: int = 3, seed: int = 0) -> BatchSampler:
    lengths = np.random.default_rng(1).integers(5, 90, samples)
    return BatchSampler(lengths, seed, global_batch=12, micro_batch=micro_batch, world_size=world_size)


@given(step=st.integers(0, 50), world_size=st.sampled_from([1, 2, 3, 4, 6, 12]), micro_batch=st.integers(1, 12))
def test_ranks_share_a_step_without_loss_or_overlap(step: int, world_size: int, micro_batch: int) -> None:
    _, expected = order().step_samples(step)
    dealt = order(world_size=world_size, micro_batch=micro_batch)
    parts = [dealt.micro_batches(step, rank)[1] for rank in range(world_size)]
    assert len({len(of_rank) for of_rank in parts}) == 1, "ranks with unequal step counts hang"
    assert max(len(part) for of_rank in parts for part in of_rank) <= micro_batch
    assert sorted(np.concatenate([np.concatenate(of_rank) for of_rank in parts])) == sorted(expected)


def test_an_epoch_visits_no_sample_twice_and_the_next_epoch_is_another_order() -> None:
    steps = [order().step_samples(step) for step in range(6)]
    first = np.concatenate([samples for epoch, samples in steps if epoch == 0])
    assert len(first) == len(set(first)) == 36
    assert [epoch for epoch, _ in steps] == [0, 0, 0, 1, 1, 1]
    assert not np.array_equal(steps[0][1], steps[3][1])


def test_the_seed_decides_the_order() -> None:
    assert np.array_equal(order(seed=1).step_samples(5)[1], order(seed=1).step_samples(5)[1])
    assert not np.array_equal(order(seed=1).step_samples(5)[1], order(seed=2).step_samples(5)[1])


def test_a_batch_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"global_batch is 12.*5 ranks.*multiple of 5"):
        order(world_size=5)


def test_a_batch_larger_than_the_dataset_is_refused() -> None:
    with pytest.raises(ConfigError, match="only 7 training samples"):
        order(samples=7)
