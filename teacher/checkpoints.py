"""The teacher's checkpoint on this machine: a directory, a snapshot of a hub repository, or a conversion from GGUF.

A hub name is resolved to one commit at its first use, and everything after that (tokenizer, vocabulary, provenance, the
weights that vLLM fetches) is of this commit, whatever happens to the branch meanwhile.

GGUF weights are dequantized by transformers and saved as a plain safetensors checkpoint in bfloat16, with the
tokenizer and chat template that the same file carries. It costs some seconds and four bytes a parameter of
memory, once: the result is published by one rename, so a killed conversion leaves no half checkpoint, and the
next one clears what it left. Processes that start together wait for one of them to convert.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from shared.config import TeacherConfig
from shared.errors import CheckpointError
from shared.files import new_directory
from shared.hub import is_hub_name

log = logging.getLogger(__name__)

_SNAPSHOT_FILES = ["*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
"""What of a hub repository is fetched here: all but the weights, which vLLM fetches wherever its ranks are."""


def ensure_checkpoint(teacher: TeacherConfig) -> Path:
    """The directory of the checkpoint that `teacher.model` names, converted first where `teacher.gguf` says so.

    Of a hub name it is the snapshot in the hub's cache, with the tokenizer and the configuration and without weights.

    Raises:
        CheckpointError: if the directory is missing or holds no config.json, the GGUF file is missing or cannot be
            converted, or the hub's repository cannot be fetched.
    """
    source = _unconverted(teacher)
    if source is not None:
        convert_gguf(source, Path(teacher.model))
    return _directory(teacher)


def hub_commit(teacher: TeacherConfig) -> str | None:
    """The commit that a hub name stands for; None for a directory of this machine.

    Raises:
        CheckpointError: if the repository cannot be fetched.
    """
    is_local = teacher.gguf is not None or Path(teacher.model).exists()
    return None if is_local else _directory(teacher).name


def locate_gguf(name: str) -> Path:
    """Find a GGUF file by path, or as PACKAGE/FILE inside an installed package, which is not imported.

    Raises:
        CheckpointError: if there is no such file.
    """
    path = Path(name)
    if path.is_file():
        return path
    package, _, file = name.partition("/")
    spec = importlib.util.find_spec(package) if file and package.isidentifier() else None
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    raise CheckpointError(
        f"teacher.gguf {name} is no file here, nor FILE of an installed package as PACKAGE/FILE; give one of the two "
        "(`make setup` installs the demo's)"
    )


def vocabulary_size(teacher: TeacherConfig) -> int:
    """Rows of the teacher's output head, from config.json or the GGUF file's header, without loading a weight.

    Raises:
        CheckpointError: as `ensure_checkpoint`, or if the configuration names no vocabulary.
    """
    source = _unconverted(teacher)
    if source is not None:
        from gguf import GGUFReader

        field = GGUFReader(str(source)).get_field("tokenizer.ggml.tokens")
        size = None if field is None else len(field.data)
    else:
        config = _directory(teacher) / "config.json"
        try:
            tree = json.loads(config.read_text())
        except ValueError as error:
            raise CheckpointError(f"{config} is not JSON: {error}; copy the checkpoint again") from error
        size = tree.get("vocab_size") or tree.get("text_config", {}).get("vocab_size")
    if not isinstance(size, int):
        raise CheckpointError(f"teacher.model {teacher.model} states the vocab_size {size!r}, expected a number")
    return size


def load_tokenizer(teacher: TeacherConfig) -> Any:
    """The teacher's tokenizer with its chat template; from the GGUF file as long as that is not converted.

    Raises:
        CheckpointError: if it cannot be loaded.
    """
    source = _unconverted(teacher)
    directory = _directory(teacher) if source is None else source.parent
    from transformers import AutoTokenizer

    try:
        if source is None:
            return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(str(directory), gguf_file=source.name)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"teacher.model {teacher.model}: its tokenizer cannot be loaded: {error}") from error
    _restore_pre_tokenizer(tokenizer, source)
    return tokenizer


def fingerprint(teacher: TeacherConfig) -> str:
    """sha256 over config.json and what stands for the weights.

    Of a hub name that is its commit, which names the content of every file; of a directory, every weight file's name,
    size and header: names, shapes and dtypes of tensors.
    """
    directory, commit = _directory(teacher), hub_commit(teacher)
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    if commit is not None:
        digest.update(commit.encode())
        return digest.hexdigest()
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb") as handle:
            digest.update(f"{file.name}:{file.stat().st_size}".encode() + handle.read(1 << 20))
    return digest.hexdigest()


def convert_gguf(source: Path, destination: Path) -> None:
    """Write the model and tokenizer of `source` as a safetensors checkpoint at `destination`, unless one is there.

    Raises:
        CheckpointError: if transformers cannot read the file.
    """
    with _locked(destination.parent):
        if destination.exists():
            return  # another process converted it while this one waited
        log.info("converting %s to %s (once)", source.name, destination)
        with new_directory(destination) as partial:
            _convert(source, partial)


def _convert(source: Path, directory: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder, file = str(source.parent), source.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        # Without `dequantize` the weights stay in GGUF's blocks, which safetensors cannot hold.
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype="bfloat16"
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{source} cannot be converted: {error}; expected a GGUF file that transformers reads"
        ) from error
    _restore_pre_tokenizer(tokenizer, source)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    _name_end_of_turn(directory, tokenizer)


def _unconverted(teacher: TeacherConfig) -> Path | None:
    """The GGUF file that `teacher.model` is still to be converted from; None where nothing is to be converted."""
    return None if teacher.gguf is None or Path(teacher.model).exists() else locate_gguf(teacher.gguf)


def _directory(teacher: TeacherConfig) -> Path:
    """The checkpoint, or the snapshot of a hub name; errors as `ensure_checkpoint`."""
    directory = Path(teacher.model)
    if not directory.exists():
        if not is_hub_name(teacher.model) or directory.parent.exists():  # a folder `owner` makes it a path
            raise CheckpointError(
                f"teacher.model {teacher.model} does not exist; point it at a checkpoint directory, or set "
                "teacher.gguf to a GGUF file that it can be converted from"
            )
        directory = _fetch_snapshot(teacher.model, teacher.revision)
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"teacher.model {teacher.model}: {directory} holds no config.json, expected a checkpoint with config.json, "
            "safetensors and a tokenizer; point teacher.model at one"
        )
    return directory


@lru_cache
def _fetch_snapshot(name: str, revision: str | None) -> Path:
    """The small files of a hub repository, in the hub's cache; the directory's name is their commit.

    Resolved once a process, so that a branch that moves while it runs gives it no files of two commits.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    log_in = "`hf auth login`, or set HF_TOKEN to a token of an account that may read it"
    reasons = {
        GatedRepoError: "is gated and this machine has no access: accept its terms at "
        f"https://huggingface.co/{name}, then log in with {log_in}",
        RepositoryNotFoundError: "is neither a directory here nor a repository that can be seen on the hub; correct "
        f"the name or, if it is private, log in with {log_in}",
        RevisionNotFoundError: "has no such branch, tag or commit; correct teacher.revision",
        LocalEntryNotFoundError: "is not in the hub's cache and the hub cannot be reached; fetch it where there is a "
        f"network (`hf download {name}`, then copy the cache), or point teacher.model at a directory",
    }
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_SNAPSHOT_FILES))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        shown = name if revision is None else f"{name} at teacher.revision {revision}"
        # The first that fits: a gated repository counts as one that is not found, too.
        fitting = (text for kind, text in reasons.items() if isinstance(error, kind))
        raise CheckpointError(f"teacher.model {shown} {next(fitting, f'cannot be fetched: {error}')}") from error


def _restore_pre_tokenizer(tokenizer: Any, source: Path) -> None:
    """Put back what transformers drops of `tokenizer.ggml.pre`.

    It keeps GPT-2's split only; the `smollm` family splits digits off first. Without that, "  5" has other
    tokens than those the model was trained on.
    """
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    field = GGUFReader(str(source)).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )


def _name_end_of_turn(directory: Path, tokenizer: Any) -> None:
    """Name in generation_config.json the tokens that end an answer; vLLM stops at exactly these."""
    path = directory / "generation_config.json"
    generation = json.loads(path.read_text()) if path.exists() else {}
    generation["eos_token_id"] = tokenizer.eos_token_id
    path.write_text(json.dumps(generation, indent=2) + "\n")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a directory, which is made where it is not there. The lock goes with its holder."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
