from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.errors import ConfigError
from student.model.export import save_student
from student.model.generate import default_settings, generate
from student.model.sampler import SamplerSettings, denoise, sample
from student.model.tokenizer import train_tokenizer
from tests.fixtures.conversations import conversations
from tests.fixtures.served_run import special_ids
from tests.fixtures.tiny_model import MASK, anchored_row, random_ids, tiny_config, tiny_model


def fixed(logits_GxV: Tensor) -> Any:
    return lambda block: logits_GxV[None].expand(len(block), -1, -1).clone()


def test_the_most_confident_positions_are_kept_first() -> None:
    """Four positions in two steps: the two surest first, then the others, which saw them."""
    seen: list[list[int]] = []
    logits = torch.zeros(4, 6)
    for position, (token, height) in enumerate([(1, 1.0), (2, 4.0), (3, 2.0), (4, 3.0)]):
        logits[position, token] = height

    def logits_of(block: Tensor) -> Tensor:
        seen.append(block[0].tolist())
        return logits[None].clone()

    settings = SamplerSettings(length=4, block_length=4, steps=2)
    block = denoise(logits_of, torch.full((1, 4), 5), 5, settings)
    assert seen == [[5, 5, 5, 5], [5, 2, 5, 4]]
    assert block.tolist() == [[1, 2, 3, 4]]


def test_steps_take_even_shares_with_the_larger_first() -> None:
    counts: list[int] = []

    def logits_of(block: Tensor) -> Tensor:
        counts.append(int((block == 9).sum()))
        return torch.randn(1, 10, 12, generator=torch.Generator().manual_seed(len(counts)))

    denoise(logits_of, torch.full((1, 10), 9), 9, SamplerSettings(length=10, block_length=10, steps=4))
    assert counts == [10, 7, 4, 2]


def test_what_is_known_stays_and_the_mask_is_never_predicted() -> None:
    logits = torch.zeros(3, 8)
    logits[:, 7] = 50.0
    logits[:, 2] = 1.0
    block = denoise(fixed(logits), torch.tensor([[7, 4, 7]]), 7, SamplerSettings(length=3, block_length=3, steps=1))
    assert block.tolist() == [[2, 4, 2]]


def test_temperature_samples_the_softmax() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2, 1e-9]]))
    settings = SamplerSettings(length=1, block_length=1, steps=1, temperature=1.0)
    block = torch.full((20_000, 1), 3)
    drawn = denoise(fixed(logits), block, 3, settings, torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn.flatten(), minlength=4) / 20_000
    assert (shares - torch.tensor([0.5, 0.3, 0.2, 0.0])).abs().max() < 0.015


def test_random_remasking_ignores_the_confidence() -> None:
    logits = torch.zeros(2, 4)
    logits[0, 1], logits[1, 2] = 9.0, 1.0
    settings = SamplerSettings(length=2, block_length=2, steps=2, remasking="random")
    first_kept = set()
    for seed in range(20):
        seen: list[list[int]] = []

        def logits_of(block: Tensor, seen: list[list[int]] = seen) -> Tensor:
            seen.append(block[0].tolist())
            return logits[None].clone()

        denoise(logits_of, torch.full((1, 2), 3), 3, settings, torch.Generator().manual_seed(seed))
        first_kept.add(tuple(token != 3 for token in seen[1]))
    assert first_kept == {(True, False), (False, True)}


def test_bidirectional_decoding_is_llada_s_loop() -> None:
    """Written out once more, one token a step, for one prompt."""
    model, prompt = tiny_model(), random_ids(1, 9)
    expected = torch.cat((prompt, torch.full((1, 8), MASK)), dim=1)
    with torch.no_grad():
        for start in (9, 13):
            for _ in range(4):
                logits = model(expected).logits[0].double()
                logits[:, MASK] = float("-inf")
                best, token = logits.softmax(-1).max(-1)
                open_ = [p for p in range(start, start + 4) if expected[0, p] == MASK]
                chosen = max(open_, key=lambda p: float(best[p]))
                expected[0, chosen] = token[chosen]
    answer = sample(model, prompt, SamplerSettings(length=8, block_length=4, steps=8))
    assert torch.equal(answer, expected[:, 9:])


def test_draft_decoding_is_block_after_block_without_a_cache() -> None:
    model, prompt = tiny_model(), random_ids(2, 9)
    settings = SamplerSettings(length=12, block_length=4, steps=6, attention="draft")
    answer = sample(model, prompt, settings)
    text = prompt

    def uncached(block: Tensor) -> Tensor:
        ids, layout = anchored_row(text, [text.shape[1]], 4)
        ids[:, -4:] = block
        return model(ids, layout=layout).logits[:, -4:]

    with torch.no_grad():
        for _ in range(3):
            text = torch.cat((text, denoise(uncached, torch.full((2, 4), MASK), MASK, settings)), dim=1)
    assert torch.equal(answer, text[:, 9:])


def test_guidance_moves_away_from_the_answer_without_the_prompt() -> None:
    model, prompt = tiny_model(), random_ids(1, 9)
    settings = SamplerSettings(length=1, block_length=1, steps=1, guidance=1.5)
    ids = torch.cat((prompt, torch.tensor([[MASK]])), dim=1)
    blind = torch.full_like(ids, MASK)
    with torch.no_grad():
        conditional, unconditional = model(ids).logits[0, -1], model(blind).logits[0, -1]
    logits = unconditional + 2.5 * (conditional - unconditional)
    logits[MASK] = float("-inf")
    assert sample(model, prompt, settings).item() == logits.argmax().item()


def test_decoding_stops_after_the_block_in_which_every_answer_ended() -> None:
    model, prompt = tiny_model(), random_ids(1, 9)
    settings = SamplerSettings(length=8, block_length=4, steps=8)
    whole = sample(model, prompt, settings)
    stopped = sample(model, prompt, settings, end_ids=frozenset({int(whole[0, 2])}))
    assert torch.equal(stopped[:, :4], whole[:, :4])
    assert (stopped[:, 4:] == MASK).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 10, "block_length": 4}, "length 10 is not a multiple of block length 4"),
        ({"length": 8, "block_length": 4, "steps": 3}, "steps 3 is not a multiple of the 2 blocks"),
        ({"temperature": -1.0}, "must not be negative"),
        ({"attention": "draft", "guidance": 1.0}, "guidance 1.0 needs attention bidirectional"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplerSettings(**settings)


def test_a_text_that_is_too_long_is_refused() -> None:
    with pytest.raises(ConfigError, match="a prompt of 200 tokens and an answer of 128 exceed"):
        sample(tiny_model(), random_ids(1, 200), SamplerSettings())


def test_a_model_that_was_trained_to_draft_answers_in_its_blocks() -> None:
    settings = default_settings(tiny_config(draft_block_length=6))
    assert (settings.attention, settings.block_length, settings.length, settings.steps) == ("draft", 6, 132, 132)
    assert default_settings(tiny_config()).attention == "bidirectional"


def test_special_tokens_in_what_is_said_are_text_and_in_raw_text_are_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = train_tokenizer(["what does it mean?"] * 3, 300)
    save_student(tiny_model(vocab_size=len(tokenizer), **special_ids(tokenizer)), tokenizer, tmp_path)
    asked: list[list[int]] = []
    steps: list[int] = []

    def answer(_model: object, prompt: torch.Tensor, settings: SamplerSettings, *_: object) -> torch.Tensor:
        asked.append(prompt[0].tolist())
        steps.append(settings.steps)
        return prompt

    monkeypatch.setattr("student.model.generate.sample", answer)
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    generate(tmp_path, "what does <|eot_id|> mean?")
    assert asked[0].count(end) == 1
    assert "what does <|eot_id|> mean?<|eot_id|>" in tokenizer.decode(asked[0])
    generate(tmp_path, "it", system="mean", length=96)
    turns = [{"role": "system", "content": "mean"}, {"role": "user", "content": "it"}]
    assert asked[1] == tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    generate(tmp_path, "it<|eot_id|>", raw=True, length=96, steps=48)
    assert steps == [128, 96, 48]
    assert asked[2] == tokenizer("it<|eot_id|>", add_special_tokens=False)["input_ids"]


@pytest.mark.slow
def test_a_student_that_knows_one_answer_gives_it(tmp_path: Path) -> None:
    """Train on one conversation until it is known by heart, save, and ask."""
    question, answer = next(conversations(1))
    tokenizer = train_tokenizer([question, answer] * 3, 300)
    model = tiny_model(vocab_size=len(tokenizer), init_std=0.05, **special_ids(tokenizer))
    turns = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    response = [*tokenizer(answer)["input_ids"], tokenizer.convert_tokens_to_ids("<|eot_id|>")]
    length = -(-len(response) // 16) * 16
    response += [tokenizer.pad_token_id] * (length - len(response))
    text = torch.tensor([prompt + response])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        hidden = torch.rand(8, text.shape[1], generator=generator) < torch.rand(8, 1, generator=generator)
        hidden[:, : len(prompt)] = False
        hidden[:, -1] = True
        batch = torch.where(hidden, tokenizer.mask_token_id, text)
        loss = torch.nn.functional.cross_entropy(model(batch).logits[hidden], text.expand(8, -1)[hidden])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_student(model, tokenizer, tmp_path)
    assert generate(tmp_path, question, length=length, block_length=16, steps=length) == answer
