from __future__ import annotations

import numpy as np
import torch

from student.data.batch import collate, take_positions
from student.data.blocks import lay_out
from tests.fixtures.aligned_samples import make_sample


def test_taking_positions_keeps_each_position_its_own_events() -> None:
    targets = make_sample("a", 2, 9).targets
    positions = np.array([7, 0, 7, 3])
    taken = take_positions(targets, positions)
    for row, position in enumerate(positions):
        for holder, index in ((taken, row), (targets, position)):
            events = range(holder.event_offsets[index], holder.event_offsets[index + 1])
            listed = [
                (
                    float(holder.event_mass[e]),
                    holder.members[holder.member_offsets[e] : holder.member_offsets[e + 1]].tolist(),
                )
                for e in events
            ]
            if holder is taken:
                got = listed
        assert got == listed
        assert taken.tail[row] == targets.tail[position]


def test_rows_are_padded_apart_and_targets_follow_their_positions() -> None:
    samples = [make_sample("a", 3, 6), make_sample("b", 1, 4)]
    rows = [lay_out(s, np.array([0, 2]), block_length=3, mask_id=99) for s in samples]
    batch = collate([[pair] for pair in zip(samples, rows, strict=True)], pad_id=7)
    assert batch.input_ids.shape == (2, len(rows[0]))
    padding = batch.document_ids[1] == -1
    assert padding.sum() == len(rows[0]) - len(rows[1])
    assert (batch.input_ids[1][padding] == 7).all()
    assert batch.tokens == len(rows[0]) + len(rows[1])
    # What stands at the supervised positions is masked, and its position says which token is wanted.
    flat_positions = batch.position_ids.flatten()[batch.supervised]
    row_of = batch.supervised // batch.input_ids.shape[1]
    wanted = [samples[r].input_ids[p] for r, p in zip(row_of.tolist(), flat_positions.tolist(), strict=True)]
    assert batch.targets.observed_ids.tolist() == wanted
    assert (batch.input_ids.flatten()[batch.supervised] == 99).all()
    # Blocks are numbered through the micro-batch, in order, depth 1 first.
    starts = batch.targets.depth == 1
    assert batch.targets.block[starts].tolist() == [0, 1, 2, 3]
    assert torch.equal(batch.targets.block.diff() != 0, starts[1:])


def test_event_masses_and_tail_sum_to_one_after_collation() -> None:
    samples = [make_sample("a", 3, 6), make_sample("b", 1, 5)]
    rows = [lay_out(s, np.array([0, 2, 4]), block_length=4, mask_id=99) for s in samples]
    targets = collate([[*zip(samples, rows, strict=True)]], pad_id=0).targets
    for n in range(len(targets.observed_ids)):
        mass = targets.event_mass[targets.event_offsets[n] : targets.event_offsets[n + 1]].sum() + targets.tail[n]
        assert abs(float(mass) - 1) < 1e-6
    assert targets.member_offsets[-1] == len(targets.members)


def test_a_block_knows_at_its_anchor_that_the_token_before_has_ended() -> None:
    sample = make_sample("a", 3, 6)
    row = lay_out(sample, np.array([1, 3]), block_length=3, mask_id=99)
    targets = collate([[(sample, row)]], pad_id=0).targets
    assert targets.observed_logprob.tolist() == [-0.5, -1, -1, -0.5, -1, -1]


def test_depth_weights() -> None:
    sample = make_sample("a", 3, 6)
    row = lay_out(sample, np.array([1]), block_length=3, mask_id=99)
    assert collate([[(sample, row)]], pad_id=0, depth_decay=0.5).targets.weight.tolist() == [1, 0.5, 0.25]


def test_a_packed_row_is_its_samples_side_by_side() -> None:
    samples = [
        make_sample(name, prompt, response) for name, prompt, response in [("a", 3, 6), ("b", 1, 5), ("c", 2, 4)]
    ]
    laid_out = [(s, lay_out(s, np.array([0, 2]), block_length=3, mask_id=99)) for s in samples]
    together = collate([laid_out[:2], laid_out[2:]], pad_id=7, row_tokens=32)
    alone = [collate([[pair]], pad_id=7) for pair in laid_out]
    assert together.input_ids.shape == (2, 32)
    assert together.sample_ids == ["a", "b", "c"]
    a, b = (alone[i].input_ids.shape[1] for i in (0, 1))
    for name in ("input_ids", "position_ids", "block_ids"):
        of_rows = getattr(together, name)
        found = of_rows[0, :a], of_rows[0, a : a + b], of_rows[1, : alone[2].input_ids.shape[1]]
        for part, batch in zip(found, alone, strict=True):
            assert torch.equal(part, getattr(batch, name)[0]), name
    documents = together.document_ids[0]
    assert documents.tolist() == [0] * a + [1] * b + [-1] * (32 - a - b)
    assert together.documents[0] == [(5, 6), (3, 6), (32 - a - b, 0)]  # each two blocks of 3, and the padding
    assert [sum(clean + masked for clean, masked in row) for row in together.documents] == [32, 32]
    assert together.tokens == sum(batch.tokens for batch in alone)
    # Targets come in the order of the rows, and say which token stands where.
    joined = torch.cat([batch.targets.observed_ids for batch in alone])
    assert torch.equal(together.targets.observed_ids, joined)
    assert torch.equal(
        together.position_ids.flatten()[together.supervised],
        torch.cat([batch.position_ids.flatten()[batch.supervised] for batch in alone]),
    )
    assert together.targets.block[together.targets.depth == 1].tolist() == [0, 1, 2, 3, 4, 5]
