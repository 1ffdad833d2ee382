"""`student push`: what `student export` writes, with a card, as a repository of the Hugging Face Hub.

The card says what the run's records prove, and leaves out what they do not: τ stands in it only if evaluate.json
measured these very weights. Paths of this machine stay on it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path, PurePath
from typing import Any

import yaml

from shared.dataset.manifest import MANIFEST
from shared.dataset.reader import Dataset
from shared.errors import CheckpointError
from shared.files import read_json
from shared.hub import CARD, UNKNOWN_LICENSE, Repository, absolute_paths, is_hub_name, public_name
from student.lineage import IDENTITY, RECORD
from student.model.export import (
    MODELLING_FILES,
    check_state,
    export_student,
    read_config,
    read_tokenizer,
    tensor_shapes,
    weights_fingerprint,
)

_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".npy")
_WITH_PATHS = ("config.json", RECORD)
"""Files in which transformers or the training may have named a directory."""
_REPLACED = ("*.safetensors", "*.safetensors.index.json", RECORD, "token_counts.npy")


def push_student(source: Path, repository: Repository, license: str | None = None) -> str:
    """Publish the student of the run `source`, or the one that was exported to `source`; returns its address.

    A run is exported to RUN/export first. Of an export alone nobody knows what was measured.

    Raises:
        CheckpointError: if there is no trained student, or `source` is a model that is not self-contained.
        StaleError: as `export_student`.
        HubError: as `Repository.check` and `Repository.push`.
    """
    repository.check()
    is_model = (source / "config.json").exists()
    directory = source if is_model else export_student(source)
    config, shapes = read_config(directory), tensor_shapes(directory)
    check_state({name: shape for name, (shape, _) in shapes.items()}, config, directory)
    read_tokenizer(directory, config)
    if missing := [name for name in MODELLING_FILES if not (directory / name).exists()]:
        raise CheckpointError(
            f"{directory} is not self-contained, it has no {missing[0]}; push what `student export {directory}` writes"
        )
    names = sorted(path.name for path in directory.iterdir() if path.suffix in _SUFFIXES)
    files: dict[str, Path | str] = {name: directory / name for name in (*names, *MODELLING_FILES)}
    for name in files.keys() & set(_WITH_PATHS):
        files[name] = _without_paths(directory / name)
    identity = (read_json(directory / RECORD) or {}).get(IDENTITY) or {}
    facts = {
        **(_teacher(source) if "dataset" in identity else {}),
        **_start(identity),
        "size": f"{config.n_layers} layers, {sum(math.prod(shape) for shape, _ in shapes.values()):,} parameters",
        "block length": f"{config.draft_block_length} tokens" if config.draft_block_length else None,
        "acceptance length τ": None if is_model else _acceptance(source, directory),
        "license": license or "unknown: the terms of the start and of the teacher apply",
    }
    files[CARD] = _card(repository.name, facts, license)
    return repository.push(files, replaced=_REPLACED)


def _teacher(run: Path) -> dict[str, str]:
    """The teacher that the run's dataset was collected from, where the dataset is there: by the record that
    `export_student` has compared, it is the one that the student was trained on."""
    if not (run / "shards" / MANIFEST).exists():
        return {}
    provenance = Dataset.open(run / "shards").provenance
    revision = f" (revision {provenance.revision})" if provenance.revision else ""
    return {"drafts for": public_name(provenance.teacher) + revision}


def _start(identity: dict[str, Any]) -> dict[str, str]:
    if "student.checkpoint" not in identity:
        return {}
    checkpoint, layers = identity["student.checkpoint"], identity.get("student.layers")
    if checkpoint is None:
        return {"started from": "random weights"}
    return {"started from": public_name(checkpoint) + (f", layers {', '.join(map(str, layers))}" if layers else "")}


def _acceptance(run: Path, exported: Path) -> str | None:
    measured = read_json(run / "evaluate.json") or {}
    tau = (measured.get("after") or {}).get("tau")
    if tau is None or (measured.get(IDENTITY) or {}).get("model") != weights_fingerprint(exported):
        return None
    how = f"held-out prompts, decoding {measured['rule']}, {measured['draft_tokens']} drafted tokens"
    return f"{tau:.3f} tokens per step of the teacher ({how})"


def _card(name: str, facts: dict[str, str | None], license: str | None) -> str:
    front: dict[str, Any] = {"license": license or UNKNOWN_LICENSE, "library_name": "transformers"}
    base = (facts.get("started from") or "").partition(",")[0]
    if is_hub_name(base) and not Path(base).exists():
        front["base_model"] = base
    front["tags"] = ["llada", "masked-diffusion", "speculative-decoding", "draft-model"]
    title = name.partition("/")[2]
    rows = "\n".join(f"| {what} | {value} |" for what, value in facts.items() if value is not None)
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# {title}

A draft model for speculative decoding: LLaDA, a masked-diffusion language model, trained on a teacher's top-k
distributions to fill in a whole block of the teacher's next tokens in one forward. The teacher verifies every drafted
token, so its output stays its own.

| | |
|---|---|
{rows}

## Serving it

In vLLM, by llada-drafter. CONFIG is a config whose `name` is NAME and whose `teacher.model` is the model that this one
drafts for:

```console
$ hf download {name} --local-dir runs/NAME/student/final
$ student serve CONFIG --run
```

## Loading it

```python
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
```
"""


def _without_paths(path: Path) -> str:
    """The JSON file at `path` with the last part in place of every absolute path."""
    tree = read_json(path)
    text = json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
    for place in absolute_paths(tree):
        quoted, last = (json.dumps(name, ensure_ascii=False) for name in (place, PurePath(place).name))
        text = text.replace(quoted, last)
    return text
