"""`shards push`: a valid dataset as a repository of the Hugging Face Hub.

What is sent is what the manifest names, the manifest, and the card; the last two when all else is there, so that an
upload that was interrupted is found by no reader. Files of an older dataset in the repository are deleted.
"""

from __future__ import annotations

import json
import logging

from shared.dataset.card import dataset_card
from shared.dataset.manifest import COMMITS, DATA, MANIFEST, PROVENANCE, TOKENIZER
from shared.dataset.reader import Dataset
from shared.dataset.storage import LocalStorage, open_storage
from shared.dataset.validate import validate_dataset
from shared.errors import DatasetError
from shared.hub import CARD, Repository, absolute_paths, public_name

log = logging.getLogger(__name__)


def push(directory: str, repository: Repository, license: str | None = None) -> str:
    """Validate the dataset at `directory` and publish it; returns the repository's address.

    Args:
        license: for the card; null leaves what it says.

    Raises:
        DatasetError: if `directory` is not on this machine, or holds no finished and valid dataset.
        HubError: as `Repository.check` and `Repository.push`.
    """
    storage = open_storage(directory)
    if not isinstance(storage, LocalStorage):
        raise DatasetError(
            f"{directory} is in an object store, and the Hub's client uploads local files: copy the dataset to a disk "
            "of this machine and push it from there"
        )
    repository.check()
    validate_dataset(directory).raise_if_damaged(directory)
    dataset = Dataset.open(directory)
    names = [entry.name for entry in dataset.manifest.files] + [unit.file for unit in dataset.manifest.units]
    if paths := sorted(absolute_paths(json.loads(storage.read(PROVENANCE)))):
        log.warning(
            "%s is pushed as it was collected, and names paths of a machine, such as %s; whoever sees the repository "
            "sees them",
            PROVENANCE,
            paths[0],
        )
    return repository.push(
        {name: storage.root / name for name in (*names, MANIFEST)} | {CARD: _card(dataset, repository, license)},
        last=(MANIFEST, CARD),
        replaced=[f"{folder}/*" for folder in (DATA, COMMITS, TOKENIZER)],
    )


def _card(dataset: Dataset, repository: Repository, license: str | None) -> str:
    """The card for the Hub: made anew, or the directory's own where somebody has edited it.

    An edited one has its shards by split all the same: without them `datasets` takes held-out files for training data.
    """
    made = dataset_card(dataset.manifest, dataset.provenance, repository.name, license)
    there = (dataset.storage.read_or_none(CARD) or b"").decode()
    if there in ("", dataset_card(dataset.manifest, dataset.provenance)):
        return made
    from huggingface_hub import RepoCard

    teacher = dataset.provenance.teacher
    card = RepoCard(there.replace(teacher, public_name(teacher)))
    card.data["configs"] = RepoCard(made).data.get("configs")
    if license is not None:
        card.data["license"] = license
    return str(card)
