"""Units of work: what is collected together, published together and, after an interruption, repeated together.

A unit is a slice of a split's prompts under one decoding rule. Its name and content follow from the prompts and the
config alone, so every worker on every machine cuts the same units and can take any of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from shared.config import CollectConfig, DecodingConfig, Split
from shared.dataset.records import Record, Sampling
from shared.dataset.split import stable_hash
from teacher.prompts import Prompt

Item = TypeVar("Item")

_RETRY = ".retry-"
"""No decoding rule's tag has it, so no other unit's name has."""


@dataclass(frozen=True, slots=True)
class Task:
    """One response to collect, or one to score; `sample_id` is its name in the dataset.

    Attributes:
        given: the record of another dataset whose tokens are scored as they are.
    """

    sample_id: str
    prompt: Prompt
    split: str
    sampling: Sampling
    given: Record | None = None


@dataclass(frozen=True, slots=True)
class Unit:
    """Named work: unit names are file names, and sort in the order of collection within split and rule.

    Attributes:
        tasks: in a fixed order; they may be read from disk each time that they are iterated over.
    """

    name: str
    tasks: Collection[Task]


def cut_units(splits: dict[Split, list[Prompt]], collect: CollectConfig, seed: int) -> list[Unit]:
    """The units of the decoding rules, rule after rule; prompts keep the order that their split has.

    A rule is that of `collect.decoding` or of a prompt's source; sources that share a split and tag share its units.

    A response's random seed follows from (seed, sample id), so it depends neither on its neighbors in the batch nor
    on what was collected before.
    """
    units = []
    rules = [rule for rules in (collect.decoding, *(source.decoding for source in collect.sources)) for rule in rules]
    for split, tag in dict.fromkeys((rule.split, rule.tag) for rule in rules):
        asked = [
            (prompt, rule)
            for prompt in splits[split]
            for rule in prompt.decoding or collect.decoding
            if (rule.split, rule.tag) == (split, tag)
        ]
        for number, chosen in enumerate(slices(asked, collect.unit_prompts)):
            units.append(Unit(f"{split}-{tag}-{number:05d}", tuple(_tasks(chosen, seed))))
    return units


def retry_units(
    units: Iterable[Unit], failures: Mapping[str, Collection[str]], begun: Collection[str], again: bool
) -> list[Unit]:
    """The units that repeat failed samples: `UNIT.retry-1`, for what fails in it `UNIT.retry-2`, and so on.

    Args:
        failures: failed samples of committed units, by the unit's name. begun: units that have a shard; of the retries
            these are part of the collection from then on. again: begin new ones.
    """
    retries = []
    for unit in units:
        number = 1
        while failed := failures.get(unit.name):
            name = f"{unit.name.partition(_RETRY)[0]}{_RETRY}{number}"
            if not again and name not in begun:
                break
            unit = Unit(name, tuple(task for task in unit.tasks if task.sample_id in failed))
            retries.append(unit)
            number += 1
    return retries


def is_retry(name: str) -> bool:
    """Whether the unit of this name repeats failed samples of another one."""
    return _RETRY in name


def open_failures(units: Iterable[str], failures: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Samples without a response, with the reason: the failures of `units` that no retry among them took up."""
    found: dict[str, str] = {}
    taken = set(units)
    for name in taken & failures.keys():
        base, _, number = name.partition(_RETRY)
        if f"{base}{_RETRY}{int(number or 0) + 1}" not in taken:
            found |= failures[name]
    return dict(sorted(found.items()))


def slices(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """`items` in order, `size` at a time."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _tasks(asked: Sequence[tuple[Prompt, DecodingConfig]], seed: int) -> Iterator[Task]:
    for prompt, decoding in asked:
        for number in range(decoding.samples):
            sample_id = f"{prompt.id}:{decoding.tag}:{number}"
            sampling = Sampling(
                decoding.temperature,
                decoding.top_p,
                decoding.top_k,
                decoding.max_response_tokens,
                seed=None if decoding.rule == "greedy" else stable_hash(seed, sample_id),
            )
            yield Task(sample_id, prompt, decoding.split, sampling)
