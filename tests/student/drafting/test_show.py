"""`student generate --with-teacher`: the teacher's own greedy answer, and every draft that it saw."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shared.dataset.reader import Dataset
from shared.errors import ConfigError
from student.cli import app
from student.drafting.show import generate_with_teacher
from tests.fixtures.served_run import pipeline


def test_options_of_the_sampler_do_not_go_with_a_teacher(tmp_path: Path) -> None:
    words = ["generate", str(tmp_path), "--prompt", "Hello", "--with-teacher", "configs/demo.yaml"]
    for option in ("--steps", "--seed"):
        result = CliRunner().invoke(app, [*words, option, "4"])
        assert isinstance(result.exception, ConfigError)
        assert "takes --prompt, --system and --length" in str(result.exception)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.usefixtures("warm_serving")
def test_the_answer_is_the_teachers_and_its_drafts_are_shown(
    served_run: Path, served_teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = pipeline(served_run, served_teacher)
    steps = generate_with_teacher(config, config.student_final_dir, "What is the opposite of happy?", length=20)
    tokenizer = AutoTokenizer.from_pretrained(served_teacher)
    chat = [{"role": "user", "content": "What is the opposite of happy?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(served_teacher, dtype=torch.float32)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :].tolist()
    assert [token for step in steps for token in (*step.accepted, *step.own)] == expected
    assert any(step.rejected for step in steps), "an untrained student's drafts are seen"
    assert all(len(step.own) == 1 for step in steps[:-1])
    printed = capsys.readouterr().out
    assert f"{len(expected)} tokens in {len(steps)} steps of the teacher" in printed
    text = re.sub(r"\[-.*?-\]|\{\+|\+\}", "", printed.partition("\n")[2].rpartition("\n")[0], flags=re.DOTALL)
    said = Dataset.open(config.shards_dir).vocabulary.decode(expected).decode("utf-8", "replace")
    assert "".join(said.split()) in "".join(text.split())
