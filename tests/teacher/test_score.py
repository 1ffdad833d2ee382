"""A dataset is scored in units that are read from disk when they are asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shared.config import PipelineConfig
from shared.dataset.reader import Dataset
from shared.errors import VocabularyError
from teacher.collect import Launch
from teacher.score import StoredTasks, _stored_units, score
from tests.teacher.test_collect import ScriptedEngine, collector_of

Maker = Callable[..., PipelineConfig]


def collected(config: PipelineConfig) -> Dataset:
    collector, writer, units = collector_of(config, ScriptedEngine(top_k=8))
    list(collector.collect_units(units))
    writer.finish([unit.name for unit in units])
    return Dataset.open(config.shards_dir)


def test_a_dataset_of_another_tokenizer_is_refused(make_config: Maker, tmp_path: Path) -> None:
    """As many tokens, of which two have changed places: every text would be scored as another one."""
    collected(make_config())
    model = Path(shutil.copytree(make_config().teacher.model, tmp_path / "other"))
    tree = json.loads((model / "tokenizer.json").read_text())
    ids = tree["model"]["vocab"]
    ids["A"], ids["B"] = ids["B"], ids["A"]
    (model / "tokenizer.json").write_text(json.dumps(tree))
    config = make_config(name="scored", collect__responses=str(make_config().shards_dir), teacher__model=str(model))
    with pytest.raises(VocabularyError, match=r"other has the fingerprint \w+ .* was collected with \w+ "):
        score(config, Launch())
    assert not config.run_dir.exists()


def test_units_of_a_dataset_hold_no_records_and_all_of_them(make_config: Maker) -> None:
    dataset = collected(make_config(prompts=40))
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
