"""Units follow from prompts and config alone, and cover every response once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from shared.config import PipelineConfig
from shared.dataset.records import Message
from shared.dataset.split import stable_hash
from shared.errors import ConfigError
from teacher.prompts import Prompt, split_prompts
from teacher.units import Unit, cut_units

Maker = Callable[..., PipelineConfig]


def units_of(config: PipelineConfig, count: int = 12) -> list[Unit]:
    prompts = [Prompt(f"p{i}", ("a", "b")[i % 2], (Message("user", f"q{i}"),)) for i in range(count)]
    return cut_units(split_prompts(prompts, config.collect.held_out), config.collect, config.seed)


def test_every_prompt_is_in_every_rule_of_its_split_once(make_config: Maker) -> None:
    units = units_of(make_config(collect__unit_prompts=2))
    samples = Counter(task.sample_id for unit in units for task in unit.tasks)
    assert set(samples.values()) == {1}
    by_rule = Counter(task.sampling.rule for unit in units for task in unit.tasks)
    held_out = {task.prompt.id for unit in units for task in unit.tasks if task.split == "held_out"}
    assert by_rule == {"greedy": 12 - len(held_out), "sample": 2 * len(held_out)}
    assert len({unit.name for unit in units}) == len(units)
    assert max(len({task.prompt.id for task in unit.tasks}) for unit in units) == 2


def test_units_are_the_same_on_every_machine(make_config: Maker) -> None:
    assert units_of(make_config()) == units_of(make_config())


def test_seeds_belong_to_samples_and_to_the_run(make_config: Maker) -> None:
    first = [t for u in units_of(make_config(seed=1)) for t in u.tasks if t.sampling.temperature == 1]
    coarse = [
        t
        for u in units_of(make_config(seed=1, collect__unit_prompts=99))
        for t in u.tasks
        if t.sampling.temperature == 1
    ]
    other = [t for u in units_of(make_config(seed=2)) for t in u.tasks if t.sampling.temperature == 1]
    assert {t.sample_id: t.sampling.seed for t in first} == {t.sample_id: t.sampling.seed for t in coarse}
    assert len({t.sampling.seed for t in first}) == len(first)
    assert not {t.sampling.seed for t in first} & {t.sampling.seed for t in other}
    assert all(t.sampling.seed == stable_hash(1, t.sample_id) < 1 << 63 for t in first)


def test_rules_that_would_write_the_same_samples_are_refused(make_config: Maker) -> None:
    greedy = {"split": "train", "temperature": 0}
    with pytest.raises(ConfigError, match="repeats the rule greedy for train"):
        make_config(collect__decoding=[greedy, {**greedy, "max_response_tokens": 9}])
    with pytest.raises(ConfigError, match="2 samples would be one text"):
        make_config(collect__decoding=[{**greedy, "samples": 2}])
