import json
from pathlib import Path

import pytest
import torch
import yaml

from student.model.configuration_llada import LladaConfig
from student.model.modeling_llada import LladaForMaskedDiffusion
from tests.fixtures.tiny_model import tiny_config

SHAPES = Path("configs/shapes")
# GSAI-ML/LLaDA-8B-Base's config.json, field by field.
UPSTREAM_8B = {
    "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "attention_dropout": 0.0,
    "attention_layer_norm": False, "attention_layer_norm_with_affine": True, "bias_for_layer_norm": False,
    "block_group_size": 1, "block_type": "llama", "d_model": 4096, "embedding_dropout": 0.0, "embedding_size": 126464,
    "eos_token_id": 126081, "flash_attention": False, "include_bias": False, "include_qkv_bias": False,
    "init_cutoff_factor": None, "init_device": "meta", "init_fn": "mitchell", "init_std": 0.02,
    "input_emb_norm": False, "layer_norm_type": "rms", "layer_norm_with_affine": True, "mask_token_id": 126336,
    "max_sequence_length": 4096, "mlp_hidden_size": 12288, "mlp_ratio": 4, "model_type": "llada",
    "multi_query_attention": None, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32, "pad_token_id": 126081,
    "precision": "amp_bf16", "residual_dropout": 0.0, "rms_norm_eps": 1e-05, "rope": True, "rope_full_precision": True,
    "rope_theta": 500000.0, "scale_logits": False, "use_cache": False, "vocab_size": 126464, "weight_tying": False,
}  # fmt: skip


def shape(name: str) -> LladaConfig:
    return LladaConfig(**yaml.safe_load((SHAPES / name).read_text()))


def test_the_8b_shape_has_exactly_llada_8b_s_parameters_and_bytes() -> None:
    with torch.device("meta"):
        model = LladaForMaskedDiffusion(shape("llada-8b.yaml")).to(torch.bfloat16)
    parameters = list(model.parameters())
    assert sum(p.numel() for p in parameters) == 8_015_581_184
    assert sum(p.numel() * p.element_size() for p in parameters) == 16_031_162_368
    assert not list(model.buffers())


def test_state_dict_has_upstream_s_keys() -> None:
    with torch.device("meta"):
        keys = set(LladaForMaskedDiffusion(shape("llada-8b.yaml")).state_dict())
    inner = ("q_proj", "k_proj", "v_proj", "attn_out", "attn_norm", "ff_norm", "ff_proj", "up_proj", "ff_out")
    expected = {f"model.transformer.{name}.weight" for name in ("wte", "ln_f", "ff_out")}
    expected |= {f"model.transformer.blocks.{n}.{name}.weight" for n in range(32) for name in inner}
    assert keys == expected


def test_every_field_of_upstream_s_config_survives_a_round_trip(tmp_path: Path) -> None:
    config = LladaConfig.from_dict(UPSTREAM_8B)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {key: written[key] for key in UPSTREAM_8B} == UPSTREAM_8B
    again = LladaConfig.from_pretrained(tmp_path)
    assert {key: getattr(again, key) for key in UPSTREAM_8B} == UPSTREAM_8B


def test_llama_3_s_frequency_scaling_survives_a_round_trip(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    tiny_config(rope_frequency_scaling=scaling).save_pretrained(tmp_path)
    again = LladaConfig.from_pretrained(tmp_path)
    assert (again.rope_frequency_scaling, again.rope_theta) == (scaling, 500000.0)


def test_the_grouped_tied_shape_has_grouped_heads_and_no_head_of_its_own() -> None:
    config = shape("llada-8b-gqa-tied.yaml")
    with torch.device("meta"):
        model = LladaForMaskedDiffusion(config)
    state = model.state_dict()
    assert "model.transformer.ff_out.weight" not in state
    assert state["model.transformer.blocks.0.k_proj.weight"].shape == (config.n_kv_heads * config.head_dim, 4096)
    assert config.n_kv_heads < config.n_heads
    assert model.head_weight is model.model.transformer["wte"].weight


def test_transformers_common_names_are_the_same_fields() -> None:
    config = tiny_config(weight_tying=True)
    assert (config.hidden_size, config.num_hidden_layers, config.num_key_value_heads) == (64, 3, 2)
    assert config.tie_word_embeddings is True


def test_null_fields_take_upstream_s_defaults() -> None:
    config = tiny_config(n_kv_heads=None, mlp_hidden_size=None, embedding_size=None)
    assert (config.n_kv_heads, config.mlp_hidden_size, config.embedding_size) == (4, 256, 120)
    assert tiny_config(n_kv_heads=None, multi_query_attention=True).n_kv_heads == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_token_id": 120}, "mask_token_id is 120, expected an id in 0..119"),
        ({"mask_token_id": -1}, "mask_token_id is -1"),
        ({"eos_token_id": 4000}, "eos_token_id is 4000"),
        ({"alibi": True}, "alibi is True"),
        ({"include_bias": True}, "include_bias is True"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"layer_norm_type": "default"}, "layer_norm_type is 'default'"),
        ({"n_kv_heads": 3}, "n_heads 4 is not a multiple of n_kv_heads 3"),
        ({"d_model": 66}, "d_model 66"),
        ({"embedding_size": 100}, "embedding_size 100 is smaller than vocab_size 120"),
        ({"rope_frequency_scaling": {"rope_type": "yarn", "factor": 2}}, "rope_frequency_scaling is"),
        ({"rope_frequency_scaling": {"rope_type": "llama3", "factor": 2}}, "low_freq_factor"),
    ],
)
def test_what_the_model_does_not_compute_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)
