"""Every layout, on every implementation, against the model written out with an explicit mask matrix."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from student.model.modeling_llada import AnchoredLayout, LladaForMaskedDiffusion
from tests.fixtures.tiny_model import anchored_row, random_ids, reference_logits, tiny_model

DOCUMENTS = torch.tensor([[0] * 9 + [1] * 14 + [2] * 5 + [-1] * 4, [0] * 20 + [1] * 12])
LENGTH = DOCUMENTS.shape[1]


def matrix(visible: Callable[[int, int, int], bool], batch: int, length: int) -> Tensor:
    """The mask written down pair by pair."""
    return torch.tensor(
        [[[visible(b, q, k) for k in range(length)] for q in range(length)] for b in range(batch)], dtype=torch.bool
    )


def position_in_document(b: int, token: int) -> int:
    row = DOCUMENTS[b].tolist()
    return token - row.index(row[token])


def packed() -> tuple[Tensor, AnchoredLayout, Tensor, Tensor]:
    """Documents side by side, each one block with no clean copy, as random masking packs them."""
    ids = random_ids(2, LENGTH)
    expected = matrix(lambda b, q, k: bool(DOCUMENTS[b, q] == DOCUMENTS[b, k]), 2, LENGTH)
    positions = torch.tensor([[position_in_document(b, t) for t in range(LENGTH)] for b in range(2)])
    return ids, AnchoredLayout(DOCUMENTS, torch.ones_like(DOCUMENTS), positions), expected, positions


def padded() -> tuple[Tensor, AnchoredLayout, Tensor, Tensor]:
    keep = torch.ones(2, LENGTH, dtype=torch.int64)
    keep[0, 20:] = 0
    keep[1, :7] = 0
    expected = matrix(lambda b, q, k: bool(keep[b, q] == keep[b, k]), 2, LENGTH)
    return random_ids(2, LENGTH), AnchoredLayout.padded(keep), expected, torch.arange(LENGTH).expand(2, -1)


def anchored() -> tuple[Tensor, AnchoredLayout, Tensor, Tensor]:
    """Two documents in a row, each with a clean copy and blocks, in both orders; padding at the end."""
    documents = [0] * 10 + [0] * 3 + [0] * 3 + [1] * 7 + [1] * 4 + [-1] * 2
    blocks = [0] * 10 + [1] * 3 + [2] * 3 + [0] * 7 + [1] * 4 + [0] * 2
    positions = [*range(10), *range(2, 5), *range(7, 10), *range(7), *range(3, 7), 0, 0]
    batch = 2
    tensors = [torch.tensor(values).expand(batch, -1) for values in (documents, blocks, positions)]

    def visible(_b: int, q: int, k: int) -> bool:
        if documents[q] != documents[k]:
            return False
        if blocks[q] == 0:
            return blocks[k] == 0 and positions[k] <= positions[q]
        if blocks[k] == 0:
            members = [t for t in range(len(blocks)) if (documents[t], blocks[t]) == (documents[q], blocks[q])]
            return positions[k] < min(positions[t] for t in members)
        return blocks[k] == blocks[q]

    ids = random_ids(batch, len(documents))
    layout = AnchoredLayout(*tensors)
    return ids, layout, matrix(visible, batch, len(documents)), tensors[2]


LAYOUTS = {"packed": packed, "padded": padded, "anchored": anchored}


def with_attention(model: LladaForMaskedDiffusion, implementation: str) -> LladaForMaskedDiffusion:
    model.set_attn_implementation(implementation)
    return model


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_mask_is_the_rule_written_down_pair_by_pair(name: str) -> None:
    _, layout, visible, positions = LAYOUTS[name]()
    assert torch.equal(layout.mask(), visible)
    assert torch.equal(layout.position_ids_BxL, positions)
    assert layout.mask().diagonal(dim1=1, dim2=2).all()


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_and_gradients_are_those_of_the_dense_reference(name: str) -> None:
    ids, layout, visible, positions = LAYOUTS[name]()
    model, twin = tiny_model(init_std=0.1), tiny_model(init_std=0.1)
    logits, expected = model(ids, layout=layout).logits, reference_logits(twin, ids, positions, visible)
    assert (logits - expected).abs().max() <= 1e-5
    labels = random_ids(*ids.shape, seed=3).flatten()
    for output in (logits, expected):
        torch.nn.functional.cross_entropy(output.flatten(0, 1), labels).backward()
    others = dict(twin.named_parameters())
    for parameter_name, parameter in model.named_parameters():
        assert (parameter.grad - others[parameter_name].grad).abs().max() <= 1e-5, parameter_name


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
def test_plain_attention_is_bidirectional(implementation: str) -> None:
    ids = random_ids(2, 21)
    model = with_attention(tiny_model(), implementation)
    visible = torch.ones(2, 21, 21, dtype=torch.bool)
    with torch.no_grad():
        expected = reference_logits(model, ids, torch.arange(21).expand(2, -1), visible)
        assert (model(ids).logits - expected).abs().max() <= 1e-4


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", LAYOUTS)
def test_flex_attention_computes_the_same(name: str) -> None:
    """Forward only: flex attention has no backward on a CPU."""
    ids, layout, _, _ = LAYOUTS[name]()
    model = tiny_model(init_std=0.1).requires_grad_(False)
    expected = model(ids, layout=layout).logits
    assert (with_attention(model, "flex_attention")(ids, layout=layout).logits - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_document_by_document_is_the_same_and_for_chosen_tokens_alone(dtype: torch.dtype) -> None:
    """Forward and gradients against the dense mask; of two rows that are cut up differently, one with padding."""
    documents = [[(10, 6), (7, 4), (2, 0)], [(0, 9), (20, 0)]]
    rows = [[number for number, (c, m) in enumerate(row) for _ in range(c + m)] for row in documents]
    rows[0][-2:] = [-1, -1]
    blocks = [[0] * 10 + [1] * 3 + [2] * 3 + [0] * 7 + [1] * 4 + [0] * 2, [1] * 9 + [0] * 20]
    positions = [[*range(10), *range(2, 5), *range(7, 10), *range(7), *range(3, 7), 0, 1], [*range(9), *range(20)]]
    tensors = [torch.tensor(values) for values in (rows, blocks, positions)]
    ids, chosen = random_ids(2, 29), torch.tensor([11, 12, 15, 23, 26, 29, 40, 57])
    found = []
    for known, few in ((None, False), (documents, False), (documents, True)):
        model = tiny_model(init_std=0.1).to(dtype)
        layout = AnchoredLayout(*tensors, documents=known)
        hidden = model.hidden_states(ids, layout=layout, chosen_N=chosen if few else None)
        logits = model.logits(hidden if few else hidden.flatten(0, 1)[chosen])
        torch.nn.functional.cross_entropy(logits, random_ids(1, len(chosen), seed=3)[0]).backward()
        found.append([logits, *(parameter.grad for parameter in model.parameters())])
    dense, *others = found
    for other in others:
        for one, same in zip(dense, other, strict=True):
            assert (one - same).abs().max() <= (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_packed_documents_do_not_influence_one_another(changed: int) -> None:
    model = tiny_model()
    ids, layout, _, _ = packed()
    other = torch.where(changed == DOCUMENTS, random_ids(2, LENGTH, seed=9), ids)
    before, after = model(ids, layout=layout).logits, model(other, layout=layout).logits
    untouched = changed != DOCUMENTS
    assert torch.equal(before[untouched], after[untouched])
    assert not torch.equal(before[~untouched], after[~untouched])


def test_a_packed_document_is_computed_as_if_it_were_alone() -> None:
    model = tiny_model()
    ids, layout, _, _ = packed()
    together = model(ids, layout=layout).logits[0, 9:23]
    assert (model(ids[:1, 9:23]).logits[0] - together).abs().max() <= 1e-4


def test_a_block_is_computed_as_if_its_prefix_ended_there() -> None:
    """Nothing right of the anchor reaches the block: the condition for soft targets."""
    model = tiny_model()
    clean = random_ids(2, 30)
    ids, layout = anchored_row(clean, [4, 11, 26], 4)
    together = model(ids, layout=layout).logits
    for number, anchor in enumerate([4, 11, 26]):
        alone_ids, alone_layout = anchored_row(clean[:, :anchor], [anchor], 4)
        alone = model(alone_ids, layout=alone_layout).logits[:, anchor:]
        block = together[:, 30 + 4 * number : 34 + 4 * number]
        assert (block - alone).abs().max() <= 1e-4
    changed = clean.clone()
    changed[:, 11:] = random_ids(2, 19, seed=8)
    other = model(anchored_row(changed, [4, 11, 26], 4)[0], layout=layout).logits
    assert torch.equal(other[:, 30:38], together[:, 30:38])
    assert not torch.equal(other[:, 38:], together[:, 38:])


def test_an_attention_mask_of_ones_changes_nothing_and_padding_is_not_seen() -> None:
    model = tiny_model()
    ids = random_ids(2, 16)
    keep = torch.ones_like(ids)
    assert (model(ids, attention_mask=keep).logits - model(ids).logits).abs().max() <= 1e-5
    keep[:, 12:] = 0
    assert (model(ids, attention_mask=keep).logits[:, :12] - model(ids[:, :12]).logits).abs().max() <= 1e-5


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_forward_never_waits_for_the_device(name: str) -> None:
    """On the meta device any read of a tensor's value raises, as a host sync would stall a GPU."""
    ids, layout, _, _ = LAYOUTS[name]()
    for key, value in vars(layout).items():
        if isinstance(value, Tensor):
            setattr(layout, key, value.to("meta"))
    model = tiny_model().to("meta")
    assert model(ids.to("meta"), layout=layout).logits.shape == (*ids.shape, model.config.embedding_size)


@pytest.mark.parametrize("name", [None, *LAYOUTS])
def test_the_whole_forward_is_one_graph(name: str | None) -> None:
    model = tiny_model()
    ids, layout = (random_ids(2, 24), None) if name is None else LAYOUTS[name]()[:2]
    compiled = torch.compile(lambda tokens, plan: model(tokens, layout=plan).logits, fullgraph=True, backend="eager")
    assert torch.equal(compiled(ids, layout), model(ids, layout=layout).logits)
    torch.compiler.reset()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    ids, layout, _, _ = anchored()
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(ids, layout=layout).logits.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_what_does_not_fit_is_refused() -> None:
    model = tiny_model(max_sequence_length=16)
    with pytest.raises(ValueError, match="the sequence has 17 tokens, this model takes at most 16"):
        model(random_ids(1, 17))
    ids, layout, _, _ = packed()
    with pytest.raises(ValueError, match="attention_mask or layout, not both"):
        model(ids, attention_mask=torch.ones_like(ids), layout=layout)
