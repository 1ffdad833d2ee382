"""Aligned samples with known contents, for the tests of what happens after alignment."""

from __future__ import annotations

import numpy as np

from student.alignment.targets import AlignedSample, SparseTargets


def make_sample(
    name: str, prompt_length: int, response_length: int, vocabulary: int = 50, anchors: list[int] | None = None
) -> AlignedSample:
    """A response over `vocabulary` student tokens, with one to three one- or two-token events at every position."""
    generator = np.random.default_rng(abs(hash((prompt_length, response_length))) % 2**32)
    input_ids = generator.integers(0, vocabulary, prompt_length + response_length, dtype=np.int32)
    event_offsets, masses, member_offsets, members, tail = [0], [], [0], [], []
    for position in range(response_length):
        events = 1 + position % 3
        tokens = generator.permutation(vocabulary)[: 2 * events]
        mass = generator.dirichlet(np.ones(events + 1))
        for event in range(events):
            chosen = tokens[2 * event : 2 * event + 1 + event % 2]
            members += chosen.tolist()
            member_offsets.append(len(members))
            masses.append(mass[event])
        event_offsets.append(len(masses))
        tail.append(mass[-1])
    is_anchor = np.zeros(response_length, bool)
    is_anchor[anchors if anchors is not None else slice(None)] = True
    ends = np.arange(1, response_length + 1)
    return AlignedSample(
        sample_id=name,
        prompt_id=name,
        split="train",
        rule="sample",
        skill="test",
        input_ids=input_ids,
        prompt_length=prompt_length,
        byte_ends=ends.astype(np.int64),
        is_anchor=is_anchor,
        teacher_index=np.arange(response_length, dtype=np.int32),
        observed_logprob=np.full(response_length, -1.0, np.float32),
        targets=SparseTargets(
            event_offsets=np.array(event_offsets, np.int64),
            event_mass=np.array(masses, np.float32),
            member_offsets=np.array(member_offsets, np.int64),
            members=np.array(members, np.int32),
            tail=np.array(tail, np.float32),
            known=np.ones(response_length, np.float32),
        ),
        teacher_ids=input_ids[prompt_length:],
        teacher_byte_ends=ends.astype(np.int64),
        teacher_sampled_logprob=np.full(response_length, -1.0, np.float32),
        anchor_logprob=np.full(response_length, -0.5, np.float32),
    )
