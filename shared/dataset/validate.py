"""Is this dataset what was collected, and does every row belong to its text?

Three layers, each in bounded memory: the JSON files and their own checksums; the sha256 of every file that the
manifest names; then, one row group at a time, the content: lengths, the response's bytes, the stored form of the rows,
the rules that the writer has (`shared.dataset.checks`), and that a greedy token leads its row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shared.dataset.checks import SHIFTED, Rows, id_problems, row_problems, size_problems
from shared.dataset.columns import flat_list, is_present, on_both_sides, open_parquet, repeated
from shared.dataset.encoding import decode_logprobs
from shared.dataset.manifest import COMMITS, DATA, MANIFEST, TOKENIZER, UnitEntry
from shared.dataset.reader import Dataset, read_manifest
from shared.dataset.records import Sampling, offsets_of
from shared.dataset.schema import DISTRIBUTION_COLUMNS, MAX_STEPS
from shared.dataset.storage import Storage, open_storage
from shared.dataset.writer import unit_entry
from shared.errors import DatasetError, UserError
from shared.tokenizer.vocabulary import Vocabulary, first_difference

GREEDY_TOLERANCE = 0.5
"""Nats that a greedy token may lie below its row's top: scoring and decoding differ by some rounding steps."""
_MOST_PER_UNIT = 20


@dataclass(slots=True)
class ValidationReport:
    """What was looked at, and all that is wrong with it; `problems` is empty for a sound dataset."""

    rows: int = 0
    tokens: int = 0
    units: int = 0
    problems: list[str] = field(default_factory=list)

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """A block whose error is a problem; what follows in the block is left out."""
        try:
            yield
        except UserError as error:
            self.problems.append(str(error))

    def raise_if_damaged(self, source: str | Path) -> None:
        """Raise `DatasetError` that lists the problems, where there are any."""
        if self.problems:
            shown = "\n  ".join(self.problems[:_MOST_PER_UNIT])
            more = len(self.problems) - _MOST_PER_UNIT
            raise DatasetError(
                f"{source} is not valid, {len(self.problems)} problems:\n  {shown}"
                + (f"\n  … and {more} more" if more > 0 else "")
            )


def validate_dataset(path: str | Path) -> ValidationReport:
    """Check everything about the dataset at `path`; problems are gathered, none is raised.

    Costs one pass over all bytes, and some 5 µs a token at k = 64.
    """
    report = ValidationReport()
    storage = open_storage(path)
    with report.gathering():
        dataset = Dataset(storage, read_manifest(storage))
        vocabulary = _check_files(dataset, report)
        names: list[pa.Table] = []
        for unit in dataset.manifest.units:
            with report.gathering():
                report.problems.extend(_unit_problems(storage, unit, vocabulary, names))
            report.units += 1
            report.rows += unit.rows
            report.tokens += unit.tokens
        report.problems.extend(
            f"sample id {sample!r} comes {count} times; delete one of its units and collect it again"
            for sample, count in repeated([c for t in names for c in t["sample_id"].chunks])[:_MOST_PER_UNIT]
        )
        report.problems.extend(
            f"prompt {prompt!r} is on both sides of the split, expected one; collect or import it again"
            for prompt in on_both_sides(names)[:_MOST_PER_UNIT]
        )
    return report


def _check_files(dataset: Dataset, report: ValidationReport) -> Vocabulary | None:
    """Everything but the shards. Returns the vocabulary, if it is sound."""
    storage, manifest = dataset.storage, dataset.manifest
    for entry in manifest.files:
        with report.gathering():
            storage.read_verified(entry.name, entry.sha256)
    named = {entry.name for entry in manifest.files} | {unit.file for unit in manifest.units}
    report.problems.extend(
        f"{storage.join(name)} is not in {MANIFEST}; delete it, or run the collection again to take it in"
        for folder in (DATA, COMMITS, TOKENIZER)
        for name in storage.list(folder)
        if name not in named
    )
    try:
        return dataset.vocabulary
    except (UserError, pa.ArrowException) as error:
        report.problems.append(f"the vocabulary cannot be read, so that no row was checked: {error}")
        return None


def _unit_problems(
    storage: Storage, unit: UnitEntry, vocabulary: Vocabulary | None, names: list[pa.Table]
) -> Iterator[str]:
    where = storage.join(unit.file)
    file = open_parquet(storage.read_verified(unit.file, unit.sha256), where)  # whatever was verified before
    seen: list[UnitEntry] = []
    found = 0
    for group in range(file.metadata.num_row_groups):
        try:
            table = file.read_row_group(group)
        except (pa.ArrowException, OSError) as error:
            yield f"{where}: row group {group} cannot be read: {error}"
            return
        for problem in () if vocabulary is None else table_problems(table, vocabulary):
            found += 1
            if found <= _MOST_PER_UNIT:
                yield f"{where}: {problem}"
        seen.append(unit_entry(unit.unit, table, b"", unit.provenance))
        names.append(table.select(["sample_id", "prompt_id", "split"]))
    if found > _MOST_PER_UNIT:
        yield f"{where}: … and {found - _MOST_PER_UNIT} more problems"
    totals: dict[str, Any] = {what: sum(getattr(e, what) for e in seen) for what in ("rows", "tokens", "candidates")}
    totals["counts"] = dict(sum((Counter(e.counts) for e in seen), Counter()))
    for what, value in totals.items():
        if value != getattr(unit, what):
            yield f"{where}: has {what} {value}, {MANIFEST} says {getattr(unit, what)}"


def table_problems(table: pa.Table, vocabulary: Vocabulary) -> Iterator[str]:
    """All that is wrong with the records of one row group, as `record ID: …` messages."""
    names = table["sample_id"].to_pylist()
    response, response_at = flat_list(table["response_ids"])
    yield from _sampling_problems(table, names)
    yield from _text_problems(table, names, vocabulary)
    has = {name: is_present(table[name]) for name in DISTRIBUTION_COLUMNS}
    present = has["width"]
    for name, mask in has.items():
        for row in np.flatnonzero(mask != present):
            yield f"record {names[row]!r}: {name} is {'there' if mask[row] else 'null'}, width is not"
            return
    flat = {name: flat_list(table[name]) for name in DISTRIBUTION_COLUMNS}
    widths, width_at = flat["width"]
    if (widths < 0).any():
        yield f"a width of {widths.min()} candidates, expected 0 or more"
        return
    lengths = np.diff(response_at)
    tokens = np.where(present, lengths, 0)  # lists that are null have no values
    sizes = {name: np.diff(at) for name, (_, at) in flat.items()}
    wrong_sizes = [*size_problems(tokens, np.diff(offsets_of(widths)[width_at]), sizes)]
    yield from (f"record {names[row]!r}: {problem}" for row, problem in wrong_sizes)
    if wrong_sizes:
        return
    # From here on tokens are those of records with distributions, numbered through the row group.
    record = np.repeat(np.arange(len(names)), tokens)
    position = np.arange(len(record)) - width_at[:-1][record]
    owners = response[np.repeat(present, lengths)]
    greedy = np.asarray(pc.equal(table["rule"], "greedy").combine_chunks())[record]
    stored = {name: values for name, (values, _) in flat.items()}
    for token, problem in _stored_problems(stored, owners, greedy, len(vocabulary)):
        yield f"record {names[record[token]]!r}, token {position[token]}: {problem}"


def _text_problems(table: pa.Table, names: list[str], vocabulary: Vocabulary) -> Iterator[str]:
    """Ids that the vocabulary does not have; where it has all of them, bytes that are not the tokens'."""
    sound = True
    for what in ("prompt", "response"):
        ids, at = flat_list(table[f"{what}_ids"])
        for name, start, end in zip(names, at[:-1], at[1:], strict=True):
            for _, problem in id_problems(ids[start:end], what, len(vocabulary)):
                sound = False
                yield f"record {name!r}: {problem}"
    if not sound:
        return
    response, at = flat_list(table["response_ids"])
    for name, start, end, stored in zip(names, at[:-1], at[1:], table["response_bytes"].to_pylist(), strict=True):
        decoded = vocabulary.decode(response[start:end])
        if decoded != stored:
            byte = first_difference(decoded, stored)
            yield (
                f"record {name!r}: response_bytes differ from the tokens' bytes at byte {byte}: "
                f"{stored[byte : byte + 12]!r} against {decoded[byte : byte + 12]!r}"
            )


def _stored_problems(
    flat: dict[str, NDArray[Any]], owners: NDArray[np.int32], greedy: NDArray[np.bool_], vocabulary_size: int
) -> Iterator[tuple[int, str]]:
    """Token and message of what is wrong with rows as they are stored; `owners` are the response's ids, [T]."""
    widths, gaps, tail = flat["width"], flat["candidate_gaps"], flat["tail_mass"]
    ends = offsets_of(widths)
    filled = widths > 0
    starts = ends[:-1][filled]
    row = np.repeat(np.arange(len(widths)), widths)
    for entry in starts[gaps[starts] != 0]:
        yield row[entry], f"the row's first gap is {gaps[entry]}, expected 0"
    running = np.cumsum(gaps, dtype=np.int64)
    below = running - np.repeat(running[starts] - gaps[starts], widths[filled])
    for entry in np.flatnonzero(below > MAX_STEPS):
        yield row[entry], f"gaps add up to {below[entry]} steps, expected at most {MAX_STEPS}"
    with np.errstate(invalid="ignore"):  # a tail above 1 has its own message
        logprobs = decode_logprobs(widths, gaps, tail)
    rows = Rows(owners, widths, flat["candidate_ids"], logprobs, tail, flat["sampled_logprob"])
    yield from row_problems(rows, vocabulary_size)
    top = np.full(len(widths), np.nan)
    top[filled] = logprobs[starts]
    for token in np.flatnonzero(greedy & filled & ~(rows.entries() >= top - GREEDY_TOLERANCE)):
        yield (
            token,
            f"decoded greedily with logprob {rows.sampled[token]:.4f}, but the row's top has {top[token]:.4f}; "
            f"{SHIFTED}",
        )


def _sampling_problems(table: pa.Table, names: list[str]) -> Iterator[str]:
    columns = [table[name].to_pylist() for name in ("rule", "temperature", "top_p", "top_k", "max_tokens", "seed")]
    for row, (rule, *sampling) in enumerate(zip(*columns, strict=True)):
        expected = Sampling(*sampling).rule
        if rule != expected:
            yield f"record {names[row]!r}: rule {rule!r}, its sampling settings make it {expected!r}"
    known = {"split": {"train", "held_out"}, "finish_reason": {"stop", "length", "unknown"}}
    for name, allowed in known.items():
        for row, value in enumerate(table[name].to_pylist()):
            if value not in allowed:
                yield f"record {names[row]!r}: {name} {value!r}, expected one of {', '.join(sorted(allowed))}"
