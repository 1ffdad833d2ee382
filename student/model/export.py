"""Loading and saving a student: strict about keys and shapes, and self-contained on disk.

A saved student is safetensors, tokenizer, config.json and the modeling files, so that
`AutoModel.from_pretrained(directory, trust_remote_code=True)` needs torch and transformers only. Keys and config
fields are upstream's, so upstream's code loads it too, and `load_student` loads upstream's checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shared.config import LoraConfig
from shared.dataset.manifest import MANIFEST
from shared.errors import CheckpointError
from shared.files import new_directory, read_json, write_json
from student.lineage import IDENTITY, RECORD, SEQUENTIAL_HEAD, config_of, require_current_model, require_start_of_run
from student.model.lora import add_lora, merge_lora
from student.model.tokenizer import pretrained_tokenizer

if TYPE_CHECKING:
    import torch

    from student.model.configuration_llada import LladaConfig
    from student.model.modeling_llada import LladaForMaskedDiffusion

ExportDtype = Literal["bfloat16", "float16", "float32"]
MODELLING_FILES = ("configuration_llada.py", "modeling_llada.py", "attention.py", "prefix_cache.py")
AUTO_MAP = {
    "AutoConfig": "configuration_llada.LladaConfig",
    "AutoModel": "modeling_llada.LladaForMaskedDiffusion",
    "AutoModelForMaskedLM": "modeling_llada.LladaForMaskedDiffusion",
    "AutoModelForCausalLM": "modeling_llada.LladaForMaskedDiffusion",
}

_logger = logging.getLogger(__name__)


def load_student(directory: str | Path, dtype: torch.dtype | None = None) -> tuple[LladaForMaskedDiffusion, Any]:
    """The model and tokenizer of `directory`, a saved student or upstream's checkpoint. With flex attention where there
    is a GPU.

    Args:
        dtype: of the weights; null takes the checkpoint's.

    Raises:
        CheckpointError: if files are missing, keys are missing, extra or misshapen (all are listed), or the
            tokenizer does not fit the config.
    """
    import torch

    from student.model.modeling_llada import LladaForMaskedDiffusion
    from student.model.sequential_head import load_sequential_head

    directory = Path(directory)
    config = read_config(directory)
    check_state({name: shape for name, (shape, _) in tensor_shapes(directory).items()}, config, directory)
    tokenizer = read_tokenizer(directory, config)
    model = LladaForMaskedDiffusion.from_pretrained(
        directory,
        config=config,
        dtype=dtype or "auto",
        use_safetensors=True,  # never a pickle that lies beside them
        attn_implementation="flex_attention" if torch.cuda.is_available() else "sdpa",
    )
    load_sequential_head(model, directory)
    return model, tokenizer


def save_student(
    model: LladaForMaskedDiffusion,
    tokenizer: Any,
    directory: str | Path,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Write a self-contained checkpoint into `directory`; adapters are merged into their layers.

    Args:
        state_dict: the weights where the model does not hold them whole (ZeRO-3, meta device).
        max_shard_size: of one safetensors file.

    Raises:
        CheckpointError: if `state_dict` is not the model's (its keys are listed), or the tokenizer does not fit.
    """
    from student.model.sequential_head import save_sequential_head, take_sequential_head

    directory = Path(directory)
    weights = merge_lora(model, dict(model.state_dict() if state_dict is None else state_dict))
    draft_head = take_sequential_head(weights)
    check_state({name: tuple(tensor.shape) for name, tensor in weights.items()}, model.config, directory)
    check_tokenizer(tokenizer, model.config, directory)
    directory.mkdir(parents=True, exist_ok=True)
    model.config.auto_map = dict(AUTO_MAP)
    dtype = next(iter(weights.values())).dtype
    # The module may hold adapters or no weights at all: what is saved is `weights`, under the plain class's config.
    model.save_pretrained(directory, state_dict=weights, max_shard_size=max_shard_size)
    # save_pretrained records the module's dtype, which need not be that of the weights that were given.
    model.config.dtype = dtype
    model.config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    save_sequential_head(draft_head, directory)
    for name in MODELLING_FILES:
        shutil.copyfile(Path(__file__).with_name(name), directory / name)


def export_student(
    run: Path,
    to: Path | None = None,
    dtype: ExportDtype | None = None,
    max_shard_size: str = "5GB",
    checkpoint: int | None = None,
) -> Path:
    """Write the trained student of `run` (or the model that `run` is) to `to`, and load it back.

    Args:
        checkpoint: the step whose checkpoint is exported, in place of the trained student.

    What the model was trained from, and its tokens' counts, go along with it (training.json, token_counts.npy; of a
    checkpoint, where the prepared data that it was trained from are still there).

    Raises:
        CheckpointError: if there is no model, or `to` holds anything but an earlier export, which is replaced.
        StaleError: if the run's dataset, start or prepared data are no longer those that its model was trained from; of
            a checkpoint, if the start is not.
    """
    import torch

    target = (to or run / ("export" if checkpoint is None else f"export-{checkpoint}")).resolve()
    _require_replaceable(target, run)
    if checkpoint is not None:
        return _export_checkpoint(run, checkpoint, target, dtype, max_shard_size)
    source = run if (run / "config.json").exists() else run / "student" / "final"
    if not (source / "config.json").exists():
        raise CheckpointError(
            f"{run} holds no trained student (no {source}/config.json); train it with `student train`"
        )
    if source != run:
        way_out = f"give {source} itself to export this model all the same"
        require_current_model(config_of(run), settings={}, way_out=way_out)
    model, tokenizer = load_student(source, getattr(torch, dtype) if dtype else None)
    with new_directory(target) as partial:
        save_student(model, tokenizer, partial, max_shard_size=max_shard_size)
        for name in (RECORD, "token_counts.npy"):
            if (source / name).exists():
                shutil.copyfile(source / name, partial / name)
        copy, _ = load_student(partial)
        for name, tensor in copy.state_dict().items():
            if not torch.equal(tensor, model.get_parameter(name)):
                raise CheckpointError(f"{partial}: {name} does not read back as it was written; check the disk")
    _logger.info("%s: %s parameters, %s", target, f"{model.num_parameters():,}", model.dtype)
    return target


def _require_replaceable(target: Path, run: Path) -> None:
    """Refuse to export to where something would be deleted that is not an earlier export."""
    for source in (run, run / "student" / "init", run / "student" / "final"):
        if source.resolve().is_relative_to(target):
            raise CheckpointError(
                f"cannot export to {target}: that is or contains {source}, which would be deleted; give a new directory"
            )
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    # Upstream's checkpoints have files of the first two names as well.
    if not all((target / name).is_file() for name in ("config.json", *MODELLING_FILES)):
        raise CheckpointError(
            f"cannot export to {target}: what is there would be deleted, and only an earlier export of a student, "
            "config.json beside modeling_llada.py and its other files, is replaced; give a new directory, or empty it"
        )


def _export_checkpoint(run: Path, step: int, target: Path, dtype: ExportDtype | None, max_shard_size: str) -> Path:
    import torch

    from student.alignment.prepared import PreparedDataset
    from student.drafting.frequencies import count_tokens, write_counts
    from student.training.checkpoint import Checkpoint, whole_weights

    folder = run / "student" / "checkpoints" / f"step-{step}"
    found = Checkpoint.read(folder)
    if found is None:
        there = sorted(path.name for path in folder.parent.glob("step-*")) or ["none"]
        raise CheckpointError(f"{folder} is no whole checkpoint; there are {', '.join(there)} in {folder.parent}")
    require_start_of_run(run, folder, found.identity)
    model, tokenizer = load_student(run / "student" / "init")
    if (lora := found.identity.get("student.lora")) is not None:
        add_lora(model, LoraConfig(**lora))
    blocks = found.identity["train.objectives"]["blocks"]
    model.config.draft_block_length = found.identity["train.block_length"] if blocks else None
    kind = getattr(torch, dtype or found.identity["train.dtype"])
    weights = {name: value.to(kind) for name, value in whole_weights(found).items()}
    with new_directory(target) as partial:
        save_student(model, tokenizer, partial, state_dict=weights, max_shard_size=max_shard_size)
        write_json(partial / RECORD, {"published_step": step, IDENTITY: found.identity})
        prepared = run / "prepared"
        # Other prepared data, or none, are no reason to refuse the weights.
        if (read_json(prepared / MANIFEST) or {}).get("fingerprint", "") == found.identity.get("prepared data"):
            write_counts(partial, count_tokens(PreparedDataset.open(prepared), model.config.vocab_size))
    _logger.info("%s: the checkpoint of step %d, %s", target, step, kind)
    return target


def read_config(directory: Path) -> LladaConfig:
    """The LLaDA config of a checkpoint.

    Raises:
        CheckpointError: if there is none, or it is not of a LLaDA model that this code computes.
    """
    from student.model.configuration_llada import LladaConfig

    tree = read_config_tree(directory)
    if tree.get("model_type") != LladaConfig.model_type:
        raise CheckpointError(
            f"{directory}/config.json is of a {tree.get('model_type')!r} model, expected 'llada'; "
            "make a student of it with `student init`"
        )
    tree.pop("transformers_weights", None)  # would have transformers load another file than the one that was checked
    try:
        return LladaConfig.from_dict(tree)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{directory}/config.json: {error}") from error


def read_config_tree(directory: Path) -> dict[str, Any]:
    """config.json as it stands.

    Raises:
        CheckpointError: if it is missing or not JSON.
    """
    tree = read_json(directory / "config.json")
    if tree is None:
        raise CheckpointError(
            f"{directory} holds no model: there is no config.json in it; expected a directory that `student init` or "
            "save_pretrained wrote"
        )
    return tree


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, whole or sharded.

    Raises:
        CheckpointError: if there are none, or the index is damaged or names one that is not in the directory.
    """
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise CheckpointError(f"{directory} has neither {single.name} nor {index.name}; convert it to safetensors")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is damaged ({error!r}); copy the whole checkpoint") from error
    for name in names:
        if Path(name).name != name or Path(name).suffix != ".safetensors":
            raise CheckpointError(
                f"{index} names {name!r}, expected safetensors files beside it; copy the checkpoint anew"
            )
    missing = [name for name in names if not (directory / name).exists()]
    if missing:
        raise CheckpointError(f"{index} names {', '.join(missing)}, not in {directory}; copy the whole checkpoint")
    return [directory / name for name in names]


def weights_fingerprint(directory: Path) -> str:
    """sha256 over every tensor's name, type and shape and 4 KiB at its start, middle and end.

    A sequential head beside them counts. The same whatever files the tensors lie in. Reads a few MB of a model of any
    size: enough to tell two starts or two trainings apart, not to find a flipped bit.

    Raises:
        CheckpointError: if a file is missing or damaged.
    """
    samples = []
    for path in [*weight_files(directory), *directory.glob(SEQUENTIAL_HEAD)]:
        try:
            with path.open("rb") as file:
                length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
                if length > size:
                    raise ValueError(f"its header says that it has {length} bytes, the whole file has {size}")
                header = json.loads(file.read(length))
                header.pop("__metadata__", None)
                for name, entry in header.items():
                    start, end = entry.pop("data_offsets")
                    digest = hashlib.sha256(json.dumps([name, entry], sort_keys=True).encode())
                    for at in (start, (start + end) // 2, max(start, end - 4096)):
                        file.seek(8 + length + at)
                        digest.update(file.read(min(4096, end - at)))
                    samples.append((name, digest.hexdigest()))
        except (OSError, ValueError, AttributeError, KeyError, OverflowError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); copy it again") from error
    return hashlib.sha256(json.dumps(sorted(samples)).encode()).hexdigest()


def tensor_shapes(directory: Path) -> dict[str, tuple[tuple[int, ...], Path]]:
    """Name → (shape, file) of every stored tensor; reads headers only.

    Raises:
        CheckpointError: if a file is missing or damaged, or an adapter lies beside the weights.
    """
    from safetensors import SafetensorError, safe_open

    if (directory / "adapter_config.json").exists():
        raise CheckpointError(f"{directory} has an adapter_config.json beside its weights; merge the adapter into them")
    found = {}
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (a handle, not a mapping)
                    found[name] = (tuple(file.get_slice(name).get_shape()), path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); copy it again") from error
    return found


def check_state(found: Mapping[str, tuple[int, ...]], config: LladaConfig, source: Path | str) -> None:
    """Hold the keys and shapes of a state dict against the config's.

    Raises:
        CheckpointError: listing every key that is missing, extra or of another shape.
    """
    import torch

    from student.model.modeling_llada import LladaForMaskedDiffusion

    with torch.device("meta"):
        model = LladaForMaskedDiffusion(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = [f"missing: {name}" for name in expected if name not in found]
    problems += [f"extra: {name}" for name in found if name not in expected]
    problems += [
        f"shape of {name}: {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]
    if problems:
        shown = problems if len(problems) <= 40 else [*problems[:40], f"and {len(problems) - 40} more"]
        raise CheckpointError(
            f"{source} does not hold the weights that its config.json describes:\n  " + "\n  ".join(shown)
        )


def check_tokenizer(tokenizer: Any, config: LladaConfig, source: Path | str) -> None:
    """Hold a tokenizer against the config.

    Raises:
        CheckpointError: if it has more tokens than the config, or another mask id.
    """
    tokens, mask, own = len(tokenizer), config.mask_token_id, tokenizer.mask_token_id
    if tokens > config.vocab_size:
        problem = f"the tokenizer has {tokens} tokens but the config's vocab_size is {config.vocab_size}"
    elif mask >= tokens:
        problem = f"mask_token_id is {mask} but the tokenizer has {tokens} tokens"
    elif own not in (None, mask):
        problem = f"the tokenizer's mask is {tokenizer.mask_token!r} ({own}), the config's mask_token_id is {mask}"
    else:
        return
    raise CheckpointError(f"{source}: {problem}; this is another model's tokenizer")


def read_tokenizer(directory: Path, config: LladaConfig) -> Any:
    """The tokenizer of a saved student, with its mask.

    Raises:
        CheckpointError: if it is missing or does not fit the config.
    """
    tokenizer = pretrained_tokenizer(directory, config)
    check_tokenizer(tokenizer, config, directory)
    if tokenizer.mask_token_id is None:
        # Upstream's tokenizer has the mask but does not register it.
        tokenizer.mask_token = tokenizer.convert_ids_to_tokens(config.mask_token_id)
    return tokenizer
