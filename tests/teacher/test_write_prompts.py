"""What of a teacher's drafts becomes a prompt, and what a killed session leaves. Real drafts are in test_served.py."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from shared.config import PipelineConfig
from shared.errors import ConfigError, PromptError
from shared.tokenizer.vocabulary import Vocabulary
from teacher import checkpoints
from teacher.collect import prepare, provenance_of
from teacher.engine import Answer, Request
from teacher.prompts import load_prompts, load_renderer, write
from teacher.prompts.write import write_prompts

Maker = Callable[..., PipelineConfig]
Run = Callable[..., tuple[write.Drafts, "Writer"]]
END = 2


class Writer:
    """An engine that writes the texts it is given, one a draft, round and round."""

    def __init__(self, texts: list[list[int] | None]) -> None:
        self.texts, self.asked = texts, []

    def stream(self, requests: Iterable[Request], capture: bool = True) -> Iterator[Answer]:
        assert not capture
        batch = list(requests)
        self.asked += [int(request.key) for request in batch]
        for request in reversed(batch):
            ids = self.texts[int(request.key) % len(self.texts)]
            finish = "length" if ids is None else "stop"
            yield Answer(request.key, np.array([*(ids or [60]), END], np.int32), finish, None)  # type: ignore[arg-type]

    def close(self) -> None:
        pass


@pytest.fixture
def run(make_config: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    tokenizer = load_renderer(make_config()).tokenizer

    def run(texts: list[str | None], count: int, seed: int = 0, **changes: str) -> tuple[write.Drafts, Writer]:
        writer = Writer([None if text is None else tokenizer.encode(text) for text in texts])
        monkeypatch.setattr(write, "open_engine", lambda _config: writer)
        section = {"path": str(tmp_path / "self.jsonl"), "count": count, "min_characters": 3}
        return write_prompts(make_config(collect__write_prompts=section, seed=seed, **changes)), writer

    return run


def test_only_whole_new_turns_are_kept(run: Run, tmp_path: Path) -> None:
    texts = ["What is up?", " what is  UP? ", None, "x", "see <|im_start|>", "Name three fruits.", ""]
    drafts, _ = run(texts, count=2)
    assert drafts.texts == ["What is up?", "Name three fruits."]
    assert drafts.written == 128
    found = load_prompts(tmp_path / "self.jsonl")
    assert [prompt.messages[0].content for prompt in found] == drafts.texts
    assert {(prompt.skill, prompt.rendered) for prompt in found} == {("self-generated", False)}
    assert [path.name for path in tmp_path.iterdir() if "self" in path.name] == ["self.jsonl"]
    with pytest.raises(ConfigError, match=r"self.jsonl .* is there already; collect with it, or name another"):
        run(texts, count=2)


def test_a_teacher_that_repeats_itself_is_stopped_and_goes_on_behind_its_last_round(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the last 1024 drafts gave no new prompt, 1 of 3 are there; raise"):
        run(["always this"], count=3)
    partial = tmp_path / "self.jsonl.partial"
    partial.write_bytes(partial.read_bytes() + b'{"settings": "of a round that was cut off", "prom')
    with pytest.raises(PromptError, match=r"begun with another teacher, seed or settings .* delete it to begin again"):
        run(["always this"], count=3, seed=1)
    drafts, writer = run([f"question {i}" for i in range(9)], count=3)
    assert writer.asked[0] == 128 * 9
    assert drafts.texts == ["always this", "question 0", "question 1"]


def test_a_teacher_that_is_not_converted_yet_is_converted_first(
    run: Run, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_convert", lambda _, to: shutil.copytree(tiny_checkpoint, to, dirs_exist_ok=True))
    (tmp_path / "w.gguf").touch()
    changes = {"teacher__model": str(tmp_path / "model"), "teacher__gguf": str(tmp_path / "w.gguf")}
    drafts, _ = run([f"question {i}" for i in range(3)], count=2, **changes)
    assert drafts.texts == ["question 0", "question 1"]


def test_a_dataset_of_such_prompts_says_so(run: Run, make_config: Maker, tmp_path: Path) -> None:
    run([f"question {i}" for i in range(20)], count=12)
    section = {"path": str(tmp_path / "self.jsonl"), "count": 12, "temperature": 0.5}
    config = make_config(collect__prompts=section["path"], collect__write_prompts=section)
    plan = prepare(config)
    assert {prompt.skill for prompt in plan.fitting.prompts} == {"self-generated"}
    vocabulary = Vocabulary.from_tokenizer(Path(config.teacher.model))
    details = provenance_of(config, vocabulary, plan.renderer, "prompts", "collect").details
    assert details["write_prompts"]["temperature"] == 0.5
    assert "write_prompts" not in provenance_of(make_config(), vocabulary, plan.renderer, "prompts", "collect").details


def test_the_header_is_what_the_template_writes_before_a_user(make_config: Maker) -> None:
    renderer = load_renderer(make_config())
    assert renderer.tokenizer.decode(renderer.encode_user_header(None)) == "<|im_start|>user\n"
    assert renderer.tokenizer.decode(renderer.encode_user_header("Be brief.")) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    )


def test_without_its_section_the_command_says_what_it_needs(make_config: Maker) -> None:
    with pytest.raises(ConfigError, match=r"collect.write_prompts is not set.*--set 'collect.write_prompts=\{path: "):
        write_prompts(make_config())
