from pathlib import Path
from typing import Any

import pytest
import torch

from shared.config import LoraConfig, load_config
from shared.errors import ConfigError
from student.model.export import load_student, save_student
from student.model.lora import add_lora
from student.model.modeling_llada import LladaForMaskedDiffusion
from student.model.tokenizer import train_tokenizer
from tests.fixtures.conversations import conversations
from tests.fixtures.served_run import special_ids
from tests.fixtures.tiny_model import random_ids, tiny_model
from tests.fixtures.toy_run import toy_config


def trained(model: LladaForMaskedDiffusion, steps: int = 5) -> list[float]:
    ids = random_ids(4, 24)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), ids.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_adapters_learn(checkpointing: bool) -> None:
    model = tiny_model().train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    add_lora(model, LoraConfig(rank=4))
    trainable = model.num_parameters(only_trainable=True)
    if checkpointing:
        model.gradient_checkpointing_enable()
    # Per layer 4 x (64+64) + 2 x 4 x (64+32) + 4 x (64+64) + 3 x 4 x (64+96), by hand.
    assert trainable == 3 * (512 + 768 + 512 + 1920)
    losses = trained(model)
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")]), name


def test_ff_out_is_the_block_s_and_never_the_head() -> None:
    model = tiny_model()
    add_lora(model, LoraConfig(rank=2, targets=["ff_out"]))
    adapted = [name for name, _ in model.named_parameters() if ".lora_A" in name]
    assert len(adapted) == 3
    assert all(".blocks." in name for name in adapted)


def test_adapters_are_merged_on_saving_whatever_the_weights_came_as(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([text for pair in conversations(50) for text in pair], 300)
    ids: dict[str, Any] = special_ids(tokenizer) | {"vocab_size": 300}
    model = tiny_model(**ids).train()
    plain = model.state_dict().keys()
    add_lora(model, LoraConfig(rank=4, alpha=12))
    trained(model)
    model.eval()
    inputs = random_ids(2, 20)
    expected = model(inputs).logits
    gathered = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for directory, weights in ((tmp_path / "own", None), (tmp_path / "gathered", gathered)):
        save_student(model, tokenizer, directory, state_dict=weights)
        merged, _ = load_student(directory)
        assert merged.state_dict().keys() == plain
        assert (merged.eval()(inputs).logits - expected).abs().max() <= 1e-4
    assert (tiny_model(**ids)(inputs).logits - expected).abs().max() > 0.1


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("[q_proj, gate_proj]", r"student\.lora\.targets\.1: Input should be 'q_proj', .* \(got 'gate_proj'\)"),
        ("[wte]", r"student\.lora\.targets\.0: Input should be 'q_proj'"),
        ("[]", r"student\.lora\.targets: List should have at least 1 item"),
    ],
)
def test_targets_that_match_nothing_are_an_error(tmp_path: Path, targets: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(toy_config(tmp_path), [f"student.lora.targets={targets}"])
