"""Whole files of the legacy JSON layout into a dataset and back, an entry at a time.

An import reads the file twice: everything is checked before a directory is made, whatever `shards validate` would find
included, so that a bad entry leaves nothing behind. Memory holds one unit of entries a split, whatever the file's size.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.progress import Progress

from shared.commands.legacy_json.layout import EntryReader, ImportSettings, to_entry
from shared.commands.legacy_json.models import ENTRY_EXAMPLE
from shared.console import progress
from shared.dataset.columns import records_to_table
from shared.dataset.manifest import Manifest, Provenance
from shared.dataset.reader import Dataset
from shared.dataset.records import Record
from shared.dataset.storage import file_sha256
from shared.dataset.validate import table_problems
from shared.dataset.writer import DatasetWriter
from shared.errors import DatasetError
from shared.files import new_file
from shared.json_input import read_values

UNIT_ENTRIES = 256
_ADVICE = (
    "the file or the options changed since that import began: import into a new directory, or delete this one first"
)


def read_entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Entries of a JSON list or of JSON lines, each with its place for messages; errors as `read_values`."""
    if path.exists() and not path.is_file():
        raise DatasetError(f"{path} is not a regular file, but it is read twice; save the entries to one")
    return read_values(path, DatasetError, ENTRY_EXAMPLE)


def import_json(source: Path, destination: str | Path, tokenizer_dir: Path, settings: ImportSettings) -> Manifest:
    """Make a dataset of a JSON file. The same call resumes where an interrupted one stopped.

    Args:
        tokenizer_dir: of the teacher whose tokens the rows are of.

    Raises:
        DatasetError: if an entry cannot be imported, naming file, row, position, value and fix; nothing is left behind.
    """
    reader = EntryReader(tokenizer_dir, settings)
    with progress() as bar:
        count = _check_entries(reader, source, bar)
        reader.choose_held_out()
        template = reader.template
        provenance = Provenance(
            teacher=settings.teacher or f"import:{source.name}",
            tokenizer_fingerprint=reader.vocabulary.fingerprint,
            chat_template_fingerprint=template.fingerprint if template else None,
            engine="import-json",
            dtype="unknown",
            top_k=settings.top_k,
            prompts_fingerprint=file_sha256(source),
            details={
                "values": settings.values,
                "held_out": settings.held_out,
                "held_out_rule": "a share of each skill",
                "sampling": repr(settings.sampling),
                "template_arguments": settings.template_arguments,
                "rendered": settings.rendered,
                "rendered_probe": template.probe if template else {},
            },
        )
        writer = DatasetWriter(destination, provenance, reader.vocabulary, tokenizer_dir, advice=_ADVICE)
        task = bar.add_task("importing", total=count, note="")
        units: list[str] = []
        records = (record for batch in _batches(reader, source) for _, record in batch)
        for name, unit in _units(records):
            units.append(name)
            writer.write_unit(name, unit)
            bar.update(task, advance=len(unit))
        return writer.finish(units)


def _units(records: Iterable[Record]) -> Iterator[tuple[str, list[Record]]]:
    """Units of one split each, in the file's order within it, with their names."""
    waiting: dict[str, list[Record]] = {}
    numbers = Counter[str]()

    def unit(split: str) -> tuple[str, list[Record]]:
        numbers[split] += 1
        return f"{split}-import-{numbers[split] - 1:06d}", waiting.pop(split)

    for record in records:
        waiting.setdefault(record.split, []).append(record)
        if len(waiting[record.split]) == UNIT_ENTRIES:
            yield unit(record.split)
    yield from map(unit, list(waiting))


def _batches(reader: EntryReader, source: Path) -> Iterator[list[tuple[str, Record]]]:
    """The file's records in order, a unit at a time, each with its place for messages."""
    numbered = enumerate(read_entries(source))
    while batch := [
        (where, reader.record(entry, where, number))
        for number, (where, entry) in itertools.islice(numbered, UNIT_ENTRIES)
    ]:
        yield batch


def _check_entries(reader: EntryReader, source: Path, bar: Progress) -> int:
    """Check what the file's records are alone, as shards, and beside each other; returns how many there are.

    Raises:
        DatasetError: for the first that cannot be imported, or that `shards validate` would find a problem in.
    """
    task = bar.add_task("checking", total=None, note=source.name)
    count = 0
    ids: dict[str, str] = {}  # id → its place
    prompts: dict[str, tuple[int, str]] = {}  # prompt_id → the conversation that it is of, and its place
    for batch in _batches(reader, source):
        for where, record in batch:
            if (place := ids.setdefault(record.sample_id, where)) != where:
                raise DatasetError(f"{where}: id {record.sample_id!r} is also that of {place}; ids must be unique")
            conversation = hash(record.messages)
            other, place = prompts.setdefault(record.prompt_id, (conversation, where))
            if other != conversation:
                raise DatasetError(
                    f"{where}: prompt_id {record.prompt_id!r} is that of another prompt in {place}; one id for each"
                )
        try:
            table = records_to_table([record for _, record in batch], len(reader.vocabulary))
            problem = next(table_problems(table, reader.vocabulary), None)
        except DatasetError as error:
            problem = str(error)
        if problem is not None:
            at = next((where for where, record in batch if problem.startswith(f"record {record.sample_id!r}")), source)
            raise DatasetError(f"{at}: {problem}")
        count += len(batch)
        bar.update(task, completed=count)
    return count


def export_json(
    source: str | Path, destination: Path, split: str | None = None, rule: str | None = None, limit: int | None = None
) -> int:
    """Write a dataset's records as a JSON list, in one step. Returns how many.

    Raises:
        DatasetError: if the dataset is damaged or nothing in it is of that split and rule.
    """
    dataset = Dataset.open(source)
    count = 0
    try:
        with progress() as bar, new_file(destination) as partial, partial.open("w", encoding="utf-8") as file:
            task = bar.add_task("exporting", total=None if limit is None else min(limit, len(dataset)), note="")
            for record in itertools.islice(dataset.records(split, rule), limit):
                file.write(",\n" if count else "[\n")
                json.dump(to_entry(record, dataset.vocabulary), file, ensure_ascii=False, allow_nan=False)
                count += 1
                bar.update(task, advance=1)
            if not count:
                raise DatasetError(
                    f"{source} has no records of split {split or 'any'} and rule {rule or 'any'}; it has "
                    + (", ".join(f"{n} of {key}" for key, n in dataset.manifest.counts.items()) or "none at all")
                )
            file.write("\n]\n")
    except OSError as error:
        raise DatasetError(
            f"cannot write {destination}: {error.strerror}; choose another file or free space"
        ) from error
    return count
