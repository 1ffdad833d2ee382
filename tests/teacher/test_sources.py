"""Every kind of source gives the same prompts; ids are stable, repeats are asked once, mistakes are named."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest

from shared.config import CollectConfig, PipelineConfig
from shared.errors import PromptError
from teacher.collect import prepare
from teacher.prompts import Prompt, load_sources

Maker = Callable[..., PipelineConfig]
TEXTS = ["What is 7 plus 5?", "Name three fruits.", "Où est la gare ? 👍"]
RULES = [{"split": "train", "temperature": 0}]


def load(*sources: dict[str, Any] | Path, **settings: Any) -> list[Prompt]:
    named = [{"path": str(source)} if isinstance(source, Path) else source for source in sources]
    return load_sources(CollectConfig.model_validate({"sources": named, "decoding": RULES, **settings}))


def write_all(folder: Path) -> dict[str, dict[str, Any]]:
    """The same prompts in every format."""
    rows = [{"prompt": text} for text in TEXTS]
    turns = [[{"role": "user", "content": text}] for text in TEXTS]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "dos.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, rows)).encode())
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(TEXTS).encode())
    pd.DataFrame({"question": TEXTS, "answer": TEXTS, "score": 1.0}).to_parquet(folder / "a.parquet")
    (folder / "parts").mkdir()
    pd.DataFrame({"messages": turns[:1]}).to_parquet(folder / "parts" / "0.parquet")
    pd.DataFrame({"messages": turns[1:]}).to_parquet(folder / "parts" / "1.parquet")
    stored = datasets.Dataset.from_dict({"conversation": turns, "language": ["en", "en", "fr"]})
    stored.save_to_disk(folder / "one")
    datasets.DatasetDict({"test": stored}).save_to_disk(folder / "split")
    return {
        "json": {"path": str(folder / "a.jsonl")},
        "json with BOM and CRLF": {"path": str(folder / "dos.jsonl")},
        "text with BOM and CRLF": {"path": str(folder / "a.txt")},
        "parquet": {"path": str(folder / "a.parquet"), "column": "question"},
        "folder of parquet": {"path": str(folder / "parts")},
        "dataset": {"path": str(folder / "one"), "column": "conversation"},
        "split of a dataset": {"path": str(folder / "split"), "column": "conversation", "split": "test"},
    }


def test_every_format_gives_the_same_prompts(tmp_path: Path) -> None:
    sources = write_all(tmp_path)
    expected = load(sources.pop("json"))
    assert [prompt.messages[0].content for prompt in expected] == TEXTS
    for name, source in sources.items():
        assert load(source) == expected, name


def test_ids_come_from_the_content_and_repeats_are_asked_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\none\n")
    (tmp_path / "b.txt").write_text("two\nthree\n")
    with caplog.at_level(logging.WARNING):
        first = load(tmp_path / "a.txt", tmp_path / "b.txt")
    assert (
        f"2 prompts repeat an earlier one and are asked once: {tmp_path}/a.txt line 3; {tmp_path}/b.txt" in caplog.text
    )
    assert [prompt.messages[0].content for prompt in first] == ["one", "two", "three"]
    again = {prompt.content: prompt.id for prompt in load(tmp_path / "b.txt")}
    assert all(again.get(prompt.content, prompt.id) == prompt.id for prompt in first)
    # Fixed: another id is another sample to every dataset that there is.
    assert first[0].id == "d9b37987d1a4140fd988"


def test_one_conversation_under_two_ids_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": "a", "prompt": "x"}\n{"id": "b", "prompt": "x"}')
    with caplog.at_level(logging.WARNING):
        assert len(load(tmp_path / "a.jsonl")) == 2
    assert "1 prompts have the conversation of another under an id of their own" in caplog.text


def test_an_id_of_another_source_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"id": "same", "prompt": name}))
    with pytest.raises(PromptError, match=r"b.jsonl line 1: id 'same' is also that of .*a.jsonl line 1"):
        load(tmp_path / "a.jsonl", tmp_path / "b.jsonl")


def test_a_weight_takes_a_share_that_does_not_depend_on_the_order(tmp_path: Path) -> None:
    texts = [f"question {i}" for i in range(400)]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    (tmp_path / "b.txt").write_text("\n".join(reversed(texts)))
    some = load({"path": str(tmp_path / "a.txt"), "weight": 0.25})
    assert 70 < len(some) < 130
    assert {p.id for p in some} == {p.id for p in load({"path": str(tmp_path / "b.txt"), "weight": 0.25})}
    (tmp_path / "one.txt").write_text("one")
    with pytest.raises(PromptError, match=r"one.txt: the weight 1e-09 leaves none of its 1 prompts; raise it"):
        load({"path": str(tmp_path / "one.txt"), "weight": 1e-9})


def test_sources_have_their_own_rules_skills_and_rendering(tmp_path: Path, make_config: Maker) -> None:
    (tmp_path / "a.txt").write_text("\n".join(f"question {i}" for i in range(9)))
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    (tmp_path / "b.jsonl").write_text(json.dumps({"id": "b", "prompt": rendered}))
    rule = {"split": "train", "temperature": 0, "max_response_tokens": 3}
    config = make_config(
        collect__held_out=0,
        collect__sources=[
            {"path": str(tmp_path / "a.txt"), "skill": "plain", "decoding": [rule, rule | {"temperature": 0.5}]},
            {"path": str(tmp_path / "b.jsonl"), "skill": "rendered", "rendered": True},
        ],
    )
    plan = prepare(config)
    tasks = [task for unit in plan.units for task in unit.tasks]
    assert {unit.name.rpartition("-")[0] for unit in plan.units} == {"train-greedy", "train-t0.5-p1-k0"}
    limits = {(task.prompt.skill, task.sampling.rule, task.sampling.max_tokens) for task in tasks}
    assert {(skill, rule, n) for skill, rule, n in limits if skill in ("plain", "rendered")} == {
        ("plain", "greedy", 3), ("plain", "filtered", 3), ("rendered", "greedy", 8),
    }  # fmt: skip
    assert len({task.sample_id for task in tasks}) == len(tasks) == 9 * 2 + 1 + 12
    (taken,) = [task.prompt for task in tasks if task.prompt.id == "b"]
    assert plan.renderer.render(taken).text == rendered


@pytest.mark.parametrize(
    ("name", "data", "settings", "message"),
    [
        ("a.txt", b"", {}, "a.txt is empty: it holds no lines; expected one prompt a line"),
        ("a.txt", b"good\n\xff\xfe", {}, "a.txt is not UTF-8 text at byte 5: .*; save it as UTF-8"),
        ("a.txt", b"\x1f\x8bxx", {}, "damaged gzip file"),
        ("a.parquet", b"PAR1 no", {}, r"cannot read .*a.parquet as Parquet"),
        ("none.parquet", None, {}, "cannot read .*none.parquet as Parquet: .*No such file"),
        ("a.jsonl", b'{"question": "x"}', {"column": "text"}, "line 1 has no 'text'; its keys are question"),
        ("folder/x.bin", b"x", {"path": "folder"}, "folder cannot be loaded as a Hugging Face dataset: .*correct path"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused(
    tmp_path: Path, name: str, data: bytes | None, settings: dict[str, Any], message: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if data is not None:
        path.write_bytes(data)
    source = settings | {"path": str(tmp_path / settings.get("path", name))}
    with pytest.raises(PromptError, match=message):
        load(source)


def test_tables_without_prompts_and_missing_splits_are_named(tmp_path: Path) -> None:
    sources = write_all(tmp_path)
    with pytest.raises(PromptError, match=r"has the columns question, answer, score, expected prompt or messages"):
        load(sources["parquet"] | {"column": None})
    with pytest.raises(PromptError, match=r"it has the splits test, not 'train'"):
        load(sources["split of a dataset"] | {"split": "train"})
    pd.DataFrame({"prompt": ["fine", " "]}).to_parquet(tmp_path / "parts" / "2.parquet")
    with pytest.raises(PromptError, match=r"2.parquet, row 1: prompt is ' ', expected text that is not blank"):
        load(tmp_path / "parts")


def test_a_dataset_whose_files_have_other_columns_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` raises then is neither an OSError nor a ValueError."""

    def cast(*_arguments: object, **_settings: object) -> None:
        raise datasets.exceptions.DatasetGenerationCastError("all the data files must have the same columns")

    monkeypatch.setattr(datasets, "load_dataset", cast)
    with pytest.raises(PromptError, match=r"someone/prompts cannot be loaded .*the same columns; correct path, subset"):
        load({"path": "someone/prompts"})
