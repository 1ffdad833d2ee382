"""LLaDA is LLaMA without the causal mask: held against transformers' own LLaMA with the same weights."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from student.model.modeling_llada import LladaForMaskedDiffusion
from student.model.source import Source
from tests.fixtures.tiny_model import causal_layout, random_ids

SHAPES = {
    "multi-head": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 3},
    "grouped": {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 2},
    "one key head, tied": {
        "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 1, "num_hidden_layers": 2,
        "tie_word_embeddings": True,
    },
    "llama 3.x": {
        "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    },
}  # fmt: skip


def llama(shape: dict, directory: Path) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200, intermediate_size=112, max_position_embeddings=512, initializer_range=0.1, **shape
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(directory)
    return model


def as_llada(directory: Path) -> LladaForMaskedDiffusion:
    source = Source.open(str(directory))
    model = LladaForMaskedDiffusion(source.config).eval()
    model.load_state_dict(source.state_dict(), strict=True)
    return model


def full_mask(ids: Tensor) -> Tensor:
    """LLaMA's additive mask that hides nothing."""
    return torch.zeros(ids.shape[0], 1, ids.shape[1], ids.shape[1])


@pytest.mark.parametrize("name", SHAPES)
def test_logits_and_gradients_are_llama_s_with_a_full_mask(name: str, tmp_path: Path) -> None:
    theirs = llama(SHAPES[name], tmp_path)
    ours = as_llada(tmp_path)
    ids, labels = random_ids(2, 40), random_ids(2, 40, seed=2)
    expected = theirs(ids, attention_mask=full_mask(ids)).logits
    logits = ours(ids).logits
    assert (logits - expected).abs().max() <= 1e-5
    for output in (expected, logits):
        torch.nn.functional.cross_entropy(output.flatten(0, 1), labels.flatten()).backward()
    gradients = Source.open(str(tmp_path))
    for ours_name, (theirs_name, _) in gradients.stored.items():
        difference = ours.get_parameter(ours_name).grad - theirs.get_parameter(theirs_name).grad
        assert difference.abs().max() <= 1e-5, ours_name


@pytest.mark.parametrize("name", SHAPES)
def test_with_the_causal_mask_put_back_it_is_llama(name: str, tmp_path: Path) -> None:
    theirs = llama(SHAPES[name], tmp_path)
    ids = random_ids(2, 33)
    logits = as_llada(tmp_path)(ids, layout=causal_layout(ids)).logits
    assert (logits - theirs(ids).logits).abs().max() <= 1e-5


def test_positions_are_honoured(tmp_path: Path) -> None:
    theirs = llama(SHAPES["grouped"], tmp_path)
    ids = random_ids(2, 12)
    positions = torch.randint(0, 400, (2, 12), generator=torch.Generator().manual_seed(5))
    expected = theirs(ids, attention_mask=full_mask(ids), position_ids=positions).logits
    logits = as_llada(tmp_path)(ids, position_ids=positions).logits
    assert (logits - expected).abs().max() <= 1e-5
    assert (logits - as_llada(tmp_path)(ids).logits).abs().max() > 1e-3


@pytest.mark.slow
def test_smollm2_with_all_layers_and_the_causal_mask_is_reproduced(smollm2: Path) -> None:
    """All 30 real layers: proves the mapping of names, rope, norms and grouped heads."""
    from transformers import AutoTokenizer

    theirs = LlamaForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    ours = as_llada(smollm2).float()
    assert (ours.config.n_layers, ours.config.n_heads, ours.config.n_kv_heads) == (30, 9, 3)
    text = "The capital of France is Paris. 12 × 12 = 144, and the next even number is"
    ids = AutoTokenizer.from_pretrained(smollm2)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = theirs(ids).logits
        logits = ours(ids, layout=causal_layout(ids)).logits
    # Not nearly: the same bits, at logits of up to 38.
    assert torch.equal(logits, expected)
