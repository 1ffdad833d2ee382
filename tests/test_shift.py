"""Rows that are off by one: the mistake that most published pipelines have made once.

The toy teacher's distributions are known exactly, so a perfect drafter is at hand. Against the right rows it is always
accepted; against rows moved by a single position acceptance collapses, and nothing along the way lets them pass.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from shared.dataset.reader import Dataset
from shared.dataset.records import Record
from shared.dataset.validate import validate_dataset
from shared.errors import AlignmentError
from student.alignment.prepare import prepare
from student.evaluation.offline_acceptance import draft_along
from student.model.initialize import initialize_student
from student.training.train import check
from tests.fixtures.records import shifted
from tests.fixtures.toy_run import load_toy, write_toy_shards
from tests.fixtures.toy_teacher import ToyTeacher

DRAFT = 3


class RowDrafter:
    """Drafts what the stored rows say is most probable: all that a student could learn from them."""

    draft_tokens = DRAFT
    confidence: ClassVar[dict[Hashable, list[float]]] = {}

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = {record.sample_id: record for record in records}

    def propose(self, request_ids: Sequence[str], contexts: Sequence[np.ndarray]) -> list[list[int]]:
        drafts = []
        for name, context in zip(request_ids, contexts, strict=True):
            record = self.records[name]
            assert record.distributions is not None
            start = len(context) - len(record.prompt_ids)
            stop = min(start + DRAFT, len(record.response_ids))
            drafts.append([int(record.distributions.row(j)[0][0]) for j in range(start, stop)])
        return drafts

    def release(self, request_ids: Sequence[str]) -> None:
        pass


def ratio_acceptance(teacher: ToyTeacher, records: Sequence[Record]) -> float:
    """Mean Σ min(p, q) of the stored rows p against the chain's own distribution q, response tokens after the first."""
    overlaps = []
    for record in records:
        assert record.distributions is not None
        for position in range(1, len(record.response_ids)):
            q = teacher.row((int(record.response_ids[position - 1]),))
            ids, logprobs = record.distributions.row(position)
            p = np.exp(logprobs.astype(np.float64))
            overlaps.append(np.minimum(p, [q[int(token)] for token in ids]).sum())
    return float(np.mean(overlaps))


@pytest.mark.parametrize("shift", [-1, 1])
def test_acceptance_collapses(tmp_path: Path, shift: int) -> None:
    config = load_toy(tmp_path)
    teacher = write_toy_shards(config, train=0)
    greedy = list(Dataset.open(config.shards_dir).records(rule="greedy"))
    sampled = list(Dataset.open(config.shards_dir).records(rule="sample"))
    moved = [shifted(record, shift) for record in greedy]

    right = draft_along(RowDrafter(greedy), greedy, batch=4)
    assert right.by_depth()[0] == 1, "the teacher's own rows are always accepted"
    wrong = draft_along(RowDrafter(moved), moved, batch=4)
    assert wrong.mean_accepted < 0.2 * right.mean_accepted

    assert ratio_acceptance(teacher, sampled) > 0.97  # what is missing was lost to storage
    assert ratio_acceptance(teacher, [shifted(record, shift) for record in sampled]) < 0.4


@pytest.mark.parametrize("shift", [-1, 1])
def test_training_refuses_to_start(tmp_path: Path, shift: int) -> None:
    config = load_toy(tmp_path)
    write_toy_shards(config, shift=shift)
    initialize_student(config)
    prepare(config)
    with pytest.raises(AlignmentError, match="shift by one"):
        check(config, world_size=1)


def test_the_right_rows_pass_all_of_it(tmp_path: Path) -> None:
    config = load_toy(tmp_path)
    write_toy_shards(config)
    assert validate_dataset(config.shards_dir).problems == []
    initialize_student(config)
    prepare(config)
    check(config, world_size=1)
