"""Counts of the training responses' tokens, and a drafter that only proposes the frequent ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from shared.config import load_config
from shared.config.speculate import DrafterConfig
from shared.errors import CheckpointError
from shared.tokenizer.vocabulary import Vocabulary
from student.alignment.prepare import prepare
from student.alignment.prepared import PreparedDataset
from student.drafting.bridge import BridgedContext
from student.drafting.frequencies import FILE, count_tokens, frequent_tokens, write_counts
from student.drafting.propose import Drafter
from student.model.export import load_student
from student.model.initialize import initialize_student
from tests.fixtures.toy_run import toy_config, write_toy_shards


def test_a_drafter_of_frequent_tokens(tmp_path: Path) -> None:
    config = load_config(toy_config(tmp_path))
    write_toy_shards(config, train=40)
    initialize_student(config)
    prepare(config)
    prepared = PreparedDataset.of_run(config)
    model, tokenizer = load_student(config.student_init_dir)
    counts = count_tokens(prepared, model.config.vocab_size)
    samples = [prepared[int(number)] for number in prepared.indices(split="train")]
    response_ids = np.concatenate([sample.input_ids[sample.prompt_length :] for sample in samples])
    assert counts.sum() == len(response_ids)
    assert counts[tokenizer.mask_token_id] == 0
    student = tmp_path / "student"
    shutil.copytree(config.student_init_dir, student)

    def drafter_of(most: int | None) -> Drafter:
        directory = Path(config.teacher.model)
        vocabulary = Vocabulary.from_tokenizer(directory)
        options = DrafterConfig(block_length=4, draft_vocabulary=most, dtype="float32")
        return Drafter.from_student(model.eval(), student, vocabulary, directory, 4, options)

    with pytest.raises(CheckpointError, match="draft over the whole vocabulary"):
        drafter_of(10)
    write_counts(student, counts)
    kept = frequent_tokens(student, 10)
    assert sorted(kept) == list(kept)
    assert counts[kept].min() >= np.sort(counts)[-10]
    assert set(frequent_tokens(student, 10**6)) == set(np.flatnonzero(counts))
    few, all_ = drafter_of(10), drafter_of(None)
    special = np.flatnonzero(few.bridge.student.is_special)
    ids = few.forward._draftable_S.numpy()
    assert set(ids) - set(special) == set(kept) - set(special)
    assert set(special) & set(ids) == set(special) & set(few.bridge.draftable_ids), "a draft can always end"
    # What is drafted is the best of those that are left.
    contexts = [np.asarray(record.prompt_ids) for record in _records(config)][:6]
    for context in contexts:
        student_ids = few.bridge.extend(BridgedContext(), context).student_ids
        for drafter in (few, all_):
            cache = drafter.forward.cache(30)
            ((drafted,), _) = drafter.forward(cache, [0], [student_ids], 4)
            assert set(drafted) <= set(drafter.forward._draftable_S.tolist())
    (student / FILE).write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be read"):
        drafter_of(10)


def _records(config):  # type: ignore[no-untyped-def]
    from shared.dataset.reader import Dataset

    return Dataset.open(config.shards_dir).records(split="train", distributions=False)
