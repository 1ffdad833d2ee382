"""Where a student starts: a LLaDA checkpoint, or a LLaMA-architecture one read as LLaDA.

LLaDA's block is LLaMA's without the causal mask, so the second is a matter of names: the weights are taken as they
are, and only the attention changes. Tensors are read one by one; an unused layer is never loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import CheckpointError, ConfigError
from shared.hub import is_hub_name
from student.model.export import check_state, read_config, read_config_tree, tensor_shapes

if TYPE_CHECKING:
    from torch import Tensor

    from student.model.configuration_llada import LladaConfig

EMBEDDING, HEAD = "model.transformer.wte.weight", "model.transformer.ff_out.weight"
NO_IDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "mask_token_id": 0}
"""Special ids of a shape whose vocabulary is not known yet; a mask of 0 stands in."""
_OUTER = {EMBEDDING: "model.embed_tokens", "model.transformer.ln_f.weight": "model.norm", HEAD: "lm_head"}
_INNER = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}


@dataclass(frozen=True)
class Source:
    """A checkpoint's config as LLaDA's, and the stored name and file of every tensor of the model."""

    directory: Path
    family: str
    config: LladaConfig
    stored: dict[str, tuple[str, Path]]

    @classmethod
    def open(cls, name: str, revision: str | None = None) -> Source:
        """Open a directory, or the hub's repository of that name.

        Raises:
            CheckpointError: if it is not there, incomplete, or of an architecture that LLaDA's block does not compute.
        """
        directory = resolve(name, revision)
        family, config = config_of_checkpoint(directory)
        shapes = tensor_shapes(directory)
        if family == "llada":
            names = {name: name for name in shapes}
        else:
            names = {ours: theirs for ours, theirs in _llama_names(config).items() if theirs in shapes}
            # A tied checkpoint may store its head all the same.
            expected = set(_llama_names(config).values()) | {"lm_head.weight"}
            names |= {stored: stored for stored in shapes if stored not in expected}
        check_state({ours: shapes[theirs][0] for ours, theirs in names.items()}, config, directory)
        return cls(directory, family, config, {o: (t, shapes[t][1]) for o, t in names.items()})

    def keep_layers(self, layers: Sequence[int]) -> Source:
        """The source with only `layers`, in that order; a layer may be given twice.

        Raises:
            ConfigError: if there is no such layer, or none is kept.
        """
        bad = [layer for layer in layers if not 0 <= layer < self.config.n_layers]
        if bad or not layers:
            raise ConfigError(
                f"student.layers {list(layers)}: expected layers of {self.directory} from 0 to "
                f"{self.config.n_layers - 1}, at least one" + (f"; there is no layer {bad[0]}" if bad else "")
            )
        prefix = "model.transformer.blocks."
        stored = {name: place for name, place in self.stored.items() if not name.startswith(prefix)}
        for new, old in enumerate(layers):
            for inner in _INNER:
                stored[f"{prefix}{new}.{inner}.weight"] = self.stored[f"{prefix}{old}.{inner}.weight"]
        return replace(self, config=changed(self.config, n_layers=len(layers)), stored=stored)

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors by LLaDA's names."""
        from safetensors import safe_open

        tensors = {}
        for name, (stored, path) in self.stored.items():
            with safe_open(path, framework="pt") as file:
                tensors[name] = file.get_tensor(stored)
        return tensors


def resolve(name: str, revision: str | None = None) -> Path:
    """The local directory of a checkpoint; a hub repository is downloaded.

    Raises:
        CheckpointError: if `name` is neither a directory nor a repository that can be had.
    """
    if Path(name).is_dir():
        return Path(name)
    if not is_hub_name(name):
        raise CheckpointError(
            f"there is no checkpoint directory {name}, and no repository of the hub is called so; check "
            "student.checkpoint, or make it first"
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many kinds: all mean that there is no checkpoint
        raise CheckpointError(
            f"{name} is no directory here, and the hub does not give a repository of that name: {error}"
        ) from error


def changed(config: LladaConfig, **fields: Any) -> LladaConfig:
    """A copy of `config` with other values, checked anew."""
    tree = config.to_dict() | fields
    return type(config)(**{key: value for key, value in tree.items() if key not in ("model_type", "auto_map")})


def config_of_checkpoint(directory: Path) -> tuple[str, LladaConfig]:
    """The family of a checkpoint's architecture, llada or llama, and its config as LLaDA's.

    Raises:
        CheckpointError: if it is of another family, or LLaDA's block does not compute it.
    """
    tree = read_config_tree(directory)
    family = tree.get("model_type")
    if family == "llada":
        return family, read_config(directory)
    if family == "llama":
        return family, config_from_llama(tree, directory)
    raise CheckpointError(
        f"{directory} is a {family!r} model; a student starts from a LLaDA or a LLaMA-architecture checkpoint "
        "(model_type 'llada' or 'llama'), or at random with student.checkpoint: null"
    )


def config_from_llama(tree: dict[str, Any], source: Path | str) -> LladaConfig:
    """LLaDA's config of a LLaMA-architecture config.json. The ids of special tokens are LLaMA's; it has no mask.

    Raises:
        CheckpointError: if it is malformed, or has biases, another activation, or a head size of its own.
    """
    from transformers import LlamaConfig

    from student.model.configuration_llada import LladaConfig

    try:
        llama: Any = LlamaConfig.from_dict(copy.deepcopy(tree))  # what is left out has its default
    except Exception as error:  # transformers raises many kinds: all mean that it is malformed
        raise CheckpointError(f"{source}/config.json is no config of a LLaMA model: {error}") from error
    for key, supported in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if (value := getattr(llama, key)) != supported:
            raise CheckpointError(f"{source}/config.json: {key} is {value!r}, LLaDA's block needs {supported!r}")
    heads, width = llama.num_attention_heads, llama.hidden_size
    if llama.head_dim * heads != width:
        raise CheckpointError(
            f"{source}/config.json: head_dim {llama.head_dim} x {heads} heads is not hidden_size {width}, as LLaDA's "
            "block needs"
        )
    rope = dict(llama.rope_parameters)
    theta = rope.pop("rope_theta")
    try:
        return LladaConfig(
            d_model=width,
            n_layers=llama.num_hidden_layers,
            n_heads=heads,
            n_kv_heads=llama.num_key_value_heads,
            mlp_hidden_size=llama.intermediate_size,
            vocab_size=llama.vocab_size,
            max_sequence_length=llama.max_position_embeddings,
            rms_norm_eps=llama.rms_norm_eps,
            rope_theta=theta,
            rope_frequency_scaling=None if rope["rope_type"] == "default" else rope,
            weight_tying=llama.tie_word_embeddings,
            **NO_IDS,
        )
    except ValueError as error:
        raise CheckpointError(f"{source}/config.json: {error}") from error


def _llama_names(config: LladaConfig) -> dict[str, str]:
    """LLaDA's name → LLaMA's, for every tensor of the config."""
    names = {ours: f"{theirs}.weight" for ours, theirs in _OUTER.items()}
    if config.weight_tying:
        del names[HEAD]
    for layer in range(config.n_layers):
        for ours, theirs in _INNER.items():
            names[f"model.transformer.blocks.{layer}.{ours}.weight"] = f"model.layers.{layer}.{theirs}.weight"
    return names
