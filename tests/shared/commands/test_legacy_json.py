"""The legacy JSON layout: every variant comes in, goes out and comes in as the same records; what is wrong is named."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.commands.legacy_json.files import export_json, import_json, read_entries
from shared.commands.legacy_json.layout import EntryReader, ImportSettings, to_entry
from shared.dataset.reader import Dataset
from shared.dataset.records import Sampling
from shared.dataset.validate import validate_dataset
from shared.dataset.writer import DatasetWriter
from shared.errors import ConfigError, DatasetError
from tests.fixtures.toy_run import TEMPLATE, make_tokenizer
from tests.shared.commands.test_cli import shards
from tests.shared.dataset.test_reader import assert_same

ALL = ImportSettings(top_k=16, held_out=0.0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def reader(tokenizer: Path) -> EntryReader:
    return EntryReader(tokenizer, ALL)


def full_rows(reader: EntryReader, response: str, seed: int = 0) -> list[list[float]]:
    """Logits over the whole vocabulary, one row per token of the response and one for its end."""
    random = np.random.default_rng(seed)
    count = len(reader._chat.encoder.encode(response)) + 1
    return np.round(random.normal(0, 3, (count, len(reader.vocabulary))), 4).tolist()


def entry_of(reader: EntryReader, kind: str) -> dict[str, Any]:
    """One entry of each variant, over the response ` the cat runs`."""
    response = " the cat runs"
    rows = full_rows(reader, response)
    entry: dict[str, Any] = {"prompt": "what does the cat do", "response": response, "logits": rows}
    if kind == "full":
        return entry
    order = np.argsort(-np.array(rows), axis=1)[:, :5]
    entry["logits"] = np.take_along_axis(np.array(rows), order, 1).tolist()
    if kind in ("ids", "both"):
        entry["tokenID"] = order.tolist()
    if kind in ("strings", "both"):
        entry["token"] = [[reader.vocabulary.texts[i] for i in row] for row in order]
    if kind == "plain":
        return {"messages": [{"role": "user", "content": entry["prompt"]}, {"role": "assistant", "content": response}]}
    return entry


@pytest.mark.parametrize("kind", ["full", "ids", "strings", "both", "plain"])
def test_each_variant_makes_the_round_trip(reader: EntryReader, tokenizer: Path, tmp_path: Path, kind: str) -> None:
    entries = [{**entry_of(reader, kind), "id": f"sample-{i}", "skill": "cats"} for i in range(3)]
    (tmp_path / "in.json").write_text(json.dumps(entries))
    import_json(tmp_path / "in.json", tmp_path / "one", tokenizer, ALL)
    assert validate_dataset(tmp_path / "one").problems == []
    assert export_json(tmp_path / "one", tmp_path / "out.json") == 3
    import_json(tmp_path / "out.json", tmp_path / "two", tokenizer, ALL)
    first, second = (list(Dataset.open(tmp_path / name).records()) for name in ("one", "two"))
    assert [r.sample_id for r in first] == ["sample-0", "sample-1", "sample-2"]
    for a, b in zip(first, second, strict=True):
        assert_same(a, b)
    export_json(tmp_path / "two", tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "out.json").read_bytes()


def test_whole_rows_become_logprobs_with_their_true_normalizer(reader: EntryReader) -> None:
    entry = entry_of(reader, "full")
    d = reader.record(entry, "here", 0).distributions
    assert d is not None
    logits = np.array(entry["logits"])
    exact = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert (np.diff(d.offsets) == 16).all()
    for position in range(len(d)):
        ids, logprobs = d.row(position)
        np.testing.assert_allclose(logprobs, exact[position][ids], rtol=1e-5)
    np.testing.assert_allclose(d.tail, 1 - np.exp(d.logprobs.reshape(-1, 16)).sum(1), atol=1e-5)
    own = reader.record(entry, "here", 0).response_ids
    np.testing.assert_allclose(d.sampled, exact[np.arange(len(own)), own], rtol=1e-5)


def test_candidates_alone_leave_the_tail_unknown_and_say_what_they_know(reader: EntryReader, tokenizer: Path) -> None:
    entry = entry_of(reader, "ids")
    record = reader.record(entry, "here", 0)
    assert record.distributions is not None
    assert np.isnan(record.distributions.tail).all()
    np.testing.assert_allclose(np.exp(record.distributions.logprobs.reshape(-1, 5)).sum(1), 1, rtol=1e-5)
    # Logprobs as they stand leave a tail.
    half = [[math.log(0.5), math.log(0.25)]] * len(entry["logits"])
    entry |= {"logits": half, "tokenID": [row[:2] for row in entry["tokenID"]]}
    known = EntryReader(tokenizer, ImportSettings(values="logprobs")).record(entry, "here", 0).distributions
    assert known is not None
    np.testing.assert_allclose(known.tail, 0.25, atol=1e-6)
    with pytest.raises(DatasetError, match=r"add up to 2\.0+, more than 1: these are not logprobs; .*--values logits"):
        EntryReader(tokenizer, ImportSettings(values="logprobs")).record(
            {**entry, "logits": [[0.0, 0.0]] * len(half)}, "here", 0
        )


def test_candidates_that_hold_next_to_nothing_keep_a_probability(
    reader: EntryReader, tokenizer: Path, tmp_path: Path
) -> None:
    """A tail of 1 - 2e-9 is 1 in float32."""
    entry = entry_of(reader, "ids")
    entry |= {"logits": [[-20.0]] * len(entry["logits"]), "tokenID": [row[:1] for row in entry["tokenID"]]}
    (tmp_path / "in.json").write_text(json.dumps([entry]))
    import_json(tmp_path / "in.json", tmp_path / "d", tokenizer, ImportSettings(values="logprobs", held_out=0.0))
    assert validate_dataset(tmp_path / "d").problems == []
    d = next(Dataset.open(tmp_path / "d").records()).distributions
    assert d is not None
    assert (d.logprobs < -16).all()
    assert (d.tail < 1).all()
    assert (d.tail > 1 - 1e-7).all()


def test_imports_of_one_teacher_can_be_merged(
    reader: EntryReader,
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in "ab":
        entry = {**entry_of(reader, "plain"), "id": name, "split": "train"}
        (tmp_path / f"{name}.json").write_text(json.dumps([entry]))
        for directory, options in ((name, []), (f"named-{name}", ["--teacher", "LLaMA"])):
            command = ["import-json", tmp_path / f"{name}.json", tmp_path / directory, "--tokenizer", tokenizer]
            assert shards(monkeypatch, *command, *options) == 0
    capsys.readouterr()
    assert shards(monkeypatch, "merge", tmp_path / "a", tmp_path / "b", tmp_path / "m") == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "teacher: 'import:a.json' there, 'import:b.json' here" in message
    assert "parts of one teacher are imported with the same --teacher" in message
    assert shards(monkeypatch, "merge", tmp_path / "named-a", tmp_path / "named-b", tmp_path / "m") == 0
    assert Dataset.open(tmp_path / "m").provenance.teacher == "LLaMA"


def test_plain_conversations_are_records_without_distributions(reader: EntryReader) -> None:
    record = reader.record(entry_of(reader, "plain"), "here", 7)
    assert record.distributions is None
    assert record.response_bytes == b" the cat runs"
    assert record.prompt_text == "<|begin|><|turn|>user\nwhat does the cat do<|end|><|turn|>assistant\n"
    special = reader.vocabulary.is_special[record.prompt_ids]
    assert special.sum() == 4
    assert record.response_ids[-1] == reader.vocabulary.roles["end_of_turn"]
    assert record.sampling.rule == "filtered"  # nobody says how it was written
    assert record.sample_id.endswith("/7")


DATED = "{% if not date is defined %}{% set date = strftime_now('%d.%m.%Y') %}{% endif %}{{ date }}" + TEMPLATE


def test_an_import_is_bound_to_the_rendering_of_its_prompts(
    reader: EntryReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tokenizer(tmp_path / "dated")
    (tmp_path / "dated" / "chat_template.jinja").write_text(DATED)
    (tmp_path / "in.json").write_text(json.dumps([entry_of(reader, "plain")]))
    command = ["import-json", tmp_path / "in.json", tmp_path / "d", "--tokenizer", tmp_path / "dated"]
    assert shards(monkeypatch, *command) == 2
    assert "--template-argument 'date=" in " ".join(capsys.readouterr().err.split())
    assert shards(monkeypatch, *command, "--template-argument", "dat=x") == 2
    assert "did you mean 'date'?" in " ".join(capsys.readouterr().err.split())
    assert shards(monkeypatch, *command, "--template-argument", "date") == 2
    assert "--template-argument 'date' is not KEY.PATH=VALUE" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "d").exists()
    assert shards(monkeypatch, *command, "--template-argument", "date=1 May") == 0
    dataset = Dataset.open(tmp_path / "d")
    assert next(iter(dataset.records())).prompt_text.startswith("1 May<|begin|>")
    (tmp_path / "dated" / "chat_template.jinja").write_text("{{ date }} " + TEMPLATE)
    assert shards(monkeypatch, *command, "--template-argument", "date=1 May") == 2
    assert "details.rendered_probe.user: '1 May<|begin|>" in " ".join(capsys.readouterr().err.split())
    # What an export has rendered is not rendered again, so the clock is not asked.
    assert shards(monkeypatch, "export-json", tmp_path / "d", tmp_path / "out.json") == 0
    (tmp_path / "dated" / "chat_template.jinja").write_text(DATED)
    again = ["import-json", tmp_path / "out.json", tmp_path / "again", "--tokenizer", tmp_path / "dated"]
    assert shards(monkeypatch, *again) == 0
    assert_same(*(next(iter(Dataset.open(tmp_path / name).records())) for name in ("d", "again")))


def test_rendered_prompts_are_imported_as_they_are(
    reader: EntryReader, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "<|begin|><|turn|>user\nwhat does the cat do<|end|><|turn|>assistant\n"
    expected = reader.record(entry_of(reader, "plain"), "here", 0)
    (tmp_path / "in.json").write_text(json.dumps([{"prompt": text, "response": " the cat runs"}]))
    for name, options in (("auto", []), ("told", ["--rendered"]), ("words", ["--no-rendered"])):
        command = ["import-json", tmp_path / "in.json", tmp_path / name, "--tokenizer", tokenizer, *options]
        assert shards(monkeypatch, *command) == 0
        record = next(iter(Dataset.open(tmp_path / name).records()))
        same = record.prompt_ids.tolist() == expected.prompt_ids.tolist()
        assert same == (name != "words")
        assert reader.vocabulary.is_special[record.prompt_ids].sum() == 4
    assert Dataset.open(tmp_path / "auto").manifest.provenance != Dataset.open(tmp_path / "words").manifest.provenance


def stated(reader: EntryReader) -> dict[str, Any]:
    """An entry that says everything twice: the export of one with values over the whole vocabulary."""
    entry = entry_of(reader, "full")
    for row, index in zip(entry["logits"], reader.record(entry, "here", 0).response_ids, strict=True):
        row[index] = max(row) + 1.0  # the response's tokens lead their rows
    return to_entry(reader.record(entry, "here", 0), reader.vocabulary)


def changed(entry: dict[str, Any], key: str, row: int, position: int, value: Any) -> dict[str, Any]:
    rows = [list(r) for r in entry[key]]
    rows[row][position] = value
    return {**entry, key: rows}


def malformed(reader: EntryReader) -> dict[str, tuple[Any, str]]:
    ids, full, strings = (entry_of(reader, kind) for kind in ("ids", "full", "strings"))
    size = len(reader.vocabulary)
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 9, "seed": None}
    return {
        "not an object": ([1, 2], r"holds \[1, 2\], expected an object; the file should be .*configs/examples"),
        "no response": ({"prompt": "x", "logits": []}, r"has no response; expected prompt and response, or messages"),
        "wrong response": ({**ids, "response": 3}, r"response is 3, expected text"),
        "no prompt": ({"response": "x"}, r"prompt is missing, expected text or a list"),
        "wrong prompt": ({**ids, "prompt": 3}, r"prompt is 3, expected text, or a list of {role, content}"),
        "bad turn": ({"messages": [{"role": "user"}]}, r"messages\[0\].content is missing"),
        "turn's key": ({**ids, "prompt": [{"role": "user", "content": "x", "name": "b"}]}, r"prompt\[0\].name is not"),
        "no last turn": ({"messages": [{"role": "user", "content": "x"}]}, r"messages end with 'user', expected a"),
        "surrogate": ({**ids, "prompt": "x\ud83d"}, r"character 1 is the lone surrogate '\\ud83d', half of a"),
        "surrogate id": ({**ids, "id": "\udcff"}, r"id is '\\udcff', .*lone surrogate"),
        "surrogate text": ({**ids, "prompt_text": "\udcff"}, r"prompt_text is .*lone surrogate"),
        "id": ({**ids, "id": True}, r"id is True, expected text"),
        "split": ({**ids, "split": "test"}, r"split is 'test', expected 'train' or 'held_out'"),
        "key": ({**ids, "respons_ids": []}, r"unknown key 'respons_ids', .*; did you mean 'response_ids'\?"),
        "data": ({"data": [ids]}, r"is an object whose 'data' is a list of entries; save that list alone .*jq \.data"),
        "rows": ({**ids, "logits": ids["logits"][:-2]}, r"\d rows of logits for a response of \d tokens"),
        "not rows": ({**ids, "logits": "x"}, r"logits is 'x', expected a list"),
        "dots": ({**ids, "logits": "..."}, r"logits is '...', .*schematic example; a real one is .*configs/examples"),
        "not a row": ({**ids, "logits": [1.0] * 4}, r"row 0 is 1.0, expected a list of numbers"),
        "dots for a row": ({**ids, "logits": [*ids["logits"][:-1], "..."]}, r"row 3 is '...'.*schematic .*configs/ex"),
        "nan": (changed(ids, "logits", 1, 2, math.nan), r"row 1, position 2: logit nan, expected a finite number"),
        "infinity": (changed(ids, "logits", 2, 0, -math.inf), r"row 2, position 0: logit -inf"),
        "beyond floats": (changed(ids, "logits", 2, 0, 10**400), r"row 2, position 0: logit inf"),
        "text": (changed(ids, "logits", 1, 3, "1.5"), r"row 1, position 3: '1.5' is not a number; .*without quotes"),
        "truth": (changed(ids, "logits", 1, 3, True), r"row 1, position 3: True is not a number"),
        "nested": (changed(ids, "logits", 1, 3, [1.0]), r"row 1, position 3: \[1.0\] is not a number"),
        "large id": (changed(ids, "tokenID", 2, 1, size), rf"row 2: tokenID, position 1: id {size} is outside the voc"),
        "huge id": (changed(ids, "tokenID", 2, 1, 2**70), r"row 2: tokenID, position 1: id 1180591620717411303424 is"),
        "float id": (changed(ids, "tokenID", 0, 1, 2.5), r"position 1: id 2.5 is outside"),
        "true id": (changed(ids, "tokenID", 0, 1, True), r"position 1: id True is outside"),
        "text id": (changed(ids, "tokenID", 0, 1, "123"), r"position 1: id '123' is outside .* without quotes"),
        "twice": (
            changed(ids, "tokenID", 1, 3, ids["tokenID"][1][0]),
            r"row 1, position 3: candidate \d+ .* position 0 already",
        ),
        "width": ({**ids, "tokenID": [r[:-1] for r in ids["tokenID"]]}, r"row 0: 5 logits for 4 candidates"),
        "id rows": ({**ids, "tokenID": ids["tokenID"][1:]}, r"tokenID has 3 rows, logits has 4"),
        "no ids": ({k: v for k, v in ids.items() if k != "tokenID"}, r"row 0: 5 values without token or tokenID"),
        "half rows": ({**full, "logits": [r[:-1] for r in full["logits"]]}, r"expected the whole vocabulary of"),
        "token": ({**ids, "tokenID": None, "token": [["?!?"] * 5] * 4}, r"the tokenizer has no token '\?!\?'"),
        "no token": (changed(strings, "token", 0, 0, None), r"row 0, position 0: the tokenizer has no token None"),
        "no logits": ({**ids, "logits": None}, r"tokenID without logits"),
        "finish": ({**ids, "finish_reason": "done"}, r"finish_reason is 'done', expected 'stop', 'length' or"),
        "sampling": ({**ids, "sampling": {"heat": 1}}, r"sampling.heat is not a known key"),
        "hot": ({**ids, "sampling": sampling | {"temperature": "hot"}}, r"sampling.temperature is 'hot', expected a"),
        "warm": ({**ids, "sampling": sampling | {"temperature": math.nan}}, r"temperature is nan, expected a finite n"),
        "cold": ({**ids, "sampling": sampling | {"temperature": -1}}, r"temperature is -1, expected greater than"),
        "seed": ({**ids, "sampling": sampling | {"seed": 2**70}}, r"seed is 1180591620717411303424, expected less"),
        "true seed": ({**ids, "sampling": sampling | {"seed": True}}, r"seed is True, expected a whole number"),
        "tail": ({**ids, "tail": [0.1]}, r"tail has 1 values, logits has 4 rows"),
        "tail value": ({**ids, "tail": [0.1, 0.1, "x", 0.1]}, r"tail\[2\] is 'x', expected a number, without quotes"),
        "never": ({**ids, "sampled": [-math.inf] * 4}, r"sampled\[0\] is -inf, expected a finite number, or null"),
    }  # fmt: skip


def contradictions(reader: EntryReader) -> dict[str, tuple[Any, str]]:
    entry, full = stated(reader), entry_of(reader, "full")
    end = reader.vocabulary.texts[entry["response_ids"][-1]]
    turns = [*entry["prompt"], {"role": "assistant", "content": entry["response"]}]
    return {
        "token and id": (changed(entry, "token", 1, 2, "Ġzebra"), r"row 1, position 2: token is 'Ġzebra', but tokenID"),
        "fewer tokens": ({**entry, "token": [r[:-1] for r in entry["token"]]}, r"16 logits for 15 candidates in token"),
        "response": ({**entry, "response": " a dog"}, r"response_ids and response differ at character 1: ' the cat ru"),
        "response's turn": (
            {**entry, "messages": [*turns[:-1], {"role": "assistant", "content": "no"}]},
            r"response and messages' last turn differ at character 0",
        ),
        "prompt": ({**entry, "messages": [{"role": "user", "content": "why"}]}, r"prompt and messages differ .*'why'"),
        "prompt_ids": ({**entry, "prompt_ids": entry["prompt_ids"][:-3]}, r"prompt_ids and prompt_text differ at char"),
        "rendered": ({**entry, "prompt_text": None, "prompt": "why"}, r"prompt_ids and prompt differ at character"),
        "sampled": ({**entry, "sampled": [-5.0, *entry["sampled"][1:]]}, r"row 0: sampled is -5.0000, expected -\d"),
        "shift": (
            {**entry, "sampled": entry["sampled"][1:] + entry["sampled"][:1]},
            r"row 0: sampled is -\d\.\d+, expected .* the rows are shifted against the response",
        ),
        "tail": ({**entry, "tail": [0.7] * 4}, r"row 0: the candidates' probabilities .* beside a tail of 0.7"),
        "tail of nothing": ({**full, "tail": [0.5] * 4}, r"row 0: tail is 0.5000, expected 0: the row has every token"),
        "leaders": ({**full, "tokenID": [[1, 2]] * 4}, r"row 0, position 0: candidate 1 is not among the 2 likeliest"),
        "end": ({**entry, "finish_reason": "length"}, rf"finish_reason is length, but .* its end, '{re.escape(end)}'"),
        "max_tokens": (
            {**entry, "sampling": {"temperature": 1.0, "max_tokens": 2}},
            r"sampling.max_tokens is 2, but the response has 4 tokens",
        ),
        "greedy": (
            {**full, "sampling": {"temperature": 0.0}},
            r"token \d: decoded greedily with logprob -.*, but the row's top has",
        ),
    }  # fmt: skip


def test_every_malformed_entry_and_every_contradiction_has_its_message_and_leaves_nothing(
    reader: EntryReader, tokenizer: Path, tmp_path: Path
) -> None:
    good = {**entry_of(reader, "ids"), "prompt_id": "good"}
    for name, (entry, message) in (malformed(reader) | contradictions(reader)).items():
        (tmp_path / "in.json").write_text(json.dumps([good, entry]))
        with pytest.raises(DatasetError, match=rf"in\.json, entry 1.*{message}"):
            import_json(tmp_path / "in.json", tmp_path / "d", tokenizer, ALL)
        assert not (tmp_path / "d").exists(), name


def test_what_agrees_within_a_tolerance_is_imported(reader: EntryReader) -> None:
    """Ends spelled out, white space that tokenizers take off, names that decode to U+FFFD, rounded logprobs."""
    entry = stated(reader)
    expected = reader.record(entry, "here", 0)
    system = {"role": "system", "content": "be brief"}
    full = entry_of(reader, "full")
    leading = np.argsort(-np.array(full["logits"]), axis=1)[:, :3].tolist()
    named = [[reader.vocabulary.tokens[i].decode("utf-8", "replace") for i in row] for row in entry["tokenID"]]
    for other in (
        {**entry, "response": entry["response"] + "<|end|>"},
        {**entry, "response": entry["response"].strip()},
        {**entry, "token": named},
        {**entry, "token": [[None] * len(row) for row in entry["token"]]},
        {**entry, "sampled": [round(value, 2) for value in entry["sampled"]]},
        {**entry, "prompt_ids": entry["prompt_ids"][1:], "prompt_text": entry["prompt_text"].removeprefix("<|begin|>")},
        {**entry, "messages": [*entry["prompt"], {"role": "assistant", "content": entry["response"]}]},
        {**entry, "id": None, "sampling": None, "split": None, "seed": 5},
    ):
        found = reader.record(other, "here", 0)
        assert found.distributions is not None
        assert expected.distributions is not None
        np.testing.assert_array_equal(found.distributions.logprobs, expected.distributions.logprobs)
        np.testing.assert_array_equal(found.response_ids, expected.response_ids)
        assert found.sample_id != "None"
    beside = reader.record({**full, "tokenID": leading}, "here", 0).distributions
    alone = reader.record(full, "here", 0).distributions
    assert beside is not None
    assert alone is not None
    np.testing.assert_array_equal(beside.ids, alone.ids)
    with_system = {**entry_of(reader, "ids"), "messages": [system, {"role": "user", "content": "what does the cat do"}]}
    assert [m.role for m in reader.record(with_system, "here", 0).messages] == ["system", "user"]
    cut = reader.record({**entry_of(reader, "plain"), "finish_reason": "length"}, "here", 0)
    assert cut.response_ids[-1] != reader.vocabulary.roles["end_of_turn"]


def test_entries_that_contradict_each_other_are_named(reader: EntryReader, tokenizer: Path, tmp_path: Path) -> None:
    entry = {**entry_of(reader, "plain"), "id": "same", "prompt_id": "p", "split": "train"}
    other = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]
    for change, message in {
        "{}": r"entry 1: id 'same' is also that of .*in.json, entry 0",
        json.dumps({"id": "b", "messages": other}): r"entry 1: prompt_id 'p' is that of another prompt in .*, entry 0",
        json.dumps(
            {"id": "b", "prompt_id": "q", "split": "held_out"}
        ): r"entry 1: the prompt .* is also in .*, entry 0,",
    }.items():
        (tmp_path / "in.json").write_text(json.dumps([entry, {**entry, **json.loads(change)}]))
        with pytest.raises(DatasetError, match=message):
            import_json(tmp_path / "in.json", tmp_path / "d", tokenizer, ALL)
    asked = ImportSettings(sampling=Sampling(1.0, 1.0, 0, 0, None))
    with pytest.raises(DatasetError, match=r"sampling.temperature is 0.5, --temperature is 1; leave out --temperature"):
        EntryReader(tokenizer, asked).record({**entry, "sampling": {"temperature": 0.5}}, "here", 0)
    with pytest.raises(ConfigError, match=r"--held-out is nan, expected a share from 0 to 1"):
        ImportSettings(held_out=math.nan)


def test_a_share_of_each_skill_is_held_out_and_a_stated_split_binds_its_prompt(tokenizer: Path, tmp_path: Path) -> None:
    entries = [
        {"id": f"{skill}-{i}", "skill": skill, "prompt": f"{skill} {i}", "response": "so"}
        for skill in ("a", "b")
        for i in range(10)
    ]
    stated = [{"prompt": "said", "response": "no"}, {"prompt": "said", "response": "so", "split": "held_out"}]
    (tmp_path / "in.json").write_text(json.dumps(stated + entries))
    import_json(tmp_path / "in.json", tmp_path / "d", tokenizer, ImportSettings(held_out=0.2))
    found = Counter((record.skill, record.split) for record in Dataset.open(tmp_path / "d").records())
    assert found == {
        ("", "held_out"): 2, ("a", "held_out"): 2, ("a", "train"): 8, ("b", "held_out"): 2, ("b", "train"): 8,
    }  # fmt: skip


def test_an_import_that_was_interrupted_says_what_to_do_with_another_file(
    reader: EntryReader, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "in.json"
    path.write_text(json.dumps([entry_of(reader, "plain")]))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DatasetWriter, "write_unit", interrupt)
        with pytest.raises(KeyboardInterrupt):
            import_json(path, tmp_path / "d", tokenizer, ALL)
    path.write_text(json.dumps([entry_of(reader, "plain"), entry_of(reader, "ids")]))
    with pytest.raises(DatasetError, match=r"import into a new directory, or delete this one first$") as error:
        import_json(path, tmp_path / "d", tokenizer, ALL)
    assert "`name`" not in str(error.value)


def test_keys_that_are_not_of_the_layout_are_left_out_with_a_warning(
    reader: EntryReader, tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = EntryReader(tokenizer, ALL)
    for number in range(2):
        other.record({**entry_of(reader, "plain"), "model": "x", "created": 1}, f"entry {number}", number)
    assert [record.getMessage() for record in caplog.records] == [
        "entry 0: not of the layout, and left out here and below: created, model"
    ]


def test_an_export_of_nothing_says_what_there_is(reader: EntryReader, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text(json.dumps([entry_of(reader, "plain")]))
    settings = ImportSettings(held_out=0.0, sampling=Sampling(0.0, 1.0, 0, 0, None))
    import_json(tmp_path / "in.json", tmp_path / "d", tokenizer, settings)
    with pytest.raises(DatasetError, match=r"no records of split held_out and rule any; it has 1 of train/greedy"):
        export_json(tmp_path / "d", tmp_path / "out.json", split="held_out")
    assert not list(tmp_path.glob("out*"))


def test_the_example_file_is_of_the_layout() -> None:
    path = Path(__file__).parents[3] / "configs/examples/legacy.json"
    assert path.stat().st_size < 200_000
    entries = [entry for _, entry in read_entries(path)]
    assert {"tokenID", "token", "logits"} <= set().union(*entries)
    assert any("messages" in entry and "logits" not in entry for entry in entries)
    rows = [entry for entry in entries if "logits" in entry]
    assert all(len(entry["logits"]) == len(entry.get("response_ids", entry["logits"])) for entry in rows)
