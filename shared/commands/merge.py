"""Several datasets of one teacher into one. Shards are copied as they are, checked on the way.

The teacher, its tokenizer and template, the engine, k and the numeric type must be equal; prompts, decoding rules and
seeds may differ, and the result's provenance names all of them. A prompt that is held out in one part must be so in
all. A rerun copies only what is missing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pyarrow.compute as pc

from shared.console import progress
from shared.dataset.columns import on_both_sides, repeated
from shared.dataset.manifest import DATA, Manifest, Provenance, UnitEntry, split_of
from shared.dataset.reader import Dataset
from shared.dataset.writer import DatasetWriter
from shared.errors import DatasetError

# What is collected may differ between parts; what distributions mean may not.
_FREE = ("sampling", "seed", "prompts_fingerprint", "unit_prompts", "details")


def merge(sources: Sequence[str | Path], destination: str | Path) -> Manifest:
    """Make one dataset at `destination` of those at `sources`.

    Raises:
        DatasetError: if fewer than two are given, they are of different teachers (naming what differs), two hold the
            same sample, one holds out a prompt that another trains on, one has a unit of two splits, or one is damaged.
    """
    if len(sources) < 2:
        raise DatasetError(f"{len(sources)} dataset to merge, expected two or more and then the new directory")
    datasets = [Dataset.open(source) for source in sources]
    provenance = _merged_provenance(sources, datasets)
    units = _merged_units(datasets, provenance)
    _check_disjoint(sources, datasets)
    writer = DatasetWriter(destination, provenance, datasets[0].vocabulary, datasets[0].tokenizer_dir)
    with progress() as bar:
        task = bar.add_task("merging", total=len(units), note="")
        for name, (index, entry, original) in units.items():
            if name not in writer.committed:
                data = datasets[index].storage.read_verified(original.file, original.sha256)
                writer.publish(entry, data)
            bar.update(task, advance=1)
    return writer.finish(units)


def _merged_provenance(sources: Sequence[str | Path], datasets: Sequence[Dataset]) -> Provenance:
    first = datasets[0].provenance
    for source, dataset in zip(sources[1:], datasets[1:], strict=True):
        other = dataset.provenance
        same = other.model_copy(update={name: getattr(first, name) for name in _FREE})
        differences = same.differences(first)
        if differences:
            fix = ""
            if first.engine == other.engine == "import-json" and first.teacher != other.teacher:
                fix = "; parts of one teacher are imported with the same --teacher"
            raise DatasetError(
                f"{source} cannot be merged with {sources[0]} (there: {sources[0]}, here: {source}):\n  "
                + "\n  ".join(differences)
                + f"\ndistributions of different teachers stay in datasets of their own{fix}"
            )
    rules = []
    for dataset in datasets:
        rules += [rule for rule in dataset.provenance.sampling if rule not in rules]
    prints = [dataset.provenance.fingerprint for dataset in datasets]
    return first.model_copy(
        update={
            "sampling": rules,
            "prompts_fingerprint": hashlib.sha256("".join(prints).encode()).hexdigest(),
            "unit_prompts": None,
            "details": {"merged": [d.provenance.identity for d in datasets]},
            "git_commit": None,
            "created": None,
            "config": {},
        }
    )


def _merged_units(datasets: Sequence[Dataset], provenance: Provenance) -> dict[str, tuple[int, UnitEntry, UnitEntry]]:
    """New name → (dataset, the merged entry, the original); where names clash, all end with their dataset's number."""
    parts = [(index, unit) for index, dataset in enumerate(datasets) for unit in dataset.manifest.units]
    clash = len({unit.unit for _, unit in parts}) < len(parts)
    units = {}
    for index, unit in parts:
        split_of(unit)  # of one split, before anything is written
        name = f"{unit.unit}.{index:02d}" if clash else unit.unit
        update = {"unit": name, "file": f"{DATA}/{name}.parquet", "provenance": provenance.fingerprint}
        units[name] = (index, unit.model_copy(update=update), unit)
    return units


def _check_disjoint(sources: Sequence[str | Path], datasets: Sequence[Dataset]) -> None:
    """Refuse a sample that comes twice, and a prompt that is held out here and trained on there."""
    columns = ["sample_id", "prompt_id", "split"]
    tables = [(source, t) for source, dataset in zip(sources, datasets, strict=True) for t in dataset.tables(columns)]
    twice = repeated([chunk for _, table in tables for chunk in table["sample_id"].chunks])
    if twice:
        raise DatasetError(
            f"{len(twice)} samples are in more than one of the {len(datasets)} datasets, such as {twice[0][0]!r}; "
            "merge parts that were collected from different prompts or seeds"
        )
    both = on_both_sides([table for _, table in tables])
    if both:
        sides: dict[str, str | Path] = {}
        for source, table in tables:
            for split in pc.unique(table.filter(pc.equal(table["prompt_id"], both[0]))["split"]).to_pylist():
                sides.setdefault(split, source)
        where = " and ".join(f"{split} in {source}" for split, source in sorted(sides.items()))
        raise DatasetError(
            f"{len(both)} prompts are on both sides of the split, such as {both[0]!r}: {where}; expected one side for "
            "each, or training would see what is held out: leave these prompts out of one of the datasets, and collect "
            "or import that one again"
        )
