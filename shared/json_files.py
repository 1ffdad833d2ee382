"""Whole files of the older JSON layout into a dataset and back, an entry at a time.

Files are a JSON list or one entry a line. An import reads the file twice: everything is checked before a directory is
made, so that a bad entry leaves nothing behind. Memory holds one unit of entries, however large the file is.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.columns import check_record
from shared.console import progress
from shared.dataset import Dataset, Manifest, Provenance
from shared.errors import DatasetError
from shared.json_layout import EntryReader, ImportSettings, to_entry
from shared.storage import file_sha256
from shared.writer import DatasetWriter

UNIT_ENTRIES = 256
_BLOCK = 1 << 20


def read_entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Entries of a JSON list or of JSON lines, each with `FILE, entry N` for messages.

    Raises:
        DatasetError: if the file cannot be read or is not JSON, with the place.
    """
    decoder = json.JSONDecoder()
    try:
        with path.open(encoding="utf-8") as file:
            text, position, consumed, block = "", 0, 0, _BLOCK
            number, in_list, ended = 0, False, False
            while True:
                while position < len(text) and (
                    text[position].isspace() or (in_list and number and text[position] == ",")
                ):
                    position += 1
                if position == len(text) or ended:
                    more = file.read(block)
                    if ended and (text[position:] + more).strip():
                        raise DatasetError(f"{path}: there is more after the list's end; expected one JSON list")
                    if not more:
                        break
                    consumed += position
                    text, position = text[position:] + more, 0
                    continue
                if not number and not in_list and text[position] == "[":
                    in_list, position = True, position + 1
                    continue
                if in_list and text[position] == "]":
                    ended, position = True, position + 1
                    continue
                try:
                    entry, end = decoder.raw_decode(text, position)
                    # A number could go on in the next block; entries are objects, whose end is their brace.
                except json.JSONDecodeError as error:
                    more = file.read(block)
                    if not more:
                        raise DatasetError(
                            f"{path}, entry {number}: not valid JSON at character {consumed + error.pos}: {error.msg}; "
                            "expected a list of entries, or one entry a line"
                        ) from error
                    consumed += position
                    text, position, block = text[position:] + more, 0, block * 2
                    continue
                yield f"{path}, entry {number}", entry
                number, position, block = number + 1, end, _BLOCK
            if in_list and not ended:
                raise DatasetError(f"{path} ends inside its list after {number} entries; the file is cut off")
            if not number:
                raise DatasetError(f"{path} holds no entries; expected a JSON list of them, or one a line")
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error.strerror}; pass a JSON file of entries") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 at byte {error.start}: {error.reason}; expected JSON text") from error


def import_json(source: Path, destination: str | Path, tokenizer_dir: Path, settings: ImportSettings) -> Manifest:
    """Make a dataset of a JSON file. The same call resumes where an interrupted one stopped.

    Args:
        tokenizer_dir: of the teacher whose tokens the rows are of.

    Raises:
        DatasetError: if an entry cannot be imported, naming file, row, position, value and fix; nothing is left behind.
    """
    reader = EntryReader(tokenizer_dir, settings)
    size = len(reader.vocabulary)
    count = 0
    with progress() as bar:
        task = bar.add_task("checking", total=None, note=source.name)
        seen: dict[bytes, str] = {}
        for where, entry in read_entries(source):
            record = reader.record(entry, where, count)
            try:
                check_record(record, size)
            except DatasetError as error:
                raise DatasetError(f"{where}: {error}") from error
            key = hashlib.blake2b(record.sample_id.encode(), digest_size=16).digest()
            if key in seen:
                raise DatasetError(f"{where}: id {record.sample_id!r} is also that of {seen[key]}; ids must be unique")
            seen[key] = where
            count += 1
            bar.update(task, completed=count)
        template = reader.template
        provenance = Provenance(
            teacher=f"import:{source.name}",
            tokenizer_fingerprint=reader.vocabulary.fingerprint,
            chat_template_fingerprint=template.fingerprint if template else None,
            engine="import-json",
            dtype="unknown",
            top_k=settings.top_k,
            prompts_fingerprint=file_sha256(source),
            details={
                "values": settings.values,
                "held_out": settings.held_out,
                "sampling": repr(settings.sampling),
                "template_arguments": settings.template_arguments,
                "rendered": settings.rendered,
                "rendered_probe": template.probe if template else {},
            },
        )
        writer = DatasetWriter(destination, provenance, reader.vocabulary, tokenizer_dir)
        task = bar.add_task("importing", total=count, note="")
        entries = enumerate(read_entries(source))
        units: list[str] = []
        while batch := list(itertools.islice(entries, UNIT_ENTRIES)):
            units.append(f"import-{len(units):06d}")
            writer.write_unit(units[-1], (reader.record(entry, where, number) for number, (where, entry) in batch))
            bar.update(task, advance=len(batch))
        return writer.finish(units)


def export_json(
    source: str | Path, destination: Path, split: str | None = None, rule: str | None = None, limit: int | None = None
) -> int:
    """Write a dataset's records as a JSON list, in one step. Returns how many.

    Raises:
        DatasetError: if the dataset is damaged or nothing in it is of that split and rule.
    """
    dataset = Dataset.open(source)
    partial = destination.with_name(destination.name + ".partial")
    count = 0
    try:
        with progress() as bar, partial.open("w", encoding="utf-8") as file:
            task = bar.add_task("exporting", total=None if limit is None else min(limit, len(dataset)), note="")
            for record in itertools.islice(dataset.records(split, rule), limit):
                file.write(",\n" if count else "[\n")
                json.dump(to_entry(record, dataset.vocabulary), file, ensure_ascii=False, allow_nan=False)
                count += 1
                bar.update(task, advance=1)
            file.write("\n]\n")
        if not count:
            raise DatasetError(
                f"{source} has no records of split {split or 'any'} and rule {rule or 'any'}; it has "
                + (", ".join(f"{n} of {key}" for key, n in dataset.manifest.counts.items()) or "none at all")
            )
        partial.replace(destination)
    except OSError as error:
        raise DatasetError(
            f"cannot write {destination}: {error.strerror}; choose another file or free space"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return count
