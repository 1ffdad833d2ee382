"""The dataset card, `README.md`: what people read, and what `datasets.load_dataset(DIR)` finds the shards by.

It is made of the manifest and the provenance, once, and then belongs to whoever keeps the dataset (a license is theirs
to state): nothing of ours reads it, the manifest does not name it, and one that is there is left as it is.

A split's files are named by a pattern where it finds its shards and no others, and one by one elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import yaml

from shared.dataset.manifest import DATA, Manifest, Provenance, UnitEntry, split_of
from shared.dataset.schema import COLUMNS
from shared.hub import UNKNOWN_LICENSE, public_name

SPLITS = ("train", "held_out")


def dataset_card(
    manifest: Manifest, provenance: Provenance, repository: str | None = None, license: str | None = None
) -> str:
    """The card's text: YAML for `datasets` and the Hub, then Markdown.

    Args:
        repository: the dataset's name on the Hub, if it has one. license: if it is known.

    Raises:
        DatasetError: if a unit holds two splits: held-out records must not come as training data.
    """
    files = _files_by_split(manifest.units)
    splits = [split for split in SPLITS if split in files]
    data_files = [{"split": split, "path": _patterns(split, files)} for split in splits]
    front: dict[str, Any] = {"license": license or UNKNOWN_LICENSE}
    if data_files:
        front["configs"] = [{"config_name": "default", "data_files": data_files}]
    counts = "\n".join(f"| {key.replace('/', ' | ')} | {count:,} |" for key, count in manifest.counts.items())
    columns = "\n".join(f"| `{column.name}` | `{_type(str(column.type))}` | {column.meaning} |" for column in COLUMNS)
    teacher = public_name(provenance.teacher)
    where = "this directory, or its name on the Hub; " if repository is None else ""
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# Top-k distributions of {teacher}

A teacher's responses, and for every token of a response the teacher's most probable candidates with their logprobs
and the probability of everything else. Made for distillation.

| | |
|---|---|
| teacher | {teacher}{f" (revision {provenance.revision})" if provenance.revision else ""} |
| made by | {provenance.engine} {provenance.engine_version or ""} |
| candidates per token (k) | {_kept(provenance)} |
| responses | {manifest.rows:,} |
| response tokens | {manifest.tokens:,} |
| license | {license or "unknown: the terms of the teacher and of the prompts apply"} |

| split | decoding rule | responses |
|---|---|---|
{counts}

## Reading it

```python
from datasets import load_dataset

dataset = load_dataset("{repository or "PATH"}")  # {where}splits: {", ".join(splits) or "none"}
```

Any reader of Parquet opens `data/*.parquet`. `manifest.json` has the checksum of every file, `vocabulary.parquet` the
bytes of every token id, `provenance.json` all that decided the content.

| column | type | meaning |
|---|---|---|
{columns}

With G the running sum of a token's `candidate_gaps` and r its `tail_mass`, the logprob of candidate i is
`log(1 - r) - log(sum_j exp(-G_j / 16)) - G_i / 16`.
"""


def _kept(provenance: Provenance) -> str:
    mass = provenance.retained_mass
    return f"{provenance.top_k}" if mass is None else f"as many as hold {mass} of the mass, at most {provenance.top_k}"


def _type(arrow: str) -> str:
    return arrow.replace("element: ", "").replace(" not null", "")


def _files_by_split(units: Sequence[UnitEntry]) -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    for unit in units:
        split = split_of(unit)
        if split is not None:
            files.setdefault(split, []).append(unit.file)
    return files


def _patterns(split: str, files: dict[str, list[str]]) -> list[str]:
    pattern = f"{DATA}/{split}-*.parquet"  # as the teacher and imports name their units
    others = [file for name, group in files.items() if name != split for file in group]
    if any(fnmatchcase(file, pattern) for file in others):
        return files[split]
    single = [file for file in files[split] if not fnmatchcase(file, pattern)]
    return single if len(single) == len(files[split]) else [pattern, *single]
