"""The teacher's checkpoint on this machine, converted once from GGUF where that is what a package ships.

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
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shared.config import TeacherConfig
from shared.errors import CheckpointError

log = logging.getLogger(__name__)


def ensure_checkpoint(teacher: TeacherConfig) -> Path | str:
    """The checkpoint that `teacher.model` names: its directory, converted first where `teacher.gguf` says so.

    Returns a hub name unchanged: fetching it is vLLM's and transformers' business.

    Raises:
        CheckpointError: if the directory is missing or holds no config.json, or the GGUF file is missing or
            cannot be converted.
    """
    directory = Path(teacher.model)
    check_checkpoint(teacher)
    if teacher.gguf is not None and not directory.exists():
        convert_gguf(locate_gguf(teacher.gguf), directory)
    return directory if directory.exists() else teacher.model


def check_checkpoint(teacher: TeacherConfig) -> None:
    """Check that `ensure_checkpoint` has something to work with, and write nothing.

    Raises:
        CheckpointError: as `ensure_checkpoint`.
    """
    directory = Path(teacher.model)
    if directory.exists():
        if not (directory / "config.json").is_file():
            raise CheckpointError(
                f"teacher.model {teacher.model}: the directory holds no config.json, expected a checkpoint "
                "with config.json, safetensors and a tokenizer; point teacher.model at one"
            )
    elif teacher.gguf is not None:
        locate_gguf(teacher.gguf)
    elif not _is_hub_name(teacher.model):
        raise CheckpointError(
            f"teacher.model {teacher.model} does not exist; point it at a checkpoint directory, or set teacher.gguf "
            "to a GGUF file that it can be converted from"
        )


def locate_gguf(name: str) -> Path:
    """Find a GGUF file by path, or as PACKAGE/FILE inside an installed package, which is not imported.

    Raises:
        CheckpointError: if there is no such file.
    """
    path = Path(name)
    if path.is_file():
        return path
    package, _, file = name.partition("/")
    folders: list[str] = []
    if file and package.isidentifier():
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations is not None:
            folders = list(spec.submodule_search_locations)
    for folder in folders:
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    why = (
        f"package {package} is installed without {file}"
        if folders
        else "no such file and no installed package of that name"
    )
    raise CheckpointError(f"teacher.gguf {name}: {why}; give a path or PACKAGE/FILE (`make setup` installs the demo's)")


def vocabulary_size(teacher: TeacherConfig) -> int:
    """Rows of the teacher's output head, from config.json or the GGUF file's header, without loading a weight.

    Raises:
        CheckpointError: as `ensure_checkpoint`, or if the configuration names no vocabulary.
    """
    check_checkpoint(teacher)
    config = Path(teacher.model) / "config.json"
    if config.is_file():
        try:
            tree = json.loads(config.read_text())
        except ValueError as error:
            raise CheckpointError(f"{config} is not JSON: {error}; copy the checkpoint again") from error
        size = tree.get("vocab_size") or tree.get("text_config", {}).get("vocab_size")
    elif teacher.gguf is not None:
        from gguf import GGUFReader

        field = GGUFReader(str(locate_gguf(teacher.gguf))).get_field("tokenizer.ggml.tokens")
        size = None if field is None else len(field.data)
    else:
        from transformers import AutoConfig

        try:
            size = AutoConfig.from_pretrained(teacher.model, revision=teacher.revision).get_text_config().vocab_size
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"teacher.model {teacher.model} is no directory here and cannot be fetched: {error}"
            ) from error
    if not isinstance(size, int):
        raise CheckpointError(f"teacher.model {teacher.model} states the vocab_size {size!r}, expected a number")
    return size


def load_tokenizer(teacher: TeacherConfig) -> Any:
    """The teacher's tokenizer with its chat template; from the GGUF file as long as that is not converted.

    Raises:
        CheckpointError: if it cannot be loaded.
    """
    check_checkpoint(teacher)
    from transformers import AutoTokenizer

    try:
        if teacher.gguf is None or Path(teacher.model).exists():
            return AutoTokenizer.from_pretrained(teacher.model, revision=teacher.revision)
        source = locate_gguf(teacher.gguf)
        tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"teacher.model {teacher.model}: its tokenizer cannot be loaded: {error}") from error
    _restore_pre_tokenizer(tokenizer, source)
    return tokenizer


def fingerprint(model: Path) -> str:
    """sha256 over config.json and every weight file's name, size and header: names, shapes and dtypes of tensors."""
    digest = hashlib.sha256((model / "config.json").read_bytes())
    for file in sorted(model.glob("*.safetensors")):
        with file.open("rb") as handle:
            digest.update(f"{file.name}:{file.stat().st_size}".encode() + handle.read(1 << 20))
    return digest.hexdigest()


def convert_gguf(source: Path, destination: Path) -> None:
    """Write the model and tokenizer of `source` as a safetensors checkpoint at `destination`, atomically.

    Raises:
        CheckpointError: if transformers cannot read the file.
    """
    with _exclusive_sibling(destination) as partial:
        if partial is None:
            return  # another process converted it while this one waited
        log.info("converting %s to %s (once)", source.name, destination)
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
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        _name_end_of_turn(partial, tokenizer)


def _is_hub_name(name: str) -> bool:
    """`owner/model` where no folder `owner` is here, which would make it a path."""
    owner, separator, model = name.partition("/")
    return (
        bool(separator) and re.fullmatch(r"[\w-]+", owner) is not None and "/" not in model and not Path(owner).exists()
    )


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
def _exclusive_sibling(destination: Path) -> Iterator[Path | None]:
    """Hold an empty hidden directory beside `destination` and rename it there at the end; None if another process did.

    The lock is on the directory itself, so it goes with its holder, and what a killed holder wrote is cleared.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.parent / f".{destination.name}.partial"
    while True:
        if destination.exists():
            yield None
            return
        partial.mkdir(exist_ok=True)
        try:
            descriptor = os.open(partial, os.O_RDONLY)
        except FileNotFoundError:
            continue
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # The holder before us may have renamed or removed the directory that we have just locked, or have ended
        # between our look at `destination` and our making of `partial`.
        with suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == partial.stat().st_ino:
                if not destination.exists():
                    break
                shutil.rmtree(partial)
        os.close(descriptor)
    try:
        for left in partial.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield partial
        partial.rename(destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)
