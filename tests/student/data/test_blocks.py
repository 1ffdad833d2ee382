from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from student.data.blocks import choose_anchors, fitting_anchors, lay_out, sample_generator
from tests.fixtures.aligned_samples import make_sample

MASK = 99


def test_a_row_by_hand() -> None:
    sample = make_sample("a", prompt_length=2, response_length=5, anchors=[0, 3])
    row = lay_out(sample, np.array([0, 3]), block_length=3, mask_id=MASK)
    x = sample.input_ids
    assert row.input_ids.tolist() == [x[0], x[1], x[2], x[3], x[4], *[MASK] * 6]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7]
    assert row.block_ids.tolist() == [0] * 5 + [1] * 3 + [2] * 3
    # The second block reaches one token past the response: masked, as when it drafts, but without a target.
    assert row.supervised.tolist() == [5, 6, 7, 8, 9]
    assert row.response_positions.tolist() == [0, 1, 2, 3, 4]
    assert row.depth.tolist() == [1, 2, 3, 1, 2]
    assert row.block.tolist() == [0, 0, 0, 1, 1]


@given(
    prompt=st.integers(1, 9),
    response=st.integers(1, 20),
    block=st.integers(1, 7),
    count=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_every_target_stands_at_its_own_position(prompt: int, response: int, block: int, count: int, seed: int) -> None:
    """LLaDA is not shifted: the masked token with position P + i has response token i as its target."""
    sample = make_sample("a", prompt, response)
    anchors = choose_anchors(np.flatnonzero(sample.is_anchor), count, np.random.default_rng(seed))
    row = lay_out(sample, anchors, block, MASK)
    assert np.array_equal(row.position_ids[row.supervised], prompt + row.response_positions)
    assert (row.input_ids[row.supervised] == MASK).all()
    assert np.array_equal(row.response_positions - (row.depth - 1), anchors[row.block])
    clean = row.block_ids == 0
    assert np.array_equal(row.input_ids[clean], sample.input_ids[: clean.sum()])
    assert clean.sum() == prompt + anchors.max(), "nothing sees clean tokens past the last anchor"


def test_only_anchors_whose_block_fits_are_chosen_from() -> None:
    sample = make_sample("a", prompt_length=4, response_length=10)
    anchors = fitting_anchors(sample, block_length=3, max_sequence_tokens=9)
    assert anchors.tolist() == [0, 1, 2]
    assert lay_out(sample, anchors, 3, MASK).position_ids.max() == 8
    assert fitting_anchors(sample, block_length=3, max_sequence_tokens=6).tolist() == []
    # One that fits is found among many that do not: the choice comes after.
    long = make_sample("b", prompt_length=4, response_length=2000)
    assert choose_anchors(fitting_anchors(long, 3, 8), 4, np.random.default_rng(0)).tolist() == [0, 1]


def test_every_anchor_is_as_likely_and_the_last_is_near_the_end() -> None:
    candidates, counts, last = np.arange(23), np.zeros(23), []
    for seed in range(4000):
        chosen = choose_anchors(candidates, 5, np.random.default_rng(seed))
        assert len(set(chosen.tolist())) == 5
        counts[chosen] += 1
        last.append(chosen[-1])
    # Standard error of each share: 0.0065.
    assert np.abs(counts / 4000 - 5 / 23).max() < 0.026
    assert min(last) >= 23 - 23 / 5 - 1


def test_anchors_depend_on_seed_epoch_and_sample_alone() -> None:
    sample = make_sample("a", 3, 40)

    def chosen(seed: int, epoch: int, name: str) -> list[int]:
        return choose_anchors(np.flatnonzero(sample.is_anchor), 5, sample_generator(seed, epoch, name)).tolist()

    assert chosen(0, 0, "a") == chosen(0, 0, "a")
    assert len({tuple(chosen(*key)) for key in [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b")]}) == 4


def test_only_anchor_positions_start_blocks() -> None:
    candidates = fitting_anchors(make_sample("a", 3, 10, anchors=[0, 4, 7]), 3, 100)
    assert choose_anchors(candidates, 2, np.random.default_rng(0)).tolist() in ([0, 4], [0, 7], [4, 7])
    assert choose_anchors(candidates, 9, np.random.default_rng(0)).tolist() == [0, 4, 7]
