"""One record for a person: its prompt, and every token with its candidates."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from shared.dataset.reader import Dataset
from shared.dataset.records import Record
from shared.errors import DatasetError
from shared.tokenizer.vocabulary import Vocabulary


def find_record(dataset: Dataset, which: str) -> Record:
    """The record of that number; where there is none, the one of that sample id.

    Raises:
        DatasetError: if there is none.
    """
    is_number = which.removeprefix("-").isdecimal()
    if is_number and -len(dataset) <= int(which) < len(dataset):
        return dataset[int(which)]
    base = 0
    for table in dataset.tables(["sample_id"]):
        names = table["sample_id"].to_pylist()
        if which in names:
            return dataset[base + names.index(which)]
        base += len(names)
    if is_number:
        raise DatasetError(
            f"record {which} does not exist: the dataset has records 0 to {len(dataset) - 1}, and none with that "
            "sample id"
        )
    example = next((r.sample_id for r in dataset.records(distributions=False)), "none")
    raise DatasetError(f"no record has the sample id {which!r}; ids look like {example!r}, or give a number from 0")


def render_record(record: Record, vocabulary: Vocabulary, candidates: int = 5, tokens: int | None = None) -> Group:
    """The record for a terminal, the first `tokens` of its response with their first `candidates`."""
    head = Table(show_header=False, title=escape(record.sample_id))
    sampling = record.sampling
    for name, value in (
        ("prompt", f"{record.prompt_id} ({record.split}{', ' + record.skill if record.skill else ''})"),
        (
            "decoding",
            f"{sampling.rule}: temperature {sampling.temperature}, top_p {sampling.top_p}, top_k {sampling.top_k}",
        ),
        ("finished by", record.finish_reason),
        ("tokens", f"{len(record.prompt_ids)} of the prompt, {len(record.response_ids)} of the response"),
        ("prompt text", record.prompt_text),
        ("response", record.response_bytes.decode("utf-8", "replace")),
    ):
        head.add_row(name, Text(str(value)))
    d = record.distributions
    if d is None:
        return Group(head, Text("no distributions: a plain conversation"))
    body = Table("#", "token", "p", "tail", "candidates", title="tokens and what the teacher thought of them")
    for position in range(len(d))[:tokens]:
        ids, logprobs = d.row(position)
        own = int(record.response_ids[position])
        row = Text()
        for index, logprob in zip(ids[:candidates], logprobs[:candidates], strict=True):
            style = "bold green" if index == own else ""
            row.append(f"{_shown(vocabulary, int(index))} {math.exp(logprob):.3f}", style).append("  ")
        body.add_row(
            str(position),
            Text(_shown(vocabulary, own)),
            _probability(math.exp(d.sampled[position])),
            _probability(float(d.tail[position])),
            row,
        )
    left = len(d) - len(range(len(d))[:tokens])
    return Group(head, body, Text(f"… {left} more tokens (--tokens)")) if left else Group(head, body)


def _shown(vocabulary: Vocabulary, index: int) -> str:
    if vocabulary.is_special[index]:
        return vocabulary.texts[index] or f"[{index}]"
    return repr(vocabulary.tokens[index].decode("utf-8", "backslashreplace"))


def _probability(value: float) -> str:
    return "?" if np.isnan(value) else f"{value:.4f}"


def show(path: str | Path, which: str, candidates: int, tokens: int | None) -> Group:
    """`render_record` of a record of the dataset at `path`."""
    dataset = Dataset.open(path)
    return render_record(find_record(dataset, which), dataset.vocabulary, candidates, tokens)
