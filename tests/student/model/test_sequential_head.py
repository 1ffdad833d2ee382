from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from shared.errors import CheckpointError
from student.data.batch import MicroBatch, collate
from student.data.blocks import lay_out
from student.lineage import SEQUENTIAL_HEAD
from student.losses.settings import LossSettings
from student.model.export import load_student, save_student, tensor_shapes
from student.model.modeling_llada import LladaForMaskedDiffusion
from student.model.sequential_head import add_sequential_head
from student.model.tokenizer import train_tokenizer
from student.training.module import DistillationModule
from tests.fixtures.aligned_samples import make_sample
from tests.fixtures.conversations import conversations
from tests.fixtures.served_run import special_ids
from tests.fixtures.tiny_model import MASK, tiny_model, with_sequential_head

ANCHORS = [0, 3, 9, 11]  # the last block goes over the response's end


def batch() -> MicroBatch:
    samples = [make_sample("a", 5, 12), make_sample("b", 3, 13)]
    rows = [[(sample, lay_out(sample, torch.tensor(ANCHORS).numpy(), 4, MASK)) for sample in samples]]
    return collate(rows, pad_id=1)


def module(model: LladaForMaskedDiffusion) -> DistillationModule:
    return DistillationModule(model, LossSettings(loss="hybrid", block_length=4))


def test_a_new_head_changes_nothing_and_learns() -> None:
    plain, model = tiny_model(), tiny_model()
    head = add_sequential_head(model, 8)
    assert torch.equal(module(plain).hidden_states(batch()), module(model).hidden_states(batch()))
    module(model)(batch())[0].backward()
    assert head.out.weight.grad is not None
    assert head.out.weight.grad.abs().max() > 0


def test_a_position_is_corrected_by_the_observed_token_before_it_and_the_first_of_a_block_by_none() -> None:
    model = with_sequential_head(tiny_model())
    made, head = batch(), model.sequential_head
    assert head is not None
    plain = module(tiny_model()).hidden_states(made)
    weights = {name: weight.detach() for name, weight in head.named_parameters()}
    embedding = model.get_input_embeddings().weight
    expected: list[Tensor] = []
    # Written out anew, a position at a time, from the row's clean text.
    for n, (depth, block) in enumerate(zip(made.targets.depth.tolist(), made.targets.block.tolist(), strict=True)):
        h = plain[n]
        if depth > 1:
            at = next(m for m in range(n) if made.targets.block[m] == block and int(made.targets.depth[m]) == depth - 1)
            e = embedding[made.targets.observed_ids[at]]
            e = e / (e.square().mean() + torch.finfo(torch.float32).eps).sqrt()
            h = h + weights["out.weight"] @ F.silu(weights["previous.weight"] @ e + weights["state.weight"] @ h)
        expected.append(h)
    found = module(model).hidden_states(made)
    assert torch.allclose(found, torch.stack(expected), atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-2)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([text for pair in conversations(60) for text in pair], 380)


def test_it_lies_beside_a_checkpoint_that_is_plain(tmp_path: Path, tokenizer: Any) -> None:
    model = with_sequential_head(tiny_model(vocab_size=len(tokenizer), **special_ids(tokenizer)))
    save_student(model, tokenizer, tmp_path)
    assert not [name for name in tensor_shapes(tmp_path) if "sequential" in name]
    loaded, _ = load_student(tmp_path)
    assert loaded.sequential_head is not None
    assert model.sequential_head is not None
    for name, weight in model.sequential_head.state_dict().items():
        assert torch.equal(loaded.sequential_head.get_parameter(name), weight)
    half, _ = load_student(tmp_path, torch.bfloat16)
    assert half.sequential_head is not None
    assert half.sequential_head.get_parameter("out.weight").dtype == torch.bfloat16
    (tmp_path / SEQUENTIAL_HEAD).rename(tmp_path / "elsewhere")
    plain, _ = load_student(tmp_path)
    assert plain.sequential_head is None
    shown = torch.arange(2, 20)[None]
    assert torch.equal(plain(shown).logits, model(shown).logits)


@pytest.mark.parametrize("damage", ["cut off", "another width", "other names"])
def test_one_that_does_not_fit_is_refused(tmp_path: Path, tokenizer: Any, damage: str) -> None:
    save_student(
        with_sequential_head(tiny_model(vocab_size=len(tokenizer), **special_ids(tokenizer))), tokenizer, tmp_path
    )
    file = tmp_path / SEQUENTIAL_HEAD
    if damage == "cut off":
        file.write_bytes(file.read_bytes()[:-50])
    elif damage == "another width":
        save_file({name: weight[:, :5].contiguous() for name, weight in load_file(file).items()}, file)
    else:
        save_file({f"x.{name}": weight for name, weight in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match=r"sequential_head.safetensors is damaged or of another model"):
        load_student(tmp_path)
