"""Text comes in by three doors, `collect`, `score` and `import-json`: the same text must be the same tokens in each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shared.commands.legacy_json.layout import EntryReader, ImportSettings
from shared.config import load_config
from shared.dataset.records import Record
from shared.errors import UserError
from teacher.checkpoints import load_tokenizer
from teacher.prompts import Renderer, load_prompts

WORDS = "What is 12 plus 5?  é 雪"
RENDERED = "<|im_start|>user\nWhat is 7 plus 5?<|im_end|>\n<|im_start|>assistant\n"
END, HEADER = "<|im_end|>", "<|im_start|>"
TURNS = [("system", f"Say {END}."), ("user", "a"), ("assistant", f"{HEADER}b"), ("user", " c ")]

CASES: dict[str, tuple[Any, str]] = {
    "plain": (WORDS, "Seventeen."),
    "turns": ([{"role": role, "content": content} for role, content in TURNS], "x"),
    "end in words": (f"what does {END} mean?", "y"),
    "rendered": (RENDERED, "Twelve."),
    "end of turn": (WORDS, f"Paris.{END}"),
    "end of turn and of line": (WORDS, f"Paris.{END}\n"),
    "end of text": (WORDS, "Paris.<|endoftext|>"),
    "end inside": (WORDS, f"It is {END} indeed"),
    "nothing but an end": (WORDS, END),
    "header in words": (f"what does {HEADER} mean?", "x"),
    "two ends": (WORDS, f"Paris.{END}{END}"),
    "header in a response": (WORDS, f"{HEADER}assistant\nParis."),
    "system before rendered text": (
        [{"role": "system", "content": "x"}, {"role": "user", "content": RENDERED}],
        "y",
    ),
}
REFUSED = {"header in words", "two ends", "header in a response", "system before rendered text"}


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_checkpoint)


def prompts_file(folder: Path, prompt: Any, **more: Any) -> Path:
    key = "prompt" if isinstance(prompt, str) else "messages"
    (folder / "prompts.jsonl").write_text(json.dumps({"id": "a", key: prompt, **more}))
    return folder / "prompts.jsonl"


def test_a_prompt_says_of_itself_whether_it_is_rendered(tokenizer: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """`rendered` beside one prompt wins over what is said of all of them."""
    prompt, response = CASES["header in words"][0], f"Paris.{END}{END}"
    for stated, others in ((True, None), (False, None), (True, False), (False, True)):
        file = prompts_file(tmp_path, prompt, response=response, rendered=stated)
        (given,) = load_prompts(file, responses=True)
        renderer = Renderer(tokenizer, rendered=others)
        prompt_ids, response_ids = scored(tokenizer, tmp_path, prompt, response, stated)
        assert renderer.render(given).ids.tolist() == prompt_ids
        assert renderer.encode_response(given).tolist() == response_ids
        entry = {"prompt": prompt, "response": response, "rendered": stated}
        record = EntryReader(tiny_checkpoint, ImportSettings(rendered=others)).record(entry, "here", 0)
        assert (record.prompt_ids.tolist(), record.response_ids.tolist()) == (prompt_ids, response_ids)


def collected(tokenizer: Any, folder: Path, prompt: Any, rendered: bool | None) -> list[int]:
    (given,) = load_prompts(prompts_file(folder, prompt))
    return list(Renderer(tokenizer, rendered=rendered).render(given).ids.tolist())


def scored(
    tokenizer: Any, folder: Path, prompt: Any, response: str, rendered: bool | None
) -> tuple[list[int], list[int]]:
    (given,) = load_prompts(prompts_file(folder, prompt, response=response), responses=True)
    renderer = Renderer(tokenizer, rendered=rendered)
    return renderer.render(given).ids.tolist(), renderer.encode_response(given).tolist()


def imported(checkpoint: Path, prompt: Any, response: str, rendered: bool | None) -> Record:
    return EntryReader(checkpoint, ImportSettings(rendered=rendered)).record(
        {"prompt": prompt, "response": response}, "here", 0
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rendered", [None, False, True])
def test_the_doors_agree(
    name: str, rendered: bool | None, tokenizer: Any, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    prompt, response = CASES[name]
    refused = name in REFUSED if rendered is None else rendered and not isinstance(prompt, str)
    if refused:
        for door in (
            lambda: scored(tokenizer, tmp_path, prompt, response, rendered),
            lambda: imported(tiny_checkpoint, prompt, response, rendered),
        ):
            with pytest.raises(
                UserError, match=r"^(prompt 'a'|here): .*collect.rendered \(--rendered or --no-rendered"
            ):
                door()
        return
    prompt_ids, response_ids = scored(tokenizer, tmp_path, prompt, response, rendered)
    assert collected(tokenizer, tmp_path, prompt, rendered) == prompt_ids
    record = imported(tiny_checkpoint, prompt, response, rendered)
    assert record.prompt_ids.tolist() == prompt_ids
    assert record.response_ids.tolist() == response_ids


@pytest.mark.slow
def test_the_demo_s_prompts_have_the_ids_of_apply_chat_template() -> None:
    root = Path(__file__).parents[2]
    config = load_config(root / "configs" / "demo.yaml")
    theirs = load_tokenizer(config.teacher)
    renderer = Renderer(theirs)
    prompts = load_prompts(root / config.collect.prompts)
    assert len(prompts) == 640
    for prompt in prompts:
        turns = [{"role": message.role, "content": message.content} for message in prompt.messages]
        rendered = renderer.render(prompt)
        assert rendered.ids.tolist() == theirs.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        assert rendered.text == theirs.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
