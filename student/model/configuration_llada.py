"""The configuration of LLaDA: the fields of GSAI-ML/LLaDA-8B's config.json, under their own names.

This file is copied beside exported weights and imports nothing of this project. Defaults are LLaDA-8B's. Fields
of upstream's configuration that select another architecture (ALiBi, LayerNorm, biases, dropout …) are kept so
that its files load and ours load there, but only LLaDA's values are accepted: a checkpoint that needs another
architecture is refused instead of being computed wrongly.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

# Upstream's fields that have one supported value, which is their default, and the values that mean the same.
_FIXED: dict[str, tuple[Any, ...]] = {
    "activation_type": ("silu",),
    "alibi": (False,),
    "attention_dropout": (0.0,),
    "attention_layer_norm": (False,),
    "bias_for_layer_norm": (False, None),
    "block_group_size": (1,),
    "block_type": ("llama",),
    "embedding_dropout": (0.0,),
    "include_bias": (False,),
    "include_qkv_bias": (False, None),
    "input_emb_norm": (False,),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "residual_dropout": (0.0,),
    "rope": (True,),
    "rope_full_precision": (True,),
    "scale_logits": (False,),
}
# Upstream's fields that change nothing here, with LLaDA-8B's values.
_UNUSED: dict[str, Any] = {
    "alibi_bias_max": 8.0,
    "attention_layer_norm_with_affine": True,
    "flash_attention": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "precision": "amp_bf16",
    "use_cache": False,
}
_ROPE_SCALINGS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


class LladaConfig(PretrainedConfig):
    """Shape and special ids of a LLaDA model.

    Args:
        d_model: width. `n_heads` heads of `d_model / n_heads`; `n_kv_heads` key and value heads (null: `n_heads`).
        mlp_hidden_size: inner width of the gated MLP; null means `mlp_ratio * d_model`.
        vocab_size: rows of the embedding and of the head (`embedding_size`, null: `vocab_size`, is upstream's name).
        weight_tying: the head is the embedding; there is no `ff_out` on the top level then.
        rope_frequency_scaling: null, LLaMA 3.x's (`rope_type: llama3`) or `linear`, for models that start from such
            checkpoints. Upstream does not know it, and transformers gives `rope_scaling` another meaning.
        draft_block_length: the block length that the model was trained to draft with after a causal clean prefix;
            null for a model that was not. Upstream does not know it.

    Raises:
        ValueError: naming the field, the value seen and the values supported.
    """

    model_type = "llada"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "tie_word_embeddings": "weight_tying",
        "initializer_range": "init_std",
    }

    def __init__(
        self,
        d_model: int = 4096,
        n_layers: int = 32,
        n_heads: int = 32,
        n_kv_heads: int | None = None,
        mlp_hidden_size: int | None = 12288,
        mlp_ratio: int = 4,
        vocab_size: int = 126464,
        embedding_size: int | None = None,
        max_sequence_length: int = 4096,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 500000.0,
        rope_frequency_scaling: dict[str, Any] | None = None,
        weight_tying: bool = False,
        bos_token_id: int | None = 126080,
        eos_token_id: int | None = 126081,
        pad_token_id: int | None = 126081,
        mask_token_id: int = 126336,
        init_std: float = 0.02,
        draft_block_length: int | None = None,
        multi_query_attention: bool | None = None,
        **kwargs: Any,
    ) -> None:
        values = {name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")}
        defaults = {name: supported[0] for name, supported in _FIXED.items()} | _UNUSED
        values |= {name: kwargs.pop(name, default) for name, default in defaults.items()}
        if n_kv_heads is None:
            values["n_kv_heads"] = 1 if multi_query_attention else n_heads
        if mlp_hidden_size is None:
            values["mlp_hidden_size"] = mlp_ratio * d_model
        if embedding_size is None:
            values["embedding_size"] = vocab_size
        # The base class of transformers 4 would otherwise reset these to its own defaults.
        kwargs |= {name: values[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        kwargs["tie_word_embeddings"] = weight_tying
        super().__init__(**kwargs)
        for name, value in values.items():
            setattr(self, name, value)
        self.check()

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    def check(self) -> None:
        """Refuse what `modeling_llada` does not compute.

        Raises:
            ValueError: naming the field, the value seen and the values supported.
        """
        for name, supported in _FIXED.items():
            if getattr(self, name) not in supported:
                raise ValueError(f"LLaDA config: {name} is {getattr(self, name)!r}, only {supported[0]!r} is supported")
        if self.d_model % self.n_heads or self.head_dim % 2:
            raise ValueError(
                f"LLaDA config: d_model {self.d_model} must be n_heads ({self.n_heads}) times an even head size"
            )
        if self.n_kv_heads < 1 or self.n_heads % self.n_kv_heads:
            raise ValueError(f"LLaDA config: n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.embedding_size < self.vocab_size:
            raise ValueError(
                f"LLaDA config: embedding_size {self.embedding_size} is smaller than vocab_size {self.vocab_size}"
            )
        for name in ("mask_token_id", "bos_token_id", "eos_token_id", "pad_token_id"):
            token = getattr(self, name)
            if token is None and name != "mask_token_id":
                continue
            if token is None or not 0 <= token < self.vocab_size:
                raise ValueError(f"LLaDA config: {name} is {token}, expected an id in 0..{self.vocab_size - 1}")
        if self.rope_frequency_scaling is not None:
            kind = self.rope_frequency_scaling.get("rope_type", self.rope_frequency_scaling.get("type"))
            missing = [key for key in _ROPE_SCALINGS.get(kind, ()) if key not in self.rope_frequency_scaling]
            if kind not in _ROPE_SCALINGS or missing:
                raise ValueError(
                    f"LLaDA config: rope_frequency_scaling is {self.rope_frequency_scaling}, supported are "
                    + "; ".join(f"rope_type {name} with {', '.join(keys)}" for name, keys in _ROPE_SCALINGS.items())
                )

    def to_diff_dict(self) -> dict[str, Any]:
        """Every field, also those at their default: upstream's defaults are not ours."""
        return self.to_dict()
