"""Prompts are read strictly and split the same way everywhere."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from shared.dataset.records import Message
from shared.errors import PromptError
from teacher.prompts import Prompt, load_prompts, prompts_fingerprint, split_prompts


def prompt(number: int, skill: str = "sums", text: str | None = None) -> Prompt:
    return Prompt(f"p{number}", skill, (Message("user", text or f"question {number}"),))


GOOD = '{"id": "a", "skill": "sums", "prompt": "1 + 1?"}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", 'is empty: it holds no entries; expected .*"id": "a-1", "skill": "arithmetic"'),
        ("\n  \n", "is empty"),
        (GOOD + "\n{oops", "line 2 is not JSON"),
        ("[1]", "entry 0 holds 1, expected an object"),
        ('{"id": "", "prompt": "x"}', "line 1: id is '', expected one that is not empty"),
        ('{"id": 7, "prompt": "x"}', "line 1: id is 7, expected text"),
        ('{"id": "a", "prompt": " "}', "prompt is ' ', expected text that is not blank"),
        ('{"id": "a", "prompt": NaN}', "prompt is nan, expected text"),
        ('{"id": "a"}', "expected either prompt or messages"),
        ('{"id": "a", "prompt": "x", "messages": [{"role": "user", "content": "x"}]}', "either prompt or messages"),
        ('{"id": "a", "messages": []}', r"messages is \[\]"),
        ('{"id": "a", "messages": "x"}', r"messages is 'x', expected a list of {role, content}"),
        ('{"id": "a", "messages": [{"role": "user"}]}', r"messages\[0\].content is missing"),
        ('{"id": "a", "messages": [{"role": "user", "content": [1]}]}', r"messages\[0\].content is \[1\], expected"),
        ('{"id": "a", "messages": [{"role": "system", "content": " "}]}', "messages holds no text in any turn"),
        (
            '{"id": "a", "messages": [{"role": "human", "content": "x"}]}',
            "role is 'human', .*did you mean 'user'",
        ),
        ('{"id": "a", "messages": [{"role": "wizard", "content": "x"}]}', "role is 'wizard', expected one of system, "),
        ('{"id": "a", "promt": "x"}', "unknown key 'promt', .*; did you mean 'prompt'"),
        ('{"id": "a", "prompt": "x", "finish_reason": "abort"}', "finish_reason is 'abort', expected 'stop' or"),
        ('{"id": "a", "prompt": "x\\ud800"}', r"line 1: prompt is .*character 1 is the lone surrogate '\\ud800'"),
        ('{"id": "a\\udfff", "prompt": "x"}', r"line 1: id is .* lone surrogate '\\udfff'"),
        ('{"id": "a", "skill": "\\udfff", "prompt": "x"}', r"line 1: skill is .* lone surrogate"),
        ('{"data": [' + GOOD + "]}", r"line 1 is an object whose 'data' is a list of entries; save that list alone"),
        (GOOD + "\n\n" + GOOD, "line 3: id 'a' is also that of .* line 1; ids must be unique"),
        (f"[{GOOD}, {GOOD}]", "entry 1: id 'a' is also that of .*, entry 0"),
    ],
)
def test_a_malformed_file_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(PromptError, match=message):
        load_prompts(path)


def test_lists_packed_files_and_byte_order_marks_are_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    for data in (f"[{GOOD}]".encode(), b"\xef\xbb\xbf" + GOOD.encode(), gzip.compress(GOOD.encode())):
        path.write_bytes(data)
        assert [prompt.id for prompt in load_prompts(path)] == ["a"]


def test_a_system_prompt_is_whole_text(tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text(GOOD)
    with pytest.raises(PromptError, match=r"collect.system_prompt: content is .* lone surrogate"):
        load_prompts(tmp_path / "prompts", system_prompt="\ud800")


def test_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="No such file"):
        load_prompts(tmp_path / "none.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PromptError, match="not UTF-8"):
        load_prompts(tmp_path / "binary")


def test_both_spellings_and_the_system_prompt(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    own = [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "hi"}]
    path.write_text(GOOD + "\n" + json.dumps({"id": "b", "skill": "chat", "messages": own}))
    first, second = load_prompts(path, system_prompt="Be brief.")
    assert first.messages == (Message("system", "Be brief."), Message("user", "1 + 1?"))
    assert second.messages == (Message("system", "Rhyme."), Message("user", "hi"))


def test_responses_are_required_only_where_they_are_scored(tmp_path: Path) -> None:
    path = tmp_path / "given.jsonl"
    path.write_text('{"id": "a", "prompt": "x", "response": "y", "finish_reason": "length"}')
    (given,) = load_prompts(path, responses=True)
    assert (given.response, given.finished) == ("y", False)
    path.write_text(GOOD)
    with pytest.raises(PromptError, match="response is missing; expected the text to score"):
        load_prompts(path, responses=True)


def test_every_skill_is_on_both_sides_and_the_share_is_kept() -> None:
    prompts = [prompt(i, ("sums", "lists", "facts")[i % 3]) for i in range(120)] + [
        prompt(900, "pair"),
        prompt(901, "pair"),
    ]
    splits = split_prompts(prompts, 0.1)
    for skill in ("sums", "lists", "facts"):
        assert sum(p.skill == skill for p in splits["held_out"]) == 4
    assert [p.skill for p in splits["held_out"]].count("pair") == 1
    assert {p.id for p in splits["train"]} | {p.id for p in splits["held_out"]} == {p.id for p in prompts}
    assert len(splits["train"]) + len(splits["held_out"]) == len(prompts)


def test_the_split_depends_on_ids_alone() -> None:
    prompts = [prompt(i, ("sums", "lists")[i % 2]) for i in range(40)]
    forward, backward = split_prompts(prompts, 0.2), split_prompts(prompts[::-1], 0.2)
    assert [p.id for p in forward["held_out"]] == [p.id for p in backward["held_out"]]
    assert [p.id for p in forward["train"]] == [p.id for p in backward["train"]]
    # A fixed expectation: a change of the hash would silently mix training and held-out text of existing runs.
    assert sorted(p.id for p in forward["held_out"]) == EXPECTED_HELD_OUT


def test_one_conversation_under_two_ids_is_never_on_both_sides() -> None:
    prompts = [prompt(i, text=f"question {i % 10}") for i in range(40)]
    splits = split_prompts(prompts, 0.3)
    assert splits["held_out"]
    assert not {p.content for p in splits["train"]} & {p.content for p in splits["held_out"]}


def test_nothing_is_held_out_where_none_is_wanted() -> None:
    assert split_prompts([prompt(i) for i in range(5)], 0.0)["held_out"] == []


def test_the_fingerprint_sees_every_part() -> None:
    base = prompt(1)
    variants = [
        base,
        prompt(2),
        prompt(1, "lists"),
        prompt(1, text="other"),
        Prompt("p1", "sums", base.messages, "answer"),
        Prompt("p1", "sums", base.messages, rendered=True),
        Prompt("p1", "sums", base.messages, rendered=False),
    ]
    assert len({prompts_fingerprint([p]) for p in variants}) == len(variants)


EXPECTED_HELD_OUT = ["p0", "p17", "p2", "p28", "p33", "p37", "p38", "p7"]
