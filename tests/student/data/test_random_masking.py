"""LLaDA's own objective, against its definition: the sum over all masks, each with its probability."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shared.config import RandomMaskingConfig
from student.data.batch import collate
from student.data.random_masking import SMALLEST, mask_answer, mask_probability, randomly_masked
from student.losses.settings import LossSettings
from student.training.module import DistillationModule
from tests.fixtures.aligned_samples import make_sample
from tests.fixtures.tiny_model import MASK, VOCABULARY, tiny_model

SETTINGS = LossSettings(loss="kl", block_length=4)
END = 1


@pytest.mark.parametrize("p", [0.1, 0.9])
def test_the_expected_loss_is_the_sum_over_all_masks(p: float) -> None:
    sample = make_sample("a", 3, 5, vocabulary=VOCABULARY - 1)
    model = tiny_model().double()
    module = DistillationModule(model, SETTINGS)
    ids = torch.tensor(sample.input_ids, dtype=torch.int64)
    prompt, answer = sample.input_ids[:3].astype(np.int64), sample.input_ids[3:].astype(np.int64)
    found = expected = 0.0
    for bits in itertools.product([False, True], repeat=5):
        masked = np.array(bits)
        probability = p ** masked.sum() * (1 - p) ** (~masked).sum()
        batch = collate([[(sample, mask_answer(prompt, answer, masked, p, MASK))]], pad_id=0, row_tokens=8)
        assert batch.target_count == 5
        with torch.no_grad():
            found += probability * float(module(batch)[0]) / batch.target_count
            # The definition, with a model call of its own: the whole sequence bidirectional, no padding.
            hidden = torch.cat([ids[:3], ids[3:].where(~torch.tensor(bits), torch.tensor(MASK))])
            logits = model(hidden[None]).logits[0, 3:]
            each = F.cross_entropy(logits, ids[3:], reduction="none")
            expected += probability * float(each[torch.tensor(bits)].sum() / p) / 5
    assert found == pytest.approx(expected, rel=1e-6)  # the weight 1 / p is float32


def test_every_token_is_masked_with_the_probability_of_the_visit() -> None:
    sample, settings = make_sample("a", 3, 6), RandomMaskingConfig(end_tokens=2)
    ratios, counts, visits = [], np.zeros(6), 6000
    for epoch in range(visits):
        (row,) = randomly_masked(sample, settings, 0, epoch, mask_id=99, end_id=END, max_sequence_tokens=64)
        assert (row.input_ids[:3] == sample.input_ids[:3]).all(), "the prompt is never masked"
        assert (row.input_ids[row.supervised] == 99).all()
        assert row.weight == pytest.approx(1 / mask_probability(0, epoch, "a", antithetic=False))
        counts += np.isin(np.arange(6), row.response_positions)
        ratios.append(1 / row.weight)
    # t is uniform: mean 1/2, variance 1/12; standard errors are 0.0037 and 0.0065.
    assert abs(np.mean(ratios) - 0.5) < 0.015
    assert abs(np.var(ratios) - 1 / 12) < 0.01
    assert np.abs(counts / visits - 0.5).max() < 0.026


def test_an_answer_that_ends_goes_on_with_end_tokens_and_one_cut_off_does_not() -> None:
    settings = RandomMaskingConfig(end_tokens=3)
    cut = make_sample("a", 2, 4)
    ended = make_sample("a", 2, 4)
    ended.byte_ends[-1] = ended.byte_ends[-2]  # a last token without bytes: the end of the turn
    lengths = {}
    for name, sample in (("cut", cut), ("ended", ended)):
        (row,) = randomly_masked(sample, settings, 0, 0, mask_id=99, end_id=END, max_sequence_tokens=64)
        lengths[name] = len(row), row.count
        assert set(row.observed_ids[row.response_positions >= 4]) <= {END}
    assert lengths == {"cut": (6, 4), "ended": (9, 7)}


def test_antithetic_epochs_and_complementary_masks() -> None:
    sample = make_sample("a", 3, 20)
    for epoch in (0, 2, 4):
        p, other = (mask_probability(0, e, "a", antithetic=True) for e in (epoch, epoch + 1))
        assert p + other == pytest.approx(1 + SMALLEST)
    settings = RandomMaskingConfig(complementary=True, end_tokens=0)
    one, rest = randomly_masked(sample, settings, 0, 5, mask_id=99, end_id=END, max_sequence_tokens=64)
    assert sorted([*one.response_positions, *rest.response_positions]) == list(range(20))
    assert 1 / one.weight + 1 / rest.weight == pytest.approx(1)
