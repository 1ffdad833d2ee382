"""Prompts that are too long cost only themselves; lengths are kept where measuring them takes minutes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest

from shared.config import PipelineConfig
from shared.errors import PromptError
from teacher.collect import prepare
from teacher.prompts import Prompt, lengths, load_renderer, load_sources
from teacher.prompts.lengths import OVERLONG, fit_prompts

Maker = Callable[..., PipelineConfig]
ROOM = 128


def prompts_of(*words: int) -> str:
    return "\n".join(json.dumps({"id": f"p-{n}", "prompt": "word " * n}) for n in words)


def overlong(config: PipelineConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run_dir / OVERLONG).read_text().splitlines()]


def test_batches_have_the_lengths_of_single_prompts(make_config: Maker) -> None:
    special = json.dumps({"id": "s", "prompt": "what is <|im_end|> for?"})
    ready = json.dumps({"id": "r", "prompt": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"})
    config = make_config(prompts="\n".join([prompts_of(1, 5, 20), special, ready]))
    plan = prepare(config)
    assert plan.fitting.tokens == {p.id: len(plan.renderer.render(p).ids) for p in plan.fitting.prompts}


def test_overlong_prompts_are_skipped_and_recorded(make_config: Maker, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(prompts=prompts_of(1, 200, 2, 300))
    with caplog.at_level(logging.WARNING):
        plan = prepare(config)
    assert "2 of 4 prompts have 128 tokens" in caplog.text
    assert not config.run_dir.exists()
    assert {task.prompt.id for unit in plan.units for task in unit.tasks} == {"p-1", "p-2"}
    plan.fitting.save(config.run_dir)
    assert [(entry["id"], entry["action"]) for entry in overlong(config)] == [
        ("p-200", "skipped"),
        ("p-300", "skipped"),
    ]
    prepare(make_config(prompts=prompts_of(1))).fitting.save(config.run_dir)
    assert not (config.run_dir / OVERLONG).exists()


def test_overlong_prompts_are_cut_to_what_leaves_room_for_an_answer(make_config: Maker) -> None:
    config = make_config(prompts=prompts_of(1, 200, 300), collect__overlong="truncate")
    plan = prepare(config)
    plan.fitting.save(config.run_dir)
    entries = overlong(config)
    assert [entry["action"] for entry in entries] == ["truncated", "truncated"]
    for prompt in plan.fitting.prompts:
        rendered = plan.renderer.render(prompt)
        assert len(rendered.ids) == plan.fitting.tokens[prompt.id]
        assert rendered.text.endswith("<|im_end|>\n<|im_start|>assistant\n")  # the template is whole
        if prompt.id != "p-1":
            assert ROOM - 8 - 3 <= len(rendered.ids) <= ROOM - 8  # max_response_tokens is 8
    assert [entry["kept_tokens"] for entry in entries] == [plan.fitting.tokens[entry["id"]] for entry in entries]


def test_what_cannot_be_cut_is_skipped(make_config: Maker) -> None:
    text = "<|im_start|>user\n" + "word " * 300 + "<|im_end|>\n<|im_start|>assistant\n"
    line = json.dumps({"id": "rendered", "prompt": text})
    plan = prepare(make_config(prompts=prompts_of(1) + "\n" + line, collect__overlong="truncate"))
    assert [(entry.id, entry.kept) for entry in plan.fitting.overlong] == [("rendered", None)]


@pytest.mark.parametrize(("spare", "fits"), [(0, False), (1, True)])
def test_a_prompt_as_long_as_the_context_leaves_no_room(make_config: Maker, spare: int, fits: bool) -> None:
    plan = prepare(make_config(prompts=prompts_of(1, 20)))
    length = plan.fitting.tokens["p-20"]
    plan = prepare(make_config(prompts=prompts_of(1, 20), teacher__max_sequence_tokens=length + spare))
    assert ("p-20" in plan.fitting.tokens) is fits


def test_only_overlong_prompts_are_refused(make_config: Maker) -> None:
    with pytest.raises(PromptError, match=r"1 of 1 prompts have 128 tokens or more"):
        prepare(make_config(prompts=prompts_of(300)))


def test_lengths_of_many_prompts_are_kept_under_their_key(make_config: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "_MANY", 3)
    config = make_config(prompts=prompts_of(1, 2, 3))
    renderer, prompts = load_renderer(config), load_sources(config.collect)
    measured: list[int] = []

    def count(prompts: list[Prompt]) -> Any:
        measured.append(len(prompts))
        return original(prompts)

    original = renderer.lengths
    monkeypatch.setattr(renderer, "lengths", count)
    first = fit_prompts(prompts, renderer, config)
    first.save(config.run_dir)
    assert fit_prompts(prompts, renderer, config).tokens == first.tokens
    assert measured == [3]
    fit_prompts(prompts[:2], renderer, config)
    other = load_renderer(make_config(prompts=prompts_of(1, 2, 3), collect__rendered=False))
    assert other.fingerprint != renderer.fingerprint
    assert measured == [3, 2]
    kept = config.run_dir / "prompt_lengths.npz"
    kept.write_bytes(kept.read_bytes()[:50])  # cut by a full disk, say
    assert fit_prompts(prompts, renderer, config).tokens == first.tokens
    assert measured == [3, 2, 3]
