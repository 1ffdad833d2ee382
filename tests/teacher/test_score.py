"""A dataset is scored in units that are read from disk when they are asked for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from shared.config import PipelineConfig
from shared.dataset.reader import Dataset
from teacher.score import StoredTasks, _stored_units
from tests.teacher.test_collect import ScriptedEngine, collector_of

Maker = Callable[..., PipelineConfig]


def test_units_of_a_dataset_hold_no_records_and_all_of_them(make_config: Maker) -> None:
    collector, writer, units = collector_of(make_config(prompts=40), ScriptedEngine(top_k=8))
    list(collector.collect_units(units))
    writer.finish([unit.name for unit in units])
    dataset = Dataset.open(make_config().shards_dir)
    expected = {record.sample_id: record for record in dataset.records(distributions=False)}
    scored, longest = _stored_units(dataset, size=3)
    assert longest == max(len(record.prompt_ids) + len(record.response_ids) for record in expected.values())
    assert len({unit.name for unit in scored}) == len(scored)
    found = []
    for unit in scored:
        assert isinstance(unit.tasks, StoredTasks)
        tasks = list(unit.tasks)
        assert 0 < len(tasks) == len(unit.tasks) <= 3
        assert list(unit.tasks) != []  # a second time
        for task in tasks:
            record = expected[task.sample_id]
            assert unit.name.startswith(f"{record.split}-scored-")
            assert task.given is not None
            np.testing.assert_array_equal(task.given.response_ids, record.response_ids)
            found.append(task.sample_id)
    assert sorted(found) == sorted(expected)
